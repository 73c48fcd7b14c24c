"""What a model of a given shape costs: parameters, floating-point operations, bytes; and what GPUs can do.

The only place that counts them: the dry run, the choice of micro-batches, the benchmarks and the GPU check all ask
here. Everything follows from config.json by arithmetic, without weights. Counts are exact; bytes of activations are
within a tenth of what autograd keeps (a test counts them).

Letters: E hidden size, F inner size of the MLP, V vocabulary, L layers, q and kv the widths of queries and of keys, r
the LoRA rank, N tokens of all rows, T tokens of one row; of a mixture (moe.py) n experts of size I, k of them a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.model_config import ModelConfig


@dataclass(frozen=True)
class GPU:
    """A card as its maker's data sheet has it (SXM where there are several)."""

    tflops: float  # dense bf16 products, TFLOP/s
    memory: float  # GB
    bandwidth: float  # GB/s


GPUS = {  # the parts of a name are what torch's name of the device must contain
    "h100": GPU(989, 80, 3350),
    "h100-pcie": GPU(756, 80, 2000),
    "h100-nvl": GPU(835, 94, 3900),
    "h200": GPU(989, 141, 4800),
    "b200": GPU(2250, 180, 8000),
    "a100-80": GPU(312, 80, 2039),
    "a100-40": GPU(312, 40, 1555),
    "a800-80": GPU(312, 80, 2039),
    "a800-40": GPU(312, 40, 1555),
    "l40s": GPU(362, 48, 864),
    "rtx4090": GPU(165, 24, 1008),
}
UTILISATION = 0.35  # assumed share of the peak where nothing was measured; an H200 gave .42 to .52 (docs/speed.md)
ROOM = 0.92  # share of the memory to fill: the rest is the context, the allocator's gaps and NCCL's buffers


def gpu_named(device: str) -> str | None:
    """The name in GPUS of a device that torch calls e.g. "NVIDIA H100 80GB HBM3"; None for one that is not there."""
    words = device.lower().replace(" ", "")
    found = [name for name in GPUS if all(part in words for part in name.split("-"))]
    return max(found, key=lambda name: name.count("-"), default=None)


def widths(c: ModelConfig) -> tuple[int, int]:
    """(q, kv): numbers a token has in all its queries, and in all its keys."""
    return c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim


