"""The residual sum and its norm: h = x + u, y = h * r * w with r = 1 / sqrt(mean(h^2) + eps), over rows (N, E).

    dh = dL/dh + r * (dy * w - h * r * mean(dy * w * h * r))          dx = du = dh

h is read once for both results; kept are h, which the next block reads anyway, and r (N,). The scale w is frozen. The
Triton text computes in fp32 from the sum as it is stored, so that y is the norm of the very h that is handed on, and
the norm of a sum that is there already (`rmsnorm`) is y bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segment_logprob import WIDE, elementwise_impl, triton

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _forward_kernel(X, U, W, H, Y, R, E, eps, SUM: tl.constexpr, BLOCK: tl.constexpr):
        """One program a row; BLOCK >= E. Without SUM h is x, and U and H are not touched."""
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        h = tl.load(X + row * E + cols, mask=cols < E, other=0.0).to(tl.float32)
        if SUM:
            u = tl.load(U + row * E + cols, mask=cols < E, other=0.0).to(tl.float32)
            stored = (h + u).to(H.dtype.element_ty)
            tl.store(H + row * E + cols, stored, mask=cols < E)
            h = stored.to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(h * h, 0) / E + eps)
        w = tl.load(W + cols, mask=cols < E, other=0.0).to(tl.float32)
        tl.store(Y + row * E + cols, (h * r * w).to(Y.dtype.element_ty), mask=cols < E)
        tl.store(R + row, r)

    @triton.jit
    def _backward_kernel(H, W, R, DH, DY, DX, E, BLOCK: tl.constexpr):
        """One program a row; BLOCK >= E."""
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        r = tl.load(R + row)
        a = tl.load(H + row * E + cols, mask=cols < E, other=0.0).to(tl.float32) * r
        dy = tl.load(DY + row * E + cols, mask=cols < E, other=0.0).to(tl.float32)
        d = dy * tl.load(W + cols, mask=cols < E, other=0.0).to(tl.float32)
        dh = tl.load(DH + row * E + cols, mask=cols < E, other=0.0).to(tl.float32)
        dx = dh + r * (d - a * (tl.sum(d * a, 0) / E))
        tl.store(DX + row * E + cols, dx.to(DX.dtype.element_ty), mask=cols < E)


def add_rmsnorm(x: Tensor, u: Tensor | None, w: Tensor, eps: float, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """x, u (N, E) to the sum h (N, E) and its norm times w (E,), all of one dtype. Without u the sum is x.

    impl: None is `elementwise_impl`.
    """
    if (impl or elementwise_impl(x, w)) == "torch":
        h = x if u is None else x + u
        return h, F.rms_norm(h, (x.shape[-1],), w, eps)
    with torch.cuda.device_of(x):
        return _AddRMSNorm.apply(x.contiguous(), None if u is None else u.contiguous(), w, eps)


def rmsnorm(h: Tensor, w: Tensor, eps: float, impl: str | None = None) -> Tensor:
    """The second result of `add_rmsnorm` from the first, bit for bit."""
    return add_rmsnorm(h, None, w, eps, impl)[1]


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, w, eps):
        N, E = x.shape
        h = x if u is None else torch.empty_like(x)
        y, r = torch.empty_like(x), x.new_empty(N, dtype=torch.float32)
        if N:  # CUDA refuses an empty grid
            block = triton.next_power_of_2(E)
            _forward_kernel[(N,)](x, x if u is None else u, w, h, y, r, E, eps, u is not None, block, **WIDE)
        ctx.save_for_backward(h, w, r)
        ctx.sum = u is not None
        return h, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh, dy):
        h, w, r = ctx.saved_tensors
        dx, (N, E) = torch.empty_like(h), h.shape
        if N:
            with torch.cuda.device_of(h):
                block = triton.next_power_of_2(E)
                _backward_kernel[(N,)](h, w, r, dh.contiguous(), dy.contiguous(), dx, E, block, **WIDE)
        return dx, dx if ctx.sum else None, None, None
