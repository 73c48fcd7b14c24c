"""Is a mathematical answer right? The last box of a response against a reference, by exact arithmetic on short texts.

  response --last_boxed--> text --parse--> Value --equal--> yes or no

Numbers become fractions, lists and intervals are compared item by item, everything else as LaTeX in one spelling. Where
the package math-verify is installed it is asked about what still looks different, in a process of its own that is
killed when it takes too long. Responses are hostile: nothing is evaluated, and what is longer than LONGEST is wrong.
Formulas are compared by common/algebra.py. Left out: numerical values of roots and of pi, conversion of units, an
inequality against its interval, arrays as columns, equations multiplied or rearranged, functions, vectors between
other brackets.
"""

import functools
import importlib.metadata
import importlib.util
import json
import re
import select
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from fractions import Fraction

from common import algebra
from common.errors import InputError
from common.files import ROOT

LONGEST = 1000  # characters of an answer; keeps every step below small, and integers short of Python's digit limit
DEEPEST = 8  # brackets inside brackets
MOST_BOXES = 20  # that can be one answer
BACKEND = "math-verify" if importlib.util.find_spec("math_verify") else "own"  # who has the last word

RULES = 3  # raised whenever a verdict of this file's own rules changes


def judge_name() -> str:
    """Who judges, for receipts and identities: "own rules 3", "own rules 3, then math-verify 0.9.0"."""
    asked = f", then math-verify {importlib.metadata.version('math-verify')}" if BACKEND == "math-verify" else ""
    return f"own rules {RULES}{asked}"


@dataclass(frozen=True)
class Value:
    """A number, or items between brackets, or text; name is x in "x = 5".

    brackets: as written ("(]"), "," for a list without any, "u" for a union, "m" for a matrix and "r" for its rows; the
    signs of an inequality, all turned to "<" and "≤". near: what a number was also said to be, rounded.
    """

    number: Fraction | None = None
    text: str = ""
    brackets: str = ""
    items: tuple["Value", ...] = ()
    name: str = ""
    near: "Value | None" = None


@dataclass(frozen=True)
class Grade:
    """correct; found: there was an answer at all; failed: wrong only because math-verify raised or took too long."""

    correct: bool
    found: bool
    failed: bool = False


# ---------- the answer in a response

