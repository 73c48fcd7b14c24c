"""Attention of one new token a row against its slot of the cache.

For query head h of a row at position p, the key head g = h // (H/G) and scale a = 1 / sqrt(D):

    s_t = a * q_h . k_g,t      for t = 0..p                      out_h = sum_t exp(s_t) v_g,t / sum_t exp(s_t)

The torch text reads as many positions as the longest of a group of rows has and masks the rest. The Triton text takes
one row and key head a program, all query heads of that key head together, and reads the p + 1 positions that the row
has, p from the device: a CUDA graph that holds it fits every length, and a row's result depends on nothing but the row.
Products are of the cache's dtype (fp32 by fp32 products, never TF32), sums and softmax in fp32, block by block with a
running maximum.

Left out: a split of long rows over several programs. 16 rows of 8 key heads already give 128 of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segment_logprob import NARROW, elementwise_impl, triton

TILE = 16384  # bytes of keys a program reads at once, and as many of values
Masks = list[tuple[slice, Tensor]]  # rows, and 0 or -inf for them: (rows, 1, 1, width)


def masks(positions: Tensor, groups: list[tuple[int, int]], dtype: torch.dtype) -> Masks:
    """What the torch text needs. positions: (B,) of the new tokens; groups: (number of rows, width) of each in turn."""
    out, start = [], 0
    for size, width in groups:
        rows = slice(start, start + size)
        hidden = (torch.arange(width, device=positions.device) > positions[rows, None])[:, None, None]
        out.append((rows, torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)))
        start += size
    return out


def _torch(q: Tensor, k: Tensor, v: Tensor, seen: Masks) -> Tensor:
    # The query heads that share a key head stand where SDPA expects positions, so no key is ever repeated.
    q = q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))  # (B, G, H/G, D)
    out = []
    for rows, mask in seen:
        read = (rows, slice(None), slice(mask.shape[-1]))
        out.append(F.scaled_dot_product_attention(q[rows], k[read], v[read], attn_mask=mask))
    return (torch.cat(out) if len(out) > 1 else out[0]).flatten(1, 2)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _kernel(
        Q, K, V, POSITIONS, OUT, length, scale, SHARED: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
        WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
    ):  # fmt: skip
        """One program a row and key head. Q, OUT: (B, G, SHARED, D); K, V: (slots, G, length, D); POSITIONS: (B,).

        HEADS and WIDTH: SHARED and D as tl.dot wants them, powers of two from 16 on.
        """
        head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        end = (tl.load(POSITIONS + tl.program_id(0)) + 1).to(tl.int32)
        h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        at = head * SHARED * D + h * D + d
        q = tl.load(Q + at, mask=(h < SHARED) & (d < D), other=0.0)
        if WIDEN:
            q = q.to(tl.float32)
        m = tl.full([HEADS], -float("inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        out = tl.zeros([HEADS, WIDTH], tl.float32)
        for i in range(0, end, BLOCK):
            t = i + tl.arange(0, BLOCK)
            place = head * length * D + t[:, None] * D + d
            there = (t[:, None] < end) & (d < D)
            k = tl.load(K + place, mask=there, other=0.0)
            v = tl.load(V + place, mask=there, other=0.0)
            if WIDEN:
                k, v = k.to(tl.float32), v.to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(t[None, :] < end, s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shrunk, p = tl.exp(m - m_new), tl.exp(s - m_new[:, None])
            total = total * shrunk + tl.sum(p, 1)
            out = out * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            m = m_new
        tl.store(OUT + at, (out / total[:, None]).to(OUT.dtype.element_ty), mask=(h < SHARED) & (d < D))


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, seen: Masks | None, impl: str | None = None
) -> Tensor:
    """(B, H, D) of the new tokens of slots 0..B-1. q: (B, H, D); k, v: (slots, G, max_len, D), the new ones in place.

    positions: (B,) int64 below max_len, where the new tokens are. seen: `masks` of them; only the torch text reads it.
    impl: None is `elementwise_impl`.
    """
    if (impl or elementwise_impl(q)) == "torch":
        assert seen is not None, "the torch text needs masks"
        return _torch(q, k, v, seen)
    (B, H, D), (_, G, length, _) = q.shape, k.shape
    assert k.is_contiguous() and v.is_contiguous() and positions.is_contiguous()
    q = q.contiguous()
    out = torch.empty_like(q)
    heads, width = (max(16, triton.next_power_of_2(n)) for n in (H // G, D))
    # The interpreter multiplies the bits of bf16; fp32 stays fp32.
    widen = q.dtype == torch.float32 or not isinstance(_kernel, triton.JITFunction)
    sizes = H // G, D, heads, width, block_of(width, q.element_size()), widen
    with torch.cuda.device_of(q):
        _kernel[(B, G)](q, k, v, positions, out, length, D**-0.5, *sizes, **NARROW)
    return out


def block_of(width: int, size: int) -> int:
    """Positions read at once, of heads of `width` numbers of `size` bytes."""
    return min(128, max(16, TILE // (width * size)))
