"""The paper's run from the first command to its tables, without a GPU or a key: `make rehearsal [SCALE=0.1]`.

configs/qwen3-8b.json itself is run by two processes, through every stage. Two things are replaced: the model, by a tiny
random Qwen3 with a small tokenizer of Qwen3's kind (in float32, for one epoch: a CPU is slow in bfloat16), and the
outside world, by mini/rehearsal_server.py, which draws, labels, judges and searches by a script. SCALE is the share of
the paper's 90,847 training and 10,003 evaluation questions; Tables 3 and 4 follow by tools/sweep.py, and our own
sampler does a few questions in each mode.

What it shows: that every stage works at this size with a real template and real replies, malformed ones included, what
it takes in time and memory, that Table 1's yields and Table 2's figures, which the script puts in, come out again, and
how well the fitted step weights follow the script's true ones through two erring annotators. It says nothing about the
method: the tiny model learns nothing, the script plays every adapter.

  OUT/rehearsal.md     the page: command, commit, stages, tables; --page puts it where docs/ shows it
  OUT/data, model      questions and model; OUT/run: the run; OUT/sweep: Tables 3 and 4; OUT/own: our own sampler

What is finished is not done again.
"""

import argparse
import contextlib
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, normalizers

import data
import em
import model as qwen3
from common.endings import program
from common.errors import InputError
from common.files import ROOT, atomic_write, each_row, read_json, read_jsonl, write_json, write_jsonl
from common.model_config import ModelConfig
from common.table import markdown
from common.template import load_prompt
from mini import rehearsal_server as world
from mini.build import END_OF_TEXT, END_OF_TURN, byte_bpe
from report import tables
from report.figures import number
from tools import sweep

CONFIG = ROOT / "configs" / "qwen3-8b.json"
RANKS = 2
VOCABULARY = 1536
SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    tie_word_embeddings=True,
    max_position_embeddings=40960,
)
SPECIAL = ("<|object_ref_start|>", "<|object_ref_end|>", "<|vision_start|>", "<|vision_end|>", "<|fim_prefix|>")
TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # one token each, and no special ones, as in Qwen3
# What Qwen3's template does with the turns of a chat without tools: thoughts of earlier answers are left out, and
# enable_thinking=False gives the answer an empty thought.
TEMPLATE = """\
{%- for message in messages %}
{%- set text = message.content %}
{%- if message.role == 'assistant' and '</think>' in text %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
ALSO = "refine,thinkon+ret,mralign+ret"
SWEEP = {  # Table 3 and 4: run -> (settings, whose paper figures)
    "full": {},
    "Table 3, frequency instead of EM": {"transitions": "frequency"},
    "Table 3, one label a step": {"labels": "one"},
    "Table 4, lambda_r 2.0": {"lambda_r": 2.0},
}
FIGURES = {
    "positions.png": "where the right answer is lost (Fig. 1)",
    "change.png": "how the thinking changed (Fig. 4)",
    "strata.png": "who gains (Fig. 5)",
    "transitions.png": "transition matrices and step weights (Fig. 7)",
}
N_BOOT = 1000


# ---------- what is replaced


def make_model(folder: Path) -> None:
    """A random Qwen3 that can be loaded as any checkpoint: weights, tokenizer, template, generation settings."""
    rows = [world.question(name, True, k) for name in world.TRAIN for k in range(200)]
    texts = [q["question"] + " ".join(q["answers"]) for q in rows]
    texts += [load_prompt(ROOT / "prompts" / name) for name in ("factual.txt", "refine.txt", "retrieval.txt")] * 20
    texts += [" ".join(openers) for openers in world.OPENERS.values()] * 20 + list(world.FILLER) * 20
    tokenizer = byte_bpe(texts, VOCABULARY - len(SPECIAL), TAGS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    _write_tokenizer(tokenizer, folder)
    end = tokenizer.token_to_id(END_OF_TURN)
    torch.manual_seed(0)
    net = qwen3.Qwen3(ModelConfig(vocab_size=VOCABULARY, eos_token_id=end, **SHAPE))
    qwen3.save(net, folder, torch.bfloat16)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    with atomic_write(folder / "tokenizer.json") as f:
        f.write(tokenizer.to_str(pretty=False))
    about = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END_OF_TURN, "pad_token": END_OF_TEXT}
    about |= {"bos_token": None, "unk_token": None, "model_max_length": SHAPE["max_position_embeddings"]}
    write_json(folder / "tokenizer_config.json", about | {"chat_template": TEMPLATE})
    ends = [tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)]
    write_json(folder / "generation_config.json", {"do_sample": True, "eos_token_id": ends})


def make_questions(folder: Path, scale: float) -> tuple[Path, dict[str, Path]]:
    """(training questions, evaluation sets) of this share of the paper's numbers, at least 8 a set."""
    rows = [world.question(name, True, k) for name, n in world.TRAIN.items() for k in range(max(8, round(n * scale)))]
    write_jsonl(folder / "train.jsonl", rows)
    sets = {}
    for name, n in world.TEST.items():
        sets[name] = folder / f"{name}-test.jsonl"
        write_jsonl(sets[name], (world.question(name, False, k) for k in range(max(8, round(n * scale)))))
    return folder / "train.jsonl", sets