def linears(c: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of the linear layers that get adapters: q, k, v, o, and gate, up, down of a model without experts."""
    (q, kv), E, F = widths(c), c.hidden_size, c.intermediate_size
    attention = [(E, q), (E, kv), (E, kv), (q, E)]
    return attention if c.moe else [*attention, (E, F), (E, F), (F, E)]


def layers_with_experts(c: ModelConfig) -> int:
    """How many layers have experts instead of one MLP."""
    return sum(map(c.moe.at, range(c.num_hidden_layers))) if c.moe else 0


def met(c: ModelConfig) -> int:
    """Numbers in the matrices of all layers that one token is multiplied with: of the experts, its own k."""
    (q, kv), E, mixed = widths(c), c.hidden_size, layers_with_experts(c)
    experts = E * c.moe.num_experts + 3 * c.moe.num_experts_per_tok * E * c.moe.moe_intermediate_size if c.moe else 0
    dense = 3 * E * c.intermediate_size
    return c.num_hidden_layers * 2 * E * (q + kv) + (c.num_hidden_layers - mixed) * dense + mixed * experts


def parameters(c: ModelConfig, r: int) -> dict[str, int]:
    """Numbers in "layers", in the "rest" (embedding, head, final norm) and in "adapters" of rank r.

    "experts" of those in the layers are experts', and "idle" of these a token does not meet; 0 without a mixture.
    """
    (q, kv), E, experts, idle = widths(c), c.hidden_size, 0, 0
    others = 2 * E + 2 * c.head_dim * c.qk_norm + (q + 2 * kv) * c.qkv_bias  # norms and biases
    if c.moe:
        one = 3 * E * c.moe.moe_intermediate_size * layers_with_experts(c)
        experts, idle = one * c.moe.num_experts, one * (c.moe.num_experts - c.moe.num_experts_per_tok)
    return {
        "layers": met(c) + idle + c.num_hidden_layers * others,
        "rest": E * c.vocab_size * (1 if c.tie_word_embeddings else 2) + E,
        "adapters": c.num_hidden_layers * sum(r * (a + b) for a, b in linears(c)),
        "experts": experts,
        "idle": idle,
    }


# ---------- floating-point operations

Lengths = Sequence[tuple[int, int]]  # tokens of each row, and how many of them are completion


def forward_flops(c: ModelConfig, r: int, rows: Lengths) -> dict[str, float]:
    """Operations of one forward pass, a multiply-add counted as 2, by kind of matrix product.

    Only completion tokens meet the head. Causal attention is counted as the T (T + 1) / 2 pairs it needs. What is no
    matrix product is left out.
    """
    N, L, q = sum(T for T, _ in rows), c.num_hidden_layers, widths(c)[0]
    return {
        "base": 2.0 * N * met(c),
        "lora": 2.0 * N * L * sum(r * (a + b) for a, b in linears(c)),
        "attention": 2.0 * L * q * sum(T * (T + 1) for T, _ in rows),  # 2 products of 2 q T (T + 1) / 2
        "head": 2.0 * sum(C for _, C in rows) * c.hidden_size * c.vocab_size,
    }


def step_flops(
    c: ModelConfig, r: int, rows: Lengths, pairs: Lengths, recompute: str = "none", size: int = 2
) -> dict[str, float]:
    """Operations of one optimiser step, by kind: forward and backward of `rows`, forward of the mismatched `pairs`.

    Backward: as much as forward again for frozen weights (the gradient of the input alone; so also for the head, which
    makes it in its forward), twice for adapters and attention. recompute "full" adds a forward pass without the head
    and, in half precision (size 2 of a weight), without each MLP's last product of one. The reference is not counted.
    """
    policy, extra = forward_flops(c, r, rows), forward_flops(c, r, pairs)
    times = {"base": 2, "lora": 3, "attention": 3, "head": 2}
    again = {"base": 1, "lora": 1, "attention": 1, "head": 0} if recompute == "full" else dict.fromkeys(times, 0)
    found = {kind: (times[kind] + again[kind]) * policy[kind] + extra[kind] for kind in policy}
    last = (c.num_hidden_layers - layers_with_experts(c)) * c.hidden_size * c.intermediate_size
    found["base"] -= (size == 2) * again["base"] * 2.0 * sum(T for T, _ in rows) * last
    return found


# ---------- bytes

CHUNK_BYTES = 320 * 2**20  # most that the logits of one chunk take on a GPU; their gradient lies in the same place
RECOMPUTE = ("none", "cheap", "full")  # what the backward pass makes again: nothing, elementwise results, whole layers


def kept_per_token(c: ModelConfig, r: int, size: int, recompute: str, fused: bool, experts: bool = False) -> int:
    """Bytes that one token leaves in one layer, of one MLP or of experts, for the backward pass.

    size: of a base weight, 2 or 4. Frozen weights keep no inputs; adapters keep one for all layers that read it. fused:
    by the Triton kernels and flash attention over all rows; the torch text keeps norms in fp32, silu(gate), and the
    attention's result twice.
    """
    E, F, (q, kv) = c.hidden_size, c.intermediate_size, widths(c)
    if recompute == "full":
        return size * E  # the layer's input
    routes, adapted, ranks, inner = 0, 2, 7, F  # adapters on both blocks of a layer, and SwiGLU kept for down's
    if c.moe:
        adapted, ranks, inner = 1, 4, 0
        if experts:
            F = inner = c.moe.num_experts_per_tok * c.moe.moe_intermediate_size  # SwiGLU is kept for the weights
            # Probabilities in fp32; of every choice its number, weight, and place among the sorted rows.
            routes = 4 * c.moe.num_experts + 40 * c.moe.num_experts_per_tok
    products = size * (2 * E + (q + 2 * kv) + q + 2 * F + ranks * r)  # x and h; q k v; attention; gate, up; A's outputs
    in_fp32 = 4 * (2 * E + q + kv) * (size == 2 and not fused)  # a norm's input
    if recompute == "cheap":
        return products + routes + in_fp32 + (not fused) * size * (q + F)
    made = size * (adapted * E + (q + 2 * kv) + inner)  # norms; q, k and v after RoPE; SwiGLU
    if fused:
        return products + routes + made
    # x and h are kept in fp32 alone; v passes RoPE as a view.
    return products + routes + made + in_fp32 - (size == 2) * size * 2 * E + size * (q - kv + F)


def memory(
    c: ModelConfig,
    r: int,
    size: int,
    tokens: int,
    predicted: int,
    recompute: str,
    fused: bool,
    no_grad_tokens: int = 0,
    shards: int = 1,
) -> dict[str, float]:
    """Bytes on one GPU at the fullest moment of a step, by part.

    tokens: of one forward pass with a gradient, `predicted` of them completion. no_grad_tokens: of one without.
    shards: GPUs over which the layers are spread.
    """
    n, E, L, mixed = parameters(c, r), c.hidden_size, c.num_hidden_layers, layers_with_experts(c)
    numbers = [(False, L - mixed)] * (mixed < L) + [(True, mixed)] * (mixed > 0)  # of layers without and with experts
    kept = sum(number * kept_per_token(c, r, size, recompute, fused, kind) for kind, number in numbers)
    one_layer = max(
        kept_per_token(c, r, size, "none", fused, kind) - kept_per_token(c, r, size, recompute, fused, kind)
        for kind, _ in numbers
    )
    products = 5 * c.intermediate_size if mixed < L else 0  # of an MLP
    if c.moe:  # of experts: the sorted rows, gate and up, SwiGLU twice, what comes out
        a_choice = 2 * E + 4 * c.moe.moe_intermediate_size
        products = max(products, c.moe.num_experts_per_tok * a_choice)
    q, kv = widths(c)  # adapters that read one input are one of a higher rank, with zeros (lora.stacked)
    zeros = r * (L * 2 * (q + 2 * kv) + (0 if c.moe else L * 2 * c.intermediate_size))
    return {
        "frozen weights": size * (n["layers"] / shards + n["rest"]),
        "gathered layers": size * 2 * n["layers"] / L if shards > 1 else 0,
        "adapters": 4 * n["adapters"],
        "adapters, rounded": (size == 2) * size * (n["adapters"] + zeros),
        # Beside DDP's buckets in the first step, in two sets of buckets in the second; with shards beside their sum.
        "gradients, twice": 8 * n["adapters"],
        "AdamW's moments": 8 * n["adapters"],
        "activations": (kept + one_layer) * tokens,
        "working set of one layer": max(no_grad_tokens, tokens) * size * products,
        "head chunk and its gradient": min(CHUNK_BYTES, 4 * predicted * c.vocab_size) + 2 * size * predicted * E,
    }


def elementwise_bytes(c: ModelConfig, size: int) -> dict[str, dict[str, tuple[int, int]]]:
    """Bytes that a layer's elementwise passes move for one token: part -> pass -> (eager operations, fused kernel).

    Counted are reads and writes of each operation's own tensors, none from a cache. A layer has two sums, each with the
    norm of it; where whole layers are recomputed the second sum is a pass of its own. Eager QK-norm is a norm and a
    product with the scale; RoPE rolls, multiplies twice and adds; the backward pass does the same, and one copy joins
    q, k and v.
    """
    E, F, (q, kv) = c.hidden_size, c.intermediate_size, widths(c)
    heads, every = q + kv, q + 2 * kv
    return {
        "SwiGLU": {"forward": (5 * F * size, 3 * F * size), "backward": (13 * F * size, 5 * F * size)},
        "QK-norm and RoPE": {
            "forward": ((4 * c.qk_norm + 9) * heads * size, 2 * every * size),
            "backward": (((5 * c.qk_norm + 9) * heads + 2 * every) * size, 3 * every * size),
        },
        "residual sums and norms": {
            "forward": (10 * E * size, 8 * E * size),
            "backward": (12 * E * size, 8 * E * size),
        },
    }
