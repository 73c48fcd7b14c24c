"""What tools/engine_check.py does around vLLM: the words it starts, the metadata it leaves, the processes it ends."""

import contextlib
import importlib.metadata
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from common.errors import InputError, ServiceError
from common.files import read_jsonl, write_jsonl
from tools import engine_check

# A server and a worker below it, both deaf to SIGTERM; the second line of its output comes when both are.
DEAF = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
below = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", below], stdout=subprocess.PIPE, text=True)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""


def assert_ends(pid: int) -> None:
    """A killed process takes a moment to go; one that nobody has waited for yet counts as gone."""
    state, last = Path(f"/proc/{pid}/stat"), time.monotonic() + 30
    with contextlib.suppress(OSError):  # no such file: gone
        while state.read_text().rpartition(")")[2].split()[0] not in "ZX":
            assert time.monotonic() < last, f"process {pid} is still there"


def test_the_server_is_told_to_take_adapters_at_run_time():
    words = engine_check.serve_command(
        Path("env/bin/python"), Path("mini/model"), 81, {"kto": Path("a"), "sft": Path("b")}
    )
    assert words[:3] == ["env/bin/vllm", "serve", "mini/model"] and "--enforce-eager" in words
    assert words[words.index("--max-model-len") + 1] == "512" and words[words.index("--port") + 1] == "81"
    assert "--enable-lora" in words and words[words.index("--lora-modules") + 1 :] == ["kto=a", "sft=b"]
    assert "--lora-modules" not in engine_check.serve_command(Path("p"), Path("m"), 81, {})
    env = engine_check.serve_environment()
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1" and env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert env["PATH"] == os.environ["PATH"]


def test_vllm_finds_itself_by_name(tmp_path, monkeypatch):
    version = engine_check.PACKAGES[0].partition("==")[2]
    own = tmp_path / f"vllm_cpu-{version}.dist-info"
    own.mkdir()
    (own / "METADATA").write_text(f"Metadata-Version: 2.4\nName: vllm-cpu\nVersion: {version}\n\nName: a text\n")
    engine_check.name_it_vllm(tmp_path)
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=[str(tmp_path)])}
    assert found == {"vllm-cpu": version, "vllm": f"{version}+cpu"}


def test_a_deaf_server_and_what_is_below_it_end_with_the_block(tmp_path):
    class Interrupted(Exception):
        pass

    pids = []
    with pytest.raises(Interrupted):  # what happens inside is no reason to leave anything behind
        with engine_check.started([sys.executable, "-c", DEAF], tmp_path / "log", os.environ) as server:
            while not (said := (tmp_path / "log").read_text()).endswith("\n"):
                assert server.poll() is None
            pids += [server.pid, int(said)]
            engine_check.end(server, patience=0.1)
            raise Interrupted
    assert len(pids) == 2
    for pid in pids:
        assert_ends(pid)


def test_a_worker_that_outlives_its_server_ends_too(tmp_path):
    leave = DEAF.replace("worker.wait()", "")
    with engine_check.started([sys.executable, "-c", leave], tmp_path / "log", os.environ) as server:
        assert server.wait() == 0
    assert_ends(int((tmp_path / "log").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_check_and_its_server(tmp_path, monkeypatch, capsys, number):
    log = tmp_path / "log"

    def hang() -> None:
        with engine_check.started([sys.executable, "-c", DEAF], log, os.environ) as server:
            while not log.read_text().endswith("\n"):
                assert server.poll() is None
            os.kill(os.getpid(), number)
            server.wait()

    monkeypatch.setattr(engine_check, "make_environment", hang)
    monkeypatch.setattr(engine_check.end, "__defaults__", (0.1,))  # of patience
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert engine_check.main([]) == (75 if number == signal.SIGTERM else 130)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert ("stopped by SIGTERM" if number == signal.SIGTERM else "interrupted") in capsys.readouterr().err
    assert_ends(int(log.read_text()))


def test_a_server_that_dies_and_a_program_that_fails_are_said_with_their_log(tmp_path):
    log = tmp_path / "log"
    with engine_check.started([sys.executable, "-c", "raise SystemExit(7)"], log, os.environ) as server:
        server.wait()
        with pytest.raises(ServiceError, match=f"ended with 7 before it was up; see {log}"):
            engine_check.wait_until_up(server, "http://127.0.0.1:9/health", log)
    with pytest.raises(ServiceError, match=f"ended with 3; see {log}"):
        engine_check.run([sys.executable, "-c", "raise SystemExit(3)"], log)


def test_counts_may_differ_by_chance_only():
    held = [engine_check.counts("", a, b)["held"] for a, b in ((296, 294), (131, 128), (100, 160), (0, 0), (0, 17))]
    assert held == ["yes", "yes", "yes", "yes", "NO"]  # 100 and 160: 60 of 4 * sqrt(260) = 64.5
    assert engine_check.counts("", 100, 170)["held"] == "NO"  # 70 of 65.7


def test_questions_are_taken_from_all_over_the_file(tmp_path):
    write_jsonl(tmp_path / "all", [{"n": n} for n in range(10)])
    assert [r["n"] for r in read_jsonl(engine_check.thinned(tmp_path / "all", tmp_path / "some", 4))] == [0, 2, 5, 7]
    assert len(read_jsonl(engine_check.thinned(tmp_path / "all", tmp_path / "more", 40))) == 10


def test_a_folder_with_a_space_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a b: vLLM on a CPU cannot run from a folder with a space"):
        engine_check.make_environment(tmp_path / "a b")
    assert not list(tmp_path.iterdir())
