"""Do the weights see which moves matter? A run of the miniature held against what its world's moves really do.

    python -m mini.kinds runs/mini --world 0          a run in today's world 0
    python -m mini.kinds RUN --hard --world 0         in the world of pairs (hard.py)
    python -m mini.kinds --hard --world 0             no run: simulated traces alone

A world knows of every move (label before, label) whether it loses the gold, repairs a wrong candidate or does nothing
(`World.kind`). The table compares that with the two ratios the weights are made of (Eq. 10): P_pos / P, the weight of a
move in a chosen trace, and P_neg / P, its weight in a rejected one. A losing move should weigh less than 1 in chosen
and more than 1 in rejected traces, a repairing one the other way round; `wrong way` is the share of the moves where it
is not so. The mean is over the moves of the traces, so a frequent pair counts often.

`by opener` tells a confusion apart from credit. Take every trace as chosen to the degree to which the traces with the
same opener are chosen, and fit again: what is left of the ratio is what the openers alone explain. Where it is nearly
all of the ratio, the weights say which questions went right, not which moves did it.

The second part of the table has the same from simulated traces of the world, as many as --traces says, one draw of a
question at T = 1: what the ratios would be if traces were plenty.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import em
from common.endings import program
from common.files import ROOT, read_jsonl, write_json
from common.table import markdown
from mini.hard import HardWorld
from mini.world import GOLD, KEEPS, LOSES, REPAIRS, World

KINDS = (LOSES, REPAIRS, KEEPS)
RIGHT_SIGN = {LOSES: -1, REPAIRS: 1}  # of log(P_pos / P); log(P_neg / P) the other way


@dataclass(frozen=True)
class Labelled:
    """One chosen or rejected trace: the labels of its steps and the opener of its question."""

    labels: Sequence[tuple[str, ...]]
    chosen: bool
    opener: str


def of_run(run: Path, world: World) -> list[Labelled]:
    """The training rows of a run."""
    rows = read_jsonl(run / "train.jsonl", ("id", "prompt", "labels", "label"))
    openers = sorted(world.moods, key=len, reverse=True)
    found = []
    for row in rows:
        opener = next((name for name in openers if name in row["prompt"]), "")
        found.append(Labelled([tuple(x) for x in row["labels"]], row["label"], opener))
    return found


def simulated(world: World, n: int, seed: int = 0) -> list[Labelled]:
    """The chosen and rejected ones among n traces that the world writes: one a question, at T = 1."""
    rng = random.Random(f"kinds/{seed}")
    facts, openers, found = world.facts, list(world.moods), []
    for _ in range(n):
        fact, opener = rng.choice(facts), rng.choice(openers)
        trace = world.think_on(rng, fact, opener)
        misled = rng.random() < world.hidden[fact.id].misconception  # the answer without thinking is wrong
        right = trace.candidates[-1] == GOLD
        if right is misled:  # right with thinking alone is chosen, right without it alone is rejected
            found.append(Labelled([tuple(x) for x in trace.segment_labels], right, opener))
    return found


def moves(trace: Labelled) -> list[tuple[str, str]]:
    """(label before, label) of the moves between steps of one label each, from the first retrieval on."""
    start = next((i for i, labels in enumerate(trace.labels) if "retrieval" in labels), len(trace.labels))
    steps = trace.labels[start:]
    pairs = zip(steps, steps[1:], strict=False)
    return [(before[0], label[0]) for before, label in pairs if len(before) == len(label) == 1]


def matrices(traces: Sequence[Labelled]) -> dict[str, np.ndarray]:
    """P, P_pos, P_neg as a run fits them, and the two classes' matrices that the openers alone would give."""
    sides = {"P": (True, False), "P_pos": (True,), "P_neg": (False,)}
    found = {
        name: em.fit([o for t in traces if t.chosen in side for o in em.observations(t.labels)]).P
        for name, side in sides.items()
    }
    chosen: dict[str, list[bool]] = defaultdict(list)
    observed: dict[str, Counter[em.Observation]] = defaultdict(Counter)
    for t in traces:
        chosen[t.opener].append(t.chosen)
        observed[t.opener].update(em.observations(t.labels))
    share = {opener: sum(of) / len(of) for opener, of in chosen.items()}
    for name, side in (("by opener, pos", True), ("by opener, neg", False)):
        weighted: Counter[em.Observation] = Counter()
        for opener, counts in observed.items():
            for move, n in counts.items():
                weighted[move] += n * (share[opener] if side else 1 - share[opener])  # type: ignore[assignment]
        found[name] = em.fit(weighted).P
    return found


