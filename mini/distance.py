"""Preference methods compared at equal distance from the base model: the second half of `make study`.

A method that moves further at the same learning rate looks better without being better. So every method is trained at
four learning rates, and Acc and Mis on the test questions are read as functions of KL(policy || base):

  block    one world and one seed: its own draws, labels, weights; everything below is done once a block
  cell     one method at one learning rate: an adapter, its samples on the test questions, its KL
  KL       of completions, one a test fact, drawn at T = 1 without cuts. Each adds the KL of the policy's next-token
           distribution from the base model's over its tokens: not negative, the same mean as the log-ratio, less noise
  curve    Acc (or Mis) of a method in a block, straight between its rates in order of their KL; it starts at the base
  headline the difference of two curves of a block, averaged over the KL from 0 to where the shorter of all curves of
           that block ends, then over blocks; the interval resamples blocks and facts

Beside kto, mralign and shuffled there is `mean`: KTO in which every step has the mean weight of its class. It tells
"more weight on rejected rows" from "weight on the right transitions". sft runs at its own best rate. The null world has
two rates. The choices here were made on development questions or before any result: nothing was tuned on the test ones.

With --hard the same for the worlds of pairs (hard.py): few rows, drawn once a question at T = 1. There
`--block "hard world 0/0" --split dev` comes first: it tells at which rate each method is best on development questions.

`python -m mini.distance --jobs 1` does this half alone. A finished cell is not run again. Three rates come
first in all blocks, seed by seed, then the last one, so that a run that is cut short leaves a smaller design: a block
counts with the rates that all four methods have finished, once there are two.
"""

import argparse
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import data
import eval as evaluation
import kto
import lora
import mralign
import sample
import train
from common import hub, table
from common.endings import program
from common.files import ROOT, read_json, read_jsonl, write_json, write_jsonl
from common.ranks import only_writer, process_group
from common.settings import from_json
from common.tokens import encode, token_offsets, unused_ids
from mini import study
from model import Qwen3
from pipeline import reporting
from pipeline.config import RunConfig
from pipeline.run import Run
from report.figures import FAINT, METHOD_COLOURS, STYLE, save
from tools.sweep import Child, run_all, unfinished

OUT = ROOT / "runs" / "distance"
RESULTS = ROOT / "docs" / "results"
METHODS = ("kto", "mralign", "shuffled", "mean")
RATES = (6e-4, 3e-4, 4.2e-4, 1.5e-4)  # the first is what development prefers; in the order of their worth
NULL_RATES = (6e-4, 3e-4)
HARD_MODELS = {"hard world 0": "mini/model-hard", "hard world 1": "mini/model-hard-world1"}  # worlds of pairs (hard.py)
HARD_MODELS |= {"hard null": "mini/model-hard-null"}
HARD = tuple(HARD_MODELS)
HARD_ROWS = {True: 33, False: 15}  # chosen and rejected; with more there is a ceiling (docs/results.md)
HARD_TRAINING = {"epochs": 15}
HARD_RATES = (2.4e-3, 1.2e-3, 4.8e-3, 6e-4)
HARD_NULL_RATES = (2.4e-3, 4.8e-3)
BASE = "thinkon"
PAIRS = (("mralign", "kto"), ("mralign", "shuffled"), ("mralign", "mean"), ("shuffled", "kto"), ("mean", "kto"))
AT = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)  # nats at which differences are listed
GRID = 200  # points of a curve for its mean, and of the figure
TITLES = {BASE: "ThinkOn, not aligned", "sft": "SFT", "kto": "KTO", "mralign": "MR-ALIGN"}
TITLES |= {"shuffled": "MR-ALIGN, weights shuffled", "mean": "KTO, mean weight of the class"}

Facts = dict[str, list[float]]  # fact -> [Acc, Mis] over its questions
Cells = dict[tuple[str, float], dict[str, Any]]  # (method, rate) -> its record


# ---------- blocks and cells


