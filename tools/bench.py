"""What each part costs beside what one would run instead: `make bench`, or `python -m tools.bench [section ...]`.

  op      the segment log-probability op against full logits, torch, Liger and TRL
  step    one KTO optimiser step against TRL's KTOTrainer with PEFT: same weights, rows, pairs and precision
  sample  tokens a second against transformers' generate
  em      the label statistics at a thousand to a million traces
  growth  our step's time and memory with longer rows, more rows, a larger vocabulary, more ranks
  passes  our step's time and memory with more tokens in a pass, and at each level of recomputation
  before  our step beside that of an earlier commit, --before [c937622: fp32 adapters, nothing fused but the op]

Candidates take turns in one process after a warm-up round, so that a slow minute of the machine meets all of them, and
must agree in value before a time is shown. A ratio is taken within its round; shown are the median and in brackets the
lowest and the highest. Memory is measured in a fresh process for each candidate. Markdown goes to stdout, JSON to
--out. Left out: profiles, plots, a judgement.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import em
import kto
import lora
import model as qwen
import sample
from common.endings import program
from common.errors import Disagreement, InputError
from common.files import ROOT, write_json
from common.model_config import ModelConfig
from common.passes import Limit
from kernels.segment_logprob import default_impl, reference, segment_logprob
from tools.measure import (
    Table,
    alternate,
    clock,
    compared,
    environment,
    extra_memory,
    in_fresh_process,
    installed,
    markdown,
    spread,
)

ABSENT = {"note": "not installed; make bench installs it"}


# ---------- op

BETA = 0.1
# Largest difference from fp32 arithmetic on the same inputs: of the loss, and of the gradient relative to its norm.
# In bf16 some round each token's log-probability, here about -12, to 1/16.
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (3e-2, 1e-1), torch.float16: (3e-2, 1e-1)}


@dataclass(frozen=True)
class OpInputs:
    """A random head and hidden states of equally long sequences: so padding, where there is any, costs nothing."""

    hidden: Tensor  # (M, E)
    weight: Tensor  # (V, E)
    targets: Tensor  # (M,)
    w: Tensor  # (M,) ones, since Liger's loss has no weights
    cu_seqlens: Tensor  # (B + 1,)
    chosen: Tensor  # (B,)
    z0: Tensor  # () the mean of the sums, so that no sigmoid is flat

    def loss(self, sums: Tensor) -> Tensor:
        """KTO's loss of the sequence sums (B,): what all candidates can compute."""
        return kto.kto_loss(sums, self.z0, self.chosen, BETA, 1.0, 1.0).mean()

    def loss_of(self, logp: Tensor) -> Tensor:
        """The same of log-probabilities (M,)."""
        return self.loss(logp.float().view(len(self.chosen), -1).sum(1))