def table(traces: Sequence[Labelled], world: World) -> list[dict[str, Any]]:
    """One row a kind of move: how often it is, its mean log ratios in both classes, and where these are wrong."""
    P = matrices(traces)
    index = {label: i for i, label in enumerate(em.STATES)}
    counts = {side: Counter(m for t in traces if t.chosen is side for m in moves(t)) for side in (True, False)}
    total = {side: sum(counts[side].values()) for side in counts}
    rows = []
    for kind in KINDS:
        row: dict[str, Any] = {"kind": kind, "pairs": sum(world.kind(*m) == kind for m in counts[True] | counts[False])}
        for side, name, sign in ((True, "pos", 1), (False, "neg", -1)):
            of = {m: n for m, n in counts[side].items() if world.kind(*m) == kind}
            n = np.array(list(of.values()), dtype=float)
            at = tuple(np.array([[index[a], index[b]] for a, b in of], dtype=int).reshape(-1, 2).T)
            row[f"share, {name}"] = n.sum() / max(total[side], 1)
            if not len(n):
                continue
            ratio, opener = (np.log(P[x][at] / P["P"][at]) for x in (f"P_{name}", f"by opener, {name}"))
            row[f"log ratio, {name}"] = float(n @ ratio / n.sum())
            row[f"by opener, {name}"] = float(n @ opener / n.sum())
            if kind in RIGHT_SIGN:
                row[f"wrong way, {name}"] = float(n @ (ratio * sign * RIGHT_SIGN[kind] < 0) / n.sum())
        rows.append(row)
    return rows


def wrong_pairs(traces: Sequence[Labelled], world: World, most: int = 8) -> list[dict[str, Any]]:
    """The losing and repairing pairs whose ratios point the wrong way, the most frequent first."""
    P = matrices(traces)
    index = {label: i for i, label in enumerate(em.STATES)}
    counts = {side: Counter(m for t in traces if t.chosen is side for m in moves(t)) for side in (True, False)}
    found = []
    for before, label in dict((counts[True] + counts[False]).most_common()):
        kind = world.kind(before, label)
        at = index[before], index[label]
        pos, neg = (float(np.log(P[x][at] / P["P"][at])) for x in ("P_pos", "P_neg"))
        if kind in RIGHT_SIGN and pos * RIGHT_SIGN[kind] < 0:
            by = float(np.log(P["by opener, pos"][at] / P["P"][at]))
            row = {"move": f"{before} → {label}", "kind": kind, "seen, pos": counts[True][before, label]}
            row |= {"seen, neg": counts[False][before, label], "log P_pos / P": pos, "log P_neg / P": neg}
            found.append(row | {"by opener, pos": by})
    return found[:most]


def text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of docs/results.md."""

    def shown(value: Any, key: str) -> Any:
        if not isinstance(value, float):
            return value
        return f"{100 * value:.1f} %" if key.startswith(("share", "wrong")) else f"{value:+.3f}"

    rows = []
    for name, of in found.items():
        for row in of["kinds"]:
            head = {"": f"{name} ({of['chosen']} chosen, {of['rejected']} rejected)"}
            rows.append(head | {key: shown(value, key) for key, value in row.items()})
    pairs = [
        {"": name} | {k: shown(v, k) for k, v in row.items()} for name, of in found.items() for row in of["wrong pairs"]
    ]
    return "\n\n".join(markdown(part, missing="–") for part in (rows, pairs) if part)


def measure(traces: Sequence[Labelled], world: World) -> dict[str, Any]:
    """Everything the tables show, of one set of traces."""
    chosen = sum(t.chosen for t in traces)
    found = {"chosen": chosen, "rejected": len(traces) - chosen, "kinds": table(traces, world)}
    return found | {"wrong pairs": wrong_pairs(traces, world)}


def receipt(module: str, argv: Sequence[str] | None) -> dict[str, str]:
    """What ran where."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    facts = {"command": " ".join(["python -m", module, *(sys.argv[1:] if argv is None else argv)])}
    return facts | {"commit": commit, "device": f"{platform.machine()} CPU, {os.cpu_count()} cores"}


@program
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run, with train.jsonl; none: simulated traces")
    parser.add_argument("--world", type=int, default=0, help="seed of the run's world [0]")
    parser.add_argument("--null", action="store_true", help="the run's world is the null world")
    parser.add_argument("--hard", action="store_true", help="the run's world is the one of pairs (hard.py)")
    parser.add_argument("--traces", type=int, default=20000, help="simulated traces [20000]; 0: none")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args(argv)
    world = (HardWorld if args.hard else World)(args.world, args.null)
    found = {str(args.run): measure(of_run(args.run, world), world)} if args.run else {}
    if args.traces:
        found["simulated"] = measure(simulated(world, args.traces), world)
    if args.json:
        write_json(args.json, receipt("mini.kinds", argv) | {"seed": 0, "found": found})
    print(text(found))


if __name__ == "__main__":
    sys.exit(main())
