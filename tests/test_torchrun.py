"""tools/torchrun.py: the failed process has the last word, and its exit code is the launcher's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from tools import torchrun

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ({}, 0, ""),
        ({0: 3, 1: -15}, 3, ""),  # rank 0 said why; the launcher then ended rank 1
        ({1: 4, 0: -15}, 4, ""),
        ({1: -9, 0: 1}, 137, "error: rank 1 was killed by SIGKILL (out of memory?); the same command with --resume"),
        ({0: -11}, 139, "error: rank 0 was killed by SIGSEGV; the same command with --resume goes on\n"),
        ("HOST:1 is not there", 4, "error: the launchers did not find each other (HOST:1 is not there); check --rdzv-"),
        (signal.SIGTERM, 75, ""),
        (signal.SIGINT, 130, ""),
        (signal.SIGHUP, 75, ""),
        (signal.SIGQUIT, 131, ""),
    ],
)
def test_the_code_is_that_of_the_first_failure(monkeypatch, capsys, ends, code, said):
    """ends: rank -> how it ended, in the order in which torchrun saw it, or the signal torchrun got, or why not."""

    def fail(args) -> None:
        if isinstance(ends, str):
            raise RendezvousError(ends)
        if isinstance(ends, signal.Signals):
            raise SignalException("stopped", ends)
        if ends:
            failures = {rank: ProcessFailure(rank, 100 + rank, ended, "<N/A>") for rank, ended in ends.items()}
            raise ChildFailedError("mralign.py", failures)

    monkeypatch.setattr(run, "run", fail)
    monkeypatch.setattr(torchrun.logging, "disable", lambda level: None)
    assert torchrun.main(["--nproc_per_node=2", "mralign.py", "--config", "a.json"]) == code
    told = capsys.readouterr().err
    assert told.startswith(said) and bool(told) == bool(said)


WORKER = """
import os, signal, sys, time
case, rank = sys.argv[1], os.environ["RANK"]
if case == "input" and rank == "0":
    sys.exit(print("error: a.jsonl line 3: no answers; add them", file=sys.stderr, flush=True) or 3)
if case == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if case == "restart":
    sys.exit(9 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
if case == "stopped":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(os.write(2, b"error: stopped\\n") and 75))  # one write: a line
    print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "code", "last"),
    [
        ("input", 3, "error: a.jsonl line 3: no answers; add them"),
        ("killed", 137, "error: rank 1 was killed by SIGKILL (out of memory?); the same command with --resume goes on"),
        ("stopped", 75, "error: stopped"),
        ("restart", 0, None),
    ],
)
def test_real_processes_have_the_last_word(tmp_path, case, code, last):
    (tmp_path / "worker.py").write_text(WORKER)
    words = ["--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2", f"--max-restarts={int(case == 'restart')}"]
    command = [sys.executable, "-m", "tools.torchrun", *words, str(tmp_path / "worker.py"), case]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as started:
        if case == "stopped":
            assert [started.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
            started.terminate()
        _, told = started.communicate()
    assert started.returncode == code, told
    assert last is None or set(told.splitlines()) == {last}, told


def test_nohup_holds_for_the_launcher_too(monkeypatch):
    """torch's own launcher ends at SIGHUP whatever nohup says, and its log-out takes the training with it."""
    seen = []
    monkeypatch.delenv("TORCHELASTIC_SIGNALS_TO_HANDLE", raising=False)
    monkeypatch.setattr(torchrun.run, "run", lambda args: seen.append(os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert torchrun.main(["x.py"]) == 0
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert torchrun.main(["x.py"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [None, "SIGTERM,SIGINT,SIGQUIT"]
