"""Low-rank adapters: W x + (alpha / r) B A x with W frozen. On, off, merged, and on disk in PEFT's format.

With the adapters off the model is the base model bit for bit, so one copy of the weights is both the policy and the
reference policy. The file format is PEFT's, and in fp32 its arithmetic bit for bit. A bf16 or fp16 model computes in
its own dtype; A and B are kept, and their gradients made and summed, in fp32. PEFT casts every input to fp32 instead,
or under autocast rounds each step and each gradient.

A mixture of experts has adapters on attention alone; experts and router stay frozen. Each expert sees k of n tokens, so
its adapter would learn from a fraction of them; all of them together would be many: at rank 32 on Qwen3-30B-A3B 1.66
billion numbers and 26.6 GB with gradient and moments, where attention takes 26.7 million and 0.4 GB (docs/moe.md). A
trained router would change routes directly, and with them the log-ratio in jumps. And PEFT has no common format for
adapters on stacked experts.

Left out on purpose: dropout, rsLoRA, DoRA, trained biases, adapters on embeddings or head, several adapters at once.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from common.errors import InputError
from common.files import atomic_write, read_json, write_json
from common.weights import read_tensors

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's wrappers, which its tensor names keep

# What becomes of each field of adapter_config.json, as PEFT 0.21 writes it: honoured are r, lora_alpha, target_modules;
# these do not touch the forward pass of a saved adapter; every other one that PEFT knows, or will know, switches on
# something this file does not compute and is refused when it is not empty.
INERT = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "bias",
    "init_lora_weights",
    "inference_mode",
    "revision",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "eva_config",  # how A was drawn
    "ensure_weight_tying",  # of embeddings and head, on which there is no adapter here
}
# Ways to draw A and B that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change them.
DRAWN = (True, False, "gaussian", "eva", "orthogonal")


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter. `weight` and `bias` are the base layer's own and keep their names."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.r, self.alpha, self.enabled = r, alpha, True
        A = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # U(-1/sqrt(in), 1/sqrt(in)), as PEFT
        self.lora_A = nn.Parameter(A.to(base.weight.device))  # (r, in) fp32
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=base.weight.device))  # fp32
        # Inside `rounded` one dict for all layers: what `stacked` made of a group of layers, under its first.
        self.made: dict[LoRALinear, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        if x.dtype != self.lora_A.dtype:
            return adapted(x, [self], self.weight, self.bias)
        # PEFT's order of operations, so that an fp32 model gives its bits.
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.alpha / self.r)


def joint(x: Tensor, linears: list[nn.Module], weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `linears` make of the x (N, in) they all read, side by side: (N, sum of out), by one product.

    weight, bias: theirs, stacked. Adapters are on all of them or on none.
    """
    adapters = [m for m in linears if isinstance(m, LoRALinear) and m.enabled]
    if not adapters:
        return F.linear(x, weight, bias)
    assert len(adapters) == len(linears), "joint layers have all of them an adapter or none"
    return adapted(x, adapters, weight, bias)


