"""Segment-weighted log-probabilities of a frozen language-model head, without the (M, V) logits.

For M completion tokens packed from B sequences (sequence b holds rows cu_seqlens[b] to cu_seqlens[b + 1]):

    x_t    = weight @ hidden_t                        (V,)  logits
    logp_t = x_t[y_t] - logsumexp(x_t)                      log-probability of the target y_t
    weighted[b] = sum_t w_t * logp_t                        policy or reference half of the reward, Eq. 9
    plain[b]    = sum_t logp_t                              the same with w = 1, Eq. 1

The gradient of one token needs one direction only, and it does not depend on the loss:

    R_t  = d logp_t / d hidden_t = (onehot(y_t) - p_t) @ weight = weight[y_t] - E_p[weight]
    dL/d hidden_t = (w_t * dL/d weighted[b] + dL/d plain[b]) * R_t

Why fused. The naive way keeps several (M, V) tensors: with V = 151,936, 8,192 tokens cost 17 to 20 GB. Here C rows at
a time pass through: BLAS writes their logits in fp32, one kernel reads them once (online logsumexp, target), one turns
them into onehot - p, and BLAS makes R while the chunk is at hand. So the forward already holds the whole gradient
(R, M x E) and the backward is one row scale, whatever the weights and the loss:

    bf16 model               matrix products   bytes moved a logit   bytes held
    naive, full logits       2                 about 40              10 to 14 * M * V
    here, gradient wanted    2                 16                    4 * C * V + 2 * M * E
    here, no gradient        1                 8                     4 * C * V

16 = logits written 4, read 4 for logp and 4 for onehot - p, which is written 2 and read 2 by the second product. It is
written where the logits are, each row at the front of its own, so that the second product reads every other half row.

Precision. Logits, logsumexp, log-probabilities and sums are fp32 for fp32, bf16 and fp16 inputs (fp64 for fp64), and
both terms of logp_t come from the same logits: bf16 ones would cost about 0.3 nat over 4,000 tokens. onehot - p is made
in fp32 and rounded to the input type afterwards; R is kept in the input type. The target's 1 - p is the sum of the
other tokens' p: subtracted, it would have an error of 6e-8 / (1 - p), all of it at p = 1 - 6e-8, and every number of
R_t is a multiple of 1 - p. In fp16, p < 6e-8 is 0.

Repeatability. No atomics: every sum has a fixed order. logp comes from the same matrix product and the same kernel with
and without a gradient, so it is bitwise equal; two adapters that agree give a log-ratio of exactly 0 when they see the
same packed batch with the same `chunk` (BLAS may round differently for another number of rows).

Left out: a head that trains (an error here), a bias, soft-capping, a temperature, label smoothing, double backward.
"""

import torch
from torch import Tensor

from common.costs import CHUNK_BYTES
from common.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU come without it; impl="triton" then raises
    triton = None

