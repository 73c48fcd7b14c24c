"""The verifier: judged by hand, against exact fractions, against hostile text, and with a package that misbehaves."""

import random
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import verifier
from common.errors import InputError
from common.verifier import Grade, answer, equal, grade, last_boxed, parse, usable


@pytest.fixture(autouse=True)
def own_comparison(monkeypatch):
    """What is tested here is ours, whether math-verify is installed or not."""
    monkeypatch.setattr(verifier, "BACKEND", "own")


# ---------- the answer in a response


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{x=\boxed{7}}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # the escaped brace does not count
        (r"\boxed {5}", "5"),
        (r"$\boxed 5$ is it", "5"),
        (r"\(\boxed 5\) is it", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{4} and \fbox{5}", "4"),
        (r"\boxed{5", None),
        (r"\boxed{1} then \boxed{2", None),  # cut off before the last answer was done
        (r"\boxedness{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (r"The answer is 4. \boxed{5}", "5", "5"),
        ("The answer is $4$.\nDone in 3 steps.", None, "$4$."),
        ("I get 1,234 and then 5,678 apples", None, "5678"),
        ("it is -0.5", None, "-0.5"),
        ("no idea", None, None),
        (r"\boxed{}", None, None),
        (r"\boxed{} or 7", None, "7"),
    ],
)
def test_answer_and_its_fallbacks(text, strict, lenient):
    assert (answer(text), answer(text, lenient=True)) == (strict, lenient)


# ---------- comparison, judged by hand

