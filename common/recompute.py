"""Cheap results are not kept for the backward pass: they are made again from what is kept anyway.

    with Remade() as remade:
        y = swiglu(gate_up)
        remade.forget(y, swiglu, gate_up)     # whoever saves y, or a view of it, saves how to make it
        z = down(y)
    z.sum().backward()                        # runs swiglu(gate_up) once more

It is gradient checkpointing of single tensors. `torch.utils.checkpoint` makes a whole block again, with its matrix
products; here these are kept, and only elementwise passes run twice. A function must give the same result every time,
in the same memory layout, and its inputs must not be changed in place. Left out: random functions, torch.compile (its
partitioner makes this choice by itself).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Call:
    """A function with its inputs; what it makes is held from the first use in a backward pass to the last."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self.function = function
        self.inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        self.saved = self.used = 0  # how often results were saved, how many of these have been asked for
        self.made: tuple[Tensor, ...] | None = None

    def result(self, which: int) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                made = self.function(*self.inputs)
            self.made = made if isinstance(made, tuple) else (made,)
        found = self.made[which]
        self.used += 1
        if self.used % self.saved == 0:
            self.made = None
        return found


class Remade(torch.autograd.graph.saved_tensors_hooks):
    """Inside, autograd keeps no tensor that `forget` was told how to make."""

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        # Weak references, so that a forgotten tensor is freed, and its address stays taken until they go.
        self.calls: dict[StorageWeakRef, tuple[_Call, int]] = {}

    def __enter__(self) -> "Remade":  # type: ignore[override]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.calls.clear()  # the hooks and this object hold each other: else the inputs lived until a collection

    def forget(self, made: Tensor | tuple[Tensor, ...], function: Callable[..., Any], *inputs: Any) -> None:
        """`made`, a tensor or a tuple, is what `function(*inputs)` returns. Results that are views of an input stay."""
        call = _Call(function, inputs)
        held = {StorageWeakRef(x.untyped_storage()) for x in inputs if isinstance(x, Tensor)}
        for which, y in enumerate(made if isinstance(made, tuple) else (made,)):
            storage = StorageWeakRef(y.untyped_storage())
            if storage not in held:
                self.calls.setdefault(storage, (call, which))

    def _pack(self, x: Tensor) -> Any:
        found = self.calls.get(StorageWeakRef(x.untyped_storage()))
        if found is None:
            return x
        call, which = found
        call.saved += 1
        return call, which, x.shape, x.stride(), x.storage_offset()

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        call, which, *view = packed
        return call.result(which).as_strided(*view)