@dataclass(frozen=True)
class Block:
    """A world, a seed, and the questions its cells are measured on."""

    world: str
    seed: int
    split: str = "test"

    @property
    def out(self) -> Path:
        return OUT / f"{self.world.replace(' ', '')}-seed{self.seed}"

    @property
    def null(self) -> bool:
        return self.world.endswith("null")

    @property
    def cells(self) -> list[tuple[str, float]]:
        """(method, rate) of everything that is measured, the base model first."""
        sft = [("sft", 0.0)] if self.world in study.WORLDS else []
        return [(BASE, 0.0), *((method, rate) for rate in self.rates for method in METHODS), *sft]

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the preference methods."""
        if self.world in HARD:
            return HARD_NULL_RATES if self.null else HARD_RATES
        return NULL_RATES if self.null else RATES

    def file(self, method: str, rate: float) -> Path:
        """The record of a cell."""
        cells = "cells" if self.split == "test" else f"cells-{self.split}"
        return self.out / cells / (f"{method}-lr{rate:g}.json" if rate else f"{method}.json")

    def left(self, most: int) -> list[tuple[str, float]]:
        """The cells of the first `most` rates that are not there yet; sft comes with all rates."""
        known = {0.0, *self.rates[:most]}
        due = [cell for cell in self.cells if cell[1] in known and (cell[0] != "sft" or most >= len(self.rates))]
        return [cell for cell in due if not self.file(*cell).exists()]

    def done(self) -> list[tuple[str, float]]:
        """The cells that can be compared: of the rates that all methods have finished; none unless there are two."""
        there = [cell for cell in self.cells if self.file(*cell).exists()]
        rates = [rate for rate in self.rates if all((method, rate) in there for method in METHODS)]
        if (BASE, 0.0) not in there or len(rates) < 2:
            return []
        return [(method, rate) for method, rate in there if rate in rates or not rate]


def blocks(hard: bool = False) -> list[Block]:
    """All blocks, in the order in which they are worth having. hard: those of the worlds of pairs instead."""
    if hard:
        return [Block(world, seed) for seed in study.SEEDS for world in HARD]
    first = [Block(world, seed) for seed in study.SEEDS[:2] for world in study.WORLDS]
    last = [Block(world, seed) for seed in study.SEEDS[2:] for world in study.WORLDS]
    null = [Block("null", seed) for seed in study.SEEDS]
    return [*first, *null[:1], *last, *null[1:]]


def settings(block: Block) -> RunConfig:
    """The pipeline's settings of a block."""
    cfg = RunConfig(**from_json(RunConfig, "configs/mini.json"))
    own = {} if block.world in study.WORLDS else study.NULL_DRAWS
    own = own | (HARD_TRAINING if block.world in HARD else {})
    lenders = study.Cell(block.world, block.seed, lr=study.HALF if block.world == "null" else 0.0).out
    lent = {"reuse_from": str(lenders)} if (lenders / "train.jsonl").exists() else {}
    model = str(ROOT / (study.MODELS | HARD_MODELS)[block.world])
    return replace(cfg, model=model, seed=block.seed, out=str(block.out), resume=True, **own, **lent)


def run_block(block: Block, most: int) -> None:
    """Draws, labels and weights by the pipeline, then the cells of the first `most` rates that are not there yet."""
    cfg = settings(block)
    source = hub.locate(cfg.model, "")
    few = block.world in HARD
    drawn = replace(cfg, out=str(block.out / "draws")) if few else cfg
    mralign.run_stages(drawn, source, ["sample", "candidates", "annotate"] + ["fit"] * (not few))
    with process_group() as ranks, only_writer(block.out, ranks), ranks.stop.listen():
        if few:
            pick(block)
            mralign.fit_transitions(Run(cfg, source, ranks))
        for method, rate in block.left(most):
            path = block.file(method, rate)
            started = time.perf_counter()
            of = replace(cfg, lr=rate) if rate else cfg
            adapter = block.out / "adapters" / path.stem
            record = measure(Run(of, source, ranks), method, adapter, block.split)
            record |= {"world": block.world, "seed": block.seed, "method": method, "lr": rate}
            made = reporting.provenance(Run(of, source, ranks))
            record |= {name: made[name] for name in ("commit", "device", "versions")}
            write_json(path, record | {"seconds": round(time.perf_counter() - started, 1)})
            ranks.log(
                f"{path}: Acc {100 * mean_of(record['facts'], 0):.1f}, KL {record['kl']:.3f} ± {record['kl_se']:.3f}"
            )


