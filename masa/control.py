"""What foresight is used for (section 3.3): which problems are sampled at all, how long, and with which hint.

Imports no torch.
"""

import random
import statistics
from collections.abc import Sequence

from masa.problems import Prediction

SHORTEST_CUT = 32  # tokens: no cutoff is lower


def is_gated(predictions: Sequence[Prediction | None], std: float, margin: float) -> bool:
    """Whether a problem is foreseen, with little spread, to be solved always or never (3.3): it would teach nothing."""
    # PAPER: v1 "std < 0.1" and beyond or below capacity; v2 "the mean prediction is 0 or 1".
    # HERE:  std < gate_std, the mean within gate_margin of 0 or 1, and at least half of the metas parsed.
    # WHY:   a mean that is exactly 0 or 1 has no spread, so the first test only means something with a margin.
    rates = [p.p_hat for p in predictions if p is not None and p.p_hat is not None]
    if not std or 2 * len(rates) < len(predictions):
        return False
    mean = statistics.fmean(rates)
    return statistics.pstdev(rates) < std and (mean in (0, 1) or not margin <= mean <= 1 - margin)


def cut_at(predictions: Sequence[Prediction | None], times: float, max_new: int) -> int:
    """Most tokens of a solution (3.3): `times` the median foreseen length; max_new if fewer than half foresee one."""
    # A policy may foresee a number of any size; beyond max_new it makes no difference.
    lengths = [min(p.length, max_new) for p in predictions if p is not None and p.length is not None]
    if not times or 2 * len(lengths) < len(predictions):
        return max_new
    return min(max(int(times * statistics.median(lengths)), SHORTEST_CUT), max_new)


def hint_of(predictions: Sequence[Prediction | None], seed: int) -> tuple[str, ...]:
    """The notions of one meta, drawn among those that name any."""
    named = [p.notions for p in predictions if p is not None and p.notions]
    return random.Random(seed).choice(named) if named else ()