EQUAL = [
    ("5", "5"),
    ("0.5", "1/2"),
    (r"\frac12", "0.5"),
    (r"\frac{1}{2}", r"\dfrac{2}{4}"),
    (r"\tfrac 1 2", ".5"),
    (r"\frac1{72}", "1/72"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"\frac{-3}{4}", "-3/4"),
    (r"\frac{3}{-4}", "-3/4"),
    ("(-3)/4", "-0.75"),
    (r"1\frac{1}{2}", "3/2"),
    ("1 1/2", "1.5"),
    (r"-2\frac{1}{4}", "-2.25"),
    ("1,234", "1234"),
    ("1,234,567.5", "1234567.5"),
    (r"1{,}234", "1234"),
    (r"1,\!234", "1234"),
    (r"11,\! 111,\! 100", "11111100"),
    (r"1\,234", "1234"),
    (r"12\%", "12"),
    ("12%", "12"),
    ("12 percent", "12"),
    ("-0", "0"),
    ("0.0", "0"),
    ("007", "7"),
    ("023", "23"),
    ("+7", "7"),
    ("5.", "5"),
    ("5.0", "5"),
    ("\u22125", "-5"),
    ("10^3", "1000"),
    ("10^{-2}", "0.01"),
    ("2^{10}", "1024"),
    (r"3 \times 10^8", "300000000"),
    (r"8.7\cdot10^{8}", "870000000"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    (r"-1.5\times10^{-3}", "-0.0015"),
    (r"0.\overline{3}", "1/3"),
    (r"0.1\overline{6}", "1/6"),
    ("5 cm", "5"),
    (r"5\text{ cm}", "5"),
    (r"5\,\mathrm{cm}^2", "5"),
    (r"5\text{ cm}^{-2}\text{yr}^{-1}", "5"),
    ("5 square units", "5"),
    ("60 miles per hour", "60"),
    ("90^\\circ", "90"),
    (r"336^{\circ}", "336"),
    ("90°", "90 degrees"),
    (r"1950^\circ C", "1950"),
    (r"\approx 3.14", "3.14"),
    (r"x^{\prime} - 1 = 0", "x' - 1 = 0"),
    (r"\$5", "5"),
    ("$5$", "5"),
    (r"\(5\)", "5"),
    ("x=5", "5"),
    ("x = 5", "x=5"),
    (r"\theta = \frac{\pi}{2}", r"\pi/2"),
    ("x_1 = 3", "3"),
    ("f(x) = 2x+1", "2x + 1"),
    (r"x \in [1,2]", "[1,2]"),
    (r"\text{B}", "B"),
    (r"\textbf{(B)}", "B"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\boxed{5}", "5"),
    ("(5)", "5"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    ("(0.5, 2)", r"(\frac12,\ 2)"),
    (r"\{1,2\}", "{2,1}"),
    (r"\lbrace 1, 2 \rbrace", "2, 1"),
    ("1, -2", "-2,1"),
    ("1 and 2", "2, 1"),
    (r"x=1 \text{ or } x=2", "1,2"),
    ("[0, 1)", r"\left[0,\,1\right)"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"(-\infty, 2)", "(-∞, 2)"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
    ("$69$,$84$", "69, 84"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\pm 2", "2,-2"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"),
    (r"3\sqrt{13}", r"3 \sqrt{13}"),
    (r"11\sqrt2", r"11 \sqrt{2}"),
    ("2√3", r"2\sqrt{3}"),
    ("sqrt(3)/2", r"\frac{\sqrt{3}}{2}"),
    (r"-\frac{\pi}{6}", r"\frac{-\pi}{6}"),
    ("2*pi", r"2\cdot\pi"),
    (r"x^{2}+1", "x^2 + 1"),
    (r"k \geqslant 2", r"k \ge 2"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix}-\frac13\\ \frac23\end{bmatrix}"),
    (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix}1&0\\0&1\\\end{pmatrix}"),
]
EQUAL += [  # judged by hand
    ("x+1", "1+x"),
    ("(x-1)(x+1)", "x^2-1"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"3-2\sqrt{2}", r"-2\sqrt{2}+3"),
    (r"\frac{1}{2+\sqrt{3}}", r"2-\sqrt{3}"),
    (r"\frac{\frac{1}{2}}{3}", r"\frac{1}{6}"),
    ("5!", "120"),
    (r"\binom{6}{2}", "15"),
    (r"\frac{x+y}{2}", r"\frac{x}{2}+\frac{y}{2}"),
    (r"\frac{\pi}{4}+1", r"1+\frac{1}{4}\pi"),
    (r"4\cdot 5", "20"),
    (r"\sqrt{4}", "2"),
    (r"(1+\sqrt{2}, 3)", r"(\sqrt{2}+1, 3)"),
    ("x >= 5", r"x \geq 5"),
    (r"x \leq 5", r"5 \geq x"),
    (r"5 \leq x", "x>=5"),
    (r"x \lt 3", "3 > x"),
]
DIFFERENT = [
    ("x>5", "x<5"),
    ("x>5", "5>x"),
    ("x>5", r"x\geq5"),
    ("1<x<5", "5<x<1"),
    ("AB+1", "BC+1"),
    ("AB", "BA"),  # letters alone may be a name
    ("x-1", "1-x"),
    (r"\sqrt{12}", r"3\sqrt{2}"),
    (r"\sqrt{x^2}", "x"),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
    (r"\frac{x}{1-1}", r"\frac{y}{2-2}"),
    ("6!", "36"),
    (r"2^{3^2}", "64"),
    (r"9^{9^9}", r"9^{9^9}+1"),
    (r"\sin x", r"x\sin"),
    ("x^{1/2}", "x"),
    ("5", "-5"),
    ("5", "50"),
    ("0.333", "1/3"),
    ("0.12", "12"),
    (r"12\%", "0.12"),
    ("12", "1 2"),
    ("23", r"2\cdot3"),
    ("1,234", "1.234"),
    ("1, 234", "1234"),  # a list of two
    ("(1,234)", "1234"),
    ("1 1/2", "11/2"),
    (r"2\frac{5}{3}", "11/3"),  # may be a product
    ("1/0", "0"),
    ("3:4", "3/4"),
    ("1/2x", r"\frac{1}{2x}"),
    ("2^{10}", "210"),
    ("10^3", "103"),
    ("52_8", "52"),
    ("5!", "5"),
    ("5i", "5"),
    (r"5\mathrm{i}", "5"),
    ("5x", "5"),
    ("2km", "2"),  # k and m may be variables
    ("5 million", "5"),
    (r"5\text{ million}", "5"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "(1,2)"),
    ("(1,2)", "1,2"),
    ("(1,2)", r"\{1,2\}"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\{1,1,2\}", r"\{1,2,2\}"),
    ("1,2", "1"),
    ("-2,-2", "-2"),
    ("x=2", "y=2"),
    ("x=1,y=2", "y=1,x=2"),
    ("SRMC", "MR=SRMC"),
    ("A", "B"),
    ("a", "A"),
    (r"\sqrt{2}", "1.41421356"),
    (r"\pi", "3.14159"),
    (r"\sqrt12", r"\sqrt{12}"),  # LaTeX takes one character
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    (r"(0,9)\cup(9,36)", "(0,36)"),
    ("", "5"),
    ("cm", "5"),
    ("(5", "5"),
]


# Kinds that Math-Verify reads too, in sentences of our own: several boxes, chains, named values, turned inequalities,
# column vectors.
EQUAL += [
    (r"x = 5+6 = 11", "11"),
    (r"5+6=11", "11"),
    (r"S = 2\cdot 3 + 4 = 10", "10"),
    (r"\frac{1}{3}\approx .333", r"\frac13"),
    (r"\frac{1}{3}\approx 0.333", "0.333"),
    (r"x = \frac{2}{3} \approx 0.667", "2/3"),
    (r"\sqrt{2} \approx 1.414", r"\sqrt{2}"),
    (r"r \approx 2.5", "2.5"),
    (r"\binom{6}{2} = \frac{6!}{2!\cdot 4!} = 15", "15"),
    (r"\sin x = \frac{3}{5}", r"\sin x = \frac35"),
    ("AB=5", "5"),
    (r"AB = 2\sqrt{3}", r"2\sqrt3"),
    (r"\angle ABC = 60^\circ", "60"),
    (r"m\angle A = 45", "45"),
    (r"|AB| = 7", "7"),
    (r"\overline{AB} = 7", "7"),
    (r"\text{Area} = 12", "12"),
    (r"\text{Total cost} = \$15", "15"),
    ("(p,q)=(3,2)", "(3,2)"),
    ("(x, y, z) = (1, 2, 3)", "(1,2,3)"),
    ("AB = CD = 5", "5"),
    ("f(2) = 7", "7"),
    ("5 > x", "x < 5"),
    (r"5 \geq x > 2", r"2 < x \leq 5"),
    (r"7 > y \geq 0.5", r"\frac12 \le y < 7"),
    ("x < 1/2", "x < 0.5"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"),
    (r"\begin{bmatrix} 0.5 \\ -3 \\ 4 \end{bmatrix}", r"(\frac12, -3, 4)"),
]
DIFFERENT += [
    ("x = 3 = 4", "4"),  # says two things
    ("3 = 4", "4"),
    (r"3 \approx 4", "4"),
    (r"3 \approx 4", "3"),
    (r"\frac{1}{3} \approx 0.334", "0.334"),  # does not round to it
    (r"\frac13 \approx 0.333", "0.3333"),
    ("2x+1 = 5", "5"),  # an equation
    ("x+y = 5", "5"),
    ("x^2 = 4", "4"),
    ("5 = x^2", "x^2"),
    ("AB = 5", "CD = 5"),
    ("(p,q)=(3,2)", "(2,3)"),
    ("(p,q)=(3,2)", "(q,p)=(3,2)"),
    ("AB = CD", "CD"),  # no number
    (r"5 \geq x > 2", r"2 \leq x < 5"),
    ("5 > x > 2", "5 < x < 2"),
    ("2 < x > 1", "1 < x < 2"),  # points both ways
    ("x < 5", "(x, 5)"),
    ("x < 1/2", "x > 1/2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(2,1)"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "[1,2]"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "(1,2,3,4)"),
]


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        (r"So $\boxed{1}$ and $\boxed{2}$.", "1,2", True),
        (r"So \boxed{1}, \boxed{2}, and \boxed{3}.", "{3,1,2}", True),
        (r"\(\boxed{-1}\) or \(\boxed{4}\)", "4, -1", True),
        (r"\[\boxed{x=1}\quad\text{or}\quad\boxed{x=2}\]", "1, 2", True),
        (r"$\boxed{(1,2)},\boxed{(3,4)}$", "(3,4),(1,2)", True),
        (r"\boxed{5}, and \boxed{5}", "5", True),  # said twice
        (r"\boxed{7}. Hence \boxed{8}", "8", True),  # not one answer: the last counts
        (r"\boxed{7}\n\n\boxed{8}", "8", True),
        (r"$\boxed{1}$ and $\boxed{2}$", "2", False),  # a list is not its last item
        (r"\boxed{1}, \boxed{2}, \boxed{3}", "3", False),
        (r"\boxed{1} and then we get \boxed{2}", "1,2", False),
        (r"\boxed{1} and \boxed{2", "2", False),
        (r"\boxed{1, \boxed{2}", "1,2", False),
    ],
)
def test_boxes_with_only_a_joint_between_them_are_one_answer(text, gold, correct):
    assert grade(text, gold).correct is correct


def test_many_boxes_end_soon():
    """Hostile: thousands of boxes, and one long gap of spaces before a box."""
    assert not grade("\\boxed{1}," * 20_000 + "\\boxed{2}", "2").correct
    assert grade("\\boxed{1}" + " $" * 50_000 + "\\boxed{2}", "2").correct
    assert not equal("=".join("1" * 400), "2") and not equal(">".join("x" * 400), "x")


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal(a, b):
    assert equal(a, b) and equal(b, a) and equal(a, b, lenient=True)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not equal(a, b) and not equal(b, a)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("0.12", "12", True),
        ("1200", r"12\%", True),
        ("3.14159", "3.1416", True),
        ("3.141", "3.1416", False),
        ("100.009", "100", True),
        ("100.02", "100", False),
        ("0", "0.00001", False),  # relative
        ("(1,2)", "[1,2]", True),
        ("(1,2)", "1,2", True),
        ("(1,2)", "(2,1)", False),
        ("a", "A", True),
        ("0.333333", "1/3", True),
    ],
)
def test_lenient(a, b, same):
    assert equal(a, b, lenient=True) is same and equal(b, a, lenient=True) is same


STYLES = [
    lambda q, s, n, d: f"{s}{n}/{d}",
    lambda q, s, n, d: rf"{s}\frac{{{n}}}{{{d}}}",
    lambda q, s, n, d: rf"\dfrac{{{s}{n}}}{{{d}}}",
    lambda q, s, n, d: rf"$x = {s}\left(\tfrac{{{n}}}{{{d}}}\right)$" if s == "" else f"({s}{n}) / {d}",
    lambda q, s, n, d: rf"{s}{n:,}" if d == 1 else rf"{s} {n} / {d} \text{{ cm}}",
    lambda q, s, n, d: rf"{s}{n // d}\frac{{{n % d}}}{{{d}}}" if n > d and n % d else f"{s}{n}/{d}.",
    lambda q, s, n, d: f"{s}{n}.000 cm" if d == 1 else rf"{s}\frac{{ {3 * n} }}{{ {3 * d} }}",
]


def render(q: Fraction, style: int) -> str:
    return STYLES[style](q, "-" if q < 0 else "", abs(q.numerator), q.denominator)


RATIONALS = st.builds(Fraction, st.integers(-5000, 5000), st.integers(1, 60))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(RATIONALS, RATIONALS, st.integers(0, len(STYLES) - 1), st.integers(0, len(STYLES) - 1))
def test_agrees_with_fractions(a, b, first, second):
    assert parse(render(a, first)).number == a
    assert equal(render(a, first), render(a, second))
    assert equal(render(a, first), render(b, second)) is (a == b)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(RATIONALS, min_size=2, max_size=6), st.integers(0, 999))
def test_tuples_are_ordered_and_sets_are_not(items, seed):
    rng = random.Random(seed)
    texts = [render(q, rng.choice((0, 1, 2))) for q in items]
    mixed = list(zip(items, texts, strict=True))
    rng.shuffle(mixed)
    shuffled = ", ".join(text for _, text in mixed)
    assert equal(r"\{" + shuffled + r"\}", ", ".join(texts))
    assert equal(f"({shuffled})", f"({', '.join(texts)})") is ([q for q, _ in mixed] == items)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text(alphabet=r"\{}()[],;.=+-^_/ $%0123456789exyfracsqtpi", max_size=60))
