"""Ambiguous labels: what Table 3 says when steps carry two labels as often as the paper's, and the truth is known.

  python -m mini.ambiguous [--jobs 2] [--no-training]

The cue phrases say which label every step of the miniature's candidates has. Here they are the truth and label nothing:
two scripted annotators and an adjudicator answer behind a server on this machine, as mini/rehearsal_server.py plays
them, and the pipeline asks them as it asks real ones (--annotator committee). They confuse labels by matrices that
differ, and mostly give two labels a step. Merged, a step has two as often as in the paper: 83,249 labels (Table 7) on
6,973 thoughts of 12,294 / 2,000 = 6.15 steps (B.3) are 1.94 a step.

  truth       labels of the cue phrases, EM; with kto, which has no weights, on the same draws
  em          the committee's labels, as the paper does it
  frequency   Table 3: counts split evenly instead of EM
  one label   Table 3: the most confident label of a step
  alone       annotator a, or b, without a committee: matrices only

Two panels label: in one, annotators mostly confuse a step with the same other label, as where a text is ambiguous; in
the other each has errors of its own (matrices only). The habits were set by the share of two labels and by Table 10,
before any matrix was fitted. What is finished is not done again.
"""

import argparse
import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import annotate
import em
import eval as evaluation
from annotate import Step
from common import hub
from common.endings import program
from common.files import ROOT, read_json, read_jsonl, write_json
from common.ranks import process_group
from common.settings import from_json
from common.table import markdown
from llm import agreement
from mini import study
from mini.rehearsal_server import Habit, Panel, Server
from pipeline import reporting
from pipeline.config import RunConfig
from pipeline.run import Run
from tools import questions
from tools.sweep import Child, flag, run_all, unfinished

OUT = ROOT / "runs" / "ambiguous"
RESULT = ROOT / "docs" / "results" / "ambiguous.json"
MARKS = ("<!-- ambiguous:begin -->", "<!-- ambiguous:end -->")
CUES = ROOT / "mini" / "cues.json"
MODEL = ROOT / "mini" / "model"
TEST = "test=mini/questions/test.jsonl"
SHARED, OWN = "one other label", "errors of their own"
PANELS = {SHARED: 0.8, OWN: 0.0}  # panel -> share of the errors that all annotators incline to
HABITS = {"annotator-a": (0.9, 0.95), "annotator-b": (0.8, 0.8), "adjudicator": (0.9, 0.95)}  # right, second
ROLES = {"a": "annotator-a", "b": "annotator-b", "judge": "adjudicator"}
ESTIMATES: dict[str, dict[str, str]] = {
    "em": {},
    "frequency": {"transitions": "frequency"},
    "one label": {"labels": "one"},
}
PAPER = {"two": 83249 / (6973 * 12294 / 2000) - 1, "a - b": (0.2846, 0.5380), "final - a": (0.4043, 0.6205)}
PAPER |= {"final - b": (0.3630, 0.7855)}  # Table 10; a is GPT-4o
RATES = {3e-4: (0, 1, 2), 6e-4: (0,)}  # learning rate -> seeds; at 6e-4 all methods reach the ceiling
RESAMPLES = 200

Labels = dict[str, questions.Labels]  # candidate -> labels of every step


def truth() -> Any:
    """text of a segment -> its true labels."""
    annotator = annotate.CueAnnotator(annotate.read_cues(CUES))
    return functools.cache(lambda text: annotator.label("", [text])[0].labels)


def panel(shared: float) -> Panel:
    """The annotators; shared: of their errors."""
    return Panel({name: Habit(right, second, shared) for name, (right, second) in HABITS.items()}, truth())


# ---------- runs


@dataclass(frozen=True)
class Cell:
    """A run of the pipeline. panel: who labels, "" for the cue phrases; estimate: of ESTIMATES."""

    panel: str
    estimate: str
    seed: int
    lr: float

    @property
    def out(self) -> Path:
        name = f"{self.panel or 'truth'}-{self.estimate}-lr{self.lr:g}-seed{self.seed}"
        return OUT / name.replace(" ", "-")

    @property
    def methods(self) -> str:
        return "mralign" if self.panel else "kto,mralign"