def op_inputs(M: int, E: int, V: int, dtype: str, device: torch.device, B: int = 4) -> OpInputs:
    """M rows in B sequences; logits of deviation 1."""
    g = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(M, E, generator=g, device=device).to(getattr(torch, dtype))
    weight = torch.randn(V, E, generator=g, device=device).mul_(E**-0.5).to(hidden.dtype)
    targets = torch.randint(0, V, (M,), generator=g, device=device)
    w, cu_seqlens = torch.ones(M, device=device), torch.arange(B + 1) * (M // B)
    with torch.no_grad():
        z0 = segment_logprob(hidden, weight, targets, w, cu_seqlens, "torch")[1].mean()
    return OpInputs(hidden, weight, targets, w, cu_seqlens, torch.arange(B, device=device) % 2 == 0, z0)


def _naive(x: OpInputs, hidden: Tensor) -> Tensor:
    return x.loss_of(F.linear(hidden, x.weight).float().log_softmax(1).gather(1, x.targets[:, None]))


def _exact(x: OpInputs, hidden: Tensor) -> Tensor:
    return x.loss(reference(hidden, x.weight, x.targets, x.w, x.cu_seqlens)[0])


def ours(x: OpInputs, hidden: Tensor, impl: str, chunk: int | None = None) -> Tensor:
    """The loss by the op of this repository."""
    return x.loss(segment_logprob(hidden, x.weight, x.targets, x.w, x.cu_seqlens, impl, chunk)[0])


def _torch(x: OpInputs, hidden: Tensor, rows: int | None) -> Tensor:
    chunks = dict(batch_chunk_size=rows, chunking_method=None)
    options = None if rows is None else torch.nn.LinearCrossEntropyOptions(**chunks)
    return x.loss_of(-F.linear_cross_entropy(hidden, x.weight, x.targets, reduction="none", options=options))


def _liger(x: OpInputs, hidden: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    # Not compiled on a CPU: it takes longer than all runs together.
    loss = LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=False, compiled=hidden.is_cuda)
    padded, targets = hidden.view(len(x.chosen), -1, hidden.shape[1]), x.targets.view(len(x.chosen), -1)
    return loss(padded, x.weight, targets, preference_labels=x.chosen, kl=x.z0)[0]


def _trl(x: OpInputs, hidden: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    V = 32768  # columns at a time, as in TRL's trainers
    return x.loss_of(ChunkedLogProbFunction.apply(hidden, x.weight, None, x.targets, 1.0, V, None, 1.0, ())[0])


Candidate = Callable[[OpInputs, Tensor], Tensor]


def op_candidates(impl: str) -> dict[str, Candidate | None]:
    """Functions of the inputs and the hidden states (M, E) that return the loss; None for what is not installed."""
    fused = hasattr(F, "linear_cross_entropy")
    return {
        "full logits": _naive,
        "ours": partial(ours, impl=impl),
        "F.linear_cross_entropy": partial(_torch, rows=None) if fused else None,
        "F.linear_cross_entropy, 256 rows": partial(_torch, rows=256) if fused else None,
        "Liger fused linear KTO": _liger if installed("liger_kernel") else None,
        "TRL chunked log-prob": _trl if installed("trl") else None,
    }


def op_call(candidate: Candidate, x: OpInputs, grad: bool) -> tuple[Tensor, Tensor | None]:
    """(loss, gradient of the hidden states) by forward and backward; with grad=False the forward alone."""
    hidden = x.hidden.detach().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        loss = candidate(x, hidden)
        if grad:
            loss.backward()
    return loss.detach(), hidden.grad


def agreement(candidates: dict[str, Candidate], x: OpInputs) -> dict[str, dict[str, float]]:
    """How far each loss and gradient is from that of full fp32 logits. Raises Disagreement beyond TOLERANCE."""
    loss, gradient = op_call(_exact, x, grad=True)
    found = {}
    for name, candidate in candidates.items():
        other, g = op_call(candidate, x, grad=True)
        apart = float((other - loss).abs()), float((g - gradient).float().norm() / gradient.float().norm())
        if not all(a <= b for a, b in zip(apart, TOLERANCE[x.hidden.dtype], strict=True)):
            raise Disagreement(f"{name}: {apart} from fp32 on {x.hidden.dtype}, allowed {TOLERANCE[x.hidden.dtype]}")
        found[name] = {"loss off by": apart[0], "gradient off by": apart[1]}
    return found


def op_rows(size: dict[str, Any], rounds: int, device: torch.device) -> Table:
    """Forward + backward, with its memory, and forward alone. size: the arguments of `op_inputs`."""
    every = op_candidates(default_impl(device))
    ready = {name: candidate for name, candidate in every.items() if candidate}
    x = op_inputs(**size, device=device)
    same, rows = agreement(ready, x), []
    for grad in (True, False):
        cases = {name: clock(partial(op_call, candidate, x, grad), device) for name, candidate in ready.items()}
        times = compared(alternate(cases, rounds), "full logits")
        for name in every:
            row = {"dtype": size["dtype"], "pass": "forward + backward" if grad else "forward", "candidate": name}
            if name in ready:
                row |= times[name]
            if name in ready and grad:
                task = {"task": "op", "size": size, "candidate": name}
                row |= in_fresh_process(["-m", "tools.bench"], task, torch.get_num_threads()) | same[name]
            rows.append(row if name in ready else row | ABSENT)
    return rows


def op_task(device: torch.device, size: dict[str, Any], candidate: str) -> dict[str, Any]:
    """Memory of one candidate of the op, forward and backward, in MiB; to be called in a fresh process."""
    x = op_inputs(**size, device=device)
    return extra_memory(partial(op_call, op_candidates(default_impl(device))[candidate], x, grad=True), device)


# ---------- step


@dataclass(frozen=True)
class StepSize:
    hidden: int
    layers: int
    V: int
    shortest: int  # tokens of the shortest row and of the longest
    longest: int
    rows: int = 8


LR, LORA_R = 1e-3, 32  # so high a rate that the losses of the next steps tell something
EPOCHS = 3  # over which the reference's cost is spread
# TRL's batch and what is not its default; its head is always the chunked one. The last three are its best setting, the
# fastest of them is shown.
BEST = dict(precompute_ref_log_probs=True, gradient_checkpointing=False)
TRL: dict[str, dict[str, Any]] = {
    "TRL, default": dict(batch=8),
    "TRL, reference precomputed": dict(batch=8, precompute_ref_log_probs=True),
    "TRL, precomputed, no checkpointing, batch 8": dict(batch=8, **BEST),
    "TRL, precomputed, no checkpointing, batch 4": dict(batch=4, **BEST),
    "TRL, precomputed, no checkpointing, batch 2": dict(batch=2, **BEST),
}


def random_model(hidden: int, layers: int, V: int, device: torch.device) -> qwen.Qwen3:
    """A Qwen3 in fp32 with tied embeddings and heads of 64."""
    heads = hidden // 64
    shape = dict(vocab_size=V, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers)
    shape |= dict(num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=64, rms_norm_eps=1e-6)
    shape |= dict(rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=4096, eos_token_id=0)
    torch.manual_seed(0)
    with device:
        return qwen.Qwen3(ModelConfig(**shape)).requires_grad_(False)


def random_rows(n: int, shortest: int, longest: int, V: int) -> list[Any]:
    """n rows for training, lengths spread evenly and mixed; a quarter is prompt, the last id is 0."""
    import data  # not above: it needs the tokenizers library, which a machine with a GPU and torch may lack

    g = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, n).int()[torch.randperm(n, generator=g)].tolist()
    rows = []
    for i, length in enumerate(lengths):
        ids = [*torch.randint(1, V, (length - 1,), generator=g).tolist(), 0]
        cut = max(1, length // 4)
        rows.append(data.Row(f"row{i}", i % 2 == 0, ids[:cut], ids[cut:], torch.ones(length - cut)))
    return rows


def lengths_of(rows: Sequence[Any], partner: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """(tokens, completion tokens) of each row; with `partner`, of each prompt with its partner's completion."""
    others = rows if partner is None else [rows[j] for j in partner]
    sizes = ((len(x.prompt_ids), len(y.completion_ids)) for x, y in zip(rows, others, strict=True))
    return [(prompt + completion, completion) for prompt, completion in sizes]


@dataclass
class Stepper:
    """An optimiser step to call again and again, and what came of it."""

    step: Callable[[], float]  # returns its seconds
    losses: list[float]  # of each step so far
    reference_seconds: float  # the reference's sums of all rows, where they are made once
    limit: Limit = Limit()  # the most that one of our passes takes


def our_stepper(model: qwen.Qwen3, rows: list[Any], ranks: Any, **settings: Any) -> Stepper:
    """train.Trainer on `rows`, all of them in each step; `settings` go to its TrainSettings."""
    import train

    s = train.TrainSettings(**dict(lr=LR, batch_size=len(rows), warmup=0.0, lora_r=LORA_R) | settings)
    trainer = train.Trainer(model, rows, "kto", s, ranks, default_impl(ranks.device))
    trainer.measure()
    cached: dict[str, Tensor] = {}
    reference_seconds = clock(lambda: cached.update(trainer.reference_sums()), ranks.device)()
    numbers, losses = itertools.count(), []

    def step() -> None:  # one of so many that the learning rate does not fall
        losses.append(trainer.step(next(numbers), 10**9, list(range(len(rows))), cached)["loss"])

    return Stepper(clock(step, ranks.device), losses, reference_seconds, trainer.limit)


def trl_order(n: int) -> list[int]:
    """An order of n rows in which TRL's mismatched pairs, each prompt with the completion before it, are ours."""
    import train

    partner, cycle = train.mismatched(n, seed=0), [0]
    while len(cycle) < n:
        cycle.append(partner[cycle[-1]])
    return cycle[::-1]


def trl_trainer(
    folder: Path, rows: list[Any], V: int, batch: int, callbacks: list[Any], model: Any = None, **settings: Any
) -> Any:
    """TRL's KTOTrainer on `model`, else the weights in `folder`, set to one step; `settings` go to its KTOConfig.

    It takes text, so id i is written as the word "t<i>" of a tokenizer made for this.
    """
    import datasets
    import peft
    import transformers
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers

    warnings.simplefilter("ignore", FutureWarning)  # transformers' about its own arguments
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    order = [rows[i] for i in trl_order(len(rows))]
    texts = [["".join(f" t{i}" for i in ids) for ids in (r.prompt_ids, r.completion_ids)] for r in order]
    table = {"prompt": [x for x, _ in texts], "completion": [y for _, y in texts], "label": [r.chosen for r in order]}
    steps = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=len(rows) // batch, max_steps=1)
    method = dict(learning_rate=LR, lr_scheduler_type="constant", undesirable_weight=1.5, max_length=None, bf16=False)
    quiet = dict(report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available())
    trainer = trl.KTOTrainer(
        model=model or transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=trl.KTOConfig(output_dir=str(folder / "trl"), **steps, **quiet, **method | settings),
        train_dataset=datasets.Dataset.from_dict(table),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0"),
        peft_config=peft.LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules=list(lora.TARGETS)),
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trl_stepper(folder: Path, rows: list[Any], V: int, adapters: dict[str, Tensor], **settings: Any) -> Stepper:
    """`trl_trainer` from our adapters. Timed is its own loop's step, without the collation before it."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.start

    timer, losses, reference_seconds = Clock(), [], 0.0
    trainer = trl_trainer(folder, rows, V, callbacks=[timer], **settings)
    named = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in adapters.items():
            named[name.replace(".weight", ".default.weight")].copy_(value)
    if trainer.args.precompute_ref_log_probs:
        batches = list(trainer.get_train_dataloader())
        once = clock(lambda: [trainer.compute_ref_log_probs(trainer.model, b) for b in batches], trainer.args.device)
        reference_seconds = once()

    def step() -> float:
        losses.append(trainer.train().training_loss)
        return timer.seconds

    return Stepper(step, losses, reference_seconds)


def make_stepper(
    name: str, size: StepSize, folder: Path, ranks: Any, adapters: dict[str, Tensor], **settings: Any
) -> Stepper:
    """The candidate `name`. "ours" comes first: it leaves its model in `folder` and its adapters in `adapters`."""
    rows = random_rows(size.rows, size.shortest, size.longest, size.V)
    if name in TRL:
        return trl_stepper(folder, rows, size.V, adapters, **TRL[name])
    model = random_model(size.hidden, size.layers, size.V, ranks.device)
    qwen.save(model, folder)
    stepper = our_stepper(model, rows, ranks, **settings)
    adapters |= {name: p.detach().clone() for name, p in lora.state(model).items()}
    return stepper


def same_losses(losses: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How far each candidate's losses are from ours. Raises Disagreement beyond 1e-4 at the first step, 1e-3 later.

    Where TRL's batch is not the whole step its z0 comes from other pairs, and later losses may differ.
    """
    found = {}
    for name, mine in losses.items():
        apart = [abs(a - b) for a, b in zip(mine, losses["ours"], strict=False)]
        later, same_pairs = max(apart[1:]), name == "ours" or TRL[name]["batch"] == 8
        if apart[0] > 1e-4 or (same_pairs and later > 1e-3):
            raise Disagreement(f"{name}: the losses are {mine}, ours {losses['ours']}")
        found[name] = {"first loss": mine[0], "off by": apart[0], "later losses off by": later}
    return found


def step_rows(size: StepSize, rounds: int, device: torch.device) -> Table:
    """A step of 8 rows, alone and with its share of the reference that is made once."""
    from common.ranks import process_group

    assert size.rows == 8, size
    names = ["ours", *(TRL if installed("trl") else ())]
    with tempfile.TemporaryDirectory() as folder, process_group() as ranks:
        adapters: dict[str, Tensor] = {}
        steppers = {name: make_stepper(name, size, Path(folder), ranks, adapters) for name in names}
        first = {name: stepper.step() for name, stepper in steppers.items()}
        for name in sorted((name for name in names if "no checkpointing" in name), key=first.get)[1:]:
            del steppers[name]
        times = compared(alternate({name: s.step for name, s in steppers.items()}, rounds, warm=True), "ours")
    same, rows = same_losses({name: s.losses for name, s in steppers.items()}), []
    for name, s in steppers.items():
        amortised = {"with the reference": times[name]["seconds"]["median"] + s.reference_seconds / EPOCHS}
        task = {"task": "step", "size": vars(size), "candidate": name, "rounds": 0}
        memory = in_fresh_process(["-m", "tools.bench"], task, torch.get_num_threads())
        rows.append({"candidate": name} | times[name] | amortised | memory | same[name])
    return rows if installed("trl") else [*rows, {"candidate": "TRL"} | ABSENT]


def step_task(
    device: torch.device, size: dict[str, Any], candidate: str, rounds: int, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """MiB and median seconds of one candidate of the optimiser step; to be called in a fresh process."""
    from common.ranks import process_group

    s = StepSize(**size)
    with tempfile.TemporaryDirectory() as folder, process_group() as ranks:
        if candidate in TRL:
            qwen.save(random_model(s.hidden, s.layers, s.V, device), folder)
        stepper = make_stepper(candidate, s, Path(folder), ranks, {}, **settings or {})
        memory = extra_memory(stepper.step, device)
        seconds = [stepper.step() for _ in range(rounds)]
        return memory | ({"seconds": statistics.median(seconds)} if seconds else {})


# ---------- sample, em, growth

HOW = dict(temperature=0.6, top_p=0.95, top_k=20)
SHAPE = dict(batch=16, prompt=60)


def sample_rows(name: str, folder: Path, new: int, rounds: int, device: torch.device) -> Table:
    """Tokens a second in fp32, no row stopping early. The greedy completions must be the same."""
    ours, row = qwen.load(folder, torch.float32, device), {"model": name, **SHAPE, "new tokens": new}
    B, T = SHAPE["batch"], SHAPE["prompt"]
    ids = torch.randint(3, ours.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))

    def our_way(new: int, **how: float) -> Tensor:
        done = sample.generate(ours, ids.tolist(), list(range(B)), max_new=new, stop_ids=set(), batch_size=B, **how)
        return torch.tensor([c.ids for c in done])

    if not installed("transformers"):
        return [row | {"candidate": "transformers"} | ABSENT]
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None)

    def their_way(new: int, **how: float) -> Tensor:
        given = ids.to(device)
        out = theirs.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, **how)
        assert out.shape == (B, T + new), (out.shape, "a row stopped early")
        return out[:, T:].cpu()

    same = float((our_way(16, temperature=0.0) == their_way(16, do_sample=False)).float().mean())
    if same < 0.9:  # a near tie may fall either way, and what follows it differs
        raise Disagreement(f"{name}: {same:.0%} of the greedy tokens are the same")
    ways = {"ours": partial(our_way, new, **HOW), "transformers": partial(their_way, new, do_sample=True, **HOW)}
    times = compared(alternate({way: clock(run, device) for way, run in ways.items()}, rounds), "ours")
    rates = {way: {"tokens a second": B * new / times[way]["seconds"]["median"]} for way in times}
    return [row | {"candidate": way} | rates[way] | times[way] | {"same greedy tokens": same} for way in times]


def em_row(n: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the three parts for n traces of 1 to 11 steps with one or two labels."""
    g = torch.Generator().manual_seed(0)
    kinds = [(a,) for a in em.LABELS] + list(itertools.combinations(em.LABELS, 2))
    lengths = torch.randint(1, 12, (n,), generator=g).tolist()
    steps = map(kinds.__getitem__, torch.randint(len(kinds), (sum(lengths),), generator=g).tolist())
    traces = [list(itertools.islice(steps, length)) for length in lengths]
    moves: Counter = Counter()
    fits: list[em.Transitions] = []
    parts = {
        "count moves": lambda: moves.update(move for trace in traces for move in em.observations(trace)),
        "fit": lambda: fits.append(em.fit(moves)),
        "weights": lambda: [em.segment_weights(trace, fits[0].P, fits[0].P) for trace in traces],
    }
    seconds = {name: clock(part, device)() for name, part in parts.items()}
    total = sum(seconds.values())
    return {
        "traces": n,
        "steps": sum(lengths),
        **seconds,
        "all": total,
        "per million steps": total / sum(lengths) * 1e6,
    }


AXES = {"longest": (128, 256, 512, 1024), "V": (8192, 16384, 32768, 65536), "rows": (8, 16, 32, 64), "ranks": (1, 2, 4)}
SMALL = StepSize(hidden=128, layers=2, V=16384, shortest=128, longest=128)


def growth_rows(base: StepSize, axes: dict[str, Sequence[int]], rounds: int) -> Table:
    """Our step with one size changed at a time and one thread a rank, relative to the axis's first value."""
    rows: Table = []
    for axis, values in axes.items():
        found: Table = []
        for value in values:
            size = vars(base) | ({} if axis == "ranks" else {axis: value})
            task = {"task": "step", "size": size | {"shortest": size["longest"]}, "candidate": "ours", "rounds": rounds}
            found.append(in_fresh_process(["-m", "tools.bench"], task, 1, value if axis == "ranks" else 1))
            times = {"times the size": value / values[0], "times the time": found[-1]["seconds"] / found[0]["seconds"]}
            if found[0]["extra MiB"]:
                times["times the memory"] = found[-1]["extra MiB"] / found[0]["extra MiB"]
            rows.append({"what grows": "tokens a row" if axis == "longest" else axis, "to": value} | found[-1] | times)
    return rows


BEFORE = {
    "hidden 256, 4 layers, 8 rows of 75-200": dict(hidden=256, layers=4, V=32768, shortest=75, longest=200, rows=8),
    "hidden 256, 4 layers, 8 rows of 300-500": dict(hidden=256, layers=4, V=8192, shortest=300, longest=500, rows=8),
}
PASSES = StepSize(hidden=256, layers=4, V=8192, shortest=150, longest=250, rows=16)
WAYS = [dict(micro_tokens=n, recompute="none") for n in (250, 1024, 2048, 4096)]
WAYS += [dict(micro_tokens=2048, recompute=level) for level in ("cheap", "full")]


def passes_rows(size: StepSize, ways: Sequence[dict[str, Any]], rounds: int, device: torch.device) -> Table:
    """Our step in each way, in turns; memory in fresh processes."""
    from common.ranks import process_group

    rows = random_rows(size.rows, size.shortest, size.longest, size.V)
    with process_group() as ranks:
        steps, losses = {}, {}
        for way in ways:
            model = random_model(size.hidden, size.layers, size.V, device)
            stepper = our_stepper(model, rows, ranks, **way)
            steps[json.dumps(way)], losses[json.dumps(way)] = stepper.step, stepper.losses
        times = compared(alternate(steps, rounds), json.dumps(ways[0]))
    first = losses[json.dumps(ways[0])]
    found: Table = []
    for way in ways:
        mine = losses[json.dumps(way)]
        if max(abs(a - b) for a, b in zip(mine, first, strict=True)) > 1e-4:
            raise Disagreement(f"{way}: the losses are {mine}, those of {ways[0]} {first}")
        task = {"task": "step", "size": vars(size), "candidate": "ours", "rounds": 0, "settings": way}
        memory = in_fresh_process(["-m", "tools.bench"], task, torch.get_num_threads())
        names = {"tokens of a pass": way["micro_tokens"], "recomputed": way["recompute"]}
        seconds, ratio = times[json.dumps(way)].values()
        found.append(names | {"seconds": seconds, "time / the first": ratio} | memory)
    return found


def before_rows(commit: str, sizes: dict[str, dict[str, Any]], rounds: int) -> Table:
    """CPU seconds of our step by the files of `commit` and by these, in turn in two processes; losses must agree."""
    found: Table = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
        for name, size in sizes.items():
            running = {}
            for tree in (folder, str(ROOT)):
                command = [sys.executable, str(ROOT / "tools" / "step_of.py"), tree, json.dumps(size)]
                process = subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                running[tree] = stack.enter_context(process)
            answers = {tree: [_next(process)] for tree, process in running.items()}  # ready
            for _ in range(rounds + 1):
                for tree, process in running.items():
                    print(file=process.stdin, flush=True)
                    answers[tree].append(_next(process))
            for process in running.values():
                process.stdin.close()
            old, new = ([answer["seconds"] for answer in answers[tree][2:]] for tree in running)  # without the first
            apart = [abs(a["loss"] - b["loss"]) for a, b in zip(*(answers[tree][1:] for tree in running), strict=True)]
            if max(apart) > 1e-4:
                raise Disagreement(f"{name}: the losses are {max(apart)} from those of {commit}")
            ratio = spread([b / a for a, b in zip(old, new, strict=True)])
            measured = {"step": name, f"CPU seconds at {commit}": spread(old), "CPU seconds now": spread(new)}
            found.append(measured | {"now / then": ratio, "losses apart": max(apart)})
    return found


def _next(process: Any) -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended")
    return json.loads(line)


TASKS = {"op": op_task, "step": step_task}


# ---------- the command


def readme(result: dict[str, Any], full_step: dict[str, Any]) -> str:
    """The README's tables from the JSON of a default run and of `python -m tools.bench step --full`."""
    env = result["environment"]
    op_size, step_size = "M = 1,024, E = 256, V = 151,936, fp32", "hidden 512, 8 layers, V = 151,936, 8 rows of 150-400"
    rows = [row for row in result["op"] if row["pass"] == "forward + backward" and "seconds" in row]
    ratio, extra = "time / full logits", "extra MiB"
    op_table = [{"the op, " + op_size: row["candidate"], ratio: row[ratio], extra: row[extra]} for row in rows]
    step = "one KTO step, " + step_size
    names = {"seconds": "seconds", "time / ours": "time / ours", extra: extra}
    step_table = [{step: row["candidate"]} | {new: row[old] for new, old in names.items()} for row in full_step["step"]]
    sampled = [
        {
            f"sampling, batch {row['batch']}": row["model"],
            "by": row["candidate"],
            "tokens a second": row["tokens a second"],
        }
        | {"time / ours": row["time / ours"]}
        for row in result["sample"]
    ]
    labels = [
        {"EM, traces": f"{row['traces']:,}", "steps": f"{row['steps']:,}", "count moves, s": row["count moves"]}
        | {"five iterations, s": row["fit"], "weights, s": row["weights"]}
        for row in result["em"]
    ]
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "transformers", "peft", "trl", "liger-kernel"))
    receipt = f"`make bench` on {env['machine']}, {env['threads']} threads, {versions}; median (lowest..highest)."
    return "\n\n".join([receipt, *(markdown(table) for table in (op_table, step_table, sampled, labels))])


