"""The sweep: what it runs and in which order, who lends to whom, and its figures against hand-worked ones."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mralign
from common import hub
from common.errors import InputError
from common.files import read_json, write_json
from common.ranks import Ranks
from common.settings import cli
from pipeline.config import RunConfig
from pipeline.reuse import depends, key_of
from pipeline.run import Run
from report import charts
from tools import sweep

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the configs are relative to the repository."""
    monkeypatch.chdir(ROOT)


def config_of(parsed: sweep.Sweep, name: str, seed: int) -> RunConfig:
    """What a run's command line sets."""
    command = sweep.command(parsed, name, seed, 4, [])
    return cli(RunConfig, command[command.index("--config") :], "")[0]


# The committed sweeps


def test_the_ablations_are_tables_3_and_4_and_each_is_a_valid_run():
    parsed = sweep.load(ROOT / "configs" / "ablations.json")
    runs = parsed["runs"]
    assert {r["settings"].get("lambda_r", 1.5) for r in runs.values()} == {1.0, 1.2, 1.5, 2.0, 2.2, 2.5}
    changed = [{k: v for k, v in r["settings"].items() if k != "method"} for r in runs.values()]
    assert {} in changed and {"transitions": "frequency"} in changed and {"labels": "one"} in changed
    assert sum("questions" in c for c in changed) == 2 and all(len(c) <= 1 for c in changed)
    assert runs["full"]["paper"] == {"nq": [37.34, 7.2], "sciq": [70.7, 11.7], "simpleqa": [5.11, 4.46]}
    assert runs["Table 3, SciQ only"]["paper"]["simpleqa"] == [4.65, 5.1] and parsed["seeds"] == [0]
    assert runs["Table 4, lambda_r 2.5"]["paper"]["sciq"] == [67.1, 16.1]
    for name in runs:
        cfg = config_of(parsed, name, 0)
        assert cfg.model == "Qwen/Qwen3-8B" and cfg.resume and cfg.seed == 0
        assert cfg.lambda_r == runs[name]["settings"].get("lambda_r", 1.5)


def test_the_miniatures_ablations_differ_from_its_first_run_in_one_setting_and_quote_no_paper():
    parsed = sweep.load(ROOT / "configs" / "mini-ablations.json")
    assert len(parsed["seeds"]) >= 3 and all(of["paper"] == {} for of in parsed["runs"].values())
    first = config_of(parsed, next(iter(parsed["runs"])), 2)
    assert (first.method, first.lr, first.model, first.seed) == ("mralign", 3e-4, "mini/model", 2)
    differ = []
    for name in list(parsed["runs"])[1:]:
        other = config_of(parsed, name, 2)
        differ.append(
            [(k, v) for k, v in vars(other).items() if v != getattr(first, k) and k not in ("out", "reuse_from")]
        )
    assert [len(d) for d in differ] == [1] * len(differ)
    found = {d[0] for d in differ}
    assert found >= {("transitions", "frequency"), ("labels", "one"), ("lambda_r", 1.0), ("lambda_r", 2.0)}
    assert found >= {("method", "kto"), ("method", "shuffled")}


@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_setting_reaches_the_run(value):
    parsed = sweep.load(ROOT / "configs" / "ablations.json")
    parsed["settings"] = {"compile": value}
    assert config_of(parsed, "full", 0).compile is value


RUN = {"settings": {"method": "mralign"}, "paper": {}}
GOOD = {"base": "x.json", "out": "runs", "runs": {"a": RUN, "b c": RUN}}


