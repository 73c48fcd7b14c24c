"""The records of one step: a completion and what it earned, a problem and all that was sampled for it."""

from dataclasses import dataclass, field

from torch import Tensor

from masa.problems import Prediction, Problem
from masa.rewards import Outcome


@dataclass
class Rollout:
    """One completion and what it earned.

    logp: (T,) under the policy that sampled it, kept where updates > 1. served: T of the server that sampled it.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    cut: bool  # ended at its limit and not by itself
    limit: int
    reward: float = 0.0
    advantage: float = 0.0
    logp: Tensor | None = None
    served: list[float | None] | None = None


@dataclass
class Group:
    """A problem and all that was sampled for it in one step. place: its number among the problems of the step."""

    place: int
    problem: Problem
    metas: list[Rollout] = field(default_factory=list)
    solutions: list[Rollout] = field(default_factory=list)
    predictions: list[Prediction | None] = field(default_factory=list)
    parts: list[tuple[float, float, float]] = field(default_factory=list)  # of each meta's reward
    outcome: Outcome | None = None  # None: gated and not sampled
    gated: bool = False
    probe: bool = False  # gated, and sampled to see whether the gate is right
    metas_only: bool = False  # its solutions stay out of the loss

    @property
    def trained(self) -> list[Rollout]:
        """The rollouts that enter the loss."""
        return self.metas if self.metas_only else self.solutions + self.metas

    @property
    def flat(self) -> bool:
        """All solutions right, or all wrong: they have nothing to teach."""
        return self.outcome is not None and len(set(self.outcome.correct)) < 2


@dataclass(frozen=True)
class Job:
    """A completion to sample. seed: see sample.seed_of."""

    prompt_ids: list[int]
    seed: int
    limit: int
