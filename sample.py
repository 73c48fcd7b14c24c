"""Batched sampling with a KV cache: temperature, top-k, top-p, min-p, stop ids, a limit and a seed for each row.

A completion depends on its prompt, its seed and the sampling settings, never on its neighbours: the random number of a
token is a hash of (seed, position), and on a CPU the arithmetic of a row is the same bit for bit whatever the batch
size, the order of the prompts and the moment its neighbours finish (`ROWS` here, `model.BLOCK` there; it needs layer
sizes in whole vectors of 32, as all real models have). On a GPU the matrix library may round differently for another
batch size; a token then changes when its random number falls that close to the border between two tokens.

Prompts are read into free slots of a static cache, equal ones once; every step then extends all rows by one token, and
a row that ends gives its slot to a waiting prompt. On a GPU a step is captured in a CUDA graph, one for each number of
rows (a power of two) and of cache blocks, and replayed: its thousand small kernels cost one launch.

Left out on purpose: beam search, repetition penalties, log-probabilities of the samples, paged caches.
"""

import dataclasses
import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from model import KVCache, Qwen3

# At least this many rows are decoded at a time, the spare ones unused: below it the CPU's matrix library picks other
# kernels, which round differently.
ROWS = 16
# Candidates looked at when top_k does not bound them; only rows whose choice they do not settle are sorted in full.
SHORTLIST = 128
CACHE_SHARE = 0.8  # of the free GPU memory may become cache; the rest is for logits and activations
PREFILL_TOKENS = 8192  # prompts read in one forward pass, so that a long queue of prompts does not set the peak memory
MASK64 = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Completion:
    """ids: the sampled tokens, with the stop id if one was sampled. finish: "stop", or "length" at the limit."""

    ids: list[int]
    finish: str


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
    if how.temperature == 0:
        return logits.argmax(dim=-1)
    V = logits.shape[-1]
    if how.top_k:
        top, ids = logits.topk(min(how.top_k, V), dim=-1)  # (B, K), sorted
        choice, _ = _invert((top.float() / how.temperature).softmax(dim=-1), u, how)
        return ids.gather(-1, choice[:, None])[:, 0]
    p = (logits.float() / how.temperature).softmax(dim=-1)
    top, ids = p.topk(min(SHORTLIST, V), dim=-1)
    choice, settled = _invert(top, u, how)
    out = ids.gather(-1, choice[:, None])[:, 0]
    if SHORTLIST < V and not settled.all():
        open_rows = (~settled).nonzero()[:, 0]
        top, ids = p[open_rows].sort(dim=-1, descending=True)
        choice, _ = _invert(top, u[open_rows], how)
        out[open_rows] = ids.gather(-1, choice[:, None])[:, 0]
    return out


