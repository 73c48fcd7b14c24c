"""How far two annotations of the same traces agree (Appendix B.3 to B.5).

An annotation gives every segment a set of labels (that of its step), so two annotators that merge segments differently
are compared segment by segment. Per pair of annotations:

  strict      share of segments with the same set
  entailment  share of segments where one set lies inside the other; the empty set only inside itself
  kappa       (p_o - p_e) / (1 - p_e): p_o the rate above, p_e the rate if both drew their sets independently from
              their own frequencies; under entailment p_e counts the pairs of sets that entail each other
  macro       all of these on the four macro strategies
  mean L1     mean over the cells of |P_a - P_b| between the two transition matrices (Eq. 13), in its own steps

Every number has a 95 % interval from resampling whole traces. Left out: agreement corrected for which segments are
hard, more than two annotations at once.

PAPER: kappa under entailment is printed within .001 of the rate itself, which a chance rate that counts entailing pairs
cannot give.  HERE: that chance rate, and beside it "kappa_entailment_strict_chance", the rate with the chance of strict
agreement.  WHY: the first is what kappa means, the second comes close to what the paper's table seems to hold.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

import em
from annotate import Step
from common.table import markdown

LabelSet = tuple[str, ...]  # sorted
MACRO_OF = {label: macro for macro, labels in em.TAXONOMY.items() for label in labels}
NONE = "(none)"


def segment_sets(steps: Sequence[Step]) -> list[LabelSet]:
    """The label set of every segment, in order; the steps cover all segments."""
    return [tuple(sorted(step.labels)) for step in steps for _ in step.segments]


def macro(labels: LabelSet) -> LabelSet:
    """The macro strategies of a label set."""
    return tuple(sorted({MACRO_OF[label] for label in labels}))


def entails(a: LabelSet, b: LabelSet) -> bool:
    """One set lies inside the other."""
    return a == b or bool(a) and bool(b) and (set(a) <= set(b) or set(b) <= set(a))


def rates(pairs: Sequence[tuple[LabelSet, LabelSet]], counts: np.ndarray) -> dict[str, np.ndarray]:
    """strict, entailment and their kappas, each (R,), of R weightings of the distinct pairs of sets.

    counts (R, len(pairs)): how often each pair was seen. kappa is nan where chance alone agrees always.
    """
    sets = sorted({s for pair in pairs for s in pair})
    index = {s: i for i, s in enumerate(sets)}
    first, second = ([index[pair[k]] for pair in pairs] for k in (0, 1))
    total = counts.sum(1)
    p_first, p_second = np.zeros((2, len(counts), len(sets)))
    for column, (i, j) in enumerate(zip(first, second, strict=True)):
        p_first[:, i] += counts[:, column] / total
        p_second[:, j] += counts[:, column] / total
    inside = np.array([[entails(s, t) for t in sets] for s in sets], dtype=float)
    strict = counts[:, [a == b for a, b in pairs]].sum(1) / total
    entailment = counts[:, [entails(a, b) for a, b in pairs]].sum(1) / total
    chance = (p_first * p_second).sum(1)
    chance_inside = np.einsum("ri,ij,rj->r", p_first, inside, p_second)

    def kappa(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
        return np.divide(
            observed - expected, 1 - expected, out=np.full(len(observed), np.nan), where=expected < 1 - 1e-12
        )

    return {
        "strict": strict,
        "entailment": entailment,
        "kappa_strict": kappa(strict, chance),
        "kappa_entailment": kappa(entailment, chance_inside),
        "kappa_entailment_strict_chance": kappa(entailment, chance),
    }


def confusion(pairs: Counter[tuple[LabelSet, LabelSet]]) -> dict[str, dict[str, float]]:
    """Row: label of the first annotation, column: of the second; "(none)" on either side.

    A label both give counts 1 on the diagonal. The others of a segment stand against each other: with m on one side and
    n on the other each of the m * n cells gets max(m, n) / (m * n); with none on the other side, 1 under "(none)".
    """
    table: dict[str, dict[str, float]] = {}

    def put(row: str, column: str, amount: float) -> None:
        cells = table.setdefault(row, {})
        cells[column] = cells.get(column, 0.0) + amount

    for (a, b), count in pairs.items():
        for label in {*a} & {*b}:
            put(label, label, count)
        rows, columns = sorted({*a} - {*b}) or [NONE], sorted({*b} - {*a}) or [NONE]
        if rows != columns:  # both (none): nothing is left over
            for row in rows:
                for column in columns:
                    put(row, column, count * max(len(rows), len(columns)) / (len(rows) * len(columns)))
    return {row: dict(sorted(cells.items(), key=lambda cell: -cell[1])) for row, cells in sorted(table.items())}


def histogram(annotation: Sequence[Sequence[Step]]) -> list[int]:
    """How many labels have a confidence in [0, 1), [1, 2), ..., [9, 10]."""
    values = [c for steps in annotation for step in steps for c in step.confidence]
    return [int(n) for n in np.histogram(values, bins=10, range=(0, 10))[0]]


def mean_l1(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over all cells of |a - b| (Eq. 13)."""
    return float(np.abs(a - b).mean())


