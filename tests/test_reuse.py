"""When a stage is done again: settings and inputs by content, code it reaches, damaged results, what is dear."""

import dataclasses
import functools
from pathlib import Path

import pytest

import mralign
from common import hub
from common.errors import InputError
from common.ranks import not_joined
from common.settings import from_json
from pipeline import reuse
from pipeline.config import RunConfig
from pipeline.run import Run

OLD = {
    "depends": {"settings": {"a": 1}, "inputs": {"x": "s"}, "code": {"em.py": "c"}},
    "outputs": {"o": ""},
    "seconds": 7.0,
    "result": None,
}


def stage(tmp_path: Path, dear: bool) -> tuple[reuse.Stage, dict]:
    made = tmp_path / "o"
    made.write_text("made")
    done = OLD | {"outputs": {"o": reuse.checksum(made)}}
    return reuse.Stage("eval kto test", print, ("a",), {}, {"o": made}, dear=dear), done


def with_(kind: str, **changed: object) -> dict:
    now = {k: dict(v) for k, v in OLD["depends"].items()}
    now[kind] |= changed
    return now


@pytest.mark.parametrize("dear", [True, False])
def test_what_makes_a_stage_due(tmp_path, dear):
    s, old = stage(tmp_path, dear)
    assert reuse.due(s, old, OLD["depends"], False) == (False, "unchanged, reused (took 7.0 s)")
    assert reuse.due(s, None, OLD["depends"], False)[0] and reuse.due(s, old, OLD["depends"], True)[0]
    assert reuse.due(s, old, with_("settings", a=2), False) == (True, "done again: a 2, was 1 changed")
    assert reuse.due(s, old, with_("inputs", x="t"), False) == (True, "done again: x changed")
    needed, words = reuse.due(s, old, with_("code", **{"em.py": "d"}), False)
    assert needed is not dear and "em.py changed" in words
    assert ("--redo eval" in words) is dear  # kept, and how to change that
    (tmp_path / "o").write_text("made by a hand")
    if dear:
        with pytest.raises(InputError, match="o: not the file .* --redo eval"):
            reuse.due(s, old, OLD["depends"], False)
    else:
        assert reuse.due(s, old, OLD["depends"], False) == (True, "done again: o is not as it was left")
    (tmp_path / "o").unlink()
    assert reuse.due(s, old, OLD["depends"], False)[0]  # gone, not damaged


def test_the_code_of_a_stage_is_what_it_reaches_and_no_more():
    fit = reuse.code_of(mralign.fit_transitions)
    assert {"em.py", "annotate.py", "mralign.py: fit_transitions"} <= fit.keys()
    assert not {"train.py", "report/charts.py", "pipeline/reporting.py", "lora.py"} & fit.keys()
    train = reuse.code_of(functools.partial(mralign.train_method, method="kto"))
    assert {"train.py", "lora.py", "kto.py", "kernels/segment_logprob.py"} <= train.keys()
    assert not {"report/charts.py", "report/page.py", "pipeline/evaluation.py"} & train.keys()
    assert "report/charts.py" in reuse.code_of(mralign.write_report)


def test_comments_and_docstrings_are_no_code():
    source = 'def f(x):\n    """Doubles."""\n    return 2 * x\n'
    same = reuse._read(source)[0]
    assert reuse._read(source.replace("Doubles", "Twice").replace("x\n", "x  # fast\n"))[0] == same
    assert reuse._read(source.replace("2", "3"))[0] != same


def test_an_input_must_be_what_its_stage_left(tmp_path):
    """One flipped bit in an adapter, evaluated by itself: refused, with three ways out."""
    made, eaten = tmp_path / "kto" / "adapter", tmp_path / "kto.jsonl"
    made.parent.mkdir()
    made.write_bytes(b"\x40")
    train = reuse.Stage("train kto", print, (), {}, {"kto/adapter": made}, dear=True)
    score = reuse.Stage("eval kto test", print, (), {"adapter": made}, {"eaten": eaten}, dear=True)
    reuse.check_inputs(score, [train, score], tmp_path)
    reuse._write_receipt(train.receipt(tmp_path), OLD | {"outputs": {"kto/adapter": reuse.checksum(made)}})
    reuse.check_inputs(score, [train, score], tmp_path)
    made.write_bytes(b"\x00\x00")
    with pytest.raises(
        InputError, match="not the file that the stage train kto left .* --redo train, or remove .*done"
    ):
        reuse.check_inputs(score, [train, score], tmp_path)
    reuse.check_inputs(train, [train, score], tmp_path)  # reads nothing of another stage
    text = train.receipt(tmp_path).read_text()
    train.receipt(tmp_path).write_text(text.replace("7.0", "7.1"))
    with pytest.raises(InputError, match="train-kto.json: not as it was written; .* remove it"):
        reuse.check_inputs(score, [train, score], tmp_path)


