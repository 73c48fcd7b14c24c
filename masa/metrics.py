"""What one step counts, summed over ranks, and the row of metrics.jsonl made of it."""

import statistics
from typing import Any

import torch

from common.ranks import Ranks
from masa.problems import GRID
from masa.rewards import lemma
from masa.rollouts import Group

GENERIC = 0.9  # a notion found in this share of a problem's solutions says nothing

# What a step counts; SHARES says which metrics are made of it: name -> (numerator, denominator).
COUNTS = (
    *("problems", "gated", "unsampled", "probes", "flat_probes", "solved_groups", "meta_groups", "flat", "flat_metas"),
    *("solutions", "correct", "answered", "failed", "cut", "at_limit", "solution_tokens", "right_tokens"),
    *("wrong", "wrong_tokens", "reward", "reward_std", "metas", "parsed", "estimates", "error", "meta_tokens"),
    *("scored", "length", "difficulty", "notion", "notions", "generic", "meta_reward_std"),
    *("loss", "kl", "trained", "nats", "clipped", "clip_low", "clip_high"),
    *("served", "mismatch", "is_weight", "is_capped"),
    *(f"p_hat/{k}" for k in range(GRID + 1)),
)
SHARES = {
    "accuracy": ("correct", "solutions"),
    "share/answered": ("answered", "solutions"),
    "share/verifier_failed": ("failed", "solutions"),
    "solution_length": ("solution_tokens", "solutions"),
    "share/at_limit": ("at_limit", "solutions"),  # unfinished for want of room
    "share/cut": ("cut", "solutions"),  # ended by the cutoff
    "share/gated": ("gated", "problems"),
    "share/unsampled": ("unsampled", "problems"),  # gated and not sampled all the same
    "probe/flat": ("flat_probes", "probes"),  # gated problems, sampled, that the gate was right about
    "share/flat": ("flat", "solved_groups"),  # all right or all wrong
    "meta_length": ("meta_tokens", "metas"),
    "meta/parsed": ("parsed", "metas"),
    "meta/error": ("error", "estimates"),  # mean |p_hat - p|
    "meta/length": ("length", "scored"),
    "meta/difficulty": ("difficulty", "scored"),
    "meta/notion": ("notion", "scored"),
    "share/flat_metas": ("flat_metas", "meta_groups"),
    "share/generic": ("generic", "notions"),  # foreseen notions that nearly every solution holds
    "share/clipped": ("clipped", "trained"),  # also by the dual clip
    "share/clip_low": ("clip_low", "trained"),
    "share/clip_high": ("clip_high", "trained"),
    "entropy": ("nats", "trained"),  # mean -log p of the trained tokens, nats: estimates the entropy at temperature 1
    "server/mismatch": ("mismatch", "served"),  # mean |log-probability here - at the server|
    "server/weight": ("is_weight", "served"),  # mean importance weight of its tokens
    "server/capped": ("is_capped", "served"),
    "reward": ("reward", "solutions"),
    "reward_std": ("reward_std", "solved_groups"),  # of a problem's solutions, mean over problems
    "meta/reward_std": ("meta_reward_std", "meta_groups"),
    "solution_length/right": ("right_tokens", "correct"),
    "solution_length/wrong": ("wrong_tokens", "wrong"),
}


class Tally(dict[str, float]):
    """COUNTS of this rank."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(COUNTS, 0.0))

    def metrics(self, ranks: Ranks) -> dict[str, Any]:
        """The step's row, over all ranks; a share of nothing is None."""
        total = ranks.sum(torch.tensor([self[name] for name in COUNTS], dtype=torch.float64, device=ranks.device))
        count = dict(zip(COUNTS, total.tolist(), strict=True))
        row: dict[str, Any] = {k: count[a] / count[b] if count[b] else None for k, (a, b) in SHARES.items()}
        row |= {
            "loss": count["loss"],
            "kl": count["kl"],
            "sampled": int(count["solution_tokens"] + count["meta_tokens"]),
        }
        row |= {"solution_tokens": int(count["solution_tokens"]), "meta_tokens": int(count["meta_tokens"])}
        return row | {"p_hat": [int(count[f"p_hat/{k}"]) for k in range(GRID + 1)]}


def count_group(tally: Tally, g: Group, max_new: int) -> None:
    """Add one scored group to the counts of a step."""
    tally["problems"] += 1
    tally["gated"] += g.gated
    tally["probes"] += g.probe
    tally["flat_probes"] += g.probe and g.flat
    tally["unsampled"] += not g.solutions
    tally["metas"] += len(g.metas)
    tally["meta_tokens"] += sum(len(r.ids) for r in g.metas)
    for p in g.predictions:
        tally["parsed"] += p is not None
        if p is not None and p.p_hat is not None:
            tally[f"p_hat/{round(GRID * p.p_hat)}"] += 1
    if g.outcome is None:
        return
    tally["solved_groups"] += 1
    tally["flat"] += g.flat
    tally["meta_groups"] += bool(g.metas)
    tally["flat_metas"] += bool(g.metas) and len({r.reward for r in g.metas}) < 2
    tally["solutions"] += len(g.solutions)
    right, right_tokens = sum(g.outcome.correct), sum(g.outcome.correct_lengths)
    tally["correct"] += right
    tally["wrong"] += len(g.solutions) - right
    tally["right_tokens"] += right_tokens
    tally["wrong_tokens"] += sum(g.outcome.lengths) - right_tokens
    tally["reward"] += sum(r.reward for r in g.solutions)
    tally["reward_std"] += statistics.pstdev(r.reward for r in g.solutions)
    tally["meta_reward_std"] += statistics.pstdev(r.reward for r in g.metas) if g.metas else 0.0
    tally["answered"] += sum(g.outcome.answered)
    tally["failed"] += g.outcome.failed
    tally["solution_tokens"] += sum(g.outcome.lengths)
    tally["cut"] += sum(r.cut and r.limit < max_new for r in g.solutions)
    tally["at_limit"] += sum(r.cut and r.limit == max_new for r in g.solutions)
    for p, parts in zip(g.predictions, g.parts, strict=True):
        for name, value in zip(("length", "difficulty", "notion"), parts, strict=True):
            tally[name] += value
        tally["scored"] += 1
        if p is not None and p.p_hat is not None:
            tally["estimates"] += 1
            tally["error"] += abs(p.p_hat - g.outcome.p)
        for notion in {lemma(n) for n in (p.notions if p is not None and p.notions else ())}:
            tally["notions"] += 1
            tally["generic"] += sum(notion in text for text in g.outcome.texts) >= GENERIC * len(g.outcome.texts)