def _invert(p: Tensor, u: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """Index of the chosen column, and whether columns beyond those given could not have changed it; both (B,).

    p: (B, K) probabilities in falling order, perhaps only the first K of a distribution. u: (B,) in [0, 1).
    """
    p = p.double()
    cumulative = p.cumsum(dim=-1)
    kept = (cumulative - p < how.top_p) & (p >= how.min_p * p[:, :1])  # a prefix: both conditions only ever turn false
    count = kept.sum(dim=-1, keepdim=True)  # (B, 1), at least 1
    mass = cumulative.gather(-1, count - 1)
    if how.top_p == 1 and how.min_p == 0:
        mass = torch.ones_like(mass)  # known without seeing the other columns
        settled = u < cumulative[:, -1]
    else:
        settled = count[:, 0] < p.shape[-1]
    choice = (cumulative <= u[:, None] * mass).sum(dim=-1)
    return torch.minimum(choice, count[:, 0] - 1), settled  # rounding may leave u * mass at the very end


@torch.inference_mode()
def generate(
    model: Qwen3,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    max_new: int | list[int],
    stop_ids: set[int],
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int = 20,
    min_p: float = 0.0,
    batch_size: int = 128,
    progress: Callable[[int], object] | None = None,
    finished: Callable[[int, Completion], object] | None = None,
) -> list[Completion]:
    """Complete every prompt; the result has the prompts' order.

    seeds: one integer a prompt (see `seed_of`); the same prompt and seed give the same text. max_new: most new tokens,
    for all rows or one number a row. batch_size: rows decoded together, fewer where a GPU has no room for their cache;
    a row that finishes makes room for a waiting prompt. progress: called after each step with the number of new
    tokens, for example a tqdm bar's `update`.
    finished: called with (index, completion) as soon as a row ends, in whatever order they do.
    Raises InputError for settings out of range and for prompts that are empty or too long for the model.
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
    with model.stacked():
        batch = _Batch(model, prompts, seeds, limits, stop_ids, min(batch_size, len(prompts)))
        while batch.active or batch.waiting:
            batch.refill()
            new = batch.step(how)
            if progress is not None:
                progress(new)
            if finished is not None:
                for index in batch.finished:
                    finished(index, batch.completions[index])
    return batch.completions


def _check_prompts(model: Qwen3, prompts: list[list[int]], limits: list[int]) -> None:
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
        prompts: list[list[int]],
        seeds: list[int],
        limits: list[int],
        stop_ids: set[int],
        size: int,
    ):
        self.model, self.prompts, self.seeds, self.limits = model, prompts, seeds, limits
        self.size, self.active = size, 0
        # Popped from the end: the prompts come in their order.
        self.waiting = list(range(len(prompts)))[::-1]
        self.completions: list[Completion] = [None] * len(prompts)  # type: ignore[list-item]
        self.finished: list[int] = []  # prompts that the last step completed
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        weight = model.head
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        if weight.is_cuda:
            slot = KVCache.bytes(model.config, longest, weight.dtype, weight.device)
            room = int(CACHE_SHARE * torch.cuda.mem_get_info(weight.device)[0]) // slot - 1  # without the spare one
            if room < ROWS:
                need = f"{ROWS + 1} rows of {longest} tokens need {(ROWS + 1) * slot / 2**30:.1f} GiB of cache"
                raise InputError(
                    f"{need}, which this GPU has not free; lower max_new or use a server (--backend openai)"
                )
            self.size = size = min(size, room)
        slots = max(size, ROWS)
        # One slot more than rows: prefill pads short batches of prompts with a row that ends there.
        self.cache = KVCache(model.config, slots + 1, longest, weight.dtype, weight.device)
        self.device, self.spare = weight.device, slots
        # Per slot: which prompt, its limit, tokens sampled so far, the token to feed next.
        self.row, self.limit, self.count, self.token = torch.zeros(4, slots, dtype=torch.int64)
        self.out = torch.zeros(slots, max(limits), dtype=torch.int64)
        self.uniform = torch.zeros(slots, max(limits), dtype=torch.float64)  # the random number of each token to come
        # On CUDA: the captured steps by (rows, width), and what they read.
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.inputs = torch.zeros(2, slots, dtype=torch.int64, device=self.device)

    def refill(self) -> None:
        """Move waiting prompts into free slots. A few at a time, not one by one: a forward pass has a fixed price."""
        free = self.size - self.active
        if not self.waiting or (self.active and free < max(1, self.size // 16)):
            return
        rows = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        slots = list(range(self.active, self.active + len(rows)))
        self.row[slots] = torch.tensor(rows)
        seeds = torch.tensor([_signed(self.seeds[i]) for i in rows])
        self.uniform[slots] = uniform(seeds[:, None], torch.arange(self.uniform.shape[1]))
        self.limit[slots] = torch.tensor([self.limits[i] for i in rows])
        self.count[slots] = 0
        # The last prompt token is fed by the first decode step, so that all sampled tokens come from one kind of step.
        self.token[slots] = torch.tensor([self.prompts[i][-1] for i in rows])
        self._prefill({slot: self.prompts[i][:-1] for slot, i in zip(slots, rows, strict=True)})
        self.active += len(rows)

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
            part.append((self.spare, [0] * min(ROWS, self.cache.k.shape[3])))
            slots, rows = zip(*part, strict=True)
            ids = torch.tensor([token for row in rows for token in row], device=self.device)
            cu_seqlens = F.pad(torch.tensor([len(row) for row in rows]).cumsum(0), (1, 0))
            self.model(ids, cu_seqlens, self.cache, torch.tensor(slots))
            self.cache.clear([self.spare])
        for source, target in copies:
            self.cache.copy([source], [target])

    def step(self, how: Sampling) -> int:
        """Sample one token for each active row and retire those that are done. Returns the number of tokens."""
        n, self.finished = self.active, []
        logits = self._logits()[:n]
        self.cache.lens[:n] += 1
        u = self.uniform[torch.arange(n), self.count[:n]].to(self.device)
        token = pick(logits, u, how).cpu()
        self.out[torch.arange(n), self.count[:n]] = token
        self.token[:n] = token
        self.count[:n] += 1
        stopped = torch.isin(token, self.stops)
        done = stopped | (self.count[:n] >= self.limit[:n])
        if done.any():
            self._retire(done, stopped)
        return n

    def _logits(self) -> Tensor:
        """(rows, V) logits of the next token of the active slots, and of the spare ones that round up their number."""
        rows = max(self.active, ROWS)
        if self.device.type != "cuda":
            groups = self.cache.groups(rows)
            return self._forward(self.token[:rows].to(self.device), self.cache.lens[:rows].to(self.device), groups)
        rows = min(1 << (rows - 1).bit_length(), len(self.token))
        groups = self.cache.groups(rows)
        self.inputs.copy_(torch.stack((self.token, self.cache.lens[: len(self.token)])))
        key = (rows, groups[0][1])
        if key not in self.graphs:
            self.graphs[key] = self._capture(rows, groups)
        graph, logits = self.graphs[key]
        graph.replay()
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, groups: list[tuple[int, int]]) -> Tensor:
        return self.model.logits(self.model.decode(ids, positions, self.cache, groups))

    def _capture(self, rows: int, groups: list[tuple[int, int]]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a CUDA graph and the logits it leaves. All graphs share one pool: only one runs at a time."""
        ids, positions = self.inputs[:, :rows]
        # Once outside the graph, so that libraries set themselves up; it writes the keys and values that replay writes.
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            self._forward(ids, positions, groups)
        torch.cuda.current_stream().wait_stream(warm)
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._forward(ids, positions, groups)
        return graph, logits

    def _retire(self, done: Tensor, stopped: Tensor) -> None:
        """Store finished completions and move the last rows into the holes, so that the active slots stay 0..n-1."""
        ended = done.nonzero()[:, 0].tolist()
        for slot in ended:
            ids, index = self.out[slot, : self.count[slot]].tolist(), int(self.row[slot])
            self.completions[index] = Completion(ids, "stop" if stopped[slot] else "length")
            self.finished.append(index)
        self._arrange((~done).nonzero()[:, 0])
        self.active -= len(ended)

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