_BOX = re.compile(r"\\boxed(?![a-zA-Z])\s*")
_FBOX = re.compile(r"\\fbox(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no brace
_GAP = r"(?:[\s$]|\\q?quad|\\[;,()\[\] ])*+"
_AND = r"(?:\\(?:text|mathrm|mbox)\s*\{\s*)?(?:and|or)\b\s*\}?"
_JOINED = re.compile(rf"{_GAP}(?:[,;]{_GAP}(?:{_AND})?|{_AND}){_GAP}")  # what may stand between boxes of one answer
_FORMULA = re.compile(r"(?:(?!\\[)\]])[^$\n])*")


def last_boxed(text: str) -> str | None:
    """What the last \\boxed (or, without any, the last \\fbox) holds; None when there is none or it never closes.

    "\\boxed 5" without braces holds the rest of its formula or line. Boxes with nothing but a comma, "and" or "or"
    between them are one answer, a list.
    """
    boxes = list(_BOX.finditer(text)) or list(_FBOX.finditer(text))
    if not boxes:
        return None
    last, _ = _content(text, boxes[-1].end())
    if last is None:
        return None
    contents, start = [last], boxes[-1].start()
    for box in boxes[-2 : -MOST_BOXES - 1 : -1]:
        held, end = _content(text, box.end(), start)
        if held is None or not _JOINED.fullmatch(text, end, min(start, end + LONGEST)):
            break
        if held not in contents:  # said twice is said once
            contents.insert(0, held)
        start = box.start()
    return contents[0] if len(contents) == 1 else ", ".join(contents)


def _content(text: str, at: int, end: int | None = None) -> tuple[str | None, int]:
    """What a box holds whose command ends at `at`, and where the box ends; it must close before `end`."""
    end = len(text) if end is None else end
    if text[at : at + 1] != "{":
        rest = _FORMULA.match(text, at, end)
        assert rest is not None  # the pattern matches the empty text too
        return rest[0].strip(), rest.end()
    depth = 0
    for token in _BRACE.finditer(text, at, end):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return text[at + 1 : token.start()].strip(), token.end()
    return None, end


def answer(text: str, lenient: bool = False) -> str | None:
    """The answer of a response: its last box. lenient: else what follows "he answer is", else the last number."""
    found = last_boxed(text)
    if not found and lenient:
        _, said, rest = text.rpartition("he answer is")
        if said:
            found = rest.strip().partition("\n")[0].removeprefix(":").strip()
        else:
            found = ([""] + re.findall(r"-?[0-9]*\.?[0-9]+", text[-LONGEST:].replace(",", "")))[-1]
    return found or None


# ---------- one spelling

_COMMANDS = {"×": "times", "·": "cdot", "*": "cdot", "π": "pi", "∞": "infty", "≈": "approx", "≤": "leq", "≥": "geq"}
_COMMANDS |= {"≠": "neq", "∪": "cup", "±": "pm"}
_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "°": "", "£": "", "€": ""} | {sign: f"\\{name} " for sign, name in _COMMANDS.items()}
)
_WORDS = r"\\(?:text(?:bf|it|rm|normal|sf)?|math(?:rm|bf|sf|it)|operatorname|mbox|emph|boldsymbol|bm)\s*\{"
_POWER = r"(?:\s*\^\s*\{?-?[0-9]\}?)?"
_NO_UNIT = r"(?!\s*(?:hundred|thousand|million|billion|trillion|dozen|and|or|[deij])\b)"
_UNIT = (
    r"(?:(?:square|cubic|sq|cu)\.? )?(?:degrees?|percent|dollars?|cents?|units?|inch(?:es)?|feet|foot|yards?|miles?|mph"
    r"|(?:centi|milli|kilo)?met(?:er|re)s?|(?:kilo|milli)?grams?|(?:milli)?lit(?:er|re)s?|pounds?|ounces?|seconds?"
    r"|minutes?|hours?|days?|weeks?|months?|years?|cm|mm|kg|hrs?|mins?|secs?|Hz|radians?|rad"
    rf"|(?<= )(?:km|mg|ml|ft|lbs?|oz)){_POWER}(?: ?(?:/|per ) ?[A-Za-z]+{_POWER})?"  # 2km may be a product
)
# Each pair: what is found, what it becomes. In this order.
_SPELLINGS = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r",\s*\\!\s*", ","),  # 11,\! 111
        (
            r"(\\\\)|\\[!,;:>$%()\[\] ]|[$%~]|\\(?:left|right)(?![a-zA-Z])\.?"
            r"|\\(?:q?quad|[bB]igg?[lrm]?|displaystyle)(?![a-zA-Z])",
            r"\1",
        ),
        (r"(?:\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z]))(?:\s*[CF](?![a-zA-Z]))?", ""),
        (r"\^\s*(?:\\prime(?![a-zA-Z])|\{\s*\\prime\s*\})", "'"),
        (r"^\s*\\approx(?![a-zA-Z])", ""),
        (r"\{,\}", ","),
        (r"\\([{}])", r"\1"),
        (r"\\[lr]brace(?![a-zA-Z])", lambda m: "{" if m[0][1] == "l" else "}"),
        (rf"(?<=[0-9)}}])\s*(?:{_WORDS}{_NO_UNIT}[^{{}}]*\}}{_POWER}\s*)+[.,;]?\s*$", ""),  # 5\text{ cm}^2
        (rf"{_WORDS}([^{{}}]*)\}}", r" \1 "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(leq?|geq?|neq?)(?:slant)?(?![a-zA-Z])", lambda m: f"\\{m[1][:2]}q"),
        (r">=|≥", r"\\geq "),
        (r"<=|≤", r"\\leq "),
        (r"\\(lt|gt)(?![a-zA-Z])", lambda m: {"lt": "<", "gt": ">"}[m[1]]),
        (r"\\times(?![a-zA-Z])", r"\\cdot"),
        (r"√\s*([0-9.]+|[a-z])", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])(pi|infty)(?![a-zA-Z])", r"\\\1"),
        (r"(?:\\?sqrt|√)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\frac\s*(\\[a-zA-Z]++|[0-9a-zA-Z])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\\[a-zA-Z]++|[0-9a-zA-Z])", r"\1{\2}"),
        (r"([\^_])\s*\{\s*([0-9a-zA-Z])\s*\}", r"\1\2"),
        (r"\s+", " "),
        (r" ?,? (?:and|or) ", ", "),
        (r"(?<![0-9.])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9.])", r"\1\\frac{\2}{\3}"),  # 1 1/2
    )
]
_THOUSANDS = re.compile(r"(?<![0-9.,/])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])")


