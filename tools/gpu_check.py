"""Is the GPU path right, and how fast is it? `make gpu-check`: one CUDA device, no network, under ten minutes.

  correct   the op in every dtype and implementation against fp64
  model     flash attention over packed rows, and sampling by captured graphs, against one plain row at a time
  sweep     the op over rows a chunk, Triton block size and warps
  op        the op at 8,192 tokens of an 8B model, beside what else is installed
  train     a KTO step of a model shaped like Qwen3-8B with random weights: speed, share of the peak, memory
  sample    tokens a second of that model

Weights are random and made on the device. A part that fails is reported with its traceback and the others still run.
The exit code is 0 only if every part ran and every check held; a missed speed target is no failure.
`--device cpu --tiny` runs all of it on small shapes without a GPU, to try this file. Left out: several devices.
"""

import argparse
import copy
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import kernels.segment_logprob as op
import lora
import model as qwen
import sample
from common import costs
from common.endings import program
from common.errors import InputError
from common.files import write_json
from common.model_config import ModelConfig
from model import Qwen3
from tools import bench, gpu_moe
from tools.measure import MIB, Table, alternate, clock, environment, extra_memory, markdown, spread

FITS_40GB = 38 * 1024  # MiB: such a card has 39.4 GiB, and the CUDA context and fragments take some
TARGETS = {"forward ms": 16.5, "forward + backward ms": 32.0, "extra MiB": 1100.0}  # a fifth above the roofline


QWEN3_8B = dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)
QWEN3_8B |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)
SMALL = dict(vocab_size=515, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)
SMALL_MODEL = dict(vocab_size=515, hidden_size=256, intermediate_size=512, num_hidden_layers=3)
SMALL_MODEL |= dict(num_attention_heads=8, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True)
REST = dict(rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=4096, eos_token_id=0)


@dataclass(frozen=True)
class Sizes:
    """The shapes of all parts; the defaults are a Qwen3-8B's."""

    N: int = 512  # tokens of the checks
    D: tuple[int, ...] = (1024, 4096)
    V: tuple[int, ...] = (32000, 151936)
    M: int = 8192  # tokens of the speed measurements
    B: int = 32  # sequences they belong to
    chunks: tuple[int, ...] = (512, 1024, 2048, 4096)
    blocks: tuple[tuple[int, int], ...] = ((4096, 8), (8192, 8), (16384, 16), (32768, 32))  # elements, warps
    config: ModelConfig = ModelConfig(**QWEN3_8B, **REST)
    row_tokens: tuple[int, int] = (800, 1000)  # the shortest and the longest of 8 rows
    lora_r: int = 32
    micro_batches: tuple[int, ...] = (1, 2, 4)
    batches: tuple[int, ...] = (16, 64, 128)
    prompt: int = 100
    new: int = 256
    rounds: int = 5


FOR_OP = dict(N=33, D=(24, 32), V=(257, 515), M=64, B=4, chunks=(16, 64), blocks=((256, 4),), rounds=1)
FOR_MODEL = dict(row_tokens=(20, 40), lora_r=4, micro_batches=(1, 4), batches=(2, 4), prompt=5, new=6)
TINY = Sizes(**FOR_OP, **FOR_MODEL, config=ModelConfig(**SMALL, **REST))


def implementations(device: torch.device) -> list[str]:
    """The implementations of the op that can run there."""
    return ["torch", "triton"] if op.default_impl(device) == "triton" else ["torch"]


# ---------- correct


def correct(device: torch.device, sizes: Sizes) -> Table:
    """One row a dtype, shape and implementation; its `ok` says whether all five checks held."""
    rows = []
    for D in sizes.D:
        for V in sizes.V:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                exact = Exact(sizes.N, D, V, dtype, device)
                rows += [exact.check(impl) for impl in implementations(device)]
    return rows


