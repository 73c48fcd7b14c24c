"""tools/tensorboard.py: every number of metrics.jsonl is in the events, once; without the package one line says so."""

import sys

import pytest

from common.errors import InputError
from common.files import write_jsonl
from tools import tensorboard

ROWS = [{"step": k, "loss": 0.5 - k / 100, "rewards/margins": k / 7, "note": "x", "epoch": k / 2} for k in range(1, 6)]


def scalars(folder):
    """name -> [(step, value)] as TensorBoard itself reads the events."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    found = module.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write_jsonl(tmp_path / "metrics.jsonl", ROWS)
    assert tensorboard.main([str(tmp_path)]) == 3
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "tb" / "written.json").exists()
    with pytest.raises(InputError, match="pip install"):
        tensorboard.write(tmp_path / "metrics.jsonl", tmp_path / "tb")


def test_what_is_read_and_what_not(tmp_path):
    for place in ("kto", "kto/checkpoint-20", "mralign"):
        write_jsonl(tmp_path / place / "metrics.jsonl", ROWS)
    out = tmp_path / "tb"
    assert tensorboard.sources(tmp_path, out) == {
        tmp_path / "kto" / "metrics.jsonl": out / "kto",
        tmp_path / "mralign" / "metrics.jsonl": out / "mralign",
    }
    assert tensorboard.numbers(ROWS[0]) == {"loss": 0.49, "rewards/margins": pytest.approx(1 / 7), "epoch": 0.5}
    assert tensorboard.main([str(tmp_path / "empty")]) == 3


@pytest.mark.long
def test_every_step_is_written_once(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    source = tmp_path / "kto" / "metrics.jsonl"
    write_jsonl(source, ROWS[:3])
    assert tensorboard.main([str(tmp_path)]) == 0
    write_jsonl(source, ROWS)
    assert tensorboard.write(source, tmp_path / "tb" / "kto") == 2
    assert tensorboard.write(source, tmp_path / "tb" / "kto") == 0
    found = scalars(tmp_path / "tb" / "kto")
    assert found["rewards/margins"] == [(k, pytest.approx(k / 7)) for k in range(1, 6)]
    assert set(found) == {"loss", "rewards/margins", "epoch"}
    write_jsonl(source, ROWS[:2])  # started anew
    assert tensorboard.write(source, tmp_path / "tb" / "kto") == 2
    assert [step for step, _ in scalars(tmp_path / "tb" / "kto")["loss"]] == [1, 2]