def _spell(text: str) -> str:
    """Short LaTeX in one spelling: no spacing commands, units, percent signs; \\frac and \\sqrt with braces."""
    text = text.translate(_CHARACTERS)
    for pattern, new in _SPELLINGS:
        text = pattern.sub(new, text)
    if not text.lstrip().startswith(("(", "[", "{")):  # (100,200) is a pair, 100,200 a number
        text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    return text


# ---------- values

_DECIMAL = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_PLAIN = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<d>{_DECIMAL})(?:[eE](?P<e>[+-]?[0-9]{{1,3}}))?(?:$|\\cdot(?=10\^)))?"
    r"(?:(?P<base>[0-9]{1,3})\^(?:\{(?P<p>[+-]?[0-9]{1,3})\}|(?P<q>[0-9])))?"
)
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\(?:overline|bar)\{([0-9]+)\}")
_FRACTION = re.compile(r"([+-]?)([0-9]*)\\frac\{([^{}]*(?:\{[^{}]*\})?)\}\{([^{}]*(?:\{[^{}]*\})?)\}")
_QUOTIENT = re.compile(r"([+-]?)()\(?([^/()]*)\)?/\(?([^/()]*)\)?")
_PIECE = r"(?:\\sqrt\{[^{}]*\}|\\[a-zA-Z]++|[0-9a-zA-Z])"
_OVER = re.compile(rf"(-?)(?:\(([^()]*)\)|({_PIECE}++))/([0-9]++|{_PIECE})")  # not 1/2x: that may mean two things
_NAME = re.compile(r"(?:[A-Za-z]|\\[a-zA-Z]++)(?:_(?:\{\w+\}|\w))?(?:\([\w, ]*\))?")
_LONG_NAME = re.compile(  # AB, \angle ABC, |AB|, \overline{AB}, Total cost, (p, q): names where a number follows
    r"\|?(?:m ?)?(?:\\(?:angle|triangle|overline|vec) ?)?\{?[A-Za-z]++(?: [A-Za-z]++){0,4}\}?(?:_(?:\{\w+\}|\w))?\|?"
    r"|\([A-Za-z](?:, ?[A-Za-z])+\)"
)
_APPROX = r"\\approx(?![a-zA-Z])"
_IN = re.compile(rf"({_NAME.pattern}) ?\\in(?![a-zA-Z])")
_SIGN = r"[<>]|\\[lg]eq(?![a-zA-Z])"
_SPACE = re.compile(r"([0-9] (?=[0-9])|\\[a-zA-Z]++ (?=[a-zA-Z]))| ")  # 1 2 is not 12, \pi k is not \pik
_ONLY_UNIT = re.compile(rf" *(?:{_UNIT}) *", re.IGNORECASE)
_WITH_UNIT = re.compile(rf"(.*[0-9)}}]) *(?:{_UNIT})", re.IGNORECASE)
_MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}")


