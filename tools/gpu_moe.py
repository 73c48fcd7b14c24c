"""The mixture of experts on a GPU: is it right, how fast is it? The part `moe` of gpu_check, or by itself on a CPU.

    make gpu-check ARGS=moe                            on one CUDA device
    python -m tools.gpu_moe --device cpu               a layer beside transformers', on the CPU
    python -m tools.gpu_moe --device cpu --tiny        all of it on small shapes, to try this file

  product  grouped products against fp64 from the same numbers, and a token's bits alone against in a batch (shown; a
           GPU promises none)
  layer    a layer's experts and router, forward and backward to its input, beside transformers' eager loop and its
           grouped products
  decode   greedy sampling, by captured graphs where the device can, against one pass without a cache
  step     a KTO step of a model shaped like Qwen3-30B-A3B, with as many layers as fit

Weights are random. A peer that cannot run gets a note. Left out: several devices.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lora
import moe
import sample
from common import costs
from common.endings import program
from common.errors import InputError
from common.model_config import MixtureConfig, ModelConfig
from model import Qwen3
from tools import bench
from tools.measure import MIB, Table, alternate, clock, compared, environment, installed, markdown, spread

A3B = MixtureConfig(128, 8, 768, True)
QWEN3_30B_A3B = dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48)
QWEN3_30B_A3B |= dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128, tie_word_embeddings=False)
REST = dict(rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=4096, eos_token_id=0, model_type="qwen3_moe")
SMALL = dict(vocab_size=515, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
FREE = 20e9  # bytes beside the weights, for activations, the head's chunk and what the driver takes
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative error of a layer, norm by norm


@dataclass(frozen=True)
class Shapes:
    """The shapes of all parts; the defaults are for a GPU."""

    config: ModelConfig = ModelConfig(**QWEN3_30B_A3B, **REST, moe=A3B)
    tokens: int = 8192  # of the layer
    dtype: torch.dtype = torch.bfloat16
    row_tokens: tuple[int, int] = (800, 1000)  # the shortest and the longest of 8 rows of the step
    lora_r: int = 32
    rounds: int = 5


def shapes(device: torch.device, tiny: bool) -> Shapes:
    """Those of Qwen3-30B-A3B on a GPU; on a CPU a layer with a quarter of its width, in fp32; tiny: of nothing real."""
    if tiny:
        config = ModelConfig(**SMALL, **REST, moe=MixtureConfig(4, 2, 32, True))
        return Shapes(config, 64, torch.float32, (20, 40), 4, 1)
    if device.type == "cpu":
        quarter = dict(hidden_size=512, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2)
        config = ModelConfig(**QWEN3_30B_A3B | quarter, **REST, moe=dataclasses.replace(A3B, moe_intermediate_size=192))
        return Shapes(config, 1024, torch.float32, rounds=7)
    return Shapes()


# ---------- product and layer


def random_block(s: Shapes, device: torch.device) -> moe.MoE:
    """A frozen layer of these sizes, its router's probabilities not flat."""
    assert s.config.moe is not None
    torch.manual_seed(0)
    with device:
        block = moe.MoE(s.config.moe, s.config.hidden_size).requires_grad_(False)
    block.gate.weight.mul_(10)
    return block.to(s.dtype)


@torch.no_grad()
def product(device: torch.device, s: Shapes) -> Table:
    """A layer's first product, grouped and by the loop, against fp64; whether neighbours change a token's bits."""
    block = random_block(s, device)
    x = torch.randn(s.tokens, s.config.hidden_size, device=device, dtype=s.dtype)
    with moe.recorded(block) as routes:
        whole = block(x)
    source, _, ends = moe.sorted_rows(routes[0], len(block.experts.down_proj))
    rows: Table = []
    for name, way in (("grouped", moe.product), ("loop", moe.product_by_loop)):
        weight = block.experts.gate_up_proj
        got, exact = way(x[source], weight, ends), moe.product_by_loop(x[source].double(), weight.double(), ends)
        off = float((got - exact).norm() / exact.norm())
        rows.append({"part": "product", "what": name, "off by": off, "ok": off <= CLOSE[s.dtype]})
    few = min(s.tokens, 32)
    same = bool(torch.equal(block(x[:few]), whole[:few]))
    rows.append({"part": "product", "what": f"{few} tokens alone: same bits as among {s.tokens}", "same": same})
    if device.type == "cpu":
        rows[-1]["ok"] = same
    return rows


