"""What training loops need beside their step: resume, stop and save; memory that runs out is named; sharded layers.

    training = Training(out, ranks, names, optimizer, identity, total=327, save_every=20, state=lambda: {"z0_state": 0})
    manifest = training.take_up()               # None: there is no checkpoint, so this starts at step 1
    with training.stoppable():
        training.run(step, line, "training")    # step(number) -> the row of metrics of that step

A run that is asked to stop saves the last finished step and leaves the rest of the step undone. A checkpoint holds the
metrics of its steps, so `metrics.jsonl` beside it is for readers: a resumed run does not depend on it. Left out: what a
step is, evaluation between steps (a `step` may do it), anything asynchronous.
"""

import contextlib
import math
import resource
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoint
from common.errors import InputError, MemoryFull, Stopped
from common.files import read_jsonl, write_jsonl
from common.ranks import Progress, Ranks

Row = dict[str, Any]


class Training:
    """A training on disk. `log` has the metrics of every step so far, a row a step; `saved` of them are on disk.

    names: name -> trained tensor, in the optimizer's order. identity: what must be the same for a checkpoint to fit.
    total: steps of the whole training. state: gives the JSON values that the next step needs beside the tensors.
    """

    def __init__(
        self,
        out: Path,
        ranks: Ranks,
        names: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, Any],
        total: int,
        save_every: int,
        state: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.out, self.ranks, self.names, self.optimizer = out, ranks, names, optimizer
        self.identity, self.total, self.save_every, self.state = (
            checkpoint.identity_of(identity),
            total,
            save_every,
            state,
        )
        self.log: list[Row] = []
        self.saved = 0

    def take_up(self) -> dict[str, Any] | None:
        """Go on from the newest whole checkpoint: tensors and log are back. Returns its manifest, None without one.

        Newer ones that are damaged are named and keep their files under another name. Raises InputError when all are,
        when it is another run's, and when ranks see different ones.
        """
        manifest = checkpoint.latest(self.out, self.identity)
        if len({str(seen) for seen in self.ranks.gather(manifest and manifest["step"])}) > 1:
            raise InputError(
                f"{self.out}: not every rank sees the same checkpoint; put it where all can read and write"
            )
        if manifest is None:
            return None
        self.keep_damaged(manifest["damaged"])
        checkpoint.restore(manifest["path"], self.names, self.optimizer)
        self.log = read_jsonl(manifest["path"] / checkpoint.METRICS)
        self.saved = manifest["step"]
        assert len(self.log) == self.saved, (len(self.log), manifest["path"])
        self.ranks.log(f"{self.out}: continuing after step {self.saved} of {self.total}")
        return manifest

    def start_anew(self, *results: str) -> None:
        """Remove an earlier run's checkpoints, metrics and `results`, which are names of files.

        Damaged checkpoints are named and keep their files under another name.
        """
        if self.ranks.rank == 0:
            broken = {path: reason for path in checkpoint.found(self.out) if (reason := checkpoint.damage(path))}
            self.keep_damaged(broken)
            for old in checkpoint.found(self.out):
                checkpoint.remove(old)
            for name in (checkpoint.METRICS, *results):
                (self.out / name).unlink(missing_ok=True)

    def keep_damaged(self, damaged: Mapping[Path, str]) -> None:
        """Say what is wrong with each of these checkpoints, and rename it."""
        if self.ranks.rank == 0:
            for path, kept in zip(damaged, checkpoint.set_aside(damaged), strict=True):
                self.ranks.log(f"{path}: damaged, {damaged[path]}; not used, kept as {kept.name}")

    def save(self) -> None:
        """A checkpoint of the last finished step, unless that is on disk."""
        if self.ranks.rank == 0 and len(self.log) > self.saved:
            write_jsonl(self.out / checkpoint.METRICS, self.log)
            state = {"identity": self.identity, **self.state()}
            checkpoint.save(self.out, len(self.log), self.names, self.optimizer, state, self.log)
        self.saved = len(self.log)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Inside, a signal only leaves a note for `Ranks.check_stop`; Stopped saves what is finished on its way out."""
        with self.ranks.stop.hold():
            try:
                yield
            except Stopped:
                self.save()
                done = f"stopped after step {len(self.log)} of {self.total}"
                self.ranks.log(f"{self.out}: {done}; the same command with --resume goes on")
                raise

    def run(self, step: Callable[[int], Row], line: Callable[[Row, int], str], what: str) -> None:
        """All steps that are left, saving every `save_every` and at the end. line: a row and `total` as one line.

        step: takes the number of a step, from 0, and returns its metrics. If it raises Stopped, everything that `state`
        gives must be as it was before the step.
        """
        progress = Progress(self.ranks, self.total, what, "steps")
        progress(len(self.log))
        for number in range(len(self.log), self.total):
            self.log.append(step(number))
            progress()
            if len(self.log) % self.save_every == 0 or len(self.log) == self.total:
                self.save()
            self.ranks.log(line(self.log[-1], self.total))
        progress.close()


@contextlib.contextmanager
def traced(path: Path | None) -> Iterator[None]:
    """Inside, every operation and kernel is recorded; `path` becomes a trace for Perfetto or chrome://tracing."""
    if path is None:
        yield
        return
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profile:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    profile.export_chrome_trace(str(unfinished))
    unfinished.replace(path)