def pick(block: Block) -> None:
    """The candidates of a block of few rows, and their annotations: chance takes HARD_ROWS of those that were drawn."""
    rows = read_jsonl(block.out / "draws" / "candidates.jsonl", ("id", "chosen"))
    kept: set[str] = set()
    for side, n in HARD_ROWS.items():
        kept |= set(random.Random(block.seed).sample([row["id"] for row in rows if row["chosen"] is side], n))
    for name in ("candidates.jsonl", "annotations.jsonl"):
        of_all = read_jsonl(block.out / "draws" / name, ("id",))
        write_jsonl(block.out / name, [row for row in of_all if row["id"] in kept])


def measure(run: Run, method: str, out: Path, split: str = "test") -> dict[str, Any]:
    """Train one method at the run's learning rate and measure it on the questions of a split. Leaves files in `out`.

    An adapter that is there is taken: that of the other split is the same one.
    """
    cfg, base = run.cfg, run.base_model()
    policy = base
    if method != BASE:
        loss, path = kto.LOSSES[method], run.out / "train.jsonl"
        rows = [r for r in data.load_train(path) if loss.keeps(r["label"])]
        rows = data.to_rows(data.reweighted(rows, loss.weights, cfg.seed), run.tokenizer)
        origin = {"rows": mralign.checksum(path)}
        settings = replace(cfg.training, micro_batch=cfg.batch_size)  # faster here, the same result
        if not (out / lora.WEIGHTS).exists():
            base_name = run.source.name
            train.train(run.base_model(), rows, method, settings, run.ranks, out, run.impl, base_name, origin, True)
        policy = run.base_model()
        lora.load(policy, out)
        lora.merge(policy)
    questions, _ = data.load_questions(ROOT / "mini" / "questions" / f"{split}.jsonl")
    cut = sample.Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p)
    drawn = draw(run, policy, questions, cut, out / f"{split}.jsonl")
    firsts = list({q["id"].partition("#")[0]: q for q in reversed(questions)}.values())  # one question of every fact
    plain = draw(run, policy, firsts, sample.Sampling(1.0, 1.0, 0, 0.0), out / f"plain-{split}.jsonl")
    prompts, completions = ([row[key] for row in plain] for key in ("prompt_ids", "ids"))
    never = unused_ids(run.tokenizer, policy.config.vocab_size)
    kl, ratio = (x.tolist() for x in kl_to_base(policy, base, prompts, completions, never))
    n = len(kl)
    return {
        "facts": by_fact(drawn),
        "facts_plain": by_fact(plain),  # the completions of the KL: T = 1, nothing cut
        "kl": float(np.mean(kl)),
        "kl_se": float(np.std(kl, ddof=1) / n**0.5),
        "log_ratio": float(np.mean(ratio)),
        "log_ratio_se": float(np.std(ratio, ddof=1) / n**0.5),
        "completions": n,
        "cut": sum(row["finish"] == "length" for row in plain),
    }


Rows = list[dict[str, Any]]
Ids = list[list[int]]


def draw(run: Run, policy: Qwen3, questions: Rows, how: sample.Sampling, path: Path) -> Rows:
    """A sample of every question, also written to `path`."""
    cfg = run.cfg
    texts = [run.prompt(run.turn(q["question"]), "on") for q in questions]
    prompts = [encode(run.tokenizer, text) for text in texts]
    seeds = [sample.seed_of(cfg.seed, q["id"], "on", 0) for q in questions]
    common = {"max_new": cfg.max_new, "stop_ids": run.stop_ids, "batch_size": cfg.sample_batch}
    common |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "min_p": how.min_p}
    never = unused_ids(run.tokenizer, policy.config.vocab_size)
    done = sample.generate(policy, prompts, seeds, never=never, **common)
    rows = []
    for q, prompt, ids, c in zip(questions, texts, prompts, done, strict=True):
        text, _ = token_offsets(run.tokenizer, c.ids[:-1] if c.finish == "stop" else c.ids)
        row = {"id": q["id"], "mode": "on", "draw": 0, "question": q["question"], "answers": q["answers"]}
        rows.append(row | {"prompt": prompt, "prompt_ids": ids, "ids": c.ids, "text": text, "finish": c.finish})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)
    return rows


