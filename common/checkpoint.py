"""Training state on disk, whole or not there: safetensors and a JSON manifest, never a pickle.

A checkpoint is a folder `checkpoint-000120/` with `adapter.safetensors`, `optimizer.safetensors` (AdamW's two moments
per parameter), `metrics.jsonl` (the rows of its 120 steps) and `manifest.json` (step, what else the method must know,
the run's identity, a SHA-256 per file). It is written under another name, synced and renamed, so a killed run leaves
the old folders or the new one. The position in the data needs no state of its own: it follows from the seed and the
step (train.step_rows). Nor do random generators: after the adapters have been made, training draws no random number.

A folder whose files are not what was written is damaged. It is named, never used and never removed (`set_aside`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from common.errors import InputError
from common.files import atomic_write, read_json, sha256_file, sync_folder, write_json, write_jsonl

KEEP = 2  # newest checkpoints that stay
ADAPTER, MOMENTS = "adapter.safetensors", "optimizer.safetensors"
METRICS, MANIFEST = "metrics.jsonl", "manifest.json"


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `folder`/checkpoint-<step>; older ones beyond the newest two go.

    parameters: name -> trained tensor, in the optimizer's order. state: JSON values the caller wants back. log: the
    metrics of all steps so far, a row a step. Raises OSError when the disk does; the older checkpoints are then still
    there.
    """
    final = folder / f"checkpoint-{step:06d}"
    aside = folder / f".{final.name}.tmp"
    for left in folder.glob(".checkpoint-*.tmp"):  # what a killed run was writing or removing
        shutil.rmtree(left)
    moments: dict[str, torch.Tensor] = {}
    for name, p in parameters.items():
        # Empty before the first update.
        moments |= {f"{name}.{k}": v for k, v in optimizer.state[p].items()}
    tensors = {ADAPTER: parameters, MOMENTS: moments}
    for name, content in tensors.items():
        with atomic_write(aside / name, "wb") as f:
            f.write(safetensors_bytes({k: v.detach().cpu().contiguous() for k, v in content.items()}))
    write_jsonl(aside / METRICS, log)
    sums = {name: sha256_file(aside / name) for name in (*tensors, METRICS)}
    facts = identity_of({"step": step, **state})
    write_json(aside / MANIFEST, {**facts, "sha256": sums | {MANIFEST: _digest(facts)}})
    if final.exists():
        remove(final)
    os.replace(aside, final)
    sync_folder(folder)
    for old in found(folder)[:-KEEP]:
        remove(old)
    return final


def remove(path: Path) -> None:
    """Remove a checkpoint. It loses its name first: one that is half removed must not look like a damaged one."""
    left = path.with_name(f".{path.name}.old.tmp")
    os.replace(path, left)
    shutil.rmtree(left)


def set_aside(paths: Iterable[Path]) -> list[Path]:
    """Rename damaged checkpoints, so that nothing writes over them: checkpoint-000120 -> damaged-checkpoint-000120."""
    kept = []
    for path in paths:
        target, k = path.with_name(f"damaged-{path.name}"), 1
        while target.exists():
            k += 1
            target = path.with_name(f"damaged-{path.name}-{k}")
        os.replace(path, target)
        kept.append(target)
    return kept


def check_space(folder: Path, parameters: Mapping[str, torch.Tensor]) -> None:
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


def latest(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Manifest of the newest whole checkpoint, None when there is no checkpoint at all.

    Two entries are added: "path", its folder, and "damaged", the newer folders that are not whole -> what is wrong.
    Raises InputError when it belongs to another run, naming every setting that differs, and when all are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(found(folder)):
        if reason := damage(path):
            damaged[path] = reason
            continue
        manifest = read_json(path / MANIFEST)
        changed = [k for k in identity if manifest["identity"].get(k) != identity[k]]
        if changed:
            what = ", ".join(f"{k} was {manifest['identity'].get(k)!r}, is {identity[k]!r}" for k in changed)
            raise InputError(f"{path}: cannot resume, the run has changed ({what}); undo that or drop --resume")
        return manifest | {"path": path, "damaged": damaged}
    if damaged:
        what = ", ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise InputError(
            f"{folder}: every checkpoint is damaged ({what}); restore one, or drop --resume to start at step 1"
        )
    return None


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's files, "" when each is what was written."""
    try:
        facts = read_json(path / MANIFEST)
        written = facts.pop("sha256")
        sums = {name: sha256_file(path / name) for name in (ADAPTER, MOMENTS, METRICS)} | {MANIFEST: _digest(facts)}
        bad = [name for name, digest in sums.items() if written.get(name) != digest]
    except (InputError, OSError) as error:
        return str(error).partition("; ")[0]
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a checkpoint's"
    return f"{bad[0]} is not what was written" if bad else ""


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def restore(path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back into the parameters and the optimizer, bit for bit."""
    saved, moments = load_file(path / ADAPTER), load_file(path / MOMENTS)
    assert saved.keys() == parameters.keys(), (saved.keys() ^ parameters.keys(), path)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
            fields = {k: moments[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{k}" in moments}
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in fields.items()}


def identity_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as they will look after a trip through JSON, so that a saved identity compares equal."""
    return json.loads(json.dumps(values))
