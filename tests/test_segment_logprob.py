"""kernels/segment_logprob.py against hand-worked numbers, torch's cross entropy and the eager formula in fp64.

Every test that takes `impl, device` runs for each path this process can run: torch on the CPU, torch and Triton on CUDA
where there is one. Without CUDA, `test_triton_text_under_the_interpreter` runs the Triton cases of this same file in a
process of its own, because Triton reads TRITON_INTERPRET when it is first imported.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import InputError
from kernels import segment_logprob as op

HERE = Path(__file__).resolve()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = [("torch", "cpu")]
if torch.cuda.is_available():
    PATHS += [("torch", "cuda"), ("triton", "cuda")]
elif INTERPRETED:
    PATHS += [("triton", "cpu")]
every_path = pytest.mark.parametrize("impl, device", PATHS)
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Relative error of the gradient: rounding of onehot - p and of R. The interpreter cuts bf16 off instead of rounding.
GRADIENT_ERROR = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2 if INTERPRETED else 4e-3}
GRADIENT_ERROR[torch.float16] = 1e-3


def make(M, E, V, dtype=torch.float32, device="cpu", seed=0, scale=1.0, splits=None):
    """hidden (wants a gradient), weight, targets, w, cu_seqlens; `splits` are the inner boundaries of the sequences."""
    rng = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(M, E, generator=rng)).to(device, dtype).requires_grad_()
    weight = torch.randn(V, E, generator=rng).to(device, dtype)
    targets = torch.randint(0, V, (M,), generator=rng).to(device)
    w = (2 * torch.rand(M, generator=rng)).to(device)
    return hidden, weight, targets, w, torch.tensor([0, *([M // 3] if splits is None else splits), M])


def fp64_answer(hidden, weight, targets, w, cu_seqlens, g_weighted, g_plain):
    """The eager formula and its autograd on the CPU in fp64, from the very same (rounded) inputs."""
    hidden = hidden.detach().cpu().double().requires_grad_()
    sums = op.reference(hidden, weight.cpu().double(), targets.cpu(), w.cpu(), cu_seqlens)
    (gradient,) = torch.autograd.grad(sums, hidden, (g_weighted.double(), g_plain.double()))
    return *(s.detach() for s in sums), gradient


def fast_answer(hidden, weight, targets, w, cu_seqlens, g_weighted, g_plain, impl, chunk):
    sums = op.segment_logprob(hidden, weight, targets, w, cu_seqlens, impl, chunk)
    (gradient,) = torch.autograd.grad(sums, hidden, [g.to(s) for g, s in zip((g_weighted, g_plain), sums, strict=True)])
    assert gradient.dtype == hidden.dtype and sums[0].dtype == op._accumulator(hidden.dtype)
    return *(s.detach().cpu() for s in sums), gradient.cpu().double()


def relative(a, b):
    return float((a - b).norm() / b.norm())


def assert_near(answer, other):
    """Equal but for the order of fp32 sums in BLAS, which may depend on the number of rows and their strides."""
    torch.testing.assert_close(answer[:2], other[:2], rtol=1e-6, atol=5e-5)
    assert relative(answer[2], other[2]) < 3e-6


# ---- values


def test_hand_worked():
    """V = 2, E = 1, logits (0, ln 3): p = (1/4, 3/4). R = W[y] - E_p[W] = ln 3 / 4 for y = 1, -3 ln 3 / 4 for y = 0."""
    hidden = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    w = torch.tensor([2.0, 0.5, 1.0])
    weighted, plain = op.segment_logprob(hidden, weight, torch.tensor([1, 0, 1]), w, torch.tensor([0, 2, 3]), "torch")
    torch.testing.assert_close(weighted.tolist(), [2 * math.log(0.75) + 0.5 * math.log(0.25), math.log(0.75)])
    torch.testing.assert_close(plain.tolist(), [math.log(0.75) + math.log(0.25), math.log(0.75)])
    (10 * weighted[0] + plain[0] - weighted[1]).backward()
    expected = [21 * math.log(3) / 4, -6 * 3 * math.log(3) / 4, -math.log(3) / 4]  # (10 w_t + 1) R_t; -w_t R_t
    torch.testing.assert_close(hidden.grad[:, 0].tolist(), expected)


def test_reference_is_cross_entropy():
    hidden, weight, targets, w, cu = make(20, 6, 50, torch.float64)
    targets[4] = -100
    loss = cross_entropy(hidden @ weight.T, targets, reduction="none")  # 0 where the target is -100
    weighted, plain = op.reference(hidden, weight, targets, w, cu)
    torch.testing.assert_close(plain, -torch.stack([loss[:6].sum(), loss[6:].sum()]))
    torch.testing.assert_close(weighted, -torch.stack([(w * loss)[:6].sum(), (w * loss)[6:].sum()]))


@every_path
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("M, E, V", [(1, 7, 13), (5, 33, 1000), (17, 65, 4099), (3, 48, 9001), (40, 31, 517)])
def test_sums_and_gradient_match_fp64(M, E, V, dtype, impl, device):
    """Odd sizes, a ragged last chunk, an empty sequence, an ignored target, the last token, w = 0, any gradient."""
    hidden, weight, targets, w, cu = make(M, E, V, dtype, device, splits=[M // 3, M // 3])
    targets[M // 2] = V - 1
    targets[M // 4] = -100 if M > 1 else 0
    w[: M // 3] = 0
    g = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    expected = fp64_answer(hidden, weight, targets, w, cu, *g)
    got = fast_answer(hidden, weight, targets, w, cu, *g, impl, chunk=16)
    # fp32 logits of these sizes carry 1e-6; sums of bf16 logits would be off by 0.05.
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=5e-5)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-6, atol=5e-5)
    assert relative(got[2], expected[2]) < GRADIENT_ERROR[dtype]
    assert got[0][1] == got[1][1] == 0  # the empty sequence


@every_path
def test_vocabulary_of_qwen3(impl, device):
    inputs = make(2, 16, 151936, torch.float32, device)
    g = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    expected = fp64_answer(*inputs, *g)
    got = fast_answer(*inputs, *g, impl, chunk=None)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=5e-5)
    assert relative(got[2], expected[2]) < 3e-5  # fp32 sums of 152k terms


def test_gradcheck_fp64():
    hidden, weight, targets, w, cu = make(7, 4, 11, torch.float64, splits=[2, 2])
    targets[3] = -100
    assert torch.autograd.gradcheck(lambda h: op.segment_logprob(h, weight, targets, w, cu, "torch", 3), hidden)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    V=st.integers(1, 40),
    E=st.integers(1, 9),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_lengths_and_chunk(lengths, V, E, chunk, seed):
    cu = torch.tensor([0, *lengths]).cumsum(0)
    hidden, weight, targets, w, _ = make(sum(lengths), E, V, torch.float64, seed=seed, splits=[])
    targets[targets % 5 == 4] = -1
    g = torch.randn(2, len(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = fast_answer(hidden, weight, targets, w, cu, *g, "torch", chunk)
    torch.testing.assert_close(got, fp64_answer(hidden, weight, targets, w, cu, *g), rtol=1e-9, atol=1e-11)


@every_path
def test_all_rows_of_the_head_are_in_the_softmax(impl, device):
    """One hidden state scored against every token: the probabilities sum to 1, beyond any tokenizer's size too."""
    V = 77
    hidden, weight, _, w, _ = make(1, 8, V, torch.float32, device)
    rows, cu = torch.arange(V, device=device), torch.arange(V + 1)
    _, plain = op.segment_logprob(hidden.detach().repeat(V, 1), weight, rows, w.repeat(V), cu, impl, 16)
    assert float(plain.exp().sum()) == pytest.approx(1, abs=1e-6)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, 0.45])