def test_what_a_stage_may_leave_is_checked_too(tmp_path: Path):
    """A figure that changed, or went, makes a cheap stage due; a dear one is refused; one more file is nobody's."""
    (tmp_path / "figures").mkdir()
    for name in ("results.json", "figures/a.png", "figures/b.png"):
        (tmp_path / name).write_text(name)
    s = reuse.Stage("report", print, (), {}, {"o": tmp_path / "results.json"}, may_leave={"f": tmp_path / "figures"})
    assert list(s.left()) == ["o", "f/a.png", "f/b.png"]
    old = OLD | {"outputs": {name: reuse.checksum(path) for name, path in s.left().items()}}
    (tmp_path / "figures/own.png").write_text("of one's own")
    assert not reuse.due(s, old, OLD["depends"], False)[0]
    (tmp_path / "figures/b.png").unlink()
    assert reuse.due(s, old, OLD["depends"], False) == (True, "done again: f/b.png is not as it was left")
    (tmp_path / "figures/b.png").write_text("other")
    with pytest.raises(InputError, match="figures/b.png: not the file that the stage report left"):
        reuse.due(dataclasses.replace(s, dear=True), old, OLD["depends"], False)


def test_what_may_be_read_is_an_input_once_it_is_there(tmp_path: Path):
    path = tmp_path / "agreement.json"
    s = reuse.Stage("report", stage, (), {}, {}, may_read={"agreement.json": path})
    assert reuse.depends(s, None)["inputs"] == {}
    path.write_text("{}")
    assert reuse.depends(s, None)["inputs"] == {"agreement.json": reuse.checksum(path)}
    maker = reuse.Stage("annotate", print, (), {}, {}, may_leave={"agreement.json": path})
    reuse._write_receipt(maker.receipt(tmp_path), OLD | {"outputs": {"agreement.json": reuse.checksum(path)}})
    reuse.check_inputs(s, [maker, s], tmp_path)
    path.write_text("{ }")
    with pytest.raises(InputError, match="agreement.json: not the file that the stage annotate left"):
        reuse.check_inputs(s, [maker, s], tmp_path)


def test_a_damaged_receipt_never_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "done" / "sample.json"
    reuse._write_receipt(path, OLD | {"outputs": {}})
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        for bit in (1, 4, 32):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                found = reuse._receipt(path)
            except InputError as error:
                assert "put it back, or remove it, and the stage is done again" in str(error)
            else:  # blanks, or the word "check" itself
                assert found is not None and found["outputs"] == {} and found["depends"] == OLD["depends"], (at, bit)


@pytest.mark.parametrize("dear", [False, True])
@pytest.mark.parametrize("kind", ["", "settings", "inputs", "code"])
def test_what_another_run_may_lend(tmp_path: Path, kind: str, dear: bool) -> None:
    """The same work: always. Other settings or inputs: never. Other code: what took hours, not what takes seconds."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    s = reuse.Stage("sample" if dear else "fit", print, (), {}, {"o": mine / "o.jsonl"}, dear=dear)
    other.mkdir()
    mine.mkdir()
    (other / "o.jsonl").write_text("{}\n")
    old = OLD | {"outputs": {"o": reuse.checksum(other / "o.jsonl")}}
    reuse._write_receipt(s.receipt(other), old)
    new = {name: dict(of) for name, of in OLD["depends"].items()}
    if kind:
        new[kind]["one more"] = "x"
    needed, words, _ = reuse.take_over(s, other, mine, new, "")
    lent = not kind or (kind == "code" and dear)
    assert needed is not lent and (mine / "o.jsonl").exists() is lent
    since = "; one more changed since (--redo sample)" if kind else ""
    assert words == (f"taken over from {other} (took {OLD['seconds']} s there){since}" if lent else "")
    assert not lent or not (mine / "o.jsonl").samefile(other / "o.jsonl")  # an edit of one is none of the other


def test_judging_depends_on_all_that_it_reads(tmp_path: Path) -> None:
    docs = tmp_path / "docs.jsonl"
    docs.write_text("{}\n")
    given = {"judge": "m@http://127.0.0.1:1/v1", "search": str(docs), "out": str(tmp_path / "run")}
    cfg = dataclasses.replace(RunConfig(**from_json(RunConfig, "configs/mini.json")), **given)
    run = Run(cfg, hub.locate(cfg.model, ""), not_joined())
    judge = next(s for s in mralign.stages(run) if s.name == "judge")
    assert judge.inputs["documents"] == docs
    assert {"verify_results", "judge_max_tokens", "claims_k", "judge"} <= set(judge.settings)
