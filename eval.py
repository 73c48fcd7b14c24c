"""Scores of completions that lie on disk: Acc, Mis, their intervals, and differences between two runs.

  python eval.py runs/mine/eval/nq_open/mralign.jsonl                        the table of one file of samples
  python eval.py .../mralign.jsonl .../base.jsonl                            and the paired difference of two
  python eval.py .../mralign.jsonl --export-lm-eval samples_nq_open.jsonl    in the format of lm-evaluation-harness

Needs no GPU and no model, so it can be redone at any time from the saved samples. Every share comes with its count and
a 95 % interval, and how many completions were cut short or malformed stands beside it: a token budget that is too small
looks like a bad model. Left out: judges, retrieval, generation.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import data
from common.endings import program
from common.errors import InputError
from common.files import read_jsonl, write_jsonl
from common.rows import check_row
from common.table import markdown
from common.tokens import token_offsets

SAMPLE_FIELDS = ("id", "mode", "draw", "question", "answers", "prompt", "text", "finish")
Z95 = 1.959963984540054  # standard normal quantile at 0.975
FORMS = ("ok", "truncated", "no_thought", "empty", "malformed")  # they add up
FORM_OF = {"ok": "ok", "no_thought": "no_thought", "empty": "empty", "placeholder": "empty"}  # others: malformed
WARN = 0.01  # a share of truncated or empty completions above this is said aloud


def score(sample: Mapping[str, Any], tokenizer: Tokenizer | None = None, fold: bool = False) -> dict[str, Any]:
    """One sample record judged: {id, mode, draw, outcome, form, answer, em_*, n_think_tokens, truncated, ...}.

    em_t, em_t_word: a gold is in the thought, as a substring (A.2) or as whole words. em_a_MATCHER: the answer is right
    under each of `data.MATCHERS`. fold: in the folded normal form (`data.normalise`). An unfinished thought or answer
    is never scored as an answer (`data.parse`). form: one of FORMS. "no_thought" ended by itself without a thought: it
    is wrong and no part of Mis. sentence: the answer is one, see `is_sentence`.
    n_think_tokens: counted on the sampled ids; None without a tokenizer. Raises InputError at a missing field.
    """
    if missing := [name for name in SAMPLE_FIELDS if name not in sample]:
        raise InputError(f"samples: field {missing[0]!r} is missing in a row of id {sample.get('id')!r}; sample again")
    parsed = data.parse_sample(sample)
    golds = sample["answers"]
    form = "truncated" if sample["finish"] == "length" else FORM_OF.get(parsed.outcome, "malformed")
    n_think_tokens = None
    if tokenizer is not None:
        _, offsets = token_offsets(tokenizer, sample["ids"])
        n_think_tokens = data.count_think_tokens(offsets, parsed.span or (0, 0))
    return {name: sample[name] for name in ("id", "mode", "draw")} | {
        "outcome": parsed.outcome,
        "form": form,
        "truncated": form == "truncated",
        "answer": parsed.answer,
        "sentence": is_sentence(parsed.answer),
        "em_t": data.contains_gold(parsed.thought, golds, fold),
        "em_t_word": data.contains_gold_words(parsed.thought, golds, fold),
        **{f"em_a_{name}": match(parsed.answer, golds, fold) for name, match in data.MATCHERS.items()},
        "gold_in_question": data.contains_gold(sample["question"], golds, fold),
        "n_empty_golds": sum(not data.normalise(gold) for gold in golds),
        "n_think_tokens": n_think_tokens,
    }


def is_sentence(answer: str) -> bool:
    """Whether an answer reads as a sentence: four words or more that end in a full stop, question or exclamation mark.

    >>> is_sentence("The capital is Paris."), is_sentence("Paris."), is_sentence("U.S. Steel Co.")
    (True, False, False)
    """
    return len(answer.split()) >= 4 and answer.rstrip("\"'”’)*_ ").endswith((".", "!", "?"))


def indicator(scored: Sequence[Mapping[str, Any]], metric: str, matcher: str = "equal") -> np.ndarray:
    """The 0/1 values of "acc" or "mis", (n,) bool, one per scored row (A.2).

    acc: EM_t and EM_a; with thinking off EM_a alone. mis: exactly one of the two, so there is none with thinking off.
    """
    assert metric in ("acc", "mis") and matcher in data.MATCHERS, (metric, matcher)
    em_t = np.array([row["em_t"] for row in scored], dtype=bool)
    em_a = np.array([row[f"em_a_{matcher}"] for row in scored], dtype=bool)
    if _mode(scored) == "off":
        assert metric == "acc", "Mis is not defined with thinking off"
        return em_a
    return em_t & em_a if metric == "acc" else em_t ^ em_a


def _mode(scored: Sequence[Mapping[str, Any]]) -> str:
    """The one mode of all rows. Raises InputError when there are none or two."""
    if not scored:
        raise InputError("evaluation: the test set is empty; give questions to evaluate on")
    modes = {row["mode"] for row in scored}
    if len(modes) > 1:
        raise InputError("evaluation: rows with thinking on and off are mixed; score the two apart")
    return modes.pop()


def metrics(scored: Sequence[Mapping[str, Any]], matcher: str = "equal") -> dict[str, Any]:
    """All figures of one run on one test set, as JSON values; a share is {k, n, share, low, high} (Wilson interval).

    acc, mis and the 2x2 table of (EM_t, EM_a) under `matcher`; em_thought_contains, em_thought_word, em_answer_exact,
    em_answer_contains, em_answer_words; FORMS, which add up to n; sentences; the outcomes of `data.parse`; mean and
    median thinking tokens (None where they were not counted); empty_golds: golds that normalise to nothing and never
    match. With thinking off what is about a thought is None.
    Several draws of a question are pooled: k and n count all of them, but an interval counts each question once, as its
    draws are not independent. draws: Acc and Mis of every draw alone, with mean and standard deviation (`over_draws`).
    Raises InputError when `scored` is empty, mixes modes or holds a completion twice.
    """
    mode, n = _mode(scored), len(scored)
    twice = [key for key, count in Counter((row["id"], row["draw"]) for row in scored).items() if count > 1]
    if twice:
        raise InputError(f"evaluation: draw {twice[0][1]} of {twice[0][0]!r} is scored twice; keep one")
    pairs = Counter((bool(row["em_t"]), bool(row[f"em_a_{matcher}"])) for row in scored)
    forms = Counter(row["form"] for row in scored)
    tokens = [row["n_think_tokens"] for row in scored]
    counted = all(t is not None for t in tokens)
    quadrants = {
        "thought_and_answer": pairs[True, True],
        "thought_only": pairs[True, False],
        "answer_only": pairs[False, True],
        "neither": pairs[False, False],
    }

    first = {row["id"]: row for row in scored}
    repeats = n / len(first)

    def part(k: int) -> dict[str, float]:
        return share(k, n, repeats)

    def share_of(field: str) -> dict[str, float]:
        return part(sum(row[field] for row in scored))

    on = mode == "on"
    return {
        "mode": mode,
        "matcher": matcher,
        "n": n,
        "questions": len(first),
        "acc": part(int(indicator(scored, "acc", matcher).sum())),
        "mis": part(int(indicator(scored, "mis", matcher).sum())) if on else None,
        "draws": over_draws(scored, matcher),
        "table": quadrants if on else None,
        "em_thought_contains": share_of("em_t") if on else None,
        "em_thought_word": share_of("em_t_word") if on else None,
        "em_answer_exact": share_of("em_a_equal"),
        "em_answer_contains": share_of("em_a_contains"),
        "em_answer_words": share_of("em_a_words"),
        "sentences": share_of("sentence"),
        "gold_in_question": share_of("gold_in_question"),
        "empty_golds": sum(row["n_empty_golds"] for row in first.values()),
        **{form: part(forms[form]) for form in FORMS},
        "outcomes": dict(sorted(Counter(row["outcome"] for row in scored).items())),
        "think_tokens_mean": float(np.mean(tokens)) if on and counted else None,
        "think_tokens_median": float(np.median(tokens)) if on and counted else None,
    }


def share(k: int, n: int, repeats: float = 1.0) -> dict[str, float]:
    """{k, n, share, low, high}: a count with its Wilson interval, for which only every `repeats`-th row is new."""
    low, high = wilson(k / repeats, n / repeats)
    return {"k": k, "n": n, "share": k / n, "low": low, "high": high}


def over_draws(scored: Sequence[Mapping[str, Any]], matcher: str = "equal") -> dict[str, Any]:
    """{"acc": {mean, sd, all}, "mis": ...} over the draws, each a run of its own with other seeds.

    sd: standard deviation with n - 1, None for a single draw; mis is None with thinking off.
    """
    out: dict[str, Any] = {"mis": None}
    for metric in ("acc", "mis") if _mode(scored) == "on" else ("acc",):
        values: dict[int, list[bool]] = {}
        for row, value in zip(scored, indicator(scored, metric, matcher).tolist(), strict=True):
            values.setdefault(row["draw"], []).append(value)
        each = [float(np.mean(values[draw])) for draw in sorted(values)]
        sd = float(np.std(each, ddof=1)) if len(each) > 1 else None
        out[metric] = {"mean": float(np.mean(each)), "sd": sd, "all": each}
    return out


def warnings(figures: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the headline of a `metrics`: the token budget or the format decided the score."""
    lines = []
    for form, why in (
        ("truncated", "the token limit decides part of the score"),
        ("no_thought", "they ended without one, count as wrong and are no part of Mis"),
        ("empty", "nothing to score"),
    ):
        if figures[form]["share"] > WARN:
            lines.append(f"{100 * figures[form]['share']:.1f} % of the completions are {form.replace('_', ' ')}: {why}")
    if figures["empty_golds"]:
        lines.append(f"{figures['empty_golds']} gold answers normalise to nothing and can never match")
    return lines


