"""What MASA does on the miniature: MASA, GRPO and two controls, three seeds each, into one table and one picture.

`make masa` builds the model of arithmetic.py where it is not there, runs every cell (one setting, one seed), two at a
time, and leaves table.md, study.json and calibration.png in runs/masa. A cell that is finished is not run again; one
that was stopped goes on. --record also puts the three where docs/ shows them.

  masa       solutions and metas, no control: what the rewards teach
  shuffled   the same, metas scored against another problem's solutions: what they say about a single problem must go
  efficient  experts are cloned, and halfway through metas take control: gate and cutoff
  grpo       no metas; trained for as many steps, and on until as many tokens have been sampled as masa had

All figures are of held-out problems, at the temperature of training. The settings were chosen on this base model and
its seeds: with 8 metas, 16 problems a step and a learning rate of 1.5e-4 one of three seeds ended with a foreseen pass
rate of 0 for every problem.
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
from masa.problems import GRID
from mini.study import write_table
from tools.sweep import Child, run_all, unfinished

OUT = ROOT / "runs" / "masa"
CONFIG = ROOT / "configs" / "masa-mini.json"
PAGE = ROOT / "docs" / "masa.md"
MARKS = ("<!-- masa:begin -->", "<!-- masa:end -->")
RECORD = {"study.json": "docs/results/masa.json", "calibration.png": "docs/masa_calibration.png"}
SEEDS = (0, 1, 2)
FLAGS = {
    "masa": ["--preset", "v1"],
    "shuffled": ["--preset", "v1", "--shuffle-statistics"],
    "efficient": ["--preset", "test", "--metas", "16"],
    "grpo": ["--preset", "grpo"],
}
# What the table shows of an evaluation: heading -> (path in passk.summary, is a share).
COLUMNS = {
    "Pass@1": ("pass@1", "mean"),
    "abs(p_hat - p)": ("error",),
    "constant": ("error_of_constant",),
    "meta reward": ("r_meta",),
    "length": ("r_length",),
    "difficulty": ("r_difficulty",),
    "notion": ("r_notion",),
    "gate precision": ("gate", "precision"),
    "gate recall": ("gate", "recall"),
}


def folder(setting: str, seed: int) -> Path:
    """Where a cell's files are."""
    return OUT / f"{setting}-seed{seed}"


def equal_tokens(seed: int) -> int:
    """Steps after which GRPO has sampled what MASA did: MASA's tokens over its solution tokens, times its steps."""
    rows = read_jsonl(folder("masa", seed) / "metrics.jsonl")
    return math.ceil(len(rows) * rows[-1]["tokens"] / sum(row["solution_tokens"] for row in rows))


def child(setting: str, seed: int) -> Child:
    """The process of a cell; GRPO's waits for MASA's of its seed, which says how long it runs."""

    def words() -> list[str]:
        flags = [*FLAGS[setting], "--seed", str(seed), "--out", str(folder(setting, seed)), "--resume"]
        if setting == "grpo":
            flags += ["--eval-every", str(read_json(CONFIG)["steps"]), "--steps", str(equal_tokens(seed))]
        return ["-m", "masa", "--config", str(CONFIG), *flags]

    out = folder(setting, seed)
    return Child(out.name, out, words, folder("masa", seed).name if setting == "grpo" else "")


