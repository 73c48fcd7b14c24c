"""Tensors that are made again in the backward pass: same gradients, less kept, views and repeated passes."""

import gc

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from common.model_config import ModelConfig
from common.recompute import Remade
from model import Qwen3


class Counted:
    """silu, and how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        return F.silu(x)


def test_a_forgotten_tensor_is_made_again_once_for_all_who_saved_it():
    torch.manual_seed(0)
    x, A, B = (torch.randn(8, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gradients, silu = [], Counted()
    for forget in (False, True):
        with Remade() as remade:
            y = silu(x)
            if forget:
                remade.forget(y, silu, x)
            loss = (y @ A).sum() + (y.view(4, 16) @ B.view(16, 4)).square().sum()
        gradients.append(torch.autograd.grad(loss, (x, A, B), retain_graph=forget))
    assert silu.runs == 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    again = torch.autograd.grad(loss, (x, A, B))  # the graph was kept: it is made once more
    assert silu.runs == 4 and all(torch.equal(a, b) for a, b in zip(again, gradients[0], strict=True))


def test_forgotten_memory_is_freed_at_once():
    x = torch.randn(16, 64, requires_grad=True)
    W = torch.randn(64, 64, requires_grad=True)
    with Remade() as remade:
        y = F.silu(x)
        remade.forget(y, F.silu, x)
        loss = (y @ W).sum()
        gone = StorageWeakRef(y.untyped_storage())
        del y
        assert gone.expired()
        fresh = F.silu(x)  # may lie where y lay; nobody forgot it
        other = (fresh @ W).sum()
    torch.testing.assert_close(*(torch.autograd.grad(z, W)[0] for z in (loss, other)), rtol=0, atol=0)


def test_several_results_and_views_of_an_input():
    """As q, k and v: two halves of one new storage, and a view of the input, which stays."""

    def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (x[:, :4].exp()).split(2, dim=1)
        return a, b, x[:, 4:]

    torch.manual_seed(1)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    W = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    gradients = []
    for forget in (False, True):
        with Remade() as remade:
            parts = split(x)
            if forget:
                remade.forget(parts, split, x)
                assert len(remade.calls) == 1
            loss = sum((k + 1) * (part @ W).square().sum() for k, part in enumerate(parts))
        gradients.append(torch.autograd.grad(loss, (x, W)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_outlives_the_backward_pass():
    """Without a collection: cycles would hold a pass's activations into the next one."""
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(16, 64, requires_grad=True)
        W = torch.randn(64, 64, requires_grad=True)
        with Remade() as remade:
            inner = x @ W
            y = F.silu(inner)
            remade.forget(y, F.silu, inner)
            loss = (y @ W).sum()
        storage = StorageWeakRef(inner.untyped_storage())
        del inner, y
        assert not storage.expired()  # it is what silu(inner) is made from
        loss.backward()
        del loss
        assert storage.expired()
    finally:
        gc.enable()


def test_a_layer_made_again_leaves_out_its_last_product():
    """In bf16 the down projection's weight meets a product once forward and once backward, as without recomputation."""
    torch.manual_seed(3)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1e4)
    net = Qwen3(ModelConfig(**shape, max_position_embeddings=64, eos_token_id=0)).bfloat16()
    masters = lora.add(net, 4, 8.0)
    net.stack()
    down = {id(layer.mlp.down_proj.weight) for layer in net.model.layers}
    products, gradients = [], []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function) and (80 in args[-1].shape and 32 in args[-1].shape):
                products.append(function)
            return function(*args, **(kwargs or {}))

    for net.recompute in ("none", "full"):
        products.clear()
        with Products():
            hidden = net(torch.arange(20), torch.tensor([0, 9, 20]))
            gradients.append(torch.autograd.grad(hidden.float().square().sum(), masters))
        assert len(products) == 2 * len(down)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
