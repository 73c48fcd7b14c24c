"""Figures of sampled solutions and of what was foreseen about them: Pass@k, calibration, the gate, Shapley R^2.

A row is one problem in one evaluation, as masa/run.py writes it to evals.jsonl:
    {step, set, id, n, correct, lengths, correct_lengths, at_limit}, and with metas
    {metas, parsed, meta_tokens, p_hats, l_hats, r_length, r_difficulty, r_notion, gated, cut_at}.
Everything here is computed from such rows alone, so it can be done again without a model.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from common.errors import InputError
from common.table import markdown


def pass_at(k: int, n: int, c: int) -> float:
    """The chance that one of k samples is right when c of n were: 1 - C(n - c, k) / C(n, k), unbiased."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of one evaluation: Pass@k with the standard error over problems, and how good the foresight is."""
    n = min(row["n"] for row in rows)
    out: dict[str, Any] = {"problems": len(rows), "samples": n}
    for k in sorted({1, *(k for k in (8, 32) if k <= n)}):
        values = [pass_at(k, row["n"], row["correct"]) for row in rows]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        out[f"pass@{k}"] = {"mean": statistics.fmean(values), "se": error}
    out["solution_length"] = statistics.fmean(length for row in rows for length in row["lengths"])
    out["at_limit"] = sum(row["at_limit"] for row in rows) / sum(row["n"] for row in rows)
    if not all(row.get("metas") for row in rows):
        return out
    p = {row["id"]: row["correct"] / row["n"] for row in rows}
    errors = [abs(p_hat - p[row["id"]]) for row in rows for p_hat in row["p_hats"]]
    out["parsed"] = sum(row["parsed"] for row in rows) / sum(row["metas"] for row in rows)
    out["error"] = statistics.fmean(errors) if errors else None  # mean |p_hat - p|
    middle = statistics.median(p.values())  # the best guess for all problems alike
    out["error_of_constant"] = statistics.fmean(abs(middle - x) for x in p.values())
    for name in ("r_length", "r_difficulty", "r_notion"):
        out[name] = statistics.fmean(row[name] for row in rows)
    out["r_meta"] = statistics.fmean(out[name] for name in ("r_length", "r_difficulty", "r_notion"))
    return out | {"gate": gate_figures(rows), "cutoff": cutoff_figures(rows), "length_error": length_error(rows)}


def gate_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Would the gate be right? Against problems whose fresh solutions are all right or all wrong."""
    gated = [row["gated"] for row in rows]
    flat = [row["correct"] in (0, row["n"]) for row in rows]
    both = sum(a and b for a, b in zip(gated, flat, strict=True))
    out = {"gated": sum(gated) / len(rows), "flat": sum(flat) / len(rows)}
    return out | precision_recall(both, sum(gated), sum(flat))


def precision_recall(both: int, said: int, true: int) -> dict[str, float | None]:
    """{precision, recall, f1} of `said` positives of which `both` are among the `true` ones; None: of nothing.

    A precision says something only beside the share of true ones: a gate that gates at random has just that.
    """
    return {
        "precision": both / said if said else None,
        "recall": both / true if true else None,
        "f1": 2 * both / (said + true) if said + true else None,
    }


def cutoff_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Would the cutoff be right? Fresh solutions were sampled in full: those longer than `cut_at` would have been cut.

    A cut is right where the solution was wrong anyway. cut, wrong: shares of all solutions; tokens: share of the
    solutions' tokens that it would have saved; precision, recall and f1 as in precision_recall.
    """
    lengths = [(length, row["cut_at"]) for row in rows for length in row["lengths"]]
    n, right = len(lengths), sum(row["correct"] for row in rows)
    cut = sum(length > at for length, at in lengths)
    cut_right = sum(length > row["cut_at"] for row in rows for length in row["correct_lengths"])
    saved = sum(max(length - at, 0) for length, at in lengths)
    out = {"cut": cut / n, "wrong": (n - right) / n, "tokens": saved / sum(length for length, _ in lengths)}
    return out | precision_recall(cut - cut_right, cut, n - right)