def _resampled(n: int, resamples: int, seed: int) -> np.ndarray:
    """(1 + resamples, n): how often each of n traces is drawn; row 0 is the data as it is."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.vstack([np.ones((1, n)), drawn])


def _totals(per_trace: Sequence[Sequence[Any]], weight: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """(distinct things, (R, n_things) how often each occurs) when trace i counts weight[r, i] times."""
    things = sorted({thing for trace in per_trace for thing in trace})
    index = {thing: i for i, thing in enumerate(things)}
    what = np.array([index[thing] for trace in per_trace for thing in trace])
    owner = np.repeat(np.arange(len(per_trace)), [len(trace) for trace in per_trace])
    return things, np.stack([np.bincount(what, weights=w[owner], minlength=len(things)) for w in weight])


def compare(
    a: Sequence[Sequence[Step]], b: Sequence[Sequence[Step]], resamples: int = 500, seed: int = 0
) -> dict[str, Any]:
    """All numbers of a pair of annotations; a[i] and b[i] are the steps of trace i and cover all its segments.

    {"segments": n, "strict": {"value", "low", "high"}, ..., "macro": {...}, "mean_l1": {...}, "confusion": {...}}
    """
    assert len(a) == len(b) and a, (len(a), len(b))
    weight = _resampled(len(a), resamples, seed)
    per_trace = [list(zip(segment_sets(x), segment_sets(y), strict=True)) for x, y in zip(a, b, strict=True)]
    result: dict[str, Any] = {"segments": sum(map(len, per_trace))}
    result |= {name: _with_interval(values) for name, values in rates(*_totals(per_trace, weight)).items()}
    coarse = [[(macro(x), macro(y)) for x, y in trace] for trace in per_trace]
    result["macro"] = {name: _with_interval(values) for name, values in rates(*_totals(coarse, weight)).items()}
    result["mean_l1"] = _with_interval(_l1(a, b, weight), shifted=True)
    result["confusion"] = confusion(Counter(pair for trace in per_trace for pair in trace))
    return result


def _with_interval(values: np.ndarray, shifted: bool = False) -> dict[str, Any]:
    """values (1 + R,): the data's, then the resamples'. None where the number is not defined.

    shifted: move the resamples' interval onto the value. A distance between two matrices grows with the noise that
    resampling adds to both, so its plain interval would lie above it.
    """
    if np.isnan(values[0]):
        return {"value": None, "low": None, "high": None}
    drawn = values[1:] - (values[1:].mean() - values[0] if shifted else 0.0)
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return {"value": round(float(values[0]), 6), "low": round(float(low), 6), "high": round(float(high), 6)}


def _l1(a: Sequence[Sequence[Step]], b: Sequence[Sequence[Step]], weight: np.ndarray) -> np.ndarray:
    """(1 + R,) mean L1 between the matrices that each annotation gives, for every weighting of the traces."""
    fits = []
    for annotation in (a, b):
        moves, counts = _totals([em.observations([step.labels for step in steps]) for steps in annotation], weight)
        fits.append([em.fit(Counter(dict(zip(moves, row, strict=True)))).P for row in counts])
    return np.array([mean_l1(x, y) for x, y in zip(*fits, strict=True)])


def report(votes: dict[str, Sequence[Sequence[Step]]], resamples: int = 500, seed: int = 0) -> dict[str, Any]:
    """The agreement of all pairs of named annotations (a, b, final), their histograms, and what was escalated.

    votes: name -> the steps of every trace, the traces in the same order. "final" says by its sources who decided.
    """
    steps = [step for trace in votes["final"] for step in trace]
    sources = Counter(step.source for step in steps)
    escalated = [any(step.source in ("judge", "rejected") for step in trace) for trace in votes["final"]]
    return {
        "traces": len(votes["final"]),
        "steps": len(steps),
        "sources": dict(sources),
        "escalated_steps": round((sources["judge"] + sources["rejected"]) / len(steps), 6),
        "escalated_traces": round(sum(escalated) / len(escalated), 6),
        "confidence_histogram": {name: histogram(annotation) for name, annotation in votes.items()},
        "pairs": {f"{x} vs {y}": compare(votes[x], votes[y], resamples, seed) for x, y in combinations(votes, 2)},
    }


MEASURES = ("strict", "entailment", "kappa_strict", "kappa_entailment")
PAPER = {  # Tables 10 and 11, to compare with: the rows of `table` for a = GPT-4o, b = DeepSeek-chat
    "a vs b": (0.2846, 0.5380, 0.2824, 0.5366, 0.4926, 0.9217, 0.3213, 0.8953, 0.0132),
    "a vs final": (0.4043, 0.6205, 0.4025, 0.6194, 0.4213, 0.9682, 0.2778, 0.9604, 0.0109),
    "b vs final": (0.3630, 0.7855, 0.3611, 0.7849, 0.4836, 0.9782, 0.2943, 0.9702, 0.0103),
}


def table(result: dict[str, Any]) -> str:
    """The report of a, b and final as a table, with the paper's figures beside ours."""
    pairs = result["pairs"]
    levels = [("", name) for name in MEASURES] + [("macro", name) for name in MEASURES] + [("", "mean_l1")]
    rows = []
    for k, (level, name) in enumerate(levels):
        row = {"agreement by segment": f"{level} {name.replace('_', ' ')}".strip()}
        for pair, of in pairs.items():
            number = (of[level] if level else of)[name]
            row[f"{pair} [95 %]"] = "not defined"
            if number["value"] is not None:
                row[f"{pair} [95 %]"] = f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"
            row[f"{pair}, paper"] = f"{PAPER[pair][k]:.3f}"
        rows.append(row)
    by = ", ".join(f"{source} {count}" for source, count in sorted(result["sources"].items()))
    lines = [f"{result['traces']} traces, {result['steps']} steps ({by})"]
    steps, traces = result["escalated_steps"], result["escalated_traces"]
    lines.append(f"to the adjudicator: {steps:.1%} of the steps, {traces:.1%} of the traces")
    return "\n".join([markdown(rows), "", *lines])
