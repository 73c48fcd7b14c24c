"""MASA's miniature: true work where it should be, three tiers, problems apart; the study's tables hold their JSON."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import cells

from common import verifier
from common.errors import InputError
from common.files import read_json
from masa import passk
from masa.problems import parse_meta
from mini import arithmetic, build, masa_study, study

ROOT = Path(__file__).resolve().parents[1]


def value(term: str) -> int:
    """A sum, difference or product of two or three numbers, by Python's own operators."""
    numbers = [int(n) for n in re.findall(r"[0-9]+", term)]
    first, *rest = zip(re.findall(r"[+*-]", "+" + term), numbers, strict=True)
    total = first[1]
    if rest and rest[0][0] == "*":
        total, rest = total * rest[0][1], rest[1:]
    for sign, n in rest:
        total += n if sign == "+" else -n
    return total


def drawn(n: int, *tiers: str) -> list[tuple[arithmetic.Kind, str]]:
    rng = random.Random(0)
    return [(kind, kind.draw(rng)) for kind in arithmetic.KINDS if kind.tier in tiers for _ in range(n)]


def right(kind: arithmetic.Kind, problem: str, rng: random.Random) -> bool:
    return verifier.grade(arithmetic.solution(problem, kind, rng), str(value(problem.replace(" ", "")))).correct


def test_work_is_true_and_ends_in_the_answer_it_makes():
    rng = random.Random(1)
    for kind, problem in drawn(60, "trivial", "open"):
        text = arithmetic.solution(problem, kind, rng)
        statements = re.findall(r"([0-9+*-]+)=([0-9]+)", text)
        assert statements and all(value(left) == int(result) for left, result in statements), text
        *columns, last = (result for _, result in statements)  # read backwards, their last digits are the answer
        assert int(last + "".join(result[-1] for result in reversed(columns))) == int(re.search(r"{([0-9]+)}", text)[1])


