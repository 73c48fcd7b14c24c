"""The evidence behind docs/results.md: several worlds, several seeds, two controls and two dials.

`make study` runs every cell (one world, one seed: its own draws, adapters and samples), two at a time, then writes
docs/results/study.json and the table between the study marks of docs/results.md. A finished cell is not run again.

  worlds   each has its own base model; which openers are traps and which facts are misconceived is drawn anew
  null     a world in which no move says anything about the answer: transitions cannot help, so no method should gain
           from weighting them. Wrong answers are chance there, so almost no question is wrong in three draws at
           T = 0.2: this world is drawn once a question, at T = 1, and trained at half the learning rate
  shuffled MR-ALIGN with its weights permuted among the steps of the same class: the same weights, no meaning
  noise    MR-ALIGN at half the learning rate with a share of the labels replaced at random
  lr       the preference methods at half and at a quarter of the learning rate that dev prefers: at the full one all of
           them reach the ceiling of this small world

Test and out-of-domain questions are looked at here and by `make train`; every setting was chosen on the dev questions.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import annotate
import data
import eval as evaluation
import kto
from common import table
from common.endings import program
from common.errors import InputError
from common.files import ROOT, atomic_write, read_json, read_jsonl, read_text, write_json
from tools.sweep import Child, flag, run_all, unfinished

OUT = ROOT / "runs" / "study"
PAGE = ROOT / "docs" / "results.md"
RESULT = ROOT / "docs" / "results" / "study.json"
MARKS = ("<!-- study:begin -->", "<!-- study:end -->")
SEEDS = (0, 1, 2)
MODELS = {"world 0": "mini/model", "world 1": "mini/model-world1", "null": "mini/model-null"}
WORLDS = ("world 0", "world 1")  # the others are controls
METHODS = tuple(name for name, loss in kto.LOSSES.items() if loss.study)
RATED = tuple(name for name in METHODS if kto.LOSSES[name].rate == "lr")  # what another --lr changes
NOISE = (0.2, 0.5)
RATES = (3e-4, 1.5e-4)  # beside the configured one
HALF = RATES[0]
NULL_DRAWS = {"draws": 1, "draw_temperature": 1.0}
PAIRS = (("kto", "thinkon"), ("mralign", "thinkon"), ("mralign", "kto"), ("mralign", "shuffled"), ("mralign", "sft"))
HEADS = {"test": "test", "ood": "unseen relations"}  # evaluation set -> its heading
SETS = tuple(HEADS)
N_BOOT = 10_000


@dataclass(frozen=True)
class Cell:
    """One run of the pipeline: a world, a seed, how noisy the annotator is, the learning rate (0: the configured)."""

    world: str
    seed: int
    noise: float = 0.0
    lr: float = 0.0

    @property
    def plain(self) -> bool:
        return not (self.noise or self.lr)

    @property
    def out(self) -> Path:
        dials = f"-noise{self.noise}" * bool(self.noise) + f"-lr{self.lr}" * bool(self.lr)
        return OUT / f"{self.world.replace(' ', '')}-seed{self.seed}{dials}"

    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS if self.plain else ("mralign",) if self.noise else RATED


def cells() -> list[Cell]:
    """All cells, those the others borrow their draws from first."""
    plain = [Cell(world, seed) for world in WORLDS for seed in SEEDS]
    rates = [Cell(world, seed, lr=lr) for lr in RATES for world in WORLDS for seed in SEEDS]
    rates += [Cell("null", seed, lr=HALF) for seed in SEEDS]
    return plain + rates + [Cell("world 0", seed, noise, HALF) for noise in NOISE for seed in SEEDS]


def child(cell: Cell) -> Child:
    """The process of a cell. The draws depend on neither dial, so a plain cell lends them to the others."""
    settings = {"model": MODELS[cell.world], "seed": cell.seed, "annotator_noise": cell.noise, "out": cell.out}
    settings |= {"method": ",".join(cell.methods)} | ({"lr": cell.lr} if cell.lr else {})
    settings |= NULL_DRAWS if cell.world == "null" else {}
    words = [str(ROOT / "mralign.py"), "--config", str(ROOT / "configs" / "mini.json"), "--resume"]
    source, borrows = Cell(cell.world, cell.seed).out, not cell.plain and cell.world != "null"
    settings |= {"reuse_from": source} if borrows else {}
    words += [word for setting in settings.items() for word in flag(*setting)]
    return Child(cell.out.name, cell.out, lambda: words, source.name if borrows else "")


def samples(cell: Cell, name: str, setting: str) -> list[dict[str, Any]]:
    """The samples of one setting on one evaluation set."""
    return read_jsonl(cell.out / "eval" / name / f"{setting}.jsonl")


def by_fact(scored: list[dict[str, Any]], metric: str) -> dict[str, float]:
    """Mean of acc or mis over the questions of each fact."""
    values = defaultdict(list)
    for row, value in zip(scored, evaluation.indicator(scored, metric).tolist(), strict=True):
        values[row["id"].partition("#")[0]].append(value)
    return {fact: sum(v) / len(v) for fact, v in values.items()}


def label_shares(rows: list[dict[str, Any]], annotator: annotate.CueAnnotator) -> dict[str, float]:
    """Share of each label among all labels of the thoughts."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        parsed = data.parse_sample(row)
        if parsed.span:
            segments = [row["text"][a:b] for a, b in data.split_segments(row["text"], *parsed.span)]
            for step in annotator.label(row["question"], segments):
                for label in step.labels:
                    counts[label] += 1
    total = sum(counts.values())
    return {label: n / total for label, n in counts.items()}


