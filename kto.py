"""The losses: KTO, MR-ALIGN and the SFT baseline, as pure functions of per-row sums.

KTO and MR-ALIGN are one formula. A row's implicit reward is the policy's minus the reference's sum of w_t * log p_t
over the completion: w_t = 1 everywhere is KTO (Eq. 1), w_t from em.segment_weights on the thinking tokens is MR-ALIGN
(Eq. 9; answer, tags and end token keep 1). The sums come from kernels.segment_logprob. z0 (Eq. 2) never sees w.

`LOSSES` at the end has one row for every loss that can be trained; nothing else in the project lists them.

One optimiser step, for rows b, the same numbers however the rows are split into ranks and micro-batches:
  1. without gradient, for the mismatched pairs (prompt b, completion b+1): kl_b = sum log pi - sum log pi_ref;
     (sum of kl_b, number of pairs) are added up over the micro-batches and all ranks, then `z0_estimate`
  2. per micro-batch: `LOSSES[name].of(sums, strength).sum() / rows of the step`, backward
  3. `reward_stats` of every micro-batch are added up; one all-reduce of that one small tensor serves every metric

Worked by hand: log-ratios .2, -.1, .3 on three steps and .4 on the answer, w = .9429, 2.2770,
1.0005. KTO: r = .8. MR-ALIGN: r = .2*.9429 - .1*2.2770 + .3*1.0005 + .4 = .66103. With z0 = .05, beta = .1, chosen and
lambda_c = 1: v = sigmoid(.1 * (.66103 - .05)) = .515271, loss = 1 - v = .484729.

Left out: paired losses, a token-level KL penalty, length normalisation (rewards are sums, so longer rows weigh more).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Rows and columns of reward_stats.
CLASSES = ("rejected", "chosen")
STAT_FIELDS = ("count", "loss", "rewards", "rewards_raw", "logps")


def implicit_reward(weighted: Tensor, ref_weighted: Tensor) -> Tensor:
    """r_theta (B,): sum of w_t * log(pi_theta / pi_ref) over the completion tokens (Eq. 1 with w = 1, else Eq. 9).

    weighted, ref_weighted (B,): sums of w_t * log p_t under the policy and under the reference, in nats, fp32 or fp64.
    """
    assert weighted.shape == ref_weighted.shape and weighted.ndim == 1, (weighted.shape, ref_weighted.shape)
    assert not ref_weighted.requires_grad, "the reference is fixed: compute its sums under torch.no_grad()"
    return weighted - ref_weighted  # Eq. 1, 9


def z0_estimate(
    kl_sum: Tensor, kl_count: Tensor | int, ema_state: Tensor | float = 0.0, ema: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(z0, new ema_state), both 0-dim: the baseline of one optimiser step (Eq. 2).

    kl_sum (): sum over ALL mismatched pairs of the step, every rank and micro-batch, of the unweighted log-ratio, nats.
    kl_count (): how many pairs that were, at least one.
    ema in [0, 1): share of the previous state kept; 0 = this step's mean alone. The state is the unclamped average; it
    starts at 0, which is exact while the adapters are zero, and belongs in the checkpoint.

    PAPER: "estimated in practice by a moving average", no more.  HERE: mean over mismatched pairs of the whole step,
    clamped at 0 after the mean, optional EMA.  WHY: the mean is KTO's own estimator; a KL is not negative, but clamping
    its terms first would bias it upwards; a z0 per micro-batch would make the loss depend on how the rows are split.
    """
    assert kl_sum.ndim == 0 and not kl_sum.requires_grad, "z0 is a constant: sum the log-ratios under torch.no_grad()"
    assert 0 <= ema < 1, ema
    state = ema * ema_state + (1 - ema) * (kl_sum / kl_count)
    return state.clamp(min=0), state


def kto_loss(r: Tensor, z0: Tensor, chosen: Tensor, beta: float, lambda_c: float, lambda_r: float) -> Tensor:
    """Loss of each row (B,), >= 0: lambda_y - v (Eq. 3-4; Eq. 11-12 when r is weighted).

    r (B,): implicit rewards. z0 (): baseline, without gradient. chosen (B,) bool: True for D+, False for D-.
    The caller divides the sum by the rows of the whole optimiser step. Any mix of classes, and B = 0, is fine: no
    branch looks at the data, so ranks never disagree about what to compute.
    """
    assert r.ndim == 1 and r.shape == chosen.shape and chosen.dtype == torch.bool, (r.shape, chosen.shape, chosen.dtype)
    assert z0.ndim == 0 and not z0.requires_grad, "z0 is a constant"
    gain = torch.where(chosen, r - z0, z0 - r)  # the argument of sigma in Eq. 3, 12, over beta
    lambda_y = torch.where(chosen, torch.full_like(r, lambda_c), torch.full_like(r, lambda_r))
    # lambda_y - v = lambda_y * (1 - sigma(beta gain)) = lambda_y * sigma(-beta gain): the last form keeps its digits
    # and its gradient when sigma is close to 1.
    return lambda_y * torch.sigmoid(-beta * gain)  # Eq. 4, 11


def sft_loss(plain: Tensor, n_tokens: int | Tensor) -> Tensor:
    """Each row's share (B,) of the step's cross-entropy per token; their sum over the step is the loss, in nats.

    plain (B,): sums of log p over completion tokens. n_tokens: completion tokens of the WHOLE step, all ranks.
    PAPER: not stated.  HERE: mean over the step's tokens.  WHY: the usual supervised loss, whatever the split.
    """
    assert plain.ndim == 1, plain.shape
    return -plain / n_tokens


