"""Qwen3, Qwen3-MoE, Qwen2 and Llama 3 from scratch: packed rows in, hidden states out, with a KV cache for decoding.

They are one model with four explicit differences, fields of `ModelConfig`: queries and keys are normalised (Qwen3), the
q, k and v projections have a bias (Qwen2), RoPE's slow rotations are slowed further (`rope_scaling`, Llama 3.1), layers
have experts instead of one MLP (`moe`, see moe.py). The class keeps the name of the first of them.

Letters: B rows, T tokens of one row, N tokens of all rows of a packed batch, E hidden size, V vocabulary, L layers,
H query heads, G key/value heads, D head size.

Parameters carry Hugging Face's names, so a checkpoint loads without a rename table. Rows are packed one after the
other without padding; each row sees only itself. The head is not part of `forward`: training and sampling apply it to
the few positions they need, and the (N, V) logits never exist.

Weights are read from memory-mapped files one tensor at a time, straight into their place and dtype on the device: the
host never holds more than about one shard besides what it computes with.

Left out on purpose: sliding windows, other RoPE scalings, biases elsewhere, dropout, quantised weights, models that
bring their own code. A config that asks for one of them is refused, never approximated.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
import moe
from common.errors import InputError
from common.files import atomic_write, write_json
from common.hub import member
from common.model_config import ModelConfig
from common.recompute import Remade
from common.weights import read_tensors, weight_files
from kernels.add_rmsnorm import add_rmsnorm, rmsnorm
from kernels.decode_attention import Masks, decode_attention, masks
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_cached
from kernels.segment_logprob import elementwise_impl
from kernels.swiglu import swiglu

# A CPU's attention over the cache reads whole blocks of positions, the unused ones masked: so it sums in the same order
# however long the longest row of the batch is, and a row's result does not depend on its neighbours. A decode step
# attends in groups of neighbouring slots, each only as wide as its own longest row: a caller that keeps slots of like
# length together saves the rest. On CUDA a row reads what it has; a block is what the cache grows by.
BLOCK = {"cpu": 64, "cuda": 512}  # positions
GROUP = {"cpu": 32, "cuda": 1 << 30}  # slots


class KVCache:
    """Keys and values of every token so far: one slot a row. `reshape` gives it other numbers of slots and positions.

    k, v: one tensor a layer, (slots, G, max_len rounded up to whole blocks, D).
    lens: (slots,) int64, tokens held; on the CPU, so that no shape needs to ask the device.
    """

    def __init__(self, config: ModelConfig, slots: int, max_len: int, dtype: torch.dtype, device: torch.device | str):
        assert slots > 0 and max_len > 0, (slots, max_len)
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.block, self.group = BLOCK[self.device.type], GROUP[self.device.type]
        self.k: list[Tensor]
        self.v: list[Tensor]
        self.lens = torch.zeros(0, dtype=torch.int64)
        self.reshape(slots, max_len, kept=0)

    @property
    def slots(self) -> int:
        """Rows it can hold."""
        return len(self.lens)

    @property
    def length(self) -> int:
        """Positions a row can have."""
        return len(self.cos)

    def reshape(self, slots: int, max_len: int, kept: int) -> None:
        """Other numbers of slots and positions; slots 0..kept-1 keep what they hold, the others are empty.

        One layer after the other, keys and values apart: the peak is the larger cache and half a layer.
        """
        width = int(self.lens[:kept].max()) if kept else 0
        length = -(-max_len // self.block) * self.block
        assert kept <= slots and width <= length, (kept, slots, width, length)
        if not kept:  # the old ones go first
            self.k, self.v = ([torch.empty(0)] * self.config.num_hidden_layers for _ in range(2))
        for layers in (self.k, self.v):
            for layer, old in enumerate(layers):
                # Zeros and not empty: a masked position still enters the sum as 0 * v, and 0 * NaN would be NaN.
                shape = (slots, self.config.num_key_value_heads, length, self.config.head_dim)
                new = torch.zeros(shape, dtype=self.dtype, device=self.device)
                if kept:
                    new[:kept, :, :width] = old[:kept, :, :width]
                layers[layer] = new
        self.lens = torch.cat((self.lens[:kept], torch.zeros(slots - kept, dtype=torch.int64)))
        # The rotation of every position the cache can hold.
        self.cos, self.sin = angles(self.config, torch.arange(length, device=self.device), self.dtype)

    def groups(self, rows: int, tokens: int = 1) -> list[tuple[int, int]]:
        """How the next tokens of slots 0..rows-1 attend: (number of slots, positions read) of each group in turn.

        On CUDA always as wide as the cache, so that a captured step holds for every length.
        """
        if self.device.type == "cuda":
            return [(rows, self.length)]
        last = self.lens[:rows] + tokens - 1
        widths = [(int(part.max()) // self.block + 1) * self.block for part in last.split(self.group)]
        merged: list[tuple[int, int]] = []
        for i, width in enumerate(widths):
            size = min(self.group, rows - i * self.group)
            if merged and merged[-1][1] == width:
                size += merged.pop()[0]
            merged.append((size, width))
        return merged

    @staticmethod
    def bytes(config: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device | str) -> int:
        """Size of one slot."""
        block = BLOCK[torch.device(device).type]
        a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return -(-max_len // block) * block * a_token

    def copy(self, source: list[int], target: list[int]) -> None:
        """Overwrite the target slots with what the source slots hold (each list: distinct slots, equal lengths)."""
        if not source:
            return
        width = int(self.lens[source].max())
        for layer in (*self.k, *self.v):
            layer[target, :, :width] = layer[source, :, :width]
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
    decoding: bool = False  # one token for each of the slots 0..N-1
    seen: Masks | None = None  # decoding: what each row sees, for kernels that do not count
    remade: Remade | None = None  # where cheap results are made again in the backward pass
    again: bool = False  # the layer is made again for its backward pass: what it returns is not read

    def forget(self, made: Any, function: Callable[..., Any], *inputs: Any) -> Any:
        """`made`, a tensor or a tuple, is function(*inputs): the backward pass may make it again. Returns it."""
        if self.remade is not None:
            self.remade.forget(made, function, *inputs)
        return made

    def first_and_again(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Contexts for torch's `checkpoint`: of a layer's first pass, and of the pass that makes it again."""
        return contextlib.nullcontext(), self._made_again()

    @contextlib.contextmanager
    def _made_again(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False

    def normed(self, norm: nn.RMSNorm, x: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual x + u, without u x alone, and its norm."""
        scale = norm.weight, cast(float, norm.eps)
        x, y = add_rmsnorm(x, u, *scale)
        return x, self.forget(y, rmsnorm, x, *scale)


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
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


def angles(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, each (N, 1, D); computed in fp32 whatever the dtype.

    The first half of the sine is negative: the minus sign of the rotation, see kernels/qk_norm_rope.py.
    """
    turn = (positions[:, None].float() * frequencies(config, positions.device)).unsqueeze(1)  # (N, 1, D/2)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Causal attention inside each packed row. q: (N, H, D); k, v: (N, G, D). Returns (N, H, D)."""
    if rows.cu_seqlens is not None:
        return _attend_varlen(q, k, v, rows.cu_seqlens, max(rows.lengths))
    fewer_keys = q.shape[1] != k.shape[1]
    # split and not slices: the gradient of a slice is a tensor of all N tokens, once a row; that of split is one `cat`.
    split = (x.transpose(0, 1).unsqueeze(0).split(rows.lengths, dim=2) for x in (q, k, v))  # B times (1, heads, T, D)
    out = []
    for q_row, k_row, v_row in zip(*split, strict=True):
        attended = F.scaled_dot_product_attention(q_row, k_row, v_row, is_causal=True, enable_gqa=fewer_keys)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


@functools.cache
def varlen_attn() -> Callable[..., Any] | None:
    """torch's flash attention over packed rows; None before torch 2.10. Its import takes seconds, so not above.

    The kernel takes fewer key heads than query heads; from torch 2.12 on one has to say so.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn as attend
    except ImportError:
        return None
    asked: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}
    return functools.partial(attend, window_size=(-1, 0), **asked)  # nothing to the right: causal


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """The same by one flash attention kernel over all rows."""
    attend = varlen_attn()
    assert attend is not None
    return attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


Stack = tuple[Tensor, Tensor | None]  # weight and bias of several linear layers as one


def _joined(weights: list[Tensor]) -> Tensor:
    """Weights one below the other. Those that lie so already, from an earlier stack, are not copied."""
    first = weights[0]
    place = first.data_ptr()
    for weight in weights:
        one_memory = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not one_memory or not weight.is_contiguous() or weight.data_ptr() != place:
            return torch.cat(weights)
        place += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _stack(linears: list[nn.Linear]) -> Stack | None:
    """Several linear layers as one; their weights become views of it.

    None where some have an adapter and others none, or where adapters compute in fp32: those add up in PEFT's order.
    """
    if len({type(linear) for linear in linears}) > 1:
        return None
    if type(linears[0]) is not nn.Linear and linears[0].weight.dtype == torch.float32:
        return None
    whole = _joined([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, whole.split([len(linear.weight) for linear in linears]), strict=True):
        linear.weight.data = part
    return whole, None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.eps = layer, config.head_dim, config.rms_norm_eps
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.stacked: Stack | None = None  # q, k and v as one, see `Qwen3.stacked`
        self.attend_rows, self.decode_attention = attend_rows, decode_attention

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        H, G = self.heads
        if self.stacked is None:
            qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        else:
            qkv = lora.joint(x, [self.q_proj, self.k_proj, self.v_proj], *self.stacked)
        qkv = qkv.view(len(x), H + 2 * G, self.head_dim)
        scales = None if self.q_norm is None or self.k_norm is None else (self.q_norm.weight, self.k_norm.weight)
        given = qkv, scales, self.eps, rows.cos, rows.sin
        if rows.decoding:
            assert rows.cache is not None and rows.positions is not None
            slot = rows.cache.k[self.layer], rows.cache.v[self.layer], rows.positions
            q = qk_norm_rope_cached(*given, *slot)
            return self.o_proj(self.decode_attention(q, *slot, rows.seen).flatten(1))
        q, k, v = rows.forget(qk_norm_rope(*given, G), qk_norm_rope, *given, G)
        if rows.cache is not None:
            rows.cache.k[self.layer][rows.slots, :, rows.positions] = k  # (slots, G, max_len, D)
            rows.cache.v[self.layer][rows.slots, :, rows.positions] = v
        return self.o_proj(self.attend_rows(q, k, v, rows).flatten(1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.stacked: Stack | None = None  # gate and up as one, see `Qwen3.stacked`

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        if self.stacked is None:
            given: tuple[Tensor, ...] = self.gate_proj(x), self.up_proj(x)
        else:
            given = (lora.joint(x, [self.gate_proj, self.up_proj], *self.stacked),)
        h = rows.forget(swiglu(*given), swiglu, *given)
        return lora.backward_only(self.down_proj, h) if rows.again else self.down_proj(h)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        mixture = config.moe if config.moe is not None and config.moe.at(layer) else None
        self.mlp = MLP(config) if mixture is None else moe.MoE(mixture, config.hidden_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, u: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """The residual as x and what the layer before adds to it, u; the same of this layer: the next norm adds up."""
        x, normed = rows.normed(self.input_layernorm, x, u)
        x, normed = rows.normed(self.post_attention_layernorm, x, self.self_attn(normed, rows))
        return x, self.mlp(normed, rows)


class Embedding(nn.Embedding):
    """torch's, without a draw of its own on the meta device, see `moe.draw`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything that Hugging Face names `model.*`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen3(nn.Module):
    """The model. A new one has Hugging Face's initial weights: normal, deviation 0.02; norms at one, biases at zero."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # What the backward pass makes again instead of keeping: "none", "cheap" (norms, RoPE, SwiGLU), "full" (layers).
        self.recompute = "none"
        self.compiled = False  # see `compile_layers`
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                moe.draw(module.weight)
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
        positions = (torch.arange(len(ids)) - torch.repeat_interleave(cu_seqlens[:-1], lengths)).to(weight.device)
        rows = Rows(*angles(self.config, positions, weight.dtype), lengths.tolist())
        if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and varlen_attn() is not None:
            rows.cu_seqlens = cu_seqlens.to(weight.device, torch.int32)
        if cache is not None:
            assert slots is not None, "a cache needs the slots of the rows"
            assert (cache.lens[slots] == 0).all(), f"slots must be empty, their lengths are {cache.lens[slots]}"
            assert longest <= cache.length, (longest, cache.length)
            rows.cache, rows.positions = cache, positions
            rows.slots = torch.repeat_interleave(slots, lengths).to(weight.device)
            cache.lens[slots] = lengths
        return self._layers(ids, rows)

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache, groups: list[tuple[int, int]]) -> Tensor:
        """One more token for each of the slots 0..B-1: hidden states after the final norm, (B, E).

        ids, positions: (B,) int64 on the model's device; positions are what `cache.lens` holds, and the caller counts
        them up afterwards. groups: `cache.groups(B, steps)` of the steps that are made with it. Reads nothing back from
        the device, so that a CUDA graph can hold the whole step.
        """
        seen = masks(positions, groups, cache.dtype) if elementwise_impl(cache.k[0]) == "torch" else None
        cos, sin = cache.cos[positions], cache.sin[positions]
        return self._layers(ids, Rows(cos, sin, [], cache=cache, positions=positions, decoding=True, seen=seen))

    def _layers(self, ids: Tensor, rows: Rows) -> Tensor:
        x, u = self.model.embed_tokens(ids), None
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        assert recompute == "none" or rows.cache is None, "a cache is filled by passes that recompute nothing"
        rows.remade = Remade() if recompute == "cheap" else None
        how: dict[str, Any] = dict(use_reentrant=False, preserve_rng_state=False)
        if not self.compiled:  # a compiled layer keeps what the compiler chose, the same both times
            how["context_fn"] = rows.first_and_again
        with rows.remade or contextlib.nullcontext():
            for layer in self.model.layers:
                if recompute == "full":  # adds up at once: one tensor a layer is kept, not two
                    x = torch.add(*checkpoint(layer, x, None, rows, **how))
                else:
                    x, u = layer(x, u, rows)
            return rows.normed(self.model.norm, x, u)[1]

    def compile_layers(self) -> None:
        """torch.compile every layer, but for what differs from pass to pass: packed rows' lengths, experts' shares."""
        for layer in cast(Iterable[Layer], self.model.layers):
            layer.self_attn.attend_rows = torch.compiler.disable(attend_rows)
            layer.self_attn.decode_attention = torch.compiler.disable(decode_attention)
            if not isinstance(layer.mlp, MLP):
                layer.mlp.forward = torch.compiler.disable(layer.mlp.forward)  # type: ignore[method-assign]
            layer.compile(dynamic=True)
        self.compiled = True

    def stack(self) -> None:
        """From now on weights that read the same input are multiplied as one: fewer, larger products.

        The parameters become views of the stacked tensors, so no memory is added but one layer's while it is stacked.
        They may be changed in place (merged adapters), never replaced. Where `_stack` says None all stays as it is.
        """
        with torch.inference_mode(False), torch.no_grad():  # the views must be usable in training later
            for layer in cast(Iterable[Layer], self.model.layers):
                attn, mlp = layer.self_attn, layer.mlp
                attn.stacked = _stack([attn.q_proj, attn.k_proj, attn.v_proj])
                if isinstance(mlp, MLP):  # experts are stacked always
                    mlp.stacked = _stack([mlp.gate_proj, mlp.up_proj])

    @contextlib.contextmanager
    def stacked(self) -> Iterator[None]:
        """Inside, the weights are stacked; outside, as they were before."""
        blocks = [block for block in self.modules() if isinstance(block, Attention | MLP)]
        before = [block.stacked for block in blocks]
        if not any(before):
            self.stack()
        try:
            yield
        finally:
            for block, stack in zip(blocks, before, strict=True):
                block.stacked = stack


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Qwen3:
    """Read a Hugging Face folder: config.json and model.safetensors, or the shards of model.safetensors.index.json.

    Raises InputError when a file is missing, torn or outside the folder, and one that names the missing, extra and
    misshapen tensors before any weight is read.
    """
    path = Path(path)
    config = ModelConfig.from_json(member(path, "config.json"))
    with torch.device("meta"):
        model = Qwen3(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Some tied checkpoints hold the head a second time; it must then be the embedding.
    again = {"lm_head.weight": shapes["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    tensors = read_tensors(weight_files(path), shapes, again, dtype, device, moe.parts(shapes))
    for name in again:
        head = tensors.pop(name, None)
        if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
            raise InputError(f"{path}: {name} differs from the embedding; set tie_word_embeddings to false")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def save(model: Qwen3, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, each atomically, for transformers to read; `dtype` casts the weights.

    Experts are written one by one, as published checkpoints have them.
    """
    with torch.device("meta"):
        expected = set(Qwen3(model.config).state_dict())
    state = model.state_dict()
    assert set(state) == expected, f"merge the adapters first: {sorted(set(state) ^ expected)[:3]}"
    dtype = dtype or model.head.dtype
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in moe.apart(state).items()}
    write_json(Path(path) / "config.json", model.config.to_json(dtype))
    with atomic_write(Path(path) / "model.safetensors", "wb") as f:
        f.write(safetensors_bytes(tensors, metadata={"format": "pt"}))
