"""Batched sampling with a KV cache: temperature, top-k, top-p, min-p, stop ids, a limit and a seed for each row.

A completion depends on its prompt, its seed and the sampling settings, never on its neighbours: the random number of a
token is a hash of (seed, position), and on a CPU the arithmetic of a row is the same bit for bit whatever the batch
size, the order of the prompts and the moment its neighbours finish (`ROWS` here, `model.BLOCK` there; it needs layer
sizes in whole vectors of 32, as all real models have). The price is that a CPU computes 16 rows where fewer are left;
`small_batches` saves it and gives the promise up below 16 rows. On a GPU the matrix library may round differently for
another batch size; a token then changes when its random number falls that close to the border between two tokens.

Prompts are read into free slots of a cache, equal ones once; every step then extends all rows by one token, and a row
that ends gives its slot to a waiting prompt. On a GPU a step, the choice of its tokens included, is captured in a CUDA
graph, one for each number of rows (a power of two), and replayed: its thousand small kernels cost one launch. A step
leaves on the device what the next one reads, so several are issued before the host looks at their tokens (`AHEAD`), and
the GPU does not wait for the host. What a row has computed behind its end is thrown away.

The cache is as long as its longest row, not as the limit: it starts with the prompts and a block more, and is made
longer, with its contents, when a row comes to its end. Where memory is short that leaves fewer slots; the rows with the
fewest tokens then go back to the waiting ones with what they have sampled and are read in again later. Reading rounds
differently from decoding, so their text is what it would have been but for such a rare border case.

Left out on purpose: beam search, repetition penalties, log-probabilities of the samples, paged caches.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import moe
from common import costs
from common.errors import InputError, NumericsError
from common.model_config import ModelConfig
from model import BLOCK, KVCache, Qwen3

# At least this many rows are decoded at a time, the spare ones unused: below it the CPU's matrix library picks other
# kernels, which round differently.
ROWS = 16
# Candidates looked at when top_k does not bound them; only rows whose choice they do not settle are sorted in full.
SHORTLIST = 128
CACHE_SHARE = 0.8  # of the free GPU memory may become cache; the rest is for logits and activations
CPU_ROOM = 2**62  # bytes of cache on a CPU: no limit; a test sets one
WORTHWHILE = 1.25  # times as many rows as the cache has slots make it worth to be made anew with more of them
PREFILL_TOKENS = 8192  # prompts read in one forward pass, so that a long queue of prompts does not set the peak memory
AHEAD = {"cpu": 1, "cuda": 8}  # steps issued at once; a row computes up to so many less one in vain behind its end
NOT_FINITE, UNSETTLED = -1, -2  # in place of a token: the logits are not finite, the shortlist did not settle it
MASK64 = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Completion:
    """ids: the sampled tokens, with the stop id if one was sampled. finish: "stop", or "length" at the limit.

    logprobs: of each id under the server that drew it, None where it gave none; None altogether if nobody asked.
    """

    ids: list[int]
    finish: str
    logprobs: list[float | None] | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    min_p: float = 0.0

    def check(self) -> None:
        """Raise InputError for a value outside its range."""
        ranges = {
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
        }
        for name, (good, allowed) in ranges.items():
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}; give {allowed}")


def seed_of(run_seed: int, id: str, mode: str, draw: int) -> int:
    """The seed of one completion, from what it is and not from where it stands in a list. 32 bits."""
    return zlib.crc32(f"{run_seed}/{id}/{mode}/{draw}".encode())


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Float64 numbers in [0, 1), a pure function of (seed, position), both int64, broadcast. Two rounds of splitmix64.

    Integer arithmetic only, so that every device draws the same number.
    """
    bits = _splitmix64(_splitmix64(seeds) + positions)
    return _shift_right(bits, 11).double() * 2.0**-53