def backward_only(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` for a backward pass alone: nobody reads the result, so in half precision no product of W is made."""
    if isinstance(layer, LoRALinear) and layer.enabled and x.dtype != layer.lora_A.dtype:
        return adapted(x, [layer], layer.weight, layer.bias, unread=True)
    return cast(Tensor, layer(x))


def adapted(x: Tensor, layers: list[LoRALinear], weight: Tensor, bias: Tensor | None, unread: bool = False) -> Tensor:
    """W x + s B A x of layers that read one x (..., in), in x's dtype; weight (out, in), bias: theirs, stacked.

    unread: no product of W is made, the result holds anything; its gradients are right.
    """
    first = layers[0]
    if first.made is None or torch.compiler.is_compiling():
        A, B = stacked(layers, x.dtype)
    else:
        A, B = first.made[first] = first.made.get(first) or stacked(layers, x.dtype)
    masters = [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers]
    y = _LowRank.apply(x.reshape(-1, x.shape[-1]), weight, bias, A, B, first.alpha / first.r, unread, *masters)
    return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def stacked(layers: list[LoRALinear], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Layers that read one input as one adapter of rank k r: A (k r, in), theirs below each other; s B (out, k r),
    theirs along a diagonal. Rounded once, after the scale."""
    A = torch.cat([layer.lora_A for layer in layers])
    B = torch.block_diag(*(layer.lora_B for layer in layers)) * (layers[0].alpha / layers[0].r)
    return A.to(dtype), B.to(dtype)


class _LowRank(torch.autograd.Function):
    """y = W x + s B (A x) with W frozen, computed in x's dtype from `stacked` A and s B; gradients go to the masters.

    Kept for the backward pass: x, once for all layers that read it, and A x (k r numbers a token). The second product
    starts its fp32 accumulator at W x, so the sum costs no pass of its own, and with B = 0 it adds exact zeros: y is
    then W x bit for bit, whichever kernel BLAS takes for either, and the first log-ratio of training is exactly 0. In
    the other order W x would be made by another kernel than the reference's, and could round differently.

    In half precision y is rounded twice: W x, and the sum. PEFT under autocast rounds these two and both low-rank
    products, and is no nearer to fp64 (docs/speed.md, "One rounding or two", with what one rounding would cost).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, unread, *masters):
        low = x @ A.T  # (N, k r)
        ctx.save_for_backward(x, low, weight, A, B)
        ctx.scale, ctx.sizes = scale, [len(m) for m in masters[len(masters) // 2 :]]  # of the outputs
        if unread:
            return x.new_empty(len(x), len(weight))
        return F.linear(x, weight, bias).addmm_(low, B.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, low, weight, A, B = ctx.saved_tensors
        r = A.shape[0] // len(ctx.sizes)
        g_low = g @ B  # (N, k r)
        g_x = torch.addmm(g_low @ A, g, weight) if ctx.needs_input_grad[0] else None
        blocks = enumerate(_product_fp32(g, low).split(ctx.sizes))  # (out, k r): only the diagonal is of use
        of_B = [block[:, i * r : (i + 1) * r] * ctx.scale for i, block in blocks]
        return g_x, None, None, None, None, None, None, *_product_fp32(g_low, x).split(r), *of_B


def _product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b of a (N, m) and b (N, n), accumulated and returned in fp32: a gradient of the masters."""
    if a.is_cuda:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.float().T @ b.float()  # CPU BLAS has no bf16 @ bf16 -> fp32


def add(
    model: nn.Module, r: int, alpha: float, targets: tuple[str, ...] | None = None, seed: int = 0
) -> list[nn.Parameter]:
    """Freeze `model` and put an adapter on every linear layer whose name ends in one of `targets` (None: `targets_of`).

    The new model computes what the old one did (B = 0). A depends on `seed` only, not on the device or the rank.
    Returns the trained parameters A, B of each layer in turn, in the order of `state`. Raises InputError when a target
    names no linear layer.
    """
    assert r > 0 and alpha > 0, (r, alpha)
    assert not _layers(model), "the model has adapters already"
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = targets or targets_of(getattr(model, "config", None))
    for target in targets:
        if not any(_matches(name, target) for name in linears):
            raise InputError(f"target_modules: {target!r} names no linear layer of this model; known: {_ends(linears)}")
    largest = max(max(m.in_features, m.out_features) for m in linears.values())
    if r > largest:  # and would take more memory than the model itself
        raise InputError(f"r is {r:,} and the largest layer has {largest:,} rows or columns; give a smaller --lora-r")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        if any(_matches(name, target) for target in targets):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(linear, r, alpha, generator))
    return list(state(model).values())


def targets_of(config: Any) -> tuple[str, ...]:
    """The layers of a model that get adapters: all linear ones, or attention where there are experts."""
    return ATTENTION if getattr(config, "moe", None) else TARGETS


def state(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters under PEFT's names, layer after layer, A before B."""
    tensors = {}
    for name, layer in _layers(model).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    return tensors


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside this block the model is its base, bit for bit: the reference policy."""
    layers = _layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextlib.contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """Inside this block A and B are stacked and rounded once and not in every pass; they must not change meanwhile."""
    layers = _layers(model).values()
    made: dict[LoRALinear, tuple[Tensor, Tensor]] = {}
    try:
        for layer in layers:
            layer.made = made
        yield
    finally:
        for layer in layers:
            layer.made = None


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold the adapters into the base weights (product and sum in fp32, one rounding) and leave plain linear layers."""
    for name, layer in _layers(model).items():
        layer.weight.copy_(folded(layer.weight, layer.lora_A, layer.lora_B, layer.alpha / layer.r))
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


def folded(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale B A, (out, in) fp32. weight: (out, in) in any dtype; A: (r, in); B: (out, r)."""
    return weight.float() + B.float() @ A.float() * scale


def save(model: nn.Module, path: str | Path, base_name: str, revision: str = "") -> None:
    """Write adapter_config.json and then adapter_model.safetensors (fp32) into folder `path`, each atomically.

    base_name, revision: the base model's Hub id and commit, or its path and "", for whoever loads the adapter.
    """
    layers = _layers(model)
    assert layers, "the model has no adapters"
    (r, alpha), *others = {(layer.r, layer.alpha) for layer in layers.values()}
    assert not others, others
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision or None,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": _ends(layers),
    }
    tensors = {name: p.detach().to("cpu", torch.float32).contiguous() for name, p in state(model).items()}
    write_json(Path(path) / CONFIG, config)
    with atomic_write(Path(path) / WEIGHTS, "wb") as f:
        f.write(safetensors_bytes(tensors, metadata={"format": "pt"}))


@torch.no_grad()
def load(model: nn.Module, path: str | Path) -> list[nn.Parameter]:
    """Put the adapter of folder `path`, ours or PEFT's, on a model without adapters. Returns its parameters.

    Raises InputError when the config asks for what is left out here, and one that names the missing, extra and
    misshapen tensors; the model is then of no further use.
    """
    path = Path(path)
    config = read_config(path / CONFIG)
    add(model, config["r"], config["lora_alpha"], tuple(config["target_modules"]))
    parameters = state(model)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    tensors = read_tensors([path / WEIGHTS], shapes, {}, torch.float32, "cpu")
    for name, p in parameters.items():
        p.copy_(tensors[name])
    return list(parameters.values())


def read_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json that this file computes exactly. Raises InputError naming the field and its value."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold one JSON object; save the adapter again")
    required = ("peft_type", "r", "lora_alpha", "target_modules")
    missing = [name for name in required if name not in config]
    if missing:
        raise InputError(f"{path}: field {missing[0]} is missing; needed: {', '.join(required)}")
    targets = config["target_modules"]
    rules = {  # field -> (is the value supported, what is)
        "peft_type": (config["peft_type"] == "LORA", "'LORA'"),
        "r": (type(config["r"]) is int and config["r"] > 0, "a positive integer"),
        "lora_alpha": (type(config["lora_alpha"]) in (int, float) and config["lora_alpha"] > 0, "a positive number"),
        "target_modules": (
            isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets),
            "a list of module names",
        ),
        "bias": (config.get("bias", "none") == "none", "'none'"),
        "init_lora_weights": (config.get("init_lora_weights", True) in DRAWN, f"one of {DRAWN}"),
    }
    for name, (good, supported) in rules.items():
        if not good:
            raise InputError(f"{path}: {name} is {config[name]!r}; supported: {supported}")
    for name in sorted(config.keys() - INERT):
        if config[name] or config[name] == 0 and config[name] is not False:  # layers_to_transform 0 is the first layer
            raise InputError(f"{path}: {name} is {config[name]!r}; not supported, train the adapter without it")
    return config


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _matches(name: str, target: str) -> bool:
    """PEFT's rule: the whole path or its end."""
    return name == target or name.endswith("." + target)


def _ends(names: Any) -> list[str]:
    """The distinct last parts of module paths, sorted."""
    return sorted({name.rpartition(".")[2] for name in names})
