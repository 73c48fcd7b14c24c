"""Mixture of experts: the block that stands for the MLP in some or all layers of a Qwen3-MoE.

    p = softmax(W_r x)                          the router, in fp32; W_r is (n, E)
    y = sum over the k likeliest experts e of  p_e / (their sum, if norm_topk_prob)  *  SwiGLU_e(x)

Letters: N tokens, E hidden size, n experts, k experts a token, I size of an expert, M rows of the products.

Every token goes to its k experts, however many others want the same: there is no capacity and no token is dropped. The
N k pairs of a token and an expert are sorted by expert, so that each expert multiplies one run of rows, all experts in
one grouped product: torch's `grouped_mm`, one kernel on a GPU. `product_by_loop` is the same as one product an expert.

A token's result does not depend on the other tokens of its batch. Its own sum over the k experts goes in the order of
its probabilities, not in that of the sorted rows, and is taken in fp32. On a CPU it is the same bit for bit in passes
of ROWS tokens or more: a group of fewer rows is filled up with rows that count nothing, since for a few rows the CPU's
matrix library picks other kernels, which round differently (sample.ROWS does the same for router and other layers).

The tensors have the names and shapes of transformers 5, where the experts of a layer are stacked. Checkpoints mostly
have one tensor an expert and matrix; `parts` says which slice of a stacked tensor each of them is, and `apart` writes
them so.

Experts and router stay frozen in training; adapters are on attention (lora.py says why).

`tap` of a block sees and may change the chosen experts: `recorded` and `imposed` use it to compare the routes of the
policy with those of the reference, which is what `Load` counts.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from common.model_config import MixtureConfig, ModelConfig
from kernels.swiglu import swiglu

if TYPE_CHECKING:  # they need libraries that a machine with a GPU and torch may lack
    from common.ranks import Ranks
    from data import Batch

ROWS = 16  # rows an expert multiplies at least on a CPU; see above
STACKED = ("experts.gate_up_proj", "experts.down_proj")
PROBED = 8  # rows of a step whose routes are compared, policy against reference
EVERY = 10  # steps between two such comparisons: two passes without a gradient, under one hundredth of the time


def draw(weight: Tensor) -> None:
    """Hugging Face's initial weights: normal, deviation 0.02. On the meta device nothing is drawn: that would import
    torch's compiler, two seconds for nothing."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=0.02)


