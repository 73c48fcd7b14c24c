"""What rounding costs a LoRA layer in bf16: one rounding of W x + s B A x, our two, PEFT's under autocast; on a CPU.

    python -m tools.rounding

Errors are against fp64 from the same bf16 weights and inputs and the same fp32 A and B, means over random draws. First
single layers of an eighth of Qwen3-8B's widths, rank 32, B so large that the low-rank part is a tenth of W x, and as
large: error of the output in the norm, and the largest, over the output's root mean square. Then a three-layer model
(gpu_gradients.py): log-probabilities in nats, root mean square and largest, and gradients of A and B. "One rounding"
sums both products in fp32, as one product over in + r columns would.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import lora
from common.endings import program
from common.errors import InputError
from kernels.segment_logprob import segment_logprob
from tools import gpu_gradients
from tools.measure import Table, markdown

SHAPES = {"q k v": (512, 768), "o": (512, 512), "gate up": (512, 3072), "down": (1536, 512)}  # in, out
TOKENS, RANK = 64, 32
CPU = torch.device("cpu")


class OneRounding(lora._LowRank):
    """Only the output differs: both products summed before it is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
        lora._LowRank.forward(ctx, x, weight, bias, A, B, *rest)
        low = x @ A.T
        return (x.float() @ weight.float().T + low.float() @ B.float().T).to(x.dtype)


def one_forward(self: lora.LoRALinear, x: Tensor) -> Tensor:
    """A layer without bias by `OneRounding`."""
    A, B = lora.stacked([self], x.dtype)
    return OneRounding.apply(x, self.weight, None, A, B, self.alpha / self.r, True, self.lora_A, self.lora_B)


Forward = Callable[[lora.LoRALinear, Tensor], Tensor]
WAYS: dict[str, Forward] = {
    "one rounding": one_forward,
    "two, ours": lora.LoRALinear.forward,
    "PEFT's": gpu_gradients.peft_forward,
}


@torch.no_grad()
def layer_errors(inner: int, out: int, share: float, seed: int) -> dict[str, tuple[float, float]]:
    """Of each way (error in the norm, largest error) of the output, over its norm and its root mean square."""
    g = torch.Generator().manual_seed(seed)
    m = nn.Module()
    m.part_proj = nn.Linear(inner, out, bias=False)
    m.part_proj.weight.copy_(torch.randn(out, inner, generator=g) * inner**-0.5)
    m.to(torch.bfloat16)
    A, B = lora.add(m, RANK, 2.0 * RANK, targets=("part_proj",), seed=seed)
    x = torch.randn(TOKENS, inner, generator=g).bfloat16()
    B.copy_(torch.randn(out, RANK, generator=g))
    B.mul_(share / float((2 * x.double() @ A.double().T @ B.double().T).square().mean().sqrt()))
    true = x.double() @ (m.part_proj.weight.double() + 2 * B.double() @ A.double()).T
    size, found = float(true.square().mean().sqrt()), {}
    for name, forward in WAYS.items():
        off = forward(m.part_proj, x).double() - true
        found[name] = float(off.square().mean().sqrt()) / size, float(off.abs().max()) / size
    return found


def model_errors(seed: int) -> dict[str, tuple[float, ...]]:
    """Of each way: log-probabilities off by (root mean square, largest); gradients (all, worst tensor)."""
    ids, targets, w = gpu_gradients.inputs(CPU)
    each = torch.arange(len(ids) + 1)

    def answers(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        net = gpu_gradients.random_model(torch.float32, CPU, seed).to(dtype)
        masters = gpu_gradients.adapters(net, 0.05)
        if dtype == torch.float64:
            net.double()
        gradients = gpu_gradients.gradients_of(net, masters)
        with torch.no_grad():
            logp = segment_logprob(net(ids, gpu_gradients.ROWS), net.head, targets, w, each, "torch")[1]
        return logp.double(), gradients

    true, found = answers(torch.float64), {}
    for name, forward in WAYS.items():
        with gpu_gradients.computing(forward):
            logp, gradients = answers(torch.bfloat16)
        off = logp - true[0]
        sizes = float(off.square().mean().sqrt()), float(off.abs().max())
        found[name] = *sizes, *gpu_gradients.apart(gradients, true[1])
    return found


def table(keys: dict[str, str], names: Sequence[str], draws: list[dict[str, tuple[float, ...]]]) -> Table:
    """A row a way: means over the draws."""
    return [
        keys | {"way": way} | {name: mean(draw[way][i] for draw in draws) for i, name in enumerate(names)}
        for way in WAYS
    ]


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5, help="random draws of each [5]")
    given = parser.parse_args(argv)
    if given.draws < 1:
        raise InputError("--draws must be 1 or more")
    layers: Table = []
    for name, shape in SHAPES.items():
        for share in (0.1, 1.0):
            draws = [layer_errors(*shape, share, seed) for seed in range(given.draws)]
            layers += table({"layer": name, "s B A x / W x": f"{share:g}"}, ("output off by", "largest"), draws)
    print(markdown(layers), flush=True)
    names = "log p off by", "largest", "gradients off by", "worst tensor"
    print(f"\n{markdown(table({}, names, [model_errors(seed) for seed in range(given.draws)]))}")


if __name__ == "__main__":
    sys.exit(main())
