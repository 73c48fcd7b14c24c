"""Qwen3, Qwen2 and Llama 3 from scratch: packed rows in, hidden states out, with a KV cache for decoding.

The three are one model with three explicit differences, fields of `Config`: queries and keys are normalised (Qwen3),
the q, k and v projections have a bias (Qwen2), RoPE's slow rotations are slowed further (`rope_scaling`, Llama 3.1).
The class keeps the name of the first of them.

Letters: B rows, T tokens of one row, N tokens of all rows of a packed batch, E hidden size, V vocabulary, L layers,
H query heads, G key/value heads, D head size.

Parameters carry Hugging Face's names, so a checkpoint loads without a rename table. Rows are packed one after the
other without padding; each row sees only itself. The head is not part of `forward`: training and sampling apply it to
the few positions they need, and the (N, V) logits never exist.

Weights are read from memory-mapped files one tensor at a time, straight into their place and dtype on the device: the
host never holds more than about one shard besides what it computes with.

Left out on purpose: sliding windows, other RoPE scalings, mixture of experts, biases elsewhere, dropout, quantised
weights, models that bring their own code. A config that asks for one of them is refused, never approximated.
"""

import contextlib
import dataclasses
import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import InputError, atomic_write, read_json, write_json
from hub import member

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

# model_type -> (the class that transformers calls it, qk_norm, qkv_bias)
ARCHITECTURES = {
    "qwen3": ("Qwen3ForCausalLM", True, False),
    "qwen2": ("Qwen2ForCausalLM", False, True),
    "llama": ("LlamaForCausalLM", False, False),
}
# Other fields of config.json that change the computation. Absent means the value here, transformers' own default for
# all three; any other value is an architecture this file does not compute.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "auto_map": None,  # names Python files of the checkpoint, which are never run
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Attention over the cache reads whole blocks of positions, the unused ones masked: so the CPU kernel sums in the same
# order however long the longest row of the batch is, and a row's result does not depend on its neighbours; and a CUDA
# graph is needed for each number of blocks only. A decode step attends in groups of neighbouring slots, each only as
# wide as its own longest row: a caller that keeps slots of similar length together saves the rest.
BLOCK = {"cpu": 64, "cuda": 512}  # positions
GROUP = {"cpu": 32, "cuda": 1 << 30}  # slots
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's "llama3" scaling, under Hugging Face's names; see `frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # positions


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model, under the field names of Hugging Face's config.json where it has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_id: int | tuple[int, ...]
    model_type: str = "qwen3"
    qk_norm: bool = True  # RMS norm of each query and key head
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None

    @classmethod
    def from_json(cls, path: str | Path) -> "Config":
        """Read a Hugging Face config.json. Raises InputError naming the field, its value and what is supported.

        Shapes must be written out, with one exception: Qwen2 and Llama configs may lack head_dim, which is then
        hidden_size // num_attention_heads, as in transformers.
        """
        raw = read_json(path)
        kind = raw.get("model_type") if isinstance(raw, dict) else raw
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            raise InputError(f"{path}: model_type is {kind!r}; supported: {', '.join(map(repr, ARCHITECTURES))}")
        name, qk_norm, qkv_bias = ARCHITECTURES[kind]
        if raw.get("architectures") not in (None, [name]):
            raise InputError(f"{path}: architectures is {raw['architectures']!r}; supported: {[name]!r}")
        for field, value in ONLY.items():
            if raw.get(field, value) != value:
                raise InputError(f"{path}: {field} is {raw[field]!r}; supported: {value!r}")
        if set(raw.get("layer_types") or ["full_attention"]) != {"full_attention"}:
            raise InputError(
                f"{path}: layer_types is {raw['layer_types']!r}; supported: 'full_attention' in each layer"
            )
        theta, scaling = _rope(path, raw)
        fields = {**raw, "rope_theta": theta, "rope_scaling": scaling, "qk_norm": qk_norm, "qkv_bias": qkv_bias}
        if fields.get("head_dim") is None and kind != "qwen3":
            fields["head_dim"] = _head_dim(path, raw)
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in fields]
        if missing:
            raise InputError(f"{path}: field {', '.join(missing)} is missing; every shape must be written out")
        config = cls(**{name: fields[name] for name in names})
        config.check(path)
        return config

    def check(self, where: str | Path) -> None:
        """Raise InputError, its message starting with `where`, unless the values make a computable model."""
        for name in SIZES:
            if not _is_size(getattr(self, name)):
                raise InputError(f"{where}: {name} is {getattr(self, name)!r}; supported: a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            if not _is_positive(getattr(self, name)):
                raise InputError(f"{where}: {name} is {getattr(self, name)!r}; supported: a positive number")
        if type(self.tie_word_embeddings) is not bool:
            raise InputError(f"{where}: tie_word_embeddings is {self.tie_word_embeddings!r}; supported: true, false")
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        if not ends or not all(type(i) is int and 0 <= i < self.vocab_size for i in ends):
            shown = list(ends) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
            raise InputError(f"{where}: eos_token_id is {shown!r}; supported: an id below vocab_size, or several")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} over {self.num_key_value_heads}"
            raise InputError(f"{where}: num_attention_heads over num_key_value_heads is {heads}; supported: a multiple")
        if self.head_dim % 2:
            raise InputError(f"{where}: head_dim is {self.head_dim}; supported: an even number (RoPE turns pairs)")

    def to_json(self, dtype: torch.dtype) -> dict[str, Any]:
        """The config.json from which transformers builds the same model."""
        name, *implied = ARCHITECTURES[self.model_type]
        assert implied == [self.qk_norm, self.qkv_bias], (self, "model_type says which of the two there are")
        fields = dataclasses.asdict(self)
        del fields["qk_norm"], fields["qkv_bias"]
        theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling")
        rope = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling}
        return {
            "architectures": [name],
            **fields,
            "rope_theta": theta,  # transformers 4
            "rope_scaling": None if scaling is None else rope,  # transformers 4
            "rope_parameters": {**rope, "rope_theta": theta},  # transformers 5
            "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 4
            "dtype": str(dtype).removeprefix("torch."),  # transformers 5
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "use_sliding_window": False,
        }


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _head_dim(path: str | Path, raw: dict[str, Any]) -> int:
    """hidden_size over num_attention_heads, for a config without head_dim."""
    size, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if not _is_size(size) or not _is_size(heads) or size % heads:
        raise InputError(
            f"{path}: head_dim is missing and hidden_size {size!r} over num_attention_heads {heads!r} is no size; "
            "supported: a multiple, or head_dim written out"
        )
    return size // heads


def _rope(path: str | Path, raw: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """RoPE's base and scaling: transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise InputError(f"{path}: {name} is {rope!r}; supported: an object")
        theta = rope.get("rope_theta", raw.get("rope_theta"))
        if raw.get("rope_theta", theta) != theta:
            raise InputError(f"{path}: rope_theta is {raw['rope_theta']!r} but {name} is {rope!r}; make them equal")
        found.append((theta, _rope_scaling(path, name, rope)))
    if not found:
        found.append((raw.get("rope_theta"), None))
    if found[0] != found[-1]:
        raise InputError(f"{path}: rope_parameters and rope_scaling differ; make them equal or delete one")
    if found[0][0] is None:
        raise InputError(f"{path}: field rope_theta is missing; every shape must be written out")
    return found[0]


def _rope_scaling(path: str | Path, name: str, rope: dict[str, Any]) -> RopeScaling | None:
    """The scaling that one of the two objects asks for; None for the default RoPE."""
    values = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta")}
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if kind == "default" and not values:
        return None
    if kind != "llama3" or set(values) != set(names):
        supported = f"rope_type 'default', or 'llama3' with {', '.join(names)}"
        raise InputError(f"{path}: {name} is {rope!r}; supported: {supported}")
    scaling = RopeScaling(**values)
    good = all(map(_is_positive, values.values())) and scaling.low_freq_factor < scaling.high_freq_factor
    if not good or not _is_size(scaling.original_max_position_embeddings):
        raise InputError(f"{path}: {name} is {rope!r}; supported: positive numbers, the low factor below the high one")
    return scaling


class KVCache:
    """Keys and values of every token so far: one slot a row, static in size.

    k, v: (L, slots, G, max_len rounded up to whole blocks, D).
    lens: (slots,) int64, tokens held; on the CPU, so that no shape needs to ask the device.
    """

    def __init__(self, config: Config, slots: int, max_len: int, dtype: torch.dtype, device: torch.device | str):
        assert slots > 0 and max_len > 0, (slots, max_len)
        kind = torch.device(device).type
        self.block, self.group = BLOCK[kind], GROUP[kind]
        length = -(-max_len // self.block) * self.block
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, config.head_dim)
        # Zeros and not empty: a masked position still enters the sum as 0 * v, and 0 * NaN would be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lens = torch.zeros(slots, dtype=torch.int64)
        # The rotation of every position the cache can hold.
        self.cos, self.sin = angles(config, torch.arange(length, device=device), dtype)

    def groups(self, rows: int) -> list[tuple[int, int]]:
        """How the next token of slots 0..rows-1 attends: (number of slots, positions read) of each group in turn."""
        widths = [(int(part.max()) // self.block + 1) * self.block for part in self.lens[:rows].split(self.group)]
        merged: list[tuple[int, int]] = []
        for i, width in enumerate(widths):
            size = min(self.group, rows - i * self.group)
            if merged and merged[-1][1] == width:
                size += merged.pop()[0]
            merged.append((size, width))
        return merged

    @staticmethod
    def bytes(config: Config, max_len: int, dtype: torch.dtype, device: torch.device | str) -> int:
        """Size of one slot."""
        block = BLOCK[torch.device(device).type]
        a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return -(-max_len // block) * block * a_token

    def copy(self, source: list[int], target: list[int]) -> None:
        """Overwrite the target slots with what the source slots hold (each list: distinct slots, equal lengths)."""
        width = max(self.lens[source].tolist(), default=0)
        self.k[:, target, :, :width] = self.k[:, source, :, :width]
        self.v[:, target, :, :width] = self.v[:, source, :, :width]
        self.lens[target] = self.lens[source]

    def clear(self, slots: list[int]) -> None:
        """Make the slots empty again; what they held is masked from now on and then overwritten."""
        self.lens[slots] = 0


@dataclasses.dataclass
class Rows:
    """What every layer needs to know about the rows of one forward pass."""

    cos: Tensor  # (N, 1, D)
    sin: Tensor  # (N, 1, D), negative in its first half
    lengths: list[int]  # tokens of each packed row
    cu_seqlens: Tensor | None = None  # (B + 1,) int32 on the device, where one kernel attends to all packed rows
    cache: KVCache | None = None
    slots: Tensor | None = None  # (N,) cache slot of each token
    positions: Tensor | None = None  # (N,) position of each token in its slot
    seen: list[tuple[slice, Tensor]] | None = None  # decoding: slots and their mask, (rows, 1, 1, width), 0 or -inf


def frequencies(config: Config, device: torch.device) -> Tensor:
    """(D/2,) fp32: the angle each pair of dimensions turns from one position to the next, theta^(-2i/D).

    With "llama3" scaling (the Llama 3.1 models, after 8,192 positions) a pair that turns fewer than low_freq_factor
    times over the original context is slowed by `factor`, one that turns more than high_freq_factor times is left
    alone, and between the two the share that is left alone rises linearly.
    """
    D = config.head_dim
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=device) / D
    turn = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return turn
    turns = scaling.original_max_position_embeddings / (2 * math.pi / turn)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * turn / scaling.factor + kept * turn


def angles(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, each (N, 1, D); computed in fp32 whatever the dtype.

    The first half of the sine is negative: the minus sign of the rotation, see `rotate`.
    """
    turn = (positions[:, None].float() * frequencies(config, positions.device)).unsqueeze(1)  # (N, 1, D/2)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn each pair (x_i, x_{i+D/2}) by its angle. x: (N, heads, D); cos, sin: (N, 1, D) of `angles`."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


@torch.compiler.disable  # row lengths differ from batch to batch: a compiled one would be compiled again for each
def attend_rows(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Causal attention inside each packed row. q: (N, H, D); k, v: (N, G, D). Returns (N, H, D)."""
    if rows.cu_seqlens is not None:
        return _attend_varlen(q, k, v, rows.cu_seqlens, max(rows.lengths))
    fewer_keys = q.shape[1] != k.shape[1]
    # split and not slices: the gradient of a slice is a tensor of all N tokens, once a row; that of split is one `cat`.
    split = (x.transpose(0, 1).unsqueeze(0).split(rows.lengths, dim=2) for x in (q, k, v))  # B times (1, heads, T, D)
    out = []
    for row in zip(*split, strict=True):
        out.append(F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=fewer_keys)[0].transpose(0, 1))
    return torch.cat(out)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """The same by one flash attention kernel over all rows."""
    options: dict[str, Any] = {"window_size": (-1, 0)}  # nothing to the right: causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:  # torch before 2.12
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


def attend_cache(q: Tensor, k: Tensor, v: Tensor, seen: list[tuple[slice, Tensor]]) -> Tensor:
    """One new token a row against its slot. q: (B, H, D); k, v: (slots, G, max_len, D). Returns (B, H, D)."""
    # The query heads that share a key head stand where SDPA expects positions, so no key is ever repeated.
    q = q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))  # (B, G, H/G, D)
    out = []
    for rows, mask in seen:
        read = (rows, slice(None), slice(mask.shape[-1]))
        out.append(F.scaled_dot_product_attention(q[rows], k[read], v[read], attn_mask=mask))
    return (torch.cat(out) if len(out) > 1 else out[0]).flatten(1, 2)


Stack = tuple[Tensor, Tensor | None]  # weight and bias of several linear layers as one


def _stack(linears: list[nn.Module]) -> Stack | None:
    """Several linear layers as one; their weights become views of it. None if one has an adapter."""
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    whole = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, whole.split([len(linear.weight) for linear in linears]), strict=True):
        linear.weight.data = part
    return whole, None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.stacked: Stack | None = None  # q, k and v as one, see `Qwen3.stacked`

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        H, G = self.heads
        if self.stacked is None:
            qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        else:
            qkv = F.linear(x, *self.stacked)
        qk, v = qkv.view(len(x), H + 2 * G, self.head_dim).split((H + G, G), dim=1)
        if self.q_norm is not None:
            scale = torch.cat((self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(G, -1)))  # (H + G, D)
            qk = F.rms_norm(qk, (self.head_dim,), eps=self.q_norm.eps) * scale
        q, k = rotate(qk, rows.cos, rows.sin).split((H, G), dim=1)
        if rows.cache is not None:
            cache_k, cache_v = rows.cache.k[self.layer], rows.cache.v[self.layer]  # (slots, G, max_len, D)
            cache_k[rows.slots, :, rows.positions] = k
            cache_v[rows.slots, :, rows.positions] = v
        if rows.seen is None:
            out = attend_rows(q, k, v, rows)
        else:
            out = attend_cache(q, cache_k, cache_v, rows.seen)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.stacked: Stack | None = None  # gate and up as one, see `Qwen3.stacked`

    def forward(self, x: Tensor) -> Tensor:
        if self.stacked is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = F.linear(x, *self.stacked).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything that Hugging Face names `model.*`."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen3(nn.Module):
    """The model. A new one has Hugging Face's initial weights: normal, deviation 0.02; norms at one, biases at zero."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each layer in the backward pass instead of keeping it
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def head(self) -> Tensor:
        """(V, E) weight that turns hidden states into logits."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, E) hidden states to (N, V) logits, in the model's dtype."""
        if hidden.device.type == "cpu" and torch.get_num_threads() > 1:
            return (self.head @ hidden.T).T  # with few rows, the product this way round is spread over the threads
        return F.linear(hidden, self.head)

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (N, E), of packed rows.

        ids: (N,) int64 on the model's device. cu_seqlens: (B+1,) int64 on the CPU; row b is
        ids[cu_seqlens[b]:cu_seqlens[b+1]] and holds at least one token.

        With a cache the rows' keys and values are left in it: `slots`, (B,) int64 on the CPU, names an empty slot for
        each row; other slots are untouched. `decode` goes on from there.
        """
        weight = self.model.embed_tokens.weight
        lengths = cu_seqlens.diff()
        assert (lengths > 0).all(), f"a packed row is empty: {cu_seqlens}"
        assert ids.shape == (int(cu_seqlens[-1]),), (ids.shape, cu_seqlens)
        longest = int(lengths.max())
        assert longest <= self.config.max_position_embeddings, (longest, self.config.max_position_embeddings)
        positions = torch.arange(len(ids)) - torch.repeat_interleave(cu_seqlens[:-1], lengths)
        positions = positions.to(weight.device)
        rows = Rows(*angles(self.config, positions, weight.dtype), lengths.tolist())
        if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and varlen_attn is not None:
            rows.cu_seqlens = cu_seqlens.to(weight.device, torch.int32)
        if cache is not None:
            assert (cache.lens[slots] == 0).all(), f"slots must be empty, their lengths are {cache.lens[slots]}"
            assert longest <= cache.k.shape[3], (longest, cache.k.shape)
            rows.cache, rows.positions = cache, positions
            rows.slots = torch.repeat_interleave(slots, lengths).to(weight.device)
            cache.lens[slots] = lengths
        return self._layers(ids, rows)

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache, groups: list[tuple[int, int]]) -> Tensor:
        """One more token for each of the slots 0..B-1: hidden states after the final norm, (B, E).

        ids, positions: (B,) int64 on the model's device; positions are what `cache.lens` holds, and the caller counts
        them up afterwards. groups: `cache.groups(B)`. Reads nothing back from the device, so that a CUDA graph can
        hold the whole step.
        """
        seen, start = [], 0
        for size, width in groups:
            part = slice(start, start + size)
            hidden = torch.arange(width, device=ids.device) > positions[part, None]
            seen.append((part, torch.zeros_like(hidden, dtype=cache.k.dtype).masked_fill_(hidden, -torch.inf)))
            start += size
        seen = [(part, mask[:, None, None]) for part, mask in seen]
        slots = torch.arange(len(ids), device=ids.device)
        cos, sin = cache.cos[positions], cache.sin[positions]
        return self._layers(ids, Rows(cos, sin, [], cache=cache, slots=slots, positions=positions, seen=seen))

    def _layers(self, ids: Tensor, rows: Rows) -> Tensor:
        x = self.model.embed_tokens(ids)
        remat = self.gradient_checkpointing and torch.is_grad_enabled()
        assert not (remat and rows.cache is not None), "a cache cannot be filled under gradient checkpointing"
        for layer in self.model.layers:
            if remat:
                x = checkpoint(layer, x, rows, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rows)
        return self.model.norm(x)

    @contextlib.contextmanager
    def stacked(self) -> Iterator[None]:
        """Inside, weights that read the same input are multiplied as one: fewer, larger products for few tokens.

        The parameters become views of the stacked tensors, so no memory is added but one layer's while it is stacked.
        Layers with adapters stay as they are. Weights must not be replaced inside.
        """
        blocks = [(layer.self_attn, layer.mlp) for layer in self.model.layers]
        with torch.inference_mode(False), torch.no_grad():  # the views must be usable in training later
            for attn, mlp in blocks:
                attn.stacked = _stack([attn.q_proj, attn.k_proj, attn.v_proj])
                mlp.stacked = _stack([mlp.gate_proj, mlp.up_proj])
        try:
            yield
        finally:
            for attn, mlp in blocks:
                attn.stacked = mlp.stacked = None


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Qwen3:
    """Read a Hugging Face folder: config.json and model.safetensors, or the shards of model.safetensors.index.json.

    Raises InputError when a file is missing, torn or outside the folder, and one that names every missing, extra and
    misshapen tensor before any weight is read.
    """
    path = Path(path)
    config = Config.from_json(member(path, "config.json"))
    with torch.device("meta"):
        model = Qwen3(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Some tied checkpoints hold the head a second time; it must then be the embedding.
    again = {"lm_head.weight": shapes["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    tensors = read_tensors(weight_files(path), shapes, again, dtype, device)
    for name in again:
        head = tensors.pop(name, None)
        if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
            raise InputError(f"{path}: {name} differs from the embedding; set tie_word_embeddings to false")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def weight_files(path: Path) -> list[Path]:
    """model.safetensors if it is there, otherwise the shards that the index names.

    Raises InputError at a shard that is missing or whose name leads out of the folder, before any is opened.
    """
    single, index = member(path, "model.safetensors"), member(path, "model.safetensors.index.json")
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(
            f"{path}: neither {single.name} nor {index.name} is there; give a folder of safetensors weights"
        )
    listing = read_json(index)
    if not isinstance(listing, dict) or not isinstance(listing.get("weight_map"), dict) or not listing["weight_map"]:
        raise InputError(f"{index}: weight_map is missing or empty; fetch the file again")
    shards = sorted({str(shard) for shard in listing["weight_map"].values()})
    for shard in shards:
        if not shard.endswith(".safetensors"):
            raise InputError(f"{index}: shard {shard!r} is not a *.safetensors name; fetch the file again")
        if not member(path, shard).is_file():
            raise InputError(f"{path / shard}: no such file, but {index.name} names it; fetch the shard")
    return [path / shard for shard in shards]


def read_tensors(
    files: list[Path],
    shapes: dict[str, tuple[int, ...]],
    optional: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Tensors of safetensors files in `dtype` on `device`: exactly those of `shapes`, and of `optional` what is there.

    The files are mapped, not read: a tensor is copied from the mapping to where it will live, and a file's mapping is
    given up before the next. Raises InputError when a file cannot be read, and, before the first copy, one InputError
    that names every tensor that does not fit.
    """
    expected = shapes | optional
    where, problems = {}, {}
    for file in files:
        with _opened(file) as f:
            for name in f.keys():  # safe_open is no mapping
                entry = f.get_slice(name)
                shape, stored = tuple(entry.get_shape()), entry.get_dtype()
                if name not in expected:
                    problems[name] = "extra"
                elif name in where:
                    problems[name] = "in two files"
                elif shape != expected[name]:
                    problems[name] = f"of shape {shape}, not {expected[name]}"
                elif stored not in DTYPES:
                    problems[name] = f"of dtype {stored}, not one of {', '.join(DTYPES)}"
                else:
                    where[name] = file
    problems |= {name: "missing" for name in shapes if name not in where and name not in problems}
    if problems:
        listed = "; ".join(f"{name} is {problem}" for name, problem in problems.items())
        raise InputError(f"{files[0].parent}: weights do not fit the configuration: {listed}; use the matching files")
    tensors = {}
    for file in files:
        with _opened(file) as f:
            for name in f.keys():
                tensors[name] = torch.empty(expected[name], dtype=dtype, device=device).copy_(f.get_tensor(name))
    return tensors


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped on the host. Raises InputError, with both sizes when it is cut short."""
    try:
        with safe_open(file, framework="pt", device="cpu") as f:
            yield f
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: not a readable safetensors file ({error}{_sizes(file)}); fetch or write it again"
        ) from None


def _sizes(file: Path) -> str:
    """Of a file that cannot be read: how long it is and how long its header says it should be, "" if neither is known.

    The format: eight bytes, the length of the header; the header, JSON with the offsets of each tensor; the tensors.
    """
    try:
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(min(length, 100_000_000)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f"; {file.stat().st_size} bytes of {8 + length + max(ends)}"
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ""


def save(model: Qwen3, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, each atomically, for transformers to read; `dtype` casts the weights."""
    with torch.device("meta"):
        expected = set(Qwen3(model.config).state_dict())
    state = model.state_dict()
    assert set(state) == expected, f"merge the adapters first: {sorted(set(state) ^ expected)[:3]}"
    dtype = dtype or model.head.dtype
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()}
    write_json(Path(path) / "config.json", model.config.to_json(dtype))
    with atomic_write(Path(path) / "model.safetensors", "wb") as f:
        f.write(safetensors_bytes(tensors, metadata={"format": "pt"}))