def _plain(text: str) -> Fraction | None:
    """12, -0.5, .5, 4.5e33, 3\\cdot10^{8} or 2^{10} exactly."""
    found = _PLAIN.fullmatch(text)
    if not found or not (found["d"] or found["base"]):
        return None
    number = Fraction(found["d"] or 1) * Fraction(10) ** int(found["e"] or 0)
    power = int(found["p"] or found["q"] or 1)
    if found["base"]:
        if int(found["base"]) == 0:
            return None
        number *= Fraction(int(found["base"])) ** power  # at most three digits to the 999th
    return -number if found["sign"] == "-" else number


def _number(text: str) -> Fraction | None:
    """A plain number, a repeating decimal, a fraction or a mixed number; None for anything else."""
    if (number := _plain(text)) is not None:
        return number
    if found := _REPEATING.fullmatch(text):
        sign, whole, fixed, period = found.groups()
        number = Fraction(int(whole + fixed + period or 0) - int(whole + fixed or 0), 10 ** len(period) - 1)
        return number / 10 ** len(fixed) * (-1 if sign == "-" else 1)
    if not (found := _FRACTION.fullmatch(text) or _QUOTIENT.fullmatch(text)):
        return None
    sign, whole, above, below = found.groups()
    above, below = _plain(above), _plain(below)
    if above is None or not below:
        return None
    number = above / below
    if whole:
        if not 0 < number < 1:  # 2\frac{5}{3} may be a product
            return None
        number += int(whole)
    return -number if sign == "-" else number


