"""Training state on disk, whole or not there: safetensors and a JSON manifest, never a pickle.

A checkpoint is a folder `checkpoint-000120/` with `adapter.safetensors`, `optimizer.safetensors` (AdamW's two moments
per parameter) and `manifest.json` (step, z0 state, the run's identity, a SHA-256 per file). It is written under another
name, synced and renamed, so a killed run leaves the old folders or the new one. The position in the data needs no state
of its own: it follows from the seed and the step (train.step_rows). Nor do random generators: after the adapters have
been made, training draws no random number.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from common.errors import InputError
from common.files import atomic_write, read_json, sha256_file, sync_folder, write_json

KEEP = 2  # newest checkpoints that stay


def save(
    folder: Path,
    step: int,
    parameters: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `folder`/checkpoint-<step>; older ones beyond the newest two go.

    parameters: name -> trained tensor, in the optimizer's order. state: JSON values the caller wants back.
    Raises OSError when the disk does; the older checkpoints are then still there.
    """
    final = folder / f"checkpoint-{step:06d}"
    aside = folder / f".{final.name}.tmp"
    for left in folder.glob(".checkpoint-*.tmp"):  # what a killed run was writing
        shutil.rmtree(left)
    moments = {}
    for name, p in parameters.items():
        # Empty before the first update.
        moments |= {f"{name}.{k}": v for k, v in optimizer.state[p].items()}
    tensors = {"adapter.safetensors": parameters, "optimizer.safetensors": moments}
    for name, content in tensors.items():
        with atomic_write(aside / name, "wb") as f:
            f.write(safetensors_bytes({k: v.detach().cpu().contiguous() for k, v in content.items()}))
    write_json(aside / "manifest.json", {"step": step, **state, "sha256": {n: sha256_file(aside / n) for n in tensors}})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    sync_folder(folder)
    for old in found(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def check_space(folder: Path, parameters: dict[str, torch.Tensor]) -> None:
    """Raise InputError unless the disk has room for one checkpoint more than `save` keeps: it removes last."""
    folder.mkdir(parents=True, exist_ok=True)
    need = (KEEP + 1) * 3 * sum(p.numel() * p.element_size() for p in parameters.values())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB free, checkpoints need {need / 1e9:.1f} GB; free some or give another --out"
        )


def found(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    return sorted(p for p in folder.glob("checkpoint-[0-9]*") if p.is_dir())


def latest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Manifest (with its folder under "path") of the newest whole checkpoint, or None when there is none.

    Raises InputError when it belongs to another run, naming every setting that differs.
    """
    for path in reversed(found(folder)):
        manifest = _whole(path)
        if manifest is None:
            continue
        changed = [k for k in identity if manifest["identity"].get(k) != identity[k]]
        if changed:
            what = ", ".join(f"{k} was {manifest['identity'].get(k)!r}, is {identity[k]!r}" for k in changed)
            raise InputError(f"{path}: cannot resume, the run has changed ({what}); undo that or drop --resume")
        return manifest | {"path": path}
    return None


def _whole(path: Path) -> dict[str, Any] | None:
    """The manifest if it is there and every file has its checksum."""
    try:
        manifest = read_json(path / "manifest.json")
        good = all(sha256_file(path / n) == digest for n, digest in manifest["sha256"].items())
    except (InputError, OSError):
        return None
    return manifest if good else None


def restore(path: Path, parameters: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back into the parameters and the optimizer, bit for bit."""
    saved, moments = load_file(path / "adapter.safetensors"), load_file(path / "optimizer.safetensors")
    assert saved.keys() == parameters.keys(), (saved.keys() ^ parameters.keys(), path)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
            fields = {k: moments[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{k}" in moments}
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in fields.items()}


def identity_of(values: dict[str, Any]) -> dict[str, Any]:
    """`values` as they will look after a trip through JSON, so that a saved identity compares equal."""
    return json.loads(json.dumps(values))
