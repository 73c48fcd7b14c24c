"""Safetensors files of a checkpoint, read one tensor at a time straight to where it will live.

The files are memory-mapped: the host never holds more than about one shard besides what it computes with.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import InputError
from common.files import read_json
from common.hub import member

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHOWN = 20  # tensors that an error names: a mixture of experts has thousands
Part = tuple[str, tuple[int | slice, ...]]  # name of a whole tensor, and which slice of it


def weight_files(path: Path) -> list[Path]:
    """model.safetensors if it is there, otherwise the shards that the index names.

    Raises InputError at a shard that is missing or whose name leads out of the folder, before any is opened.
    """
    single, index = member(path, "model.safetensors"), member(path, "model.safetensors.index.json")
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(
            f"{path}: neither {single.name} nor {index.name} is there; give a folder of safetensors weights"
        )
    listing = read_json(index)
    if not isinstance(listing, dict) or not isinstance(listing.get("weight_map"), dict) or not listing["weight_map"]:
        raise InputError(f"{index}: weight_map is missing or empty; fetch the file again")
    shards = sorted({str(shard) for shard in listing["weight_map"].values()})
    for shard in shards:
        if not shard.endswith(".safetensors"):
            raise InputError(f"{index}: shard {shard!r} is not a *.safetensors name; fetch the file again")
        if not member(path, shard).is_file():
            raise InputError(f"{path / shard}: no such file, but {index.name} names it; fetch the shard")
    return [path / shard for shard in shards]


def read_tensors(
    files: list[Path],
    shapes: dict[str, tuple[int, ...]],
    optional: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
    parts: Mapping[str, Part] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Tensors of safetensors files in `dtype` on `device`: exactly those of `shapes`, and of `optional` what is there.

    The files are mapped, not read: a tensor is copied from the mapping to where it will live, and a file's mapping is
    given up before the next. parts: name in a file -> (name in `shapes`, the slice of it that it is); such a tensor is
    in the files whole, or as all its parts. Raises InputError when a file cannot be read, and, before the first copy,
    one InputError that names the tensors that do not fit, SHOWN of them.
    """
    expected = shapes | optional | {name: _sliced(shapes[whole], at) for name, (whole, at) in parts.items()}
    where, problems = {}, {}
    for file in files:
        with _opened(file) as f:
            for name in f.keys():  # safe_open is no mapping
                entry = f.get_slice(name)
                shape, stored = tuple(entry.get_shape()), entry.get_dtype()
                if name not in expected:
                    problems[name] = "extra"
                elif name in where:
                    problems[name] = "in two files"
                elif shape != expected[name]:
                    problems[name] = f"of shape {shape}, not {expected[name]}"
                elif stored not in DTYPES:
                    problems[name] = f"of dtype {stored}, not one of {', '.join(DTYPES)}"
                else:
                    where[name] = file
    split = {parts[name][0] for name in where if name in parts}
    problems |= {name: "there whole and in parts" for name in split if name in where}
    needed = [n for n in shapes if n not in split] + [n for n, (whole, _) in parts.items() if whole in split]
    problems |= {name: "missing" for name in needed if name not in where and name not in problems}
    if problems:
        listed = "; ".join(f"{name} is {problem}" for name, problem in list(problems.items())[:SHOWN])
        listed += f"; and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
        raise InputError(f"{files[0].parent}: weights do not fit the configuration: {listed}; use the matching files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as f:
            for name in f.keys():
                whole, at = parts.get(name, (name, ()))
                if whole not in tensors:
                    tensors[whole] = torch.empty(expected[whole], dtype=dtype, device=device)
                tensors[whole][at].copy_(f.get_tensor(name))
    return tensors


def _sliced(shape: tuple[int, ...], at: tuple[int | slice, ...]) -> tuple[int, ...]:
    """The shape of a slice of a tensor."""
    return tuple(torch.empty(shape, device="meta")[at].shape)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped on the host. Raises InputError, with both sizes when it is cut short."""
    try:
        with safe_open(file, framework="pt", device="cpu") as f:
            yield f
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: not a readable safetensors file ({error}{_sizes(file)}); fetch or write it again"
        ) from None


def _sizes(file: Path) -> str:
    """Of a file that cannot be read: how long it is and how long its header says it should be, "" if neither is known.

    The format: eight bytes, the length of the header; the header, JSON with the offsets of each tensor; the tensors.
    """
    try:
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(min(length, 100_000_000)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f"; {file.stat().st_size} bytes of {8 + length + max(ends)}"
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ""