@pytest.mark.parametrize(
    "change,words",
    [
        ({"bsae": ""}, "must hold base, out and runs"),
        ({"runs": {}}, "must hold base, out and runs"),
        ({"runs": {"a": {"lr": 1}}}, "run 'a' must hold settings and paper"),
        ({"runs": {"a": {"settings": [], "paper": {}}}}, "run 'a' must hold settings and paper"),
        ({"runs": [1]}, "runs must be an object"),
        ({"settings": None}, "settings must be an object"),
        ({"out": None}, "out must be a text"),
        ({"runs": {"a": {"settings": {}, "paper": {}}}}, "run 'a' must set one method"),
        ({"runs": {"a": {"settings": {"method": "kto,sft"}, "paper": {}}}}, "run 'a' must set one method"),
        ({"runs": {"a b": RUN, "a-b": RUN}}, "would share a folder"),
        ({"settings": {"seed": 1}}, "seed is not a setting of a run"),
        ({"seeds": []}, "different whole numbers"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": ["1"]}, "different whole numbers"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, change, words):
    write_json(tmp_path / "s.json", GOOD | change)
    with pytest.raises(InputError, match=words) as caught:
        sweep.load(tmp_path / "s.json")
    assert str(caught.value).startswith(f"{tmp_path / 's.json'}: ") and "\n" not in str(caught.value)


def test_flags_that_the_sweep_gives_itself_are_refused(tmp_path, capsys):
    write_json(tmp_path / "s.json", GOOD)
    assert sweep.main([str(tmp_path / "s.json"), "--seed=3"]) == 3
    assert "--seed=3 is set by the sweep itself" in capsys.readouterr().err


# Lending


def test_draws_are_lent_within_a_seed_only(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    write_json(tmp_path / "x.json", {"out": "runs/base", "seed": 1})
    s = sweep.OPTIONAL | GOOD | {"seeds": [0, 1]}
    assert sweep.lenders(s, "a", 0) == [] and sweep.lenders(s, "b c", 0) == [sweep.folder(s, "a", 0)]
    base = tmp_path / "runs" / "base"
    assert sweep.lenders(s, "a", 1) == [base] and sweep.lenders(s, "b c", 1) == [base, sweep.folder(s, "a", 1)]

    def asked() -> str:
        given = sweep.command(s, "b c", 1, 1, [])
        return given[given.index("--reuse-from") + 1]

    assert asked() == ""  # a folder that is not there lends nothing, and a run refuses to be told of it
    sweep.folder(s, "a", 1).mkdir(parents=True)
    assert asked() == str(sweep.folder(s, "a", 1))
    base.mkdir()
    assert asked() == f"{base},{sweep.folder(s, 'a', 1)}"
    assert len({sweep.folder(s, name, seed) for name in s["runs"] for seed in s["seeds"]}) == 4


def test_what_would_stop_every_run_stops_the_sweep(tmp_path, monkeypatch, capsys):
    """One line and no process: the ablations of the paper without its questions, the miniature's with a bad setting."""
    monkeypatch.setattr(sweep, "run_all", None)
    monkeypatch.chdir(tmp_path)
    for file, flags, words in (
        ("ablations.json", ["--questions", "absent.jsonl"], "absent.jsonl: no such file"),
        ("mini-ablations.json", ["--lr", "0"], "--lr is 0.0, must be"),
    ):
        assert sweep.main([str(ROOT / "configs" / file), *flags]) == 3
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
    sweep.check_runs(sweep.load(ROOT / "configs" / "mini-ablations.json"), 2, ["--compile", "sample"])


def test_the_miniatures_runs_share_draws_with_make_report_and_with_each_other_for_the_same_seed_only():
    """By the keys under which the pipeline reuses a stage: equal keys, the same draws."""
    parsed = sweep.load(ROOT / "configs" / "mini-ablations.json")
    ranks = Ranks(0, 1, torch.device("cpu"))

    def keys(cfg: RunConfig) -> list[str]:
        work = mralign.stages(Run(cfg, hub.locate(cfg.model, ""), ranks))
        return [key_of(depends(stage, cfg)) for stage in work if stage.name in ("sample", "eval thinkon test")]

    first, *others = parsed["runs"]
    for seed in parsed["seeds"]:
        lender = keys(config_of(parsed, first, seed))
        assert all(keys(config_of(parsed, name, seed)) == lender for name in others)
        report = keys(cli(RunConfig, ["--config", "configs/mini-report.json"], "")[0])
        assert (report[0] == lender[0]) is (seed == 0)


# The order of the runs and what becomes of failures: real processes of a stand-in program

STAND_IN = """
    import json, sys
    from pathlib import Path
    given = dict(zip(sys.argv[1:-1], sys.argv[2:]))
    out = Path(given["--out"])
    with open("order.txt", "a") as f:
        f.write(out.name + "\\n")
    code = json.load(open("codes.json")).get(out.name, 0)
    for name, rows in json.load(open("samples.json")).get(out.name, {}).items():
        (out / "eval" / "nq").mkdir(parents=True, exist_ok=True)
        (out / "eval" / "nq" / (name + ".jsonl")).write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (out / "eval").mkdir(exist_ok=True)
    (out / "eval" / "analysis.json").write_text('{"strata": {"nq": {}}}')
    about = dict.fromkeys(("commit", "model", "device", "versions", "decoding"), "x")
    (out / "results.json").write_text(json.dumps({"receipt": about}))
    if code:
        print("error: no model", file=sys.stderr)
    sys.exit(code)
"""


def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: dict, codes: dict, seeds: list[int]) -> Path:
    """A folder with the stand-in program and a sweep of the runs "a" and "b c"; returns the sweep's file."""
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "check_runs", lambda *_: None)  # the stand-in needs no model
    (tmp_path / "mralign.py").write_text(textwrap.dedent(STAND_IN))
    write_json(tmp_path / "samples.json", samples)
    write_json(tmp_path / "codes.json", codes)
    write_json(tmp_path / "x.json", {"out": "runs/base"})
    write_json(tmp_path / "s.json", GOOD | {"seeds": seeds, "note": "Read this."})
    runs = {"a": {"settings": {"method": "mralign"}, "paper": {"nq": [37.34, 7.2]}}}
    runs |= {"b c": {"settings": {"method": "kto"}, "paper": {}}}
    write_json(tmp_path / "s.json", read_json(tmp_path / "s.json") | {"runs": runs})
    return tmp_path / "s.json"


TEXTS = {"R": "It is gold.", "W": "It is lead."}


def rows(codes: str) -> list[dict]:
    """Samples of four questions, the first two about one fact; a code is thought and answer, R right or W wrong."""
    out = []
    for name, (thought, answer) in zip(("x#0", "x#1", "y", "z"), codes.split(), strict=True):
        said = "gold" if answer == "R" else "lead"
        row = {"id": name, "mode": "on", "draw": 0, "question": "What?", "answers": ["gold"], "prompt": "What?"}
        completion = f"<think>\n{TEXTS[thought]}\n</think>\n\n<answer>{said}</answer>"
        out.append(row | {"text": completion, "finish": "stop"})
    return out


BASE = {0: "RR RW WW RR", 1: "RR RW RW WW"}
FIRST = {0: "RR RR WW RR", 1: "RR RR RR RR"}
OTHER = {0: "RR WR WW RR", 1: "RR RR WW RW"}
SAMPLES = {f"a-seed{s}": {"thinkon": rows(BASE[s]), "mralign": rows(FIRST[s])} for s in (0, 1)}
SAMPLES |= {f"b-c-seed{s}": {"thinkon": rows(BASE[s]), "kto": rows(OTHER[s])} for s in (0, 1)}


def table_of(path: Path, heading: str) -> list[list[str]]:
    """The cells of the Markdown table under a heading that holds a word."""
    part = next(p for p in path.read_text().split("\n## ") if heading in p.partition("\n")[0])
    lines = [line for line in part.splitlines() if line.startswith("|")]
    assert len(set(map(len, lines))) == 1  # columns line up
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("jobs", [1, 2])
def test_mean_spread_difference_and_strata_by_hand(tmp_path, monkeypatch, capsys, jobs):
    path = place(tmp_path, monkeypatch, SAMPLES, {}, [0, 1])
    drawn = []
    monkeypatch.setattr(charts, "save", lambda figure, file, dpi=0: (drawn.append(figure), file.write_bytes(b"png")))
    assert sweep.main([str(path), "--jobs", str(jobs)]) == 0
    order = (tmp_path / "order.txt").read_text().split()  # two at once write their names as they come
    names = ["a-seed0", "a-seed1", "b-c-seed0", "b-c-seed1"]
    assert order == names if jobs == 1 else sorted(order) == names

    result = read_json(tmp_path / "runs" / "sweep.json")
    a, b = (result["runs"][name]["sets"]["nq"] for name in ("a", "b c"))
    assert a["acc"] == {"mean": 0.875, "sd": pytest.approx(0.25 / 2**0.5), "all": [0.75, 1.0]}
    assert a["mis"] == {"mean": 0.0, "sd": 0.0, "all": [0.0, 0.0]} and a["difference"] is None
    assert b["acc"]["all"] == [0.5, 0.5] and b["mis"]["all"] == [0.25, 0.25]
    assert result["thinkon"]["nq"]["acc"]["all"] == [0.5, 0.25] and result["thinkon"]["nq"]["mis"]["mean"] == 0.375
    # Questions' differences, seeds pooled: 0, -1/2 | -1/2 | -1/2. Three facts drawn with replacement: the mean is -1/4
    # when the first comes up thrice (1 of 27), -1/2 when it never does (8 of 27), so these are the 95 % limits.
    expected = {"difference": -0.375, "low": -0.5, "high": -0.25, "p": None}
    assert b["difference"]["acc"] == pytest.approx(expected)
    gains = {name: (p["n"], p["gain"], p["draws"], p["chance"]) for name, p in a["strata"].items()}
    assert gains == {
        "both correct": (3, 0.0, [0.0, 0.0], pytest.approx(-1 / 3)),
        "both wrong": (2, 0.5, [0.0, 1.0], 0.5),
        "inconsistent": (3, 1.0, [1.0, 1.0], 0.0),
    }

    head, _, *lines = table_of(tmp_path / "runs" / "sweep.md", "Acc and Mis")
    assert head == ["run", "set", "seeds", "Acc", "Mis", "paper Acc", "paper Mis", "Acc − a (95 %)", "Mis − a (95 %)"]
    assert lines[0][:5] == ["ThinkOn", "nq", "2", "37.5 ± 17.7", "37.5 ± 17.7"]
    assert lines[1] == ["a", "nq", "2", "87.5 ± 17.7", "0.0 ± 0.0", "37.34", "7.20", "–", "–"]
    assert lines[2][:5] == ["b c", "nq", "2", "50.0 ± 0.0", "25.0 ± 0.0"]
    assert lines[2][5:8] == ["–", "–", "−37.5 [−50.0, −25.0]"]
    head, _, *lines = table_of(tmp_path / "runs" / "sweep.md", "stratum")
    assert lines[1][:3] == ["a", "both wrong (n below 10)", "2"] and lines[1][head.index("sd over seeds")] == "70.7"
    assert (tmp_path / "runs" / "sweep.md").read_text() in capsys.readouterr().out
    said = (tmp_path / "runs" / "sweep.html").read_text()
    assert all(part in said for part in ("Read this.", "87.5 ± 17.7", "−37.5 [−50.0, −25.0]", "data:image/png"))

    (ax,) = drawn[0].axes
    bars = sorted(round(bar.get_height(), 9) for bar in ax.patches)
    parts = [p for run in (a, b) for p in run["strata"].values()]
    assert bars == sorted(round(100 * p["gain"], 9) for p in parts)
    dots = sorted(y for line in ax.lines if line.get_marker() == "." for y in line.get_ydata())
    assert dots == sorted(100 * g for p in parts for g in p["draws"])


def test_the_figures_obey_the_matcher_and_the_folded_form(tmp_path, monkeypatch, capsys):
    """Answers in a sentence, gold with an accent the answers lack: nothing is equal, all are right in whole words."""
    said = {"R": "It is Zoe gold.", "W": "It is lead."}
    samples = {}
    for name, of in {"a-seed0": ("thinkon", "mralign"), "b-c-seed0": ("thinkon", "kto")}.items():
        samples[name] = {}
        for setting, codes in zip(of, ("RR RW WW RR", "RR RR WW RR"), strict=True):
            samples[name][setting] = [
                row
                | {"answers": ["Zo\u00eb"], "text": f"<think>\n{said[c[0]]}\n</think>\n\n<answer>{said[c[1]]}</answer>"}
                for row, c in zip(rows(codes), codes.split(), strict=True)
            ]
    path = place(tmp_path, monkeypatch, samples, {}, [0])
    assert sweep.main([str(path)]) == 0
    assert read_json(tmp_path / "runs" / "sweep.json")["runs"]["a"]["sets"]["nq"]["acc"]["mean"] == 0.0
    assert sweep.main([str(path), "--score-matcher", "words", "--fold"]) == 0
    result = read_json(tmp_path / "runs" / "sweep.json")
    assert result["matcher"] == "words, folded"
    a = result["runs"]["a"]["sets"]["nq"]
    assert (result["thinkon"]["nq"]["acc"]["mean"], a["acc"]["mean"]) == (0.5, 0.75)
    assert {k: p["n"] for k, p in a["strata"].items()} == {"both correct": 2, "both wrong": 1, "inconsistent": 1}
    assert a["strata"]["inconsistent"]["gain"] == 1.0
    assert "answers: words, folded" in (tmp_path / "runs" / "sweep.md").read_text()


def test_one_seed_has_no_spread(tmp_path, monkeypatch, capsys):
    path = place(tmp_path, monkeypatch, SAMPLES, {}, [0])
    assert sweep.main([str(path)]) == 0
    lines = table_of(tmp_path / "runs" / "sweep.md", "Acc and Mis")
    assert lines[3][:5] == ["a", "nq", "1", "75.0", "0.0"]
    assert (tmp_path / "runs" / "strata.png").stat().st_size > 1000


def test_unfinished_runs_say_so_and_others_go_on(tmp_path, monkeypatch, capsys):
    """Seed 1 of the first run fails, so seed 1 of the other is not started: one seed of each is left."""
    path = place(tmp_path, monkeypatch, SAMPLES, {"a-seed1": 5}, [0, 1])
    assert sweep.main([str(path)]) == 5
    assert (tmp_path / "order.txt").read_text().split() == ["a-seed0", "a-seed1", "b-c-seed0"]
    assert "error: exit code 5 of a, seed 1 (error: no model), see " in capsys.readouterr().err
    lines = table_of(tmp_path / "runs" / "sweep.md", "Acc and Mis")
    assert [line[2:4] for line in lines[2:]] == [["1", "50.0"], ["1", "75.0"], ["1", "50.0"]]

    write_json(tmp_path / "codes.json", {"b-c-seed0": 5, "b-c-seed1": 5})
    assert sweep.main([str(path)]) == 5
    lines = table_of(tmp_path / "runs" / "sweep.md", "Acc and Mis")
    assert lines[3][:4] == ["a", "nq", "2", "87.5 ± 17.7"] and lines[4][:5] == ["b c", "–", "0", "not run", "–"]

    write_json(tmp_path / "codes.json", {"a-seed0": 5, "a-seed1": 5})
    assert sweep.main([str(path)]) == 5
    lines = table_of(tmp_path / "runs" / "sweep.md", "Acc and Mis")
    assert [line[3] for line in lines[2:]] == ["not run", "not run"] and "37.34" in lines[2]


def test_seeds_that_only_one_run_has_finished_stay_out_of_the_difference(tmp_path, monkeypatch, capsys):
    path = place(tmp_path, monkeypatch, SAMPLES, {"b-c-seed1": 5}, [0, 1])
    assert sweep.main([str(path)]) == 5
    b = read_json(tmp_path / "runs" / "sweep.json")["runs"]["b c"]
    assert b["seeds"] == [0] and b["sets"]["nq"]["difference"]["acc"]["difference"] == -0.25


def test_after_a_run_was_asked_to_stop_nothing_is_started_and_no_table_is_written(tmp_path, monkeypatch, capsys):
    path = place(tmp_path, monkeypatch, SAMPLES, {"a-seed0": 130}, [0, 1])
    assert sweep.main([str(path)]) == 130
    assert (tmp_path / "order.txt").read_text().split() == ["a-seed0"]
    assert not (tmp_path / "runs" / "sweep.json").exists() and "goes on from there" in capsys.readouterr().err


def test_the_result_is_json_and_holds_the_settings(tmp_path, monkeypatch, capsys):
    path = place(tmp_path, monkeypatch, SAMPLES, {}, [0, 1])
    sweep.main([str(path)])
    result = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    about = result["receipt"]
    assert (about["command"], about["seeds"], about["commit"]) == (f"python -m tools.sweep {path}", "0 1", "x")
    assert {name: of["settings"] for name, of in result["runs"].items()} == {
        "a": {"method": "mralign"},
        "b c": {"method": "kto"},
    }


# Signals: the runner in a process of its own, with runs that note who they are and how they ended

RUN_ALL = """
    import sys
    from pathlib import Path
    from tools import sweep
    here, program = Path(sys.argv[1]), sys.argv[2]
    runs = [sweep.Child(n, here / n, lambda n=n: ["-c", program, str(here / n)]) for n in "abc"]
    print(sorted(sweep.run_all(runs, 2, here).items()))
"""
POLITE = """
    import os, signal, sys
    from pathlib import Path
    out = Path(sys.argv[1])
    def end(number, frame):
        (out / "ended").write_text(str(number))
        sys.exit(75)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    (out / "pid").write_text(str(os.getpid()))
    while True:
        signal.pause()
"""
DEAF = """
    import os, signal, subprocess, sys
    from pathlib import Path
    out = Path(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (out / "heard").write_text(str(number)))
    worker = "import signal; signal.pause()"
    below = subprocess.Popen([sys.executable, "-c", worker], start_new_session=True)
    (out / "below").write_text(str(below.pid))
    (out / "pid").write_text(str(os.getpid()))
    while True:
        signal.pause()
"""
JOINED = """
    import os, signal, sys
    from pathlib import Path
    from common.ranks import process_group
    out = Path(sys.argv[1])
    def end(number, frame):
        (out / "ended").write_text(str(number))
        sys.exit(75)
    with process_group():
        signal.signal(signal.SIGTERM, end)
        (out / "pid").write_text(str(os.getpid()))
        while True:
            signal.pause()
"""


def until(there: Callable[[], bool]) -> None:
    """Wait for something another process does; the suite's own time limit ends a wait in vain."""
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        os.sched_yield()


def started(tmp_path: Path, program: str) -> subprocess.Popen[str]:
    """The runner with three such runs, two of them at work."""
    words = [sys.executable, "-c", textwrap.dedent(RUN_ALL), str(tmp_path), textwrap.dedent(program)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runner = subprocess.Popen(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    until(lambda: all((tmp_path / n / "pid").exists() and (tmp_path / n / "pid").read_text() for n in "ab"))
    return runner


def gone(path: Path) -> bool:
    """Whether the process whose id stands in a file has ended (a zombie that its parent left has, too)."""
    try:
        return "(zombie)" in Path(f"/proc/{path.read_text()}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.long
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_to_the_runs_and_waits_for_them(tmp_path, number, code):
    runner = started(tmp_path, POLITE)
    runner.send_signal(number)
    said, _ = runner.communicate()
    assert said.strip() == str([(n, code) for n in "abc"])
    for name in "ab":
        assert (tmp_path / name / "ended").read_text() == str(int(number)) and gone(tmp_path / name / "pid")
    assert not (tmp_path / "c" / "pid").exists()


@pytest.mark.long
def test_a_second_signal_kills_the_runs_and_what_is_below_them(tmp_path):
    runner = started(tmp_path, DEAF)
    runner.send_signal(signal.SIGINT)
    until(lambda: all((tmp_path / n / "heard").exists() for n in "ab"))
    runner.send_signal(signal.SIGINT)
    assert runner.communicate()[0].strip() == str([(n, 130) for n in "abc"])
    until(lambda: all(gone(tmp_path / n / word) for n in "ab" for word in ("pid", "below")))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a process that its parent has died")
def test_runs_end_when_the_runner_is_killed(tmp_path):
    """Else they would go on beside those of the next runner, in the same folders."""
    runner = started(tmp_path, JOINED)
    runner.kill()
    runner.communicate()
    until(lambda: all(gone(tmp_path / n / "pid") for n in "ab"))
    assert [(tmp_path / n / "ended").read_text() for n in "ab"] == [str(int(signal.SIGTERM))] * 2


@pytest.mark.long
def test_a_second_runner_in_the_same_folder_is_told_who_is_there(tmp_path):
    runner = started(tmp_path, POLITE)
    with pytest.raises(InputError, match=f"process {runner.pid} "):
        sweep.run_all([], 1, tmp_path)
    runner.terminate()
    runner.communicate()


def test_nohup_holds_for_the_runner_too():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sweep.Processes().listen():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
