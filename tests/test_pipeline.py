"""The command line from questions to results on a slice of the miniature: files, reuse, ranks, bad input."""

import contextlib
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import em
import mralign
from common.errors import InputError
from common.files import read_json, read_jsonl, write_json, write_jsonl
from common.ranks import Ranks, only_writer
from common.settings import cli
from common.tokens import load_stop_ids, load_tokenizer
from pipeline.config import RunConfig, check

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["sample", "candidates", "annotate", "fit", "train kto", "train mralign"]
STAGES += [f"eval {v} test" for v in ("thinkoff", "thinkon", "kto", "mralign")] + ["scores", "analysis", "report"]
FAST = ["--epochs", "1", "--batch-size", "8", "--method", "kto,mralign"]


class Ended(NamedTuple):
    """How a run of the command line ended."""

    returncode: int
    stdout: str
    stderr: str


def command_line(*flags: object, config: str = "configs/mini.json") -> Ended:
    """`mralign.py --config configs/mini.json FLAGS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        code = mralign.main([*(["--config", config] if config else []), *map(str, flags)])
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def slices(tmp_path_factory) -> dict[str, Path]:
    """A few dozen training questions, of which 15 become rows, and a few of the test, under a path with a space."""
    folder = tmp_path_factory.mktemp("a slice")
    paths = {"questions": folder / "train.jsonl", "test": folder / "test.jsonl", "folder": folder}
    write_jsonl(paths["questions"], read_jsonl(ROOT / "mini/questions/train.jsonl")[528:960:12])
    write_jsonl(paths["test"], read_jsonl(ROOT / "mini/questions/test.jsonl")[:20])
    paths["few"] = folder / "few.jsonl"
    write_jsonl(paths["few"], read_jsonl(ROOT / "mini/questions/test.jsonl")[:10])
    return paths


def flags(slices: dict[str, Path], out: Path) -> list[object]:
    return ["--questions", slices["questions"], "--eval-sets", f"test={slices['test']}", "--out", out, *FAST]


@pytest.fixture(scope="module")
def run(slices) -> Path:
    """The one run that most tests here look at."""
    out = slices["folder"] / "one process"
    done = command_line(*flags(slices, out))
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    (out / "stderr.txt").write_text(done.stderr)
    return out


def said(done: Ended, word: str) -> list[str]:
    """The stages about which stderr says `word`."""
    return [line.split("]")[0][1:] for line in done.stderr.splitlines() if line.startswith("[") and word in line]


def test_training_rows_are_the_sampled_ids_and_follow_the_selection_rule(run):
    samples = {}
    for s in read_jsonl(run / "samples.jsonl"):
        samples.setdefault(s["id"], {"on": [], "off": []})[s["mode"]].append(s)
    rows = read_jsonl(run / "train.jsonl")
    assert {r["label"] for r in rows} == {True, False}
    for r in rows:
        drawn = samples[r["id"]]
        assert r["completion_ids"] == drawn["on"][0]["ids"] and r["prompt_ids"] == drawn["on"][0]["prompt_ids"]

        def right(s):
            return s["text"].rpartition("<answer>")[2].removesuffix("</answer>").strip() in s["answers"]

        assert all(right(s) is r["label"] for s in drawn["on"])
        assert all(right(s) is not r["label"] for s in drawn["off"])


def test_weights_are_the_clipped_ratio_of_the_matrices(run):
    t = read_json(run / "transitions.json")
    checked = 0
    for r in read_jsonl(run / "train.jsonl"):
        own = t["P_pos"] if r["label"] else t["P_neg"]
        before = ["<start>"]
        for labels, w in zip(r["labels"], r["w"], strict=True):
            if labels and before:  # Eq. 7 and 10; the uniform rho cancels
                pairs = [(em.STATES.index(a), em.STATES.index(b)) for a in before for b in labels]
                ratio = sum(own[a][b] for a, b in pairs) / sum(t["P"][a][b] for a, b in pairs)
                assert w == pytest.approx(min(math.e, max(1 / math.e, ratio)), rel=1e-12)
                checked += 1
            before = labels
    assert checked > 50


def test_results_add_up_and_the_report_stands_alone(run):
    results = read_json(run / "results.json")
    for setting in ("thinkon", "kto", "mralign"):
        m = results["scores"]["test"]["metrics"][setting]
        assert m["n"] == sum(m["table"].values()) == 20
        assert m["acc"]["k"] == m["table"]["thought_and_answer"]
        assert m["mis"]["k"] == m["table"]["thought_only"] + m["table"]["answer_only"]
    assert results["scores"]["test"]["metrics"]["thinkoff"]["mis"] is None
    assert list(results["stages"]) == STAGES[:-1] and results["receipt"]["processes"] == 1
    assert f"{results['scores']['test']['metrics']['mralign']['acc']['k']}/20" in (run / "stdout.txt").read_text()
    page = (run / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert all((run / "figures" / f).stat().st_size > 1000 for f in ("transitions.png", "curves.png", "weights.png"))
    first = read_jsonl(run / "mralign" / "metrics.jsonl")[0]
    chosen, rejected = first["count/chosen"], first["count/rejected"]
    assert first["loss"] == pytest.approx(0.5 * (chosen + 1.5 * rejected) / (chosen + rejected), abs=1e-5)


def test_an_adapter_travels_with_its_card_and_the_commands_that_serve_it(run):
    said = (run / "stdout.txt").read_text()
    k = read_json(run / "results.json")["scores"]["test"]["metrics"]["mralign"]["acc"]["k"]
    for method in ("kto", "mralign"):
        card = (run / method / "README.md").read_text()
        last = read_jsonl(run / method / "metrics.jsonl")[-1]
        digest = hashlib.sha256((run / "train.jsonl").read_bytes()).hexdigest()
        for part in (f"| loss | {last['loss']:.6g} |", digest, f"{k}/20", "mini/LICENSES-data.md"):
            assert part in card, part
        modules = shlex.quote(f"{method}={run / method}")
        served = shlex.quote(str(ROOT / "mini/model"))
        command = f"vllm serve {served} --enable-lora --max-lora-rank 8 --lora-modules {modules}"
        assert command in card and (command in said) == (method == "mralign")  # the run's own words name one adapter


def test_the_prompt_is_shown_once_a_run(run):
    shown = [line for line in (run / "stderr.txt").read_text().splitlines() if line.startswith("prompt, thinking")]
    assert shown == [
        r"prompt, thinking on: '<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n'",
        r"prompt, thinking off: '<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'",
    ]


def test_tokens_that_end_a_completion(tmp_path):
    tokenizer = load_tokenizer(ROOT / "mini/model")
    cases = [({"eos_token_id": 7}, {"eos_token_id": [3, 5]}, {3, 5}), ({"eos_token_id": 7}, {"top_k": 20}, {7})]
    for config, generation, expected in cases:
        write_json(tmp_path / "config.json", config)
        write_json(tmp_path / "generation_config.json", generation)
        assert load_stop_ids(tmp_path, tokenizer) == expected
    for config in ({}, {"eos_token_id": 10**6}, {"eos_token_id": "</s>"}, {"eos_token_id": [3, -1]}):
        write_json(tmp_path / "config.json", config)
        with pytest.raises(InputError, match="config.json: eos_token_id is .* must name tokens of tokenizer.json"):
            load_stop_ids(tmp_path, tokenizer)


def test_a_second_run_does_nothing_again_and_a_changed_setting_only_what_depends_on_it(run, slices, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    done = command_line(*flags(slices, run))
    assert done.returncode == 0, done.stderr
    assert said(done, "unchanged, reused") == STAGES
    # Paths, speed and who samples are no reason to do anything again.
    moved = slices["folder"] / "moved.jsonl"
    shutil.copy(slices["questions"], moved)
    done = command_line(
        *flags(slices, run), "--questions", moved, "--micro-batch", 4, "--sample-batch", 3, "sample", "train"
    )
    assert said(done, "unchanged, reused") == ["sample", "train kto", "train mralign"]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    done = command_line(*flags(slices, copy), "--temperature", "0.7", "eval")
    assert done.returncode == 0, done.stderr
    assert said(done, "temperature 0.7, was 0.6") == STAGES[6:10]
    done = command_line(*flags(slices, run), "candidates", "--redo", "candidates")
    assert said(done, "asked for") == ["candidates"]
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}


def test_a_damaged_result_is_never_used(run, slices, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    raw = bytearray((copy / "kto/adapter_model.safetensors").read_bytes())
    raw[-5] ^= 1
    (copy / "kto/adapter_model.safetensors").write_bytes(raw)
    refused(command_line(*flags(slices, copy)), "kto/adapter_model.safetensors", "checksum", "--redo train")
    whole = (copy / "samples.jsonl").read_bytes()
    (copy / "samples.jsonl").write_bytes(whole[: whole.rindex(b"\n", 0, len(whole) // 2) + 1])
    refused(command_line(*flags(slices, copy), "sample"), "samples.jsonl", "--redo sample")
    (copy / "samples.jsonl").write_bytes(whole)
    (copy / "candidates.jsonl").unlink()  # made anew in no time
    assert said(
        command_line(*flags(slices, copy), "sample", "candidates"), "candidates.jsonl is not as it was left"
    ) == ["candidates"]
    assert (copy / "candidates.jsonl").read_bytes() == (run / "candidates.jsonl").read_bytes()


@pytest.mark.long
def test_every_file_that_a_run_leaves_is_in_a_receipt_and_a_damaged_page_is_made_anew(run, slices, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    receipts = [read_json(path) for path in (copy / "done").iterdir()]
    kept = {digest for receipt in receipts for digest in receipt["outputs"].values()}
    files = [p for p in copy.rglob("*") if p.is_file() and p.name not in ("stdout.txt", "stderr.txt", "lock")]
    files = [p for p in files if "done" not in p.parts and "checkpoint" not in p.parent.name]  # they check themselves
    lacking = {p.name for p in files if hashlib.sha256(p.read_bytes()).hexdigest() not in kept}
    assert lacking == {"status.json"} and {"report.html", "weights.png", "README.md"} < {p.name for p in files}
    page = (copy / "report.html").read_text()
    figure, card = (copy / "figures/weights.png").read_bytes(), (copy / "kto/README.md").read_text()
    (copy / "report.html").write_text(page.replace("MR-ALIGN", "MR-ALIEN", 1))
    (copy / "figures/weights.png").write_bytes(figure[:-1])
    (copy / "kto/README.md").unlink()
    (copy / "figures/own.txt").write_text("a file of somebody's own")
    again = command_line(*flags(slices, copy), "report")
    assert said(again, "report.html, kto/README.md, figures/weights.png is not as it was left") == ["report"]
    assert "MR-ALIEN" not in (copy / "report.html").read_text() and (copy / "figures/own.txt").exists()
    assert (copy / "figures/weights.png").read_bytes() == figure and (copy / "kto/README.md").read_text() != ""
    assert "Not evaluated yet" not in card and "Not evaluated yet" not in (copy / "kto/README.md").read_text()
    assert said(command_line(*flags(slices, copy), "report"), "unchanged, reused") == ["report"]


def test_a_stage_without_what_it_reads_is_refused_before_the_model_is_looked_for(tmp_path, monkeypatch):
    """A model of the Hub is gigabytes: that train.jsonl is missing is said first, and by whom it is written."""
    monkeypatch.chdir(ROOT)
    cfg = RunConfig(model="no/such-model", out=str(tmp_path), annotator="cues")
    for stage, name, writer in (
        ("candidates", "samples.jsonl", "sample"),
        ("annotate", "candidates.jsonl", "candidates"),
        ("fit", "candidates.jsonl", "candidates"),
        ("train", "train.jsonl", "fit"),
    ):
        with pytest.raises(
            InputError, match=f"{tmp_path / name}: no such file, which {stage} reads; .* {writer} first"
        ):
            check(cfg, [stage])
    for name in ("candidates.jsonl", "annotations.jsonl"):
        (tmp_path / name).touch()
    check(cfg, ["fit", "train"])  # fit writes what train reads


@pytest.mark.long
def test_another_runs_draws_are_taken_over(run, slices, tmp_path):
    done = command_line(*flags(slices, tmp_path / "same"), "--reuse-from", run)
    assert done.returncode == 0 and said(done, "taken over from") == [s for s in STAGES if s != "report"]
    rows = read_jsonl(run / "samples.jsonl")
    assert read_jsonl(tmp_path / "same/samples.jsonl") == rows
    some = tmp_path / "some.jsonl"  # fewer questions, and a changed one, which has to be drawn
    questions = read_jsonl(slices["questions"])[:12]
    questions[3] |= {"question": "What is the capital of Austria?"}
    write_jsonl(some, questions)
    done = command_line(*flags(slices, tmp_path / "fewer"), "--questions", some, "--reuse-from", run, "sample")
    kept = {q["id"] for q in questions} - {questions[3]["id"]}
    got = read_jsonl(tmp_path / "fewer/samples.jsonl")
    assert [r for r in got if r["id"] in kept] == [r for r in rows if r["id"] in kept]
    assert sum(r["id"] == questions[3]["id"] for r in got) == 6 and "draws: 66 of 72 lent" in done.stderr
    warmer = ["--questions", some, "--draw-temperature", 0.3, "--reuse-from", run, "sample"]
    assert " lent by " not in command_line(*flags(slices, tmp_path / "warmer"), *warmer).stderr


def test_two_runs_do_not_write_to_one_folder(run, slices):
    with only_writer(run, Ranks(0, 1, torch.device("cpu"))):
        refused(command_line(*flags(slices, run), "scores"), "another run writes there", f"process {os.getpid()} on")
    assert command_line(*flags(slices, run), "candidates").returncode == 0


@pytest.mark.long
def test_every_setting_and_analysis_on_saved_files(run, slices, tmp_path):
    """Search results, Self-Refine, several draws, labels, a judge: what each leaves adds up."""
    out = tmp_path / "all"
    shutil.copytree(run, out)
    long = tmp_path / "long.jsonl"
    write_jsonl(long, read_jsonl(ROOT / "mini/questions/long.jsonl")[:3])
    wanted = ["--eval-sets", f"test={slices['few']},long={long}", "--also", "refine,thinkon+ret", "--eval-draws", 2]
    wanted += ["--search", "mini/snippets.jsonl", "--label-eval", 9, "--judge", "stand-in", "--judge-sets", "test"]
    stages = ["search", "eval", "labels", "judge", "scores", "analysis", "report"]
    done = command_line(*flags(slices, out), *wanted, *stages)
    assert done.returncode == 0, done.stderr
    results, analysed = read_json(out / "results.json"), read_json(out / "eval/analysis.json")
    metrics = results["scores"]["test"]["metrics"]
    assert list(metrics) == ["thinkoff", "thinkon", "kto", "mralign", "refine", "thinkon+ret"]
    assert all(m["n"] == 2 * m["questions"] == 20 and len(m["draws"]["acc"]["all"]) == 2 for m in metrics.values())
    assert list(results["scores"]) == ["test"]  # long answers are not matched exactly
    ret = read_jsonl(out / "eval/test/thinkon+ret.jsonl")
    found = {r["id"]: r["results"] for r in read_jsonl(out / "eval/test/snippets.jsonl")}
    assert all(found[s["id"]][0]["snippet"] in s["prompt"] and s["question"] in s["prompt"] for s in ret)
    assert all(s["answers"][0] in found[s["id"]][0]["snippet"] for s in ret)  # the stand-in finds the fact first
    told = {(s["id"], s["draw"]): s for s in read_jsonl(out / "eval/test/refine.feedback.jsonl")}
    first = {(s["id"], s["draw"]): s for s in read_jsonl(out / "eval/test/thinkon.jsonl")}
    for s in read_jsonl(out / "eval/test/refine.jsonl"):
        answer = data.parse(first[s["id"], s["draw"]]["text"]).answer
        assert f"Answer: {answer}" in told[s["id"], s["draw"]]["prompt"] and answer in s["prompt"]
    graded = results["judge"]["sets"]["test"]["thinkon"]
    assert graded["rows"] == 20 and graded["correct"]["k"] == metrics["thinkon"]["em_answer_exact"]["k"]
    long_scores = results["judge"]["sets"]["long"]
    assert len({s["k"] for s in long_scores.values()}) == 1 and all(0 <= s["f1"] <= 1 for s in long_scores.values())
    parts = analysed["strata"]["test"]["mralign"]
    gain = sum(p["n"] * p["gain"] for p in parts.values() if p["n"]) / 20
    assert gain == pytest.approx(metrics["mralign"]["acc"]["share"] - metrics["thinkon"]["acc"]["share"])
    assert analysed["change"]["test"]["mralign"]["n_before"] <= 9
    page = (out / "report.html").read_text()
    assert "Before and after" in page and "stand-in" in page and "Fig. 4" in page


@pytest.mark.long
def test_two_processes_give_the_single_process_result(run, slices):
    out = slices["folder"] / "two processes"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "mralign.py"]
    wanted = ["sample", "candidates", "annotate", "fit", "train", "--method", "mralign"]
    command += ["--config", "configs/mini.json", *map(str, flags(slices, out)), *wanted]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("samples.jsonl", "candidates.jsonl", "annotations.jsonl", "transitions.json", "train.jsonl"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    one, two = (load_file(p / "mralign" / "adapter_model.safetensors") for p in (run, out))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


# Bad input: one line that names the place and the remedy, exit code 3


def refused(done: Ended, *words: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 3 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0], errors[0]


def test_no_settings_at_all():
    refused(command_line(config=""), "--model is not set", "configs/mini.json")


@pytest.mark.parametrize(
    "extra,words",
    [
        (["--questions", "absent.jsonl"], ["absent.jsonl", "no such file"]),
        (["--model", "absent"], ["absent", "no such"]),
        (["--method", "dpo"], ["dpo", "mralign"]),
        (["--eval-sets", "test"], ["--eval-sets", "name=path"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["smaple"], ["unknown stage 'smaple'", "sample"]),
        (["--also", "dpo+ret"], ["--also 'dpo+ret'", "thinkon+ret"]),
        (["--also", "thinkon+ret"], ["thinkon+ret needs --search"]),
        (["--search", "absent.jsonl"], ["--search absent.jsonl: no such file"]),
        (["--also", "refine+ret", "--search", "mini/snippets.jsonl"], ["put thinkon+ret before it"]),
        (["--eval-draws", 0], ["--eval-draws is 0"]),
        (["--judge", "gpt-4o"], ["MODEL@BASE_URL"]),
    ],
)
def test_bad_flags(extra, words):
    refused(command_line(*extra), *words)


def test_training_needs_train_jsonl_alone(run, tmp_path):
    """Rows and a model: no questions, no evaluation sets. The card counts the rows of each data set."""
    out = tmp_path / "rows alone"
    out.mkdir()
    shutil.copy(run / "train.jsonl", out)
    nothing = ["--questions", "", "--eval-sets", "", "--out", out, "--method", "sft", "--epochs", 1, "--batch-size", 8]
    done = command_line(*nothing, "train")
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(run / "train.jsonl")
    card = (out / "sft" / "README.md").read_text()
    assert f"rows by data set: mini, {len(rows)}; licence" in card
    refused(command_line(*nothing, "sample"), "--questions is not set")
    refused(command_line(*nothing, "scores"), "--questions is not set")
    refused(command_line(*nothing, "eval"), "--eval-sets is not set")


PAID = ["--annotator", "committee", "--annotator-a", "gpt-4o@https://a.example/v1#KEY_OF_A"]
PAID += ["--annotator-b", "b@https://b.example/v1#KEY_OF_B", "--adjudicator", "c@https://a.example/v1#KEY_OF_A"]
PAID += ["--judge", "gpt-4o@https://a.example/v1#KEY_OF_J", "--search", "serper#KEY_OF_S", "--also", "refine,kto+ret"]


def test_keys_that_are_missing_are_named_at_once_with_the_flags_that_do_without(monkeypatch, tmp_path):
    for name in "ABJS":
        monkeypatch.delenv(f"KEY_OF_{name}", raising=False)
    out = ["--out", tmp_path / "new", "--method", "kto"]
    local = "--annotator self"
    line = f"export KEY_OF_A KEY_OF_B KEY_OF_J KEY_OF_S, or do without: {local} --judge '' --search '' --also 'refine'"
    refused(command_line(*out, *PAID), line)
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("KEY_OF_A", "canary")
    monkeypatch.setenv("KEY_OF_B", "canary")
    refused(command_line(*out, *PAID), "export KEY_OF_J KEY_OF_S, or do without: --judge '' --search '' --also")
    refused(command_line(*out, *PAID, "search"), "export KEY_OF_S, or do without: --search ''")
    monkeypatch.delenv("KEY_OF_A")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/candidates.jsonl").touch()  # looked for before the keys
    refused(command_line(*out, *PAID, "annotate"), "export KEY_OF_A, or do without: --annotator self")
    (tmp_path / "new/train.jsonl").touch()
    check(settings(*out, *PAID), ["sample", "candidates", "train"])  # none of them asks a server
    cached = tmp_path / "cached"
    cached.mkdir()
    (cached / "search.jsonl").touch()  # what was searched before may be all there is to search
    check(settings("--out", cached, *PAID, "--method", "kto"), ["search"])


def settings(*flags: object) -> RunConfig:
    """What the command line makes of configs/mini.json and flags."""
    return cli(RunConfig, ["--config", str(ROOT / "configs/mini.json"), *map(str, flags)], "")[0]


def test_bad_files_are_named_with_their_line(run, slices, tmp_path):
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"id": "a", "question": "q?", "answers": ["x"]}\n{"id": "b", "quest')
    refused(command_line("--questions", torn, "--out", tmp_path / "o"), "torn.jsonl:2", "repair")
    tested = tmp_path / "simpleqa.jsonl"
    write_jsonl(tested, [{"id": "a", "dataset": "simpleqa", "question": "q?", "answers": ["x"]}])
    refused(command_line("--questions", tested, "--out", tmp_path / "o"), "simpleqa is for evaluation only")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(command_line("--eval-sets", f"test={empty}", "--out", run, "eval"), "empty.jsonl", "no question")
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("samples.jsonl", "candidates.jsonl", "annotations.jsonl"):
        (copy / name).write_bytes((run / name).read_bytes())
    text = (copy / "annotations.jsonl").read_text()
    (copy / "annotations.jsonl").write_text(text.replace('"retrieval"', '"retreival"', 1))
    refused(command_line("--out", copy, "fit"), "annotations.jsonl", "retreival", "retrieval")
    refused(command_line("--out", copy, "--min-segments", 14, "candidates"), "no chosen row", "fewer than 14 segments")


def test_a_checkpoint_with_a_tensor_missing_is_refused(slices, tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    for p in (ROOT / "mini/model").iterdir():
        (broken / p.name).write_bytes(p.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors")
    refused(
        command_line(*flags(slices, tmp_path / "o"), "--model", broken), "model.layers.1.mlp.up_proj.weight is missing"
    )


def test_settings_file_with_an_unknown_name(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"learning_rate": 1e-3}))
    refused(command_line("--config", tmp_path / "c.json"), "c.json", "learning_rate", "--help")