def length_error(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How far foreseen lengths are from the mean of the right solutions', in standard deviations of all foreseen ones.

    (l_hat - l) / sd(l_hat) over every meta of a problem with a right solution: {mean, abs}, mean and mean absolute.
    """
    foreseen = [l_hat for row in rows for l_hat in row["l_hats"]]
    sd = statistics.stdev(foreseen) if len(foreseen) > 1 else 0.0
    solved = [(row["l_hats"], statistics.fmean(row["correct_lengths"])) for row in rows if row["correct_lengths"]]
    errors = [(l_hat - length) / sd for l_hats, length in solved for l_hat in l_hats] if sd else []
    if not errors:
        return {"mean": None, "abs": None}
    return {"mean": statistics.fmean(errors), "abs": statistics.fmean(map(abs, errors))}


def shapley_r2(features: Mapping[str, Sequence[float]], target: Sequence[float]) -> dict[str, float]:
    """Each feature's share of the R^2 of a linear model: its mean gain over all orders of entry. They sum to R^2.

    features: name -> n values; target: n values, not all equal. Appendix of the paper (also called LMG).
    """
    names, y = list(features), np.asarray(target, dtype=float)
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0 or len(y) < 2:
        raise InputError("the accuracy never changed between evaluations, so nothing explains it; train longer")

    def r2(chosen: tuple[str, ...]) -> float:
        X = np.column_stack([np.ones(len(y)), *(np.asarray(features[name], dtype=float) for name in chosen)])
        rest = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
        return 1 - float(rest @ rest) / total

    k, gains = len(names), dict.fromkeys(names, 0.0)
    for name in names:
        others = [other for other in names if other != name]
        for size in range(k):
            weight = math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k)
            for subset in combinations(others, size):
                gains[name] += weight * (r2((*subset, name)) - r2(subset))
    return gains


def shapley_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What explains the change of a problem's accuracy from one evaluation to a later one: shapley_r2 of four changes.

    Every two evaluations of a problem are a pair, not only consecutive ones: with equal steps between evaluations the
    number of steps would be the same in all pairs and could explain nothing.
    """
    steps = sorted({row["step"] for row in rows})
    table = {(row["step"], row["set"], row["id"]): row for row in rows}
    names = ("r_difficulty", "r_length", "r_notion")
    features: dict[str, list[float]] = {name: [] for name in (*names, "step")}
    target = []
    for before, after in combinations(steps, 2):
        for (step, *where), row in table.items():
            later = table.get((after, *where))
            if step == before and later is not None and row.get("metas") and later.get("metas"):
                target.append(later["correct"] / later["n"] - row["correct"] / row["n"])
                for name in names:
                    features[name].append(later[name] - row[name])
                features["step"].append(after - before)
    if not target:
        raise InputError("no problem was evaluated twice with metas; train with --eval-every and --eval-metas")
    return shapley_r2(features, target)


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Evaluations {set: {step: summary}} as a table, shares in percent."""
    rows = []
    for name, steps in results.items():
        for step, x in steps.items():
            best = max((k for k in x if k.startswith("pass@")), key=lambda k: int(k[5:]))
            shares = {"Pass@1": x["pass@1"]["mean"], "+-": x["pass@1"]["se"], "Pass@n": x[best]["mean"]}
            shares |= {"p_hat - p": x.get("error"), "constant": x.get("error_of_constant")}
            shares |= {"r_meta": x.get("r_meta"), "parsed": x.get("parsed")}
            gate = x.get("gate", {})
            shares |= {key: gate.get(key) for key in ("gated", "flat", "precision")} | {"F1": gate.get("f1")}
            shares |= {"cut F1": x.get("cutoff", {}).get("f1")}
            cells = {key: None if v is None else f"{100 * v:.1f}" for key, v in shares.items()}
            rows.append({"set": name, "step": str(step), "problems": str(x["problems"])} | cells)
    return markdown(rows, missing="")


def summaries(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{set: {step: summary}} of the rows of an evals.jsonl."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["set"], {}).setdefault(str(row["step"]), []).append(row)
    return {name: {step: summary(part) for step, part in steps.items()} for name, steps in found.items()}
