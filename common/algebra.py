"""Are two short formulas the same? Exact arithmetic on quotients of polynomials with rational numbers and square roots.

    1+x and x+1,  (x-1)(x+1) and x^2-1,  \\sqrt{12} and 2\\sqrt{3},  5! and 120,  \\binom{6}{2} and 15: the same

A formula is parsed to numerator and denominator, each a sum of terms; two are equal if cross-multiplying makes them so.
Text is hostile: nothing is evaluated by Python, powers and sizes are bounded, and what is beyond the bounds is unknown.
Left out: roots other than square ones of whole numbers and fractions, functions, decimals of roots and of pi.
"""

import math
import re
from fractions import Fraction

# A term: (square-free number under the root, ((letter, power), ...)) -> its coefficient.
Term = tuple[int, tuple[tuple[str, int], ...]]
Sum = dict[Term, Fraction]
Quotient = tuple[Sum, Sum]

MOST_TERMS, MOST_POWER, MOST_BITS = 64, 12, 512
LARGEST_ROOT, LARGEST_FACTORIAL = 10**6, 30
ONE: Sum = {(1, ()): Fraction(1)}
TOKEN = re.compile(r"\\(?:frac|binom|sqrt|cdot|pi)(?![a-zA-Z])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[a-zA-Z]|[-+/^!(){}]| ")


class Unknown(Exception):
    """Not a formula of this kind, or beyond the bounds."""


def same(a: str, b: str) -> bool:
    """Whether both are formulas that can be read here and are equal. a, b: as common.verifier spells them."""
    try:
        (n, d), (m, e) = Parser(a).read(), Parser(b).read()
        return _times(n, e) == _times(m, d)
    except Unknown:
        return False


def _tidy(s: Sum) -> Sum:
    s = {term: c for term, c in s.items() if c}
    big = any(max(c.numerator.bit_length(), c.denominator.bit_length()) > MOST_BITS for c in s.values())
    if big or len(s) > MOST_TERMS:
        raise Unknown
    return s


def _plus(a: Sum, b: Sum) -> Sum:
    return _tidy({term: a.get(term, Fraction(0)) + b.get(term, Fraction(0)) for term in a.keys() | b.keys()})


def _times(a: Sum, b: Sum) -> Sum:
    out: Sum = {}
    for (root, letters), c in a.items():
        for (other, more), k in b.items():
            common = math.gcd(root, other)  # sqrt(6) sqrt(10) = 2 sqrt(15)
            powers = dict(letters)
            for letter, power in more:
                powers[letter] = powers.get(letter, 0) + power
            term = (root * other // common**2, tuple(sorted(powers.items())))
            out[term] = out.get(term, Fraction(0)) + c * k * common
    return _tidy(out)


def _number(q: Fraction) -> Sum:
    return _tidy({(1, ()): q})


def _root(q: Fraction) -> Sum:
    """sqrt(q) = sqrt(numerator * denominator) / denominator, squares taken out."""
    n, outside = q.numerator * q.denominator, 1
    if not 0 <= n <= LARGEST_ROOT:
        raise Unknown
    k = 2
    while k * k <= n:
        while n and n % (k * k) == 0:
            n, outside = n // (k * k), outside * k
        k += 1
    return _tidy({(n or 1, ()): Fraction(outside if n else 0, q.denominator)})


def _whole(q: Quotient) -> int:
    """The number of 0 or more that a quotient is."""
    value = _rational(q)
    if value.denominator != 1 or value < 0:
        raise Unknown
    return int(value)


def _rational(q: Quotient) -> Fraction:
    n, d = q
    if not n:
        return Fraction(0)
    if n.keys() != {(1, ())} or d.keys() != {(1, ())}:
        raise Unknown
    return n[1, ()] / d[1, ()]


class Parser:
    """Recursive descent over one formula. A product may be written without a sign; 1/2x is (1/2)x."""

    def __init__(self, text: str) -> None:
        # Letters alone are a word or a name, not a product: AB is not BA.
        if len(text) > 200 or re.fullmatch(r"[a-zA-Z ]*", text):
            raise Unknown
        found = TOKEN.findall(text)
        if "".join(found) != text:
            raise Unknown
        self.tokens, self.at = [t for t in found if t != " "], 0
        if " " in found and re.search(r"[0-9] [0-9]", text):  # 1 2 is neither 12 nor 2
            raise Unknown

    def read(self) -> Quotient:
        value = self.sum()
        if self.at != len(self.tokens):
            raise Unknown
        return value

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise Unknown
        self.at += 1
        return token

    def sum(self) -> Quotient:
        n: Sum = {}
        d, first = ONE, True
        while first or self.peek() in ("+", "-"):
            sign = self.take() if self.peek() in ("+", "-") else "+"
            m, e = self.product()
            m = _times(m, _number(Fraction(-1 if sign == "-" else 1)))
            n, d, first = _plus(_times(n, e), _times(m, d)), _times(d, e), False
        return n, d

    def product(self) -> Quotient:
        n, d = self.power()
        while (token := self.peek()) and token not in ("+", "-", ")", "}"):
            over = token == "/"
            if token in ("/", "\\cdot"):
                self.take()
            elif token[0].isdigit() or token[0] == ".":  # x2, \sqrt{2}3: unusual, so not guessed at
                raise Unknown
            m, e = self.power()
            if over:
                m, e = e, m
            n, d = _times(n, m), _times(d, e)
            if not d:
                raise Unknown
        return n, d

    def power(self) -> Quotient:
        base = self.atom()
        while self.peek() in ("^", "!"):
            if self.take() == "!":
                k = _whole(base)
                if k > LARGEST_FACTORIAL:
                    raise Unknown
                base = _number(Fraction(math.factorial(k))), ONE
                continue
            if self.peek() == "{":
                exponent = _rational(self.braces())
            else:
                token = self.take()
                if len(token) > 1 or not token.isdigit():  # LaTeX takes one character: 2^10 is spelled 2^{10}
                    raise Unknown
                exponent = Fraction(token)
            if exponent.denominator != 1 or abs(exponent) > MOST_POWER:
                raise Unknown
            n, d = base if exponent >= 0 else base[::-1]
            base = ONE, ONE
            for _ in range(abs(int(exponent))):
                base = _times(base[0], n), _times(base[1], d)
            if not base[1]:
                raise Unknown
        return base

    def braces(self) -> Quotient:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def atom(self) -> Quotient:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return _number(Fraction(token)), ONE
        if token == "\\pi" or token.isalpha():
            return {(1, ((token, 1),)): Fraction(1)}, ONE
        if token == "(":
            value = self.sum()
            self.take(")")
            return value
        if token == "{":
            self.at -= 1
            return self.braces()
        if token == "\\sqrt":
            return _root(_rational(self.braces())), ONE
        if token == "\\frac":
            (n, d), (m, e) = self.braces(), self.braces()
            if not m:
                raise Unknown
            return _times(n, e), _times(d, m)
        if token == "\\binom":
            above, below = _whole(self.braces()), _whole(self.braces())
            if above > 100:
                raise Unknown
            return _number(Fraction(math.comb(above, below))), ONE
        raise Unknown
