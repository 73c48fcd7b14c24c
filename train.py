"""Rows and a base model become an adapter: SFT, KTO or MR-ALIGN over LoRA under DistributedDataParallel.

One optimiser step is `batch_size` rows whatever the number of ranks and the micro-batch: z0 (Eq. 2) is taken over the
whole step before the first gradient, each row's loss is divided by the rows of the step, and DDP adds the rest. So the
loss and the gradient do not depend on how the rows are split. The reference policy is the same weights with the
adapters off; its sums never change, so they are computed once. Left out: dropout, other optimisers, sampling
during training.

Rows are packed without padding, as many tokens in one forward pass as the memory holds (common/passes.py). What a step
costs beside other trainers' is in docs/benchmarks.md.

With `shard` each rank keeps its part of the frozen layers only and gathers them one after the other (FSDP2). Adapters,
embedding and head stay whole on every rank: the first need no gathering when they are saved, at 16 bytes a trained
parameter (weights, gradient, two moments), and the fused log-probability op reads the head as one matrix.

A run that is asked to stop does so before its next pass: it saves the last finished step and leaves the rest of the
step undone, so that it takes seconds whatever a step takes. Nothing is lost but that part of a step.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import data
import kto
import lora
import moe
from common import checkpoint, costs, passes, training
from common.errors import InputError, NumericsError
from common.model_config import ModelConfig
from common.passes import Limit
from common.ranks import Progress, Ranks
from common.settings import check, opt
from kernels.segment_logprob import segment_logprob
from model import Qwen3

SPEED_ONLY = (  # settings that do not shape the result
    *("micro_tokens", "micro_batch", "recompute", "compile", "shard", "save_every", "kernel", "profile"),
)


@dataclass(frozen=True)
class TrainSettings:
    """What a training run depends on besides its rows and its base model."""

    lr: float = opt(5e-6, "peak learning rate of every loss but sft (Table 13)", "training", above=0)
    sft_lr: float = opt(1e-4, "peak learning rate of sft (Table 14)", above=0)
    epochs: int = opt(3, "passes over the rows (Table 13)", low=1)
    batch_size: int = opt(64, "rows in one optimiser step, over all ranks (Table 13: 4 GPUs x 2 x 8)", low=1)
    micro_tokens: int = opt(
        0, "tokens in one forward pass of one rank, 0: as many as fit; changes memory and speed, not the result", low=1
    )
    micro_batch: int = opt(0, "rows in one forward pass of one rank, for those who want rows; 0: by tokens", low=1)
    warmup: float = opt(
        0.1, "share of the steps in which the learning rate rises; then it falls as a cosine", low=0, high=1
    )
    beta: float = opt(0.1, "inverse temperature, Eq. 3 and 12", above=0)
    lambda_c: float = opt(1.0, "weight of chosen rows, Eq. 3 and 12", low=0)
    lambda_r: float = opt(1.5, "weight of rejected rows, Eq. 3 and 12 (lambda_d in Table 4)", low=0)
    kl_rows: float = opt(1.0, "share of a step's rows whose mismatched pair enters z0, Eq. 2", above=0, high=1)
    z0_ema: float = opt(
        0.0, "share of the old z0 in a moving average over steps, Eq. 2; 0: each step on its own", low=0, high=0.999
    )
    max_grad_norm: float = opt(1.0, "the gradient is scaled down to this norm", above=0)
    lora_r: int = opt(32, "LoRA rank (section 4.1)", low=1)
    lora_alpha: float = opt(64.0, "LoRA scale is alpha / r", above=0)
    seed: int = opt(0, "seed of the LoRA initialisation, the row order, the mismatched pairs and every sample")
    recompute: str = opt(
        "auto",
        "made again in the backward pass instead of kept: none; cheap, norms, RoPE and SwiGLU; full, whole layers "
        "(gradient checkpointing); auto, the first with room for enough tokens",
        choices=("auto", *costs.RECOMPUTE),
    )
    compile: bool = opt(False, "torch.compile the layers around attention: for long runs on a GPU")
    shard: bool = opt(False, "spread the frozen layers over the ranks (FSDP2): for models that do not fit one GPU")
    eval_every: int = opt(
        0, "hold every tenth question's rows out and log their rewards after so many steps, 0: train on all rows", low=1
    )
    profile: int = opt(0, "write a trace of this step's operations (torch.profiler), 0: of none", low=1)
    save_every: int = opt(20, "optimiser steps between checkpoints", low=1)
    kernel: str = opt(
        "",
        "segment log-probability op: torch or triton; none: triton where there is a GPU",
        choices=("torch", "triton"),
    )

    def __post_init__(self) -> None:
        check(self)


def step_rows(n: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Row indices of every optimiser step: each epoch in its own seeded order, its last step what is left over."""
    steps = []
    for epoch in range(epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
        steps += [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return steps


def mismatched(n: int, seed: int) -> list[int]:
    """partner[i]: the row whose completion goes with prompt i in Eq. 2. One seeded cycle, so no row meets itself."""
    if n < 2:
        raise InputError(f"z0 needs at least 2 training rows to pair prompts with other completions, there is {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return [nxt for _, nxt in sorted(zip(order, order[1:] + order[:1], strict=True))]


def sequence_sums(model: nn.Module, head: Tensor, batch: data.Batch, impl: str) -> tuple[Tensor, Tensor]:
    """(weighted, plain), each (B,): sum of w_t log pi(y_t) and of log pi(y_t) over every row's completion."""
    hidden = model(batch.ids, batch.cu_seqlens)  # (N, E)
    return segment_logprob(hidden[batch.predict], head, batch.targets, batch.w, batch.cu_targets, impl)


def plain_loop(
    model: Qwen3, rows: list[data.Row], method: str, s: TrainSettings, impl: str = "torch"
) -> Iterator[dict[str, float]]:
    """The training of Section 3.2 as it reads: one process, every step's rows at once, nothing saved.

    Yields loss, z0 and grad_norm of every optimiser step. It is what `Trainer` must agree with, whatever the ranks and
    micro-batches; read it first. model: frozen; adapters are added to it.
    """
    loss, partner = kto.LOSSES[method], mismatched(len(rows), s.seed)
    adapters = lora.add(model, s.lora_r, s.lora_alpha, seed=s.seed)
    optimizer = torch.optim.AdamW(adapters, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def sums(indices: list[int], completions: list[int]) -> tuple[Tensor, Tensor]:
        """(weighted, plain) of prompts x_i with completions y_j."""
        pairs = [(rows[i], rows[j]) for i, j in zip(indices, completions, strict=True)]
        packed = data.pack([(x.prompt_ids, y.completion_ids, y.w) for x, y in pairs])
        return sequence_sums(model, model.head, packed, impl)

    steps = step_rows(len(rows), s.batch_size, s.epochs, s.seed)
    state: Tensor | float = 0.0
    for number, batch in enumerate(steps):
        others = [partner[i] for i in batch]
        with torch.no_grad():
            kl = sums(batch, others)[1]
            with lora.disabled(model):  # the reference policy: the same weights, adapters off
                reference, ref_kl = sums(batch, batch), sums(batch, others)[1]
        z0, state = kto.z0_estimate((kl - ref_kl).sum(), len(batch), state, s.z0_ema)  # Eq. 2
        chosen = torch.tensor([rows[i].chosen for i in batch])
        n_tokens = torch.tensor(sum(len(rows[i].completion_ids) for i in batch))
        of_rows = loss.of(kto.Sums(*sums(batch, batch), *reference, chosen, z0, len(batch), n_tokens), s)  # Eq. 11-12
        of_rows.mean().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(adapters, s.max_grad_norm)
        optimizer.param_groups[0]["lr"] = training.learning_rate(number, len(steps), s.warmup, getattr(s, loss.rate))
        optimizer.step()
        optimizer.zero_grad()
        yield {"loss": of_rows.mean().item(), "z0": float(z0), "grad_norm": float(grad_norm)}


class Trainer:
    """A base model with adapters, its rows, and everything that stays the same from step to step."""

    def __init__(
        self,
        model: Qwen3,
        rows: list[data.Row],
        method: str,
        s: TrainSettings,
        ranks: Ranks,
        impl: str,
        held: Sequence[data.Row] = (),
    ) -> None:
        self.s, self.ranks, self.impl, self.n = s, ranks, impl, len(rows)
        self.rows = rows = [*rows, *held]  # those that are not trained on stand last
        self.loss = kto.LOSSES[method]
        self.model = model
        self.parameters = lora.add(model, s.lora_r, s.lora_alpha, seed=s.seed)
        if not s.shard:  # FSDP gathers each weight by itself
            model.stack()
        if s.compile:
            if s.recompute == "cheap":
                raise InputError("--recompute cheap is what --compile does by itself; leave one of the two out")
            model.compile_layers()
        if s.shard:
            training.shard(model, self.parameters, ranks)
        self.policy: nn.Module = model
        if not s.shard:  # gradients lie in the buckets that are summed over ranks; a bucket is divided at once
            policy = self.policy = DistributedDataParallel(model, gradient_as_bucket_view=True)
            policy.register_comm_hook(None, allreduce_hook)
        how: dict[str, Any] = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=ranks.device.type == "cuda")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, **how)
        self.lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rows]
        model.recompute, self.limit = passes.chosen(s, model.config, self.lengths, model.head.itemsize, ranks)
        self.chosen = torch.tensor([r.chosen for r in rows], device=ranks.device)
        self.z0_state = self.z0_next = 0.0  # of the last finished step, and of the one being taken
        self.at, self.at_lengths = [0], self.lengths  # the rows of the pass in progress
        self.guessing = False  # whether its tokens have been seen to be less probable than by guessing
        if self.loss.z0:
            self.partner = mismatched(self.n, s.seed)
            pairs = zip(rows, self.partner, strict=False)
            self.kl_lengths = [len(r.prompt_ids) + len(rows[j].completion_ids) for r, j in pairs]

    def batch(self, indices: list[int]) -> data.Batch:
        """Rows (x_i, y_i) with their weights, packed, on this rank's device."""
        picked = [self.rows[i] for i in indices]
        return data.pack([(r.prompt_ids, r.completion_ids, r.w) for r in picked]).to(self.ranks.device)

    def kl_batch(self, indices: list[int]) -> data.Batch:
        """Mismatched rows (x_i, y_partner(i)) for Eq. 2, packed; their weights are not used."""
        picked = [(self.rows[i], self.rows[self.partner[i]]) for i in indices]
        return data.pack([(r.prompt_ids, p.completion_ids, p.w) for r, p in picked]).to(self.ranks.device)

    def begin(self, indices: list[int], lengths: list[int]) -> None:
        """Before each pass, on all ranks alike: remember its rows; raise Stopped on every rank if one was asked to."""
        self.ranks.check_stop()
        self.at, self.at_lengths = indices, lengths

    def memory_message(self) -> str:
        """One line: which rows did not fit and what to change."""
        s, tokens = self.s, sum(self.at_lengths[i] for i in self.at)
        flags = [f"--micro-tokens {tokens // 2}"] if len(self.at) > 1 else []
        flags += ["--recompute full"] * (self.model.recompute != "full") + ["--shard"] * (not s.shard)
        rows = {self.rows[i].id: self.at_lengths[i] for i in self.at}
        return training.memory_message(self.ranks.device, rows, flags)

    def measure(self) -> None:
        """On a GPU, where no size was asked for: one pass over the longest rows says how many tokens really fit."""
        if self.s.micro_batch or self.s.micro_tokens or self.ranks.device.type == "cpu":
            return
        trained = sum(p.numel() for p in self.parameters)
        self.limit = passes.measured(self.limit, self.lengths, trained, self.try_pass, self.ranks)

    def try_pass(self, rows: list[int]) -> None:
        """One pass and its gradient, for the memory they take. Ranks with shards make it together, of the same rows."""
        self.begin(rows, self.lengths)
        with lora.rounded(self.model):
            weighted, _ = sequence_sums(self.model, self.model.head, self.batch(rows), self.impl)
        torch.autograd.grad(weighted.sum(), self.parameters)  # not backward(): DDP shall not hear of it

    def each(
        self, indices: list[int], lengths: list[int], batch: Callable[[list[int]], data.Batch], limit: Limit
    ) -> Iterator[tuple[list[int], int, data.Batch]]:
        """`indices` pass by pass: (rows, how many of them are this rank's own, their batch)."""
        for rows, real in passes.micro_batches(indices, lengths, self.ranks, limit):
            self.begin(rows, lengths)
            yield rows, real, batch(rows)

    def reference_sums(self) -> dict[str, Tensor]:
        """log pi_ref sums of every row, (n,) fp32 each: "weighted" and "plain" of y, "kl" of the mismatched y'.

        Zeros where the loss does not need them. Each rank does its share; the sum over ranks puts them together. Rows
        go longest first, so a row that does not fit in memory stops the run now.
        """
        n, limit = len(self.rows), self.limit.without_gradient()
        table = torch.zeros(3, n, device=self.ranks.device)
        if not self.loss.reference:
            return dict(zip(("weighted", "plain", "kl"), table, strict=True))
        progress = Progress(self.ranks, n + self.n * self.loss.z0, "reference sums", "rows")
        with torch.no_grad(), lora.disabled(self.model):
            for rows, real, batch in self.each(list(range(n)), self.lengths, self.batch, limit):
                weighted, plain = sequence_sums(self.model, self.model.head, batch, self.impl)
                table[0, rows[:real]], table[1, rows[:real]] = weighted[:real], plain[:real]
                progress(real * self.ranks.world)
            pairs = self.each(list(range(self.n)), self.kl_lengths, self.kl_batch, limit) if self.loss.z0 else ()
            for rows, real, batch in pairs:
                table[2, rows[:real]] = sequence_sums(self.model, self.model.head, batch, self.impl)[1][:real]
                progress(real * self.ranks.world)
        progress.close()
        self.ranks.sum(table)
        return dict(zip(("weighted", "plain", "kl"), table, strict=True))

    @torch.no_grad()
    def held_out(self, reference: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of the rows that are not trained on, under their names with eval_ before them."""
        stats = torch.zeros(2, len(kto.STAT_FIELDS), dtype=torch.float64, device=self.ranks.device)
        held, limit = list(range(self.n, len(self.rows))), self.limit.without_gradient()
        for rows, real, batch in self.each(held, self.lengths, self.batch, limit):
            weighted, plain = sequence_sums(self.model, self.model.head, batch, self.impl)
            r, raw = weighted - reference["weighted"][rows], plain - reference["plain"][rows]
            r, raw, plain, chosen = (x[:real] for x in (r, raw, plain, self.chosen[rows]))
            stats += kto.reward_stats(torch.zeros_like(r), r, raw, plain, chosen, self.s.beta)
        kinds = ("rewards", "logps") if self.loss.reference else ("logps",)
        found = kto.metrics(self.ranks.sum(stats))
        return {f"eval_{name}": x for name, x in found.items() if name.startswith(kinds)}

    def z0(self, indices: list[int], reference: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Eq. 2 over the whole optimiser step: (z0 (), the batch mean before clamping).

        With kl_rows below 1 the first rows of the step stand for all: their order is random.
        """
        indices = indices[: math.ceil(self.s.kl_rows * len(indices))]
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        with torch.no_grad():
            limit = self.limit.without_gradient()
            for rows, real, batch in self.each(indices, self.kl_lengths, self.kl_batch, limit):
                _, plain = sequence_sums(self.model, self.model.head, batch, self.impl)
                total[0] += (plain - reference["kl"][rows])[:real].double().sum()
                total[1] += real
        kl_sum, count = self.ranks.sum(total)
        z0, state = kto.z0_estimate(kl_sum, count, self.z0_state, self.s.z0_ema)
        self.z0_next = float(state)
        return z0.float(), float(kl_sum / count)

    def backward(self, indices: list[int], reference: dict[str, Tensor], z0: Tensor) -> Tensor:
        """Forward and backward over one optimiser step's rows; gradients end up equal on every rank.

        Returns this rank's share of kto.reward_stats.
        """
        s, n = self.s, len(indices)
        stats = torch.zeros(2, len(kto.STAT_FIELDS), dtype=torch.float64, device=self.ranks.device)
        tokens = torch.tensor(sum(len(self.rows[i].completion_ids) for i in indices), device=self.ranks.device)
        number = len(passes.micro_batches(indices, self.lengths, self.ranks, self.limit))
        for k, (rows, real, batch) in enumerate(self.each(indices, self.lengths, self.batch, self.limit), 1):
            at_once = s.shard or k == number
            with contextlib.nullcontext() if at_once else cast(DistributedDataParallel, self.policy).no_sync():
                weighted, plain = sequence_sums(self.policy, self.model.head, batch, self.impl)
                ref = (reference["weighted"][rows], reference["plain"][rows])
                sums = kto.Sums(weighted, plain, *ref, self.chosen[rows], z0, n, tokens)
                loss = self.loss.of(sums, s)  # (B,)
                finite = torch.isfinite(loss[:real]).tolist()
                bad = [self.rows[i].id for i, ok in zip(rows, finite, strict=False) if not ok]
                if bad:
                    raise NumericsError(f"the loss is not finite for row {', '.join(bad)}; look at its weights")
                # Gradients are averaged over ranks, so times world: the result is that of sum(loss) / n.
                (loss[:real].sum() * (self.ranks.world / n)).backward()
            columns = (loss, weighted - ref[0], plain - ref[1], plain, self.chosen[rows])
            losses, r, r_raw, logps, chosen = (x[:real].detach() for x in columns)
            stats += kto.reward_stats(losses, r, r_raw, logps, chosen, s.beta)
        if s.shard:
            training.average_gradients(self.parameters, self.ranks)
        return stats

    def step(self, number: int, total: int, indices: list[int], reference: dict[str, Tensor]) -> dict[str, float]:
        """One optimiser step; returns its metrics under TRL's names, averaged over all ranks and micro-batches."""
        s = self.s
        with lora.rounded(self.model):
            z0, kl = self.z0(indices, reference) if self.loss.z0 else (torch.zeros((), device=self.ranks.device), None)
            metrics = kto.metrics(self.ranks.sum(self.backward(indices, reference, z0)))
        if kl is not None:
            metrics |= {"kl": kl, "z0": float(z0)}
        if not self.loss.reference:
            metrics = {name: x for name, x in metrics.items() if not name.startswith("rewards")}
        if number == 0 and self.loss.first:
            self.check_first_step(metrics, indices)
        if moe.is_due(self.model.config, number, total):
            metrics |= self.routes(number, indices)
        self.warn_if_guessing(metrics, number, indices)
        metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(self.parameters, s.max_grad_norm))
        if not math.isfinite(metrics["grad_norm"]):
            names = ", ".join(self.rows[i].id for i in indices)
            raise NumericsError(f"step {number + 1}: the gradient is not finite; the rows were {names}")
        metrics["learning_rate"] = training.learning_rate(number, total, s.warmup, getattr(s, self.loss.rate))
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.z0_state = self.z0_next
        return metrics

    def check_first_step(self, metrics: dict[str, float], indices: list[int]) -> None:
        """B = 0 makes the policy the reference, so the first loss is known (`kto.Loss.first`). Anything else is a bug.

        It catches a shifted mask, a wrong reference, a prompt that changed. Raises NumericsError.
        """
        assert self.loss.first is not None
        chosen = sum(self.rows[i].chosen for i in indices) / len(indices)
        expected = self.loss.first(chosen, 1 - chosen, self.s)
        fp32 = next(self.model.parameters()).dtype == torch.float32
        if not abs(metrics["loss"] - expected) <= (1e-4 if fp32 else 1e-2):
            raise NumericsError(
                f"the first loss is {metrics['loss']:.6f}, must be {expected:.6f}: policy and reference differ "
                "before training; check that the adapters start at zero"
            )

    def routes(self, number: int, indices: list[int]) -> dict[str, Any]:
        """Where the routers send some of a step's rows. Raises NumericsError if B = 0 sends a token elsewhere."""
        probed = self.each(indices[: moe.PROBED], self.lengths, self.batch, self.limit.without_gradient())
        found = moe.load_metrics(self.model, ((batch, real) for _, real, batch in probed), self.ranks)
        if number == 0 and found["router/changed_choices"]:
            raise NumericsError("policy and reference choose other experts before training; the adapters must be 0")
        return found

    def warn_if_guessing(self, metrics: dict[str, float], number: int, indices: list[int]) -> None:
        """Say once, with the step, that its tokens are less probable than guessing in the vocabulary makes them."""
        nats = sum(metrics[f"logps/{c}"] * metrics[f"count/{c}"] for c in kto.CLASSES if metrics[f"count/{c}"])
        mean = nats / sum(len(self.rows[i].completion_ids) for i in indices)
        guess = -math.log(self.model.config.vocab_size)
        if mean < guess and not self.guessing:
            self.guessing = True
            what = f"log-probability of {mean:,.1f} a token, guessing has {guess:.1f}"
            self.ranks.log(f"warning: step {number + 1}: {what}; the model falls apart, use a lower learning rate")


def check_run(rows: list[data.Row], method: str, s: TrainSettings, config: ModelConfig, ranks: Ranks) -> None:
    """Before the first step: refuse rows and rates that cannot train (InputError), warn of rows of one class."""
    if not rows:
        raise InputError("no training rows left; loosen the candidate filters or draw for more questions")
    loss, room, V = kto.LOSSES[method], config.max_position_embeddings, config.vocab_size
    others = [rows[j] for j in mismatched(len(rows), s.seed)] if loss.z0 else []
    for a, b in [*zip(rows, rows, strict=True), *zip(rows, others, strict=False)]:
        name = f"row {a.id}" if a is b else f"row {a.id} with the completion of row {b.id}, a pair of Eq. 2,"
        if (length := len(a.prompt_ids) + len(b.completion_ids)) > room:
            raise InputError(f"{name} has {length:,} tokens, the model {room:,} positions; leave the longer row out")
        if (top := max(*a.prompt_ids, *b.completion_ids)) >= V:
            raise InputError(f"{name} has token id {top:,}, the model {V:,} tokens; use the model the rows came from")
    total, peak = len(step_rows(len(rows), s.batch_size, s.epochs, s.seed)), getattr(s, loss.rate)
    if not any(training.learning_rate(number, total, s.warmup, peak) for number in range(total)):
        raise InputError(
            f"{len(rows)} row(s) make {total} step(s), the learning rate is 0 in all of them and nothing is learned "
            f"(peak {peak:g}, warmup {s.warmup:g}); use --warmup 0, a smaller --batch-size or more --epochs"
        )
    if loss.rows == "all" and len({r.chosen for r in rows}) == 1:
        kind, other = ("chosen", "rejected") if rows[0].chosen else ("rejected", "chosen")
        ranks.log(f"warning: all {len(rows)} rows are {kind}; {method} has no {other} ones to tell them from")


def train(
    model: Qwen3,
    rows: list[data.Row],
    method: str,
    s: TrainSettings,
    ranks: Ranks,
    out: Path,
    impl: str,
    base_name: str,
    origin: dict[str, str],
    resume: bool,
    revision: str = "",
) -> dict[str, float]:
    """Train `method` on `rows` and leave a PEFT adapter, metrics.jsonl and the last two checkpoints in `out`.

    model: on the ranks' device, or on the CPU with s.shard. rows: for sft the chosen ones only. origin: checksums of
    the base model and of the data, part of the run's identity. base_name, revision: what the adapter's config names as
    its base model, and the commit if it came from the Hub.
    resume: continue an interrupted run from its last checkpoint; one that has left its adapter is started anew.
    Returns the last step's metrics and the run's speed. Raises NumericsError, MemoryFull, InputError, and Stopped after
    the last finished step has been saved.
    """
    held = training.held_out([r.id for r in rows], s.seed) if s.eval_every else set()
    rows, others = [r for r in rows if r.id not in held], [r for r in rows if r.id in held]
    if s.eval_every and not others:
        raise InputError(f"{len(rows)} rows leave none to hold out; leave --eval-every out")
    check_run(rows, method, s, model.config, ranks)
    trainer = Trainer(model, rows, method, s, ranks, impl, others)
    plan = step_rows(len(rows), s.batch_size, s.epochs, s.seed)
    run = training.Training(
        out,
        ranks,
        lora.state(model),
        trainer.optimizer,
        run_identity(method, s, origin),
        total=len(plan),
        save_every=s.save_every,
        state=lambda: {"z0_state": trainer.z0_state},
    )
    finished = any(ranks.gather((out / lora.WEIGHTS).exists()))
    manifest = run.take_up() if resume and not finished else None
    if manifest is None:
        run.start_anew(lora.WEIGHTS, lora.CONFIG)
    else:
        trainer.z0_state = manifest["z0_state"]
    if ranks.rank == 0:
        checkpoint.check_space(out, run.names)
    done = len(run.log)
    with run.stoppable(), training.memory_named(trainer.memory_message):
        if done < len(plan):
            trainer.measure()
        reference = trainer.reference_sums() if done < len(plan) else {}
        started = time.perf_counter()

        def step(number: int) -> dict[str, float]:
            trace = out / f"trace-step-{s.profile}.json" if number + 1 == s.profile and ranks.rank == 0 else None
            with training.traced(trace):
                metrics = trainer.step(number, len(plan), plan[number], reference)
            if others and ((number + 1) % s.eval_every == 0 or number + 1 == len(plan)):
                metrics |= trainer.held_out(reference)
            epoch = (number + 1) * s.batch_size / len(rows)
            return {"step": number + 1, "epoch": round(min(epoch, s.epochs), 4), **metrics}

        run.run(step, training.step_line, f"training {method}")
    if ranks.rank == 0:
        lora.save(model, out, base_name, revision)
    ranks.wait()
    tokens = sum(trainer.lengths[i] for step in plan[done:] for i in step)
    return run.log[-1] | {"tokens_per_second": round(tokens / (time.perf_counter() - started)), "steps": len(plan)}


def run_identity(method: str, s: TrainSettings, origin: dict[str, str]) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit: every setting that shapes the result, the rows, the base model."""
    return {"method": method, **origin} | {k: v for k, v in asdict(s).items() if k not in SPEED_ONLY}