def test_any_text_is_read_or_refused_and_equals_itself(text):
    if usable(text):
        assert equal(text, text) and equal(text, text, lenient=True)
    else:
        assert not equal(text, text)


# ---------- references and grades


@pytest.mark.parametrize(
    "gold", ["", "  ", "$$", r"\text{ cm}", "degrees", r"\frac{1}{2", "(1,2", "]0,1[", "(1,)", "9" * 5000, r"\boxed{1"]
)
def test_a_reference_that_says_nothing_is_not_usable(gold):
    assert not usable(gold)
    with pytest.raises(AssertionError, match="is no reference"):
        grade(r"\boxed{1}", gold)


def test_grade():
    assert grade(r"thus \boxed{\frac{2}{4}}", "0.5") == Grade(correct=True, found=True)
    assert grade(r"thus \boxed{3}", "0.5") == Grade(correct=False, found=True)
    assert grade("thus 0.5", "0.5") == Grade(correct=False, found=False)
    assert grade("thus 0.5", "0.5", lenient=True) == Grade(correct=True, found=True)
    assert grade(r"\boxed{50}", "0.5", lenient=True) == Grade(correct=True, found=True)
    assert grade(r"\boxed{0.5} and so \boxed{", "0.5") == Grade(correct=False, found=False)


