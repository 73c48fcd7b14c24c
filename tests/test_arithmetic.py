"""MASA's miniature: true work, uninformed metas, problems apart; the study's table and picture hold their JSON."""

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


def drawn(n: int) -> list[tuple[arithmetic.Kind, str]]:
    rng = random.Random(0)
    return [(kind, kind.draw(rng)) for kind in arithmetic.KINDS for _ in range(n)]


def test_work_is_true_and_ends_in_the_answer():
    rng = random.Random(1)
    for kind, problem in drawn(60):
        text = arithmetic.solution(problem, rng)
        expected = value(problem.replace(" ", ""))
        assert verifier.grade(text, str(expected)).correct and not verifier.grade(text, str(expected + 1)).correct
        statements = re.findall(r"([0-9+*-]+)=([0-9]+)", text)
        assert statements and all(value(left) == int(right) for left, right in statements), text
        if (
            kind.name != "mul2x2"
        ):  # columns, ones first: read backwards, the last digits of their results are the answer
            *columns, last = (right for _, right in statements)
            assert int(last + "".join(right[-1] for right in reversed(columns))) == expected


def test_carries_and_borrows_are_named_where_they_are():
    rng = random.Random(2)
    for _, problem in drawn(60):
        a, op, b = arithmetic.parts(problem)
        text = arithmetic.solution(problem, rng)
        if op == "-":
            borrows = any(a // 10**k % 10 < b // 10**k % 10 for k in range(len(str(a))))
            assert ("borrow" in text) == borrows, text
        elif op == "+":
            carries = any(a // 10**k % 10 + b // 10**k % 10 > 9 for k in range(len(str(a))))
            assert ("carry" in text) == carries, text


def test_metas_know_nothing_about_the_problem():
    problems = [problem for _, problem in drawn(2)]
    said = [arithmetic.meta(problem, random.Random(7)) for problem in problems]
    assert len({text.split("\n")[1] for text in said}) == 1  # the same chance, the same prediction
    rng, rates, lengths = random.Random(3), Counter(), []
    for k in range(1800):
        found = parse_meta(arithmetic.meta(problems[k % len(problems)], rng))
        rates[round(8 * found.p_hat)] += 1
        lengths.append(found.length)
        assert found.reasoning == arithmetic.look(problems[k % len(problems)])
        assert set(found.notions) <= set(arithmetic.NOTIONS)
    assert set(rates) == set(range(9)) and max(rates.values()) < 1.3 * 200
    assert (min(lengths), max(lengths)) == arithmetic.LENGTHS
    for problem in problems:  # a description is in the same form and foresees nothing
        found = parse_meta(arithmetic.description(problem, rng))
        assert found.reasoning == arithmetic.look(problem) and found.p_hat is None and found.length is None


def test_problem_sets_are_apart_and_even():
    sets = arithmetic.problem_sets(0)
    problems = {name: {row["problem"] for row in rows} for name, rows in sets.items()}
    assert not problems["train"] & problems["heldout"]
    assert len(problems["train"]) == sum(k.train for k in arithmetic.KINDS) and len(problems["heldout"]) == 120
    assert set(Counter(row["tier"] for row in sets["heldout"]).values()) == {40}
    for row in sets["train"] + sets["heldout"]:
        assert row["answer"] == str(value(row["problem"].replace(" ", "")))
    used = frozenset(problems["train"] | problems["heldout"])
    stream = arithmetic.documents(random.Random(4), used)
    asked = {re.search(r"user\n(?:Describe |Predict )?(.*)<\|im_end", next(stream)[0])[1] for _ in range(3000)}
    assert not asked & used and len(asked) > 1000


def test_the_tokenizer_brings_documents_back():
    stream = arithmetic.documents(random.Random(5))
    texts = ["".join(next(stream)) for _ in range(3000)]
    tokenizer = build.byte_bpe(texts, arithmetic.VOCABULARY, ["<meta>", "</meta>"])
    assert 300 < tokenizer.get_vocab_size() <= arithmetic.VOCABULARY
    for text in texts[:200]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(len(tokenizer.encode(str(d), add_special_tokens=False).ids) == 1 for d in range(10))
    assert tokenizer.token_to_id("<meta>") is not None


def test_the_pages_table_is_the_committed_study():
    page = masa_study.PAGE.read_text(encoding="utf-8")
    begin, end = masa_study.MARKS
    recorded = read_json(ROOT / masa_study.RECORD["study.json"])
    assert cells(page.partition(begin)[2].partition(end)[0]) == cells(masa_study.markdown(recorded))


def test_the_committed_study_holds_three_seeds_and_its_own_means():
    recorded = read_json(ROOT / masa_study.RECORD["study.json"])
    for name, rows in recorded["rows"].items():
        assert [row["seed"] for row in rows] == [0, 1, 2], name
    errors = [row["error"] for row in recorded["rows"]["masa"]]
    mean = sum(errors) / 3
    sd = (sum((e - mean) ** 2 for e in errors) / 2) ** 0.5
    assert f"{100 * mean:.1f} ± {100 * sd:.1f}" in masa_study.markdown(recorded)
    for bins in recorded["calibration"].values():
        assert (
            sum(dot["metas"] for dot in bins) > 0.9 * 3 * 120 * recorded["settings"]["eval_metas"]
        )  # seeds, problems, metas; nearly all can be read


def test_the_picture_shows_the_bins_it_is_given(tmp_path, monkeypatch):
    bins = {name: [{"p_hat": k / 8, "metas": 10 * (k + 1), "p": (k * 3 % 9) / 9} for k in range(9)]
            for name in ("before", "masa", "shuffled")}  # fmt: skip
    drawn = []
    monkeypatch.setattr(masa_study.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    masa_study.picture(bins, tmp_path / "p.png")
    for ax, name in zip(drawn[0].axes, bins, strict=True):
        offsets = [tuple(map(float, dots.get_offsets()[0])) for dots in ax.collections]
        assert offsets == [(dot["p_hat"], pytest.approx(dot["p"])) for dot in bins[name]]
        assert [text.get_text() for text in ax.texts] == [str(dot["metas"]) for dot in bins[name]]
        sizes = [float(dots.get_sizes()[0]) for dots in ax.collections]
        assert sizes == pytest.approx([20 + 380 * dot["metas"] / 90 for dot in bins[name]])


def test_rows_of_a_study_come_from_the_cells_files(tmp_path, monkeypatch):
    """Two tiny made-up seeds of every setting: which evaluation goes where, tokens up to it, pooled bins."""
    monkeypatch.setattr(masa_study, "OUT", tmp_path)
    monkeypatch.setattr(masa_study, "SEEDS", (0, 1))
    monkeypatch.setattr(masa_study, "CONFIG", tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"steps": 2}')

    def row(step: int, correct: int) -> dict:
        base = {"step": step, "set": "heldout", "id": "p", "n": 4, "correct": correct, "lengths": [3], "at_limit": 0}
        base["correct_lengths"] = []
        base |= {"metas": 2, "parsed": 2, "p_hats": [0.5, 1.0], "l_hats": [], "gated": False, "cut_at": 9}
        return base | dict.fromkeys(("r_length", "r_difficulty", "r_notion"), 0.0)

    for setting in masa_study.FLAGS:
        steps = 3 if setting == "grpo" else 2
        for seed in (0, 1):
            out = masa_study.folder(setting, seed)
            out.mkdir()
            metrics = [{"solution_tokens": 10, "meta_tokens": 5, "tokens": 15 * (k + 1), "share/gated": k / 2,
                        "share/cut": None if k else 0.5} for k in range(steps)]  # fmt: skip
            evals = [row(step, seed + step) for step in range(steps + 1)]
            (out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
            (out / "evals.jsonl").write_text("".join(json.dumps(x) + "\n" for x in evals))
            (out / "results.json").write_text(json.dumps({"evals": passk.summaries(evals), "seconds": 1}))
    assert masa_study.equal_tokens(0) == 3  # 30 tokens of MASA, 10 a step of GRPO
    for setting in ("efficient",):  # its second half must hold a share of cut solutions
        for seed in (0, 1):
            path = masa_study.folder(setting, seed) / "metrics.jsonl"
            path.write_text(path.read_text().replace("null", "0.25"))
    found = masa_study.collect()
    accuracy = {name: [r["pass@1"]["mean"] for r in rows] for name, rows in found["rows"].items()}
    assert accuracy["before"] == [0.0, 0.25] and accuracy["masa"] == accuracy["shuffled"] == [0.5, 0.75]
    assert accuracy["grpo, equal steps"] == [0.5, 0.75] and accuracy["grpo, equal tokens"] == [0.75, 1.0]
    assert [r["tokens"] for r in found["rows"]["grpo, equal tokens"]] == [45, 45]
    assert found["rows"]["efficient"][0]["gated"] == 0.5 and found["rows"]["efficient"][0]["cut"] == 0.25
    assert found["calibration"]["masa"] == [
        {"p_hat": 0.5, "metas": 2, "p": 0.625},
        {"p_hat": 1.0, "metas": 2, "p": 0.625},
    ]


def test_the_study_writes_between_its_own_marks(tmp_path):
    page, (begin, end), (other, last) = tmp_path / "page.md", masa_study.MARKS, study.MARKS
    page.write_text(f"a\n{other}\nx\n{last}\nb\n{begin}\n{end}\nc")
    study.write_table("table", page, masa_study.MARKS)
    assert page.read_text() == f"a\n{other}\nx\n{last}\nb\n{begin}\ntable\n{end}\nc"
    page.write_text("no marks")
    with pytest.raises(InputError, match="must hold the lines"):
        study.write_table("table", page)
    assert page.read_text() == "no marks"
