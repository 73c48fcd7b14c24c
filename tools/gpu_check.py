"""Is the GPU path right, and how fast beside its peers? `make gpu-check`: one CUDA device, no network, nine minutes.

  correct   the op in every dtype and implementation against fp64
  kernels   the tests of kernels/ on this device
  gradients adapter gradients against fp64 on the CPU, at every level of recomputation, beside PEFT's arithmetic
  zero      a fresh adapter's log-ratio is 0, a switched-off one is the base bit for bit (both: gpu_gradients.py)
  model     flash attention over packed rows, and sampling by captured graphs, against one plain row at a time; steps
            issued ahead against single ones
  train     a KTO step of a model shaped like Qwen3-8B with random weights: speed, share of the peak, memory
  op        the op at 8,192 tokens of that model, beside Liger's, TRL's and torch's
  sample    tokens a second of that model
  generate  the same by transformers
  moe       a mixture of experts: right, a layer beside transformers', a step shaped like Qwen3-30B-A3B (gpu_moe.py)
  peers     the step of `train` by TRL: its default, its best with and without Liger, the paper's split
  sweep     the op over rows a chunk, Triton block size and warps: time and memory

Weights are random and made on the device. Rows are printed and written to --out as they come, so that a run that is cut
keeps what it had; when the time is up, what is left is named and skipped. A part that fails is reported with its
traceback and the others still run. Peers are optional. At the end stands a table of the targets. The exit code is 0
only if every part ran and every check held; a missed target and a missing peer are no failure.
`--device cpu --tiny` runs all of it on small shapes without a GPU, to try this file. Left out: several devices.
"""

import argparse
import copy
import gc
import math
import operator
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import kernels.segment_logprob as op
import lora
import model as qwen
import sample
from common import costs, passes
from common.endings import program
from common.errors import InputError
from common.files import ROOT, write_json
from common.model_config import ModelConfig
from model import Qwen3
from tools import bench, gpu_gradients, gpu_moe, targets
from tools.measure import (
    MIB,
    alternate,
    clock,
    environment,
    extra_memory,
    installed,
    markdown,
    peak_tflops,
    shown,
    spread,
)

Rows = Iterator[dict[str, Any]]  # of a table, as they are measured

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
    chunks: tuple[int, ...] = (512, 640, 704, 1024, 2048)
    blocks: tuple[tuple[int, int], ...] = ((4096, 8), (8192, 8), (16384, 16), (32768, 32))  # elements, warps
    config: ModelConfig = ModelConfig(**QWEN3_8B, **REST)
    row_tokens: tuple[int, int] = (800, 1000)  # the shortest and the longest of 8 rows
    lora_r: int = 32
    # rows of a pass (0: as the program chooses) and what is recomputed
    ways: tuple[tuple[int, str], ...] = ((8, "none"), (8, "cheap"), (8, "full"), (2, "full"), (4, "none"), (0, "auto"))
    batches: tuple[int, ...] = (16, 64, 128)
    prompt: int = 100
    new: int = 256
    rounds: int = 5
    kernel_tests: str = "cuda"  # which of tests/ of kernels/ run: pytest -k


FOR_OP = dict(N=33, D=(24, 32), V=(257, 515), M=64, B=4, chunks=(16, 64), blocks=((256, 4),), rounds=1)
FOR_MODEL = dict(kernel_tests="hand_worked", row_tokens=(20, 40), lora_r=4, batches=(2, 4), prompt=5, new=6)
TINY = Sizes(**FOR_OP, **FOR_MODEL, config=ModelConfig(**SMALL, **REST))


def implementations(device: torch.device) -> list[str]:
    """The implementations of the op that can run there."""
    return ["torch", "triton"] if op.default_impl(device) == "triton" else ["torch"]