def settings_of(out: Path, url: str, questions: Path, sets: Mapping[str, Path], scale: float) -> dict[str, Any]:
    """The replaced settings: model, paths, servers, how many thoughts are labelled for Fig. 4, and what saves time."""
    return {
        "model": str(out / "model"),
        "questions": str(questions),
        "eval_sets": ",".join(f"{name}={path}" for name, path in sets.items()),
        "out": str(out / "run"),
        "backend": "openai",
        "base_url": url,
        "annotator": "committee",
        "annotator_a": f"annotator-a@{url}",
        "annotator_b": f"annotator-b@{url}",
        "adjudicator": f"adjudicator@{url}",
        "judge": f"judge@{url}",
        "search": f"serper@{url}",
        "also": ALSO,
        "label_eval": max(8, round(977 * scale)),
        "dtype": "float32",  # twice to three times as fast on a CPU as the config's bfloat16
        "epochs": 1,  # of 3: time
    }


# ---------- processes


@contextlib.contextmanager
def server(out: Path) -> Iterator[str]:
    """Inside, the outside world answers at this address; the same one as before where that is free."""
    last = read_json(out / "server.json")["port"] if (out / "server.json").exists() else 0
    words = [sys.executable, "-m", "mini.rehearsal_server", "--model", str(out / "model"), "--port"]
    for port in dict.fromkeys((last, 0)):
        process = subprocess.Popen([*words, str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        url = process.stdout.readline().strip() if process.stdout else ""
        if url:
            break
        process.wait()
    else:
        raise InputError("mini.rehearsal_server did not start; run it by hand to see why")
    try:
        write_json(out / "server.json", {"port": int(re.findall(r":(\d+)/", url)[0])})
        yield url
    finally:
        process.terminate()
        process.wait()


class Peak:
    """The largest resident memory of any process of a run, MiB, for each stage that its log names."""

    def __init__(self, pid: int) -> None:
        self.pid, self.stage, self.mib = pid, "start", dict[str, float]()
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.ended.wait(0.2):
            largest = max((resident(pid) for pid in below(self.pid)), default=0.0)
            self.mib[self.stage] = max(self.mib.get(self.stage, 0.0), largest)


def below(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += [p for word in file.read_text().split() for p in below(int(word))]
    return found


def resident(pid: int) -> float:
    """MiB of a process in memory, 0 where it has ended."""
    with contextlib.suppress(OSError):
        if match := re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return int(match[1]) / 1024
    return 0.0


def launch(words: Sequence[str], log: Path) -> dict[str, float]:
    """Run a command of the project to its end; returns stage -> largest memory of one of its processes, MiB.

    Its output goes to `log`, its stage lines to stderr too. Raises InputError when it fails.
    """
    env = os.environ | {"SERPER_KEY": "none", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w", buffering=1, encoding="utf-8") as f:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        peak = Peak(process.pid)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                f.write(line)
                if match := re.match(r"\[(\w[^\]]*)\]", line):
                    peak.stage = match[1]
                    print(line.rstrip()[:160], file=sys.stderr, flush=True)
        finally:  # when we are stopped, so is the run; it goes on from there the next time
            if process.poll() is None and sys.exception():
                process.terminate()
            code = process.wait()
            peak.ended.set()
    if code:
        raise InputError(f"{log}: exit code {code}; the last lines say why, the same command goes on from there")
    return peak.mib


def torchrun(ranks: int) -> list[str]:
    """The words that start the pipeline on so many processes."""
    return ["-m", "tools.torchrun", "--standalone", f"--nproc_per_node={ranks}", "mralign.py"]


def run_pipeline(out: Path) -> dict[str, float]:
    """The run of OUT/config.json; returns the memory of its stages, what earlier calls measured included."""
    mib = launch([*torchrun(RANKS), "--config", str(out / "config.json"), "--resume"], out / "run.log")
    file = out / "memory.json"
    known = read_json(file) if file.exists() else {}
    known |= {stage: max(value, known.get(stage, 0.0)) for stage, value in mib.items()}
    write_json(file, known)
    return known


def run_sweep(out: Path) -> None:
    """Tables 3 and 4: the runs of SWEEP on what the run has drawn and labelled, all at once after the first."""
    paper = read_json(ROOT / "configs" / "ablations.json")["runs"]
    runs = {
        name: {"settings": {"method": "mralign"} | settings, "paper": paper[name]["paper"]}
        for name, settings in SWEEP.items()
    }
    few = ",".join(f"{name}={out / 'data' / f'{name}-test.jsonl'}" for name in ("nq", "sciq", "simpleqa"))
    common = {"also": "", "judge": "", "label_eval": 0, "eval_sets": few}
    file = {"base": str(out / "config.json"), "out": str(out / "sweep"), "settings": common, "runs": runs}
    write_json(out / "sweep-file.json", file)
    launch(["-m", "tools.sweep", str(out / "sweep-file.json"), "--jobs", str(len(SWEEP) - 1)], out / "sweep.log")


def run_own_sampler(out: Path, questions: Path) -> list[dict[str, Any]]:
    """Our own sampler on a few questions in each mode; returns what it left, held against the server's draws."""
    few = out / "data" / "few.jsonl"
    write_jsonl(few, read_jsonl(questions)[:4])
    words = [*torchrun(RANKS), "--config", str(out / "config.json"), "--backend", "local", "--base-url", ""]
    words += ["--questions", str(few), "--out", str(out / "own"), "--draw-max-new", "32", "--draws", "1", "sample"]
    launch(words, out / "own.log")
    rows = read_jsonl(out / "own" / "samples.jsonl")
    served = {(r["id"], r["mode"]): r["prompt_ids"] for r in each_row(out / "run" / "samples.jsonl")}
    if odd := [r["id"] for r in rows if r["prompt_ids"] != served[r["id"], r["mode"]]]:
        raise InputError(f"{out / 'own'}: our sampler and the server were given different prompts for {odd[0]}")
    return rows


# ---------- fitted and true weights


def true_weights(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """For each training row the weight that every step would have with the script's labels and matrices (Eq. 10).

    rows: train.jsonl. A step of several segments gets the weight of its first one.
    """
    P = world.true_transitions(sum(r["label"] for r in rows), sum(not r["label"] for r in rows))
    out = []
    for row in rows:
        text, own = row["completion"], P["P_pos" if row["label"] else "P_neg"]
        segments = data.split_segments(text, row["spans"][0][0], row["spans"][-1][1])
        w = em.segment_weights([world.labels_in(text[a:b]) for a, b in segments], own, P["P"])
        of = {start: value for (start, _), value in zip(segments, w, strict=True)}
        out.append([of[start] for start, _ in row["spans"]])
    return out


def correlation(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, dict[str, float]]:
    """Pearson's r of fitted and true log w over the steps of train.jsonl: all, chosen, rejected -> {n, r, low, high}.

    The 95 % interval draws whole thoughts with replacement.
    """
    pairs = [
        (np.log(np.array([row["w"], true])), row["label"]) for row, true in zip(rows, true_weights(rows), strict=True)
    ]
    rng, out = np.random.default_rng(seed), {}
    for name, sides in (("all", (True, False)), ("chosen", (True,)), ("rejected", (False,))):
        of = [both for both, label in pairs if label in sides]
        sums = np.array([[b.shape[1], *b.sum(1), *(b**2).sum(1), (b[0] * b[1]).sum()] for b in of])  # (thoughts, 6)
        picks = rng.integers(len(of), size=(N_BOOT, len(of)))
        low, high = np.quantile([_pearson(sums[p].sum(0)) for p in picks], [0.025, 0.975])
        out[name] = {"n": int(sums[:, 0].sum()), "r": _pearson(sums.sum(0)), "low": float(low), "high": float(high)}
    return out


def _pearson(sums: np.ndarray) -> float:
    """r from n, sum x, sum y, sum x^2, sum y^2, sum xy."""
    n, x, y, xx, yy, xy = sums
    return float((n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y)))


# ---------- the page


def page(out: Path, scale: float, mib: Mapping[str, float], own: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """Everything the rehearsal showed, as Markdown."""
    results = read_json(out / "run" / "results.json")
    analysed = read_json(out / "run" / "eval" / "analysis.json")
    stages, receipt = results["stages"], results["receipt"]
    found = stages["candidates"]
    swept = read_json(out / "sweep" / "sweep.json")
    settings = read_json(out / "config.json")
    unlike = sorted(k for k, v in settings.items() if read_json(CONFIG).get(k) != v)
    parts = [
        "# The rehearsal",
        "The paper's run on two CPU processes, with the outside world played by a script (`mini/rehearsal.py`). "
        "The rates of right and wrong answers were put in from the paper's tables, so the tables below show that they "
        "come out again, not that the method works. Written by the program.",
        f"- command: `make rehearsal SCALE={scale:g}`, {seconds:.0f} s in this call\n"
        f"- commit {receipt['commit']}; {receipt['device']}; {receipt['versions']}; {platform.system()}\n"
        f"- `{CONFIG.relative_to(ROOT)}` with other values for: {', '.join(unlike)}",
        "## Time and memory\n\nSeconds of a stage, and the largest memory of one of its processes (both have the model "
        "and the libraries in it). 0 MiB: it was over between two looks.",
        markdown(stage_rows(stages, mib)),
        "## Table 1",
        markdown(tables.candidate_rows(found["by data set"])),
        expected_line(found["by data set"], scale),
        "## Labels",
        markdown(tally_rows(stages["annotate"])),
        "## Fitted and true step weights",
        "Pearson's r of log w over all steps; true: what the script's own labels and matrices give by Eq. 10; the "
        "interval draws whole thoughts. Every row has the labels of the two erring annotators and their adjudicator.",
        markdown(correlation_rows(out)),
        "## Table 2",
        markdown(tables.beside_paper([results], "Qwen3-8B")),
        "## Tables 3 and 4",
        sweep_line({name: folder / "train.jsonl" for name, folder in sweep_folders(out).items()}),
        markdown(sweep.result_rows(swept)),
        "## Figures\n\n" + figure_lines(out, analysed),
        f"## Our own sampler\n\n{len(own)} completions of the tiny model, both modes, from the prompts that the server "
        f"was given, id by id; {sum(r['finish'] == 'length' for r in own)} ran into the limit of 32 tokens.",
    ]
    return "\n\n".join(parts) + "\n"


def stage_rows(stages: Mapping[str, Mapping[str, Any]], mib: Mapping[str, float]) -> list[dict[str, str]]:
    """Seconds and memory of every stage; the evaluations together."""
    groups: dict[str, list[str]] = {}
    for name in stages:
        groups.setdefault("eval, all variants" if name.startswith("eval ") else name, []).append(name)
    return [
        {
            "stage": group,
            "seconds": number(sum(stages[name]["seconds"] for name in names), 1),
            "MiB": number(max(mib.get(name, 0.0) for name in names), 0),
        }
        for group, names in groups.items()
    ]


def expected_line(tally: Mapping[str, Mapping[str, int]], scale: float) -> str:
    """Table 1's counts at this scale beside ours."""
    said = []
    for own in world.TRAIN:
        source = world.SOURCES[world.name_of(own)]
        of = tally[world.name_of(own)]
        expected = [k * of["questions"] / world.TRAIN[own] for k in source.kept]
        said.append(
            f"{source.heading} {of['chosen']} / {of['rejected']}, expected {expected[0]:.0f} / {expected[1]:.0f}"
        )
    return f"Chosen / rejected at {100 * scale:g} % of the paper's questions: " + "; ".join(said) + "."


def tally_rows(tally: Mapping[str, Any]) -> list[dict[str, str]]:
    """The annotate stage's tally, a row an entry."""
    return [{"": name, "count": f"{value:,}"} for name, value in tally.items() if isinstance(value, int)]


def sweep_folders(out: Path) -> dict[str, Path]:
    """The folder of every run of the sweep."""
    file = sweep.load(out / "sweep-file.json")
    return {name: sweep.folder(file, name, 0) for name in SWEEP}


def sweep_line(files: Mapping[str, Path]) -> str:
    """What differs between the runs of the sweep. files: run -> its train.jsonl, the full run first."""
    weights = {name: [row["w"] for row in read_jsonl(file)] for name, file in files.items()}
    full, *others = files
    moved = [name for name in others if weights[name] != weights[full]]
    said = "The script plays the adapter `mralign` of every run alike: Acc and Mis cannot differ between them. "
    said += f"The step weights (above) do, in: {'; '.join(moved) or 'none'}."
    if alike := [name for name in others if name not in moved]:
        said += f" The step weights of the run called {full}, and other settings of the loss: {'; '.join(alike)}."
    return said


def correlation_rows(out: Path) -> list[dict[str, str]]:
    """`correlation` of the run and of every run of the sweep."""
    folders = {"the run (EM, two labels)": out / "run"}
    folders |= {name: folder for name, folder in sweep_folders(out).items() if name.startswith("Table 3")}
    rows = []
    for name, folder in folders.items():
        found = correlation(read_jsonl(folder / "train.jsonl"))
        row = {"labels and matrices": name, "steps": f"{found['all']['n']:,}"}
        rows.append(row | {k: f"{v['r']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in found.items()})
    return rows


def figure_lines(out: Path, analysed: Mapping[str, Any]) -> str:
    """The figures that the run drew, with the numbers of Fig. 1 and 5 on NQ-Open. Raises InputError where one lacks."""
    folder = out / "run" / "figures"
    if missing := [name for name in FIGURES if not (folder / name).exists()]:
        raise InputError(f"{folder / missing[0]}: the run has not drawn it; see {out / 'run.log'}")
    drawn = "\n".join(f"- `figures/{name}`: {what}" for name, what in FIGURES.items())
    side = analysed["positions"]["nq, thinkon"]
    where = "; ".join(
        f"{s}: first {side[s]['first']:.1f} %, last {side[s]['last']:.1f} % (n = {side[s]['n']})"
        for s in ("right", "wrong")
        if side[s]["n"]
    )
    gains = analysed["strata"]["nq"]["mralign"]
    points = "; ".join(f"{k} {100 * v['gain']:+.1f} (n = {v['n']})" for k, v in gains.items() if v["n"])
    moves = {name: of["mralign"] for name, of in analysed["change"].items()}
    up = moves["nq"]["up"][:3]
    rises = "; ".join(f"{m['from']} → {m['to']} {100 * m['delta']:+.1f}" for m in up)
    return (
        f"{drawn}\n\nFig. 1, place of the gold in ThinkOn's thoughts on NQ-Open: {where}.\n\n"
        f"Fig. 4, largest rises of P on NQ-Open, points: {rises or 'none with enough support'}.\n\n"
        f"Fig. 5, gain of MR-ALIGN over ThinkOn on NQ-Open by stratum, points: {points}."
    )


def rehearse(out: Path, scale: float, changes: Mapping[str, Any]) -> str:
    """Do all that is missing under `out`; returns the page. changes: further settings of the config to replace."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model" / "model.safetensors").exists():
        make_model(out / "model")
    questions, sets = make_questions(out / "data", scale)
    with server(out) as url:
        write_json(out / "config.json", read_json(CONFIG) | settings_of(out, url, questions, sets, scale) | changes)
        mib = run_pipeline(out)
        run_sweep(out)
        own = run_own_sampler(out, questions)
    text = page(out, scale, mib, own, time.perf_counter() - started)
    with atomic_write(out / "rehearsal.md") as f:
        f.write(text)
    return text


@program
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.1, help="share of the paper's questions, 1: all [0.1]")
    parser.add_argument("--out", type=Path, help="folder to write [runs/rehearsal-SCALE]")
    parser.add_argument("--page", type=Path, help="write the page there too, for example docs/results/rehearsal.md")
    given = parser.parse_args(argv)
    if not 0 < given.scale <= 1:
        raise InputError(f"--scale is {given.scale}, must be above 0 and at most 1")
    out = (given.out or ROOT / "runs" / f"rehearsal-{given.scale:g}").resolve()
    text = rehearse(out, given.scale, {})
    if given.page:
        with atomic_write(given.page) as f:
            f.write(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
