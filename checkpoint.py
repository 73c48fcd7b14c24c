"""Training state on disk, whole or not there: safetensors and a JSON manifest, never a pickle.

A checkpoint is a folder `checkpoint-000120/` with `adapter.safetensors`, `optimizer.safetensors` (AdamW's two moments
per parameter) and `manifest.json` (step, z0 state, the run's identity, a SHA-256 per file). It is written under another
name, synced and renamed, so a killed run leaves the old folders or the new one. The data order needs no state: it
follows from the seed and the step (train.step_rows). No dropout, so no random state either.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from files import InputError, read_json, sha256_file, sync_folder, write_json

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
    """
    final = folder / f"checkpoint-{step:06d}"
    aside = folder / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in parameters.items()}, aside / "adapter.safetensors")
    moments = {}
    for name, p in parameters.items():
        s = optimizer.state[p]
        moments |= {f"{name}.{k}": s[k].detach().cpu().contiguous() for k in ("step", "exp_avg", "exp_avg_sq")}
    save_file(moments, aside / "optimizer.safetensors")
    names = ("adapter.safetensors", "optimizer.safetensors")
    for name in names:
        with open(aside / name, "rb+") as f:
            os.fsync(f.fileno())
    write_json(aside / "manifest.json", {"step": step, **state, "sha256": {n: sha256_file(aside / n) for n in names}})
    sync_folder(aside)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    sync_folder(folder)
    for old in found(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


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
            fields = {k: moments[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in fields.items()}


def identity_of(values: dict[str, Any]) -> dict[str, Any]:
    """`values` as they will look after a trip through JSON, so that a saved identity compares equal."""
    return json.loads(json.dumps(values))