def _splitmix64(x: Tensor) -> Tensor:
    """The output function of splitmix64 (Steele, Lea and Flood 2014) at state x; int64 multiplication wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _signed(x: int) -> int:
    """The int64 with the 64 bits of a non-negative integer."""
    x &= MASK64
    return x - 2**64 if x >= 2**63 else x


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical shift: the sign bit moves like any other."""
    return (x >> n) & (2 ** (64 - n) - 1)


def pick(logits: Tensor, u: Tensor, how: Sampling) -> Tensor:
    """One token a row: (B, V) logits and (B,) float64 uniform numbers to (B,) ids.

    The distribution is softmax(logits / temperature) cut to the top_k likeliest tokens, then to the shortest run of
    likeliest tokens whose mass reaches top_p, then to those at least min_p times as likely as the first, in this
    order and renormalised after each cut, as transformers and vLLM do. The token is the inverse of its cumulative
    distribution, likeliest first, at u.
    """
    token, settled = shortlisted(logits, u, how)
    if not settled.all():
        open_rows = (~settled).nonzero()[:, 0]
        top, ids = (logits[open_rows].float() / how.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        choice, _ = _invert(top, u[open_rows], how)
        token[open_rows] = ids.gather(-1, choice[:, None])[:, 0]
    return token


def shortlisted(logits: Tensor, u: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """`pick` from the likeliest SHORTLIST tokens where top_k sets no bound, and whether more could not change it; (B,).

    Asks the device nothing, so that a CUDA graph can hold it.
    """
    V = logits.shape[-1]
    every = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if how.temperature == 0:
        return logits.argmax(dim=-1), every
    if how.top_k:
        top, ids = logits.topk(min(how.top_k, V), dim=-1)  # (B, K), sorted
        choice, _ = _invert((top.float() / how.temperature).softmax(dim=-1), u, how)
        settled = every
    else:
        top, ids = (logits.float() / how.temperature).softmax(dim=-1).topk(min(SHORTLIST, V), dim=-1)
        choice, settled = _invert(top, u, how)
        settled = every if SHORTLIST >= V else settled
    return ids.gather(-1, choice[:, None])[:, 0], settled


def _invert(p: Tensor, u: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """Index of the chosen column, and whether columns beyond those given could not have changed it; both (B,).

    p: (B, K) probabilities in falling order, perhaps only the first K of a distribution. u: (B,) in [0, 1).
    """
    p = p.double()
    cumulative = p.cumsum(dim=-1)
    kept = (cumulative - p < how.top_p) & (p >= how.min_p * p[:, :1])  # a prefix: both conditions only ever turn false
    count = kept.sum(dim=-1, keepdim=True).clamp(min=1)  # (B, 1); NaN keeps nothing, `_Batch.step` refuses it
    mass = cumulative.gather(-1, count - 1)
    if how.top_p == 1 and how.min_p == 0:
        mass = torch.ones_like(mass)  # known without seeing the other columns
        settled = u < cumulative[:, -1]
    else:
        settled = count[:, 0] < p.shape[-1]
    choice = (cumulative <= u[:, None] * mass).sum(dim=-1)
    return torch.minimum(choice, count[:, 0] - 1), settled  # rounding may leave u * mass at the very end


# ---------- how much memory


def memory(config: ModelConfig, dtype: torch.dtype, rows: int, length: int) -> int:
    """Bytes of a GPU that sampling takes with `rows` rows of `length` tokens (prompt and completion) at once.

    The weights, and the cache with the share that is left beside it for logits and activations. Rows are not as long as
    they may become all at once, and fewer at a time do as well: what must fit is `memory(config, dtype, 1, longest)`.
    Left out: the adapter, and what the driver takes for itself (some hundred MB).
    """
    n = costs.parameters(config, r=1)
    weights = (n["layers"] + n["rest"]) * dtype.itemsize
    return weights + math.ceil(rows * KVCache.bytes(config, length, dtype, "cuda") / CACHE_SHARE)


def check_memory(config: ModelConfig, dtype: torch.dtype, length: int, total: int, flags: str) -> None:
    """Raise InputError if a GPU of `total` bytes cannot hold the model and one row of `length` tokens."""
    need = memory(config, dtype, 1, length)
    if need > total:
        raise InputError(
            f"sampling needs {need / 2**30:.1f} GiB for the model and one row of {length:,} tokens, the GPU has "
            f"{total / 2**30:.1f}; lower {flags}, or use a server (--backend openai)"
        )


def shape(room: int, block: int, rows: int, blocks: int, most: int) -> tuple[int, int]:
    """(slots, blocks a slot) of a cache for `rows` rows, the longest of `blocks` blocks, in `room` bytes.

    block: bytes of one block of one slot. Twice the blocks, but not above `most`, if all rows have room then, so that
    the cache is seldom made anew; else as many slots as there is room for. At least one block of one slot must fit.

    >>> shape(100, 1, 10, 4, 16), shape(50, 1, 10, 4, 16), shape(30, 1, 10, 4, 16)
    ((10, 8), (10, 4), (7, 4))
    """
    twice = max(blocks, min(2 * blocks, most))
    if rows * twice * block <= room:
        return rows, twice
    return min(rows, room // (blocks * block)), blocks


def admitted(room: int, block: int, active: list[int], waiting: list[int], most: int) -> tuple[int, int]:
    """How many of the waiting rows, taken in their order, fit beside the active ones, and the blocks of the longest.

    active, waiting: blocks that each row needs. most: rows altogether.

    >>> admitted(12, 1, [1, 2], [2, 2, 3, 1], 99)
    (2, 2)
    """
    n, longest = 0, max(active, default=0)
    for need in waiting[: most - len(active)]:
        wider = max(longest, need)
        if (len(active) + n + 1) * wider * block > room:
            break
        n, longest = n + 1, wider
    return n, longest


def least(progress: list[int], n: int) -> list[int]:
    """The n slots with the fewest sampled tokens, the later ones first among equals.

    >>> least([5, 3, 3, 9], 2)
    [2, 1]
    """
    return sorted(range(len(progress)), key=lambda slot: (progress[slot], -slot))[:n]


# ---------- many completions


@torch.inference_mode()
def generate(
    model: Qwen3,
    prompts: Sequence[Sequence[int]],
    seeds: list[int],
    *,
    max_new: int | list[int],
    stop_ids: set[int],
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int = 20,
    min_p: float = 0.0,
    batch_size: int = 128,
    small_batches: bool = False,
    never: Sequence[int] = (),
    progress: Callable[[int], object] | None = None,
    finished: Callable[[int, Completion], object] | None = None,
) -> list[Completion]:
    """Complete every prompt; the result has the prompts' order.

    seeds: one integer a prompt (see `seed_of`); the same prompt and seed give the same text. max_new: most new tokens,
    for all rows or one number a row. batch_size: rows decoded together, fewer where a GPU has no room for their cache;
    a row that finishes makes room for a waiting prompt. small_batches: on a CPU, fewer than 16 rows are computed as
    they are, faster, and a row's text may then depend on how many there are. never: ids that are not sampled (those
    without a token, `tokens.unused_ids`: the head of most models has more rows than the tokenizer).
    progress: called with the number of new tokens whenever some have come, for example a tqdm bar's `update`.
    finished: called with (index, completion) as soon as a row ends, in whatever order they do; they are not kept then,
    and the result is empty.
    Raises InputError for settings out of range, for prompts that are empty or too long for the model and for a GPU
    without room for one row; NumericsError, with the index of the prompt, for logits that are not finite.
    """
    how = Sampling(temperature, top_p, top_k, min_p)
    how.check()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give 1 or more")
    limits = [max_new] * len(prompts) if isinstance(max_new, int) else max_new
    assert len(prompts) == len(seeds) == len(limits), (len(prompts), len(seeds), len(limits))
    _check_prompts(model, prompts, limits)
    if not prompts:
        return []
    size = min(batch_size, len(prompts))
    with model.stacked():
        batch = _Batch(model, prompts, seeds, limits, stop_ids, size, how, small_batches, never)
        while batch.active or batch.waiting:
            batch.refill()
            batch.lengthen()
            new = batch.step()
            if progress is not None:
                progress(new)
            if finished is not None:
                for index in batch.finished:
                    finished(index, batch.completions.pop(index))
    return [batch.completions[i] for i in range(len(prompts))] if finished is None else []


def _check_prompts(model: Qwen3, prompts: Sequence[Sequence[int]], limits: list[int]) -> None:
    V, room = model.config.vocab_size, model.config.max_position_embeddings
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            raise InputError(f"prompt {i} is empty; give at least one token")
        if min(prompt) < 0 or max(prompt) >= V:
            raise InputError(f"prompt {i} holds an id outside 0..{V - 1}; use the model's own tokenizer")
        if limit < 1:
            raise InputError(f"max_new of prompt {i} is {limit}; give 1 or more")
        if len(prompt) + limit > room:
            length = f"{len(prompt)} tokens + {limit} new"
            raise InputError(f"prompt {i}: {length} exceed max_position_embeddings {room}; shorten one of them")


class _Batch:
    """The rows being decoded: slots 0..active-1 of the cache, without holes, and one entry a slot in each list here."""

    def __init__(
        self,
        model: Qwen3,
        prompts: Sequence[Sequence[int]],
        seeds: list[int],
        limits: list[int],
        stop_ids: set[int],
        size: int,
        how: Sampling,
        small_batches: bool = False,
        never: Sequence[int] = (),
    ):
        self.model, self.prompts, self.seeds, self.limits = model, prompts, seeds, limits
        self.size, self.active, self.how = size, 0, how
        # Popped from the end: the prompts come in their order.
        self.waiting = list(range(len(prompts)))[::-1]
        self.begun: dict[int, list[int]] = {}  # what a waiting prompt has sampled already
        self.completions: dict[int, Completion] = {}
        self.finished: list[int] = []  # prompts that the last step completed
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        self.ends = self.stops.to(model.head.device)  # the same, for the device to look at
        self.device = model.head.device
        self.never = torch.tensor(never, dtype=torch.int64, device=self.device)
        self.padded = self.device.type == "cpu" and not small_batches
        self.captured = self.device.type == "cuda" and moe.capturable(model)
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        self.block = BLOCK[self.device.type]
        self.block_bytes = KVCache.bytes(model.config, self.block, model.head.dtype, self.device)
        self.most = self._blocks(longest)
        self.room = CPU_ROOM
        if self.device.type == "cuda":
            self.room = int(CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0])
            if size * self.most * self.block_bytes > self.room:  # give back what torch keeps for later; that takes time
                torch.cuda.empty_cache()
                self.room = int(CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0])
        if self.most * self.block_bytes > self.room:
            need, room = self.most * self.block_bytes / 2**30, self.room / 2**30
            raise InputError(
                f"one row of {longest:,} tokens needs {need:.1f} GiB of cache, {room:.1f} are free for it; "
                "lower --max-new or --draw-max-new, or use a server (--backend openai)"
            )
        self._cache: KVCache | None = None  # comes with the first rows
        slots = max(size, ROWS)
        # Per slot: which prompt, its limit, tokens sampled so far, the token to feed next.
        self.row, self.limit, self.count, self.token = torch.zeros(4, slots, dtype=torch.int64)
        self.out = torch.zeros(slots, max(limits), dtype=torch.int64)
        self.uniform = torch.zeros(slots, max(limits), dtype=torch.float64)  # the random number of each token to come
        # What steps read and move on: a slot's token, its position, steps made, and the bits of the random numbers of
        # the next steps; and the tokens that they make.
        most = AHEAD[self.device.type]
        self.state = torch.zeros(3 + most, slots, dtype=torch.int64, device=self.device)
        self.made = torch.zeros(most, slots, dtype=torch.int64, device=self.device)
        self.ahead = most  # steps to issue at once
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # captured steps by rows, and their logits

    # ---------- slots and memory

    @property
    def cache(self) -> KVCache:
        """Keys and values of the active rows; there is none before the first rows."""
        assert self._cache is not None
        return self._cache

    def _blocks(self, positions: int) -> int:
        return -(-positions // self.block)

    def _needs(self, index: int) -> int:
        """Blocks for a waiting prompt: what it holds and one block to go on, or all it can ever have."""
        held, limit = len(self.prompts[index]), self.limits[index]
        return self._blocks(min(held + len(self.begun.get(index, ())) + self.block, held + limit))

    def refill(self) -> None:
        """Move waiting prompts into free slots. A few at a time, not one by one: a forward pass has a fixed price."""
        if not self.waiting or self.active == self.size:
            return
        next_ones = [self._needs(i) for i in self.waiting[: -(self.size - self.active) - 1 : -1]]
        held = [self._blocks(length + 1) for length in self.cache.lens[: self.active].tolist()] if self._cache else []
        n, blocks = admitted(self.room, self.block_bytes, held, next_ones, self.size)
        grow = True
        if self._cache:
            most, length = self.rows, self._blocks(self.cache.length)
            now = len(list(itertools.takewhile(lambda need: need <= length, next_ones[: most - self.active])))
            grow = n > now and (blocks > length or self.active + n >= WORTHWHILE * most)
            n = n if grow else now
        if self.active and n < min(len(self.waiting), max(1, (self.active + n) // 16)):
            return
        if grow:
            self._reshape(blocks)
        rows = [self.waiting.pop() for _ in range(n)]
        slots = list(range(self.active, self.active + n))
        self.row[slots] = torch.tensor(rows)
        seeds = torch.tensor([_signed(self.seeds[i]) for i in rows])
        self.uniform[slots] = uniform(seeds[:, None], torch.arange(self.uniform.shape[1]))
        self.limit[slots] = torch.tensor([self.limits[i] for i in rows])
        self.count[slots] = 0
        texts = {}
        for slot, i in zip(slots, rows, strict=True):
            sampled = self.begun.pop(i, [])
            self.count[slot] = len(sampled)
            self.out[slot, : len(sampled)] = torch.tensor(sampled, dtype=torch.int64)
            # The last token is fed by the first decode step, so that all sampled tokens come from one kind of step.
            ids = [*self.prompts[i], *sampled]
            texts[slot], self.token[slot] = ids[:-1], ids[-1]
        self._prefill(texts)
        self.active += n

    def lengthen(self) -> None:
        """Make the cache longer if the longest row has come to its end; rows without room then wait again."""
        blocks = self._blocks(int(self.cache.lens[: self.active].max()) + 1)
        if blocks * self.block <= self.cache.length:
            return
        rows = min(self.active, self.room // (blocks * self.block_bytes))
        back = least(self.count[: self.active].tolist(), self.active - rows)
        for slot in sorted(back, key=lambda slot: -int(self.row[slot])):  # the prompts come in their order again
            index = int(self.row[slot])
            self.begun[index] = self.out[slot, : self.count[slot]].tolist()
            self.waiting.append(index)
        if back:
            goes_on = torch.ones(self.active, dtype=torch.bool)
            goes_on[back] = False
            self._keep(goes_on)
        self._reshape(blocks)

    def _reshape(self, blocks: int) -> None:
        """A cache with room for `blocks` blocks a row, for as many rows as there are and memory allows."""
        wanted = min(self.size, self.active + len(self.waiting))
        self.rows, blocks = shape(self.room, self.block_bytes, wanted, blocks, self.most)
        # A CPU always computes ROWS rows, and one slot more pads short batches of prompts.
        slots = max(self.rows, ROWS) + 1 if self.padded else self.rows
        length = blocks * self.block
        if self._cache is None:
            weight = self.model.head
            self._cache = KVCache(self.model.config, slots, length, weight.dtype, weight.device)
            return
        if self.graphs:  # they know the old cache's place
            self.graphs.clear()
            torch.cuda.empty_cache()
        self.cache.reshape(slots, length, kept=self.active)

    def _prefill(self, prompts: dict[int, list[int]]) -> None:
        """Read prompts into their slots; equal ones (several draws of one question) are read once and copied."""
        first: dict[tuple[int, ...], int] = {}
        copies = []
        for slot, prompt in prompts.items():
            if first.setdefault(tuple(prompt), slot) != slot:
                copies.append((first[tuple(prompt)], slot))
        queue = [(slot, list(prompt)) for prompt, slot in first.items() if prompt]
        while queue:
            part = [queue.pop()]
            while queue and sum(len(prompt) for _, prompt in part) + len(queue[-1][1]) <= PREFILL_TOKENS:
                part.append(queue.pop())
            spare = self.cache.slots - 1
            if self.padded:
                part.append((spare, [0] * ROWS))
            slots, rows = zip(*part, strict=True)
            ids = torch.tensor([token for row in rows for token in row], device=self.device)
            cu_seqlens = F.pad(torch.tensor([len(row) for row in rows]).cumsum(0), (1, 0))
            self.model(ids, cu_seqlens, self.cache, torch.tensor(slots))
            if self.padded:
                self.cache.clear([spare])
        for source, target in copies:
            self.cache.copy([source], [target])

    def step(self) -> int:
        """Sample the next tokens of each active row and retire those that are done. Returns the number of tokens."""
        n, self.finished = self.active, []
        left = self.limit[:n] - self.count[:n]
        # No row comes past its limit or the end of its slot.
        steps = min(self.ahead, int(left.min()), self.cache.length - int(self.cache.lens[:n].max()))
        tokens = self._decode(steps)
        over = torch.isin(tokens, self.stops) | (tokens < 0)
        over[:, -1] = True
        last = over.int().argmax(dim=1)  # the first of a row's tokens that ends it or is none
        token = tokens.gather(1, last[:, None])[:, 0]
        if (token == NOT_FINITE).any():
            bad = (token == NOT_FINITE).nonzero()[:, 0]
            index = int(self.row[bad[last[bad].argmin()]])
            raise NumericsError(f"prompt {index}: the logits are not finite; look for NaN in the weights", index)
        # A row whose token is not settled goes on from before it.
        taken = last + (token != UNSETTLED)
        slot, column = (torch.arange(steps) < taken[:, None]).nonzero(as_tuple=True)
        self.out[slot, self.count[slot] + column] = tokens[slot, column]
        before = tokens.gather(1, (taken - 1).clamp(min=0)[:, None])[:, 0]
        self.token[:n] = torch.where(taken > 0, before, self.token[:n])
        self.count[:n] += taken
        self.cache.lens[:n] += taken
        stopped = torch.isin(token, self.stops)
        done = stopped | (taken == left)
        if done.any():
            self._retire(done, stopped)
        return int(taken.sum())

    def _decode(self, steps: int) -> Tensor:
        """The next tokens of the active slots, (active, steps) on the CPU, without a look at where a row ends.

        In a row's place for a token may stand NOT_FINITE or, but for the last step, UNSETTLED; what follows it is void.
        """
        n, rows = self.active, self._rows()
        columns = self.count[:rows, None] + torch.arange(steps)
        u = self.uniform[:rows].gather(1, columns.clamp(max=self.uniform.shape[1] - 1))  # spare slots count anything
        given = self.token[:rows], self.cache.lens[:rows], torch.zeros(rows, dtype=torch.int64)
        self.state[: 3 + steps, :rows] = torch.stack((*given, *u.view(torch.int64).T)).to(self.device)
        groups = self.cache.groups(rows, steps)
        for _ in range(steps):
            if rows in self.graphs:
                graph, logits = self.graphs[rows]
                graph.replay()
            else:
                logits = self._step(rows, groups)
                if self.captured:
                    self.graphs[rows] = self._capture(rows, groups)
        tokens = self.made[:steps, :n].cpu().T
        unsettled = tokens == UNSETTLED
        # Where the shortlist does not settle every row, steps ahead are in vain.
        self.ahead = 1 if unsettled.any() else min(2 * self.ahead, len(self.made))
        late = unsettled[:, -1].nonzero()[:, 0]
        if len(late):
            tokens[late, -1] = pick(logits[late.to(self.device)], u[late, -1].to(self.device), self.how).cpu()
        return tokens

    def _rows(self) -> int:
        """How many slots a step computes: the active ones and spare ones that round up their number."""
        if not self.captured:
            return max(self.active, ROWS) if self.padded else self.active
        # Fewer than ROWS take the same time, and would be graphs of their own.
        return min(1 << (max(self.active, ROWS) - 1).bit_length(), self.cache.slots)

    def _step(self, rows: int, groups: list[tuple[int, int]]) -> Tensor:
        """One token more for slots 0..rows-1, from `state` to `state` and `made`. Returns the logits, (picked, V).

        It asks the device nothing. A captured step picks for the spare slots too: their number changes.
        """
        token, position, step = self.state[:3, :rows]
        logits = self.model.logits(self.model.decode(token, position, self.cache, groups))
        picked = rows if self.captured else self.active
        token, step, logits = token[:picked], step[:picked], logits[:picked]
        if len(self.never):
            logits.index_fill_(1, self.never, -math.inf)
        u = self.state[3:, :picked].view(torch.float64).gather(0, step[None])[0]
        new, settled = shortlisted(logits, u, self.how)
        # A row's maximum is not finite if one of its logits is NaN.
        new = new.masked_fill(~settled, UNSETTLED).masked_fill(~logits.amax(dim=-1).isfinite(), NOT_FINITE)
        self.made[:, :picked].scatter_(0, step[None], new[None])
        # A row that has ended, or whose token is open, goes on with the token it has: so its slot, which is another
        # row's next, holds nothing but what tokens make that were read before. A masked NaN would still be one.
        token.copy_(torch.where((new >= 0) & (new[:, None] != self.ends).all(1), new, token))
        position += 1
        step += 1
        return logits

    def _capture(self, rows: int, groups: list[tuple[int, int]]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a CUDA graph and the logits it leaves. All graphs share one pool: only one runs at a time.

        A step was made without a graph just before: libraries have set themselves up.
        """
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._step(rows, groups)
        return graph, logits

    def _retire(self, done: Tensor, stopped: Tensor) -> None:
        """Store finished completions and move the last rows into the holes, so that the active slots stay 0..n-1."""
        ended = done.nonzero()[:, 0].tolist()
        for slot in ended:
            ids, index = self.out[slot, : self.count[slot]].tolist(), int(self.row[slot])
            self.completions[index] = Completion(ids, "stop" if stopped[slot] else "length")
            self.finished.append(index)
        self._keep(~done)

    def _keep(self, goes_on: Tensor) -> None:
        """Empty the active slots where `goes_on`, (active,) bool, is false."""
        alive = goes_on.nonzero()[:, 0]
        self._arrange(alive)
        self.active = len(alive)

    def _arrange(self, alive: Tensor) -> None:
        """Give the rows that go on the slots 0..left-1, the longest in the first group of slots and so on down.

        alive: their slots, int64. Attention is as wide as the longest row of a group, so rows of like length belong
        together. A row that is in its group already stays where it is: few rows are copied.
        """
        left = len(alive)
        group = self.cache.group
        ranked = alive[self.cache.lens[alive].argsort(descending=True, stable=True)]
        stays = (ranked // group == torch.arange(left) // group) & (ranked < left)
        source = ranked[~stays].tolist()
        target = sorted(set(range(left)) - set(ranked[stays].tolist()))  # in each group as many as come into it
        self.cache.copy(source, target)
        for values in (self.row, self.limit, self.count, self.token, self.out, self.uniform):
            values[target] = values[source]
        self.cache.clear(list(range(left, self.active)))
