"""The kernels beside the op against their formulas in fp64, forward and backward.

As in test_segment_logprob.py, the Triton text runs where there is CUDA, else in a process under Triton's interpreter.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels.segment_logprob as op
import lora
from common.model_config import ModelConfig
from common.recompute import Remade
from kernels.add_rmsnorm import add_rmsnorm, rmsnorm
from kernels.decode_attention import decode_attention, masks
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_cached
from kernels.swiglu import swiglu
from model import KVCache, Qwen3

HERE = Path(__file__).resolve()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = [("torch", "cpu")]
if torch.cuda.is_available():
    PATHS += [("torch", "cuda"), ("triton", "cuda")]
elif INTERPRETED:
    PATHS += [("triton", "cpu")]
every_path = pytest.mark.parametrize("impl, device", PATHS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def bound(impl: str, dtype: torch.dtype) -> float:
    """Relative error in the norm: Triton rounds once, torch after each of up to five operations.

    One rounding to bf16 is off by .0016 in the root mean square and by 2^-8 at most (`compare`, for a few numbers).
    """
    if dtype == torch.float32:
        return 1e-6
    return 8e-3 if INTERPRETED or impl == "torch" else 2.5e-3  # the interpreter cuts bf16 off instead of rounding


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def compare(run, exact, inputs: list[Tensor], limit: float) -> None:
    """Results of `run`, and its gradients for random ones of the results, are those of `exact` in fp64."""
    answers = []
    for way, dtype in ((run, inputs[0].dtype), (exact, torch.float64)):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = way(*given)
        out = out if isinstance(out, tuple) else (out,)
        g = [draw(*y.shape, dtype=inputs[0].dtype, device="cpu", seed=9 + i).to(y) for i, y in enumerate(out)]
        answers.append([*(y.detach() for y in out), *torch.autograd.grad(out, given, g)])
    for got, true in zip(*answers, strict=True):
        assert got.dtype == inputs[0].dtype and got.shape == true.shape
        error = float((got.double() - true).norm() / true.norm())
        few = 2**-8 if got.dtype == torch.bfloat16 and got.numel() < 64 else 0.0
        assert error < max(limit, few), (error, limit, few)


@every_path
@every_dtype
@pytest.mark.parametrize("N, F", [(1, 5), (7, 96), (3, 1500)])
def test_swiglu(N, F, dtype, impl, device):
    def exact(x: Tensor) -> Tensor:
        gate, up = x[:, :F], x[:, F:]
        return gate / (1 + (-gate).exp()) * up

    x = 3 * draw(N, 2 * F, dtype=dtype, device=device)
    compare(lambda x: swiglu(x, impl=impl), exact, [x], bound(impl, dtype))


@every_path
def test_swiglu_of_large_numbers_is_finite(impl, device):
    """exp(-gate) overflows at gate = -100: the result is 0 there and gate * up at the other end."""
    x = torch.tensor([[-100.0, 100.0, 0.0, 2.0, 2.0, 2.0]], device=device).requires_grad_()
    y = swiglu(x, impl=impl)
    y.sum().backward()
    assert y.tolist() == [[pytest.approx(0, abs=1e-30), 200.0, 0.0]] and x.grad.isfinite().all()
    assert x.grad[0].tolist() == pytest.approx([0, 2, 1, 0, 100, 0], abs=1e-6)  # at 0 the slope of silu is 1/2


@every_path
@every_dtype
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("N, H, G, D", [(1, 1, 1, 4), (9, 4, 2, 16), (3, 7, 1, 24), (2, 32, 8, 128)])
def test_qk_norm_rope(N, H, G, D, normed, dtype, impl, device):
    turn = torch.arange(N)[:, None] * 0.7 + torch.arange(D // 2) * 0.3
    cos, sin = (
        torch.cat((a, b), 1)[:, None].to(device, dtype) for a, b in ((turn.cos(),) * 2, (-turn.sin(), turn.sin()))
    )
    w = [1 + 0.2 * draw(D, dtype=dtype, device=device, seed=i) for i in (1, 2)] if normed else None

    def exact(x: Tensor) -> tuple[Tensor, ...]:
        """Head by head as complex numbers x1 + i x2, turned by c + i s."""
        qk = x[:, : H + G]
        if normed:
            scale = torch.stack([w[0].double()] * H + [w[1].double()] * G)
            qk = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
        c, s = cos[..., : D // 2].double(), sin[..., D // 2 :].double()
        z = torch.complex(qk[..., : D // 2], qk[..., D // 2 :]) * torch.complex(c, s)
        y = torch.cat((z.real, z.imag), -1)
        return y[:, :H], y[:, H:], x[:, H + G :]

    x = draw(N, H + 2 * G, D, dtype=dtype, device=device)
    compare(lambda x: qk_norm_rope(x, w, 1e-6, cos, sin, G, impl), exact, [x], bound(impl, dtype))


@every_path
@every_dtype
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("N, H, G, D", [(1, 1, 1, 4), (5, 4, 2, 16), (3, 7, 1, 24), (2, 32, 8, 128)])
def test_qk_norm_rope_into_a_cache(N, H, G, D, normed, dtype, impl, device):
    """The numbers of the packed path, each token's in its own place; nothing else of the cache is touched."""
    length, slots = 37, N + 1
    qkv, cos, sin = (draw(N, n, D, dtype=dtype, device=device, seed=n) for n in (H + 2 * G, 1, 1))
    w = [1 + 0.2 * draw(D, dtype=dtype, device=device, seed=i) for i in (1, 2)] if normed else None
    positions = torch.tensor([36, 0, 5, 5, 20][:N], device=device)
    q, k, v = qk_norm_rope(qkv, w, 1e-6, cos, sin, G, impl)
    before = [draw(slots, G, length, D, dtype=dtype, device=device, seed=i) for i in (7, 8)]
    cache = [x.clone() for x in before]
    got = qk_norm_rope_cached(qkv, w, 1e-6, cos, sin, *cache, positions, impl)
    assert (got - q).norm() <= bound(impl, dtype) * q.norm()
    for n, at in enumerate(positions.tolist()):
        new = cache[0][n, :, at].clone()
        assert (new - k[n]).norm() <= bound(impl, dtype) * k[n].norm()
        before[0][n, :, at], before[1][n, :, at] = new, v[n]
    assert torch.equal(cache[0], before[0]) and torch.equal(cache[1], before[1])