CPU_CHUNK = 320  # rows; fewer make slower products, more gain little and cost memory
BLOCK, SUM_BLOCK, SCALE_BLOCK = 4096, 1024, 1024  # elements a Triton program handles at once
# fp_fusion is named because Triton's default differs between versions, and with it the last bit.
WIDE = dict(num_warps=8, enable_fp_fusion=False)
NARROW = dict(num_warps=4, enable_fp_fusion=False)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in eager torch with full (M, V) logits and ordinary autograd: the oracle of the paths below."""
    exact = _accumulator(hidden.dtype)
    logits = hidden.to(exact) @ weight.to(exact).T  # (M, V)
    logp = logits.log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]  # (M,)
    return _segment_sums_torch(logp.where(targets >= 0, 0.0), w, cu_seqlens)


if triton is not None:

    @triton.jit
    def _logp_kernel(X, Y, LOGP, MAX, SUM, REST, stride, V: tl.constexpr, BLOCK: tl.constexpr):
        """One program a row of logits X: LOGP = x_y - logsumexp(x).

        For the next kernel MAX, and of exp(x - MAX) the SUM over all tokens and the REST, over all but the target.
        """
        row = tl.program_id(0).to(tl.int64)  # rows * stride can pass 2^31
        y = tl.load(Y + row)
        cols = tl.arange(0, BLOCK)
        at = y.to(tl.int32)
        # One running maximum and sum a lane: shorter chains, so less rounding, and no exchange between threads in the
        # loop. The maximum starts finite, because -inf - -inf is NaN.
        m = tl.full([BLOCK], -3.0e38, tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for i in range(0, V, BLOCK):
            x = tl.load(X + row * stride + i + cols, mask=i + cols < V, other=-float("inf"))
            m_new = tl.maximum(m, x)
            sums = sums * tl.exp(m - m_new) + tl.where(i + cols == at, 0.0, tl.exp(x - m_new))
            m = m_new
        largest = tl.max(m, 0)
        rest = tl.sum(sums * tl.exp(m - largest), 0)
        # A target outside the vocabulary must not be read: its row becomes NaN, here and in the next kernel.
        rest = tl.where(y < V, rest, float("nan"))
        x_y = tl.load(X + row * stride + y, mask=(y >= 0) & (y < V), other=-float("inf"))
        s = rest + tl.exp(x_y - largest)
        tl.store(LOGP + row, (x_y - largest) - tl.log(s))
        tl.store(MAX + row, largest)
        tl.store(SUM + row, s)
        tl.store(REST + row, rest)

    @triton.jit
    def _direction_kernel(X, Y, MAX, SUM, REST, G, stride_x, stride_g, V: tl.constexpr, BLOCK: tl.constexpr):
        """One program a row: G = onehot(y) - p, made in fp32 and then rounded to G's type.

        A row of G may lie at the front of its row of X. Block by block from the left, what is written is never wider
        than what was read, and the barrier lets no thread write before all have read the block.
        """
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        at = tl.load(Y + row).to(tl.int32)
        largest = tl.load(MAX + row)
        a_share = 1.0 / tl.load(SUM + row)
        of_target = tl.load(REST + row) * a_share  # 1 - p of the target, without subtracting
        for i in range(0, V, BLOCK):
            x = tl.load(X + row * stride_x + i + cols, mask=i + cols < V, other=0.0)
            p = tl.exp(x - largest) * a_share
            g = tl.where(i + cols == at, of_target, -p)
            tl.debug_barrier()
            tl.store(G + row * stride_g + i + cols, g.to(G.dtype.element_ty), mask=i + cols < V)

    @triton.jit
    def _segment_sum_kernel(LOGP, W, CU, WEIGHTED, PLAIN, BLOCK: tl.constexpr):
        """One program a sequence, lanes stride through its rows, one tree sum at the end: no atomics, a fixed order."""
        b = tl.program_id(0)
        i = tl.load(CU + b)
        end = tl.load(CU + b + 1)
        weighted = tl.zeros([BLOCK], tl.float32)
        plain = tl.zeros([BLOCK], tl.float32)
        while i < end:
            t = i + tl.arange(0, BLOCK)
            logp = tl.load(LOGP + t, mask=t < end, other=0.0)
            weighted += tl.load(W + t, mask=t < end, other=0.0) * logp  # Eq. 9
            plain += logp
            i += BLOCK
        tl.store(WEIGHTED + b, tl.sum(weighted, 0))
        tl.store(PLAIN + b, tl.sum(plain, 0))

    @triton.jit
    def _row_scale_kernel(R, W, SEQUENCE, G_WEIGHTED, G_PLAIN, OUT, E, BLOCK: tl.constexpr):
        """One program a row and block: OUT = (G_WEIGHTED[b] * w_t + G_PLAIN[b]) * R_t, the whole backward."""
        row = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        b = tl.load(SEQUENCE + row)
        g = tl.load(G_WEIGHTED + b) * tl.load(W + row) + tl.load(G_PLAIN + b)
        r = tl.load(R + row * E + cols, mask=cols < E, other=0.0).to(tl.float32)
        tl.store(OUT + row * E + cols, (g * r).to(OUT.dtype.element_ty), mask=cols < E)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (C, V) = h (C, E) @ weight.T, accumulated and kept in out's dtype."""
    if h.dtype == out.dtype:
        torch.mm(h, weight.T, out=out)
    elif h.is_cuda:
        torch.mm(h, weight.T, out_dtype=out.dtype, out=out)
    else:  # CPU BLAS has no bf16 @ bf16 -> fp32: upcast the weight, a slice of the vocabulary at a time
        h = h.to(out.dtype)
        for v in range(0, len(weight), 8192):
            out[:, v : v + 8192] = h @ weight[v : v + 8192].to(out.dtype).T