class Router(nn.Module):
    """How probable each expert is. The weight has Hugging Face's name, `mlp.gate.weight`."""

    def __init__(self, experts: int, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        draw(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, E) to (N, n) probabilities in fp32."""
        return F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)


class Experts(nn.Module):
    """The stacked weights: gate_up_proj (n, 2 I, E), gate before up; down_proj (n, E, I)."""

    def __init__(self, experts: int, hidden: int, inner: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        for weight in (self.gate_up_proj, self.down_proj):
            draw(weight)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor, forget: Callable[..., None]) -> Tensor:
        """x: (N, E). weights, chosen: (N, k), what each chosen expert counts, and its number. Returns (N, E).

        forget: is told what need not be kept for the backward pass (common/recompute.py).
        """
        N, k = chosen.shape
        source, place, ends = sorted_rows(chosen, len(self.down_proj))
        shares = weights.new_zeros(len(source)).index_copy(0, place, weights.flatten())  # a row that fills up counts 0
        gate_up = product(_Spread.apply(x, source, place, k), self.gate_up_proj, ends)  # (M, 2 I)
        h = swiglu(gate_up)  # (M, I)
        forget(h, swiglu, gate_up)
        # The share is multiplied here and not after the last product: I numbers a row are kept for the backward pass
        # instead of E. The result is the same but for rounding, since the last product is linear.
        h = h * shares.to(h.dtype)[:, None]
        return _Gathered.apply(product(h, self.down_proj, ends), source, place, k)


class MoE(nn.Module):
    """Router and experts of a layer, under Hugging Face's names."""

    def __init__(self, config: MixtureConfig, hidden: int):
        super().__init__()
        self.k, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Router(config.num_experts, hidden)
        self.experts = Experts(config.num_experts, hidden, config.moe_intermediate_size)
        self.tap: Tap | None = None

    def forward(self, x: Tensor, rows: Any = None) -> Tensor:
        """(N, E) to (N, E). rows: model.Rows, which is asked for its `forget` alone."""
        p = self.gate(x)
        chosen = p.topk(self.k, dim=-1).indices  # (N, k), likeliest first
        if self.tap is not None:
            chosen = self.tap(chosen)
        weights = p.gather(-1, chosen)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        # Rounded to the model's dtype, as transformers does.
        return self.experts(x, weights.to(x.dtype), chosen, rows.forget if rows else _kept)


def _kept(*_: Any) -> None:
    """Forget nothing."""


# ---------- the grouped product


def sorted_rows(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the (token, expert) pairs of `chosen`, (N, k), stand among M rows sorted by expert.

    Returns source, (M,) int64: the token of each row; place, (N k,) int64: the row of each pair; ends, (n,) int32: one
    past each expert's last row. M is N k; on a CPU there are also rows that only fill up, and their token is 0.

    Two tokens, the first to experts 1 and 0, the second to 1 and 2, on a GPU: source [0, 0, 1, 1], place [1, 0, 2, 3],
    ends [1, 3, 4].
    """
    N, k = chosen.shape
    found, order = chosen.flatten().sort(stable=True)  # each (N k,)
    ends = torch.searchsorted(found, torch.arange(experts, device=chosen.device), right=True)
    row = torch.arange(N * k, device=chosen.device)
    M = N * k
    if chosen.device.type == "cpu":
        counts = ends.diff(prepend=ends.new_zeros(1))
        filled = torch.where(counts > 0, counts.clamp(min=ROWS), 0)
        row = row + (filled - counts).cumsum(0).sub(filled - counts)[found]  # after what fills up the experts before it
        ends = filled.cumsum(0)
        M = int(ends[-1])
    source = order.new_zeros(M).index_copy(0, row, order // k)
    place = torch.empty_like(order).index_copy(0, order, row)
    return source, place, ends.int()


def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each run of rows times its expert's matrix: x (M, a), weight (n, b, a), ends (n,) int32, to (M, b)."""
    if not grouped_runs(x, weight):
        return product_by_loop(x, weight, ends)
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def grouped_runs(x: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_mm` takes these: it is in torch from 2.10 on, and wants rows of whole 16 bytes."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def product_by_loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`product` as one product an expert: for other dtypes and sizes, and to check the other one."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, weight[e]) for e, rows in enumerate(x.split(counts))])


def capturable(model: nn.Module) -> bool:
    """Whether a CUDA graph can hold a step of the model: no product may ask the device how long its groups are.

    torch has one such kernel: bf16 on devices of compute capability 9.0 and 10.0. On others `grouped_mm` is a loop.
    """
    weights = [block.experts.down_proj for block in blocks(model)]
    if not weights:
        return True
    fast = weights[0].is_cuda and torch.cuda.get_device_capability(weights[0].device) in ((9, 0), (10, 0))
    return fast and weights[0].dtype == torch.bfloat16 and all(grouped_runs(w, w) for w in weights)


class _Spread(torch.autograd.Function):
    """x (N, E) to the M sorted rows; backward, the k rows of each token are added in fp32 and in a fixed order.

    Autograd's own backward of an index adds by atomics on a GPU: in any order, and rounding to bf16 every time.
    """

    @staticmethod
    def forward(ctx, x, source, place, k):
        ctx.save_for_backward(place)
        ctx.k = k
        return x.index_select(0, source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (place,) = ctx.saved_tensors
        return _added(g, place, ctx.k), None, None, None


class _Gathered(torch.autograd.Function):
    """The transpose: rows (M, E) to (N, E), each token the sum of its k rows. Rows that fill up have no effect: they
    are not read, and what flows back into them is multiplied by their share, 0."""

    @staticmethod
    def forward(ctx, rows, source, place, k):
        ctx.save_for_backward(source)
        return _added(rows, place, k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (source,) = ctx.saved_tensors
        return g.index_select(0, source), None, None, None


def _added(rows: Tensor, place: Tensor, k: int) -> Tensor:
    """(M, E) to (N, E): rows place[i k : (i + 1) k] added, in fp32 if they have fewer bits."""
    return rows.index_select(0, place).unflatten(0, (-1, k)).sum(1)


# ---------- checkpoints


def parts(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int | slice, ...]]]:
    """Name in a checkpoint of one tensor an expert -> (name of the stacked tensor, its slice).

    >>> parts({"mlp.experts.gate_up_proj": (1, 6, 4)})["mlp.experts.0.up_proj.weight"]
    ('mlp.experts.gate_up_proj', (0, slice(3, 6, None)))
    """
    found: dict[str, tuple[str, tuple[int | slice, ...]]] = {}
    for name, shape in shapes.items():
        if not name.endswith(STACKED):
            continue
        before, _, kind = name.rpartition(".")
        half = shape[1] // 2
        matrices = {"down_proj": slice(None)}
        if kind == "gate_up_proj":
            matrices = {"gate_proj": slice(0, half), "up_proj": slice(half, 2 * half)}
        found |= {f"{before}.{e}.{m}.weight": (name, (e, at)) for e in range(shape[0]) for m, at in matrices.items()}
    return found


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with one an expert and matrix, as published checkpoints have them; views of the stacked ones."""
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith(STACKED)}
    slices = parts({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return whole | {part: tensors[name][at] for part, (name, at) in slices.items()}


# ---------- routes


class Tap(Protocol):
    """Sees the experts (N, k) that a block chose, and says which it uses."""

    def __call__(self, chosen: Tensor) -> Tensor: ...


def blocks(model: nn.Module) -> list[MoE]:
    """The mixture blocks of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, MoE)]


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every block adds the experts it chose, (N, k), to the list: a forward pass, a tensor for each block."""
    seen: list[Tensor] = []

    def tap(chosen: Tensor) -> Tensor:
        seen.append(chosen)
        return chosen

    with _tapped(model, [tap] * len(blocks(model))):
        yield seen


@contextlib.contextmanager
def imposed(model: nn.Module, routes: list[Tensor]) -> Iterator[None]:
    """Inside, the blocks use these experts, a tensor for each block; how much each counts is still the model's own."""
    with _tapped(model, [lambda _, given=given: given for given in routes]):
        yield


@contextlib.contextmanager
def _tapped(model: nn.Module, taps: list[Any]) -> Iterator[None]:
    try:
        for block, tap in zip(blocks(model), taps, strict=True):
            block.tap = tap
        yield
    finally:
        for block in blocks(model):
            block.tap = None


def changed(policy: Tensor, reference: Tensor) -> Tensor:
    """(N,) how many of a token's k experts are not among the reference's; both (N, k), in any order."""
    return (policy[:, :, None] != reference[:, None, :]).all(-1).sum(-1)


def is_due(config: ModelConfig, number: int, total: int) -> bool:
    """Whether step `number`, from 0, of `total` looks at the routes: every EVERY-th and the last."""
    return config.moe is not None and (number % EVERY == 0 or number == total - 1)


@torch.no_grad()
def load_metrics(model: nn.Module, batches: "Iterable[tuple[Batch, int]]", ranks: "Ranks") -> dict[str, Any]:
    """What the routers do with the tokens of some rows, policy against reference, over all ranks.

    batches: packed rows, and how many of them count: all, or 0. Every rank must give as many. Returns
      router/tokens                        tokens looked at
      router/changed                       share of them with another expert than the reference's in some layer
      router/changed_choices               share of all choices (token, layer, one of k) that differ
      router/share, router/share_reference share of the tokens that goes to each expert, mean over the layers
      router/busiest, .._reference         the most that one expert of one layer gets, times what an even load would be
    """
    L, (n, _), k = len(blocks(model)), blocks(model)[0].gate.weight.shape, blocks(model)[0].k
    sums = torch.zeros(3 + 2 * L * n, dtype=torch.float64, device=ranks.device)  # tokens, changed, choices, counts
    for batch, real in batches:
        with recorded(model) as policy:
            model(batch.ids, batch.cu_seqlens)
        with recorded(model) as reference, lora.disabled(model):
            model(batch.ids, batch.cu_seqlens)
        if real:
            differ = torch.stack([changed(p, q) for p, q in zip(policy, reference, strict=True)])  # (L, N)
            sums[:3] += torch.stack([torch.tensor(len(batch.ids)).to(differ), differ.any(0).sum(), differ.sum()])
            sums[3:] += torch.cat([chosen.flatten().bincount(minlength=n) for chosen in (*policy, *reference)])
    tokens, others, choices = ranks.sum(sums)[:3].tolist()
    shares = sums[3:].view(2, L, n) / tokens
    found = {"router/tokens": tokens, "router/changed": others / tokens}
    found |= {"router/changed_choices": choices / (tokens * L * k)}
    for suffix, share in zip(("", "_reference"), shares, strict=True):
        found[f"router/busiest{suffix}"] = float(share.max() * n / k)
        found[f"router/share{suffix}"] = [round(x, 4) for x in share.mean(0).tolist()]
    return found