def cells() -> list[Cell]:
    """All runs, those first from which others borrow."""
    out = []
    for lr, seeds in RATES.items():
        for seed in seeds:
            out += [Cell("", "em", seed, lr), *(Cell(SHARED, name, seed, lr) for name in ESTIMATES)]
    return [out[0], Cell(OWN, "em", 0, out[0].lr), *out[1:]]


def lenders(cell: Cell) -> list[Path]:
    """The runs that lend it draws, and labels where it has the same; the last one comes before it."""
    first = next(iter(RATES))
    cells = [Cell("", "em", cell.seed, first), Cell(cell.panel, "em", cell.seed, first)]
    if cell == cells[0]:
        return [ROOT / "runs" / "distance" / f"world0-seed{cell.seed}", study.Cell("world 0", cell.seed).out]
    return list(dict.fromkeys(other.out for other in cells if other != cell))


def child(cell: Cell, urls: Mapping[str, str], training: bool) -> Child:
    """The process of a run. urls: panel -> its server."""
    others = lenders(cell)
    settings: dict[str, Any] = {"seed": cell.seed, "lr": cell.lr, "method": cell.methods, "eval_sets": TEST}
    settings |= {"out": cell.out, "reuse_from": ",".join(str(path) for path in others if path.is_dir())}
    if cell.panel:
        names = zip(("annotator_a", "annotator_b", "adjudicator"), ROLES.values(), strict=True)
        settings |= {"annotator": "committee"} | {key: f"{name}@{urls[cell.panel]}" for key, name in names}
        settings |= ESTIMATES[cell.estimate]
    words = [str(ROOT / "mralign.py"), "--config", str(ROOT / "configs" / "mini.json"), "--resume"]
    words += [word for setting in settings.items() for word in flag(*setting)]
    words += ["sample", "candidates", "annotate", "fit"]
    words += ["train", "eval"] if training and cell.panel != OWN else []
    return Child(cell.out.name, cell.out, lambda: words, others[-1].name if others[-1].parent == OUT else "")


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Inside, every panel answers; panel -> address. The ports stay, since a run's labels depend on the address."""
    file = OUT / "servers.json"
    ports = read_json(file) if file.exists() else {}
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, shared in PANELS.items():
            server = stack.enter_context(Server(MODEL, ports.get(name, 0), panel(shared)))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            ports[name], urls[name] = server.server_address[1], server.url
        write_json(file, ports)
        yield urls


# ---------- labels held against the truth


def true_labels(candidates: Sequence[Mapping[str, Any]]) -> Labels:
    """The labels of the cue phrases, a step a segment."""
    of = truth()
    return {c["id"]: [of(c["completion"][a:b]) for a, b in c["spans"]] for c in candidates}


def rightness(steps: Mapping[str, Sequence[Step]], true: Labels) -> dict[str, float]:
    """Shares of the segments with one true label: two labels given; the true one among them; most confident; alone.

    A segment without a given label counts as wrong.
    """
    counts = np.zeros(5)
    for key, of in steps.items():
        first = em.one_label([s.labels for s in of], [s.confidence for s in of])
        each = [(step.labels, one) for step, one in zip(of, first, strict=True) for _ in step.segments]
        for (labels, one), right in zip(each, true[key], strict=True):
            if len(right) == 1:
                found = len(labels) == 2, right[0] in labels, one == right, labels == right
                counts += [1, *found]
    names = ("two labels", "true label among them", "most confident is true", "true label alone")
    return dict(zip(names, (counts[1:] / counts[0]).tolist(), strict=True))


def alone(votes: Sequence[Mapping[str, Any]], role: str) -> dict[str, list[Step]]:
    """What one annotator said, from votes.jsonl; traces of which it made nothing are left out."""
    fields = ("segments", "labels", "confidence")
    said = {row["id"]: row[role] for row in votes if row[role] is not None}
    return {key: [Step(*(tuple(s[k]) for k in fields), role) for s in of] for key, of in said.items()}


# ---------- matrices and weights held against the true ones


