"""SwiGLU: y = silu(gate) * up, with silu(z) = z / (1 + exp(-z)), on (N, 2 F) rows that hold gate and up side by side.

    dL/d gate = dL/dy * up * s * (1 + gate * (1 - s)),  s = 1 / (1 + exp(-gate))
    dL/d up   = dL/dy * gate * s

Only the (N, 2 F) input is kept; eager torch keeps silu(gate) too, reads and writes it once more each way, and joins the
two gradients by another copy. The Triton text computes in fp32 and rounds once; the torch text rounds silu(gate) too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segment_logprob import NARROW, elementwise_impl, triton

BLOCK = 1024  # elements a Triton program handles at once

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _forward_kernel(X, Y, F, BLOCK: tl.constexpr):
        """One program a row and block of columns. X: (N, 2 F) rows of gate, up. Y: (N, F)."""
        row = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(X + row * 2 * F + cols, mask=cols < F, other=0.0).to(tl.float32)
        up = tl.load(X + row * 2 * F + F + cols, mask=cols < F, other=0.0).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(Y + row * F + cols, y.to(Y.dtype.element_ty), mask=cols < F)

    @triton.jit
    def _backward_kernel(X, DY, DX, F, BLOCK: tl.constexpr):
        """The same grid. DY: (N, F). DX: (N, 2 F)."""
        row = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(X + row * 2 * F + cols, mask=cols < F, other=0.0).to(tl.float32)
        up = tl.load(X + row * 2 * F + F + cols, mask=cols < F, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * F + cols, mask=cols < F, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-gate))
        d_gate = dy * up * s * (1.0 + gate * (1.0 - s))
        tl.store(DX + row * 2 * F + cols, d_gate.to(DX.dtype.element_ty), mask=cols < F)
        tl.store(DX + row * 2 * F + F + cols, (dy * gate * s).to(DX.dtype.element_ty), mask=cols < F)


def swiglu(gate_up: Tensor, up: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """(N, 2 F), gate before up, to (N, F) in the same dtype; or the two apart. impl: None is `elementwise_impl`."""
    if up is not None:
        return F.silu(gate_up) * up
    if (impl or elementwise_impl(gate_up)) == "torch":
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    with torch.cuda.device_of(gate_up):
        return _SwiGLU.apply(gate_up.contiguous())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        N, half = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(N, half)
        if N:  # CUDA refuses an empty grid
            _forward_kernel[(N, triton.cdiv(half, BLOCK))](gate_up, y, half, BLOCK, **NARROW)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        N, half = dy.shape
        dx, dy = torch.empty_like(gate_up), dy.contiguous()
        if N:
            with torch.cuda.device_of(dy):
                _backward_kernel[(N, triton.cdiv(half, BLOCK))](gate_up, dy, dx, half, BLOCK, **NARROW)
        return dx
