"""Gradients of the adapters on a device, and what must be exactly zero there: two parts of gpu_check.

  gradients  a small model with heads of 128, packed rows, every level of recomputation, against fp64 on the CPU; in
             bf16 beside PEFT's arithmetic under autocast, on the same device through the same other kernels
  zero       the log-ratios of a fresh adapter, and a switched-off adapter against the base model, bit for bit

Left out: DDP and shards (tests), large shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from common import costs
from common.model_config import ModelConfig
from kernels.segment_logprob import default_impl, segment_logprob
from model import Qwen3

SHAPE = dict(vocab_size=515, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, head_dim=128, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1e6)
CONFIG = ModelConfig(**SHAPE, max_position_embeddings=512, eos_token_id=0)
ROWS = torch.tensor([0, 5, 130, 131, 200])  # where packed rows start and end; one has no target
FP32 = 1e-4  # allowed relative error, in the norm
TIMES_PEFT = 1.2  # in bf16 as many times PEFT's, of all gradients and of the worst tensor


def random_model(dtype: torch.dtype, device: torch.device, seed: int = 0) -> Qwen3:
    """A frozen model whose weights are the same bf16 numbers in every dtype."""
    torch.manual_seed(seed)
    net = Qwen3(CONFIG).requires_grad_(False)
    for p in net.parameters():
        p.copy_((4.0 * p if p.ndim > 1 else p).bfloat16())  # so that attention is not flat
    return net.to(device, dtype)


def adapters(net: Qwen3, size: float) -> list[nn.Parameter]:
    """Adapters of rank 8, normal numbers of this deviation added to each."""
    masters, g = lora.add(net, 8, 16.0), torch.Generator().manual_seed(1)
    for p in masters:
        p.data += size * torch.randn(p.shape, generator=g).to(p)
    return masters


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, targets, w), (N,) each: every token of a row but its first is a target."""
    g = torch.Generator().manual_seed(2)
    ids, w = torch.randint(1, 515, (int(ROWS[-1]),), generator=g), torch.rand(int(ROWS[-1]), generator=g)
    targets = ids.roll(-1)
    targets[ROWS[1:] - 1] = -100
    return ids.to(device), targets.to(device), w.to(device)


def sums(net: Qwen3) -> Tensor:
    """(rows,) weighted log-probabilities."""
    device = net.head.device
    ids, targets, w = inputs(device)
    return segment_logprob(net(ids, ROWS), net.head, targets, w, ROWS, default_impl(device))[0]


def gradients_of(net: Qwen3, masters: list[nn.Parameter]) -> list[Tensor]:
    """Of the rows' sums, each times another number, in fp64 on the CPU."""
    found = sums(net)
    g = torch.tensor([0.7, -1.0, 0.4, 1.3]).to(found)
    return [x.double().cpu() for x in torch.autograd.grad(found, masters, g)]


def apart(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Relative error, in the norm, of all gradients together and of the worst tensor."""
    pairs = [(float((a - b).norm()), float(b.norm())) for a, b in zip(found, exact, strict=True)]
    whole = sum(d**2 for d, _ in pairs) / sum(n**2 for _, n in pairs)
    return whole**0.5, max(d / n for d, n in pairs)


def peft_forward(self: lora.LoRALinear, x: Tensor) -> Tensor:
    """PEFT's linear layer as autocast runs it: masters rounded to x's dtype, and so is every result and gradient."""
    low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
    return F.linear(x, self.weight, self.bias) + low * (self.alpha / self.r)


@contextmanager
def computing(forward: Callable[[lora.LoRALinear, Tensor], Tensor]) -> Iterator[None]:
    """Inside, layers with adapters that are not stacked compute so."""
    before = lora.LoRALinear.forward
    try:
        lora.LoRALinear.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        lora.LoRALinear.forward = before  # type: ignore[method-assign]


def gradients(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row a dtype and level of recomputation."""
    net = random_model(torch.float32, torch.device("cpu"))
    masters = adapters(net, 0.05)
    net.double()  # and the adapters with it
    exact = gradients_of(net, masters)
    for dtype in (torch.bfloat16, torch.float32):
        net = random_model(dtype, device)
        masters = adapters(net, 0.05)
        with computing(peft_forward):
            bound = apart(gradients_of(net, masters), exact)
        net.stack()
        for level in costs.RECOMPUTE:
            net.recompute = level
            off = apart(gradients_of(net, masters), exact)
            row = {"dtype": str(dtype).removeprefix("torch."), "recomputed": level, "gradients off by": off[0]}
            row |= {"PEFT's arithmetic off by": bound[0], "worst tensor off by": off[1], "PEFT's worst": bound[1]}
            near = all(a <= TIMES_PEFT * b for a, b in zip(off, bound, strict=True))
            yield row | {"ok": off[0] <= FP32 if dtype == torch.float32 else near}


@torch.no_grad()
def zero(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row a dtype: the policy with its gradient and the reference without, over the same packed rows."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        net, ids = random_model(dtype, device), inputs(device)[0]
        if dtype != torch.float32:  # adapters in fp32 add up layer by layer
            net.stack()
        base = net(ids, ROWS)
        masters = adapters(net, 0.0)
        net.stack()
        with torch.enable_grad():
            policy = sums(net)
        with lora.disabled(net):
            ratio = float((policy - sums(net)).abs().max())
        fresh = torch.equal(net(ids, ROWS), base)
        for p in masters:
            p.add_(0.05)
        moved = not torch.equal(net(ids, ROWS), base)
        with lora.disabled(net):
            off = torch.equal(net(ids, ROWS), base)
        row = {"dtype": str(dtype).removeprefix("torch."), "first log-ratio": ratio, "fresh is the base": fresh}
        yield row | {"off is the base": off, "on moves it": moved, "ok": ratio == 0 and fresh and off and moved}