def estimates(steps: Mapping[str, Sequence[Step]]) -> dict[str, tuple[Labels, questions.Fit]]:
    """estimate -> (labels of every step, how P is fitted)."""
    two = {key: questions.labels_of(of) for key, of in steps.items()}
    one = {key: em.one_label(two[key], [s.confidence for s in of]) for key, of in steps.items()}
    return {"em": (two, em.fit), "frequency": (two, em.frequency), "one label": (one, em.fit)}


class Estimate:
    """P and w from labels of traces, each of which may count several times.

    labels: trace -> labels of every step; sizes: trace -> number of segments of every step; chosen: trace -> class.
    """

    def __init__(
        self, labels: Labels, fit: questions.Fit, sizes: Mapping[str, Sequence[int]], chosen: Mapping[str, bool]
    ) -> None:
        self.fit, self.chosen = fit, np.array([chosen[key] for key in labels])
        seen = [Counter(em.observations(of)) for of in labels.values()]
        into = [em.incoming(of) for of in labels.values()]
        self.moves = sorted({move for counts in seen for move in counts})
        place = {move: k for k, move in enumerate(self.moves)} | {None: len(self.moves)}
        self.counts = np.array([[counts[move] for move in self.moves] for counts in seen])  # (traces, moves)
        steps = [np.repeat([place[m] for m in of], sizes[key]) for key, of in zip(labels, into, strict=True)]
        self.step_into = np.concatenate(steps).astype(int)  # of every segment
        self.trace = np.repeat(np.arange(len(steps)), [len(of) for of in steps])

    def matrices(self, times: np.ndarray) -> dict[str, np.ndarray]:
        """P, P_pos, P_neg when trace i counts times[i] times."""
        sides = {"P": np.ones(len(times), dtype=bool), "P_pos": self.chosen, "P_neg": ~self.chosen}
        totals = {name: (times * side) @ self.counts for name, side in sides.items()}
        return {
            name: self.fit(Counter({m: int(n) for m, n in zip(self.moves, of, strict=True) if n})).P
            for name, of in totals.items()
        }

    def log_weights(self, P: Mapping[str, np.ndarray]) -> np.ndarray:
        """log w of every segment: that of its step (Eq. 10)."""
        of_class = [np.log([*questions._move_weights(self.moves, P[own], P["P"]), 1.0]) for own in ("P_neg", "P_pos")]
        return np.where(self.chosen[self.trace], of_class[1][self.step_into], of_class[0][self.step_into])


def measure(estimate: Estimate, true: Estimate, times: np.ndarray) -> dict[str, float]:
    """Distances of an estimate from the truth when trace i counts times[i] times.

    {P, P_pos, P_neg: mean L1 (Eq. 13); chosen, rejected: rank correlation of w with the true w over segments; spread,
    true spread: mean of log w without its sign}.
    """
    P, Q = estimate.matrices(times), true.matrices(times)
    out = {name: agreement.mean_l1(P[name], Q[name]) for name in P}
    weight = times[true.trace]
    logs = [of.log_weights(fitted) for of, fitted in ((estimate, P), (true, Q))]
    for name, side in (("chosen", True), ("rejected", False)):
        repeats = weight * (true.chosen[true.trace] == side)
        out[name] = questions.spearman(*(np.repeat(x, repeats) for x in logs)) or 0.0
    spread, true_spread = (float(np.average(np.abs(x), weights=weight)) for x in logs)
    return out | {"spread": spread, "true spread": true_spread}


def resampled(n: int, seed: int = 0) -> list[np.ndarray]:
    """How often each of n traces is drawn: once each, then RESAMPLES times at random."""
    rng = np.random.default_rng(seed)
    return [np.ones(n, dtype=int), *rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)]


def interval(values: Sequence[float]) -> dict[str, float]:
    """values: of the data, then of resamples, whose interval is moved onto the value (llm/agreement.py says why)."""
    drawn = np.array(values[1:])
    low, high = np.quantile(drawn - (drawn.mean() - values[0]), (0.025, 0.975)).tolist()
    return {"value": values[0], "low": low, "high": high}