def test_confident_tokens_keep_their_gradient(scale, dtype, impl, device):
    """Targets with p from 0.999 to 1 - 1e-12, each row by itself against fp64: the target's own 1 - p must not cancel.

    1.0 - p would be wrong by 6e-8 / (1 - p): 1 % at p = 1 - 6e-6 whatever the dtype, all of it at 1 - 1e-9. What is
    left is the rounding of onehot - p and of R, in fp32 that of logits up to 40.
    """
    hidden, weight, targets, w, cu = make(64, 64, 500, dtype, device)
    hidden = (scale * weight[targets]).requires_grad_()
    p = (hidden.detach().double() @ weight.double().T).softmax(1)
    rest = p.scatter(1, targets[:, None], 0.0).sum(1, keepdim=True)
    R = (-p).scatter(1, targets[:, None], rest) @ weight.double()
    sure = (rest[:, 0] < 1e-3) & (rest[:, 0] > 1e-12)
    assert int(sure.sum()) > 40 and float(rest[sure].min()) < 1e-7
    ones = torch.ones(2)
    got = fast_answer(hidden, weight, targets, w, cu, ones, ones, impl, 16)[2]
    expected = ((w.double() + 1)[:, None] * R).cpu()
    error = ((got - expected).norm(dim=1) / expected.norm(dim=1))[sure.cpu()]
    rounding = 2e-5 if dtype == torch.float32 else 1.5e-2 if INTERPRETED else 7e-3
    assert float(error.max()) < rounding, (float(error.median()), float(error.max()))


