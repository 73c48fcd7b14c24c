"""endings.py: every way a program can end, as its exit code and one line."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common import endings
from common.errors import BudgetSpent, Disagreement, InputError, MemoryFull, NumericsError, Refused, Stopped
from common.files import read_json

CASES = [
    (InputError("a.json: bad; repair it"), 3, "a.json: bad; repair it"),
    (BudgetSpent("budget: spent"), 4, "budget: spent"),
    (Refused("no key"), 4, "no key"),
    (NumericsError("loss is nan"), 5, "loss is nan"),
    (Disagreement("two things"), 5, "two things"),
    (MemoryFull("3 rows"), 5, "3 rows"),
    (MemoryError(), 5, "MemoryError"),
    (OSError(errno.ENOSPC, "No space left", "/x"), 75, "free some space"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 3, "/x: Permission denied; give another place"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), 3, "/x: Not a directory"),
    (Stopped(signal.SIGTERM), 75, "stopped by SIGTERM"),
    (Stopped(signal.SIGINT), 130, "stopped by SIGINT"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("error", "code", "words"), CASES, ids=lambda x: type(x).__name__)
def test_an_ending_is_a_code_and_one_line(error, code, words, capsys) -> None:
    @endings.program
    def main() -> None:
        raise error

    assert main() == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("a bug"), OSError(errno.EIO, "Input/output"), KeyError(1)]
)
def test_a_bug_keeps_its_traceback(error) -> None:
    @endings.program
    def main() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        main()
    assert caught.value is error


def test_codes_of_its_own_and_usage_errors_pass() -> None:
    assert endings.program(lambda: None)() == 0 and endings.program(lambda code: code)(7) == 7
    with pytest.raises(SystemExit):
        endings.program(lambda: sys.exit(2))()


def test_torchs_out_of_memory_is_known_without_importing_torch() -> None:
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More.")
    assert endings.ending(error) == (
        5,
        "CUDA out of memory; use a smaller --sample-batch in sampling and evaluation, --shard in training",
    )
    code = "import sys, common.endings, common.settings, common.template, common.model_config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "common.endings" in loaded and not {"torch", "transformers", "matplotlib", "llm"} & set(loaded)


def test_status_says_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def run(error: BaseException | None, rank: str = "0") -> int:
        monkeypatch.setenv("RANK", rank)

        @endings.program
        def main() -> None:
            with endings.status(tmp_path):
                if error:
                    raise error

        return main()

    assert run(Stopped(signal.SIGTERM)) == 75
    stopped = {"state": "stopped, can be resumed", "exit_code": 75, "rank": 0}
    assert read_json(tmp_path / "status.json").items() >= stopped.items()
    assert run(InputError("bad"), "2") == 3
    failed = {"state": "failed", "exit_code": 3, "rank": 2, "reason": "bad"}
    assert read_json(tmp_path / "status.json") == failed
    assert run(Stopped(signal.SIGTERM)) == 75 and read_json(tmp_path / "status.json") == failed  # an error comes first
    assert run(Stopped(signal.SIGTERM), "1") == 75
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["error", "error on rank 2", "error"]  # rank 0 says a stop
    (tmp_path / "status.json").unlink()
    assert run(None) == 0
    assert read_json(tmp_path / "status.json") == {"state": "done", "exit_code": 0, "rank": 0, "reason": ""}


def test_what_befalls_every_rank_is_said_by_rank_0(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """torchrun ends all ranks when one has ended, so the others wait for rank 0, and speak if that had no error."""
    slept: list[float] = []
    monkeypatch.setattr(endings.time, "sleep", slept.append)
    for rank, said, waits in (("0", "error: bad\n", []), ("3", "error on rank 3: bad\n", [endings.FIRST])):
        monkeypatch.setenv("RANK", rank)
        slept.clear()
        assert endings.settle(InputError("bad"), None) == 3
        assert (capsys.readouterr().err, slept) == (said, waits)
    assert endings.settle(None, None) == 0 and slept == [endings.FIRST]


def test_one_text_is_said_by_one_rank(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Three ranks with the launcher's store: the same mistake is one line, a mistake of its own another one."""
    import torch.distributed as dist

    from common import ranks

    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(store, 0, 3)]))
    monkeypatch.setattr(endings.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for rank, text in ((1, "all"), (0, "all"), (2, "all"), (2, "its own")):
        monkeypatch.setenv("RANK", str(rank))
        assert endings.settle(InputError(text), None) == 3
    assert capsys.readouterr().err == "error on rank 1: all\nerror on rank 2: its own\n"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # what befell the first attempt may befall the second
    assert ranks.first_to_say("all") is True and ranks.first_to_say("all") is False

    def gone(url: str, timeout: object) -> None:
        raise dist.DistNetworkError("connection refused")

    monkeypatch.setattr(dist, "rendezvous", gone)
    assert ranks.first_to_say("all") is True
    # A stop comes also when the launcher was killed: nobody asks its store, which takes ten seconds to be missed.
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: pytest.fail("the store was asked"))
    monkeypatch.setattr(endings.time, "sleep", lambda seconds: pytest.fail("it waited"))
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert endings.settle(Stopped(signal.SIGTERM), None) == 75
    said = capsys.readouterr().err
    assert said.startswith("error: stopped by SIGTERM") and said.count("\n") == 1
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert ranks.first_to_say("all") is True  # alone