def wilson(k: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share k/n."""
    assert 0 <= k <= n and n > 0, (k, n)
    centre = (k + Z95**2 / 2) / (n + Z95**2)
    half = Z95 / (n + Z95**2) * math.sqrt(k * (n - k) / n + Z95**2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(
    a: Mapping[str, float],
    b: Mapping[str, float],
    cluster: Mapping[str, Hashable] | None = None,
    n_boot: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(difference, low, high): mean of a minus mean of b over the same ids, with a 95 % percentile interval.

    Ids are drawn with replacement, each with its pair of values; with `cluster` (id -> key) whole clusters are, so that
    questions about the same fact do not count as independent. Raises InputError when the ids differ.
    """
    ids = _common_ids(a, b)
    if cluster is not None and (lost := [i for i in ids if i not in cluster]):
        raise InputError(f"evaluation: {lost[0]!r} belongs to no cluster; give every question one")
    keys: list[Hashable] = list(ids) if cluster is None else [cluster[i] for i in ids]
    place = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    where = [place[key] for key in keys]
    sums = np.bincount(where, weights=[a[i] - b[i] for i in ids])  # (clusters,)
    sizes = np.bincount(where).astype(float)  # (clusters,)
    rng = np.random.default_rng(seed)
    means = np.empty(n_boot)
    block = max(1, 2_000_000 // len(sums))  # draws held in memory at a time
    for start in range(0, n_boot, block):
        picks = rng.integers(len(sums), size=(min(block, n_boot - start), len(sums)))
        means[start : start + len(picks)] = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / sizes.sum()), float(low), float(high)


def _common_ids(a: Mapping[str, float], b: Mapping[str, float]) -> list[str]:
    """The ids of a, in its order. Raises InputError unless b has the very same."""
    if odd := sorted(set(a) ^ set(b)):
        raise InputError(f"evaluation: {odd[0]!r} was scored in one run only; evaluate both on the same questions")
    if not a:
        raise InputError("evaluation: there is nothing to compare; give questions to evaluate on")
    return list(a)


def mcnemar(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Exact two-sided p that a and b (0/1 per id) are right equally often: a binomial test of the pairs that differ."""
    ids = _common_ids(a, b)
    wins, losses = sum(a[i] > b[i] for i in ids), sum(a[i] < b[i] for i in ids)
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def compare(
    a: Sequence[Mapping[str, Any]],
    b: Sequence[Mapping[str, Any]],
    matcher: str = "equal",
    cluster: Mapping[str, Hashable] | None = None,
    n_boot: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Scored run a minus scored run b on the same questions: {"acc": {difference, low, high, p}, "mis": ...}.

    Several draws of a question are averaged first, they are not independent. p: McNemar's, None where it does not apply
    (several draws, or clusters). No "mis" when either run has thinking off. Raises InputError when the ids differ.
    """
    both_think = _mode(a) == _mode(b) == "on"
    result = {}
    for metric in ("acc", "mis") if both_think else ("acc",):
        left, right = _by_id(a, metric, matcher), _by_id(b, metric, matcher)
        difference, low, high = paired_bootstrap(left, right, cluster, n_boot, seed)
        single = len(left) == len(a) and len(right) == len(b) and cluster is None
        p = mcnemar(left, right) if single else None
        result[metric] = {"difference": difference, "low": low, "high": high, "p": p}
    return result


def _by_id(scored: Sequence[Mapping[str, Any]], metric: str, matcher: str) -> dict[str, float]:
    """Mean of a metric over the draws of every question."""
    values: dict[str, list[bool]] = {}
    for row, value in zip(scored, indicator(scored, metric, matcher).tolist(), strict=True):
        values.setdefault(row["id"], []).append(value)
    return {name: sum(v) / len(v) for name, v in values.items()}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """`metrics` of several runs as an aligned Markdown table, a row each; percentages, 95 % intervals in brackets.

    EM_a stands there under every matcher, since the paper's text and formula disagree (`data.exact_match`).
    """
    assert len({m["matcher"] for m in results.values()}) == 1, "a table holds one matcher"
    matcher = next(iter(results.values()))["matcher"]
    head = ["", f"Acc {matcher} (95 %)", "Acc k/n", f"Mis {matcher} (95 %)", "Mis k/n"]
    head += ["EM_a equal", "EM_a contains", "EM_a words", "EM_t", "EM_t words"]
    head += ["sentences", *(form.replace("_", " ") for form in FORMS[:-1]), "thinking tokens"]
    rows = []
    for name, m in results.items():
        mis = [_interval(m["mis"]), f"{m['mis']['k']}/{m['n']}"] if m["mis"] else ["-", "-"]
        fields = ["em_answer_exact", "em_answer_contains", "em_answer_words", "em_thought_contains", "em_thought_word"]
        fields += ["sentences", *FORMS[:-1]]
        shares = [f"{100 * m[f]['share']:.1f}" if m[f] else "-" for f in fields]
        tokens = "-" if m["think_tokens_median"] is None else f"{m['think_tokens_median']:.0f}"
        cells = [name, _interval(m["acc"]), f"{m['acc']['k']}/{m['n']}", *mis, *shares, tokens]
        rows.append(dict(zip(head, cells, strict=True)))
    return markdown(rows)


def _interval(share: Mapping[str, float]) -> str:
    return f"{100 * share['share']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def draws_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Acc and Mis of several `metrics` as mean and standard deviation over the draws, as a Markdown table; "" for one.

    Each draw is a run with other seeds; the spread says how far the figures move when nothing but chance changes.
    """
    if max(len(m["draws"]["acc"]["all"]) for m in results.values()) < 2:
        return ""
    rows = []
    for name, m in results.items():
        row = {"": name, "draws": len(m["draws"]["acc"]["all"])}
        for metric in ("acc", "mis"):
            d = m["draws"][metric]
            spread = "-" if d is None or d["sd"] is None else f"{100 * d['sd']:.2f}"
            row[f"{metric.capitalize()}, mean ± sd"] = "-" if d is None else f"{100 * d['mean']:.2f} ± {spread}"
        rows.append(row)
    return markdown(rows)


def lm_eval_rows(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples as lm-evaluation-harness logs its own (--log_samples), with our scores under our names.

    resps: the whole completion; filtered_resps: the answer we scored. What the harness itself would score differs.
    """
    rows = []
    for number, sample in enumerate(samples):
        scored = score(sample)
        doc = {"id": sample["id"], "question": sample["question"], "answer": sample["answers"]}
        row: dict[str, Any] = {"doc_id": number, "doc": doc}
        row |= {"target": sample["answers"], "arguments": [[sample.get("prompt", sample["question"]), {}]]}
        row |= {"resps": [[sample["text"]]], "filtered_resps": [scored["answer"]], "filter": "none"}
        row |= {"metrics": ["exact_match"], "exact_match": float(scored["em_a_equal"])}
        row |= {name: scored[name] for name in ("em_t", "em_t_word", "em_a_contains", "outcome", "draw")}
        rows.append(row)
    return rows


@program
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="+", metavar="SAMPLES.jsonl", help="saved samples; two: also their difference")
    parser.add_argument(
        "--matcher", default="equal", choices=data.MATCHERS, help="answer matcher of Acc and Mis [equal]"
    )
    parser.add_argument(
        "--fold", action="store_true", help="fold accents, Unicode dashes, quotes and degree signs before matching"
    )
    parser.add_argument(
        "--export-lm-eval", metavar="FILE", help="write the first file in lm-evaluation-harness's format"
    )
    given = parser.parse_args(argv)
    rows = {path: read_jsonl(path, SAMPLE_FIELDS, check_row) for path in given.samples}
    scored = {path: [score(row, fold=given.fold) for row in of] for path, of in rows.items()}
    results = {f"{Path(path).parent.name}/{Path(path).stem}": metrics(s, given.matcher) for path, s in scored.items()}
    print(table(results))
    for name, figures in results.items():
        for line in warnings(figures):
            print(f"{name}: {line}", file=sys.stderr)
    if len(scored) == 2:
        cluster = {row["id"]: row["id"].partition("#")[0] for row in rows[given.samples[0]]}
        clustered = len(set(cluster.values())) < len(cluster)
        a, b = scored.values()
        pair: Mapping[str, Mapping[str, Any]] = compare(a, b, given.matcher, cluster if clustered else None)
        for metric, d in pair.items():
            p = "" if d["p"] is None else f", McNemar p {d['p']:.3g}"
            print(f"{metric}: {100 * d['difference']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}] points{p}")
    if given.export_lm_eval:
        count = write_jsonl(given.export_lm_eval, lm_eval_rows(rows[given.samples[0]]))
        print(f"{given.export_lm_eval}: {count} samples")


if __name__ == "__main__":
    sys.exit(main())