def sections(full: bool, rounds: int, device: torch.device, before: str) -> dict[str, Callable[[], Table]]:
    """Each section as a function that measures it, at sizes for six minutes or for half an hour."""
    dtypes, E = (("float32", "bfloat16"), 1024) if full else (("float32",), 256)
    sizes = [dict(M=1024, E=E, V=151936, dtype=dtype) for dtype in dtypes]
    step = StepSize(512, 8, 151936, 150, 400) if full else StepSize(256, 4, 32768, 75, 200)
    axes = AXES if full else {axis: values[:3] for axis, values in AXES.items()}

    def sampling() -> Table:
        rows = sample_rows("the miniature", ROOT / "mini/model", 150, rounds, device)
        with tempfile.TemporaryDirectory() as folder:
            qwen.save(random_model(512, 8, 151936, torch.device("cpu")), folder)
            name = "random: hidden 512, 8 layers, V 151,936"
            return rows + sample_rows(name, Path(folder), 128 if full else 32, rounds, device)

    return {
        "op": lambda: [row for size in sizes for row in op_rows(size, rounds, device)],
        "step": lambda: step_rows(step, rounds, device),
        "sample": sampling,
        "em": lambda: [em_row(n, device) for n in (10**3, 10**4, 10**5, 10**6)],
        "growth": lambda: growth_rows(SMALL, axes, rounds),
        "passes": lambda: passes_rows(PASSES, WAYS, rounds, device),
        "before": lambda: before_rows(before, BEFORE, 2 * rounds),
    }


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", metavar="section", help="op, step, sample, em, growth, passes, before [the first five]"
    )
    parser.add_argument("--full", action="store_true", help="larger sizes and bf16: half an hour, not six minutes")
    parser.add_argument("--rounds", type=int, default=3, help="measured calls of each candidate [3]")
    parser.add_argument("--before", default="c937622", metavar="COMMIT", help="of the section before [c937622]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="[all cores]")
    parser.add_argument("--out", default="runs/bench.json", metavar="FILE", help="[runs/bench.json]")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)  # one measurement in its own process
    given = parser.parse_args(argv)
    # Read when the peers are imported, here and in the processes started from here.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.task:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        found = TASKS[given.task.pop("task")](device, **given.task)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    measure = sections(given.full, given.rounds, device, given.before)
    result: dict[str, Any] = {"environment": environment(device), "full": given.full, "rounds": given.rounds}
    print("\n".join(f"{name}: {value}" for name, value in result["environment"].items()))
    if unknown := [name for name in given.sections if name not in measure]:
        raise InputError(f"unknown section {unknown[0]!r}; the sections are {', '.join(measure)}")
    for name in given.sections or [*measure][:5]:
        start = time.perf_counter()
        result[name] = measure[name]()
        print(f"\n## {name} ({time.perf_counter() - start:.0f} s)\n\n{markdown(result[name])}", flush=True)
        write_json(given.out, result)


if __name__ == "__main__":
    sys.exit(main())
