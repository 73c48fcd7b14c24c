"""The policy gradient: advantages within a group, the clipped and dual-clipped ratio, log-probabilities of tokens.

Section 3.1 of the paper, with the constants of the released configuration.
"""

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

import data
import model as qwen
from kernels.segment_logprob import segment_logprob

LOG_RATIO = 20.0  # log-ratios are clamped to +-this before exp
HEAD_CHUNK = 1024  # rows of logits at once where the head is trained too


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-6) of one group, std with n - 1. All equal: 0. One alone: its reward (mean 0, std 1)."""
    if len(rewards) == 1:
        return [rewards[0] / (1 + 1e-6)]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(r - mean) / (std + 1e-6) if std else 0.0 for r in rewards]


def policy_loss(
    logp: Tensor, old: Tensor, advantage: Tensor, low: float, high: float, dual: float
) -> tuple[Tensor, Tensor]:
    """Each token's loss (M,), to be minimised, and whether clipping took its gradient (M,) bool. Section 3.1.

    logp, old (M,): log-probabilities under the policy and under the one that sampled. advantage (M,).
    """
    ratio = (logp - old).clamp(-LOG_RATIO, LOG_RATIO).exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)  # - min[rho A, clip(rho) A]
    bound = -advantage * dual  # DAPO's code: a wrong token that became far more likely must not dominate
    limited = (advantage < 0) & (bound < loss)
    return torch.where(limited, bound, loss), (clipped > plain) | limited


def server_weights(old: Tensor, served: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(weights (M,) of the tokens that a server sampled, log-ratios (M,)); a token without a log-probability: 1 and 0.

    min(cap, exp(old - served)) corrects for numerics in which the server differs from us: the token was drawn with its
    probability, the objective asks for ours. old, served (M,): log-probabilities here and there; NaN in served: none.
    Truncated as in https://fengyao.notion.site/off-policy-rl, which TRL and verl follow, and not differentiated.
    """
    log_ratio = torch.where(served.isnan(), 0.0, old - served)
    return log_ratio.clamp(-LOG_RATIO, LOG_RATIO).exp().clamp(max=cap), log_ratio


def kl_to_reference(logp: Tensor, reference: Tensor) -> Tensor:
    """(M,), at least 0: k3 estimate of KL(policy || reference) at every sampled token, unbiased under the policy.

    http://joschu.net/blog/kl-approx.html; GRPO (arXiv 2402.03300) Eq. 4.
    """
    log_ratio = reference - logp
    return log_ratio.exp() - log_ratio - 1


def token_logp(model: qwen.Qwen3, batch: data.Batch, temperature: float, impl: str) -> Tensor:
    """(M,) fp32: log-probability of every completion token at the temperature it was sampled with."""
    hidden = model(batch.ids, batch.cu_seqlens)[batch.predict] / temperature  # (M, E)
    M = len(batch.targets)
    if not model.head.requires_grad:  # each token is a sequence of its own to the op
        return segment_logprob(hidden, model.head, batch.targets, batch.w, torch.arange(M + 1), impl)[1]
    parts = zip(hidden.split(HEAD_CHUNK), batch.targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([recompute(_head_logp, h, model.head, y, use_reentrant=False) for h, y in parts])


def _head_logp(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