def _split(text: str, mark: str) -> list[str]:
    """`text` cut at `mark` (a pattern) outside all brackets."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"[(\[{{)\]}}]|{mark}", text):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [*parts, text[start:]]


def _balanced(text: str) -> bool:
    depth = 0
    for character in re.findall(r"[(\[{)\]}]", text):
        depth += 1 if character in "([{" else -1
        if depth < 0:
            return False
    return depth == 0


def _group(brackets: str, parts: list[str], depth: int) -> Value | None:
    items: list[Value] = []
    for part in parts:
        item = _value(part, depth + 1)
        if item is None:
            return None
        items += item.items if brackets in (",", "{}") and item.brackets == "," else (item,)
    return items[0] if len(items) == 1 else Value(brackets=brackets, items=tuple(items))


def _value(text: str, depth: int = 0) -> Value | None:
    """The value of spelled text, or None."""
    text = text.strip(" ").rstrip(" .,;:")
    if not text or depth > DEEPEST or _ONLY_UNIT.fullmatch(text):
        return None
    for mark, brackets in ((r"[,;]", ","), (r"\\cup(?![a-zA-Z])", "u")):
        if len(parts := _split(text, mark)) > 1:
            return _group(brackets, parts, depth)
    if found := _IN.match(text):
        value = _value(text[found.end() :], depth + 1)
        return value and replace(value, name=found[1].replace(" ", ""))
    if len(_split(text, _SIGN)) > 1:
        return _inequality(text, depth) or _formula(text)
    if len(_split(text, rf"=|{_APPROX}")) > 1:
        return _chain(text, depth) or _formula(text)
    if found := _MATRIX.fullmatch(text):
        rows = [_group("r", row.split("&"), depth) for row in found[1].removesuffix("\\\\").split("\\\\")]
        items = tuple(row for row in rows if row is not None)
        return Value(brackets="m", items=items) if len(items) == len(rows) else None
    if text[0] in "([{" and text[-1] in ")]}" and _balanced(text[1:-1]):
        return _group(text[0] + text[-1], _split(text[1:-1], "[,;]"), depth)
    if text.count("\\pm") == 1:
        return _group(",", [text.replace("\\pm", sign) for sign in "+-"], depth)
    if found := _WITH_UNIT.fullmatch(text):
        text = found[1]
    return _formula(text)


def _formula(text: str) -> Value | None:
    """A number, or text in one spelling."""
    text = _SPACE.sub(r"\1", text)
    text = text.removeprefix("+") or text
    if (number := _number(text)) is not None:
        return Value(number)
    text = _OVER.sub(r"\1\\frac{\2\3}{\4}", text) if _OVER.fullmatch(text) else text
    if re.fullmatch("[A-Za-z]{3,}", text):  # a word
        text = text.lower()
    return Value(text=re.sub(r"^\\frac\{-([^{}+-]*)\}", r"-\\frac{\1}", text))


def _chain(text: str, depth: int) -> Value | None:
    """What "x = 5+6 = 11" says x is; None for an equation such as 2x+1 = 5, and for what says two things.

    The last link counts. Without a name all links must be equal. What follows \\approx is another reading of a number
    that rounds to it.
    """
    exact, *near = _split(text, _APPROX)
    links, name = _split(exact, "="), ""
    first = links[0].strip(" ")
    rest = text[len(links[0]) :]
    if rest and (_NAME.fullmatch(first) or (re.search("[0-9]", rest) and _LONG_NAME.fullmatch(first))):
        name, links = first.replace(" ", ""), links[1:]
    links += near if not links else []
    read = [_value(link, depth + 1) for link in links]
    values = [value for value in read if value is not None]
    if len(values) < len(read) or len(near) > 1:
        return None
    pairs = list(zip(values, values[1:], strict=False))
    if any(a.number != b.number for a, b in pairs if None not in (a.number, b.number)):
        return None
    if not name and (not all(_same(a, b, False) for a, b in pairs)):
        return None
    value = replace(values[-1], name=name)
    if not near or near[0] in links:
        return value
    rounded = _value(near[0], depth + 1)
    if rounded is None or value.number is None or rounded.number is None:
        return value
    places = len(re.findall(r"\.([0-9]*)", near[0])[-1]) if "." in near[0] else 0
    if 2 * abs(value.number - rounded.number) * 10**places > 1:
        return None
    return replace(value, near=rounded)


def _inequality(text: str, depth: int) -> Value | None:
    """2 < x \\leq 5, as which 5 \\geq x > 2 is read too; None where the signs point both ways."""
    signs = re.findall(_SIGN, text)
    read = [_value(side, depth + 1) for side in _split(text, _SIGN)]
    sides = [side for side in read if side is not None]
    if len(sides) < len(read) or len(read) != len(signs) + 1:
        return None
    if all(sign in (">", "\\geq") for sign in signs):
        signs, sides = [{">": "<"}.get(sign, "\\leq") for sign in signs[::-1]], sides[::-1]
    if not all(sign in ("<", "\\leq") for sign in signs):
        return None
    return Value(brackets="".join(sign[-1].replace("q", "≤") for sign in signs), items=tuple(sides))


@functools.lru_cache(maxsize=4096)  # a reference is read again for every sample
def parse(text: str) -> Value | None:
    """The value of a short LaTeX or plain answer; None when it is empty, only a unit, unbalanced or too long.

    Units, percent signs, degrees and currencies are dropped. 1,234 is a number; 1, 234 is a list.
    """
    if len(text) > LONGEST:
        return None
    if _BOX.search(text):
        text = last_boxed(text) or ""
    text = _spell(text)
    return _value(text) if _balanced(text) else None


def usable(gold: str) -> bool:
    """Can anything be compared with this reference? If not, its problem must not be trained on."""
    return parse(gold) is not None


# ---------- comparison


def _same_number(given: Fraction, gold: Fraction, lenient: bool) -> bool:
    if not lenient:
        return given == gold
    near = Fraction(1, 10_000)  # relative, and per cent for one, as in the authors' code
    return any(abs(given - g) <= near * max(abs(given), abs(g)) for g in (gold, gold / 100, gold * 100))


def _same(given: Value, gold: Value, lenient: bool) -> bool:
    if given.name and gold.name and given.name != gold.name:
        return False
    if given.number is not None and gold.number is not None:
        return _same_number(given.number, gold.number, lenient)
    if not gold.items or len(given.items) != len(gold.items):
        if gold.items or given.items:
            return False
        if gold.text and (given.text == gold.text or lenient and given.text.lower() == gold.text.lower()):
            return True
        return algebra.same(*(v.text or str(v.number) for v in (given, gold)))
    unordered = {given.brackets, gold.brackets} <= {",", "{}"} or given.brackets == gold.brackets == "u"
    if unordered:
        left = list(given.items)
        for item in gold.items:
            match = next((k for k, other in enumerate(left) if _same(other, item, lenient)), None)
            if match is None:
                return False
            del left[match]
        return True
    kinds = {given.brackets, gold.brackets}
    alike = len(kinds) == 1 or lenient and not any(kind[0] in "<≤" for kind in kinds)
    if kinds == {"m", "()"}:  # a column is its tuple
        alike = not any(item.brackets == "r" for item in (*given.items, *gold.items))
    return alike and all(_same(a, b, lenient) for a, b in zip(given.items, gold.items, strict=True))


def equal(given: str, gold: str, lenient: bool = False) -> bool:
    """Is the answer `given` the reference `gold`? Tuples, intervals and matrices in order, sets and lists in any.

    lenient: numbers within 1e-4, or off by a factor of 100; any kind of brackets; upper and lower case alike.
    """
    a, b = parse(given), parse(gold)
    if a is None or b is None:
        return False
    return any(_same(x, y, lenient) for x in (a, a.near) for y in (b, b.near) if x and y)


def grade(response: str, gold: str, lenient: bool = False) -> Grade:
    """Grade a response against a `usable` reference: correct or not, nothing else. Raises InputError when math-verify
    is installed and does not start."""
    assert usable(gold), f"{gold[:100]!r} is no reference; leave its problem out"
    given = answer(response, lenient)
    if given is None:
        return Grade(correct=False, found=False)
    if equal(given, gold, lenient):
        return Grade(correct=True, found=True)
    if BACKEND != "math-verify" or len(given) > LONGEST:
        return Grade(correct=False, found=True)
    verdict = outside().equal(given, gold)
    return Grade(correct=verdict is True, found=True, failed=verdict is None)


# ---------- math-verify, in a process of its own


class Outside:
    """math-verify behind a pipe. Its own time limits are signals: they miss long computations in C, and need the main
    thread. Here a question that takes too long costs that process its life and nobody else anything."""

    def __init__(self, seconds: float = 15.0, start_seconds: float = 120.0) -> None:
        self.seconds, self.start_seconds = seconds, start_seconds
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()

    def equal(self, given: str, gold: str) -> bool | None:
        """math-verify's verdict, or None when it crashed or took longer than `seconds`. Raises InputError."""
        with self.lock:
            if self.process is None:
                command = [sys.executable, "-m", "common.verifier"]
                pipe = subprocess.PIPE
                self.process = subprocess.Popen(
                    command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0
                )
                if self._line(self.start_seconds) != b"ready\n":
                    self.close()
                    raise InputError(
                        "math-verify does not start; pip install -r requirements-masa.txt, or uninstall it"
                    )
            try:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps([given, gold]).encode() + b"\n")
                line = self._line(self.seconds)
            except BrokenPipeError:
                line = b""
            if line not in (b"true\n", b"false\n", b"null\n"):
                self.close()
                return None
            return json.loads(line)

    def _line(self, seconds: float) -> bytes:
        assert self.process is not None and self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else b""

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process = None


@functools.cache
def outside() -> Outside:
    """The one helper process of this program."""
    return Outside()


def _serve() -> None:
    """The helper: a line [given, gold] in, a line true, false or null (it raised) out, until the input ends."""
    import resource  # not on Windows, and only needed here

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a tower of powers must not take the machine's memory
    replies, sys.stdout = sys.stdout, sys.stderr
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException  # not an Exception

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        given, gold = (f"\\boxed{{{text}}}" for text in json.loads(line))
        try:
            values = [parse(text, raise_on_error=True) for text in (gold, given)]
            verdict = bool(verify(*values, raise_on_error=True))
        except (Exception, TimeoutException):
            verdict = None
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
