"""What a solution and a meta earn: section 3 of the paper, in its order and with its equation numbers.

Given a problem's G solutions, o_1..o_G, each right or wrong:

    r_sol  = 1 if the verifier accepts the solution, else 0
    Eq. 1    r_length     = 1 if the foreseen length lies within the lengths of the right solutions, else 0
    Eq. 2    r_difficulty = 0.01 ** |foreseen pass rate - measured pass rate|
    Eq. 3, 4 r_notion     = share of the foreseen notions that more right than wrong solutions hold
    v2 Eq. 2 r_meta       = (r_length + r_difficulty + r_notion) / 3

Imports no torch. Equation numbers are those of the paper's first version unless v2 is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from masa.problems import Prediction

BASE = 0.01  # of the difficulty reward: one eighth off is worth 0.56, two 0.32


@dataclass(frozen=True)
class Outcome:
    """What a problem's G solutions turned out to be: the ground truth of its metas."""

    correct: tuple[bool, ...]
    answered: tuple[bool, ...]  # whether there was an answer at all
    lengths: tuple[int, ...]  # tokens, with the end token
    texts: tuple[str, ...]
    failed: int = 0  # solutions that are wrong only because the verifier failed

    @property
    def p(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def correct_lengths(self) -> list[int]:
        return [n for n, right in zip(self.lengths, self.correct, strict=True) if right]


def overlong_penalty(length: int, max_new: int, buffer: int) -> float:
    """DAPO's soft penalty of long solutions, 0 to -1, added to r_sol: it grows over the last `buffer` tokens.

    DAPO (arXiv 2503.14476) Eq. 13. The paper leaves it out of its DAPO, since it hurt at 8,192 tokens.
    """
    return -min(1.0, max(0, length - (max_new - buffer)) / buffer) if buffer else 0.0


def reward_length(length: int | None, outcome: Outcome) -> float:
    """1 if the foreseen length lies within those of the right solutions, both ends included; 0 without any. Eq. 1."""
    # PAPER: min <= length <= max.  RELEASED CODE: <, so that one right solution can never be foreseen.  HERE: <=.
    right = outcome.correct_lengths
    return float(length is not None and bool(right) and min(right) <= length <= max(right))


def reward_difficulty(p_hat: float | None, p: float) -> float:
    """0.01 ** |p_hat - p|, Eq. 2."""
    return 0.0 if p_hat is None else BASE ** abs(p_hat - p)


def lemma(notion: str) -> str:
    """A regular English plural without its ending, everything else as it is.

    >>> [lemma(n) for n in ("identities", "boxes", "medians", "class", "power series")]
    ['identity', 'box', 'median', 'class', 'power series']
    """
    low = notion.lower()
    if low.endswith("series") or low.endswith("ss") or not low.endswith("s"):
        return notion
    if low.endswith("ies"):
        return notion[:-3] + "y"
    return notion[:-2] if low.endswith(("ches", "shes", "xes", "zes", "oes")) else notion[:-1]


def reward_notion(notions: Sequence[str] | None, problem: str, outcome: Outcome, rate: bool = False) -> float:
    """The share of the notions that more right than wrong solutions hold, Eq. 3 and 4.

    Notions are cut to their lemma, those in the problem's own text do not count, nor does a repetition. rate: compare
    shares of right and wrong solutions; counts reward any common word once p > 1/2.
    """
    # RELEASED CODE: leaves out every notion found in the meta prompt, its instructions included.
    # HERE:          those of the problem.
    # WHY:           the paper says the problem; the instructions' words would go too.
    distinct = {lemma(n) for n in notions or ()}
    distinct = {n for n in distinct if n.strip() and n not in problem}
    if not distinct:
        return 0.0
    n_right = sum(outcome.correct)
    n_wrong = len(outcome.correct) - n_right
    per = (max(n_right, 1), max(n_wrong, 1)) if rate else (1, 1)
    won = 0
    for notion in distinct:
        held = [right for right, text in zip(outcome.correct, outcome.texts, strict=True) if notion in text]
        won += sum(held) / per[0] > (len(held) - sum(held)) / per[1]
    return won / len(distinct)


def reward_meta(
    prediction: Prediction | None, problem: str, outcome: Outcome, rate: bool = False
) -> tuple[float, float, float]:
    """(length, difficulty, notion): a meta's reward is their mean, a part that is missing counts 0. v2 Eq. 2."""
    if prediction is None:
        return 0.0, 0.0, 0.0
    length = reward_length(prediction.length, outcome)
    return (
        length,
        reward_difficulty(prediction.p_hat, outcome.p),
        reward_notion(prediction.notions, problem, outcome, rate),
    )