def learning_rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Linear rise from 0 over ceil(warmup * total) steps, then half a cosine down to 0 (as in transformers)."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return peak * step / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def average_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """What DDP does by itself: the gradients become their mean over ranks."""
    grads = [p.grad for p in parameters if p.grad is not None]
    assert len(grads) == len(parameters)
    flat = ranks.sum(torch.cat([grad.flatten() for grad in grads])) / ranks.world
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def step_line(m: Mapping[str, Any], total: int) -> str:
    """One step's metrics as a line for people."""
    head = f"step {m['step']}/{total} loss {m['loss']:.4f} grad {m['grad_norm']:.3f} lr {m['learning_rate']:.2e}"
    if "rewards/chosen" not in m or "rewards/rejected" not in m:
        return head
    z0 = f" z0 {m['z0']:.3f}" if "z0" in m else ""
    return f"{head} r+ {m['rewards/chosen']:+.3f} r- {m['rewards/rejected']:+.3f}{z0}"


@contextlib.contextmanager
def memory_named(message: Callable[[], str]) -> Iterator[None]:
    """Inside, running out of memory raises MemoryFull with `message()`, one line: at which rows, and what to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise MemoryFull(message()) from None


def memory_message(device: torch.device, rows: Mapping[str, int], flags: Sequence[str]) -> str:
    """One line: which rows (id -> tokens) did not fit, how much was in use, which flags need less."""
    named = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in rows.items())
    remedy = "use " + " or ".join(flags) if flags else "use a device with more memory, or shorter rows"
    peak = peak_memory(device)
    return f"out of memory on {device} at row {named}; peak {peak}; {remedy}, the result stays the same"


def held_out(ids: Sequence[str], seed: int) -> set[str]:
    """The ids of about a tenth of the questions: which ones depends on the seed and their names alone.

    What stands before the first "#" of an id is its question: all its rows are held out, or none.
    """
    return {name for name in ids if zlib.crc32(f"{seed}/{name.partition('#')[0]}".encode()) % 10 == 0}


def peak_memory(device: torch.device) -> str:
    """The most memory in use so far, in words: "31.2 of 40.0 GB" of a GPU, "3.1 GB" of this process."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} of {total / 1e9:.1f} GB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"


def shard(model: nn.Module, trained: list[nn.Parameter], ranks: Ranks) -> None:
    """Leave on each rank its part of every layer's frozen weights, gathered again for the time the layer computes.

    model: on the CPU or on the ranks' device; what is not sharded (train.py says what) goes to the device whole.
    """
    from torch.distributed.device_mesh import init_device_mesh  # seconds to import, and rarely needed
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList), type(layers)
    whole = set(model.parameters()) - set(layers.parameters()) | set(trained)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    for p in whole:
        p.data = p.data.to(ranks.device)
    # FSDP moves all arguments to the device; the boundaries of rows are read on the CPU.
    model.register_forward_pre_hook(lambda _, args: (args[0], args[1].cpu()))