def held_against_truth(run: Path) -> dict[str, Any]:
    """Labels, matrices and weights of a finished run beside the true ones; 95 % intervals draw whole traces."""
    candidates = read_jsonl(run / "candidates.jsonl", ("id", "chosen", "spans"))
    steps = annotate.read_steps(run / "annotations.jsonl", candidates)
    votes = read_jsonl(run / "annotation" / "votes.jsonl")
    true = true_labels(candidates)
    chosen = {c["id"]: bool(c["chosen"]) for c in candidates}
    said = {"annotator a": alone(votes, "a"), "annotator b": alone(votes, "b"), "merged": steps}
    both = sorted(set.intersection(*({*of} for of in said.values())))  # one annotator may have been silent on a trace
    tries = {name: (said["merged"], *of) for name, of in estimates(steps).items()}
    tries |= {f"{name}, alone": (said[name], *estimates(said[name])["em"]) for name in ("annotator a", "annotator b")}
    found: dict[str, list[dict[str, float]]] = {}
    draws = resampled(len(both))
    right = Estimate({key: true[key] for key in both}, em.fit, {key: [1] * len(true[key]) for key in both}, chosen)
    for name, (of, labels, fit) in tries.items():
        sizes = {key: [len(step.segments) for step in of[key]] for key in both}
        estimate = Estimate({key: labels[key] for key in both}, fit, sizes, chosen)
        found[name] = [measure(estimate, right, times) for times in draws]
    distances = {name: {key: interval([x[key] for x in of]) for key in of[0]} for name, of in found.items()}
    apart = {
        f"{name} - em": {
            key: interval([x[key] - y[key] for x, y in zip(found[name], found["em"], strict=True)])
            for key in ("P", "P_pos", "P_neg", "chosen", "rejected")
        }
        for name in found
        if name != "em"
    }
    pairs = {"a - b": ("annotator a", "annotator b"), "final - a": ("merged", "annotator a")}
    pairs |= {"final - b": ("merged", "annotator b")}
    agree = {
        name: {
            key: value
            for key, value in agreement.compare(
                *([said[x][k] for k in both] for x in pair), resamples=RESAMPLES
            ).items()
            if key in (*agreement.MEASURES, "mean_l1")
        }
        for name, pair in pairs.items()
    }
    return {
        "candidates": {"chosen": sum(chosen.values()), "rejected": len(chosen) - sum(chosen.values())},
        "compared": len(both),
        "labels": {name: rightness({k: of[k] for k in both}, true) for name, of in said.items()},
        "agreement": agree,
        "distance": distances,
        "difference": apart,
    }


# ---------- after training


def finished(cell: Cell) -> bool:
    """Is it trained and sampled, or not to be trained?"""
    receipts = [cell.out / "done" / f"eval-{method}-test.json" for method in cell.methods.split(",")]
    return cell.panel == OWN or all(path.exists() for path in receipts)


def trained() -> dict[str, Any]:
    """rate -> {seeds: finished ones, settings: name -> acc, mis of every seed, differences to em: mean, low, high}."""
    out: dict[str, Any] = {}
    for lr, planned in RATES.items():
        seeds = [
            seed for seed in planned if all(finished(cell) for cell in cells() if (cell.seed, cell.lr) == (seed, lr))
        ]
        if not seeds:
            continue
        of: dict[str, dict[str, list[dict[str, float]]]] = {}
        for seed in seeds:
            runs = {"thinkon": (Cell("", "em", seed, lr), "thinkon"), "kto": (Cell("", "em", seed, lr), "kto")}
            runs["truth"] = (Cell("", "em", seed, lr), "mralign")
            runs |= {name: (Cell(SHARED, name, seed, lr), "mralign") for name in ESTIMATES}
            for name, (cell, setting) in runs.items():
                rows = [evaluation.score(r) for r in read_jsonl(cell.out / "eval" / "test" / f"{setting}.jsonl")]
                for metric in ("acc", "mis"):
                    of.setdefault(name, {}).setdefault(metric, []).append(study.by_fact(rows, metric))
        table: dict[str, Any] = {"seeds": list(seeds), "settings": {}, "differences": {}}
        for name, metrics in of.items():
            table["settings"][name] = {
                metric: [float(np.mean(list(one.values()))) for one in each] for metric, each in metrics.items()
            }
        for name in ("truth", "frequency", "one label", "kto"):
            table["differences"][f"{name} - em"] = {}
            for metric in ("acc", "mis"):
                pairs = zip(of[name][metric], of["em"][metric], strict=True)
                each = np.array([[x[f] - y[f] for f in x] for x, y in pairs])
                mean, low, high = study.crossed_bootstrap(each)
                table["differences"][f"{name} - em"][metric] = {"mean": mean, "low": low, "high": high}
        out[f"{lr:g}"] = table
    return out


