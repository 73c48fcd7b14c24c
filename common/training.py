"""What training loops need beside their step: memory that runs out is named, frozen layers are spread over ranks."""

import contextlib
import resource
from collections.abc import Callable, Iterator

import torch
from torch import nn

from common.errors import MemoryFull
from common.ranks import Ranks


@contextlib.contextmanager
def memory_named(message: Callable[[], str]) -> Iterator[None]:
    """Inside, running out of memory raises MemoryFull with `message()`, one line: at which rows, and what to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise MemoryFull(message()) from None


def peak_memory(device: torch.device) -> str:
    """The most memory in use so far, in words: "31.2 of 40.0 GB" of a GPU, "3.1 GB" of this process."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} of {total / 1e9:.1f} GB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"


def shard(model: nn.Module, trained: list[nn.Parameter], ranks: Ranks) -> None:
    """Leave on each rank its part of every layer's frozen weights, gathered again for the time the layer computes.

    model: on the CPU or on the ranks' device; what is not sharded (train.py says what) goes to the device whole.
    """
    from torch.distributed.device_mesh import init_device_mesh  # seconds to import, and rarely needed
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    layers = model.model.layers
    whole = set(model.parameters()) - set(layers.parameters()) | set(trained)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    for p in whole:
        p.data = p.data.to(ranks.device)
    # FSDP moves all arguments to the device; the boundaries of rows are read on the CPU.
    model.register_forward_pre_hook(lambda _, args: (args[0], args[1].cpu()))