def pick(summary: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """A figure of a summary; None where there is none."""
    value: Any = summary
    for name in path:
        value = None if value is None else value.get(name)
    return value


def collect() -> dict[str, Any]:
    """Every row of the table, seed by seed, and the counts behind the picture, from the cells' files."""
    steps = read_json(CONFIG)["steps"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for setting in FLAGS:
        for seed in SEEDS:
            results = read_json(folder(setting, seed) / "results.json")
            log = read_jsonl(folder(setting, seed) / "metrics.jsonl")
            marks = {"before": 0, setting: steps}
            if setting == "grpo":
                marks = {"grpo, equal steps": steps, "grpo, equal tokens": len(log)}
            for name, step in marks.items():
                if name == "before" and setting != "masa":
                    continue
                part = log[:step]
                sampled = {k: sum(row[k] for row in part) for k in ("solution_tokens", "meta_tokens")}
                row = {"seed": seed, "steps": step, "tokens": sum(sampled.values()), **sampled}
                tail = part[step // 2 :]
                if setting == "efficient":
                    row["gated"] = statistics.fmean(r["share/gated"] for r in tail)
                    row["cut"] = statistics.fmean(r["share/cut"] for r in tail if r["share/cut"] is not None)
                rows.setdefault(name, []).append(row | results["evals"]["heldout"][str(step)])
    order = ("before", "grpo, equal steps", "grpo, equal tokens", "masa", "shuffled", "efficient")
    return {"rows": {name: rows[name] for name in order}, "calibration": calibration(steps)}


def calibration(steps: int) -> dict[str, list[dict[str, float]]]:
    """For every foreseen pass rate: how many metas gave it, the mean pass rate of their problems; seeds pooled."""
    found = {}
    for name, (setting, step) in {
        "before": ("masa", 0),
        "masa": ("masa", steps),
        "shuffled": ("shuffled", steps),
    }.items():
        bins: list[list[float]] = [[] for _ in range(GRID + 1)]
        for seed in SEEDS:
            for row in read_jsonl(folder(setting, seed) / "evals.jsonl"):
                if row["step"] == step:
                    for p_hat in row["p_hats"]:
                        bins[round(GRID * p_hat)].append(row["correct"] / row["n"])
        found[name] = [
            {"p_hat": k / GRID, "metas": len(part), "p": statistics.fmean(part)} for k, part in enumerate(bins) if part
        ]
    return found


def spread(values: Sequence[float | None], share: bool = True) -> str:
    """ "55.1 ± 1.3" over the seeds, in percent for shares; "" where there is nothing."""
    known = [v * (100 if share else 1) for v in values if v is not None]
    if not known:
        return ""
    return f"{statistics.fmean(known):.1f} ± {statistics.stdev(known):.1f}" if len(known) > 1 else f"{known[0]:.1f}"


def markdown(study: Mapping[str, Any]) -> str:
    """The table of docs/masa.md: mean and standard deviation over the seeds, then the seeds one by one."""
    rows, seeds = [], []
    shown = {"Pass@1": ("pass@1", "mean"), "error": ("error",), "meta reward": ("r_meta",)}
    for name, of in study["rows"].items():
        row = {"": name, "steps": round(statistics.fmean(one["steps"] for one in of))}
        row["M tokens"] = spread([one["tokens"] / 1e6 for one in of], share=False)
        rows.append(row | {head: spread([pick(one, path) for one in of]) for head, path in COLUMNS.items()})
        each = {head: ", ".join(f"{100 * pick(one, path):.1f}" for one in of) for head, path in shown.items()}
        seeds.append({"seed by seed": name} | each)
    lines = [table.markdown(rows), "", table.markdown(seeds)]
    gated, cut = (spread([row[k] for row in study["rows"]["efficient"]]) for k in ("gated", "cut"))
    lines += ["", f"In control, efficient gated {gated} % of the problems and cut {cut} % of the solutions."]
    receipt = study["receipt"]
    lines.append(
        f"Shares in percent, mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}. Receipt: "
        f"`{receipt['command']}` at commit {receipt['commit']}, {receipt['device']}, torch {receipt['torch']}."
    )
    return "\n".join(lines)


def picture(bins: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Foreseen against measured pass rate, a panel each for before, MASA and the control; a dot's area is its metas."""
    titles = {"before": "before", "masa": "MASA", "shuffled": "control: statistics shuffled"}
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True)
    for ax, (name, title) in zip(panels, titles.items(), strict=True):
        most = max(dot["metas"] for dot in bins[name])
        ax.plot([0, 1], [0, 1], color="0.75", lw=1, zorder=0)
        for dot in bins[name]:
            ax.scatter(dot["p_hat"], dot["p"], s=20 + 380 * dot["metas"] / most, color="#2f6f9f", alpha=0.75, lw=0)
            ax.annotate(f"{dot['metas']:,}", (dot["p_hat"], dot["p"]), (0, 9), textcoords="offset points", ha="center",
                        fontsize=7, color="0.35")  # fmt: skip
        ax.set(title=title, xlabel="foreseen pass rate", xlim=(-0.08, 1.08), ylim=(-0.08, 1.08), aspect="equal")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("measured pass rate")
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=150, metadata={"Software": None})


def receipt() -> dict[str, str]:
    """What ran where."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {"command": "make masa", "commit": commit.strip() or "unknown", "device": device, "torch": torch.__version__}


def build_base() -> None:
    """The model and its problems, once; the weights are written last."""
    if not (OUT / "base" / "model.safetensors").exists():
        subprocess.run([sys.executable, "-m", "mini.arithmetic", "--out", str(OUT / "base")], cwd=ROOT, check=True)


@program
def main() -> int:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="also write docs/ and the table in docs/masa.md")
    given = parser.parse_args()
    cells = [("masa", seed) for seed in SEEDS]  # first: they say how long grpo runs
    cells += [(setting, seed) for seed in SEEDS for setting in FLAGS if setting != "masa"]
    children = [child(*cell) for cell in cells]
    build_base()
    ends = run_all(children, 2, OUT)
    if code := unfinished(ends, children):
        return code
    study = {"receipt": receipt(), "settings": read_json(CONFIG), "flags": FLAGS, "seeds": list(SEEDS), **collect()}
    write_json(OUT / "study.json", study)
    picture(study["calibration"], OUT / "calibration.png")
    with atomic_write(OUT / "table.md") as f:
        f.write(markdown(study) + "\n")
    if given.record:
        for name, place in RECORD.items():
            shutil.copyfile(OUT / name, ROOT / place)
        write_table(markdown(study), PAGE, MARKS)
    print(markdown(study))
    print(f"{OUT / 'calibration.png'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