# ---------- the page


def machine() -> dict[str, Any]:
    """Commit, device and versions."""
    cfg = RunConfig(**from_json(RunConfig, str(ROOT / "configs" / "mini.json")))
    with process_group() as ranks:
        made = reporting.provenance(Run(cfg, hub.locate(str(MODEL)), ranks))
    return {key: made[key] for key in ("commit", "device", "versions")}


def shown(of: Mapping[str, float], scale: float = 1.0, digits: int = 3) -> str:
    """A value with its interval."""
    return "{} [{}, {}]".format(*(f"{scale * of[key]:.{digits}f}" for key in ("value", "low", "high")))


def text(result: Mapping[str, Any]) -> str:
    """The tables of docs/results.md."""
    parts = []
    for name, of in result["panels"].items():
        rows = [
            {f"labels, panel: {name}": who} | {key: f"{100 * x:.1f} %" for key, x in shares.items()}
            for who, shares in of["labels"].items()
        ]
        parts.append(markdown(rows))
        rows = []
        for pair, measures in of["agreement"].items():
            row = {f"agreement, panel: {name}": pair}
            row |= {key.replace("_", " "): shown(measures[key]) for key in ("strict", "entailment", "kappa_strict")}
            row |= {"mean L1 of P, %": shown(measures["mean_l1"], 100, 2)}
            rows.append(row | {"paper: strict, entailment": ", ".join(f"{x:.3f}" for x in PAPER[pair])})
        parts.append(markdown(rows))
        rows = []
        for estimate, found in of["distance"].items():
            row = {f"against the truth, panel: {name}": estimate}
            row |= {f"L1 of {key}, %": shown(found[key], 100, 2) for key in ("P", "P_pos", "P_neg")}
            row |= {f"rank correlation of w, {side}": shown(found[side]) for side in ("chosen", "rejected")}
            spread, true = found["spread"]["value"], found["true spread"]["value"]
            rows.append(row | {"mean of log w, no sign (true)": f"{spread:.3f} ({true:.3f})"})
        parts.append(markdown(rows))
    rows = []
    for lr, of in result["trained"].items():
        for name, metrics in of["settings"].items():
            row = {"trained on": name, "rate": lr, "seeds": len(of["seeds"])}
            for metric, values in metrics.items():
                sd = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                row[metric.capitalize()] = f"{100 * np.mean(values):.1f}{sd}"
                d = of["differences"].get(f"{name} - em", {}).get(metric)
                row[f"{metric.capitalize()} − em"] = study._interval(d) if d else "–"
            rows.append(row)
    return "\n\n".join([*parts, markdown(rows)])


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Do what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side [2]")
    parser.add_argument("--no-training", action="store_true", help="labels and matrices only")
    given = parser.parse_args(argv)
    first = next(iter(RATES))
    labelled = [Cell(name, "em", 0, first) for name in ("", *PANELS)]
    with servers() as urls:
        wanted = [cell for cell in cells() if not given.no_training or cell in labelled]
        children = [child(cell, urls, not given.no_training) for cell in wanted]
        ends = run_all(children, given.jobs, OUT)
    if code := unfinished(ends, children):
        return code
    result = {
        "command": " ".join(["python -m mini.ambiguous", *(sys.argv[1:] if argv is None else argv)]),
        **machine(),
        "rates and seeds": {f"{lr:g}": list(seeds) for lr, seeds in RATES.items()},
        "habits (share right, share of steps with one label more)": HABITS,
        "panels (share of the errors that all incline to)": PANELS,
        "paper": PAPER,
        "panels": {name: held_against_truth(Cell(name, "em", 0, first).out) for name in PANELS},
        "trained": trained(),
    }
    write_json(RESULT, result)
    study.write_table(text(result), marks=MARKS)
    print(text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