def _rows_torch(logits: Tensor, y: Tensor, logp: Tensor, G: Tensor | None) -> None:
    """logp (C,) of the targets y (C,) and, unless None, G (C, V) = onehot(y) - p, whose rows may lie in the logits'.

    Rows with y < 0 hold anything: the caller clears them.
    """
    known = y.clamp(min=0)[:, None]
    # Few rows keep the temporary small and near the cache; of a small vocabulary more fit there. The bits are the same.
    step = max(4, 2**17 // logits.shape[1]) if logits.device.type == "cpu" else 128
    for i in range(0, len(y), step):
        rows = slice(i, i + step)
        x = logits[rows].log_softmax(1)
        logp[rows] = x.gather(1, known[rows])[:, 0]
        if G is not None:
            g = G[rows] if G.dtype == x.dtype else x
            torch.exp(x, out=g).neg_().scatter_(1, known[rows], 0.0)
            g.scatter_(1, known[rows], -g.sum(1, keepdim=True))  # 1 - p of the target: what the others have
            if g is x:
                G[rows] = x  # rounded now


def _rows_triton(logits: Tensor, y: Tensor, logp: Tensor, G: Tensor | None) -> None:
    """The same as `_rows_torch`, by the kernels above."""
    C, V = logits.shape
    largest, total, rest = (torch.empty_like(logp) for _ in range(3))
    _logp_kernel[(C,)](logits, y, logp, largest, total, rest, logits.stride(0), V, BLOCK, **WIDE)
    if G is not None:
        strides = logits.stride(0), G.stride(0)
        _direction_kernel[(C,)](logits, y, largest, total, rest, G, *strides, V, BLOCK, **WIDE)


def _token_logp(
    hidden: Tensor, weight: Tensor, targets: Tensor, impl: str, chunk: int, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """logp (M,) and, if wanted, the directions R (M, E): one loop over chunks of rows, their buffer used again."""
    (M, E), V = hidden.shape, len(weight)
    logp = hidden.new_empty(M, dtype=_accumulator(hidden.dtype))
    R = hidden.new_empty(M, E) if want_grad else None
    width = -(-V // 16) * 16  # rows start on 16-byte borders whatever V is, so that loads are 128 bits wide
    logits = logp.new_empty(min(chunk, M), width)
    G = logits.view(hidden.dtype)[:, :V] if want_grad else None  # where the logits lie
    logits = logits[:, :V]
    make_rows = _rows_triton if impl == "triton" else _rows_torch
    for i in range(0, M, chunk):
        rows = slice(i, i + chunk)
        y = targets[rows]
        x, g = logits[: len(y)], None if G is None else G[: len(y)]
        _logits(hidden[rows], weight, x)
        make_rows(x, y, logp[rows], g)
        if R is not None and g is not None:
            torch.mm(g, weight, out=R[rows])
    ignored = targets < 0
    logp.masked_fill_(ignored, 0.0)
    if R is not None:
        R.masked_fill_(ignored[:, None], 0.0)
    return logp, R


def _segment_sums_torch(logp: Tensor, w: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    lengths = cu_seqlens.diff().tolist()
    weighted, plain = (torch.stack([s.sum() for s in x.split(lengths)]) for x in (w.to(logp.dtype) * logp, logp))
    return weighted, plain


def _segment_sums(logp: Tensor, w: Tensor, cu_seqlens: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """weighted (B,) and plain (B,) of logp (M,); a sequence without rows sums to 0."""
    if impl == "torch":
        return _segment_sums_torch(logp, w, cu_seqlens)
    weighted, plain = (logp.new_empty(len(cu_seqlens) - 1) for _ in range(2))
    cu_seqlens = cu_seqlens.to(logp.device, non_blocking=True)
    _segment_sum_kernel[(len(weighted),)](logp, w, cu_seqlens, weighted, plain, SUM_BLOCK, **NARROW)
    return weighted, plain


def _row_scale(R: Tensor, w: Tensor, sequence: Tensor, g_weighted: Tensor, g_plain: Tensor, impl: str) -> Tensor:
    """(g_weighted[b] * w_t + g_plain[b]) * R_t in fp32, rounded to R's dtype once."""
    if impl == "torch":
        g = g_weighted[sequence] * w + g_plain[sequence]  # (M,)
        return (g[:, None] * R).to(R.dtype)
    M, E = R.shape
    out = torch.empty_like(R)
    if M:  # CUDA refuses an empty grid
        # The gradient of a .sum() is one number with stride 0; the kernel wants B of them.
        g_weighted, g_plain = g_weighted.contiguous(), g_plain.contiguous()
        grid = (M, triton.cdiv(E, SCALE_BLOCK))
        _row_scale_kernel[grid](R, w, sequence, g_weighted, g_plain, out, E, SCALE_BLOCK, **NARROW)
    return out


class _SegmentLogprob(torch.autograd.Function):
    """The forward makes the gradient's directions, the backward scales them. Reached only when one is wanted."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, w, cu_seqlens, impl, chunk):
        logp, R = _token_logp(hidden, weight, targets, impl, chunk, want_grad=True)
        sequence = torch.repeat_interleave(cu_seqlens.diff()).to(hidden.device, non_blocking=True)  # (M,) b of row t
        ctx.save_for_backward(R, w, sequence)
        ctx.impl = impl
        return _segment_sums(logp, w, cu_seqlens, impl)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_weighted, g_plain):
        R, w, sequence = ctx.saved_tensors
        return _row_scale(R, w, sequence, g_weighted, g_plain, ctx.impl), None, None, None, None, None, None


def default_impl(device: torch.device | str) -> str:
    """ "triton" on a CUDA device where Triton is installed, else "torch". Whoever calls this prints the answer once."""
    return "triton" if torch.device(device).type == "cuda" and triton is not None else "torch"


def elementwise_impl(x: Tensor, *scales: Tensor) -> str:
    """Which text of the elementwise kernels beside this file runs on x: "triton" as above, but "torch" for fp64, where
    a scale is trained (they make it no gradient) and under torch.compile, which fuses the torch text by itself."""
    trained = torch.is_grad_enabled() and any(scale.requires_grad for scale in scales)
    if trained or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return "torch"
    return default_impl(x.device)


def default_chunk(device: torch.device | str, V: int) -> int:
    """Rows of one pass: 320 on the CPU; on CUDA as many whole 128 as CHUNK_BYTES hold fp32 logits of, at least one."""
    return CPU_CHUNK if torch.device(device).type == "cpu" else max(128, CHUNK_BYTES // (4 * V) // 128 * 128)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, cu_seqlens: Tensor, impl: str) -> None:
    (M, E), V = hidden.shape, len(weight)
    assert weight.shape == (V, E) and targets.shape == w.shape == (M,), (hidden.shape, weight.shape, targets.shape)
    assert targets.dtype == cu_seqlens.dtype == torch.int64, (targets.dtype, cu_seqlens.dtype)
    assert cu_seqlens.device.type == "cpu" and len(cu_seqlens) > 1, (cu_seqlens.device, cu_seqlens.shape)
    ends = cu_seqlens.tolist()
    assert ends[0] == 0 and ends[-1] == M and ends == sorted(ends), (ends, M)
    assert hidden.device == weight.device == targets.device == w.device, (hidden.device, weight.device, targets.device)
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise InputError(
            f"hidden states are {hidden.dtype}, the head is {weight.dtype}; load both as one of fp32, bf16 and fp16"
        )
    assert w.dtype in (torch.float32, _accumulator(hidden.dtype)) and not w.requires_grad, (w.dtype, w.requires_grad)
    if torch.is_grad_enabled() and weight.requires_grad:
        raise InputError(
            "the head's weight wants a gradient, which segment_logprob does not make; "
            "freeze it (weight.requires_grad_(False)) or train with the full logits"
        )
    if M and targets.device.type == "cpu" and int(targets.max()) >= V:
        raise InputError(
            f"target id {int(targets.max())} is outside the head's {V} rows; use the tokenizer made for this model"
        )
    if impl == "triton":
        _check_triton(hidden)
    elif impl != "torch":
        raise InputError(f"unknown kernel implementation {impl!r}; use 'torch' or 'triton'")


def _check_triton(hidden: Tensor) -> None:
    if triton is None:
        raise InputError("Triton is not installed; install it (pip install triton) or use impl 'torch'")
    compiled = isinstance(_logp_kernel, triton.JITFunction)  # else the interpreter: TRITON_INTERPRET=1 at import
    if compiled and not hidden.is_cuda:
        raise InputError(f"Triton kernels need a CUDA device, these tensors are on {hidden.device}; use impl 'torch'")
    if hidden.dtype == torch.float64:
        raise InputError("the Triton kernels compute in fp32; use impl 'torch' for fp64")


def segment_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    impl: str,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Per sequence b: sum_t w_t * log p(y_t) (Eq. 9's half) and sum_t log p(y_t), differentiable in `hidden`.

    hidden (M, E) and weight (V, E), one dtype of fp32, bf16, fp16 (fp64 with impl "torch"); weight is frozen. Pass only
    the rows whose target counts. All V rows of weight are in the softmax, also those no token of the tokenizer has.
    targets (M,) int64, already shifted: y_t follows hidden_t; y_t < 0 gives logp 0 and no gradient.
    w (M,) fp32 constants. A row with w = 0 counts in `plain` only.
    cu_seqlens (B + 1,) int64 on the CPU, from 0 to M, B >= 1; a sequence may be empty (sums 0).
    impl "torch" or "triton", see `default_impl`. chunk: rows at a time, None = `default_chunk`.

    Returns weighted (B,), plain (B,): fp32, fp64 for fp64 inputs. NaN in a row of hidden reaches its sequence's sums.
    Raises InputError: dtypes differ, weight wants a gradient, Triton cannot run here, a target >= V. Targets on CUDA
    are not read back (it would stall the device): "triton" makes such a row NaN, "torch" trips CUDA's own assertion.
    Check them on the CPU while packing.
    """
    _check(hidden, weight, targets, w, cu_seqlens, impl)
    if chunk is None:
        chunk = default_chunk(hidden.device, len(weight))
    assert chunk > 0, chunk
    targets, w = targets.contiguous(), w.contiguous()
    # Autocast would undo the fp32 logits; Triton launches on the current device.
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        # Asked here because inside apply() a tensor seems to want its gradient even under no_grad.
        if torch.is_grad_enabled() and hidden.requires_grad:
            return _SegmentLogprob.apply(hidden, weight, targets, w, cu_seqlens, impl, chunk)
        with torch.no_grad():
            logp, _ = _token_logp(hidden, weight, targets, impl, chunk, want_grad=False)
            return _segment_sums(logp, w, cu_seqlens, impl)
