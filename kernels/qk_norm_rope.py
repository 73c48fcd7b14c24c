"""Queries, keys and values of one (N, H + 2 G, D) product: heads of q and k normalised (Qwen3) and turned by RoPE.

For a head x (D,) of q or k, scale w (D,), with halves written 1 and 2 and the position's cosine c and sine s (D/2,):

    r = 1 / sqrt(mean(x^2) + eps)                 n = x * r * w                            (n = x without a norm)
    y1 = n1 * c - n2 * s                          y2 = n2 * c + n1 * s
    dn1 = dy1 * c + dy2 * s                       dn2 = dy2 * c - dy1 * s
    dx = r * (dn * w - x * r * mean(dn * w * x * r))

Heads of v pass through, so that the three come out as tensors of their own and their gradients go into one: eager torch
makes eight passes over the heads each way and joins gradients by another. Kept is the product alone; the scales are
frozen. The Triton text computes in fp32 and rounds once, the torch text after each operation. In decoding, k and v go
straight to their place in the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segment_logprob import NARROW, elementwise_impl, triton

HEADS = 16  # a Triton program takes the same number of heads of one token

Triple = tuple[Tensor, Tensor, Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its angle. x: (N, heads, D); cos, sin: (N, 1, D) of `model.angles`."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def _torch(qkv: Tensor, scales: tuple[Tensor, Tensor] | None, eps: float, cos: Tensor, sin: Tensor, G: int) -> Triple:
    H, D = qkv.shape[1] - 2 * G, qkv.shape[2]
    qk, v = qkv.split((H + G, G), dim=1)
    if scales is not None:
        qk = F.rms_norm(qk, (D,), eps=eps) * torch.cat((scales[0].expand(H, -1), scales[1].expand(G, -1)))
    q, k = rotate(qk, cos, sin).split((H, G), dim=1)
    return q, k, v


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _heads(Q, K, V, row, h, i, H, G, length, position, HALF: tl.constexpr):
        """Where the first halves of these heads lie in q, k and v, and which head is in which.

        A head of k and v has `length` positions, this token's is `position`: 1 and 0 unless they are a cache.
        """
        at_q = Q + (row * H + h) * 2 * HALF + i
        at_k = K + ((row * G + h - H) * length + position) * 2 * HALF + i
        at_v = V + ((row * G + h - H - G) * length + position) * 2 * HALF + i
        return at_q, at_k, at_v, h < H, (h >= H) & (h < H + G), (h >= H + G) & (h < H + 2 * G)

    @triton.jit
    def _normed(X, WQ, WK, row, h, i, ok, H, G, eps, HALF: tl.constexpr, NORM: tl.constexpr):
        """x * r and w of both halves in fp32, and r: of these heads."""
        x = X + (row * (H + 2 * G) + h) * 2 * HALF + i
        x1 = tl.load(x, mask=ok, other=0.0).to(tl.float32)
        x2 = tl.load(x + HALF, mask=ok, other=0.0).to(tl.float32)
        r = tl.sum(x1 * 0.0, 1) + 1.0
        w1 = x1 * 0.0 + 1.0
        w2 = w1
        if NORM:
            r = 1.0 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)
            w1 = tl.where(h < H, tl.load(WQ + i).to(tl.float32), tl.load(WK + i).to(tl.float32))
            w2 = tl.where(h < H, tl.load(WQ + HALF + i).to(tl.float32), tl.load(WK + HALF + i).to(tl.float32))
        return x1, x2, r[:, None], w1, w2

    @triton.jit
    def _forward_kernel(
        X, WQ, WK, COS, SIN, Q, K, V, POSITIONS, length, H, G, eps, HALF: tl.constexpr, WIDTH: tl.constexpr,
        HEADS: tl.constexpr, NORM: tl.constexpr, CACHED: tl.constexpr,
    ):  # fmt: skip
        """One program a token and HEADS heads. X: (N, H + 2 G, D); COS, SIN: (N, D); WIDTH: HALF's power of two.

        CACHED: K and V are (slots, G, length, D) and take token n at POSITIONS[n] of slot n; else (N, G, D), length 1.
        """
        row = tl.program_id(0).to(tl.int64)
        h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
        i = tl.arange(0, WIDTH)[None, :] % HALF if WIDTH != HALF else tl.arange(0, WIDTH)[None, :]
        inside = tl.arange(0, WIDTH)[None, :] < HALF
        ok = (h < H + 2 * G) & inside
        x1, x2, r, w1, w2 = _normed(X, WQ, WK, row, h, i, ok, H, G, eps, HALF, NORM)
        n1, n2 = x1 * r * w1, x2 * r * w2
        c = tl.load(COS + row * 2 * HALF + i).to(tl.float32)
        s = tl.load(SIN + row * 2 * HALF + HALF + i).to(tl.float32)
        y1, y2 = n1 * c - n2 * s, n2 * c + n1 * s
        position = tl.load(POSITIONS + row) if CACHED else 0
        at_q, at_k, at_v, is_q, is_k, is_v = _heads(Q, K, V, row, h, i, H, G, length, position, HALF)
        kind = Q.dtype.element_ty
        tl.store(at_q, y1.to(kind), mask=is_q & inside)
        tl.store(at_q + HALF, y2.to(kind), mask=is_q & inside)
        tl.store(at_k, y1.to(kind), mask=is_k & inside)
        tl.store(at_k + HALF, y2.to(kind), mask=is_k & inside)
        tl.store(at_v, x1.to(kind), mask=is_v & inside)
        tl.store(at_v + HALF, x2.to(kind), mask=is_v & inside)

    @triton.jit
    def _backward_kernel(
        X, WQ, WK, COS, SIN, DQ, DK, DV, DX, H, G, eps, HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
        NORM: tl.constexpr,
    ):  # fmt: skip
        """The same grid; DX: (N, H + 2 G, D)."""
        row = tl.program_id(0).to(tl.int64)
        h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
        i = tl.arange(0, WIDTH)[None, :] % HALF if WIDTH != HALF else tl.arange(0, WIDTH)[None, :]
        inside = tl.arange(0, WIDTH)[None, :] < HALF
        ok = (h < H + 2 * G) & inside
        at_q, at_k, at_v, is_q, is_k, is_v = _heads(DQ, DK, DV, row, h, i, H, G, 1, 0, HALF)
        dy1 = tl.load(at_q, mask=is_q & inside, other=0.0).to(tl.float32)
        dy2 = tl.load(at_q + HALF, mask=is_q & inside, other=0.0).to(tl.float32)
        dy1 += tl.load(at_k, mask=is_k & inside, other=0.0).to(tl.float32)
        dy2 += tl.load(at_k + HALF, mask=is_k & inside, other=0.0).to(tl.float32)
        c = tl.load(COS + row * 2 * HALF + i).to(tl.float32)
        s = tl.load(SIN + row * 2 * HALF + HALF + i).to(tl.float32)
        x1, x2, r, w1, w2 = _normed(X, WQ, WK, row, h, i, ok, H, G, eps, HALF, NORM)
        d1, d2 = (dy1 * c + dy2 * s) * w1, (dy2 * c - dy1 * s) * w2
        if NORM:
            a1, a2 = x1 * r, x2 * r
            mean = (tl.sum(d1 * a1, 1) + tl.sum(d2 * a2, 1))[:, None] / (2 * HALF)
            d1, d2 = r * (d1 - a1 * mean), r * (d2 - a2 * mean)
        d1 += tl.load(at_v, mask=is_v & inside, other=0.0).to(tl.float32)
        d2 += tl.load(at_v + HALF, mask=is_v & inside, other=0.0).to(tl.float32)
        dx = DX + (row * (H + 2 * G) + h) * 2 * HALF + i
        tl.store(dx, d1.to(DX.dtype.element_ty), mask=ok)
        tl.store(dx + HALF, d2.to(DX.dtype.element_ty), mask=ok)


def qk_norm_rope(
    qkv: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    G: int,
    impl: str | None = None,
) -> Triple:
    """(N, H + 2 G, D), heads of q before k before v, to q (N, H, D), k and v (N, G, D) in the same dtype.

    scales: of the norms of q and k, (D,) each; None for a model without. cos, sin: (N, 1, D) of `model.angles`, the
    sine's first half negative. impl: None is `elementwise_impl`.
    """
    if (impl or elementwise_impl(qkv, *(scales or ()))) == "torch":
        return _torch(qkv, scales, eps, cos, sin, G)
    with torch.cuda.device_of(qkv):
        return _QKNormRope.apply(qkv.contiguous(), scales, eps, cos.contiguous(), sin.contiguous(), G)


def qk_norm_rope_cached(
    qkv: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    impl: str | None = None,
) -> Tensor:
    """The same of one token for each of the slots 0..N-1 of a cache, without a gradient: q (N, H, D) comes back.

    k, v: (slots, G, max_len, D), contiguous; the token's go to its place in `positions`, (N,) int64 below max_len.
    """
    G = k.shape[1]
    if (impl or elementwise_impl(qkv, *(scales or ()))) == "torch":
        q, new_k, new_v = _torch(qkv, scales, eps, cos, sin, G)
        slots = torch.arange(len(qkv), device=qkv.device)
        k[slots, :, positions], v[slots, :, positions] = new_k, new_v
        return q
    assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape, (k.shape, v.shape)
    assert k.dtype == v.dtype == qkv.dtype, (k.dtype, v.dtype, qkv.dtype)
    q = qkv.new_empty(len(qkv), qkv.shape[1] - 2 * G, qkv.shape[2])
    with torch.cuda.device_of(qkv):
        given = qkv.contiguous(), scales, eps, cos.contiguous(), sin.contiguous(), G
        _launch(_forward_kernel, *given, q, k, v, positions.contiguous(), k.shape[2], cached=(True,))
    return q


def _launch(kernel, qkv: Tensor, scales, eps: float, cos: Tensor, sin: Tensor, G: int, *tensors, cached=()) -> None:
    N, heads, D = qkv.shape
    if N:  # CUDA refuses an empty grid
        grid, width = (N, triton.cdiv(heads, HEADS)), triton.next_power_of_2(D // 2)
        wq, wk = scales or (cos, cos)  # not read without a norm
        sizes = heads - 2 * G, G, eps, D // 2, width, HEADS, scales is not None
        kernel[grid](qkv, wq, wk, cos, sin, *tensors, *sizes, *cached, **NARROW)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, scales, eps, cos, sin, G):
        ctx.save_for_backward(qkv, cos, sin)
        ctx.rest = scales, eps, G
        N, heads, D = qkv.shape
        q, k, v = (qkv.new_empty(N, n, D) for n in (heads - 2 * G, G, G))
        _launch(_forward_kernel, qkv, scales, eps, cos, sin, G, q, k, v, q, 1, cached=(False,))
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        qkv, cos, sin = ctx.saved_tensors
        scales, eps, G = ctx.rest
        dx = torch.empty_like(qkv)
        with torch.cuda.device_of(qkv):
            gradients = dq.contiguous(), dk.contiguous(), dv.contiguous()
            _launch(_backward_kernel, qkv, scales, eps, cos, sin, G, *gradients, dx)
        return dx, None, None, None, None, None
