"""Experts: metas of the policy with their numbers corrected by what the solutions turned out to be (v1 3.3, Alg. 1).

They are cloned after an RL step, once there are enough of them. Without --expert-levels an expert needs a good notion
reward, which by counts only problems with more right than wrong solutions give: the clones then learn to be too sure.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from masa.problems import GRID, Prompts, meta_text
from masa.rewards import reward_notion
from masa.rollouts import Group


class Expert(NamedTuple):
    """A corrected meta. level: its pass rate in eighths, 0 to 8."""

    prompt_ids: list[int]
    ids: list[int]
    level: int


def expert_of(g: Group, prompts: Prompts, least: float, levels: bool = False) -> Expert | None:
    """A group's meta with the best notions, its two numbers replaced by what the solutions turned out to be.

    None when no meta has <meta> tags and a notion reward of `least` or more, which takes a right solution. levels:
    notions are compared by share (see reward_notion), and problems without a right solution give an expert too: its
    first readable meta, with pass rate 0 and the length as foreseen. Where all solutions are right or all are wrong,
    no notion can tell them apart, and `least` does not count.
    """
    # The reasoning is left as it is and may contradict the corrected numbers; the paper does the same.
    ranked = []
    for k, (parts, p) in enumerate(zip(g.parts, g.predictions, strict=True)):
        if p and p.reasoning:
            notion = reward_notion(p.notions, g.problem.text, g.outcome, rate=True) if levels else parts[2]
            ranked.append((notion, -k))
    if not ranked:
        return None
    best, k = max(ranked)[0], -max(ranked)[1]
    right, chosen = g.outcome.correct_lengths, g.predictions[k]
    good = best >= least or (levels and g.flat)
    if not good or not (right or (levels and chosen.length)):
        return None
    end = prompts.end if g.metas[k].cut else g.metas[k].ids[-1]  # the policy's own way to end
    length, level = int(statistics.fmean(right)) if right else chosen.length, round(GRID * g.outcome.p)
    text = meta_text(chosen.reasoning, chosen.notions or (), level, length)
    return Expert(prompts.meta(g.problem.text), [*prompts.encode(text), end], level)


def expert_weights(experts: Sequence[Expert], levels: bool = False) -> list[float]:
    """The weight of each token of each expert in the loss: a mean over all tokens.

    levels: a mean over the tokens of each pass rate, then over the pass rates, so that each of them counts alike.
    """
    tokens: Counter[int] = Counter()
    for e in experts:
        tokens[e.level if levels else 0] += len(e.ids)
    return [1 / (len(tokens) * tokens[e.level if levels else 0]) for e in experts]