# ---------- hostile text


def lines_run(function, *arguments) -> int:
    """How many lines of verifier.py run in a call."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != verifier.__file__:
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize(
    "hostile",
    [
        lambda n: r"\boxed{" + "{" * n + "}" * n + "}",
        lambda n: r"\boxed{" * n,
        lambda n: r"\boxed{" * n + "}" * n,
        lambda n: r"\boxed{" + "9" * n + "}",
        lambda n: r"\boxed{" + "(" * n + "1" + ")" * n + "}",
        lambda n: r"\boxed " + " " * n + "x",
        lambda n: "he answer is " * n,
        lambda n: "1" * n + "." * n,
    ],
)
def test_work_grows_at_most_with_the_length(hostile):
    short, long = (lines_run(grade, hostile(n), "5", True) for n in (2_000, 20_000))
    assert long <= 11 * short, (short, long)
    assert not grade(hostile(100_000), "5", lenient=True).correct


@pytest.mark.parametrize(
    "piece",
    [
        r"\a",
        r"\aaaa",
        "{",
        "(",
        "((",
        "1,",
        ", ",
        r"\pm",
        r"\frac",
        r"\frac{1}",
        r"\sqrt{2}/",
        "1/",
        "1.",
        "e9",
        r"\text{",
    ]
    + [
        r"\text{ cm}",
        r"\cup",
        "=",
        "x=",
        "^",
        "^{",
        " ",
        " 5 ",
        r"\begin{pmatrix}",
        r"1 \\ ",
        "& ",
        r"\,",
        "-",
        r"\in",
    ],
)
def test_long_answers_of_every_kind_come_to_an_end(piece):
    for text in (piece * (verifier.LONGEST // len(piece)), piece * 40 + "}" * 40, "5" + piece * 100 + "!"):
        assert not equal(text, "7") and not equal(text, "7", lenient=True)


def test_towers_of_powers_are_not_computed():
    for text in ("10^10^10", "10^{10^{10}}", "9^{9999}", "1e99999", r"10^{\infty}", "2^2^2^2^2^2"):
        assert parse(text).number is None
    assert parse("999^{999}").number == 999**999  # the largest there is


def test_nesting_is_cut_off():
    assert parse("(" * 6 + "1,2" + ")" * 6) == parse("(1,2)")
    assert parse("[" * 400 + "1" + "]" * 400) is None


# ---------- math-verify, played by a package of the same name

PLAYED = """
import os, sys, time
from . import errors