@every_path
@every_dtype
@pytest.mark.parametrize("H, G, D", [(1, 1, 16), (4, 1, 64), (14, 2, 24), (8, 1, 128), (20, 1, 8)])
def test_decode_attention(H, G, D, dtype, impl, device):
    """Lengths 1, around a block and the whole slot; NaN behind a row's end is not seen by the Triton text."""
    length, B = 320, 6
    positions = torch.tensor([0, 1, 63, 64, 130, 319], device=device)
    q = draw(B, H, D, dtype=dtype, device=device)
    k, v = (draw(B + 1, G, length, D, dtype=dtype, device=device, seed=i) for i in (1, 2))
    s = (q.double().unflatten(1, (G, -1)) @ k[:B].double().transpose(2, 3)) * D**-0.5  # (B, G, H/G, length)
    s.masked_fill_((torch.arange(length, device=device) > positions[:, None])[:, None, None], -math.inf)
    true = (s.softmax(-1) @ v[:B].double()).flatten(1, 2)
    seen = masks(positions, [(4, 128), (2, length)], dtype)
    got = decode_attention(q, k, v, positions, seen, impl)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert got.dtype == dtype and got.shape == true.shape
    assert (got.double() - true).norm() / true.norm() < limit
    if impl == "triton":
        longer = [torch.full((B, G, length + 80, D), torch.nan, dtype=dtype, device=device) for _ in range(2)]
        for b, end in enumerate((positions + 1).tolist()):
            longer[0][b, :, :end], longer[1][b, :, :end] = k[b, :, :end], v[b, :, :end]
        assert torch.equal(decode_attention(q, *longer, positions, None, impl), got)
        alone = [x[3:5].contiguous() for x in (q, k, v, positions)]
        assert torch.equal(decode_attention(*alone, None, impl), got[3:5])


@every_path
@every_dtype
@pytest.mark.parametrize("N, E", [(1, 6), (9, 64), (4, 1000)])
def test_add_rmsnorm(N, E, dtype, impl, device):
    w = 1 + 0.3 * draw(E, dtype=dtype, device=device, seed=3)

    def exact(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        h = x + u
        return h, h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()

    inputs = [draw(N, E, dtype=dtype, device=device, seed=i) for i in (4, 5)]
    # The norm of bf16 rows is that of the rounded sum, so two roundings lie between y and fp64's.
    compare(lambda x, u: add_rmsnorm(x, u, w, 1e-6, impl), exact, inputs, 2 * bound(impl, dtype))
    zero = torch.zeros_like(inputs[0], dtype=torch.float64)
    compare(lambda x: add_rmsnorm(x, None, w, 1e-6, impl), lambda x: exact(x, zero), inputs[:1], bound(impl, dtype))
    h, y = add_rmsnorm(*inputs, w, 1e-6, impl)
    assert torch.equal(rmsnorm(h, w, 1e-6, impl), y)


SHAPE = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2)
SHAPE |= dict(num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True)