@torch.no_grad()
def kl_to_base(
    policy: Qwen3, base: Qwen3, prompts: Ids, completions: Ids, never: list[int], size: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL, log-ratio), each (n,) float64 in nats, of completions drawn from the policy at T = 1 without cuts.

    KL: sum over the tokens of sum_v pi(v) (log pi(v) - log pi_base(v)) after what precedes them. log-ratio: sum of
    log pi - log pi_base of the drawn tokens. Both have the mean KL(pi || pi_base) over completions, the first with less
    noise. never: ids that are not drawn; the distributions are renormalised on the others.
    """
    allowed = torch.ones(policy.config.vocab_size, dtype=torch.bool)
    allowed[never] = False
    kl, ratio = [], []
    for start in range(0, len(prompts), size):
        part = zip(prompts[start : start + size], completions[start : start + size], strict=True)
        batch = data.pack([(x, y, torch.ones(len(y))) for x, y in part])
        logp = []
        for model in (policy, base):
            hidden = model(batch.ids, batch.cu_seqlens)[batch.predict]  # (M, E)
            logits = model.logits(hidden).double().masked_fill(~allowed, -math.inf)
            logp.append(logits.log_softmax(-1))  # (M, V)
        difference = torch.where(allowed, logp[0] - logp[1], 0.0)
        of_token = (logp[0].exp() * difference).sum(-1)  # (M,)
        drawn = difference.gather(1, batch.targets[:, None])[:, 0]
        lengths = batch.cu_targets.diff().tolist()
        kl += [x.sum() for x in of_token.split(lengths)]
        ratio += [x.sum() for x in drawn.split(lengths)]
    return torch.stack(kl), torch.stack(ratio)


def by_fact(rows: Rows) -> Facts:
    """Acc and Mis of every fact, over its questions."""
    scored = [evaluation.score(row) for row in rows]
    acc, mis = (study.by_fact(scored, metric) for metric in ("acc", "mis"))
    return {fact: [acc[fact], mis[fact]] for fact in acc}


def mean_of(facts: Mapping[str, Sequence[float]], metric: int) -> float:
    """Acc (0) or Mis (1) over the facts."""
    return float(np.mean([of[metric] for of in facts.values()]))


# ---------- curves


@dataclass(frozen=True)
class Curve:
    """A method in a block: KL of its rates in ascending order, the base first, and the values of every fact there."""

    kl: np.ndarray  # (points,) ascending, kl[0] = 0
    values: np.ndarray  # (points, facts)

    def at(self, kl: float) -> np.ndarray:
        """The values (facts,) at a KL within the curve: straight between the two nearest points."""
        assert 0 <= kl <= self.kl[-1], (kl, self.kl)
        k = min(int(np.searchsorted(self.kl, kl, side="right")), len(self.kl) - 1)
        share = (kl - self.kl[k - 1]) / (self.kl[k] - self.kl[k - 1])
        return (1 - share) * self.values[k - 1] + share * self.values[k]

    def mean(self, end: float) -> np.ndarray:
        """The values (facts,), averaged over KL from 0 to `end`."""
        return np.mean([self.at(x) for x in (np.arange(GRID) + 0.5) * end / GRID], axis=0)


def curve(cells: Cells, method: str, metric: int, field: str = "facts") -> Curve:
    """The curve of a method in a block. metric: 0 Acc, 1 Mis."""
    base = cells[BASE, 0.0]
    own = sorted((cell for (name, _), cell in cells.items() if name == method), key=lambda cell: cell["kl"])
    facts = list(base[field])
    points = [[of[field][fact][metric] for fact in facts] for of in (base, *own)]
    return Curve(np.array([0.0, *(cell["kl"] for cell in own)]), np.array(points))


def read_cells(block: Block) -> Cells:
    """The records of a block's cells that can be compared."""
    return {cell: read_json(block.file(*cell)) for cell in block.done()}


def shared_end(cells: Cells) -> float:
    """The KL where the shortest curve of a block ends."""
    return min(float(curve(cells, method, 0).kl[-1]) for method in METHODS)


def difference(
    of: Sequence[Cells], a: str, b: str, metric: int, kl: float | None, field: str = "facts"
) -> dict[str, Any]:
    """Curve a minus curve b at one KL, or (None) averaged up to the shared end of every block.

    {mean, low, high, wins, each}: each block's difference, how many are above 0, the 95 % interval over blocks and
    facts (of a single block: over its facts alone). Only blocks whose curves reach that KL count; {} when none does.
    """
    rows = []
    for cells in of:
        pair = [curve(cells, method, metric, field) for method in (a, b)]
        if kl is None:
            rows.append(pair[0].mean(shared_end(cells)) - pair[1].mean(shared_end(cells)))
        elif all(kl <= c.kl[-1] for c in pair):
            rows.append(pair[0].at(kl) - pair[1].at(kl))
    if not rows:
        return {}
    mean, low, high = study.crossed_bootstrap(np.array(rows))
    each = [float(row.mean()) for row in rows]
    return {"mean": mean, "low": low, "high": high, "wins": sum(x > 0 for x in each), "each": each}


