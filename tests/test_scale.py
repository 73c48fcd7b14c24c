"""tools/scale.py: what it makes up is what the stages read, in the shares that it says."""

from pathlib import Path

import pytest
from conftest import ROOT

import data
from common.errors import InputError
from common.files import each_row
from common.template import ChatTemplate, fill, load_prompt
from common.tokens import encode, load_tokenizer, token_offsets
from tools import scale


def test_the_samples_are_those_of_a_run_and_a_tenth_become_candidates(tmp_path: Path) -> None:
    scale.make(tmp_path, 600)
    questions, _ = data.load_questions(tmp_path / "questions.jsonl", drop_repeated=True)
    assert len(questions) == 600
    tokenizer, template = load_tokenizer(scale.MODEL), ChatTemplate(scale.MODEL, "")
    samples = list(each_row(tmp_path / "run" / "samples.jsonl"))
    for k, sample in enumerate(samples[:40]):
        turn = fill(load_prompt(ROOT / "prompts" / "plain.txt"), question=questions[k // 2]["question"])
        assert sample["prompt"] == template.prompt(turn, thinking=sample["mode"] == "on")
        assert sample["prompt_ids"] == encode(tokenizer, sample["prompt"])
        assert token_offsets(tokenizer, sample["ids"][:-1])[0] == sample["text"]
    rows, tally = data.select_candidates(samples, tokenizer, n_draws=1, think_tokens=(1, 10_000))
    assert tally["all"]["questions"] == 600 and 15 <= tally["all"]["chosen"] <= 45 >= tally["all"]["rejected"] >= 15
    assert len(rows) == tally["all"]["chosen"] + tally["all"]["rejected"]


def test_a_command_is_measured_and_one_that_fails_is_named(tmp_path: Path) -> None:
    # More than this process has: Linux lets a child's peak begin with the memory of the process that it is forked from.
    code = "x = b'x' * (1500 * 2**20); sum(range(2_000_000))"
    seconds, peak = scale.measured(["-c", code], tmp_path / "log")
    assert seconds > 0.01 and 1500 < peak < 1600
    with pytest.raises(InputError, match=r"-c raise SystemExit\(7\) ... ended with 7; see"):
        scale.measured(["-c", "raise SystemExit(7)"], tmp_path / "log")