@every_path
@every_dtype
def test_what_is_made_again_is_the_first_bit_for_bit(dtype, impl, device, monkeypatch):
    """At "cheap" every norm, RoPE and SwiGLU of a model comes from the same kernel both times."""
    monkeypatch.setattr(op, "default_impl", lambda device: impl)
    torch.manual_seed(0)
    net = Qwen3(ModelConfig(**SHAPE, max_position_embeddings=64, eos_token_id=0)).to(device, dtype)
    masters = lora.add(net, 2, 4.0)
    for p in masters:
        p.data += 0.3 * torch.randn(p.shape).to(device)
    net.stack()
    ids, rows = torch.randint(50, (5,)).to(device), torch.tensor([0, 2, 5])
    first, right = [], Remade.forget

    def noted(self, made, function, *inputs):
        first.append((made, function, inputs))
        right(self, made, function, *inputs)

    monkeypatch.setattr(Remade, "forget", noted)
    gradients = []
    for level in ("none", "cheap", "full"):
        net.recompute = level
        hidden = net(ids, rows)
        gradients.append(torch.autograd.grad(hidden, masters, draw(*hidden.shape, dtype=dtype, device=device)))
    assert [function for _, function, _ in first] == [rmsnorm, qk_norm_rope, rmsnorm, swiglu, rmsnorm]
    nodes = set()
    for made, function, inputs in first:
        with torch.no_grad():
            again = function(*inputs)
        for y, z in zip(*(x if isinstance(x, tuple) else (x,) for x in (made, again)), strict=True):
            assert torch.equal(y, z)
            nodes.add(type(y.grad_fn).__name__)
    fused = {"_AddRMSNormBackward", "_QKNormRopeBackward"}
    fused |= {"_SwiGLUBackward"} if dtype == torch.bfloat16 else set()  # in fp32 gate and up come apart
    assert nodes & fused == (fused if impl == "triton" else set())
    if device == "cpu":  # attention's backward pass adds up in any order on a GPU
        # "full" adds up by torch, which rounds bf16 where the interpreter cuts it off.
        others = gradients[1:] if impl == "torch" or dtype == torch.float32 else gradients[1:2]
        assert all(torch.equal(a, b) for other in others for a, b in zip(gradients[0], other, strict=True))


@every_path
@pytest.mark.parametrize("kind", [{}, {"qk_norm": False, "qkv_bias": True}], ids=["qwen3", "qwen2"])
@torch.no_grad()
def test_decoding_is_the_pass_without_a_cache(kind, impl, device, monkeypatch):
    """Rows of 1, 7 and 4 tokens and a slot that is spare, three tokens more each, by the kernels together."""
    monkeypatch.setattr(op, "default_impl", lambda device: impl)
    torch.manual_seed(0)
    shape = SHAPE | dict(num_attention_heads=4, num_key_value_heads=2) | kind
    net = Qwen3(ModelConfig(**shape, max_position_embeddings=64, eos_token_id=0)).to(device)
    for p in net.parameters():
        p.mul_(8.0 if p.ndim > 1 else 1.0)  # so that attention is not flat
    rows = [torch.randint(50, (n,)).to(device) for n in (1, 7, 4)]
    cache = KVCache(net.config, 4, 12, torch.float32, device)
    net(torch.cat(rows), torch.tensor([0, 1, 8, 12]), cache, torch.arange(3))
    for _ in range(3):
        new = torch.randint(50, (4,)).to(device)
        hidden = net.decode(new, cache.lens.to(device), cache, cache.groups(4))
        cache.lens[:3] += 1
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, new, strict=False)]
        for row, got in zip(rows, hidden, strict=False):
            assert (got - net(row, torch.tensor([0, len(row)]))[-1]).abs().max() < 1e-3
    assert cache.lens.tolist() == [4, 10, 7, 0]


@every_path
def test_no_rows(impl, device):
    assert swiglu(torch.zeros(0, 8, device=device), impl=impl).shape == (0, 4)
    empty = torch.zeros(0, 1, 4, device=device)
    q, k, v = qk_norm_rope(torch.zeros(0, 4, 4, device=device), None, 1e-6, empty, empty, 1, impl)
    assert (q.shape, k.shape, v.shape) == ((0, 2, 4), (0, 1, 4), (0, 1, 4))
    zeros = torch.zeros(0, 8, device=device)
    ones = torch.ones(8, device=device)
    assert [t.shape for t in add_rmsnorm(zeros, zeros, ones, 1e-6, impl)] == [(0, 8), (0, 8)]
    assert rmsnorm(zeros, ones, 1e-6, impl).shape == (0, 8)


def test_hand_worked():
    """silu(ln 3) = 3/4 ln 3. (3, 4) + (0, 0) has mean square 12.5. A quarter turn takes (1, 0) to (0, 1)."""
    assert float(swiglu(torch.tensor([[math.log(3), 8.0]]))) == pytest.approx(6 * math.log(3))
    h, y = add_rmsnorm(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([1.0, 2.0]), 0.0)
    assert h.tolist() == [[3, 4]] and y[0].tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])
    cos, sin = torch.zeros(1, 1, 2), torch.tensor([[[-1.0, 1.0]]])
    q, k, v = qk_norm_rope(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 6.0]]]), None, 0.0, cos, sin, 1)
    assert q.tolist() == [[[0, 1]]] and k.tolist() == [[[-1, 0]]] and v.tolist() == [[[5, 6]]]


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the Triton text runs in this very process")
def test_triton_text_under_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE), "-k", "triton-cpu"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