@torch.no_grad()
def reward_stats(loss: Tensor, r: Tensor, r_raw: Tensor, logps: Tensor, chosen: Tensor, beta: float) -> Tensor:
    """Per-class sums (2, 5) fp64 of one micro-batch: rows rejected and chosen, columns STAT_FIELDS.

    All inputs (B,): row losses, weighted and unweighted implicit rewards, sums of log p, class. Always the same shape,
    so adding micro-batches, ranks and steps is one `+` or one all-reduce; `metrics` divides at the end. A class that is
    absent contributes zeros.
    """
    columns = torch.stack([torch.ones_like(loss), loss, beta * r, beta * r_raw, logps], dim=1)  # (B, 5)
    members = torch.stack([~chosen, chosen])  # (2, B)
    return members.double() @ columns.double()


def metrics(stats: Tensor) -> dict[str, float]:
    """Means under TRL's metric names from summed `reward_stats` (2, 5).

    loss: over all rows. rewards/*: beta * r_theta per class; rewards/margins: chosen minus rejected.
    rewards_raw/*: the same with w = 1.
    logps/*: sums of log p per row, in nats. count/*: rows. A class without rows has no entry but its count.
    """
    by_class = {
        name: dict(zip(STAT_FIELDS, row, strict=True)) for name, row in zip(CLASSES, stats.tolist(), strict=True)
    }
    total = sum(sums["count"] for sums in by_class.values())
    assert total > 0, "no row was counted"
    out = {"loss": sum(sums["loss"] for sums in by_class.values()) / total}
    for name, sums in by_class.items():
        out[f"count/{name}"] = sums["count"]
        if sums["count"]:
            for field in ("rewards", "rewards_raw", "logps"):
                out[f"{field}/{name}"] = sums[field] / sums["count"]
    if all(sums["count"] for sums in by_class.values()):
        for field in ("rewards", "rewards_raw"):
            out[f"{field}/margins"] = out[f"{field}/chosen"] - out[f"{field}/rejected"]
    return out


# ---------- the table of losses


class Strength(Protocol):
    """The settings a loss may read."""

    @property
    def beta(self) -> float: ...

    @property
    def lambda_c(self) -> float: ...

    @property
    def lambda_r(self) -> float: ...


@dataclass(frozen=True)
class Sums:
    """What a loss is made of, for the B rows of a micro-batch. Sums of log p over completion tokens, in nats."""

    weighted: Tensor  # (B,) sum of w_t * log pi(y_t)
    plain: Tensor  # (B,) sum of log pi(y_t)
    ref_weighted: Tensor  # (B,) the same under the reference, for a loss that has one
    ref_plain: Tensor  # (B,)
    chosen: Tensor  # (B,) bool
    z0: Tensor  # () Eq. 2 of the whole step, for a loss that has it
    n_rows: int  # of the whole step, all ranks
    n_tokens: Tensor  # () completion tokens of the whole step, all ranks


@dataclass(frozen=True)
class Loss:
    """One way to train. of(sums, strength): the loss of each row (B,); the step's loss is their sum over n_rows."""

    title: str  # what tables call it
    of: Callable[[Sums, Strength], Tensor]
    weights: str  # of the steps: "own" (Eq. 10), "ones", "shuffled" among the steps of a class, or its "mean"
    rate: str  # the setting that is its peak learning rate
    rows: str = "all"  # "all", "chosen" or "rejected": those it trains on
    reference: bool = True  # it compares with the reference policy
    z0: bool = True  # it subtracts Eq. 2's baseline
    study: bool = True  # `make study` trains it
    # Its value before training, where policy and reference agree, from the shares (chosen, rejected) of the rows.
    first: Callable[[float, float, Strength], float] | None = None

    def keeps(self, chosen: bool) -> bool:
        """Whether it trains on a row of this class."""
        return {"all": True, "chosen": chosen, "rejected": not chosen}[self.rows]


def _kto(sums: Sums, s: Strength) -> Tensor:
    """KTO's loss of each row; MR-ALIGN's with the weights of Eq. 10."""
    r = implicit_reward(sums.weighted, sums.ref_weighted)  # Eq. 9; w = 1: Eq. 1
    return kto_loss(r, sums.z0, sums.chosen, s.beta, s.lambda_c, s.lambda_r)  # Eq. 11-12; w = 1: Eq. 3-4


def _apo_zero(sums: Sums, s: Strength) -> Tensor:
    """APO-zero for unpaired rows (D'Oosterlinck et al. 2024, as TRL has it): KTO against a baseline of exactly 0."""
    r = implicit_reward(sums.weighted, sums.ref_weighted)
    return kto_loss(r, torch.zeros_like(sums.z0), sums.chosen, s.beta, s.lambda_c, s.lambda_r)


def _sft(sums: Sums, s: Strength) -> Tensor:
    """Cross-entropy of the chosen rows."""
    return sft_loss(sums.plain, sums.n_tokens) * sums.n_rows


def _half(chosen: float, rejected: float, s: Strength) -> float:
    """r = 0 and z0 = 0: every row is at sigma(0)."""
    return 0.5 * (s.lambda_c * chosen + s.lambda_r * rejected)


LOSSES = {
    "sft": Loss("SFT", _sft, weights="ones", rate="sft_lr", rows="chosen", reference=False, z0=False),
    "kto": Loss("KTO", _kto, weights="ones", rate="lr", first=_half),
    "mralign": Loss("MR-ALIGN", _kto, weights="own", rate="lr", first=_half),
    "shuffled": Loss("MR-ALIGN, weights shuffled", _kto, weights="shuffled", rate="lr", first=_half),
    "apo_zero_unpaired": Loss("APO-zero", _apo_zero, weights="ones", rate="lr", z0=False, study=False, first=_half),
    "mean": Loss("KTO, mean weight of the class", _kto, weights="mean", rate="lr", study=False, first=_half),
}
