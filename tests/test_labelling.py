"""The annotate stage through the real command line, against a server that misbehaves: money, kills, keys, artefacts."""

import dataclasses
import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fake_server import FakeServer, labeller

import mralign
from common.errors import InputError
from common.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl
from common.ranks import Ranks
from common.settings import cli
from llm import agreement, labelling
from pipeline import evaluation
from pipeline.config import RunConfig
from pipeline.run import Run
from tools import discover

ROOT = Path(__file__).resolve().parents[1]
CANARY = "sk-canary-7f3a9b2c"
KEYS = ("ANNOTATOR_KEY", "OPENAI_API_KEY", "HF_TOKEN", "SERPER_KEY", "WANDB_API_KEY")
WORDS = "river mountain was said to be called known as first then perhaps the of a because it".split()


def candidates(n: int) -> list[dict]:
    """Rows with made-up thoughts of four to eight segments."""
    rows = []
    for k in range(n):
        rng = random.Random(k)
        segments = [" ".join(rng.choices(WORDS, k=rng.randrange(4, 20))) + ".\n\n" for _ in range(rng.randrange(4, 9))]
        text, spans = "<think>\n", []
        for segment in segments:
            spans.append([len(text), len(text) + len(segment)])
            text += segment
        row = {"id": f"q{k}", "question": f"Which river {k}?", "answers": ["Nile"], "chosen": k % 2 == 0}
        row |= {"prompt_ids": [1, 2, 3], "completion_ids": list(range(len(text) // 4))}
        rows.append(row | {"completion": text + "</think>\n\n<answer>Nile</answer>", "spans": spans})
    return rows


def command(server: FakeServer, out: Path, *flags: object, a="gpt-4o", b="deepseek-chat", judge="gpt-5") -> list[str]:
    roles = [("--annotator-a", a), ("--annotator-b", b), ("--adjudicator", judge)]
    named = [part for flag, model in roles if model for part in (flag, f"{model}@{server.url}#ANNOTATOR_KEY")]
    mini = [sys.executable, "mralign.py", "--config", "configs/mini.json", "--out", str(out)]
    return [*mini, "--annotator", "committee", *named, *map(str, flags)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **{name: f"{CANARY}-{name}" for name in KEYS}, **more}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """test_agreement.py looks at the intervals; 500 resamples of three pairs are most of what a small run takes."""
    monkeypatch.setattr(agreement, "report", functools.partial(agreement.report, resamples=20))


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line without the seconds that a new Python with torch takes: its main function."""
    monkeypatch.chdir(ROOT)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def go(*line: str) -> Done:
        capsys.readouterr()
        code = mralign.main(list(line))
        return Done(code, *capsys.readouterr())

    return go


@pytest.fixture
def annotate(run, server, out):
    """`run` with the committee at the fake server; looks for keys afterwards, everywhere."""

    def go(*flags: object, **models: str) -> Done:
        done = run(*command(server, out, *flags, **models)[2:])
        no_keys(done.stdout, done.stderr, out)
        return done

    return go


def no_keys(stdout: str, stderr: str, out: Path) -> None:
    assert CANARY not in stdout + stderr
    for path in out.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def failed(done: Done, code: int, *words: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == code and len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0], errors[0]


@pytest.fixture
def server():
    with FakeServer(labeller) as fake:
        yield fake


@pytest.fixture
def out(tmp_path):
    write_jsonl(tmp_path / "run" / "candidates.jsonl", candidates(12))
    return tmp_path / "run"


def billed(out: Path) -> list[dict]:
    return [r for r in read_jsonl(out / "annotation" / "calls.jsonl") if r["outcome"] == "billed"]


def test_from_the_dry_run_to_an_artefact_that_others_use_without_keys(annotate, run, server, out, tmp_path):
    done = annotate("--dry-run")
    assert done.returncode == 0 and not server.requests
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    at = next(i for i, cells in enumerate(lines) if cells[:2] == ["role", "model"])
    rows = [dict(zip(lines[at], cells, strict=True)) for cells in lines[at + 2 : at + 6]]
    assert [row["role"] for row in rows] == ["a", "b", "judge", "sum"]
    assert {(r["calls"], r["answered"]) for r in rows[:3]} == {("12", "0")}
    prompt, reply = (int(rows[0][name].replace(",", "")) for name in ("prompt tokens", "reply tokens"))
    prices = read_json(ROOT / "prices.json")
    of = prices["models"]["gpt-4o"]
    assert float(rows[0]["USD"]) == pytest.approx((prompt * of["input"] + reply * of["output"]) / 1e6, abs=1e-4)
    assert f"prices of {prices['as_of']}" in done.stdout

    done = annotate("annotate")
    assert done.returncode == 0, done.stderr
    assert "agreement by segment" in done.stdout and "to the adjudicator" in done.stdout
    spent = sum(r["usd"] for r in billed(out))
    actual = sum(row["prompt_tokens"] for row in server.billed.values() if row["model"] == "gpt-4o")
    assert abs(actual - prompt) < 0.02 * prompt + 12  # the estimate of a server that counts a token in four letters
    for model, of in prices["models"].items():
        rows = [r for r in server.billed.values() if r["model"] == model]
        spent -= sum(r["prompt_tokens"] * of["input"] + r["completion_tokens"] * of["output"] for r in rows) / 1e6
    assert abs(spent) < 1e-9

    sent = len(server.requests)
    before = (out / "annotations.jsonl").read_bytes()
    assert annotate("annotate").returncode == 0  # named, so it runs again: from the ledger alone
    assert len(server.requests) == sent and (out / "annotations.jsonl").read_bytes() == before

    manifest = read_json(out / "annotations.manifest.json")
    assert manifest["sha256"] == sha256_file(out / "annotations.jsonl") and manifest["made"]["a"].startswith("gpt-4o@")
    theirs = tmp_path / "theirs"
    write_jsonl(theirs / "candidates.jsonl", candidates(12))
    given = tmp_path / "given"
    given.mkdir()
    for name in ("annotations.jsonl", "annotations.manifest.json"):
        (given / name).write_bytes((out / name).read_bytes())
    line = ["--config", "configs/mini.json", "--out", str(theirs)]
    line += ["--annotator", str(given / "annotations.jsonl"), "annotate"]
    done = run(*line)
    assert done.returncode == 0 and (theirs / "annotations.jsonl").read_bytes() == before, done.stderr

    with open(given / "annotations.jsonl", "a") as f:
        f.write("\n")
    failed(run(*line), 3, "checksum")
    manifest["sha256"] = sha256_file(given / "annotations.jsonl")
    write_json(given / "annotations.manifest.json", manifest)
    write_jsonl(theirs / "candidates.jsonl", [*candidates(11), candidates(12)[-1] | {"id": "new"}])
    failed(run(*line), 3, "candidate 'new' is not in it")


def test_a_wrong_key_ends_at_the_first_reply(annotate, server, out):
    server.script = lambda number, body: "401"
    done = annotate("annotate", "--annotate-concurrency", 1)
    failed(done, 4, f"{server.requests[0]['body']['model']}@", "401", "check the key in ANNOTATOR_KEY")
    assert len(server.requests) == 1


def test_one_model_alone(annotate, server, out):
    done = annotate("annotate", b="", judge="")
    assert done.returncode == 0 and "agreement" not in done.stdout, done.stderr
    steps = [s for r in read_jsonl(out / "annotations.jsonl") for s in r["steps"]]
    assert {s["source"] for s in steps} == {"single"} and len(server.requests) == 12


def test_evaluated_thoughts_are_labelled_by_the_committee_and_paid_for_once(server, tmp_path, monkeypatch):
    """Of NQ-Open alone, four a variant; every label is one that the servers gave; a second run asks nobody."""
    monkeypatch.setenv("ANNOTATOR_KEY", f"{CANARY}-ANNOTATOR_KEY")
    words = command(server, tmp_path, "--label-eval", 4, "--method", "kto")[2:]
    words += ["--eval-sets", "nq=a.jsonl,sciq=b.jsonl"]
    run = object.__new__(Run)
    run.cfg, run.out, run.ranks = cli(RunConfig, words, "")[0], tmp_path, Ranks(0, 1, torch.device("cpu"))
    run.methods, run.eval_sets = ["kto"], run.cfg.eval_paths
    for variant in ("thinkon", "kto"):
        rows = [
            {"id": row["id"], "mode": "on", "draw": 0, "question": row["question"], "answers": row["answers"]}
            | {"text": row["completion"], "finish": "stop", "prompt": "", "ids": []}
            for row in candidates(10)
        ]
        write_jsonl(run.samples("nq", variant), rows)
    told = evaluation.label_thoughts(run)
    assert told["thoughts"] == 8 and told["new_calls"] >= 8  # both variants thought the same: asked once for both
    asked = len(server.requests)
    for variant in ("thinkon", "kto"):
        records = read_jsonl(run.file("nq", variant, "labels"))
        assert len(records) == 4 and all(r["id"].startswith("q") for r in records)
        labels = evaluation.read_labels(run, "nq", variant)
        assert labels.keys() == {r["id"] for r in records} and any(step for of in labels.values() for step in of)
        sources = {step["source"] for r in records for step in r["steps"]}
        assert sources <= {"agree", "merge", "judge", "rejected"}
    assert not run.file("sciq", "thinkon", "labels").exists()
    assert evaluation.label_thoughts(run)["new_calls"] == 0 and len(server.requests) == asked
    no_keys("", "", tmp_path)


def test_the_budget_is_kept_and_the_run_goes_on_with_a_larger_one(annotate, server, out):
    failed(annotate("annotate", "--budget-tokens", 30_000, "--annotate-concurrency", 4), 4, "budget", "--budget-usd")
    spent = sum(r["prompt_tokens"] + r["completion_tokens"] for r in server.billed.values())
    one_call = max(r["prompt_tokens"] for r in server.billed.values()) * 4 + 4096 + 3000
    assert 30_000 - one_call < spent <= 30_000
    first = len(server.requests)
    done = annotate("annotate", "--budget-usd", 5)
    assert done.returncode == 0, done.stderr
    assert len(server.requests) == len(billed(out)) == len({r["key"] for r in billed(out)}) and first < len(billed(out))
    assert "already spent" in annotate("--dry-run").stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--annotator-a", "gpt-4o"], ["MODEL@BASE_URL#KEY_VARIABLE"]),
        (["--annotator-a", "gpt-4o@http://10.0.0.1/v1#K"], ["unencrypted"]),
        (["--adjudicator", ""], ["--adjudicator is not set"]),
        (["--annotator-a", ""], ["--annotator-a MODEL"]),
        (["--annotator", "gpt-4o"], ["--annotator is 'gpt-4o'", "self, committee, cues"]),
        (["--annotator-a", "gpt-9@https://x.org/v1#ANNOTATOR_KEY", "--budget-usd", "1"], ["no price for gpt-9"]),
        (["--annotator-a", "m@https://x.org/v1#UNSET_KEY", "annotate"], ["export UNSET_KEY, or do without"]),
        (["--annotate-concurrency", "0"], ["--annotate-concurrency is 0"]),
        (["--budget-usd", "-1"], ["--budget-usd is -1.0"]),
        (["--budget-usd", "nan"], ["--budget-usd is nan"]),
    ],
)
def test_bad_flags(annotate, server, flags, words):
    failed(annotate(*flags), 3, *words)
    assert not server.requests


# ------------------------------------------------------------------------------------------------ soak

FAULTS = ["429", "500", "503", "reset", "not json", "wrong label", "prose", "cut body", "null content", "echo key"]


@pytest.mark.long
def test_soak(tmp_path):
    """Many traces, a fifth of all requests faulty, killed again and again. MRALIGN_SOAK=1000 for the long run."""
    n = int(os.environ.get("MRALIGN_SOAK", 40))
    kills = 5 if n >= 1000 else 2
    out = tmp_path / "run"
    write_jsonl(out / "candidates.jsonl", candidates(n))
    rng = random.Random(0)
    with FakeServer(labeller, seconds=0.02) as server:
        server.script = lambda number, body: rng.choice(FAULTS) if rng.random() < 0.2 else "ok"
        line = command(server, out, "annotate", "--annotate-concurrency", 16)
        calls = out / "annotation" / "calls.jsonl"
        for kill in range(kills):
            target = (kill + 1) * n // 4  # replies at which it is killed
            with open(tmp_path / "log", "w") as log:
                running = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, env=environment())
                while running.poll() is None and not (calls.exists() and calls.read_bytes().count(b"\n") > target):
                    time.sleep(0.02)
                running.send_signal(signal.SIGINT if kill == 0 else signal.SIGKILL)
                assert running.wait() == (130 if kill == 0 else -signal.SIGKILL)
            no_keys((tmp_path / "log").read_text(), "", out)
        while True:  # a call that fails six times in a row ends a run; the next one makes it
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment())
            no_keys(done.stdout, done.stderr, out)
            if done.returncode == 0:
                break
            failed(done, 4, "without an answer")
        assert server.most_active <= 16

    records = read_jsonl(out / "annotations.jsonl")
    assert [r["id"] for r in records] == [f"q{k}" for k in range(n)]
    rows = billed(out)
    assert len({r["key"] for r in rows}) == len(rows)  # nothing was paid for twice ...
    lost = set(server.billed) - {r["id"] for r in rows}
    assert len(lost) <= 16 * kills  # ... but what was in flight when the run was killed
    for row in rows:
        of = server.billed[row["id"]]
        assert (row["prompt_tokens"], row["completion_tokens"]) == (of["prompt_tokens"], of["completion_tokens"])
    print(f"{n} traces: {len(server.requests)} requests, {len(rows)} replies, {len(lost)} lost in {kills} kills")


@pytest.mark.long
def test_spend_is_the_servers_count_to_the_last_token(annotate, server, out):
    """Faults but no kills: every reply that was billed is in the ledger, and nothing else."""
    rng = random.Random(1)
    server.script = lambda number, body: rng.choice(FAULTS) if rng.random() < 0.2 else "ok"
    while annotate("annotate").returncode != 0:
        pass
    rows = billed(out)
    assert {r["id"] for r in rows} == set(server.billed)
    ours = sum(r["prompt_tokens"] + r["completion_tokens"] for r in rows)
    assert ours == sum(r["prompt_tokens"] + r["completion_tokens"] for r in server.billed.values())


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_on_annotating_names_flags_that_exist_and_adds_up():
    page = (ROOT / "docs/annotating.md").read_text()
    flags = {f.name for cls in (RunConfig, discover.Settings) for f in dataclasses.fields(cls)} | {
        *("dry_run", "config"),
        *("train", "seeds", "only", "jobs"),  # of tools.questions and mini.ambiguous
    }
    assert {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", page)} <= flags
    for link in re.findall(r"\]\(([\w./-]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link
    prices, total = read_json(ROOT / "prices.json"), 0.0
    assert f"prices of {prices['as_of']}" in page
    for model, calls, prompt, reply, usd in re.findall(
        r"^\| \w+ +\| (\S+) +\| +(\d+) \| +0 \| +([\d,]+) \| +([\d,]+) \| +([\d.]+) \|", page, re.M
    ):
        prompt, reply = int(prompt.replace(",", "")), int(reply.replace(",", ""))
        of = prices["models"][model]
        assert float(usd) == pytest.approx((prompt * of["input"] + reply * of["output"]) / 1e6, abs=1e-4)
        assert calls == "422"
        total += float(usd)
    assert total == pytest.approx(float(re.search(r"^\| sum [ |]+([\d.]+) ", page, re.M)[1]), abs=1e-3)


def test_replies_that_another_run_paid_for_are_copied_once(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    labelling.lend_replies(a, b)  # nothing to lend
    (a / "annotation").mkdir(parents=True)
    (a / "annotation/calls.jsonl").write_text("lent")
    labelling.lend_replies(a, b)
    own = b / "annotation/calls.jsonl"
    assert own.read_text() == "lent" and not own.samefile(a / "annotation/calls.jsonl")
    own.write_text("lent, and more of its own")
    labelling.lend_replies(a, b)
    assert own.read_text() == "lent, and more of its own"


def candidate(name: str, thought: str = "a\n\nb") -> dict:
    return {"id": name, "question": f"{name}?", "answers": ["x"], "completion": thought, "spans": [[0, 3], [3, 4]]}


def test_a_file_of_more_candidates_serves_some_of_them_and_a_changed_thought_is_refused(tmp_path):
    """As the rows of one data set of two take over the labels of both."""
    rows = [candidate(name) for name in ("nq1", "sciq1", "nq2")]
    steps = [{"segments": [0], "labels": ["framing"], "confidence": [9.0], "source": "single"}]
    records = [{"id": row["id"], "steps": steps} for row in rows]
    labelling.write_annotations(rows, records, {"annotator": "committee"}, tmp_path)
    cfg = labelling.LabelSettings(annotator=str(tmp_path / "annotations.jsonl"))
    labelling.label([rows[0], rows[2]], cfg, tmp_path / "nq", 0, lambda n: None)
    assert [r["id"] for r in read_jsonl(tmp_path / "nq" / "annotations.jsonl")] == ["nq1", "nq2"]
    for row, words in ((candidate("nq1", "c\n\nb"), "made from another thought"), (candidate("new"), "not in it")):
        with pytest.raises(InputError, match=f"candidate '{row['id']}' is {words}"):
            labelling.label([row], cfg, tmp_path / "other", 0, lambda n: None)


def test_nobody_labels_unless_told_who():
    with pytest.raises(InputError, match="--annotator is not set.*self.*committee.*cues are for the miniature"):
        labelling.check(labelling.LabelSettings())
    with pytest.raises(InputError, match="--annotator-model is the second model of --annotator self"):
        labelling.check(labelling.LabelSettings(annotator="cues", annotator_model="x"))
