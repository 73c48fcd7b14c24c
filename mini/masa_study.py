"""What metas save on the miniature: GRPO with and without them, DAPO with and without, three seeds each.

`make masa` builds the model of arithmetic.py where it is not there, runs every cell (one setting, one seed), two at a
time, and leaves table.md, study.json and accuracy.png in runs/masa. A cell that is finished is not run again; one that
was stopped goes on. --record also puts the three where docs/ shows them.

  grpo        no metas
  efficient   metas; from the second step on they gate and cut (v2-efficient; the batch shrinks)
  dapo        no metas; batches are sampled until one is full of problems solved rightly and wrongly
  dapo-gate   metas as above; what the gate foresees as always right or always wrong is not sampled

Every two of them are compared at equal numbers of sampled tokens, metas included. All figures are of held-out problems,
at the temperature of training.
"""

import argparse
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from common import table
from common.endings import program
from common.files import ROOT, atomic_write, read_json, read_jsonl, write_json
from mini.study import write_table
from tools.sweep import Child, run_all, unfinished

OUT = ROOT / "runs" / "masa"
CONFIG = ROOT / "configs" / "masa-mini.json"
PAGE = ROOT / "docs" / "masa.md"
MARKS = ("<!-- masa:begin -->", "<!-- masa:end -->")
RECORD = {"study.json": "docs/results/masa.json", "accuracy.png": "docs/masa_accuracy.png"}
SEEDS = (0, 1, 2)
# Every setting samples about as many tokens. They end before all open problems are solved: nobody can lead then.
FLAGS = {
    "grpo": "--preset grpo --steps 24 --eval-every 6",
    "efficient": "--preset v2-efficient --metas 4 --control-from 1 --refill-tries 1 --steps 44 --eval-every 11",
    "dapo": "--preset dapo --batch 4 --steps 16 --eval-every 4",
    "dapo-gate": "--preset dapo-meta --batch 4 --metas 4 --control-from 1 --steps 24 --eval-every 6",
}
PAIRS = {"efficient": "grpo", "dapo-gate": "dapo"}
TITLES = {"grpo": "GRPO", "efficient": "MASA-efficient", "dapo": "DAPO", "dapo-gate": "DAPO + gate"}
COLORS = {"grpo": "#888888", "efficient": "#2f6f9f", "dapo": "#888888", "dapo-gate": "#2f6f9f"}
T95 = {2: 12.706, 3: 4.303}  # Student's t, two-sided 95 %, for so many seeds

# What the table shows of a cell's last evaluation: heading -> path in passk.summary. All are shares.
COLUMNS = {
    "Pass@1": ("pass@1", "mean"),
    "abs(p_hat - p)": ("error",),
    "constant": ("error_of_constant",),
    "gated": ("gate", "gated"),
    "flat": ("gate", "flat"),
    "precision": ("gate", "precision"),
    "recall": ("gate", "recall"),
    "gate F1": ("gate", "f1"),
    "cut F1": ("cutoff", "f1"),
}
Points = list[tuple[float, float]]


def folder(setting: str, seed: int) -> Path:
    """Where a cell's files are."""
    return OUT / f"{setting}-seed{seed}"


def child(setting: str, seed: int) -> Child:
    """The process of a cell."""
    out = folder(setting, seed)
    flags = [*FLAGS[setting].split(), "--seed", str(seed), "--out", str(out), "--resume"]
    return Child(out.name, out, lambda: ["-m", "masa", "--config", str(CONFIG), *flags])


# ---------- figures


