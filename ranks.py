"""Which of the processes am I: the process group, sums over ranks, and what only rank 0 says.

Under torchrun there are WORLD_SIZE processes; a plain `python` start is a world of one with the same code path. nccl
joins GPUs, gloo joins CPUs. Results go to stdout, everything here to stderr.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place, and returned. Its shape must not depend on data."""
        dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.sum(torch.zeros(1, device=self.device))

    def log(self, text: str) -> None:
        """One line on stderr, from rank 0 alone."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def process_group(timeout_minutes: float = 10.0) -> Iterator[Ranks]:
    """Join the process group torchrun describes in the environment (a group of one without torchrun)."""
    launched = "RANK" in os.environ
    rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world,
        store=None if launched else dist.HashStore(),
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    try:
        yield Ranks(rank, world, device)
    finally:
        dist.destroy_process_group()


class Progress:
    """A tqdm bar on rank 0 in a terminal; elsewhere a plain line every ten seconds; silence on other ranks."""

    def __init__(self, ranks: Ranks, total: int | None, what: str, unit: str) -> None:
        self.what, self.unit, self.total = what, unit, total
        self.done, self.started = 0, time.perf_counter()
        self.said = self.started
        self.quiet = ranks.rank != 0
        terminal = sys.stderr.isatty() and not self.quiet
        self.bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True) if terminal else None

    def __call__(self, n: int = 1) -> None:
        """Count `n` more units."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif not self.quiet and time.perf_counter() - self.said > 10:
            self.said = time.perf_counter()
            self._line()

    def close(self) -> float:
        """End the bar, say the total, return units per second of this rank."""
        if self.bar is not None:
            self.bar.close()
        elif not self.quiet:
            self._line()
        return self.done / (time.perf_counter() - self.started)

    def _line(self) -> None:
        rate = self.done / (time.perf_counter() - self.started)
        of = f"/{self.total:,}" if self.total else ""
        print(f"{self.what}: {self.done:,}{of} {self.unit}, {rate:,.0f} a second", file=sys.stderr, flush=True)
