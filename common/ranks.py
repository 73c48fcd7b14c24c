"""Which of the processes am I: the process group, sums over ranks, orderly ends, and what only rank 0 says.

Under torchrun there are WORLD_SIZE processes, on one machine or several; a plain `python` start is a world of one with
the same code path. nccl joins GPUs, gloo joins CPUs. When a rank dies, torchrun ends the others of its machine, and
those elsewhere fail in their next sum. Results go to stdout, everything here to stderr.
"""

import contextlib
import ctypes
import datetime
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.endings import SIGNALS, Stop
from common.errors import InputError

PATIENCE = datetime.timedelta(days=7)  # how long ranks wait while one of them works alone
# Every group joined so far. Freeing a gloo group waits for its thread while holding Python's lock, and that thread may
# itself wait for the lock to let go of its last sum: DDP, freed after an exception, hung there. So no group is freed.
JOINED: list[object] = []


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, and the device it computes on."""

    rank: int
    world: int
    device: torch.device
    stop: Stop = field(default_factory=Stop)
    patient: dist.ProcessGroup | None = None  # for waits that may be long; None: the group of the sums
    restarted: bool = False  # torchrun has started the processes again after one of them died

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place, and returned. Its shape must not depend on data."""
        dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when every rank has come here, however long one of them works alone."""
        dist.barrier(self.patient)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of the ranks, on all of them. Not for tensors."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.patient)
        return found

    def check_stop(self) -> None:
        """Raise Stopped on every rank if any was asked to stop. All ranks must come here equally often."""
        asked = self.sum(torch.tensor([float(self.stop.number == n) for n in SIGNALS], device=self.device)).tolist()
        for number, count in zip(SIGNALS, asked, strict=True):
            if count:
                self.stop.end(number)

    def log(self, text: str) -> None:
        """One line on stderr, from rank 0 alone."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def not_joined() -> Ranks:
    """This process before `process_group`: its number, and a device on which nothing may be computed yet."""
    return Ranks(int(os.environ.get("RANK", 0)), 1, torch.device("cpu"))


def first_to_say(text: str) -> bool:
    """Whether none of the processes that torchrun started has asked this of the same text; inside a group and outside.

    What befalls all of them needs to be said once. True where they share no store: alone, or if a rank itself holds it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        store: dist.Store = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=5)))[0]
        return dist.PrefixStore(f"attempt{_attempt()}", store).add(f"said {text}", 1) == 1
    except RuntimeError:  # the launcher, which holds the store, has gone
        return True


def _attempt() -> int:
    """How often torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


ENDS = "ENDS_WITH_LAUNCHER"  # an environment variable for those started without torchrun (tools/sweep.py)


def end_with_launcher() -> None:
    """On Linux, SIGTERM to this process when the one that started it dies: a launcher killed by -9 cannot send one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def process_group(timeout_minutes: float = 10.0) -> Iterator[Ranks]:
    """Join the process group torchrun describes in the environment (a group of one without torchrun).

    timeout_minutes: a sum that takes longer than this ends the run; `Ranks.wait` may take longer.
    """
    launched = "RANK" in os.environ
    if launched or ENDS in os.environ:
        end_with_launcher()
    rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
        torch.cuda.set_device(device)
    restarts = _attempt()
    store: dist.Store = dist.HashStore()
    if launched:  # a restarted group must not meet the addresses of the one before it, which the store still holds
        store = dist.PrefixStore(f"attempt{restarts}", next(dist.rendezvous("env://"))[0])
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world,
        store=store,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    JOINED.extend((dist.group.WORLD, patient))
    try:
        yield Ranks(rank, world, device, patient=patient, restarted=restarts > 0)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def only_writer(out: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, no other run may write to `out`. Raises InputError that names who does; rank 0 speaks for all."""
    if ranks.rank:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise InputError(
                f"{out}: another run writes there ({f.read().strip()}); wait for it, stop it, or give another --out"
            ) from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        f.flush()
        yield


class Progress:
    """A tqdm bar on rank 0 in a terminal; elsewhere a plain line every ten seconds; silence on other ranks.

    parts: what every unit is made of, such as the tokens of completions; counted beside the units, and the speed is
    theirs. With a total the line says what share is done and about how long the rest takes.
    """

    def __init__(self, ranks: Ranks, total: int | None, what: str, unit: str, parts: str = "") -> None:
        self.what, self.unit, self.total, self.parts = what, unit, total, parts
        self.done, self.done_parts, self.started = 0, 0, time.perf_counter()
        self.said = self.started
        self.quiet = ranks.rank != 0
        terminal = sys.stderr.isatty() and not self.quiet
        self.bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True) if terminal else None

    def __call__(self, n: int = 1, parts: int = 0) -> None:
        """Count `n` more units, made of `parts` parts."""
        self.done += n
        self.done_parts += parts
        if self.bar is not None:
            self.bar.update(n)
            if self.parts:
                self.bar.set_postfix_str(f"{self.done_parts:,} {self.parts}", refresh=False)
        elif not self.quiet and time.perf_counter() - self.said > 10:
            self.said = time.perf_counter()
            self._line()

    def close(self) -> float:
        """End the bar, say the total, return units (or their parts, if they are counted) per second of this rank."""
        if self.bar is not None:
            self.bar.close()
        elif not self.quiet:
            self._line()
        return self._rate()

    def _rate(self) -> float:
        return (self.done_parts if self.parts else self.done) / (time.perf_counter() - self.started)

    def _line(self) -> None:
        of, left = f"/{self.total:,}" if self.total else "", ""
        parts = f", {self.done_parts:,} {self.parts}" if self.parts else ""
        if self.total and 0 < self.done < self.total:
            seconds = (time.perf_counter() - self.started) * (self.total - self.done) / self.done
            left = f", {self.done / self.total:.0%} done, about {datetime.timedelta(seconds=round(seconds))} left"
        line = f"{self.what}: {self.done:,}{of} {self.unit}{parts}, {self._rate():,.0f} a second{left}"
        print(line, file=sys.stderr, flush=True)