def crossed_bootstrap(table: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of a (cells, facts) table of differences; cells and facts are both drawn with replacement.

    Both count as samples: another world or seed, and other facts, could have come up. 95 % percentile interval.
    """
    rng = np.random.default_rng(seed)
    cells, facts = table.shape
    rows = rng.multinomial(cells, np.full(cells, 1 / cells), size=N_BOOT) / cells  # (n, cells) weights
    columns = rng.multinomial(facts, np.full(facts, 1 / facts), size=N_BOOT) / facts  # (n, facts)
    means = ((rows @ table) * columns).sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(table.mean()), float(low), float(high)


def group_summary(group: list[Cell], methods: tuple[str, ...]) -> dict[str, Any]:
    """Mean and standard deviation over the cells of a group, per set and setting, and the paired differences."""
    annotator = annotate.CueAnnotator(annotate.read_cues(ROOT / "mini" / "cues.json"))
    result: dict[str, Any] = {"cells": len(group), "settings": {}, "differences": {}}
    values: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for setting in ("thinkon", *methods):
        row: dict[str, Any] = {}
        shares: dict[str, list[float]] = defaultdict(list)
        for name in SETS:
            for cell in group:
                rows = samples(cell, name, setting)
                scored = [evaluation.score(r) for r in rows]
                for metric in ("acc", "mis"):
                    values[name, setting, metric].append(by_fact(scored, metric))
                for label, share in label_shares(rows, annotator).items():
                    shares[label].append(share)
            for metric in ("acc", "mis"):
                means = [float(np.mean(list(v.values()))) for v in values[name, setting, metric]]
                row[f"{name}_{metric}"] = {
                    "mean": float(np.mean(means)),
                    "sd": float(np.std(means, ddof=1)),
                    "all": means,
                }
        row["labels"] = {label: float(np.mean(v)) for label, v in sorted(shares.items())}
        result["settings"][setting] = row
    for a, b in PAIRS:
        if {a, b} <= {"thinkon", *methods}:
            entry = {}
            for name in SETS:
                for metric in ("acc", "mis"):
                    pairs = zip(values[name, a, metric], values[name, b, metric], strict=True)
                    table = np.array([[x[f] - y[f] for f in x] for x, y in pairs])  # (cells, facts)
                    mean, low, high = crossed_bootstrap(table)
                    entry[f"{name}_{metric}"] = {
                        "mean": mean,
                        "low": low,
                        "high": high,
                        "wins": int((table.mean(1) > 0).sum()),
                    }
            result["differences"][f"{a} - {b}"] = entry
    return result


def summary() -> dict[str, Any]:
    """Every group of cells, from the files they left."""
    groups = {"both worlds": [Cell(w, s) for w in WORLDS for s in SEEDS]}
    groups |= {w: [Cell(w, s) for s in SEEDS] for w in WORLDS}
    groups |= {f"both worlds, lr {lr:g}": [Cell(w, s, lr=lr) for w in WORLDS for s in SEEDS] for lr in RATES}
    groups |= {f"null, lr {HALF:g}": [Cell("null", s, lr=HALF) for s in SEEDS]}
    for noise in NOISE:
        name = f"world 0, lr {HALF:g}, {round(100 * noise)} % label noise"
        groups[name] = [Cell("world 0", s, noise, HALF) for s in SEEDS]
    return {name: group_summary(group, group[0].methods) for name, group in groups.items()}


def markdown(study: dict[str, Any]) -> str:
    """The table of docs/results.md and the paired differences; single worlds and other pairs are in the JSON file."""
    groups = {k: g for k, g in study["groups"].items() if k not in WORLDS}
    names = {f"{name}_{m}": f"{head} {m.capitalize()}" for name, head in HEADS.items() for m in ("acc", "mis")}
    rows, pairs = [], []
    for name, group in groups.items():
        rows.append({"": f"**{name}** ({group['cells']} runs)"})
        for setting, row in group["settings"].items():
            cells = {head: f"{100 * row[k]['mean']:.1f} ± {100 * row[k]['sd']:.1f}" for k, head in names.items()}
            rows.append(
                {"": setting} | cells | {"backtracking": f"{100 * row['labels'].get('backtracking', 0.0):.1f} %"}
            )
        for pair in ("mralign - kto", "mralign - shuffled"):
            if of := group["differences"].get(pair):
                cells = {head: _interval(of[k]) for k, head in names.items()}
                pairs.append({"paired difference, points": f"{name}: {pair}"} | cells)
    return f"{table.markdown(rows, missing='')}\n\n{table.markdown(pairs)}"


def _interval(d: dict[str, float], sign: str = "+") -> str:
    mean, low, high = (f"{100 * d[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def write_table(text: str, page: Path = PAGE, marks: tuple[str, str] = MARKS) -> None:
    """Put `text` between two marks of a page of docs/. Raises InputError where it has no such marks."""
    before, begin, rest = read_text(page).partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise InputError(f"{page}: must hold the lines {marks[0]} and {marks[1]}, between which the table goes")
    with atomic_write(page) as f:
        f.write(f"{before}{begin}\n{text}\n{end}{after}")


@program
def main() -> int:
    """Run what is missing, then summarise."""
    todo = cells()
    children = [child(cell) for cell in todo]
    ends = run_all(children, 2, OUT)
    if code := unfinished(ends, children):
        return code
    receipts = read_json(todo[0].out / "results.json")["receipt"]
    study = {
        "command": "make study",
        **{k: receipts[k] for k in ("commit", "device", "versions")},
        "seeds": list(SEEDS),
        "settings": read_json(ROOT / "configs" / "mini.json"),
        "groups": summary(),
    }
    write_json(RESULT, study)
    write_table(markdown(study))
    print(markdown(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