def best_rates(cells: Cells) -> dict[str, float]:
    """The learning rate at which each method's Acc is highest, on the questions of these cells."""
    of = {name: [rate for method, rate in cells if method == name] for name in METHODS}
    return {name: max(rates, key=lambda rate: mean_of(cells[name, rate]["facts"], 0)) for name, rates in of.items()}


def at_rates(of: Sequence[Cells], rates: Mapping[str, float]) -> dict[str, Any]:
    """Acc and Mis of every method at a rate of its own, and the paired difference of MR-ALIGN to it.

    {method: {lr, kl, acc, mis, acc ahead, mis ahead}}: all but lr and kl are {mean, low, high}, see crossed_bootstrap.
    """
    result: dict[str, Any] = {}
    for k, metric in enumerate(("acc", "mis")):
        values = {
            name: np.array([[v[k] for v in cells[name, rate]["facts"].values()] for cells in of])  # (blocks, facts)
            for name, rate in {BASE: 0.0, **rates}.items()
        }
        for name, own in values.items():
            row = result.setdefault(name, {"lr": rates.get(name, 0.0)})
            row["kl"] = float(np.mean([cells[name, row["lr"]]["kl"] for cells in of]))
            tables = {metric: own} | ({f"{metric} ahead": values["mralign"] - own} if name != "mralign" else {})
            for key, table_of in tables.items():
                row[key] = dict(zip(("mean", "low", "high"), study.crossed_bootstrap(table_of), strict=True))
    return result


def grouped(of: Sequence[Block]) -> dict[str, list[Block]]:
    """The blocks of every group of worlds, and of every world but the null ones."""
    groups: dict[str, list[Block]] = defaultdict(list)
    for block in of:
        hard = "hard " * (block.world in HARD)
        groups[hard + ("null" if block.null else "worlds" if hard else "both worlds")].append(block)
        if not block.null:
            groups[block.world].append(block)
    return groups


def own_best(of: Sequence[Block], rates: Mapping[str, float]) -> dict[str, Any]:
    """Of every group the methods at a rate of their own, over the blocks that have these cells."""
    wanted = [(BASE, 0.0), *rates.items()]
    result = {}
    for name, members in grouped([b for b in of if all(b.file(*cell).exists() for cell in wanted)]).items():
        records = [{cell: read_json(b.file(*cell)) for cell in wanted} for b in members]
        result[name] = {"blocks": [f"{b.world}, seed {b.seed}" for b in members], "methods": at_rates(records, rates)}
        result[name]["acc of each"] = {m: [mean_of(r[m, rate]["facts"], 0) for r in records] for m, rate in wanted}
    return result


def summary(done: Sequence[Block]) -> dict[str, Any]:
    """Figures of some blocks: every cell's Acc, Mis and KL, and the differences at equal KL."""
    result: dict[str, Any] = {}
    for name, members in grouped(done).items():
        of = [read_cells(block) for block in members]
        cells = []
        for method, rate in members[0].cells:
            records = [x[method, rate] for x in of if (method, rate) in x]
            if not records:
                continue
            row: dict[str, Any] = {"method": method, "lr": rate}
            for key, field, metric in (("acc", "facts", 0), ("mis", "facts", 1), ("acc_plain", "facts_plain", 0)):
                row[key] = [mean_of(record[field], metric) for record in records]
            row |= {key: [record[key] for record in records] for key in ("kl", "kl_se", "log_ratio", "log_ratio_se")}
            cells.append(row)
        entry: dict[str, Any] = {"blocks": [f"{b.world}, seed {b.seed}" for b in members], "cells": cells}
        entry["shared_end"] = [shared_end(x) for x in of]
        entry["differences"] = {
            f"{a} - {b}": {
                metric: {"average": difference(of, a, b, k, None)}
                | {str(at): d for at in AT if (d := difference(of, a, b, k, at))}
                for k, metric in enumerate(("acc", "mis"))
            }
            for a, b in PAIRS
        }
        result[name] = entry
    return result