def test_what_a_stopped_program_starts_later_hears_signals() -> None:
    """Where a program runs inside another one: ignored signals would be inherited."""

    @endings.program
    def main() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endings.atexit, "register", lambda work: None)  # this process goes on
        assert main() == 75
    child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=-1)
    with child:
        assert child.stdout.readline() == b"1\n"
        child.terminate()
    assert child.returncode == -signal.SIGTERM


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    script = (
        "import sys; from common.endings import program\n"
        "sys.exit(program(lambda: [print('line', i) for i in range(100_000)] and None)())"
    )
    read, write = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    _, said = child.communicate()
    assert child.returncode == 141 and said == "error: nobody reads the output any more\n"


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a process that its parent has died")
def test_a_rank_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    """The launcher cannot pass anything on; the rank's own SIGTERM comes from the kernel."""
    rank = "import signal, time; from common.ranks import end_with_launcher; end_with_launcher()\n"
    rank += "signal.signal(signal.SIGTERM, lambda n, _: exit(print('stopped by', n, flush=True)))\n"
    rank += "print('ready', flush=True); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}]).wait()"
    with subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline() == "ready\n"
        started.kill()
        assert started.stdout.read() == f"stopped by {int(signal.SIGTERM)}\n"  # and the pipe is closed: nobody is left


PHASES = """
import os, sys
from common import endings
phase, first, second = sys.argv[1], *map(int, sys.argv[2:])

def send(number):
    os.kill(os.getpid(), number)

def again():
    send(second)

class AtTheEnd:  # is taken apart when Python shuts down
    def __del__(self, kill=os.kill, me=os.getpid(), number=second):
        kill(me, number)

@endings.program
def main():
    stop = endings.Stop()
    if phase == "before":  # while it looks for its model
        send(first)
    with stop.listen():
        if phase == "held":
            with stop.hold():
                send(first)
                again()
        try:
            send(first)
        finally:
            if phase == "cleaning":
                again()

settled = endings.settle
if phase == "settling":
    endings.settle = lambda *args: again() or settled(*args)
if phase == "shutdown":
    end = AtTheEnd()
sys.exit(main())
"""
TWO = [(signal.SIGTERM, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize("phase", ["before", "held", "cleaning", "settling", "shutdown"])
def test_the_first_signal_says_how_it_ends_whatever_follows(phase: str) -> None:
    """A second one never puts its own number, -15 or -2, in the place of 75 or 130, in any phase."""
    runs = []
    for first, code in TWO:
        for second, _ in TWO:
            words = [sys.executable, "-c", PHASES, phase, str(int(first)), str(int(second))]
            runs.append((code, subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)))
    for code, run in runs:
        _, said = run.communicate()
        assert run.returncode == code and said.startswith("error: ") and said.count("\n") == 1, (said, run.args)


def test_a_second_ctrl_c_ends_it_on_the_spot_with_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that torchrun repeats at once, and no SIGTERM: a step may be under way that is saved."""
    clock, ended = [100.0], []
    monkeypatch.setattr(endings.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(endings.os, "_exit", ended.append)
    for first, code in TWO:
        stop = endings.Stop()
        with pytest.raises(Stopped), stop.hold():
            stop(first, None)
            clock[0] += 1.9
            stop(signal.SIGINT, None)
            clock[0] += 60.0
            stop(signal.SIGTERM, None)
            assert ended == [] and stop.number == first
            stop(signal.SIGINT, None)
            assert ended == [code]
        ended.clear()


def test_a_signal_while_an_error_waits_to_be_said_keeps_the_errors_code() -> None:
    """torchrun ends the other ranks as soon as one has ended: they say nothing more, and are no bug."""
    script = "import os, signal, sys\nfrom common import endings\nfrom common.errors import InputError\n"
    script += "endings.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "def main():\n    raise InputError('bad')\nsys.exit(endings.program(main)())"
    env = os.environ | {"RANK": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")


def test_a_terminal_that_closes_stops_a_run_and_nohup_keeps_it() -> None:
    code = """
import os, signal, sys
from common.endings import program
@program
def main():
    os.kill(os.getpid(), signal.SIGHUP)
    print("went on")
sys.exit(main())"""
    for ignore, ended in (
        ("signal.signal(signal.SIGHUP, signal.SIG_DFL)\n", (75, "", True)),
        ("signal.signal(signal.SIGHUP, signal.SIG_IGN)\n", (0, "went on\n", False)),
    ):
        head = "import signal\n" + ignore
        done = subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, "stopped by SIGHUP" in done.stderr) == ended


def test_closed_streams_are_no_error_and_no_file_takes_their_place(tmp_path) -> None:
    code = f"""
import sys
from common.endings import program
@program
def main():
    with open({str(tmp_path / "f")!r}, "w") as f:
        f.write(str(f.fileno() > 2))
    print("x"), print("y", file=sys.stderr), sys.stderr.isatty()
sys.exit(main())"""
    (tmp_path / "code.py").write_text(code)
    words = f"exec '{sys.executable}' '{tmp_path / 'code.py'}' <&- >&- 2>&-"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(["sh", "-c", words], cwd=ROOT, env=env).returncode == 0
    assert (tmp_path / "f").read_text() == "True"


def test_a_signal_after_the_last_stage_says_the_same_in_both_places(tmp_path) -> None:
    @endings.program
    def main() -> None:
        with endings.status(tmp_path):
            pass
        assert read_json(tmp_path / "status.json")["state"] == "done"
        os.kill(os.getpid(), signal.SIGINT)

    assert main() == 130
    assert read_json(tmp_path / "status.json")["exit_code"] == 130