# ---- edges


@every_path
def test_no_rows_at_all(impl, device):
    hidden, weight, targets, w, _ = make(0, 5, 9, torch.float32, device)
    weighted, plain = op.segment_logprob(hidden, weight, targets, w, torch.tensor([0, 0, 0]), impl)
    assert weighted.tolist() == plain.tolist() == [0, 0]
    (weighted.sum() + plain.sum()).backward()
    assert hidden.grad.shape == (0, 5)
    with torch.no_grad():
        weighted, _ = op.segment_logprob(hidden, weight, targets, w, torch.tensor([0, 0]), impl)
    assert weighted.tolist() == [0]


@every_path
def test_zero_weight_and_ignored_rows_get_exactly_no_gradient(impl, device):
    """`.sum().backward()` also hands the backward a gradient of stride 0."""
    hidden, weight, targets, w, cu = make(30, 12, 300, torch.bfloat16, device)
    targets[3], w[5:9], w[20] = -100, 0, 0
    weighted, plain = op.segment_logprob(hidden, weight, targets, w, cu, impl, 8)
    weighted.sum().backward(retain_graph=True)
    none = [3, 5, 6, 7, 8, 20]
    some = [t for t in range(30) if t not in none]
    assert (hidden.grad[none] == 0).all() and (hidden.grad[some] != 0).any(1).all()
    hidden.grad = None
    plain.sum().backward()  # w = 0 counts in the unweighted sum
    assert (hidden.grad[3] == 0).all() and (hidden.grad[[5, 6, 7, 8, 20]] != 0).any(1).all()


@every_path
def test_nan_reaches_its_sequence_and_no_other(impl, device):
    hidden, weight, targets, w, cu = make(12, 8, 300, torch.float32, device, splits=[4, 8])
    clean = op.segment_logprob(hidden, weight, targets, w, cu, impl, 5)
    w[6] = 0  # a weight of 0 does not hide it
    with torch.no_grad():
        hidden[6] = float("nan")
    sums = op.segment_logprob(hidden, weight, targets, w, cu, impl, 5)
    for got, before in zip(sums, clean, strict=True):
        assert got.isnan().tolist() == [False, True, False]
        assert torch.equal(got[[0, 2]], before[[0, 2]])
    targets[6] = -100  # an ignored row does: it is no part of the sum
    weighted, plain = op.segment_logprob(hidden, weight, targets, w, cu, impl, 5)
    (weighted.sum() + plain.sum()).backward()
    assert weighted.isfinite().all() and plain.isfinite().all() and hidden.grad.isfinite().all()
    assert (hidden.grad[6] == 0).all()


@every_path
def test_target_outside_the_vocabulary(impl, device):
    hidden, weight, targets, w, cu = make(6, 8, 300, torch.float32, device)
    targets[2] = 300
    if device == "cpu":
        with pytest.raises(InputError, match="target id 300 is outside the head's 300 rows; use the tokenizer"):
            op.segment_logprob(hidden, weight, targets, w, cu, impl)
    if impl == "triton":  # on CUDA there is no look at the values: the row is NaN, nothing is read out of bounds
        logp, R = op._token_logp(hidden.detach(), weight, targets, impl, 4, want_grad=True)
        assert logp.isnan().tolist() == R.isnan().all(1).tolist() == [t == 2 for t in range(6)]


