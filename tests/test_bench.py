"""Measuring on known costs, the candidates against each other, the GPU check on a CPU, FLOPs against torch's count."""

import hashlib
import itertools
import json

import pytest
import torch
from conftest import ROOT, cells

import kernels.segment_logprob as op
import model as qwen
import train
from common import costs
from common.errors import Disagreement
from common.files import read_json
from tools import bench, gpu_check, measure, roofline, targets

CPU = torch.device("cpu")
SIZE = dict(M=24, E=16, V=301, dtype="float32")


@pytest.fixture
def alone(monkeypatch):
    """No peers and no other processes: quick, and what someone sees who did not install them."""
    monkeypatch.setattr(bench, "installed", lambda package: False)
    tasks = []

    def fresh(script, task, threads, ranks=1):
        tasks.append((task, threads, ranks))
        seconds = {"seconds": task["size"]["longest"] / 64} if task.get("rounds") else {}
        return {"extra MiB": 10.0 * ranks, "peak MiB": 99.0} | seconds

    monkeypatch.setattr(bench, "in_fresh_process", fresh)
    return tasks


# ---------- measure


def test_cases_take_turns_and_the_first_round_is_dropped():
    calls = []

    def case(name, *values):
        left = iter(values)
        return lambda: calls.append(name) or next(left)

    seconds = measure.alternate({"a": case("a", 100.0, 1.0, 2.0, 6.0), "b": case("b", 100.0, 4.0, 4.0, 3.0)}, 3)
    assert calls == ["a", "b"] * 4
    assert seconds == {"a": [1.0, 2.0, 6.0], "b": [4.0, 4.0, 3.0]}
    rows = measure.compared(seconds, "b")
    assert rows["a"]["seconds"] == {"median": 2.0, "low": 1.0, "high": 6.0}
    assert rows["a"]["time / b"] == {"median": 0.5, "low": 0.25, "high": 2.0}  # 1/4, 2/4, 6/3, within each round