def parse(text, raise_on_error):
    assert text.startswith("\\\\boxed{") and raise_on_error
    print("noise on stdout")
    return text[7:-1]

def verify(gold, given, raise_on_error):
    if given == "raise":
        raise ValueError("no")
    if given == "timeout":
        raise errors.TimeoutException
    if given == "stall":
        time.sleep(60)
    if given == "crash":
        os._exit(1)
    return sorted(gold) == sorted(given)
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    package = tmp_path / "math_verify"
    package.mkdir()
    (package / "__init__.py").write_text(PLAYED)
    (package / "errors.py").write_text("class TimeoutException(BaseException): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(verifier, "BACKEND", "math-verify")
    helper = verifier.Outside(seconds=1.0)
    monkeypatch.setattr(verifier, "outside", lambda: helper)
    yield helper
    helper.close()


def test_math_verify_has_the_last_word_and_its_failures_are_wrong_and_counted(played):
    assert grade(r"\boxed{1+|x|}", "|x|+1") == Grade(correct=True, found=True)
    assert grade(r"\boxed{1-|x|}", "|x|+1") == Grade(correct=False, found=True)
    first = played.process.pid
    for text in ("raise", "timeout"):
        assert grade(rf"\boxed{{{text}}}", "|x|+1") == Grade(correct=False, found=True, failed=True)
    assert played.process.pid == first
    for text in ("stall", "crash"):
        assert grade(rf"\boxed{{{text}}}", "|x|+1") == Grade(correct=False, found=True, failed=True)
        assert played.process is None
        assert grade(r"\boxed{1+|x|}", "|x|+1").correct  # a new one answers


def test_math_verify_is_not_asked_about_what_is_equal_or_too_long(played):
    assert grade(r"\boxed{0.5}", "1/2").correct
    assert grade(r"\boxed{" + "x" * 2000 + "}", "1/2") == Grade(correct=False, found=True)
    assert grade("nothing", "1/2") == Grade(correct=False, found=False)
    assert played.process is None


def test_a_math_verify_that_does_not_start_is_said(played, tmp_path):
    (tmp_path / "math_verify" / "__init__.py").write_text("raise RuntimeError('no antlr')")
    with pytest.raises(InputError, match="math-verify does not start; pip install"):
        grade(r"\boxed{1+|x|}", "|x|+1")


@pytest.mark.long
def test_formulas_agree_with_sympy():
    """Random sums, products, quotients and powers; half of the second ones are the first in other words."""
    import sympy

    rng = random.Random(0)
    x, y = sympy.symbols("x y", positive=True)
    atoms = [x, y, sympy.sqrt(2), sympy.sqrt(6), sympy.pi, sympy.Rational(2, 3), sympy.Integer(3)]
    verdicts = []
    for _ in range(150):
        a = rng.choice(atoms) * rng.choice(atoms) + rng.choice(atoms) / rng.choice([2, 3, x, sympy.sqrt(3)])
        b = rng.choice(atoms) * rng.choice(atoms) + rng.choice(atoms)
        first = a * b if rng.random() < 0.5 else a + b
        second = sympy.expand(first) + rng.choice([0, 0, 1, x, sympy.sqrt(2)])
        expected = sympy.simplify(first - second) == 0
        verdicts.append(expected)
        written = [sympy.latex(e, fold_short_frac=False) for e in (first, second)]
        assert equal(*written) is expected, written
    assert 40 < sum(verdicts) < 110


def test_hostile_formulas_are_unknown_and_end():
    for text in (
        "9" * 190 + "x",
        "(x+1)^9" * 20,
        "(" * 99 + "x",
        "99!x",
        r"\sqrt{" + "9" * 30 + "}x",
        "((x+y)^9)^9",
        "",
    ):
        assert equal(text, "x+0") is False
    assert equal("((((9^9)^9)^9)^9)^9+x", "((((9^9)^9)^9)^9)^9+x") is True  # the same text
    assert equal("((((9^9)^9)^9)^9)^9+x", "x+((((9^9)^9)^9)^9)^9") is False  # beyond the bounds
