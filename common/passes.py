"""How the rows of an optimiser step become forward passes: by tokens or by rows, the same number on every rank.

The loss does not depend on it, so by default the program decides: as many tokens at once as the memory holds, and the
least recomputation that leaves room for enough of them (`planned`, `measured`). Left out: rows of one pass on several
GPUs, passes that are padded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from common import costs
from common.model_config import ModelConfig
from common.ranks import Ranks

CPU_TOKENS = 2048  # at once on a CPU: more are no faster there (docs/speed.md)
ENOUGH = 4096  # tokens at once that keep a large GPU busy; a level of recomputation that leaves room for them is taken
MOST = 16384  # more gain nothing
STEP = 256  # tokens: budgets are multiples of it
NO_GRAD_ROWS = 4  # times as many rows in a pass that keeps no activations


@dataclass(frozen=True)
class Limit:
    """The most that one forward pass of one rank takes; 0: any number. One row always fits."""

    rows: int = 0
    tokens: int = 0

    def without_gradient(self) -> "Limit":
        """Of passes that keep no activations."""
        more = max(self.tokens, min(NO_GRAD_ROWS * self.tokens, MOST))
        return Limit(NO_GRAD_ROWS * self.rows, more)


def grouped(order: Sequence[int], lengths: Sequence[int], limit: Limit) -> list[list[int]]:
    """Rows, in this order, in groups that keep to the limit.

    >>> grouped([2, 0, 1], [30, 20, 50], Limit(tokens=60))
    [[2], [0, 1]]
    """
    groups: list[list[int]] = []
    tokens = 0
    for i in order:
        tokens += lengths[i]
        many = bool(groups) and limit.rows and len(groups[-1]) == limit.rows
        if not groups or many or (limit.tokens and tokens > limit.tokens):
            groups.append([])
            tokens = lengths[i]
        groups[-1].append(i)
    return groups


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], ranks: Ranks, limit: Limit
) -> list[tuple[list[int], int]]:
    """This rank's part of `indices` in passes: (rows, how many of them are its own).

    Longest rows first. Every rank gets the same number of passes, since each ends in the same collectives; where
    nothing is left for a rank it computes a row once more and counts 0 of it. Rows 0 1 2, equally long, on two ranks,
    one at a time: rank 0 gets [([0], 1), ([2], 1)], rank 1 gets [([1], 1), ([2], 0)].
    """
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    of_ranks = [grouped(order[rank :: ranks.world], lengths, limit) for rank in range(ranks.world)]
    mine = [(group, len(group)) for group in of_ranks[ranks.rank]]
    return mine + [(order[-1:], 0)] * (max(map(len, of_ranks)) - len(mine))


# ---------- how many tokens, and what to recompute


class Wishes(Protocol):
    """What a trainer's settings say about its passes; 0 and "auto" leave it to the program."""

    @property
    def micro_tokens(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def recompute(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lora_r(self) -> int: ...
    @property
    def compile(self) -> bool: ...
    @property
    def shard(self) -> bool: ...


def room(device: torch.device, ranks: Ranks) -> float:
    """Bytes that every rank may fill on its GPU: `costs.ROOM` of what nobody else holds there, the least of all."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(ranks.gather(costs.ROOM * (free + torch.cuda.memory_reserved(device))))


def needed(c: ModelConfig, r: int, size: int, tokens: int, level: str, shards: int) -> float:
    """Bytes of a step whose passes hold so many tokens. size: of a base weight."""
    no_grad = Limit(tokens=tokens).without_gradient().tokens
    return sum(costs.memory(c, r, size, tokens, tokens, level, True, no_grad, shards).values())


def planned(s: Wishes, c: ModelConfig, lengths: Sequence[int], size: int, memory: float, world: int) -> tuple[str, int]:
    """(level of recomputation, tokens of a pass) on a GPU with `memory` bytes to fill, from the shapes alone.

    lengths: tokens of each training row. The first level with room for ENOUGH tokens is taken, or for all that a rank
    has in a step, if these are fewer.
    """
    longest, shards = sorted(lengths), world if s.shard else 1
    share = sum(longest[-math.ceil(s.batch_size / world) :])
    asked = s.micro_tokens or (sum(longest[-s.micro_batch :]) if s.micro_batch else 0)
    most = min(MOST, -(-share // STEP) * STEP)
    levels: Sequence[str] = costs.RECOMPUTE if s.recompute == "auto" else (s.recompute,)
    if s.compile:  # the compiler chooses by itself what cheap things it makes again
        levels = [level for level in levels if level != "cheap"]
    for level in levels:
        fit = max(
            (n for n in range(0, most + 1, STEP) if needed(c, s.lora_r, size, n, level, shards) <= memory), default=0
        )
        if fit >= (asked or max(longest[-1], min(ENOUGH, most))):
            break
    return level, asked or max(longest[-1], fit)


def chosen(s: Wishes, c: ModelConfig, lengths: Sequence[int], size: int, ranks: Ranks) -> tuple[str, Limit]:
    """(level of recomputation, the most that a pass takes): as the settings say, the rest by the device."""
    if ranks.device.type == "cpu":
        level, tokens = ("none" if s.recompute == "auto" else s.recompute), s.micro_tokens or CPU_TOKENS
    else:
        level, tokens = planned(s, c, lengths, size, room(ranks.device, ranks), ranks.world)
    return level, Limit(s.micro_batch, s.micro_tokens if s.micro_batch else tokens)


def measured(
    limit: Limit, lengths: Sequence[int], trained: int, run: Callable[[list[int]], object], ranks: Ranks
) -> Limit:
    """The limit that fills a GPU, from one pass with its gradient over the longest rows, half of what was planned.

    run: makes that pass with the rows it is given. trained: numbers that the optimiser trains. What does not grow with
    the tokens is counted as if it did, so the answer is on the safe side.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows = grouped(order, lengths, Limit(tokens=limit.tokens // 2))[0]
    torch.cuda.reset_peak_memory_stats(ranks.device)
    before = torch.cuda.memory_allocated(ranks.device)
    run(rows)
    a_token = (torch.cuda.max_memory_allocated(ranks.device) - before) / sum(lengths[i] for i in rows)
    later = 16 * trained  # gradients, twice in the first steps (common/costs.py), and two moments
    fit = (room(ranks.device, ranks) - before - later) / a_token
    return Limit(tokens=int(min(ranks.gather(min(MOST, max(fit, lengths[order[0]]))))))