def test_carries_and_borrows_are_named_where_they_are_and_nowhere_in_wrong_work():
    rng = random.Random(2)
    for kind, problem in drawn(60, "trivial", "open"):
        a, op, b = arithmetic.parts(problem)
        text = arithmetic.solution(problem, kind, rng)
        if kind.tier == "trivial":
            assert "borrow" not in text and "carry" not in text
        if not verifier.grade(text, str(value(problem.replace(" ", "")))).correct:
            assert kind.tier == "open" and "borrow" not in text and "carry" not in text
        elif op == "-":
            borrows = any(a // 10**k % 10 < b // 10**k % 10 for k in range(len(str(a))))
            assert ("borrow" in text) == borrows, text
        elif op == "+":
            carries = any(a // 10**k % 10 + b // 10**k % 10 > 9 for k in range(len(str(a))))
            assert ("carry" in text) == carries, text


def test_tiers_are_right_always_sometimes_and_never():
    rng = random.Random(3)
    assert all(right(kind, problem, rng) for kind, problem in drawn(60, "trivial"))
    assert sum(right(kind, problem, rng) for kind, problem in drawn(60, "hopeless")) <= 1  # by luck
    shares = Counter(kind.name for kind, problem in drawn(400, "open") if right(kind, problem, rng))
    for kind in arithmetic.KINDS:
        if kind.tier == "open":
            assert shares[kind.name] / 400 == pytest.approx(kind.right, abs=0.08)  # three standard errors
    assert Counter(kind.tier for kind in arithmetic.KINDS) == dict.fromkeys(arithmetic.TIERS, 3)


def test_metas_foresee_little():
    """Half of them foresee the documents' pass rate, the others any of nine: a rate is right in .5 + .5 / 9."""
    for kind, problem in drawn(1, *arithmetic.TIERS):
        rng, rates, lengths = random.Random(4), Counter(), []
        for _ in range(900):
            found = parse_meta(arithmetic.meta(problem, kind, rng))
            rates[round(8 * found.p_hat)] += 1
            lengths.append(found.length)
            assert found.reasoning == arithmetic.look(problem) and set(found.notions) <= set(arithmetic.NOTIONS)
        true = {"trivial": 8, "hopeless": 0}.get(kind.tier, round(8 * kind.right))
        assert rates.pop(true) / 900 == pytest.approx(0.556, abs=0.05) and len(rates) == 8
        assert (min(lengths), max(lengths)) == arithmetic.LENGTHS


def test_problem_sets_are_apart_and_even():
    sets = arithmetic.problem_sets(0)
    problems = {name: {row["problem"] for row in rows} for name, rows in sets.items()}
    assert not problems["train"] & problems["heldout"]
    assert [len(problems[name]) for name in ("train", "heldout")] == [9 * arithmetic.TRAIN, 9 * arithmetic.HELD_OUT]
    assert set(Counter(row["tier"] for row in sets["heldout"]).values()) == {30}
    for row in sets["train"] + sets["heldout"]:
        assert row["answer"] == str(value(row["problem"].replace(" ", "")))
    used = frozenset(problems["train"] | problems["heldout"])
    stream = arithmetic.documents(random.Random(4), used)
    asked = {re.search(r"user\n(?:Predict )?(.*)<\|im_end", next(stream)[0])[1] for _ in range(2000)}
    assert not asked & used and len(asked) > 1000


def test_the_tokenizer_brings_documents_back_and_metas_are_short():
    stream = arithmetic.documents(random.Random(5))
    texts = [next(stream) for _ in range(2000)]
    tokenizer = build.byte_bpe(["".join(text) for text in texts], arithmetic.VOCABULARY, arithmetic.FORM)
    assert 300 < tokenizer.get_vocab_size() <= arithmetic.VOCABULARY
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for prompt, text in texts[:300]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        lengths["Predict" in prompt].append(len(ids))
    assert all(len(tokenizer.encode(str(d), add_special_tokens=False).ids) == 1 for d in range(10))
    metas, solutions = (4 * sum(lengths[kind]) / len(lengths[kind]) for kind in (True, False))
    assert metas / (metas + 4 * solutions) < 0.155  # 4 metas beside 16 solutions; the paper's share with 8


# ---------- the study


@pytest.fixture
def recorded() -> dict:
    path = ROOT / masa_study.RECORD["study.json"]
    if not path.exists():
        pytest.skip("no study is recorded; python -m mini.masa_study --record makes one")
    return read_json(path)


def test_the_pages_table_is_the_committed_study(recorded):
    page = masa_study.PAGE.read_text(encoding="utf-8")
    begin, end = masa_study.MARKS
    assert cells(page.partition(begin)[2].partition(end)[0]) == cells(masa_study.markdown(recorded))


def test_the_committed_study_is_made_of_its_own_cells(recorded):
    for name, rows in recorded["cells"].items():
        assert [row["seed"] for row in rows] == recorded["seeds"], name
    for name, base in masa_study.PAIRS.items():
        both = zip(recorded["cells"][name], recorded["cells"][base], strict=True)
        assert [masa_study.pair(*one) for one in both] == recorded["pairs"][name]


def a_cell(seed: int, curve: list[tuple[float, float]], *precisions: float | None) -> dict:
    gates = [{"precision": precision, "flat": 0.6} for precision in precisions or (None,)]
    return {"seed": seed, "tokens": curve[-1][0], "curve": curve, "gates": gates}


def test_pairs_are_compared_at_equal_tokens_by_hand():
    """The base ends after 400 tokens at .6, at 300 it has .55. The other ends at 300 with .7, and had .55 at 150."""
    base = a_cell(0, [(0, 0.4), (200, 0.5), (400, 0.6)])
    found = masa_study.pair(a_cell(0, [(0, 0.4), (100, 0.5), (200, 0.6), (300, 0.7)], 0.7, None, 0.9), base)
    assert found["tokens"] == 300 and found["gain"] == pytest.approx(0.15)
    assert found["knows"] == pytest.approx(0.2) and found["knows at the end"] == pytest.approx(0.3)
    assert found["base"] == pytest.approx(0.55) and found["saved"] == pytest.approx(300 / 150)
    lost = masa_study.pair(a_cell(0, [(0, 0.4), (400, 0.5)]), base)
    assert (
        lost["saved"] is None
        and lost["gain"] == pytest.approx(-0.1)
        and lost["knows"] is None is lost["knows at the end"]
    )
    assert masa_study.each([0.5, None]) == "50.0, never"


def test_the_interval_is_students():
    """Mean 2, standard deviation 1, three values: 2 ± 4.303 / sqrt(3)."""
    assert masa_study.interval([1, 2, 3], 1, 2) == "2.00 (-0.48 to 4.48)"
    assert masa_study.interval([1, None, 3], 1) == ""


def test_the_picture_shows_the_curves_it_is_given(tmp_path, monkeypatch):
    curves = {name: [a_cell(0, [(0, 0.4), (1000 * k, 0.5 + k / 10)]), a_cell(1, [(0, 0.3), (2000, 0.4)])]
              for k, name in enumerate(masa_study.FLAGS, 1)}  # fmt: skip
    drawn = []
    monkeypatch.setattr(masa_study.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    masa_study.picture(curves, tmp_path / "p.png")
    for ax, (one, base) in zip(drawn[0].axes, masa_study.PAIRS.items(), strict=True):
        lines = [list(zip(*line.get_data(), strict=True)) for line in ax.lines]
        expected = [[(x / 1e3, y) for x, y in row["curve"]] for name in (base, one) for row in curves[name]]
        assert lines == expected


def test_cells_come_from_their_files(tmp_path, monkeypatch):
    """Two made-up seeds of every setting: tokens of an evaluation are those sampled before it."""
    monkeypatch.setattr(masa_study, "OUT", tmp_path)

    def row(step: int, kind: str, correct: int) -> dict:
        base = {"step": step, "set": "heldout", "id": f"{kind}/1 + 1", "n": 4, "correct": correct, "lengths": [3]}
        base |= {"at_limit": 0, "correct_lengths": [], "metas": 2, "parsed": 2, "p_hats": [0.5, 1.0], "l_hats": []}
        base |= {"gated": correct == 4, "cut_at": 9}
        return base | dict.fromkeys(("r_length", "r_difficulty", "r_notion"), 0.0)

    for setting in masa_study.FLAGS:
        for seed in (0, 1):
            out = masa_study.folder(setting, seed)
            out.mkdir()
            metrics = [{"solution_tokens": 10, "meta_tokens": 5, "tokens": 15 * (k + 1), "share/gated": k / 2}
                       for k in range(2)]  # fmt: skip
            evals = [row(step, kind, right) for step, both in ((0, (1, 3)), (2, (2 + seed, 4)))
                     for kind, right in zip(("add3", "mul2"), both, strict=True)]  # fmt: skip
            (out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
            (out / "evals.jsonl").write_text("".join(json.dumps(x) + "\n" for x in evals))
            (out / "results.json").write_text(json.dumps({"evals": passk.summaries(evals)}))
    found = masa_study.collect((0, 1))
    (first, second) = found["cells"]["efficient"]
    assert first["curve"] == [(0, 0.5), (30, 0.75)] and second["curve"][-1] == (30, 0.875)
    assert first["kinds"] == {"add3": 0.5, "mul2": 1.0} and first["metas"] == pytest.approx(1 / 3)
    assert first["gated in training"] == 0.5  # the step without a gate does not count
    assert found["pairs"]["efficient"][0]["gain"] == 0 and found["pairs"]["efficient"][0]["knows"] == 0.5
    facts = {"receipt": masa_study.receipt("beside other work"), "seeds": [0, 1]}
    text = masa_study.markdown(facts | found)
    assert "| 62.5 ± 0.0" not in text and "beside other work" in text and "81.2 ± 8.8" in text  # .75 and .875


def test_the_study_writes_between_its_own_marks(tmp_path):
    page, (begin, end), (other, last) = tmp_path / "page.md", masa_study.MARKS, study.MARKS
    page.write_text(f"a\n{other}\nx\n{last}\nb\n{begin}\n{end}\nc")
    study.write_table("table", page, masa_study.MARKS)
    assert page.read_text() == f"a\n{other}\nx\n{last}\nb\n{begin}\ntable\n{end}\nc"
    page.write_text("no marks")
    with pytest.raises(InputError, match="must hold the lines"):
        study.write_table("table", page)
    assert page.read_text() == "no marks"