@pytest.mark.long
def test_extra_memory_finds_the_peak_of_a_known_allocation(tmp_path):
    script = tmp_path / "holds.py"
    script.write_text(
        f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from tools import measure
task = json.loads(sys.argv[2])
held = torch.ones(50, 2**18)
def run():
    for _ in range(3):  # one after the other: the peak is that of one
        torch.ones(task["mib"], 2**18).sum()
print(json.dumps(measure.extra_memory(run, torch.device("cpu"))))
"""
    )
    for mib in (40, 80):
        found = measure.in_fresh_process([str(script)], {"mib": mib}, threads=1)
        assert found["extra MiB"] == pytest.approx(mib, abs=3)
        assert found["peak MiB"] > mib + 50


def test_a_process_that_fails_is_an_error_with_its_words(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match="no such thing"):
        measure.in_fresh_process([str(script)], {}, threads=1)


def test_a_table_shows_three_digits_and_the_spread():
    rows = [{"a": "x", "b": 1234.5}, {"a": None, "c": {"median": 0.01234, "low": 0.01, "high": 2.0}}]
    assert measure.markdown(rows).splitlines() == [
        "| a   |     b |                c |",
        "| --- | ----: | ---------------: |",
        "| x   | 1,234 |                  |",
        "| -   |       | 0.0123 (0.01..2) |",
    ]


# ---------- op


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_candidate_here_computes_the_same(dtype):
    x = bench.op_inputs(**SIZE | {"dtype": dtype}, device=CPU)
    ready = {name: candidate for name, candidate in bench.op_candidates("torch").items() if candidate}
    found = bench.agreement(ready, x)
    assert set(found) >= {"full logits", "ours"}
    assert found["ours"]["loss off by"] < 1e-6  # fp32 logits whatever the inputs


def test_a_candidate_that_computes_something_else_is_refused():
    x = bench.op_inputs(**SIZE, device=CPU)
    with pytest.raises(Disagreement, match="twice"):
        bench.agreement({"twice": lambda x, hidden: 2 * bench._naive(x, hidden)}, x)
    with pytest.raises(Disagreement, match="no gradient"):
        bench.agreement({"no gradient": lambda x, h: bench._naive(x, h.detach()) + 0 * h.sum()}, x)


def test_op_rows_name_what_is_missing_and_start_from_full_logits(alone):
    rows = bench.op_rows(SIZE, 1, CPU)
    named = {(row["pass"], row["candidate"]): row for row in rows}
    assert len(named) == len(rows) == 12
    assert named["forward", "full logits"]["time / full logits"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert "not installed" in named["forward", "Liger fused linear KTO"]["note"]
    assert {task["candidate"] for task, *_ in alone} == {r["candidate"] for r in rows if "note" not in r}


# ---------- step, sample, em, growth


@pytest.mark.parametrize("n", range(2, 9))
def test_rows_in_trl_order_meet_the_same_wrong_completions(n):
    order, partner = bench.trl_order(n), train.mismatched(n, seed=0)
    assert sorted(order) == list(range(n))
    assert all(partner[order[i]] == order[i - 1] for i in range(n))  # TRL: the completion before, the first the last


@pytest.mark.long
def test_our_steps_have_trls_losses(alone, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed; make bench installs it")
    monkeypatch.setattr(bench, "installed", lambda package: True)
    monkeypatch.setattr(bench, "TRL", {name: bench.TRL[name] for name in [*bench.TRL][:3]})
    rows = bench.step_rows(bench.StepSize(64, 2, 300, 12, 30), 2, CPU)
    assert [row["candidate"] for row in rows] == ["ours", *bench.TRL]
    for row in rows:
        assert row["first loss"] == pytest.approx(0.5 * (1.0 + 1.5) / 2, abs=1e-6)
        assert row["later losses off by"] < 1e-5  # two updates later, so gradient and AdamW agree too
    assert rows[1]["with the reference"] == rows[1]["seconds"]["median"]
    assert rows[2]["with the reference"] > rows[2]["seconds"]["median"]


def test_losses_that_differ_stop_the_comparison():
    both = {"ours": [0.625, 0.5], "TRL, default": [0.625, 0.5]}
    assert bench.same_losses(both)["TRL, default"]["later losses off by"] == 0.0
    with pytest.raises(Disagreement, match="TRL, default"):
        bench.same_losses(both | {"TRL, default": [0.6252, 0.5]})
    with pytest.raises(Disagreement, match="TRL, default"):
        bench.same_losses(both | {"TRL, default": [0.625, 0.502]})
    other_pairs = "TRL, precomputed, no checkpointing, batch 4"
    assert bench.same_losses(both | {other_pairs: [0.625, 0.502]})[other_pairs]["later losses off by"] == 0.502 - 0.5


def test_rows_have_the_lengths_asked_for():
    rows = bench.random_rows(5, 10, 30, 50)
    assert sorted(len(row.prompt_ids) + len(row.completion_ids) for row in rows) == [10, 15, 20, 25, 30]
    assert all(row.completion_ids[-1] == 0 and 0 not in row.prompt_ids + row.completion_ids[:-1] for row in rows)


def test_both_samplers_are_greedy_alike_and_run_to_the_limit():
    rows = bench.sample_rows("the miniature", ROOT / "mini/model", 4, 1, CPU)
    assert [row["candidate"] for row in rows] == ["ours", "transformers"]
    assert rows[0]["same greedy tokens"] == 1.0
    assert rows[1]["tokens a second"] == pytest.approx(16 * 4 / rows[1]["seconds"]["median"])


def test_em_cost_is_that_of_its_parts():
    row = bench.em_row(50, CPU)
    assert row["all"] == pytest.approx(row["count moves"] + row["fit"] + row["weights"])
    assert row["per million steps"] == pytest.approx(row["all"] * 1e6 / row["steps"])
    assert 50 <= row["steps"] <= 550


def test_growth_is_relative_to_the_first_size_and_changes_one_thing(alone):
    rows = bench.growth_rows(bench.SMALL, {"longest": (64, 256), "ranks": (1, 2)}, 1)
    assert [row["times the size"] for row in rows] == [1, 4, 1, 2]
    assert [row["times the time"] for row in rows] == [1, 4, 1, 1]
    assert [row["times the memory"] for row in rows] == [1, 1, 1, 2]
    sizes = [task["size"] for task, *_ in alone]
    assert [(s["shortest"], s["longest"], s["V"]) for s in sizes][:2] == [(64, 64, 16384), (256, 256, 16384)]
    assert [(threads, ranks) for _, threads, ranks in alone] == [(1, 1), (1, 1), (1, 1), (1, 2)]


def test_a_wrong_section_is_a_usage_error(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert bench.main(["steps"]) == 3
    assert "the sections are op, step" in capsys.readouterr().err


# ---------- gpu_check


@pytest.mark.long
def test_the_gpu_check_runs_whole_on_a_cpu(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_check, "PEERS", {name: gpu_check.PEERS[name] for name in (targets.DEFAULT, targets.PAPER)})
    out = tmp_path / "check.json"
    assert gpu_check.main(["--device", "cpu", "--tiny", "--minutes", "60", "--out", str(out)]) == 0
    result = read_json(out)
    parts = result["parts"]
    assert list(parts) == list(gpu_check.PARTS)
    assert all(part["ok"] and part["error"] is None and not part["cut"] for part in parts.values())
    assert len(parts["correct"]["rows"]) == 2 * 2 * 3  # sizes, vocabularies, dtypes
    levels = [(row["dtype"], row["recomputed"]) for row in parts["gradients"]["rows"]]
    assert levels == list(itertools.product(("bfloat16", "float32"), costs.RECOMPUTE))
    assert all(row["first log-ratio"] == 0 for row in parts["zero"]["rows"])
    ways = [(row["rows a pass"], row["recomputed"]) for row in parts["train"]["rows"]]
    assert ways == [(micro or "auto", level) for micro, level in gpu_check.TINY.ways]
    assert all(row["first loss"] == pytest.approx(0.625, abs=1e-6) for row in parts["train"]["rows"])
    for row in parts["sample"]["rows"]:
        assert row["tokens a second"] == pytest.approx(row["batch"] * 6 / row["seconds"])
    if measure.installed("trl"):
        assert all(row["first loss"] == pytest.approx(0.625, abs=1e-2) for row in parts["peers"]["rows"])
        found = {row["what"]: row["found"] for row in result["targets"]}
        ours = next(r for r in parts["train"]["rows"] if (r["rows a pass"], r["recomputed"]) == (8, "full"))
        ratio = parts["peers"]["rows"][0]["seconds"]["median"] / ours["seconds"]["median"]
        assert found["TRL's default / ours, layers recomputed"] == pytest.approx(ratio)


def test_when_the_time_is_up_what_was_measured_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "check.json"
    assert gpu_check.main(["correct", "sweep", "--device", "cpu", "--tiny", "--minutes", "0", "--out", str(out)]) == 0
    parts = read_json(out)["parts"]
    assert [(len(part["rows"]), part["cut"]) for part in parts.values()] == [(0, True), (0, True)]
    assert "sweep: skipped, 0 minutes are up" in capsys.readouterr().out
    saved = []
    gpu_check.perform("correct", torch.device("cpu"), gpu_check.TINY, 0.0, saved.append)
    assert len(saved[-1]["rows"]) == 1 and saved[-1]["cut"] and saved[-1]["ok"]


def test_targets_take_medians_and_say_what_is_missing():
    def step(rows, level, seconds, **more):
        return {"rows a pass": rows, "recomputed": level, "seconds": {"median": seconds}} | more

    train_rows = [step(8, "none", 0.8, **{"peak MiB": 50_000.0, "share of the peak": 0.43})]
    train_rows += [step(8, "cheap", 0.9, **{"peak MiB": 44_000.0}), step(8, "full", 1.0, **{"counted MiB": 21_544.0})]
    train_rows += [step(2, "full", 1.5)]
    trl = [(targets.DEFAULT, 2.5), (targets.ONCE, 1.5), (targets.LIGER, 1.7), (targets.PAPER, 4.5)]
    peers = [{"candidate": name, "seconds": {"median": s}} for name, s in trl]
    ways = [
        ("ours, triton", 1.3, 435.0),
        ("ours, torch", 1.4, 436.0),
        ("ours, another", 1.1, 620.0),
    ]
    ops = [
        {"candidate": name, "/ its products": time, "extra MiB": mib} for name, time, mib in [*ways, ("TRL", 1, 400)]
    ]
    swept = [
        {"D": D, "chunk": 512, "/ its products": time, "extra MiB": 370.0} for D, time in ((4096, 1.15), (1024, 1.0))
    ]
    parts = {"train": {"rows": train_rows}, "peers": {"rows": peers}, "op": {"rows": ops}, "sweep": {"rows": swept}}
    rows = targets.table(parts)
    table = {row["what"]: (row["found"], row["met"]) for row in rows}
    beside = {row["what"]: row["beside"] for row in rows if row["beside"]}
    assert beside == {
        targets.PEAK + "recomputed": "counted from the shapes: 21,544",
        targets.FITTING: "chunk 512: 370 MiB",
    }
    assert table[targets.FITTING] == (1.15, False) and table["the op, extra MiB"] == (435.0, True)
    assert targets.best_fitting({"op": {"rows": ops}}) == (1.3, "candidate ours, triton: 435 MiB")
    assert table["share of the peak, layers kept"] == (0.43, False)
    assert table["TRL's default / ours, layers recomputed"] == (2.5, True)
    assert table["TRL's best / ours, layers recomputed"] == (1.5, False)
    assert table["TRL / ours, 2 rows a pass"] == (3.0, False)
    assert table["peak MiB, 8 rows a pass, layers kept"] == (44_000.0, True)
    assert table["decode step ms, batch 16"] == (None, None)


@pytest.mark.long
def test_a_wrong_op_and_a_broken_part_are_reported_and_the_rest_still_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    right = op.segment_logprob

    def wrong(hidden, weight, targets, w, cu_seqlens, impl, chunk):
        weighted, plain = right(hidden, weight, targets, w, cu_seqlens, impl, chunk)
        return weighted, plain + 1e-3 * hidden.requires_grad

    def broken(device, sizes):
        raise ValueError("the part broke")

    monkeypatch.setattr(op, "segment_logprob", wrong)
    monkeypatch.setitem(gpu_check.PARTS, "sweep", broken)
    monkeypatch.setattr(qwen, "decode_attention", lambda q, *rest: torch.zeros_like(q))
    out = tmp_path / "check.json"
    assert gpu_check.main(["correct", "model", "sweep", "sample", "--device", "cpu", "--tiny", "--out", str(out)]) == 1
    parts = json.loads(out.read_text())["parts"]
    assert not any(row["ok"] for row in parts["correct"]["rows"])
    assert [row["ok"] for row in parts["model"]["rows"]] == [True, False, True, True, True]
    assert "the part broke" in parts["sweep"]["error"]
    assert parts["sample"]["ok"]
    assert "FAILED: correct, model, sweep" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_without_a_gpu_the_check_says_what_to_do(capsys):
    assert gpu_check.main([]) == 3
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_the_receipt_is_that_of_the_recorded_run():
    folder = ROOT / "docs" / "results"
    receipt = read_json(folder / "gpu_check-h200.receipt.json")
    recorded = folder / receipt["of"]
    assert hashlib.sha256(recorded.read_bytes()).hexdigest() == receipt["sha256"]
    run = read_json(recorded)
    assert receipt["command"] == run["command"] and receipt["device"] == run["environment"]["machine"]
    assert receipt["torch"].partition("+")[0] == run["environment"]["torch"]
    assert receipt["triton"] == run["environment"]["triton"] and all(part["ok"] for part in run["parts"].values())


def test_the_readme_shows_the_recorded_tables():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = text[text.index("<!-- bench:begin -->\n") : text.index("<!-- bench:end -->")]
    results = [read_json(ROOT / "docs" / "results" / name) for name in ("bench.json", "bench-step-full.json")]
    assert cells(shown) == cells(f"<!-- bench:begin -->\n{bench.readme(*results)}\n")


def test_the_roofline_on_the_page_is_the_one_counted_now():
    text = (ROOT / "docs" / "speed.md").read_text()
    shown = text[text.index("<!-- roofline:begin -->\n") : text.index("<!-- roofline:end -->")]
    counted = roofline.report("Qwen/Qwen3-8B", "h100", 8, 900, 32)
    assert cells(shown) == cells(f"<!-- roofline:begin -->\n{counted}\n")
    assert "333" in text and "332.9" in counted  # what the recorded run's own counter said of nearly the same rows
