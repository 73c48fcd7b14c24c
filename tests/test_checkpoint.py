"""Checkpoints under faults: whichever write, sync or rename fails, an old or the new state loads, whole."""

import builtins
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from common import checkpoint, files
from common.errors import InputError
from common.files import read_json, read_jsonl, write_json


class Faults:
    """Counts the operations that reach the disk and makes the k-th fail, after half of it where it is a write."""

    def __init__(self, monkeypatch, fail_at: int, number: int) -> None:
        self.seen, self.fail_at, self.number = 0, fail_at, number
        for module, name in ((os, "fsync"), (os, "replace"), (os, "open")):
            monkeypatch.setattr(module, name, self.guarded(getattr(module, name)))
        monkeypatch.setattr(files, "open", self.open, raising=False)

    def due(self) -> bool:
        self.seen += 1
        return self.seen == self.fail_at

    def guarded(self, real):
        def call(*args, **kwargs):
            if self.due():
                raise OSError(self.number, os.strerror(self.number))
            return real(*args, **kwargs)

        return call

    def open(self, path, mode="r", **options):
        if "w" in mode and self.due():
            raise OSError(self.number, os.strerror(self.number), str(path))
        f = builtins.open(path, mode, **options)
        if "w" in mode:
            whole, due, number = f.write, self.due, self.number

            class Half:
                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    f.close()

                def __getattr__(self, name):
                    return getattr(f, name)

                def write(self, content):
                    if due():
                        whole(content[: len(content) // 2])
                        f.flush()
                        raise OSError(number, os.strerror(number))
                    return whole(content)

            return Half()
        return f


def state(step: int):
    """Two parameters and an optimizer after `step` steps, different at each."""
    torch.manual_seed(step)
    parameters = {name: torch.nn.Parameter(torch.randn(3, 4)) for name in ("a", "b")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for p in parameters.values():
        p.grad = torch.randn(3, 4)
    optimizer.step()
    return parameters, optimizer


def rows_of(step: int) -> list[dict]:
    return [{"step": k + 1, "loss": 1 / (k + 2)} for k in range(step)]


def save(folder: Path, step: int, **identity) -> None:
    parameters, optimizer = state(step)
    facts = {"identity": identity or {"x": 1}, "z0_state": step / 7}
    checkpoint.save(folder, step, parameters, optimizer, facts, rows_of(step))


def check_latest(folder: Path, allowed: tuple[int, ...]) -> int:
    """The newest whole checkpoint, its tensors bit for bit those of its step."""
    manifest = checkpoint.latest(folder, {"x": 1})
    assert manifest is not None and manifest["step"] in allowed, manifest
    assert manifest["z0_state"] == manifest["step"] / 7
    assert read_jsonl(manifest["path"] / "metrics.jsonl") == rows_of(manifest["step"])
    want, want_optimizer = state(manifest["step"])
    got, got_optimizer = state(99)
    checkpoint.restore(manifest["path"], got, got_optimizer)
    for name in want:
        assert torch.equal(got[name], want[name])
        for field in ("step", "exp_avg", "exp_avg_sq"):
            saved = got_optimizer.state[got[name]][field]
            assert torch.equal(saved, want_optimizer.state[want[name]][field])
    return manifest["step"]


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.long)])
def test_whichever_disk_operation_fails_the_old_or_the_new_checkpoint_loads(tmp_path, number):
    """Every open, write, sync and rename of a save is made to fail in turn, until a save passes untouched."""
    outcomes, before = [], tmp_path / "before"
    save(before, 1)
    save(before, 2)
    for k in range(1, 10_000):
        folder = tmp_path / f"{k}"
        shutil.copytree(before, folder)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, k, number)
            failed = False
            try:
                save(folder, 3)
            except OSError as error:
                failed = True
                assert error.errno == number
        outcomes.append(check_latest(folder, (2, 3)))
        assert failed or faults.seen < k
        save(folder, 4)  # and the run goes on, with nothing left over
        assert check_latest(folder, (4,)) == 4
        assert len(checkpoint.found(folder)) == 2 and not list(folder.glob(".checkpoint-*"))
        shutil.rmtree(folder)
        if not failed:
            break
    assert len(outcomes) > 20 and set(outcomes) == {2, 3}  # many points of failure, on both sides of the rename


