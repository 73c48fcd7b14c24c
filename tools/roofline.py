"""The roofline of an optimiser step: operations, bytes and memory by part, and the least time a GPU can take for each.

    python -m tools.roofline --model Qwen/Qwen3-8B --gpu h100 --rows 8 --tokens 900

A prediction from the shapes alone (common/costs.py): a product takes its operations over the peak, an elementwise pass
its bytes over the bandwidth, and nothing overlaps. Left out: launches, the optimiser, waiting for other ranks.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from common import costs
from common.endings import program
from common.errors import InputError
from common.model_config import ModelConfig
from common.table import markdown
from pipeline.plan import shape_of

PROMPT = 0.25  # share of a row


def products(c: ModelConfig, r: int, rows: costs.Lengths, card: costs.GPU) -> list[dict[str, Any]]:
    """A row a kind of matrix product, for recomputation of nothing, or of whole layers."""
    names = {
        "base": "frozen weights",
        "lora": "adapters",
        "attention": "attention, causal",
        "head": "head, two products",
    }
    kept, again = (costs.step_flops(c, r, rows, rows, level) for level in ("none", "full"))
    table = []
    for kind in (*names, "all"):
        flops = [sum(of.values()) if kind == "all" else of[kind] for of in (kept, again)]
        ms = [f"{1e3 * x / card.tflops / 1e12:,.0f}" for x in flops]
        row = {"products": names.get(kind, "all"), "TFLOP": f"{flops[0] / 1e12:,.1f}", "ms at the peak": ms[0]}
        table.append(row | {"layers recomputed, TFLOP": f"{flops[1] / 1e12:,.1f}", "ms": ms[1]})
    return table


def elementwise(c: ModelConfig, size: int, tokens: int, card: costs.GPU) -> list[dict[str, Any]]:
    """A row a fusion: what eager passes and the fused kernel move in a step, and the time between."""
    table, sums = [], [0.0, 0.0, 0.0]
    for part, passes in costs.elementwise_bytes(c, size).items():
        # Two forward passes, of the policy and of the mismatched pairs; one backward pass; cheap: one forward more.
        moved = [
            tokens * c.num_hidden_layers * (times * passes["forward"][way] + passes["backward"][way])
            for way, times in ((0, 2), (1, 2), (1, 3))
        ]
        sums = [a + b for a, b in zip(sums, moved, strict=True)]
        table.append({"elementwise": part} | _moved(moved, card))
    return [*table, {"elementwise": "all"} | _moved(sums, card)]


def _moved(moved: Sequence[float], card: costs.GPU) -> dict[str, str]:
    ms = [1e3 * n / card.bandwidth / 1e9 for n in moved]
    columns = {"eager, GB": moved[0] / 1e9, "fused, GB": moved[1] / 1e9, "eager, ms": ms[0], "fused, ms": ms[1]}
    return {k: f"{v:,.0f}" for k, v in (columns | {"saved, ms": ms[0] - ms[1], "with cheap, ms": ms[2]}).items()}


def levels(c: ModelConfig, r: int, size: int, tokens: int) -> list[dict[str, Any]]:
    """A row a level of recomputation: bytes that a token leaves, GB of activations and of the whole step."""
    table = []
    for level in costs.RECOMPUTE:
        kept = costs.kept_per_token(c, r, size, level, fused=True) * c.num_hidden_layers
        parts = costs.memory(c, r, size, tokens, tokens, level, True, tokens)
        row = {"recomputed": level, "kB a token": f"{kept / 1e3:,.0f}", "activations, GB": f"{kept * tokens / 1e9:.1f}"}
        table.append(row | {"the step, GB": f"{sum(parts.values()) / 1e9:.1f}"})
    return table


def memory(c: ModelConfig, r: int, size: int, tokens: int, predicted: int) -> list[dict[str, Any]]:
    """A row a part of the memory at the fullest moment of a step, on one GPU, in MiB at each level of recomputation."""
    counted = {level: costs.memory(c, r, size, tokens, predicted, level, True, tokens) for level in costs.RECOMPUTE}
    rows: list[dict[str, Any]] = []
    for part in (*counted["none"], "all"):
        bytes_of = {level: sum(of.values()) if part == "all" else of[part] for level, of in counted.items()}
        if bytes_of["none"]:
            rows.append({"MiB": part} | {level: f"{n / 2**20:,.0f}" for level, n in bytes_of.items()})
    return rows


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-8B", help="a folder with config.json or a known name")
    parser.add_argument("--gpu", default="h100", choices=costs.GPUS, help="[h100]")
    parser.add_argument("--rows", type=int, default=8, help="rows of the step [8]")
    parser.add_argument("--tokens", type=int, default=900, help="tokens of a row [900]")
    parser.add_argument("--lora-r", type=int, default=32, help="[32]")
    given = parser.parse_args(argv)
    if min(given.rows, given.tokens, given.lora_r) < 1:
        raise InputError("--rows, --tokens and --lora-r must be 1 or more")
    print(report(given.model, given.gpu, given.rows, given.tokens, given.lora_r))


def report(model: str, gpu: str, rows: int, tokens: int, r: int) -> str:
    """The tables as Markdown, in bf16."""
    c, card = shape_of(model)[0], costs.GPUS[gpu]
    of = [(tokens, tokens - int(PROMPT * tokens))] * rows
    every = rows * tokens
    parts = memory(c, r, 2, every, sum(predicted for _, predicted in of))
    tables = products(c, r, of, card), elementwise(c, 2, every, card), levels(c, r, 2, every), parts
    return "\n\n".join(markdown(table) for table in tables)


if __name__ == "__main__":
    sys.exit(main())
