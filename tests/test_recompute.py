"""Tensors that are made again in the backward pass: same gradients, less kept, views and repeated passes."""

import gc

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from common.recompute import Remade


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
