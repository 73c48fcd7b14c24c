"""Questions that the paper leaves open, answered on a run's own files. No model, no GPU, but for --train.

  python -m tools.questions compare RUN OTHER.jsonl         swap the annotator: do labels, P and w stay the same?
  python -m tools.questions sensitivity RUN                 do P and w hang on the damping, the prior, the iterations?
  python -m tools.questions stationarity RUN --by halves    is P the same early and late (or --by length, dataset)?
  python -m tools.questions traces RUN                      how many traces do the weights need?
  python -m tools.questions labels RUN                      what the annotator said, and where it had no fitting label
  python -m tools.questions grades JUDGED.jsonl OTHER.jsonl   two graders of the same answers, one of them by hand

RUN is a folder with candidates.jsonl and annotations.jsonl. OTHER.jsonl holds annotation records of the same candidates
or of some of them: another run's annotations.jsonl, or what a person left (tools/by_hand.py). Every command prints
tables; --json FILE keeps all numbers.

What another annotation, or another setting of EM, does to Acc and Mis is a training of its own each:

  python -m tools.questions compare RUN OTHER.jsonl --train CONFIG [--seeds 0,1,2] [any flag of mralign.py]
  python -m tools.questions sensitivity RUN --train CONFIG [--only "damping 1; prior 1"]

trains and evaluates with each, by tools/sweep.py, in RUN/questions/, on RUN's draws and labels; CONFIG holds RUN's
settings, and OTHER.jsonl has its manifest beside it. The table compares all with RUN's labels and the paper's settings.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import annotate
import em
from annotate import Step
from common.endings import program
from common.errors import InputError
from common.files import find, read_json, read_jsonl, write_json
from common.rows import check_row
from common.table import markdown
from llm import agreement
from report.analysis import bootstrap_counts
from tools import sweep

Labels = list[tuple[str, ...]]  # of the steps of one trace
Fit = Callable[[Iterable[em.Observation]], em.Transitions]
SUPPORT = 5.0  # moves that were seen fewer times than this are not named
RESAMPLES = 500


# ---------- what a run left


def read_run(run: Path) -> tuple[list[dict[str, Any]], dict[str, list[Step]]]:
    """The candidates of a run and the steps of each, by id."""
    candidates = read_jsonl(run / "candidates.jsonl", ("id", "chosen", "spans"), check_row)
    return candidates, annotate.read_steps(run / "annotations.jsonl", candidates)


def labels_of(steps: Sequence[Step]) -> Labels:
    """The labels of every step."""
    return [step.labels for step in steps]


def matrices(labels: Mapping[str, Labels], chosen: Mapping[str, bool], fit: Fit = em.fit) -> dict[str, np.ndarray]:
    """P, P_pos and P_neg, (17, 17) each, of labelled candidates."""
    sides = {"P": None, "P_pos": True, "P_neg": False}
    return {
        name: fit([o for key, of in labels.items() if side in (None, chosen[key]) for o in em.observations(of)]).P
        for name, side in sides.items()
    }


def weights(labels: Mapping[str, Labels], chosen: Mapping[str, bool], fit: Fit = em.fit) -> dict[str, list[float]]:
    """w of every step, by candidate (Eq. 10)."""
    P = matrices(labels, chosen, fit)
    return {k: em.segment_weights(of, P["P_pos" if chosen[k] else "P_neg"], P["P"]) for k, of in labels.items()}


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation; equal values share their mean rank. None where a side has one value only.

    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 6)
    0.8
    """
    ranks = []
    for values in (np.asarray(x, dtype=float), np.asarray(y, dtype=float)):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((count.cumsum() - (count - 1) / 2)[place])
    if any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def weights_apart(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], chosen: Mapping[str, bool]
) -> dict[str, dict[str, Any]]:
    """How far two weightings of the same places lie apart, for chosen and rejected candidates.

    a, b: candidate -> w of the same places in the same order. {n, spearman, mean difference of log w without its sign,
    opposite: share of places where one is above 1.05 and the other below 1 / 1.05}.
    """
    out = {}
    for name, side in (("chosen", True), ("rejected", False)):
        pairs = [pair for k in a if chosen[k] is side for pair in zip(a[k], b[k], strict=True)]
        if not pairs:
            continue
        x, y = np.log(np.array(pairs).T)
        edge = np.log(1.05)
        out[name] = {
            "n": len(pairs),
            "spearman": spearman(x, y),
            "log w apart": float(np.abs(x - y).mean()),
            "opposite": float(((np.minimum(x, y) < -edge) & (np.maximum(x, y) > edge)).mean()),
        }
    return out


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def _signed(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def apart_rows(found: Mapping[str, Mapping[str, Any]], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`weights_apart` as rows of a table."""
    return [
        {**head, "w of": name, "places": of["n"], "rank correlation": _signed(of["spearman"])}
        | {"log w apart, mean": f"{of['log w apart']:.3f}", "opposite sides of 1": _percent(of["opposite"])}
        for name, of in found.items()
    ]


# ---------- (a) another annotator


def per_segment(steps: Sequence[Step], w: Sequence[float]) -> list[float]:
    """The weight of every segment: that of its step."""
    return [x for step, x in zip(steps, w, strict=True) for _ in step.segments]


def compare(run: Path, other: Path, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Two annotations of the candidates that both have: agreement, distance of the matrices, weights side by side.

    Raises InputError when they have no candidate in common.
    """
    candidates, steps = read_run(run)
    have = {row["id"] for row in read_jsonl(other, ("id", "steps"))}
    shared = [c for c in candidates if c["id"] in have]
    if not shared:
        raise InputError(f"{other}: labels none of the candidates of {run}; give an annotation of the same run")
    theirs = annotate.read_steps(other, shared)
    chosen = {c["id"]: bool(c["chosen"]) for c in shared}
    sides = [{key: of[key] for key in chosen} for of in (steps, theirs)]
    labels = [{key: labels_of(s) for key, s in side.items()} for side in sides]
    fitted = [matrices(of, chosen) for of in labels]
    w = []
    for side, of in zip(sides, labels, strict=True):
        each = weights(of, chosen)
        w.append({key: per_segment(side[key], each[key]) for key in chosen})
    return {
        "candidates": len(shared),
        "agreement": agreement.compare(*(list(side.values()) for side in sides), resamples=resamples),
        "mean L1": {name: agreement.mean_l1(fitted[0][name], fitted[1][name]) for name in fitted[0]},
        "weights": weights_apart(w[0], w[1], chosen),
    }


def compare_text(found: Mapping[str, Any]) -> str:
    """`compare` as tables."""
    of = found["agreement"]
    rows = []
    for title, part in (("15 labels", of), ("4 macro strategies", of["macro"])):
        row = {"agreement by segment": title}
        for name in agreement.MEASURES:
            value = part[name]
            shown = "not defined" if value["value"] is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**value)
            row[name.replace("_", " ")] = shown
        rows.append(row)
    l1 = {"": "mean L1 between the matrices"} | {name: f"{x:.4f}" for name, x in found["mean L1"].items()}
    swapped = [
        {"of the first": row, "the second says": column, "segments": f"{n:.0f}"}
        for row, cells in of["confusion"].items()
        for column, n in cells.items()
        if row != column
    ]
    most = sorted(swapped, key=lambda row: -float(row["segments"]))[:10]
    head = f"{found['candidates']} candidates, {of['segments']} segments"
    parts = [head, markdown(rows), markdown([l1]), markdown(apart_rows(found["weights"], {})), markdown(most)]
    return "\n\n".join(part for part in parts if part)


# ---------- (b) the settings of EM


SETTINGS: tuple[tuple[str, dict[str, float]], ...] = (
    ("as in the paper: damping .6, prior .1, 5 iterations", {}),
    ("damping .2", {"damping": 0.2}),
    ("damping .4", {"damping": 0.4}),
    ("damping .8", {"damping": 0.8}),
    ("damping 1", {"damping": 1.0}),
    ("prior .01", {"prior": 0.01}),
    ("prior .5", {"prior": 0.5}),
    ("prior 1", {"prior": 1.0}),
    ("1 iteration", {"max_iter": 1}),
    ("2 iterations", {"max_iter": 2}),
    ("10 iterations", {"max_iter": 10}),
    ("200 iterations", {"max_iter": 200}),
    ("200 iterations, damping 1", {"max_iter": 200, "damping": 1.0}),
)


def sensitivity(labels: Mapping[str, Labels], chosen: Mapping[str, bool]) -> list[dict[str, Any]]:
    """For each of SETTINGS how far P and w lie from those of the paper's settings, and what share of w is clipped."""
    first_P, first_w = matrices(labels, chosen), weights(labels, chosen)
    out = []
    for name, settings in SETTINGS:

        def fit(obs: Iterable[em.Observation], settings: Mapping[str, Any] = settings) -> em.Transitions:
            return em.fit(obs, **settings)

        P, w = matrices(labels, chosen, fit), weights(labels, chosen, fit)
        flat = np.array([x for of in w.values() for x in of])
        out.append(
            {
                "settings": name,
                "mean L1": {side: agreement.mean_l1(P[side], first_P[side]) for side in P},
                "weights": weights_apart(first_w, w, chosen),
                "clipped": float(((flat <= em.CLIP[0]) | (flat >= em.CLIP[1])).mean()),
                "mean log w": float(np.abs(np.log(flat)).mean()),
            }
        )
    return out


def sensitivity_text(found: Sequence[Mapping[str, Any]]) -> str:
    """`sensitivity` as a table."""
    rows = []
    for of in found:
        row = {"settings": of["settings"]} | {f"L1 of {name}": f"{x:.4f}" for name, x in of["mean L1"].items()}
        for side, w in of["weights"].items():
            row[f"rank correlation, {side}"] = _signed(w["spearman"])
            row[f"opposite, {side}"] = _percent(w["opposite"])
        rows.append(row | {"mean of log w, no sign": f"{of['mean log w']:.3f}", "clipped": _percent(of["clipped"])})
    return markdown(rows)


# ---------- (c) is it one chain?


def inner(labels: Labels) -> list[em.Observation]:
    """The moves of a trace but those from <start> and to <stop>.

    There is one of each in every trace: where it ends is what its length, or its second half, means.
    """
    return [o for o in em.observations(labels) if o[0] != (0,) and o[1] != (len(em.STATES) - 1,)]


def halves(labels: Labels) -> tuple[list[em.Observation], list[em.Observation]]:
    """The inner moves of a trace's first half and of its second; of an odd number the middle one counts as early."""
    moves = inner(labels)
    cut = (len(moves) + 1) // 2
    return moves[:cut], moves[cut:]


def log_likelihood(counts: Mapping[em.Observation, float], P: np.ndarray) -> float:
    """Sum of log Pr(J | I, P) over the moves (Eq. 8), nats."""
    return sum(n * float(np.log(em.pair_prob(P, *move))) for move, n in counts.items() if n)


def divided(moves: Sequence[em.Observation], late: np.ndarray) -> dict[str, Any]:
    """How much better two chains explain some moves than one does.

    late (n,) bool: which of the two groups a move belongs to. {ratio: log-likelihood of both groups under matrices of
    their own minus that under a common one, nats; delta (17, 17): P of the late group minus P of the other}.
    """
    groups = [Counter(m for m, x in zip(moves, late, strict=True) if x == side) for side in (False, True)]
    fits = [em.fit(group).P for group in groups]
    common = em.fit(groups[0] + groups[1]).P
    own = sum(log_likelihood(group, P) for group, P in zip(groups, fits, strict=True))
    return {"ratio": own - log_likelihood(groups[0] + groups[1], common), "delta": fits[1] - fits[0]}


def permutation(
    moves: Sequence[em.Observation],
    late: np.ndarray,
    shuffle: Callable[[np.random.Generator], np.ndarray],
    n: int = 300,
    seed: int = 0,
) -> dict[str, Any]:
    """Test of `divided` against `n` other divisions, as `shuffle` draws them, of the same moves.

    {ratio, expected: mean ratio of the others, p: (1 + others as large) / (1 + n), moves: those whose difference is
    larger, in standard deviations over all divisions, than the largest of all moves in 95 % of them}. This division
    counts among them, so that all are alike where nothing differs: then the list is empty in 95 % of the cases.
    """
    found, rng = divided(moves, late), np.random.default_rng(seed)
    others = [divided(moves, shuffle(rng)) for _ in range(n)]
    ratios = np.array([o["ratio"] for o in others])
    deltas = np.array([found["delta"], *(o["delta"] for o in others)])
    support = em.fit(moves).C
    sd = deltas.std(0)
    usable = (support >= SUPPORT) & (sd > 0)
    scale = np.where(usable, sd, np.inf)
    largest = np.sort(np.abs((deltas - deltas.mean(0)) / scale).max((1, 2)))
    limit = float(largest[int(np.ceil(0.95 * (n + 1))) - 1])
    z = (found["delta"] - deltas.mean(0)) / scale
    named = [
        {"from": em.STATES[a], "to": em.STATES[b], "delta": float(found["delta"][a, b]), "z": float(z[a, b])}
        | {"seen": float(support[a, b])}
        for a, b in zip(*np.nonzero(np.abs(z) > limit), strict=True)
    ]
    named.sort(key=lambda move: -abs(move["z"]))
    p = (1 + int((ratios >= found["ratio"]).sum())) / (1 + n)
    result = {"moves in all": len(moves), "late": int(np.sum(late)), "ratio": found["ratio"]}
    return result | {"expected": float(ratios.mean()), "p": p, "divisions": n, "limit": limit, "moves": named}


def by_halves(labels: Sequence[Labels], n: int = 300, seed: int = 0) -> dict[str, Any]:
    """Is what follows a step the same in the first half of a thought as in the second?

    In a first-order chain it does not depend on the place, so early and late are permuted among the moves that leave
    the same set of labels: that early steps are other steps is not held against the chain.
    """
    moves: list[em.Observation] = []
    late: list[bool] = []
    for of in labels:
        for side, part in enumerate(halves(of)):
            moves += part
            late += [bool(side)] * len(part)
    groups = defaultdict(list)
    for k, (source, _) in enumerate(moves):
        groups[source].append(k)
    given = np.array(late)

    def shuffle(rng: np.random.Generator) -> np.ndarray:
        out = given.copy()
        for members in groups.values():
            out[members] = rng.permutation(given[members])
        return out

    return permutation(moves, given, shuffle, n, seed)


def by_trace(
    each: Sequence[Sequence[em.Observation]], second: Sequence[bool], n: int = 300, seed: int = 0
) -> dict[str, Any]:
    """Have two groups of traces one chain? Whole traces are permuted, so that a trace need not be a chain.

    each: the moves of every trace.
    """
    moves, given = [o for of in each for o in of], np.array(second)
    sizes = [len(of) for of in each]
    return permutation(moves, given.repeat(sizes), lambda rng: rng.permutation(given).repeat(sizes), n, seed)


def stationarity(
    candidates: Sequence[Mapping[str, Any]], labels: Mapping[str, Labels], by: str, n: int = 300
) -> dict[str, dict[str, Any]]:
    """The tests of one question, chosen and rejected candidates apart. Raises InputError where it does not apply."""
    out: dict[str, dict[str, Any]] = {}
    for name, side in (("chosen", True), ("rejected", False)):
        rows = [c for c in candidates if c["chosen"] is side]
        if not rows:
            continue
        of = [labels[c["id"]] for c in rows]
        if by == "halves":
            out[f"{name}: second half of a thought against the first"] = by_halves(of, n)
        elif by == "length":
            lengths = [len(x) for x in of]
            middle = float(np.median(lengths))
            second = [x > middle for x in lengths]
            if any(second):
                out[f"{name}: more than {middle:g} steps against fewer"] = by_trace([inner(x) for x in of], second, n)
        else:
            sets = [c.get("dataset") or c["id"].partition("/")[0] for c in rows]
            first, *others = [s for s, _ in Counter(sets).most_common()]
            if not others:
                raise InputError(f"all {name} candidates are of one data set, {first}; there is nothing to compare")
            for other in others:
                pair = [k for k, s in enumerate(sets) if s in (first, other)]
                second = [sets[k] == other for k in pair]
                out[f"{name}: {other} against {first}"] = by_trace([em.observations(of[k]) for k in pair], second, n)
    return out


def stationarity_text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """`stationarity` as tables."""
    rows, moves = [], []
    for name, of in found.items():
        rows.append(
            {"": name, "moves": of["moves in all"], "of these in the first named": of["late"]}
            | {"gain of two chains, nats": f"{of['ratio']:.1f}", "by chance": f"{of['expected']:.1f}"}
            | {"p": f"{of['p']:.3f}", "moves that differ": len(of["moves"])}
        )
        for m in of["moves"][:8]:
            title = f"{m['from']} → {m['to']}".replace("_", " ")
            moves.append(
                {"": name, "move": title, "P differs by": f"{100 * m['delta']:+.1f} points"}
                | {"standard deviations": f"{m['z']:+.1f}", "seen": f"{m['seen']:.0f} times"}
            )
    return "\n\n".join(part for part in (markdown(rows), markdown(moves)) if part)


# ---------- (e) how many traces


def trace_counts(
    labels: Mapping[str, Labels],
    chosen: Mapping[str, bool],
    shares: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0),
    n: int = 200,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How wide the intervals of w are with fewer traces, and, if new ones were like these, with more.

    For each share that many traces of either class are drawn with replacement, n times, and all three matrices fitted.
    Per class, every step of the run counting once: width: mean width of the 95 % interval of its w; sure: share of the
    steps whose interval leaves 1 out; rank: mean rank correlation of a resample's w with that of all traces.
    """
    sides = [[labels[k] for k in labels if chosen[k] is side] for side in (True, False)]
    if not all(sides):
        raise InputError("both chosen and rejected candidates are needed to compare weights")
    whole = matrices(labels, chosen)
    out = []
    for share in shares:
        sizes = [max(1, round(share * len(side))) for side in sides]
        drawn = [bootstrap_counts(side, n, seed + k, sizes[k]) for k, side in enumerate(sides)]
        fits = [(em.fit(p).P, em.fit(q).P, em.fit(p + q).P) for p, q in zip(*drawn, strict=True)]
        row: dict[str, Any] = {"share": share, "chosen traces": sizes[0], "rejected traces": sizes[1]}
        for k, (name, side, own) in enumerate((("chosen", True, "P_pos"), ("rejected", False, "P_neg"))):
            seen = Counter(m for x in sides[not side] for m in em.incoming(x) if m is not None)
            moves, times = list(seen), np.array(list(seen.values()), dtype=float)
            w = np.array([_move_weights(moves, P[k], P[2]) for P in fits])  # (n, moves)
            low, high = np.quantile(w, [0.025, 0.975], axis=0)
            first = np.repeat(_move_weights(moves, whole[own], whole["P"]), list(seen.values()))
            ranks = [spearman(np.repeat(x, list(seen.values())), first) for x in w]
            known = [r for r in ranks if r is not None]
            row[name] = {
                "width": float(times @ (high - low) / times.sum()),
                "sure": float(times @ ((low > 1) | (high < 1)) / times.sum()),
                "rank": float(np.mean(known)) if known else None,
            }
        out.append(row)
    return out


def _move_weights(moves: Sequence[em.Observation], own: np.ndarray, everything: np.ndarray) -> list[float]:
    """w of some moves (Eq. 10)."""
    ratios = [em.pair_prob(own, *m) / em.pair_prob(everything, *m) for m in moves]
    return np.clip(ratios, *em.CLIP).tolist()


def trace_text(found: Sequence[Mapping[str, Any]]) -> str:
    """`trace_counts` as a table."""
    rows = []
    for of in found:
        row = {"traces": f"{of['chosen traces']} chosen, {of['rejected traces']} rejected"}
        for side in ("chosen", "rejected"):
            part = of[side]
            row[f"width of w, {side}"] = f"{part['width']:.3f}"
            row[f"sure that w is not 1, {side}"] = _percent(part["sure"])
            row[f"rank correlation, {side}"] = _signed(part["rank"])
        rows.append(row)
    return markdown(rows)


# ---------- (d) do the labels fit?


def label_counts(candidates: Sequence[Mapping[str, Any]], labels: Mapping[str, Labels]) -> dict[str, dict[str, Any]]:
    """Data set (and "all") -> steps, share without a label and with two, share of every label among all labels."""
    groups: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for c in candidates:
        groups["all"] += labels[c["id"]]
        if c.get("dataset"):
            groups[c["dataset"]] += labels[c["id"]]
    out = {}
    for name, of in groups.items():
        counts = Counter(label for step in of for label in step)
        total = max(1, sum(counts.values()))
        out[name] = {"steps": len(of), "none": sum(not s for s in of) / len(of), "two": sum(len(s) == 2 for s in of)}
        out[name]["two"] /= len(of)
        out[name]["labels"] = {label: counts[label] / total for label in em.LABELS}
    return out


def label_text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """`label_counts` as tables."""
    rows = [
        {"candidates of": name, "steps": of["steps"], "no fitting label": _percent(of["none"])}
        | {"two labels": _percent(of["two"]), "labels in use": sum(x > 0 for x in of["labels"].values())}
        for name, of in found.items()
    ]
    shares = [
        {"share of all labels": label.replace("_", " ")}
        | {name: _percent(of["labels"][label]) for name, of in found.items()}
        for label in em.LABELS
    ]
    return f"{markdown(rows)}\n\n{markdown(shares)}"


# ---------- Acc and Mis after training with each alternative


FLAGS = {"damping": "em_damping", "prior": "em_prior", "max_iter": "em_iterations"}  # of em.fit -> of mralign.py


def alternatives(only: str) -> dict[str, dict[str, Any]]:
    """Name -> settings of mralign.py, for those of SETTINGS that `only` names ("": all); the paper's come first.

    Raises InputError at a name that is not one of them.
    """
    known = {name: {FLAGS[key]: value for key, value in of.items()} for name, of in SETTINGS}
    first, *others = known
    wanted = [part.strip() for part in only.split(";") if part.strip()] or others
    if unknown := [name for name in wanted if name not in others]:
        raise InputError(f"--only {unknown[0]!r} is not one of: {'; '.join(others)}")
    return {name: known[name] for name in (first, *(name for name in others if name in wanted))}


def train_each(
    run: Path, config: Path, name: str, runs: Mapping[str, Mapping[str, Any]], seeds: str, words: Sequence[str]
) -> dict[str, Any]:
    """Train and evaluate MR-ALIGN with each of `runs` (name -> settings); returns the sweep's result.

    config: the settings of `run`, whose draws are taken over, and whose labels all use that name no annotator. words:
    flags of tools/sweep.py and mralign.py. Raises InputError when a seed is no number or a run fails.
    """
    out = run.resolve() / "questions" / name
    base = out / "config.json"
    write_json(base, read_json(find(config)) | {"out": str(run.resolve())})
    each = {title: {"settings": {"method": "mralign"} | dict(of), "paper": {}} for title, of in runs.items()}
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {seeds!r} must be whole numbers with commas, for example 0,1,2") from None
    labelled = {"annotator": str(run.resolve() / "annotations.jsonl"), "label_eval": 0}
    file = {"base": str(base), "out": str(out), "settings": labelled, "seeds": numbers, "runs": each}
    write_json(out / "sweep-file.json", file)
    if sweep.main([str(out / "sweep-file.json"), *words]):
        raise InputError(f"{out}: not every run was finished; the same command goes on from there")
    return read_json(out / "sweep.json")


# ---------- two graders of answers


def grades(first: Path, second: Path, n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Agreement of two files of verdicts {id, draw, verdict} on the answers both have; 95 % intervals over questions.

    {answers, strict, kappa, confusion: grade of the first -> of the second -> answers}. Raises InputError when they
    share no answer.
    """
    read = [
        {(r["id"], r.get("draw", 0)): str(r["verdict"]) for r in read_jsonl(f, ("id", "verdict")) if r["verdict"]}
        for f in (first, second)
    ]
    keys = sorted(read[0].keys() & read[1].keys())
    if not keys:
        raise InputError(f"{second}: grades none of the answers of {first}; give grades of the same answers")
    by_question: dict[str, list[tuple[agreement.LabelSet, agreement.LabelSet]]] = defaultdict(list)
    for key in keys:
        by_question[key[0]].append(((read[0][key],), (read[1][key],)))
    pairs = sorted({pair for of in by_question.values() for pair in of})
    each = np.array([[Counter(of)[pair] for pair in pairs] for of in by_question.values()], dtype=float)
    rng = np.random.default_rng(seed)
    n = len(each)
    drawn = np.vstack([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=n_boot)]) @ each
    rates = agreement.rates(pairs, drawn)
    result: dict[str, Any] = {"answers": len(keys)}
    for name, key in (("strict", "strict"), ("kappa", "kappa_strict")):
        value, others = rates[key][0], rates[key][1:]
        known = others[~np.isnan(others)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) and not np.isnan(value) else (None, None)
        result[name] = [None if x is None or np.isnan(x) else float(x) for x in (value, low, high)]
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for key in keys:
        table[read[0][key]][read[1][key]] += 1
    return result | {"confusion": {row: dict(cells) for row, cells in sorted(table.items())}}