def pick(summary: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """A figure of a summary; None where there is none."""
    value: Any = summary
    for name in path:
        value = None if value is None else value.get(name)
    return value


def cell(setting: str, seed: int) -> dict[str, Any]:
    """What a cell's files say: its last evaluation, its accuracy against sampled tokens, what training gated."""
    evals = read_json(folder(setting, seed) / "results.json")["evals"]["heldout"]
    log = read_jsonl(folder(setting, seed) / "metrics.jsonl")
    sampled = [0, *(row["tokens"] for row in log)]
    curve = [(sampled[step], evals[str(step)]["pass@1"]["mean"]) for step in sorted(map(int, evals))]
    rows = read_jsonl(folder(setting, seed) / "evals.jsonl")
    kinds: dict[str, list[float]] = {}
    for row in rows:
        if row["step"] == len(log):
            kinds.setdefault(row["id"].partition("/")[0], []).append(row["correct"] / row["n"])
    controlled = [row for row in log if row["share/gated"]]
    metas = sum(row["meta_tokens"] for row in log)
    return {
        "seed": seed,
        "steps": len(log),
        "tokens": sampled[-1],
        "metas": metas / sampled[-1],
        "gated in training": statistics.fmean(row["share/gated"] for row in controlled) if controlled else None,
        "kinds": {name: statistics.fmean(part) for name, part in kinds.items()},
        "curve": curve,
        "gates": [evals[str(step)]["gate"] for step in sorted(map(int, evals)) if step],
        "before": evals["0"],
        "after": evals[str(len(log))],
    }


def at(curve: Points, tokens: float) -> float:
    """Accuracy after so many tokens, linear between evaluations.

    >>> at([(0, 0.25), (100, 0.75)], 50)
    0.5
    """
    for (x, y), (x2, y2) in zip(curve, curve[1:], strict=False):
        if tokens <= x2:
            return y + (y2 - y) * (tokens - x) / (x2 - x)
    return curve[-1][1]


def tokens_to(curve: Points, accuracy: float) -> float | None:
    """The fewest tokens after which a curve, linear between evaluations, has an accuracy; None: it never has.

    >>> tokens_to([(0, 0.25), (100, 0.75)], 0.5), tokens_to([(0, 0.25), (100, 0.75)], 0.8)
    (50.0, None)
    """
    if curve[0][1] >= accuracy:
        return float(curve[0][0])
    for (x, y), (x2, y2) in zip(curve, curve[1:], strict=False):
        if y < accuracy <= y2:
            return x + (x2 - x) * (accuracy - y) / (y2 - y)
    return None


def pair(one: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float | None]:
    """Two cells of a seed at equal tokens: those of the shorter one.

    gain: accuracy more than the base. saved: how many times more tokens the base took to its accuracy there.
    knows: precision of the held-out gate minus the share of flat problems, which a gate at random would have; mean over
    the evaluations after the first. knows at the end: the same of the last one, when nearly all problems are flat
    because the open ones are solved, so that no gate can be far ahead of chance.
    """
    tokens = min(one["tokens"], base["tokens"])
    reached, goal = at(one["curve"], tokens), at(base["curve"], tokens)
    took, base_took = tokens_to(one["curve"], goal), tokens_to(base["curve"], goal)
    ahead = [None if g["precision"] is None else g["precision"] - g["flat"] for g in one["gates"]]
    return {
        "seed": one["seed"],
        "tokens": tokens,
        "accuracy": reached,
        "base": goal,
        "gain": reached - goal,
        "saved": base_took / took if took and base_took else None,
        "knows": statistics.fmean(known) if (known := [x for x in ahead if x is not None]) else None,
        "knows at the end": ahead[-1],
    }


def collect(seeds: Sequence[int]) -> dict[str, Any]:
    """Every cell, and every pair of cells."""
    cells = {setting: [cell(setting, seed) for seed in seeds] for setting in FLAGS}
    pairs = {one: [pair(*both) for both in zip(cells[one], cells[base], strict=True)] for one, base in PAIRS.items()}
    return {"cells": cells, "pairs": pairs}


# ---------- to look at


def spread(values: Sequence[float | None], scale: float = 100, digits: int = 1) -> str:
    """ "55.1 ± 1.3" over the seeds, in percent; "" where there is nothing."""
    known = [v * scale for v in values if v is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def interval(values: Sequence[float | None], scale: float = 100, digits: int = 1) -> str:
    """Mean and 95 % interval over the seeds (Student's t), "" where a seed has no value.

    >>> interval([0.1, 0.2, 0.3])
    '20.0 (-4.8 to 44.8)'
    """
    known = [v * scale for v in values if v is not None]
    if len(known) < len(values) or len(known) not in T95:
        return ""
    mean, half = statistics.fmean(known), T95[len(known)] * statistics.stdev(known) / math.sqrt(len(known))
    return f"{mean:.{digits}f} ({mean - half:.{digits}f} to {mean + half:.{digits}f})"


def each(values: Sequence[float | None], scale: float = 100, digits: int = 1) -> str:
    """The seeds one by one; "never" for one without a value."""
    return ", ".join("never" if v is None else f"{v * scale:.{digits}f}" for v in values)


def markdown(study: Mapping[str, Any]) -> str:
    """The tables of docs/masa.md: pairs at equal tokens, then every setting at its end."""
    compared, settings = [], []
    for one, rows in study["pairs"].items():
        names = {"gain": "accuracy gained", "saved": "times fewer tokens", "knows": "gate precision - flat"}
        names |= {"knows at the end": "gate precision - flat, last evaluation"}
        for key, name in names.items():
            values, how = [row[key] for row in rows], (1, 2) if key == "saved" else (100, 1)
            line = {"at equal tokens": f"{TITLES[one]} against {TITLES[PAIRS[one]]}: {name}"}
            compared.append(line | {"mean (95 % interval)": interval(values, *how), "seed by seed": each(values, *how)})
    ends = [("before", [row["before"] for row in study["cells"]["grpo"]], None)]
    ends += [(TITLES[name], [row["after"] for row in rows], rows) for name, rows in study["cells"].items()]
    for name, summaries, rows in ends:
        line = {"held out": name, "steps": rows[0]["steps"] if rows else 0}
        line["k tokens"] = spread([row["tokens"] / 1e3 for row in rows], 1, 0) if rows else "0"
        line["metas"] = spread([row["metas"] for row in rows]) if rows else ""
        settings.append(line | {head: spread([pick(one, path) for one in summaries]) for head, path in COLUMNS.items()})
    receipt, seeds = study["receipt"], ", ".join(map(str, study["seeds"]))
    trained = [spread([row["gated in training"] for row in study["cells"][name]]) for name in PAIRS]
    return "\n".join(
        [
            table.markdown(compared),
            "",
            table.markdown(settings),
            "",
            f"In control, training gated {trained[0]} % of the problems ({TITLES['efficient']}) and {trained[1]} % "
            f"({TITLES['dapo-gate']}). Shares in percent, mean ± standard deviation over seeds {seeds}. Receipt: "
            f"`{receipt['command']}` at commit {receipt['commit']}, {receipt['device']}, torch {receipt['torch']}"
            f"{receipt['note']}.",
        ]
    )


def picture(cells: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Held-out accuracy against sampled tokens, a panel a pair, a line a seed."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(PAIRS), sharey=True)
    for ax, names in zip(panels, PAIRS.items(), strict=True):
        for name in names[::-1]:
            for k, row in enumerate(cells[name]):
                tokens, accuracy = zip(*row["curve"], strict=True)
                label = TITLES[name] if k == 0 else None
                thousands = [n / 1e3 for n in tokens]
                ax.plot(thousands, accuracy, color=COLORS[name], marker="o", ms=3, lw=1.3, label=label)
        ax.set(xlabel="sampled tokens, thousands (metas included)")
        ax.legend(frameon=False, loc="lower right")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out accuracy (Pass@1)")
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=150, metadata={"Software": None})


def receipt(note: str) -> dict[str, str]:
    """What ran where."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    facts = {"command": "make masa", "commit": commit.strip() or "unknown", "torch": torch.__version__}
    return facts | {"device": f"{platform.machine()} CPU, {os.cpu_count()} cores", "note": note and f"; {note}"}


def build_base() -> None:
    """The model and its problems, once; the weights are written last."""
    if not (OUT / "base" / "model.safetensors").exists():
        subprocess.run([sys.executable, "-m", "mini.arithmetic", "--out", str(OUT / "base")], cwd=ROOT, check=True)


@program
def main() -> int:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="comma-separated")
    parser.add_argument("--record", action="store_true", help="also write docs/ and the table in docs/masa.md")
    parser.add_argument("--note", default="", help='for the receipt, for example "measured beside other work"')
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    children = [child(setting, seed) for seed in seeds for setting in FLAGS]
    build_base()
    ends = run_all(children, 2, OUT)
    if code := unfinished(ends, children):
        return code
    facts = {"receipt": receipt(given.note), "settings": read_json(CONFIG), "flags": FLAGS, "seeds": seeds}
    study = facts | collect(seeds)
    write_json(OUT / "study.json", study)
    picture(study["cells"], OUT / "accuracy.png")
    with atomic_write(OUT / "table.md") as f:
        f.write(markdown(study) + "\n")
    if given.record:
        for name, place in RECORD.items():
            shutil.copyfile(OUT / name, ROOT / place)
        write_table(markdown(study), PAGE, MARKS)
    print(markdown(study))
    print(f"{OUT / 'accuracy.png'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