# ---------- table and figure


def spread(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean and standard deviation as text."""
    sd = f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.{digits}f}{sd}"


def markdown(groups: Mapping[str, Any]) -> str:
    """The tables of docs/results.md: differences at equal KL first, then the cells they come from."""
    pairs, rows = [], []
    for name, group in groups.items():
        for pair, of in group["differences"].items():
            row = {"points at equal KL": f"{name} ({len(group['blocks'])} blocks): {pair}"}
            for metric in ("acc", "mis"):
                if d := of[metric]["average"]:
                    row[f"{metric.capitalize()}, average"] = f"{study._interval(d)}, {d['wins']}/{len(d['each'])} up"
            for at in ("0.5", "1.0", "2.0", "4.0"):
                if d := of["acc"].get(at):
                    row[f"Acc at {at.removesuffix('.0')} nats"] = f"{study._interval(d)} ({len(d['each'])})"
            pairs.append(row)
        if name in (*study.WORLDS, *HARD[:2]):
            continue
        rows.append({"": f"**{name}** ({len(group['blocks'])} blocks)"})
        for cell in group["cells"]:
            row = {"": TITLES[cell["method"]], "lr": f"{cell['lr']:g}" if cell["lr"] else ""}
            row |= {"KL, nats": spread(cell["kl"], 1, 2), "Acc": spread(cell["acc"]), "Mis": spread(cell["mis"])}
            rows.append(row | {"Acc at T = 1": spread(cell["acc_plain"])})
    return f"{table.markdown(pairs, missing='–')}\n\n{table.markdown(rows, missing='')}"


def best_table(groups: Mapping[str, Any]) -> str:
    """The table of `own_best`."""
    rows = [
        {"each at its own best rate": f"{name} ({len(group['blocks'])} blocks): {TITLES[method]}"}
        | {"lr": f"{row['lr']:g}" if row["lr"] else "", "KL, nats": f"{row['kl']:.2f}"}
        | {metric.capitalize(): study._interval(row[metric], "") for metric in ("acc", "mis")}
        | {f"MR-ALIGN ahead, {k}": study._interval(row[f"{k} ahead"]) for k in ("acc", "mis") if f"{k} ahead" in row}
        for name, group in groups.items()
        for method, row in group["methods"].items()
    ]
    return table.markdown(rows, missing="–")


def figure(done: Sequence[Block], path: Path) -> None:
    """Acc and Mis against KL with a band over blocks, the difference to the controls, and the null world."""
    worlds = [read_cells(b) for b in done if not b.null]
    null = [read_cells(b) for b in done if b.null]
    with style.context(["default", STYLE]):
        drawing = Figure(figsize=(13, 3.9), layout="constrained")
        axes = drawing.subplots(1, 3 + bool(null), squeeze=False)[0]
        for k, (ax, name) in enumerate(zip(axes, ("Acc", "Mis"), strict=False)):
            _curves(ax, worlds, k)
            ax.set_title(f"{name} on test questions, %", loc="left")
        _differences(axes[2], worlds)
        if null:
            _curves(axes[3], null, 0)
            axes[3].set_title("null world: Acc, %", loc="left")
        for ax in axes:
            ax.set_xlabel("KL(policy ‖ base), nats a completion")
            ax.set_xlim(left=0)
            ax.spines[["top", "right"]].set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=8.5)
        save(drawing, path)


def _curves(ax: Axes, of: Sequence[Cells], metric: int) -> None:
    """Every method's mean curve over blocks as far as all reach, with the standard deviation as a band; dots: cells."""
    for method in METHODS:
        curves = [curve(cells, method, metric) for cells in of]
        xs = np.linspace(0, min(c.kl[-1] for c in curves), GRID)
        lines = 100 * np.array([[c.at(x).mean() for x in xs] for c in curves])  # (blocks, GRID)
        colour = METHOD_COLOURS[method]
        ax.plot(xs, lines.mean(0), color=colour, lw=1.8, label=TITLES[method])
        if len(of) > 1:
            sd = lines.std(0, ddof=1)
            ax.fill_between(xs, lines.mean(0) - sd, lines.mean(0) + sd, color=colour, alpha=0.15, lw=0)
        for c in curves:
            ax.plot(c.kl[1:], 100 * c.values[1:].mean(1), ".", color=colour, markersize=3.5)
    points = [cells["sft", 0.0] for cells in of if ("sft", 0.0) in cells]
    if points:
        xs, ys = [p["kl"] for p in points], [100 * mean_of(p["facts"], metric) for p in points]
        ax.plot(xs, ys, "x", color=METHOD_COLOURS["sft"], markersize=4.5, label="SFT at its best rate")


def _differences(ax: Axes, of: Sequence[Cells]) -> None:
    """MR-ALIGN's Acc minus each control's at equal KL, with the 95 % interval over blocks and facts."""
    end = min(shared_end(cells) for cells in of)
    for _, other in PAIRS[:3]:
        xs = np.linspace(0, end, 25)
        found = [difference(of, "mralign", other, 0, float(x)) for x in xs]
        if not all(found):
            continue
        mean, low, high = (np.array([100 * d[key] for d in found]) for key in ("mean", "low", "high"))
        ax.plot(xs, mean, color=METHOD_COLOURS[other], lw=1.8)
        ax.fill_between(xs, low, high, color=METHOD_COLOURS[other], alpha=0.12, lw=0)
    ax.axhline(0, color=FAINT, lw=0.8)
    ax.set_title("MR-ALIGN minus what has that colour, Acc", loc="left")


# ---------- the command


def report(hard: bool = False) -> str:
    """Table, figure and JSON of what is there; returns the table."""
    name = "hard" if hard else "distance"
    done = [block for block in blocks(hard) if block.done()]
    cells = [record for b in done for record in read_cells(b).values()]
    groups = summary(done)
    text = markdown(groups)
    head = {"command": "python -m mini.distance" + " --hard" * hard, "blocks": len(done), "cells": len(cells)}
    head |= {"seeds": sorted({b.seed for b in done}), "rates": list(HARD_RATES if hard else RATES)}
    head |= {"rates of the null world": list(HARD_NULL_RATES if hard else NULL_RATES)}
    head |= {key: sorted({cell[key] for cell in cells}) for key in ("commit", "device", "versions")}
    head |= {"seconds": round(sum(cell["seconds"] for cell in cells))}
    dev = Block(HARD[0], 0, "dev")
    if hard and dev.done():
        of_dev = read_cells(dev)
        head["development"] = [
            {"method": method, "lr": rate, "kl": cell["kl"]}
            | {"acc": mean_of(cell["facts"], 0), "mis": mean_of(cell["facts"], 1)}
            for (method, rate), cell in of_dev.items()
        ]
        head["own best"] = own_best(blocks(hard), best_rates(of_dev))
        text = f"{best_table(head['own best'])}\n\n{text}"
    write_json(RESULTS / f"{name}.json", head | {"groups": groups})
    figure(done, RESULTS / f"{name}.svg")
    study.write_table(text, study.PAGE, (f"<!-- {name}:begin -->", f"<!-- {name}:end -->"))
    return text


def child(block: Block, most: int) -> Child:
    """The process of a block's first `most` rates."""
    words = ["-m", "mini.distance", "--block", f"{block.world}/{block.seed}", "--most", str(most)]
    return Child(block.out.name, block.out, lambda: words)


def run(jobs: int, hard: bool = False) -> int:
    """Every cell that is not there: three rates in all blocks, then the last. Returns an exit code."""
    for most in (3, len(RATES)):
        children = [child(block, most) for block in blocks(hard) if block.left(most)]
        if code := unfinished(run_all(children, jobs, OUT), children):
            return code
    return 0


@program
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time [2]")
    parser.add_argument("--block", metavar="WORLD/SEED", help="run one block only, in this process")
    parser.add_argument("--most", type=int, default=len(RATES), help="of this block: only so many rates [4]")
    parser.add_argument("--split", default="test", choices=("test", "dev"), help="of this block: the questions [test]")
    parser.add_argument("--report", action="store_true", help="only write table and figure of the cells that are there")
    parser.add_argument("--hard", action="store_true", help="the worlds of pairs instead")
    given = parser.parse_args(argv)
    if given.block:
        world, _, seed = given.block.partition("/")
        run_block(Block(world, int(seed), given.split), given.most)
        return 0
    if not given.report and (code := run(given.jobs, given.hard)):
        return code
    print(report(given.hard))
    return 0


if __name__ == "__main__":
    sys.exit(main())