FILES = ("adapter.safetensors", "optimizer.safetensors", "metrics.jsonl", "manifest.json")


def test_a_file_that_lost_its_tail_or_changed_a_byte_is_passed_over_and_named(tmp_path):
    save(tmp_path / "before", 1)
    save(tmp_path / "before", 2)
    for k, damage in enumerate(
        (
            lambda b: b[:-3],
            lambda b: b"",
            lambda b: bytes([b[0] ^ 1]) + b[1:],
            lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],
        )
    ):
        for name in FILES:
            folder = tmp_path / f"{k}{name}"
            shutil.copytree(tmp_path / "before", folder)
            path = folder / "checkpoint-000002" / name
            path.write_bytes(damage(path.read_bytes()))
            assert check_latest(folder, (1,)) == 1
            ((bad, reason),) = checkpoint.latest(folder, {"x": 1})["damaged"].items()
            assert bad == path.parent and name in reason, reason


def test_a_step_written_into_the_manifest_by_hand_is_damage(tmp_path):
    """Its own fields have a checksum too: 2 -> 1 is still valid JSON."""
    save(tmp_path, 2)
    manifest = tmp_path / "checkpoint-000002" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"step": 1})
    assert checkpoint.damage(manifest.parent) == "manifest.json is not what was written"
    for wrong in ([], {}, {"sha256": 3}):
        write_json(manifest, wrong)
        assert checkpoint.damage(manifest.parent) == "manifest.json is not a checkpoint's"


def test_when_every_checkpoint_is_damaged_each_is_named_and_all_stay(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoint-000001" / "metrics.jsonl").unlink()
    (tmp_path / "checkpoint-000002" / "adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(
        InputError, match="000002: adapter.safetensors is not.*000001: .*metrics.jsonl: no such file.*drop"
    ):
        checkpoint.latest(tmp_path, {"x": 1})
    assert checkpoint.latest(tmp_path / "nothing", {"x": 1}) is None
    (tmp_path / "damaged-checkpoint-000002").mkdir()  # of an earlier time
    kept = checkpoint.set_aside(checkpoint.found(tmp_path))
    assert [p.name for p in kept] == ["damaged-checkpoint-000001", "damaged-checkpoint-000002-2"]
    assert (kept[1] / "adapter.safetensors").read_bytes() == b"torn" and not checkpoint.found(tmp_path)


def test_a_checkpoint_that_is_half_removed_does_not_look_damaged(tmp_path, monkeypatch):
    """A kill while the oldest is being removed: what is left of it has lost its name, and the next save clears it."""
    save(tmp_path, 1)
    save(tmp_path, 2)

    def killed(path, **options):
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        save(tmp_path, 3)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["checkpoint-000002", "checkpoint-000003"]
    assert check_latest(tmp_path, (3,)) == 3 and not checkpoint.latest(tmp_path, {"x": 1})["damaged"]
    save(tmp_path, 4)
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_space_is_checked_before_any_step_is_taken(tmp_path, monkeypatch):
    parameters, _ = state(0)
    checkpoint.check_space(tmp_path / "new", parameters)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 863, 863))
    # two parameters of 12 floats, two moments each, three checkpoints: 2 * 48 * 3 * 3 = 864 bytes
    with pytest.raises(InputError, match="GB free, checkpoints need .* free some or give another --out"):
        checkpoint.check_space(tmp_path / "new", parameters)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 864))
    checkpoint.check_space(tmp_path / "new", parameters)


def test_a_changed_run_is_refused_and_each_change_named(tmp_path):
    save(tmp_path, 1, lr=1e-3, seed=0, rows="abc")
    assert checkpoint.latest(tmp_path, {"lr": 1e-3, "seed": 0, "rows": "abc"})["step"] == 1
    with pytest.raises(InputError, match=r"lr was 0.001, is 0.002, rows was 'abc', is 'abd'\); undo that or drop"):
        checkpoint.latest(tmp_path, {"lr": 2e-3, "seed": 0, "rows": "abd"})
