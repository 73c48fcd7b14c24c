"""What lies behind the headline: where the right answer is lost, who gains, how the thinking changed, what w does.

All from files that a run left: samples, their labels, transitions.json, train.jsonl. Every function returns JSON values
that the tables and figures (charts.py, report.py) show as they are.

  positions          where in the thought the gold comes up first and last, for right and wrong answers (Fig. 1)
  strata             gain over the base model where its thought and answer were both right, both wrong, apart (Fig. 5)
  label_outcomes     Acc of the traces with and without each label, and of the commonest moves
  change             P after alignment minus P before, the ten largest each way (Fig. 4)
  matrix_intervals   bootstrap intervals of every P_ij and w_ij
  weight_bound       how far a weight can be from the true one, given how far the matrices are (Eq. 14 and 15)
  weight_audit       what the weights do to the training rows: clips, means, share of thought and answer

Left out: anything that needs a model, a judge or a server.
"""

import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import annotate
import data
import em
import eval as evaluation
from common.errors import InputError
from common.tokens import token_offsets

N_BOOT = 200
STRATA = ("both correct", "both wrong", "inconsistent")
TOP = 10  # moves shown each way (Fig. 4)
SUPPORT = 10.0  # fewest soft counts of leaving a state, before and after, for its moves to be ranked
Labels = list[tuple[str, ...]]  # of one trace: the 0-2 labels of every step


# ---------- Fig. 1


def positions(samples: Iterable[Mapping[str, Any]], matcher: str = "equal", fold: bool = False) -> dict[str, Any]:
    """Where a gold stands in the thought, percent of its length: {"right": {n, first, last}, "wrong": ..., "left_out"}.

    first, last: mean start of the first and of the last occurrence, in characters of the normalised thought, over the
    finished completions whose thought holds a gold; right: the answer is a gold too. None where there is none.
    left_out: completions that are cut short, or whose thought holds no gold.
    """
    places: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    left_out = 0
    for sample in samples:
        parsed = data.parse_sample(sample)
        place = _place(parsed.thought, sample["answers"], fold)
        if place is None or sample["finish"] != "stop" or parsed.outcome == "no_close":
            left_out += 1
        else:
            places[data.MATCHERS[matcher](parsed.answer, sample["answers"], fold)].append(place)
    out: dict[str, Any] = {"left_out": left_out}
    for name, side in (("right", True), ("wrong", False)):
        found = np.array(places[side]).reshape(-1, 2)
        first, last = found.mean(0).tolist() if len(found) else (None, None)
        out[name] = {"n": len(found), "first": first, "last": last}
    return out


def _place(thought: str, golds: Sequence[str], fold: bool) -> tuple[float, float] | None:
    """Percent of the normalised thought before the first and before the last gold in it; None without one."""
    text = data.normalise(thought, fold)
    inside = [g for g in (data.normalise(gold, fold) for gold in golds) if g and g in text]
    if not inside:
        return None
    first, last = min(text.find(g) for g in inside), max(text.rfind(g) for g in inside)
    return 100 * first / len(text), 100 * last / len(text)


# ---------- Fig. 5


def strata(
    base: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    matcher: str = "equal",
    n_boot: int = 10_000,
) -> dict[str, dict[str, Any]]:
    """Acc of `other` minus Acc of `base` in each stratum of the base's own completions (Section 4.4).

    base, other: scored rows with thinking on, the same questions and draws. Each draw is stratified by itself.
    Returns stratum -> {n, gain, low, high, chance, draws}: mean over all rows, an interval by bootstrap over questions,
    and the gain in every draw. chance: the gain of the base's next draw over this one, which is what picking a stratum
    by a noisy draw gives to a model that has not changed; None with a single draw. gain is None in an empty stratum.
    """
    mine, theirs = _by_draw(base, matcher), _by_draw(other, matcher)
    if odd := sorted(mine.keys() ^ theirs.keys()):
        raise InputError(f"evaluation: {odd[0][0]!r} was scored in one run only; evaluate both on the same questions")
    draws = sorted({draw for _, draw in mine})
    out: dict[str, dict[str, Any]] = {}
    for stratum in STRATA:
        rows = [key for key, (t, a) in mine.items() if _stratum(t, a) == stratum]
        gains = {key: float(all(theirs[key])) - float(all(mine[key])) for key in rows}
        again = [
            float(all(mine[name, draws[(draws.index(draw) + 1) % len(draws)]])) - float(all(mine[name, draw]))
            for name, draw in rows
        ]
        each = [[gains[key] for key in rows if key[1] == draw] for draw in draws]
        low, high = _interval(gains, n_boot)
        out[stratum] = {
            "n": len(rows),
            "gain": float(np.mean(list(gains.values()))) if rows else None,
            "low": low,
            "high": high,
            "chance": float(np.mean(again)) if rows and len(draws) > 1 else None,
            "draws": [float(np.mean(g)) if g else None for g in each],
        }
    return out