class Exact:
    """Random inputs of the op, with ignored targets and zero weights, and its results in fp64 from the same numbers."""

    def __init__(self, N: int, D: int, V: int, dtype: torch.dtype, device: torch.device):
        g = torch.Generator(device=device).manual_seed(0)
        self.hidden = torch.randn(N, D, generator=g, device=device).to(dtype)
        self.weight = torch.randn(V, D, generator=g, device=device).mul_(2 * D**-0.5).to(dtype)
        self.targets = torch.randint(0, V, (N,), generator=g, device=device)
        self.targets[::17] = -100
        self.targets[-1] = V - 1
        self.w, self.g = torch.rand(2, N, generator=g, device=device)
        self.w[::5] = 0.0
        head = self.weight.double()
        logits = self.hidden.double() @ head.T
        known, real = self.targets.clamp(min=0)[:, None], self.targets >= 0
        logp = logits.log_softmax(1)
        self.logp = logp.gather(1, known)[:, 0].where(real, 0.0)  # (N,)
        onehot = torch.zeros_like(logits).scatter_(1, known, 1.0)
        self.gradient = ((onehot - logp.exp()) @ head) * (self.g * self.w * real).double()[:, None]  # (N, D)

    def check(self, impl: str) -> dict[str, Any]:
        """Each token as a sequence of its own shows its log-probability; three sequences, one empty, the sums."""
        N = len(self.logp)
        chunk = N // 2 - 7  # three chunks, the last one ragged
        each, three = torch.arange(N + 1), torch.tensor([0, N // 3, N // 3, N])
        run = partial(op.segment_logprob, impl=impl, chunk=chunk)
        hidden = self.hidden.clone().requires_grad_()
        weighted, plain = run(hidden, self.weight, self.targets, self.w, each)
        (weighted * self.g).sum().backward()
        weighted, plain = weighted.detach(), plain.detach()
        with torch.no_grad():
            again = run(self.hidden, self.weight, self.targets, self.w, each)
            sums, _ = run(self.hidden, self.weight, self.targets, self.w, three)
        exact_sums = torch.stack([part.sum() for part in (self.w * self.logp).split(three.diff().tolist())])
        off = {
            "logp off by": float((plain - self.logp).abs().max()),
            "sums off by": float(((sums - exact_sums).abs() / exact_sums.abs().clamp(min=1)).max()),
            "gradient off by": float((hidden.grad - self.gradient).norm() / self.gradient.norm()),
        }
        allowed = (1e-4, 1e-5, 1e-4 if self.hidden.dtype == torch.float32 else 1e-2)
        same_bits = torch.equal(plain, again[1]) and torch.equal(weighted, again[0])
        silent = not hidden.grad[(self.w == 0) | (self.targets < 0)].any()
        ok = same_bits and silent and all(a <= b for a, b in zip(off.values(), allowed, strict=True))
        shape = {"dtype": str(self.hidden.dtype).removeprefix("torch."), "D": hidden.shape[1], "V": len(self.weight)}
        bits = {"same bits without gradient": same_bits, "w = 0 gives 0": silent}
        return shape | {"impl": impl} | off | bits | {"ok": ok}


# ---------- model


def model_paths(device: torch.device, sizes: Sizes) -> Table:
    """A small model's fast paths against its plain ones."""
    torch.manual_seed(0)
    with device:
        exact = Qwen3(ModelConfig(**SMALL_MODEL, **REST)).requires_grad_(False)
    for p in exact.parameters():
        p.mul_(4.0 if p.ndim > 1 else 1.0)  # so that attention is not flat
    half = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(half.state_dict())  # the same numbers, computed with in fp32
    ids = torch.randint(515, (600,), device=device)
    cu_seqlens = torch.tensor([0, 5, 300, 301, 600])
    wanted = exact(ids, cu_seqlens)

    def error(net: Qwen3) -> float:
        return float((net(ids, cu_seqlens).float() - wanted).norm() / wanted.norm())

    flash, kept = error(half), qwen.varlen_attn
    try:
        qwen.varlen_attn = lambda: None
        apart = error(half)
    finally:
        qwen.varlen_attn = kept
    name = "bf16 packed rows" + (" by flash attention" if device.type == "cuda" and kept() else "")
    rows = [{"path": name, "off by": flash, "row by row off by": apart, "ok": flash <= 2 * apart}]
    prompts = [ids[a:b].tolist() for a, b in ((0, 5), (5, 300), (300, 301), (301, 340)) for _ in range(5)]
    done = sample.generate(exact, prompts, [0] * 20, max_new=24, stop_ids=set(), temperature=0.0, batch_size=18)
    same = []
    for prompt, c in zip(prompts, done, strict=True):
        # Each sampled token against the likeliest one after what came before it, from one pass without a cache.
        whole = torch.tensor([*prompt, *c.ids], device=device)
        best = exact.logits(exact(whole, torch.tensor([0, len(whole)])))[len(prompt) - 1 : -1].argmax(-1)
        same.append((best == whole[len(prompt) :]).float().mean())
    share = float(torch.stack(same).mean())
    name = "greedy tokens" + (" by captured graphs" if device.type == "cuda" else "")
    return [*rows, {"path": name, "same as without a cache": share, "ok": share > 0.98}]


# ---------- sweep and op


def sweep(device: torch.device, sizes: Sizes) -> Table:
    """Milliseconds of the op over its tunable sizes, fastest first; block and warps only where Triton runs."""
    impl, before = op.default_impl(device), (op.BLOCK, op.WIDE)
    rows = []
    for D in sizes.D:
        x = bench.op_inputs(sizes.M, D, sizes.V[-1], "bfloat16", device, sizes.B)
        for block, warps in sizes.blocks if impl == "triton" else (("-", "-"),):
            try:
                if impl == "triton":
                    op.BLOCK, op.WIDE = block, op.WIDE | {"num_warps": warps}
                for chunk in sizes.chunks:
                    candidate = partial(bench.ours, impl=impl, chunk=chunk)
                    times = {grad: clock(partial(bench.op_call, candidate, x, grad), device) for grad in (False, True)}
                    forward, both = (spread(s)["median"] * 1e3 for s in alternate(times, sizes.rounds).values())
                    setting = {"D": D, "chunk": chunk, "block": block, "warps": warps}
                    rows.append(setting | {"forward ms": forward, "forward + backward ms": both})
            finally:
                op.BLOCK, op.WIDE = before
    return sorted(rows, key=lambda row: (row["D"], row["forward + backward ms"]))


def op_speed(device: torch.device, sizes: Sizes) -> Table:
    """Milliseconds and extra memory at 1,024 rows a chunk. A peer that cannot run gets a note; we may not fail."""
    x = bench.op_inputs(sizes.M, sizes.D[-1], sizes.V[-1], "bfloat16", device, sizes.B)
    ours = {f"ours, {impl}": partial(bench.ours, impl=impl, chunk=1024) for impl in implementations(device)}
    peers = {name: c for name, c in bench.op_candidates("torch").items() if name != "ours"}
    rows: Table = []
    for name, candidate in (ours | peers).items():
        if candidate is None:
            rows.append({"candidate": name, "note": "not installed"})
            continue
        try:
            rows.append({"candidate": name} | _op_row(candidate, x, device, sizes.rounds))
        except Exception as error:
            if name in ours:
                raise
            rows.append({"candidate": name, "note": _brief(error)})
        _release(device)
    return [*rows, {"candidate": "target on an H100"} | TARGETS]


def _op_row(candidate: bench.Candidate, x: bench.OpInputs, device: torch.device, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for grad, name in ((False, "forward"), (True, "forward + backward")):
        seconds = alternate({name: clock(partial(bench.op_call, candidate, x, grad), device)}, rounds)[name]
        row[f"{name} ms"] = spread([1e3 * s for s in seconds])
    return row | {"extra MiB": extra_memory(partial(bench.op_call, candidate, x, True), device)["extra MiB"]}


# ---------- train and sample


def random_qwen(sizes: Sizes, device: torch.device) -> Qwen3:
    """A bf16 model of these sizes with seeded random weights, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return Qwen3(sizes.config).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def lengths_of(rows: Sequence[Any], partner: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """(tokens, completion tokens) of each row; with `partner`, of each prompt with its partner's completion."""
    others = rows if partner is None else [rows[j] for j in partner]
    sizes = ((len(x.prompt_ids), len(y.completion_ids)) for x, y in zip(rows, others, strict=True))
    return [(prompt + completion, completion) for prompt, completion in sizes]


def training(device: torch.device, sizes: Sizes) -> Table:
    """A step of 8 rows with and without gradient checkpointing, at several micro-batches."""
    import train
    from common.ranks import process_group

    rows = bench.random_rows(8, *sizes.row_tokens, sizes.config.vocab_size)
    tokens = sum(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    pairs = lengths_of(rows, train.mismatched(len(rows), seed=0))
    flops = sum(costs.step_flops(sizes.config, sizes.lora_r, lengths_of(rows), pairs).values())
    peak = peak_tflops(device)
    model, table = random_qwen(sizes, device), []
    with process_group() as ranks:
        for checkpointing in (False, True):
            for micro in sizes.micro_batches:
                row: dict[str, Any] = {"checkpointing": checkpointing, "micro-batch": micro}
                setting = dict(micro_batch=micro, gradient_checkpointing=checkpointing, lora_r=sizes.lora_r, lr=5e-6)
                try:
                    stepper = bench.our_stepper(model, rows, ranks, **setting)
                    memory = extra_memory(stepper.step, device)
                    seconds = spread([stepper.step() for _ in range(sizes.rounds)])
                    row |= {"seconds": seconds, "tokens a second": tokens / seconds["median"], **memory}
                    row |= {"TFLOP a step": flops / 1e12, "share of the peak": None, "fits 40 GB": None}
                    if peak:
                        row["share of the peak"] = flops / seconds["median"] / peak / 1e12
                    if memory["peak MiB"] is not None:
                        row["fits 40 GB"] = memory["peak MiB"] <= FITS_40GB
                except torch.OutOfMemoryError as error:
                    row["note"] = _brief(error)
                stepper = None  # its trainer holds the adapters
                lora.merge(model)
                model.requires_grad_(False)
                _release(device)
                table.append(row)
    return table


def peak_tflops(device: torch.device) -> float | None:
    """What the device could do in bf16; None for one that costs.GPUS does not know."""
    name = costs.gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return costs.GPUS[name].tflops if name else None


def sampling(device: torch.device, sizes: Sizes) -> Table:
    """Tokens a second from random prompts, every row to its limit."""
    model, rows = random_qwen(sizes, device), []
    for batch in sizes.batches:
        g = torch.Generator().manual_seed(batch)
        prompts = torch.randint(sizes.config.vocab_size, (batch, sizes.prompt), generator=g).tolist()
        run = partial(sample.generate, model, prompts, list(range(batch)), stop_ids=set(), batch_size=batch)
        run(max_new=4)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = clock(partial(run, max_new=sizes.new), device)()
        row = {"batch": batch, "new tokens": sizes.new, "seconds": seconds}
        row["tokens a second"] = batch * sizes.new / seconds
        if device.type == "cuda":
            row["peak MiB"] = torch.cuda.max_memory_allocated(device) / MIB
        rows.append(row)
    return rows


# ---------- the command

PARTS = {
    "correct": correct,
    "model": model_paths,
    "sweep": sweep,
    "op": op_speed,
    "train": training,
    "sample": sampling,
    "moe": lambda device, sizes: gpu_moe.moe_part(device, tiny=sizes is TINY),
}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def perform(name: str, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Run one part and print its table: {"ok", "seconds", "rows", "error": its traceback or None}."""
    start, rows, error = time.perf_counter(), [], None
    try:
        rows = PARTS[name](device, sizes)
    except Exception:  # the other parts shall still run; the exit code tells
        error = traceback.format_exc()
    for row in rows:  # JSON has no NaN
        row |= {k: str(v) for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    seconds = time.perf_counter() - start
    ok = error is None and all(row.get("ok", True) for row in rows)
    print(f"\n## {name}: {'ok' if ok else 'FAILED'} ({seconds:.0f} s)\n\n{error or markdown(rows)}", flush=True)
    _release(device)
    return {"ok": ok, "seconds": seconds, "rows": rows, "error": error}


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts. Returns 0 if all went well, 1 if one failed, 3 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU can do, to try this file")
    parser.add_argument("--out", default="runs/gpu_check.json", metavar="FILE", help="[runs/gpu_check.json]")
    given = parser.parse_args(argv)
    if unknown := [part for part in given.parts if part not in PARTS]:
        raise InputError(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first asked for
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device here; run with --device cpu --tiny to try the code without one")
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    result: dict[str, Any] = {
        "command": " ".join(["python -m tools.gpu_check", *(sys.argv[1:] if argv is None else argv)])
    }
    result |= {"environment": environment(device), "peak TFLOP/s": peak_tflops(device), "parts": {}}
    print("\n".join(f"{name}: {value}" for name, value in result["environment"].items()))
    for name in given.parts or PARTS:
        result["parts"][name] = perform(name, device, TINY if given.tiny else Sizes())
        write_json(given.out, result)
    failed = [name for name, part in result["parts"].items() if not part["ok"]]
    print(f"\n{'FAILED: ' + ', '.join(failed) if failed else 'all parts ok'}; {given.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
