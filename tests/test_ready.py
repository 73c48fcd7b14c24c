"""What stops a run before its processes join: one sentence about lengths, files read through, weights, stages."""

import dataclasses
import json
import re
import shutil
import socket
from pathlib import Path

import pytest

import mralign
from common.errors import InputError, ServiceError
from common.files import read_jsonl, write_jsonl
from common.hub import locate
from common.ranks import not_joined
from common.tokens import encode
from pipeline import ready
from pipeline.config import RunConfig
from pipeline.run import Run

ROOT = Path(__file__).resolve().parents[1]
TRAIN, TEST = (ROOT / "mini/questions" / f"{name}.jsonl" for name in ("train", "test"))
STAGES = ["sample", "candidates", "train", "eval", "scores"]


def a_run(out: Path, **settings) -> Run:
    fields = {"model": str(ROOT / "mini/model"), "questions": str(TRAIN), "eval_sets": f"test={TEST}", "out": str(out)}
    fields |= {"prompt": str(ROOT / "prompts/plain.txt"), "dtype": "float32", "draw_max_new": 64, "max_new": 64}
    cfg = RunConfig(**fields | settings)
    return Run(cfg, locate(cfg.model), not_joined())


def longest(run: Run, path: Path) -> int:
    """Tokens of the longest prompt, every question counted."""
    prompts = [run.prompt(run.turn(q["question"]), mode) for q in read_jsonl(path) for mode in ("on", "off")]
    return max(len(encode(run.tokenizer, text)) for text in prompts)


@pytest.mark.parametrize("prompt", ["prompts/plain.txt", "prompts/factual.txt"])
def test_the_limit_that_is_named_is_the_largest_that_works(tmp_path, prompt):
    run = a_run(tmp_path, max_new=8192, prompt=str(ROOT / prompt))
    left = 512 - longest(run, TEST)
    ready.check(run, STAGES, ["sample", "candidates"], [])  # evaluation is not wanted
    with pytest.raises(InputError, match="--max-new 8,192 and the prompt of question .*512 positions") as error:
        ready.check(run, STAGES, [], [])
    assert re.search(r"set --max-new to (\d+) or less", str(error.value))[1] == str(left)
    assert ("--config configs/mini.json" in str(error.value)) is (prompt != "prompts/plain.txt")
    run.cfg = dataclasses.replace(run.cfg, max_new=left)
    ready.check(run, STAGES, [], [])
    run.cfg = dataclasses.replace(run.cfg, max_new=left + 1)
    with pytest.raises(InputError, match=f"set --max-new to {left} or less"):
        ready.check(run, STAGES, ["eval"], [])


def test_the_dry_run_names_the_same_limit(tmp_path, capsys):
    flags = ["--model", "mini/model", "--questions", str(TRAIN), "--eval-sets", f"test={TEST}", "--annotator", "self"]
    flags += ["--out", str(tmp_path / "run"), "--max-new", "300"]
    assert mralign.main([*flags, "--dry-run"]) == 0
    planned = re.findall(r"set --draw-max-new to (\d+) or less", capsys.readouterr().out)
    assert mralign.main(flags) == 3
    assert re.findall(r"set --draw-max-new to (\d+) or less", capsys.readouterr().err) == planned
    assert planned == [str(512 - longest(a_run(tmp_path, prompt=str(ROOT / "prompts/factual.txt")), TRAIN))]


def test_a_question_longer_than_the_model_has_its_own_remedy(tmp_path):
    write_jsonl(tmp_path / "long.jsonl", [{"id": "q7", "question": "why? " * 600, "answers": ["so"]}])
    run = a_run(tmp_path, questions=str(tmp_path / "long.jsonl"))
    with pytest.raises(InputError, match="the prompt of question q7 of .*; shorten the question or leave it out"):
        ready.check(run, STAGES, ["sample"], [])


def test_later_files_are_read_before_the_first_stage(tmp_path):
    """A line of an evaluation set, weights that are not there: found by the last stages, asked for by all or theirs."""
    rows = [{"id": "a", "question": "q", "answers": ["x"]}, {"id": "b", "question": "q"}]
    write_jsonl(tmp_path / "odd.jsonl", rows)
    run = a_run(tmp_path, eval_sets=f"test={TEST},odd={tmp_path / 'odd.jsonl'}")
    for wanted in ([], ["scores"]):
        with pytest.raises(InputError, match=r"odd\.jsonl.*2.*answers"):
            ready.check(run, STAGES, wanted, [])
    ready.check(run, STAGES, ["sample"], [])

    shutil.copytree(ROOT / "mini/model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:
        served = {"backend": "openai", "base_url": f"http://127.0.0.1:{server.getsockname()[1]}/v1"}
        run = a_run(tmp_path, model=str(tmp_path / "model"), **served)
        with pytest.raises(InputError, match="model.safetensors: no such file"):
            ready.check(run, STAGES, [], [])
        ready.check(run, STAGES, ["sample"], [])  # the server has them


def test_a_server_that_is_not_there_is_looked_for_where_it_is_asked_first(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        ready.check_listens(url)  # and after this nobody listens there
    committee = {"annotator": "committee", "annotator_a": f"m@{url}", "judge": f"m@{url}"}
    own = a_run(tmp_path, **committee)
    served = a_run(tmp_path, **committee, backend="openai", base_url=url)
    for run, wanted in ((served, []), (served, ["sample"]), (served, ["eval"]), (own, ["annotate"]), (own, ["judge"])):
        with pytest.raises(ServiceError, match="no server listens there; start it"):
            ready.check_servers(run, wanted)
    ready.check_servers(own, [])  # annotators may be started while the draws are made
    ready.check_servers(served, ["train"])
    for file in ("samples.jsonl", "annotation/calls.jsonl", "judge/calls.jsonl"):
        write_jsonl(own.out / file, [])
    for wanted in ([], ["sample"]):  # what was drawn or answered needs no server
        ready.check_servers(served, wanted)
    ready.check_servers(own, ["annotate", "judge"])
    places = [served.samples(name, variant) for name in served.eval_sets for variant in served.variants]
    for path in places[1:]:
        write_jsonl(path, [])
    with pytest.raises(ServiceError):
        ready.check_servers(served, ["eval"])
    write_jsonl(places[0], [])
    ready.check_servers(served, ["eval"])


def test_unknown_stages_are_named_with_those_there_are(tmp_path):
    for wanted, redo in ((["smaple"], []), ([], ["smaple"])):
        with pytest.raises(InputError, match="unknown stage 'smaple'; the stages are sample, candidates"):
            ready.check(a_run(tmp_path), STAGES, wanted, redo)


def test_another_process_than_the_first_leaves_the_files_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = a_run(tmp_path, max_new=8192)
    assert run.ranks.rank == 1
    ready.check(run, STAGES, [], [])


def test_a_miniature_with_a_prompt_it_was_not_made_for_is_told_so(tmp_path):
    assert ready.miniature(a_run(tmp_path).cfg) == ""
    assert "--config configs/mini.json" in ready.miniature(RunConfig(model="mini/model"))
    assert ready.miniature(RunConfig(model="Qwen/Qwen3-8B")) == ""
    settings = json.loads((ROOT / "configs/mini.json").read_text())
    assert ready.miniature(RunConfig(**settings)) == ""