@every_path
@pytest.mark.parametrize("dtype", FLOATS)
def test_bitwise_equal_with_and_without_gradient(dtype, impl, device):
    inputs = make(11, 24, 1000, dtype, device)
    with_gradient = op.segment_logprob(*inputs, impl, 4)
    with torch.no_grad():
        without = op.segment_logprob(*inputs, impl, 4)
    frozen = op.segment_logprob(inputs[0].detach(), *inputs[1:], impl, 4)
    assert with_gradient[0].requires_grad and not without[0].requires_grad and not frozen[0].requires_grad
    for a, b, c in zip(with_gradient, without, frozen, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@every_path
def test_chunk_size_does_not_matter(impl, device):
    *inputs, g = *make(20, 31, 517, torch.float32, device), torch.tensor([1.0, -1.0])
    first = fast_answer(*inputs, g, g, impl, 20)
    for chunk in (1, 7, 1000):
        assert_near(fast_answer(*inputs, g, g, impl, chunk), first)


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [517, 4096, 9001])
def test_directions_in_place_of_the_logits_have_the_bits_of_a_buffer_of_their_own(V, dtype, impl, device):
    """Less, exactly and more than one block of a row; a chunk's later rows lie behind its first ones."""
    rows = op._rows_triton if impl == "triton" else op._rows_torch
    g, width = torch.Generator().manual_seed(0), -(-V // 16) * 16
    logits = (3 * torch.randn(7, width, generator=g)).to(device)
    y = torch.randint(V, (7,), generator=g).to(device)
    logp, apart = torch.empty(2, 7, device=device), torch.empty(7, width, dtype=dtype, device=device)[:, :V]
    rows(logits.clone()[:, :V], y, logp[0], apart)
    rows(logits[:, :V], y, logp[1], logits.view(dtype)[:, :V])
    assert torch.equal(logp[0], logp[1]) and torch.equal(logits.view(dtype)[:, :V], apart)


@every_path
def test_strided_inputs(impl, device):
    hidden, weight, targets, w, cu = make(12, 8, 300, torch.float32, device)
    wide = torch.stack([hidden.detach(), hidden.detach()], 2)[:, :, 0].requires_grad_()
    strided = wide, weight.T.contiguous().T, targets.repeat_interleave(2)[::2], w.repeat_interleave(2)[::2], cu
    assert not any(x.is_contiguous() for x in strided[:4])
    g = torch.tensor([1.0, 2.0])
    got, plain = (fast_answer(*x, g, g, impl, 5) for x in (strided, (hidden, weight, targets, w, cu)))
    assert_near(got, plain)


@every_path
def test_autocast_does_not_reach_the_logits(impl, device):
    inputs = make(12, 8, 300, torch.float32, device)
    expected = op.segment_logprob(*inputs, impl)
    with torch.autocast(device, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(op.segment_logprob(*inputs, impl), expected, strict=True))


# ---- cost


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the bytes of the largest tensor any operation made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm")
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


@every_path
def test_two_products_with_a_gradient_one_without_and_never_all_logits(impl, device):
    """M = 32 rows in chunks of 8: four products for the logits, four for R, none in the backward."""
    inputs = make(32, 8, 1000, torch.float32, device)
    with Watch() as forward:
        weighted, _ = op.segment_logprob(*inputs, impl, 8)
    with Watch() as backward:
        weighted.sum().backward()
    with torch.no_grad(), Watch() as no_grad:
        op.segment_logprob(*inputs, impl, 8)
    with Watch() as no_need:
        op.segment_logprob(inputs[0].detach(), *inputs[1:], impl, 8)
    assert (forward.products, backward.products, no_grad.products, no_need.products) == (8, 0, 4, 4)
    assert forward.largest <= 8 * 1008 * 4  # one chunk, its rows padded to a multiple of 16 elements
    assert backward.largest <= 32 * 8 * 4


@every_path
def test_backward_twice_and_no_second_derivative(impl, device):
    hidden, *rest = make(9, 8, 300, torch.float32, device)
    weighted, plain = op.segment_logprob(hidden, *rest, impl)
    first = torch.autograd.grad((weighted * plain).sum(), hidden, retain_graph=True)[0]
    again = torch.autograd.grad((weighted * plain).sum(), hidden, retain_graph=True)[0]
    assert torch.equal(first, again)
    (once,) = torch.autograd.grad((weighted * plain).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_default_chunk():
    assert op.default_chunk("cpu", 151936) == 320
    assert op.default_chunk("cuda", 151936) == 512  # 512 * 151936 * 4 bytes = 297 MiB of 320
    assert op.default_chunk("cuda", 32000) == 2560
    assert op.default_chunk("cuda", 10**9) == 128


# ---- refusals


def test_bad_input_is_named():
    hidden, weight, targets, w, cu = make(6, 8, 30)
    with pytest.raises(InputError, match="hidden states are torch.bfloat16, the head is torch.float32; load both"):
        op.segment_logprob(hidden.bfloat16(), weight, targets, w, cu, "torch")
    with pytest.raises(InputError, match="hidden states are torch.int32"):
        op.segment_logprob(hidden.detach().int(), weight.int(), targets, w, cu, "torch")
    with pytest.raises(InputError, match="unknown kernel implementation 'cuda'; use 'torch' or 'triton'"):
        op.segment_logprob(hidden, weight, targets, w, cu, "cuda")
    for bad in ([0, 5], [1, 6], [0, 4, 3, 6], [0]):
        with pytest.raises(AssertionError):
            op.segment_logprob(hidden, weight, targets, w, torch.tensor(bad), "torch")
    with pytest.raises(AssertionError):
        op.segment_logprob(hidden, weight, targets, w.requires_grad_(), cu, "torch")


def test_a_head_that_trains_is_refused_not_ignored():
    hidden, weight, *rest = make(6, 8, 30)
    weight.requires_grad_()
    for h in (hidden, hidden.detach()):
        with pytest.raises(InputError, match=r"freeze it \(weight.requires_grad_\(False\)\)"):
            op.segment_logprob(h, weight, *rest, "torch")
    with torch.no_grad():
        op.segment_logprob(hidden, weight, *rest, "torch")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_triton_is_refused_where_it_cannot_run():
    inputs = make(6, 8, 30)
    with pytest.raises(
        InputError, match="Triton kernels need a CUDA device, these tensors are on cpu; use impl 'torch'"
    ):
        op.segment_logprob(*inputs, "triton")
    assert op.default_impl("cpu") == "torch" and op.default_impl("cuda:1") == "triton"


@every_path
def test_fp64_is_for_torch(impl, device):
    inputs = make(6, 8, 30, torch.float64, device)
    if impl == "triton":
        with pytest.raises(InputError, match="use impl 'torch' for fp64"):
            op.segment_logprob(*inputs, impl)
    else:
        assert op.segment_logprob(*inputs, impl)[0].dtype == torch.float64


def run(*command, **environment) -> str:
    """Standard output of a Python process; its standard error when it fails. A variable that is None is unset."""
    merged = {**os.environ, **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent.parent, env=merged, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_without_triton(monkeypatch):
    """The file imported once more, where `import triton` fails."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", op.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    h, weight, y, w, cu = torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), torch.ones(2), torch.tensor([0, 2])
    assert without.default_impl("cuda") == "torch"
    assert float(without.segment_logprob(h, weight, y, w, cu, "torch")[1]) == pytest.approx(2 * math.log(1 / 4))
    with pytest.raises(
        InputError, match=r"^Triton is not installed; install it \(pip install triton\) or use impl 'torch'$"
    ):
        without.segment_logprob(h, weight, y, w, cu, "triton")


# ---- the Triton text without a GPU


@pytest.mark.long
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_triton_text_under_the_interpreter():
    """The Triton cases of this file, on CPU tensors. Without bound checks, races or alignment: those need a GPU."""
    out = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton-cpu", str(HERE)),
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
    )
    summary = out.splitlines()[-1]
    assert "failed" not in summary and "skipped" not in summary and int(summary.split()[0]) >= 25, out


@pytest.mark.long
@needs_triton
def test_compiles_for_each_gpu_without_spills(tmp_path):
    """sm_80, sm_90, sm_100: no stack, no spills, shared memory in bounds, the big streams loaded 128 bits at a time."""
    out = run(HERE.parent / "compile_kernels.py", TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path))
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100"} and len(rows) == 48
    for row in rows:
        assert row["stack"] == row["local"] == row["spills"] == 0, row
        assert row["shared"] <= (166_912 if row["target"] == "sm_80" else 232_448), row
        assert row["registers"] <= 128, row  # of 65,536: two programs of 256 threads at once, at least
        if row["kernel"] == "segment_logprob._direction_kernel":  # all threads have read before one writes
            assert row["order"] == "LDG BAR STG", row
        if row["kernel"] != "segment_logprob._segment_sum_kernel":  # its sequences start anywhere
            assert row["loads"].get("128", 0) + row["loads"].get("256", 0) >= 1, row
