"""Erring annotators with the truth known (mini/ambiguous.py), and thoughts that a program judges (mini/sums.py)."""

import numpy as np
import pytest

import data
import em
from annotate import Step
from common.errors import InputError
from common.files import read_jsonl
from common.tokens import load_tokenizer
from llm.agreement import mean_l1
from mini import ambiguous, sums
from mini import rehearsal_server as world
from tools import questions

LABELS = {
    "p": [("framing",), ("retrieval",), ("evaluation",)],
    "q": [("framing",), ("retrieval",), ("retrieval",)],
    "n": [("framing",), ("backtracking",), ("evaluation",)],
    "m": [("backtracking",), ("backtracking",), ("evaluation",)],
}
CHOSEN = {"p": True, "q": True, "n": False, "m": False}
ONES = {key: [1, 1, 1] for key in LABELS}


def test_annotators_share_as_many_of_their_errors_as_they_are_told():
    def errors(model, shared):
        table = world.confusion(model, 0.8, shared)
        assert np.allclose(np.diag(table), 0.8) and np.allclose(table.sum(1), 1)
        return table - 0.8 * np.eye(15)

    assert np.array_equal(errors("annotator-a", 1.0), errors("annotator-b", 1.0))
    apart = np.abs(errors("annotator-a", 0.0) - errors("annotator-b", 0.0)).sum()
    assert np.abs(errors("annotator-a", 0.75) - errors("annotator-b", 0.75)).sum() == pytest.approx(apart / 4)


def test_a_second_label_comes_as_often_as_the_habit_says_and_truth_is_found_in_either_place():
    panel = world.Panel({"annotator-a": world.Habit(0.9, 0.5)}, lambda text: ("retrieval",))
    said = [world.opinion("annotator-a", str(k), ["I recall"], panel) for k in range(4000)]
    two = np.mean([len(votes) == 2 for votes in said])
    first = np.mean([next(iter(votes)) == "retrieval" for votes in said])
    assert abs(two - 0.5) < 0.03 and abs(first - 0.9) < 0.02  # over 3 standard errors
    assert np.mean(["retrieval" in votes for votes in said]) > first + 0.03  # half of the misses are mended
    assert all(3 <= c <= 10 for votes in said for c in votes.values())


def test_the_panels_labels_of_a_segment_are_those_of_its_cue():
    panel = ambiguous.panel(0.8)
    assert panel.truth("But wait, there is more.") == ("backtracking",) and panel.truth("Nothing here.") == ()
    assert ambiguous.PAPER["two"] == pytest.approx(0.942, abs=5e-4)  # 83,249 labels on 42,863 steps


def test_an_estimate_of_the_true_labels_is_the_truth():
    estimate = ambiguous.Estimate(LABELS, em.fit, ONES, CHOSEN)
    found = ambiguous.measure(estimate, estimate, np.ones(4, dtype=int))
    assert [found[key] for key in ("P", "P_pos", "P_neg")] == [0, 0, 0]
    assert found["chosen"] == pytest.approx(1) and found["spread"] == found["true spread"] > 0


def test_a_trace_that_counts_twice_is_a_trace_that_is_there_twice():
    """Against tools.questions, which fits matrices and weights trace by trace."""
    other = LABELS | {"n": [("framing",), ("backtracking", "evaluation"), ("evaluation",)]}
    times = np.array([1, 0, 2, 1])
    found = ambiguous.measure(
        ambiguous.Estimate(other, em.frequency, ONES, CHOSEN), ambiguous.Estimate(LABELS, em.fit, ONES, CHOSEN), times
    )
    copies = {f"{key}{k}": key for key, n in zip(LABELS, times, strict=True) for k in range(n)}
    chosen = {copy: CHOSEN[key] for copy, key in copies.items()}
    a, b = ({copy: of[key] for copy, key in copies.items()} for of in (other, LABELS))
    P, Q = questions.matrices(a, chosen, em.frequency), questions.matrices(b, chosen)
    for name in P:
        assert found[name] == pytest.approx(mean_l1(P[name], Q[name]), abs=1e-12)
    apart = questions.weights_apart(questions.weights(a, chosen, em.frequency), questions.weights(b, chosen), chosen)
    assert found["rejected"] == pytest.approx(apart["rejected"]["spearman"], abs=1e-12)


def test_right_labels_by_hand():
    steps = {
        "x": [Step((0, 1), ("retrieval", "framing"), (6.0, 9.0), "merge"), Step((2,), ("analogy",), (8.0,), "agree")],
        "y": [Step((0,), (), (), "rejected"), Step((1,), ("framing", "analogy"), (5.0, 4.0), "judge")],
    }
    true = {"x": [("retrieval",), ("framing",), ("analogy",)], "y": [("framing",), ("framing", "analogy")]}
    assert ambiguous.rightness(steps, true) == {  # of four segments: the last one has two true labels
        "two labels": 2 / 4,
        "true label among them": 3 / 4,
        "most confident is true": 2 / 4,
        "true label alone": 1 / 4,
    }


def test_a_program_decides_which_thoughts_about_arithmetic_are_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "EACH", 25)
    found = sums.run(tmp_path, 0)
    drawn = read_jsonl(tmp_path / "samples.jsonl")
    right = {}
    for row in drawn:  # the box's number, by int() alone
        number = row["text"].partition("\\boxed{")[2].partition("}")[0]
        left, op, other = row["question"].split()
        right[row["id"], row["mode"]] = int(number) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[op](
            int(left), int(other)
        )
    expected = {(key, on) for (key, mode), on in right.items() if mode == "on" and on != right[key, "off"]}
    rows = read_jsonl(tmp_path / "candidates.jsonl")
    assert {(row["id"], row["chosen"]) for row in rows} == expected and len(expected) > 20
    assert {row["dataset"] for row in rows} == {"open"}  # the other tiers are always right, or always wrong
    carried = found["mean w of steps that carry or borrow"]
    assert carried["chosen"] > 1.03 and carried["rejected"] is None  # what went wrong is that none is there
    assert 0.2 < found["labels"]["all"]["none"] < 0.45
    bare = [s for row in rows for a, b in row["spans"] if not any(c in (s := row["completion"][a:b]) for c in "wotncb")]
    assert found["labels"]["all"]["none"] == len(bare) / found["labels"]["all"]["steps"]  # digits and signs only
    with pytest.raises(InputError, match="no chosen row"):  # in its box no answer is a gold as text
        data.select_candidates(drawn, load_tokenizer(sums.MODEL), 1, segments=(2, 15), think_tokens=(0, 300))