def _by_draw(scored: Sequence[Mapping[str, Any]], matcher: str) -> dict[tuple[str, int], tuple[bool, bool]]:
    return {(r["id"], r["draw"]): (bool(r["em_t"]), bool(r[f"em_a_{matcher}"])) for r in scored}


def _stratum(in_thought: bool, in_answer: bool) -> str:
    return STRATA[2] if in_thought != in_answer else STRATA[0] if in_thought else STRATA[1]


def _interval(gains: Mapping[tuple[str, int], float], n_boot: int) -> tuple[float | None, float | None]:
    """95 % interval of the mean, whole questions drawn with replacement: the fact is what stands before a "#"."""
    if not gains:
        return None, None
    named = {f"{name}\0{draw}": gain for (name, draw), gain in gains.items()}
    cluster = {key: key.partition("\0")[0].partition("#")[0] for key in named}
    _, low, high = evaluation.paired_bootstrap(named, dict.fromkeys(named, 0.0), cluster, n_boot)
    return low, high


# ---------- labels of evaluated samples


def to_label(samples: Iterable[Mapping[str, Any]], most: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for an annotator: {id, question, answers, completion, spans} of draw 0 of every finished thought.

    most: so many of them only, a sample of the questions that is the same for every variant where their thoughts are
    finished; 0 for all. The paper labels 977 questions of NQ-Open.
    """
    rows = []
    for sample in samples:
        parsed = data.parse_sample(sample)
        if sample["draw"] == 0 and sample["finish"] == "stop" and parsed.outcome != "no_close" and parsed.span:
            spans = [list(span) for span in data.split_segments(sample["text"], *parsed.span)]
            row = {name: sample[name] for name in ("id", "question", "answers")}
            rows.append(row | {"completion": sample["text"], "spans": spans})
    if not most:
        return rows
    lot = sorted(zlib.crc32(f"{seed}/{row['id']}".encode()) for row in rows)[:most]
    return [row for row in rows if zlib.crc32(f"{seed}/{row['id']}".encode()) <= lot[-1]][:most]


def labels_of(rows: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]) -> dict[str, Labels]:
    """id -> labels of every step, from rows of `to_label` and their annotation records."""
    found = {record["id"]: record for record in records}
    return {row["id"]: [s.labels for s in annotate.steps_of(found[row["id"]], len(row["spans"]))] for row in rows}


def label_outcomes(
    scored: Iterable[Mapping[str, Any]], labels: Mapping[str, Labels], least: int = 20, matcher: str = "equal"
) -> dict[str, Any]:
    """{"labels": [...], "moves": [...]}: Acc of traces with and without each label, and with each common move.

    scored: rows of `eval.score`; draw 0 of the labelled ones counts. A row is {name, with: share, without: share,
    share of steps}; a share is {k, n, share, low, high} or None when no trace is in it. Moves are pairs of labels of
    adjacent steps that at least `least` traces hold, the commonest first, at most 2 * TOP. It shows what goes together,
    not what causes what.
    """
    mine = [row for row in scored if row["draw"] == 0 and row["id"] in labels]
    right = dict(zip((row["id"] for row in mine), evaluation.indicator(mine, "acc", matcher).tolist(), strict=True))
    steps = Counter(label for name in right for step in labels[name] for label in step)
    total = sum(steps.values())
    has = {name: {label for step in labels[name] for label in step} for name in right}
    table = [
        {"name": label, "steps": steps[label] / total if total else 0.0} | _with_without(right, has, label)
        for label in em.LABELS
    ]
    moved = {name: {f"{a} → {b}" for x, y in pairwise(labels[name]) for a in x for b in y} for name in right}
    common = Counter(move for moves in moved.values() for move in moves)
    moves = [{"name": m} | _with_without(right, moved, m) for m, n in common.most_common(2 * TOP) if n >= least]
    return {"n": len(right), "labels": table, "moves": moves}


def _with_without(right: Mapping[str, bool], has: Mapping[str, set[str]], thing: str) -> dict[str, Any]:
    out = {}
    for name, inside in (("with", True), ("without", False)):
        values = [value for key, value in right.items() if (thing in has[key]) is inside]
        out[name] = evaluation.share(sum(values), len(values)) if values else None
    return out


# ---------- Fig. 4, Fig. 7


def bootstrap_counts(
    traces: Sequence[Labels], n_boot: int, seed: int, size: int = 0
) -> Iterator[Counter[em.Observation]]:
    """Observations of `n_boot` resamples of whole traces, drawn with replacement, each as a Counter for em.fit.

    size: traces in a resample, 0 for as many as there are.
    """
    numbers: dict[em.Observation, int] = {}
    flat, owner = array("i"), array("i")  # every move of every trace, and whose it is
    for trace, steps in enumerate(traces):
        moves = [numbers.setdefault(move, len(numbers)) for move in em.observations(steps)]
        flat.extend(moves)
        owner.extend([trace] * len(moves))
    rng, kinds = np.random.default_rng(seed), list(numbers)
    for _ in range(n_boot):
        times = np.bincount(rng.integers(len(traces), size=size or len(traces)), minlength=len(traces))
        seen = np.bincount(np.asarray(flat), weights=times[np.asarray(owner)], minlength=len(kinds))
        yield Counter({kinds[k]: int(seen[k]) for k in np.flatnonzero(seen)})


def change(
    before: Sequence[Labels],
    after: Sequence[Labels],
    fit: Callable[..., em.Transitions] = em.fit,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> dict[str, Any]:
    """How the transitions moved: {states, before, after, delta, low, high, support, up, down, n_before, n_after}.

    before, after: labels of every trace of two sets of samples. delta (K, K) = P after - P before (Fig. 4); low, high
    its 95 % bootstrap interval over traces; support (K,): soft counts of leaving each state, the smaller of the two.
    up, down: the TOP largest rises and falls as {from, to, delta, low, high}, from states with SUPPORT and more.
    Raises InputError when one of the two is empty.
    """
    if not before or not after:
        raise InputError("evaluation: there is no finished thought to label; see the truncated share")
    # PAPER: the ten largest differences each way.
    # HERE:  only moves out of states that both models visit often enough.
    # WHY:   a state that was hardly seen has a nearly uniform row, whose differences are the prior's.
    fitted = [fit([o for steps in traces for o in em.observations(steps)]) for traces in (before, after)]
    delta = fitted[1].P - fitted[0].P
    drawn = np.array(
        [
            fit(b).P - fit(a).P
            for a, b in zip(
                bootstrap_counts(before, n_boot, seed), bootstrap_counts(after, n_boot, seed + 1), strict=True
            )
        ]
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    support = np.minimum(fitted[0].C.sum(1), fitted[1].C.sum(1))
    order = [divmod(int(i), len(delta)) for i in np.argsort(delta, axis=None, kind="stable")]
    ranked = [(a, b) for a, b in order if support[a] >= SUPPORT and em.mask(len(delta))[a, b]]

    def moves(pairs: Iterable[tuple[int, int]], sign: int) -> list[dict[str, Any]]:
        return [
            {"from": em.STATES[a], "to": em.STATES[b], "delta": float(delta[a, b])}
            | {"low": float(low[a, b]), "high": float(high[a, b])}
            for a, b in pairs
            if sign * delta[a, b] > 0
        ]

    out = {"states": list(em.STATES), "n_before": len(before), "n_after": len(after), "support": support.tolist()}
    out |= {"before": fitted[0].P.tolist(), "after": fitted[1].P.tolist(), "delta": delta.tolist()}
    out |= {"low": low.tolist(), "high": high.tolist()}
    return out | {"up": moves(ranked[::-1][:TOP], 1), "down": moves(ranked[:TOP], -1)}


def matrix_intervals(
    positive: Sequence[Labels],
    negative: Sequence[Labels],
    fit: Callable[..., em.Transitions] = em.fit,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> dict[str, Any]:
    """95 % intervals of P, P_pos, P_neg, w_pos and w_neg: name -> {"low": (K, K), "high": (K, K)}, and their width.

    positive, negative: labels of every chosen and rejected training trace. Traces are drawn with replacement inside
    their class and all three matrices fitted anew; w_ij is the clipped ratio of Eq. 10 for single labels, 1 where the
    move is forbidden. mean_width: mean of high - low over the allowed cells. It measures what Eq. 15 bounds. mean_l1:
    how far a resample lies from the mean of all, mean over all cells (Eq. 13): E |delta| of Eq. 14 by chance alone.
    """
    allowed = em.mask(len(em.STATES)) > 0
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in ("P", "P_pos", "P_neg", "w_pos", "w_neg")}
    pairs = zip(bootstrap_counts(positive, n_boot, seed), bootstrap_counts(negative, n_boot, seed + 1), strict=True)
    for pos, neg in pairs:
        P = {"P_pos": fit(pos).P, "P_neg": fit(neg).P, "P": fit(pos + neg).P}
        for name in ("pos", "neg"):
            ratio = np.divide(P[f"P_{name}"], P["P"], out=np.ones_like(P["P"]), where=allowed)
            drawn[f"w_{name}"].append(np.clip(ratio, *em.CLIP))  # Eq. 10
        for name, matrix in P.items():
            drawn[name].append(matrix)
    out: dict[str, Any] = {"n_boot": n_boot}
    for name, matrices in drawn.items():
        low, high = np.quantile(np.array(matrices), [0.025, 0.975], axis=0)
        width = float((high - low)[allowed].mean())
        l1 = float(np.abs(np.array(matrices) - np.mean(matrices, axis=0)).mean())
        out[name] = {"low": low.tolist(), "high": high.tolist(), "mean_width": width, "mean_l1": l1}
    return out


def weight_bound(P: np.ndarray, C: np.ndarray, distance: float) -> dict[str, float]:
    """How wrong a weight may be: |w - w*| <= distance / a * (M - 1), a the move's probability in P (Eq. 14 and 15).

    P, C (17, 17): the global matrix and its soft counts. distance: E |delta|, mean over the cells of how far the matrix
    lies from the true one. Moves count as often as they were seen: {distance, mean, median, p90, below .1: share of the
    moves whose bound is under .1, vacuous: share whose bound is wider than the clip's M - m and so says nothing}.
    """
    seen = C > 0
    bound, count = distance / P[seen] * (em.CLIP[1] - 1), C[seen]  # Eq. 15
    order = np.argsort(bound)
    bound, share = bound[order], count[order] / count.sum()
    reached = share.cumsum()
    out = {"distance": distance, "mean": float(bound @ share)}
    out |= {name: float(bound[np.searchsorted(reached, q - 1e-12)]) for name, q in (("median", 0.5), ("p90", 0.9))}
    out["below .1"] = float(share[bound < 0.1].sum())
    return out | {"vacuous": float(share[bound >= em.CLIP[1] - em.CLIP[0]].sum())}


# ---------- weights of the training rows


def weight_audit(rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One entry per class on the weights its steps got: is the weighting more than a change of scale?

    rows: train.jsonl. "clipped" are shares of steps at the clips of Eq. 10. "thought" and "answer" are the shares of a
    class's tokens inside steps and outside them (tags, answer, end token); "effective" weighs every token by its w.
    """
    classes: dict[bool, list[Mapping[str, Any]]] = {True: [], False: []}
    for row in rows:
        classes[row["label"]].append(row)
    out = []
    for name, side in (("chosen", True), ("rejected", False)):
        w = np.array([w for row in classes[side] for w in row["w"]])
        if not len(w):
            continue
        inside = outside = weighted = 0.0
        for row in classes[side]:
            _, offsets = token_offsets(tokenizer, row["completion_ids"])
            owner = data.token_steps(offsets, row["spans"])
            inside, outside = inside + int((owner >= 0).sum()), outside + int((owner < 0).sum())
            weighted += float(np.array([*row["w"], 0.0])[owner].sum())
        out.append(
            {
                "class": name,
                "traces": len(classes[side]),
                "steps": len(w),
                "mean w": round(float(w.mean()), 3),
                "median w": round(float(np.median(w)), 3),
                "clipped at 1/e": f"{100 * np.mean(w <= em.CLIP[0]):.1f} %",
                "clipped at e": f"{100 * np.mean(w >= em.CLIP[1]):.1f} %",
                "thought": f"{100 * inside / (inside + outside):.1f} %",
                "thought, effective": f"{100 * weighted / (weighted + outside):.1f} %",
                "answer": f"{100 * outside / (inside + outside):.1f} %",
                "answer, effective": f"{100 * outside / (weighted + outside):.1f} %",
            }
        )
    return out