@contextmanager
def op_settings(**values: Any) -> Iterator[None]:
    """The op with other values of the constants at its head, for example BLOCK=8192."""
    before = {name: getattr(op, name) for name in values}
    try:
        for name, value in values.items():
            setattr(op, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(op, name, value)


# ---------- correct


def correct(device: torch.device, sizes: Sizes) -> Rows:
    """One row a dtype, shape and implementation; its `ok` says whether all five checks held."""
    for D in sizes.D:
        for V in sizes.V:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                exact = Exact(sizes.N, D, V, dtype, device)
                for impl in implementations(device):
                    yield exact.check(impl)


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


# ---------- kernels and model


def kernel_tests(device: torch.device, sizes: Sizes) -> Rows:
    """pytest on the tests of kernels/, those that run on the device."""
    if not (installed("pytest") and installed("hypothesis")):
        yield {"tests of kernels/": "pytest or hypothesis is not installed", "note": "pip install pytest hypothesis"}
        return
    for name in ("test_fused_elementwise", "test_segment_logprob"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}.py"]
        command += ["-k", sizes.kernel_tests]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
        lines = done.stdout.splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        yield {"tests of kernels/": name, "result": lines[-1] if lines else done.stderr[-200:]} | {
            "failed": "; ".join(failed),
            "ok": done.returncode == 0,
        }


def model_paths(device: torch.device, sizes: Sizes) -> Rows:
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
    yield {"path": name, "off by": flash, "row by row off by": apart, "ok": flash <= 2 * apart}
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
    yield {"path": name, "same as without a cache": share, "ok": share > 0.98}
    run = partial(sample.generate, prompts=prompts, seeds=list(range(20)), max_new=24, stop_ids=set(), batch_size=18)
    draws = dict(temperature=0.5, top_p=0.9, top_k=0)
    for name, net, how, shortlist in (
        ("bf16, top_k 20", half, {}, 128),
        ("fp32, top_k 0", exact, draws, 128),
        ("fp32, top_k 0, rows unsettled", exact, draws, 2),
    ):
        texts = []
        for ahead in (1, 8):  # steps issued before the host looks at their tokens
            with mock.patch.multiple(sample, AHEAD={device.type: ahead}, SHORTLIST=shortlist):
                texts.append([c.ids for c in run(net, **how)])
        share = sum(map(operator.eq, *texts)) / len(prompts)
        yield {"path": f"sampled texts, {name}", "same as step by step": share, "ok": share >= 0.9}


# ---------- sweep and op


def sweep(device: torch.device, sizes: Sizes) -> Rows:
    """The op's time and memory over its tunable sizes."""
    impl = op.default_impl(device)
    for D in sizes.D:
        x = bench.op_inputs(sizes.M, D, sizes.V[-1], "bfloat16", device, sizes.B)
        products = products_ms(x, device, sizes.rounds)["median"]
        ways: list[dict[str, Any]] = [{}]
        if impl == "triton":
            ways = [{"BLOCK": block, "WIDE": op.WIDE | {"num_warps": warps}} for block, warps in sizes.blocks]
        for way in ways:
            with op_settings(**way):
                for chunk in sizes.chunks:
                    candidate = partial(bench.ours, impl=impl, chunk=chunk)
                    times = {grad: clock(partial(bench.op_call, candidate, x, grad), device) for grad in (False, True)}
                    forward, both = (spread(s)["median"] * 1e3 for s in alternate(times, sizes.rounds).values())
                    setting = {"D": D, "chunk": chunk, "block": way.get("BLOCK", "-")}
                    setting |= {"warps": way.get("WIDE", {}).get("num_warps", "-")}
                    memory = extra_memory(partial(bench.op_call, candidate, x, True), device)["extra MiB"]
                    found = {"forward ms": forward, "forward + backward ms": both, "/ its products": both / products}
                    yield setting | found | {"extra MiB": memory}


def op_speed(device: torch.device, sizes: Sizes) -> Rows:
    """Milliseconds and extra memory, first of the two products alone. A peer may fail and gets a note; we may not."""
    x = bench.op_inputs(sizes.M, sizes.D[-1], sizes.V[-1], "bfloat16", device, sizes.B)
    products = products_ms(x, device, sizes.rounds)
    yield {"candidate": "its two products alone", "forward + backward ms": products}
    measured = partial(_op_row, x=x, products=products["median"], device=device, rounds=sizes.rounds)
    ours = {f"ours, {impl}": partial(bench.ours, impl=impl) for impl in implementations(device)}
    peers = {name: c for name, c in bench.op_candidates("torch").items() if name != "ours"}
    for name, candidate in (ours | peers).items():
        if candidate is None:
            yield {"candidate": name, "note": "not installed"}
            continue
        try:
            yield {"candidate": name} | measured(candidate)
        except Exception as error:
            if name in ours:
                raise
            yield {"candidate": name, "note": _brief(error)}
        _release(device)


def products_ms(x: bench.OpInputs, device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of hidden @ weight.T and (M, V) @ weight in the model's dtype, 1,024 rows at a time: the floor."""
    chunk = x.hidden[:1024]
    logits = chunk @ x.weight.T

    def both() -> None:
        for _ in range(0, len(x.hidden), len(chunk)):
            torch.mm(chunk, x.weight.T, out=logits)
            logits @ x.weight

    seconds = alternate({"both": clock(both, device)}, rounds)["both"]
    return spread([1e3 * s for s in seconds])


def _op_row(
    candidate: bench.Candidate, x: bench.OpInputs, products: float, device: torch.device, rounds: int
) -> dict[str, Any]:
    """products: milliseconds of the two products alone."""
    row: dict[str, Any] = {}
    for grad, name in ((False, "forward"), (True, "forward + backward")):
        seconds = alternate({name: clock(partial(bench.op_call, candidate, x, grad), device)}, rounds)[name]
        row[f"{name} ms"] = spread([1e3 * s for s in seconds])
    row["/ its products"] = row["forward + backward ms"]["median"] / products
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


def step_inputs(sizes: Sizes) -> tuple[list[Any], int, float]:
    """8 rows, their tokens, and the operations of a step over them."""
    import train

    rows = bench.random_rows(8, *sizes.row_tokens, sizes.config.vocab_size)
    pairs = bench.lengths_of(rows, train.mismatched(len(rows), seed=0))
    flops = sum(costs.step_flops(sizes.config, sizes.lora_r, bench.lengths_of(rows), pairs).values())
    return rows, sum(tokens for tokens, _ in bench.lengths_of(rows)), flops


def step_row(
    seconds: list[float], tokens: int, flops: float, memory: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What is said of a step, ours or a peer's. Recomputation is not counted as work."""
    median, peak = spread(seconds)["median"], peak_tflops(device)
    row = {"seconds": spread(seconds), "tokens a second": tokens / median, **memory, "TFLOP a step": flops / 1e12}
    return row | {"share of the peak": flops / median / peak / 1e12 if peak else None}


def training(device: torch.device, sizes: Sizes) -> Rows:
    """A step of 8 rows in several ways."""
    from common.ranks import process_group

    rows, tokens, flops = step_inputs(sizes)
    model = random_qwen(sizes, device)
    with process_group() as ranks:
        for micro, recompute in sizes.ways:
            row: dict[str, Any] = {"rows a pass": micro or "auto", "recomputed": recompute}
            setting = dict(micro_batch=micro, recompute=recompute, lora_r=sizes.lora_r, lr=5e-6)
            try:
                stepper = bench.our_stepper(model, rows, ranks, **setting)
                memory = extra_memory(stepper.step, device)
                row |= step_row([stepper.step() for _ in range(sizes.rounds)], tokens, flops, memory, device)
                row |= {"counted MiB": counted_mib(sizes, rows, stepper.limit, model.recompute, device)}
                row |= {"tokens a pass": stepper.limit.tokens or None, "first loss": stepper.losses[0]}
                row["ok"] = abs(stepper.losses[0] - 0.625) < 1e-2  # B = 0: half the mean lambda
            except torch.OutOfMemoryError as error:
                row["note"] = _brief(error)
            stepper = None  # its trainer holds the adapters
            lora.merge(model)
            model.requires_grad_(False)
            _release(device)
            yield row


def counted_mib(sizes: Sizes, rows: list[Any], limit: passes.Limit, level: str, device: torch.device) -> float:
    """What common/costs.py counts for the fullest pass of a step."""
    lengths = bench.lengths_of(rows)
    order, every = sorted(range(len(rows)), key=lambda i: -lengths[i][0]), [n for n, _ in lengths]
    without = max(sum(every[i] for i in group) for group in passes.grouped(order, every, limit.without_gradient()))
    taken = max((passes.grouped(order, every, limit)), key=lambda group: sum(every[i] for i in group))
    tokens, predicted = (sum(lengths[i][k] for i in taken) for k in (0, 1))
    given = sizes.config, sizes.lora_r, 2, tokens, predicted, level, device.type == "cuda", without
    return sum(costs.memory(*given).values()) / MIB


# TRL's batch and what is not its default.
PEERS: dict[str, dict[str, Any]] = {
    targets.DEFAULT: dict(batch=8),
    targets.ONCE: dict(batch=8, precompute_ref_log_probs=True),
    targets.LIGER: dict(batch=8, use_liger_kernel=True),
    targets.ONCE_KEPT: dict(batch=8, **bench.BEST),
    targets.LIGER_KEPT: dict(batch=8, use_liger_kernel=True, gradient_checkpointing=False),
    targets.PAPER: dict(batch=2),
}


def peers(device: torch.device, sizes: Sizes) -> Rows:
    """The step of `training` by TRL's KTOTrainer with PEFT, bf16, on random weights of the same shape."""
    rows, tokens, flops = step_inputs(sizes)
    if not all(map(installed, ("trl", "peft", "transformers", "datasets"))):
        yield {"candidate": "TRL", "note": "trl, peft, transformers and datasets are not all installed"}
        return
    for name, settings in PEERS.items():
        row: dict[str, Any] = {"candidate": name}
        try:
            with tempfile.TemporaryDirectory() as folder:
                model = transformers_qwen(sizes, device)
                how = dict(model=model, bf16=device.type == "cuda", learning_rate=5e-6) | settings
                stepper = bench.trl_stepper(Path(folder), rows, sizes.config.vocab_size, {}, **how)
                memory = extra_memory(stepper.step, device)
                row |= step_row([stepper.step() for _ in range(min(3, sizes.rounds))], tokens, flops, memory, device)
                row |= {"reference, once, s": stepper.reference_seconds or None, "first loss": stepper.losses[0]}
        except Exception as error:  # a peer's, such as a version that lacks the option
            row["note"] = _brief(error)
        stepper = model = None
        _release(device)
        yield row


def transformers_qwen(sizes: Sizes, device: torch.device) -> Any:
    """transformers' Qwen3 of these sizes in bf16 with its own random weights, made on the device."""
    import transformers

    config = transformers.Qwen3Config(**sizes.config.to_json(torch.bfloat16) | {"architectures": None})
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def random_prompts(sizes: Sizes, batch: int) -> torch.Tensor:
    """(batch, sizes.prompt) int64 ids, the same for the same batch."""
    g = torch.Generator().manual_seed(batch)
    return torch.randint(1, sizes.config.vocab_size, (batch, sizes.prompt), generator=g)


def sampling(device: torch.device, sizes: Sizes) -> Rows:
    """Tokens a second from random prompts, every row to its limit. A decode step: one token of all rows."""
    model = random_qwen(sizes, device)
    for batch in sizes.batches:
        prompts = random_prompts(sizes, batch).tolist()
        run = partial(sample.generate, model, prompts, list(range(batch)), stop_ids=set(), batch_size=batch)
        run(max_new=4)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = clock(partial(run, max_new=sizes.new), device)()
        row = {"batch": batch, "new tokens": sizes.new, "seconds": seconds, "decode step ms": 1e3 * seconds / sizes.new}
        row["tokens a second"] = batch * sizes.new / seconds
        if device.type == "cuda":
            row["peak MiB"] = torch.cuda.max_memory_allocated(device) / MIB
        yield row


def generate(device: torch.device, sizes: Sizes) -> Rows:
    """The largest batch of `sampling` by transformers' generate, a quarter of the tokens."""
    if not installed("transformers"):
        yield {"candidate": "transformers", "note": "not installed"}
        return
    model, batch, new = transformers_qwen(sizes, device).eval(), sizes.batches[-1], max(1, sizes.new // 4)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = random_prompts(sizes, batch).to(device)
    run = partial(model.generate, ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=20, top_p=0.95)
    run(max_new_tokens=2)
    seconds = clock(partial(run, max_new_tokens=new), device)()
    row = {"candidate": "transformers", "batch": batch, "new tokens": new, "seconds": seconds}
    yield row | {"decode step ms": 1e3 * seconds / new, "tokens a second": batch * new / seconds}


# ---------- the command

PARTS: dict[str, Callable[[torch.device, Sizes], Rows]] = {  # in the order of what a cut run should have
    "correct": correct,
    "kernels": kernel_tests,
    "gradients": lambda device, sizes: gpu_gradients.gradients(device),
    "zero": lambda device, sizes: gpu_gradients.zero(device),
    "model": model_paths,
    "train": training,
    "op": op_speed,
    "sample": sampling,
    "generate": generate,
    "moe": lambda device, sizes: gpu_moe.moe_part(device, tiny=sizes is TINY),
    "peers": peers,
    "sweep": sweep,
}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def perform(name: str, device: torch.device, sizes: Sizes, end: float, save: Callable[[dict[str, Any]], None]) -> None:
    """Run one part until time.perf_counter() says `end`, printing and saving each row as it comes, then its table.

    save: is given {"ok", "seconds", "rows", "error": its traceback or None, "cut": whether time was up}.
    """
    start, part = time.perf_counter(), {"ok": True, "rows": [], "error": None, "cut": False}
    print(f"\n## {name}", flush=True)
    try:
        rows = PARTS[name](device, sizes)
        while not part["cut"] and (row := next(rows, None)) is not None:
            # JSON has no NaN.
            row |= {k: str(v) for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
            part["rows"].append(row)
            part["ok"] &= row.get("ok", True)
            part["cut"] = time.perf_counter() > end
            print("  " + ", ".join(f"{k} {shown(v)}" for k, v in row.items()), flush=True)
            save(part | {"seconds": time.perf_counter() - start})
        rows.close()
    except Exception:  # the other parts shall still run; the exit code tells
        part |= {"ok": False, "error": traceback.format_exc()}
    part["seconds"] = time.perf_counter() - start
    state = "ok" if part["ok"] else "FAILED"
    cut = "; cut, the time was up" * part["cut"]
    print(f"\n{name}: {state} ({part['seconds']:.0f} s{cut})\n\n{part['error'] or markdown(part['rows'])}", flush=True)
    save(part)
    _release(device)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts. Returns 0 if all went well, 1 if one failed, 3 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU can do, to try this file")
    parser.add_argument("--minutes", type=float, default=8.5, help="start no row after so many [8.5]")
    parser.add_argument("--out", default="runs/gpu_check.json", metavar="FILE", help="[runs/gpu_check.json]")
    given = parser.parse_args(argv)
    if unknown := [part for part in given.parts if part not in PARTS]:
        raise InputError(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first asked for
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device here; run with --device cpu --tiny to try the code without one")
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}  # for the peers
    result: dict[str, Any] = {
        "command": " ".join(["python -m tools.gpu_check", *(sys.argv[1:] if argv is None else argv)])
    }
    result |= {"environment": environment(device), "peak TFLOP/s": peak_tflops(device), "parts": {}}
    print("\n".join(f"{name}: {value}" for name, value in result["environment"].items()))
    end, parts = time.perf_counter() + 60 * given.minutes, result["parts"]
    for name in given.parts or PARTS:

        def save(part: dict[str, Any], name: str = name) -> None:
            parts[name] = part
            result["targets"] = targets.table(parts)
            write_json(given.out, result)

        if time.perf_counter() > end:
            save({"ok": True, "seconds": 0.0, "rows": [], "error": None, "cut": True})
            print(f"\n{name}: skipped, {given.minutes:g} minutes are up", flush=True)
            continue
        perform(name, device, TINY if given.tiny else Sizes(), end, save)
    print(f"\n## targets, for one H100 or H200\n\n{markdown(result['targets'])}")
    failed = [name for name, part in parts.items() if not part["ok"]]
    cut = [name for name, part in parts.items() if part["cut"]]
    said = [f"{word}: {', '.join(names)}" for word, names in (("FAILED", failed), ("cut short", cut)) if names]
    print(f"\n{'; '.join(said) or 'all parts ok'}; {given.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
