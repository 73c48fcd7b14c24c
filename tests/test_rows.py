"""rows.py: a row of another shape is refused where it is read, with its line and field."""

import json

import pytest

import data
import eval as evaluation
from common import rows
from common.errors import InputError
from common.files import each_row, write_jsonl

SAMPLE = {"id": "a", "mode": "on", "draw": 0, "question": "Q", "answers": ["Nala"], "prompt": "p", "prompt_ids": [1]}
SAMPLE |= {"ids": [1, 2], "text": "t", "finish": "stop", "dataset": "d"}
CANDIDATE = {"id": "a", "question": "Q", "answers": ["Nala"], "prompt": "p", "prompt_ids": [1], "completion": "abcd"}
CANDIDATE |= {"completion_ids": [1, 2], "spans": [[0, 2], [2, 4]], "chosen": True, "dataset": "d"}
ODD = (None, True, 1.5, {}, {"a": 1}, [None], [[]], [{}])  # what none of these fields may be
BAD = [(SAMPLE, name, value) for name in SAMPLE for value in ODD]
BAD += [(CANDIDATE, name, value) for name in CANDIDATE for value in ODD if not (name == "chosen" and value is True)]
BAD += [(SAMPLE, "id", ""), (SAMPLE, "mode", "On"), (SAMPLE, "draw", -1), (SAMPLE, "finish", "eos")]
BAD += [(SAMPLE, "ids", [-1]), (SAMPLE, "ids", [2**31]), (SAMPLE, "ids", [True]), (SAMPLE, "answers", "Nala")]
BAD += [
    (CANDIDATE, "spans", spans) for spans in ([[0, 5]], [[2, 4], [0, 2]], [[0, 3], [2, 4]], [[1, 1]], [[0]], [[0.0, 2]])
]


@pytest.mark.parametrize("row", [SAMPLE, CANDIDATE, {"w": [0.5, 2], "labels": [["framing"], []], "other": None}])
def test_rows_of_the_stages_pass_unchanged(row, tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [row])
    assert list(each_row(tmp_path / "r.jsonl", (), rows.check_row)) == [row]


@pytest.mark.parametrize(("row", "name", "value"), BAD)
def test_a_field_of_another_kind_is_named(row, name, value, tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [row, row | {name: value}])
    with pytest.raises(InputError, match=rf"r.jsonl:2: field '{name}' ") as caught:
        list(each_row(tmp_path / "r.jsonl", (), rows.check_row))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("w", [[0], [-1.0], [1e39], [True], ["1"], [float("inf")], 1.0, None])
def test_weights_are_positive_and_fit_a_32_bit_float(w):
    with pytest.raises(InputError, match="field 'w' must be a list of positive numbers"):
        rows.check_row({"w": w})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": [1e39]}, "'w' must hold positive"),
        ({"labels": ["framing"]}, "'labels' must hold"),
        ({"prompt_ids": [2**40]}, "token ids"),
    ],
)
def test_training_rows_hold_what_tensors_can(change, message, tmp_path):
    row = {"id": "a", "prompt": "p", "completion": "ab", "label": True, "prompt_ids": [1], "completion_ids": [1]}
    row |= {"spans": [[0, 2]], "labels": [[]], "w": [1.0]}
    write_jsonl(tmp_path / "t.jsonl", [row | change])
    with pytest.raises(InputError, match=message):
        data.load_train(tmp_path / "t.jsonl")


def test_samples_of_ones_own_are_looked_at(tmp_path, capsys):
    (tmp_path / "s.jsonl").write_text(json.dumps(SAMPLE | {"text": None}) + "\n")
    assert evaluation.main([str(tmp_path / "s.jsonl")]) == 3
    assert "s.jsonl:1: field 'text' must be a text, not None" in capsys.readouterr().err


def test_a_question_for_a_judge_needs_what_it_compares_with(tmp_path):
    row = {"id": "a", "question": "Q", "answers": ["A"], "task": "truthful"}
    for odd in ({}, {"best_answer": None}, {"best_answer": " "}):
        write_jsonl(tmp_path / "q.jsonl", [row | odd])
        with pytest.raises(InputError, match="q.jsonl:1: field 'best_answer' must be a text"):
            data.load_questions(tmp_path / "q.jsonl")
    write_jsonl(tmp_path / "q.jsonl", [row | {"best_answer": "B"}])
    assert data.load_questions(tmp_path / "q.jsonl")[0][0]["best_answer"] == "B"