def peers(s: Shapes, block: moe.MoE) -> dict[str, Callable[[Tensor], Tensor]]:
    """transformers' layer with the same weights, in its two ways."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    assert s.config.moe is not None
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for way in ("eager", "grouped_mm"):
        fields = dataclasses.asdict(s.config.moe) | {"hidden_size": s.config.hidden_size}
        fields["mlp_only_layers"] = list(s.config.moe.mlp_only_layers)
        config = Qwen3MoeConfig(**fields)
        config._experts_implementation = way
        theirs = Qwen3MoeSparseMoeBlock(config).to(block.gate.weight).requires_grad_(False)
        theirs.load_state_dict(block.state_dict())
        found[f"transformers {way}"] = lambda x, theirs=theirs: theirs(x[None])[0]
    return found


def layer(device: torch.device, s: Shapes) -> Table:
    """Milliseconds of forward, and of forward and backward to the input; candidates take turns and must agree."""
    block = random_block(s, device)
    cases: dict[str, Callable[[Tensor], Tensor]] = {"ours": block}
    rows: Table = []
    if installed("transformers"):
        cases |= peers(s, block)
    else:
        rows.append({"part": "layer", "what": "transformers", "note": "not installed"})
    x = torch.randn(s.tokens, s.config.hidden_size, device=device, dtype=s.dtype)

    def forward(case: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return case(x)

    def both(case: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(case(leaf).square().sum(), leaf)[0]

    names = {"forward": forward, "forward + backward": both}
    wanted = {name: run(block).float() for name, run in names.items()}
    off = {
        case: max(float((run(f).float() - wanted[name]).norm() / wanted[name].norm()) for name, run in names.items())
        for case, f in cases.items()
    }
    times = {
        name: compared(alternate({c: clock(partial(run, f), device) for c, f in cases.items()}, s.rounds), "ours")
        for name, run in names.items()
    }
    for case in cases:
        row: dict[str, Any] = {"part": "layer", "what": case, "off by": off[case], "ok": off[case] <= CLOSE[s.dtype]}
        for name, of in times.items():
            row[f"{name} ms"] = {k: 1e3 * v for k, v in of[case]["seconds"].items()}
            row[f"{name}, times ours"] = of[case]["time / ours"]["median"]
        rows.append(row)
    return rows


# ---------- decode and step


@torch.no_grad()
def decode(device: torch.device, s: Shapes) -> Table:
    """Greedy tokens of a small model in the dtype whose steps can be captured."""
    torch.manual_seed(0)
    with device:
        net = Qwen3(ModelConfig(**SMALL | {"hidden_size": 256}, **REST, moe=MixtureConfig(8, 2, 64, True)))
    for p in net.requires_grad_(False).parameters():
        p.mul_(4.0 if p.ndim > 1 else 1.0)
    net.to(s.dtype)
    ids = torch.randint(1, 515, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [ids[a:b] for a, b in ((0, 5), (5, 300), (300, 301), (301, 340)) for _ in range(5)]
    done = sample.generate(net, prompts, [0] * 20, max_new=24, stop_ids=set(), temperature=0.0, batch_size=18)
    same = []
    for prompt, c in zip(prompts, done, strict=True):
        whole = torch.tensor([*prompt, *c.ids], device=device)
        best = net.logits(net(whole, torch.tensor([0, len(whole)])))[len(prompt) - 1 : -1].argmax(-1)
        same.append((best == whole[len(prompt) :]).float().mean())
    share, bound = float(torch.stack(same).mean()), 0.98 if s.dtype == torch.float32 else 0.9
    how = "greedy tokens, " + ("captured graphs" if device.type == "cuda" and moe.capturable(net) else "no graphs")
    return [{"part": "decode", "what": how, "same as without a cache": share, "ok": share > bound}]


def fitting(s: Shapes, device: torch.device) -> ModelConfig:
    """The shape with as many of its layers as fit beside FREE bytes."""
    if device.type != "cuda":
        return s.config
    with torch.device("meta"):
        one = Qwen3(dataclasses.replace(s.config, num_hidden_layers=1))
    rest, each = (sum(p.numel() for p in of.parameters()) * s.dtype.itemsize for of in (one, one.model.layers))
    room = torch.cuda.mem_get_info(device)[0] - FREE - (rest - each)
    return dataclasses.replace(s.config, num_hidden_layers=max(1, min(s.config.num_hidden_layers, int(room / each))))


def step(device: torch.device, s: Shapes) -> Table:
    """Seconds and memory of a KTO step of 8 rows, and the share of the peak for what a token meets."""
    import train
    from common.ranks import process_group

    config = fitting(s, device)
    torch.manual_seed(0)
    torch.set_default_dtype(s.dtype)
    try:
        with device:
            net = Qwen3(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    rows = bench.random_rows(8, *s.row_tokens, config.vocab_size)
    of, pairs = bench.lengths_of(rows), bench.lengths_of(rows, train.mismatched(len(rows), seed=0))
    flops = sum(costs.step_flops(config, s.lora_r, of, pairs).values())
    with process_group() as ranks:
        setting = dict(lora_r=s.lora_r, lr=5e-6)  # passes as the program chooses
        stepper = bench.our_stepper(net, rows, ranks, **setting)
        stepper.step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = spread([stepper.step() for _ in range(s.rounds)])
    row = {"part": "step", "what": f"{config.num_hidden_layers} layers, 8 rows", "seconds": seconds}
    row |= {"recomputed": net.recompute, "tokens a pass": stepper.limit.tokens}
    row |= {"tokens a second": sum(T for T, _ in of) / seconds["median"], "TFLOP a step": flops / 1e12}
    if device.type == "cuda":
        card = costs.gpu_named(torch.cuda.get_device_name(device))
        if card:
            row["share of the peak"] = flops / seconds["median"] / costs.GPUS[card].tflops / 1e12
        row["peak MiB"] = torch.cuda.max_memory_allocated(device) / MIB
    del stepper
    lora.merge(net)
    return [row]


PARTS = {"product": product, "layer": layer, "decode": decode, "step": step}


def moe_part(device: torch.device, tiny: bool, parts: Sequence[str] = tuple(PARTS)) -> Iterator[dict[str, Any]]:
    """The rows of all parts as they are measured; its `ok` says whether a row's check held."""
    s = shapes(device, tiny)
    for name in parts:
        yield from PARTS[name](device, s)
        if device.type == "cuda":
            torch.cuda.empty_cache()


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Returns 0 if every check held, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} [all; on a CPU product, layer]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this file")
    given = parser.parse_args(argv)
    if unknown := [part for part in given.parts if part not in PARTS]:
        raise InputError(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise InputError("no CUDA device here; run with --device cpu")
    device = torch.device(given.device)
    print("\n".join(f"{name}: {value}" for name, value in environment(device).items()))
    usual = PARTS if given.tiny or given.device == "cuda" else ("product", "layer")
    rows = list(moe_part(device, given.tiny, given.parts or tuple(usual)))
    for name in dict.fromkeys(row["part"] for row in rows):
        print("\n" + markdown([row for row in rows if row["part"] == name]))
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