def grades_text(found: Mapping[str, Any]) -> str:
    """`grades` as tables."""
    shown = {
        name: "not defined" if found[name][0] is None else "{:.3f} [{:.3f}, {:.3f}]".format(*found[name])
        for name in ("strict", "kappa")
    }
    columns = sorted({c for cells in found["confusion"].values() for c in cells})
    rows = [
        {"first": row} | {f"second: {c}": cells.get(c, 0) for c in columns} for row, cells in found["confusion"].items()
    ]
    return f"{markdown([{'answers': found['answers']} | shown])}\n\n{markdown(rows)}"


# ---------- the command line


@program
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for name, files in (
        ("compare", ("run", "other")),
        ("sensitivity", ("run",)),
        ("stationarity", ("run",)),
        ("traces", ("run",)),
        ("labels", ("run",)),
        ("grades", ("first", "second")),
    ):
        one = commands.add_parser(name)
        for file in files:
            one.add_argument(file, type=Path)
        one.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
        if name in ("compare", "sensitivity"):
            one.add_argument("--train", type=Path, metavar="CONFIG", help="train with each too; CONFIG: RUN's settings")
            one.add_argument("--seeds", default="0", help="of these trainings, with commas; RUN's first [0]")
            one.set_defaults(only="")
        if name == "sensitivity":
            one.add_argument("--only", default="", metavar="NAMES", help="train only these rows, with semicolons")
        if name == "stationarity":
            one.add_argument("--by", choices=("halves", "length", "dataset"), default="halves", help="[halves]")
            one.add_argument("--divisions", type=int, default=300, help="random divisions of the test [300]")
    given, words = parser.parse_known_args(argv)
    if words and not getattr(given, "train", None):
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    found: Any
    if given.question == "compare":
        found = compare(given.run, given.other)
        text = compare_text(found)
    elif given.question == "grades":
        found = grades(given.first, given.second)
        text = grades_text(found)
    else:
        candidates, steps = read_run(given.run)
        labels = {key: labels_of(of) for key, of in steps.items()}
        chosen = {c["id"]: bool(c["chosen"]) for c in candidates}
        if given.question == "sensitivity":
            found = sensitivity(labels, chosen)
            text = sensitivity_text(found)
        elif given.question == "traces":
            found = trace_counts(labels, chosen)
            text = trace_text(found)
        elif given.question == "labels":
            found = label_counts(candidates, labels)
            text = label_text(found)
        else:
            found = stationarity(candidates, labels, given.by, given.divisions)
            text = stationarity_text(found)
    print(text)
    answer = {"question": given.question, "answer": found}
    if getattr(given, "train", None):
        swapped = {"the run's labels": {}}
        if given.question == "compare":
            swapped["the other labels"] = {"annotator": str(given.other.resolve())}
        runs = swapped if given.question == "compare" else alternatives(given.only)
        answer["trained"] = train_each(given.run, given.train, given.question, runs, given.seeds, words)
    if given.json:
        write_json(given.json, answer)


if __name__ == "__main__":
    sys.exit(main())
