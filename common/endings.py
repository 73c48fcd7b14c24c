"""How a program ends: what an error means as an exit code, a line for people, and status.json for whoever waits.

0 done, 3 bad input, 4 a server, a key or the budget ended the run, 5 numbers that cannot be right, things that must
agree and do not, or memory that does not suffice, 75 stopped or a full disk and can be resumed, 130 interrupted and can
be resumed, 141 nobody reads the output any more (`| head`). Anything else is a bug and keeps its traceback. A command
line that cannot be read is 2.

The first SIGTERM or SIGINT says which of 75 and 130 it is, whatever follows it, and from then on the program is on its
way out: it saves what is finished. Only a second Ctrl-C, later than ECHO seconds, ends it on the spot, with the same
code. Left out: the seconds in which Python imports the program, when a signal does what it does to any program.
"""

import atexit
import contextlib
import errno
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from common.errors import Disagreement, InputError, MemoryFull, NumericsError, ServiceError, Stopped, UsageError
from common.files import write_json

ENDINGS = (Exception, Stopped, KeyboardInterrupt)  # what `settle` takes; it raises bugs again
CODES = {UsageError: 2, InputError: 3, ServiceError: 4}
CODES |= {NumericsError: 5, MemoryFull: 5, Disagreement: 5, MemoryError: 5}
# From Slurm, Kubernetes and torchrun; from a person; from a terminal that closes.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO = 2.0  # seconds in which torchrun repeats to its ranks what a terminal has sent them already
FIRST = 5.0  # seconds that the other ranks leave to rank 0
FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def ignored(number: int) -> bool:
    """Whether whoever started the program told it to ignore a signal, as nohup does with SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


class Stop:
    """What SIGNALS do: raise Stopped at once, or leave a note where work is saved first (`hold`).

    plain: raise KeyboardInterrupt for SIGINT, as Python does by itself.
    """

    def __init__(self, plain: bool = False) -> None:
        self.plain, self.held, self.raised = plain, False, False
        self.number, self.since = 0, 0.0  # of the first signal

    def __call__(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > ECHO:
            os._exit(ending(Stopped(self.number))[0])
        if not (self.held or self.raised):
            self.end(self.number)

    def end(self, number: int) -> NoReturn:
        """Raise Stopped; further signals raise nothing. number: of the signal, which may have reached another rank."""
        self.raised = True
        if not self.number:
            self.number, self.since = number, time.monotonic()
        raise KeyboardInterrupt if self.plain and number == signal.SIGINT else Stopped(number)

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Inside, SIGNALS come here, and after it too if one came: then the program is ending. Main thread.

        What nohup has told the program to ignore, it ignores.
        """
        heard = {n: signal.getsignal(n) for n in SIGNALS if n != signal.SIGHUP or not ignored(n)}
        for n in heard:
            signal.signal(n, self)
        try:
            yield
        finally:
            for n, handler in heard.items():
                if not self.number and signal.getsignal(n) is self:  # nothing came, here or to a listener within
                    signal.signal(n, handler)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, a signal only leaves a note for `Ranks.check_stop`. Raises Stopped at the end if one came."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        if self.number:
            self.end(self.number)


def ending(error: BaseException) -> tuple[int, str]:
    """What an error means to whoever started the program: (exit code, a line); code 1 is a bug."""
    again = "the same command goes on, with --resume where there is one"
    if isinstance(error, Stopped):
        return 130 if error.number == signal.SIGINT else 75, f"stopped by {error}; {again}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command again keeps what is finished"
    if isinstance(error, BrokenPipeError):
        return 141, "nobody reads the output any more"
    if isinstance(error, OSError):
        if error.errno in UNUSABLE and error.filename:
            return 3, f"{error.filename}: {error.strerror}; give another place, or the right to use this one"
        return 75 if error.errno in FULL else 1, f"{error}; free some space, {again}"
    torch = sys.modules.get("torch")  # an error of its own can only come from where it is loaded
    if torch and isinstance(error, torch.OutOfMemoryError):
        reason = str(error).partition(". ")[0]
        return 5, f"{reason}; use a smaller --sample-batch in sampling and evaluation, --shard in training"
    reason = " ".join(str(error).split()) or type(error).__name__
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), 1), reason


def leave_status(out: Path, rank: int, code: int, reason: str) -> None:
    """status.json: what the run ended with, as torchrun itself always exits with 1. An error of a rank comes first."""
    path = out / "status.json"
    if code not in (0, 75, 130) or (rank == 0 and not path.exists()):
        state = {0: "done", 75: "stopped, can be resumed", 130: "stopped, can be resumed"}
        with contextlib.suppress(OSError):  # on a full disk the line on stderr has to do
            write_json(path, {"state": state.get(code, "failed"), "exit_code": code, "rank": rank, "reason": reason})


def say(error: BaseException, rank: int, reason: str) -> None:
    """The line on stderr, once for all ranks: rank 0 says a stop, which is for all, the first it befalls an error.

    Who is first stands in the launcher's store, which is not asked about a stop: the launcher may have been killed.
    """
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        first = rank == 0
    else:
        ranks = sys.modules.get("common.ranks")  # a program that does not know it runs alone
        first = not ranks or ranks.first_to_say(reason)
    with contextlib.suppress(OSError):  # the terminal has closed, or the disk with the log is full
        if first:
            print(f"error{f' on rank {rank}' if rank else ''}: {reason}", file=sys.stderr, flush=True)


def settle(error: BaseException | None, out: Path | None) -> int:
    """The exit code of a program that ended with `error`, or None when all went well.

    Says why on stderr and leaves status.json in `out` (None: the program had not come as far as knowing it). A bug is
    raised again.
    """
    rank = int(os.environ.get("RANK", 0))
    code, reason = (0, "") if error is None else ending(error)
    if error is not None and code == 1:
        raise error
    if code == 141:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain again as it flushes
    told = getattr(error, "told", False)  # by `status`
    if error is not None and not told:
        if rank and not isinstance(error, (Stopped, KeyboardInterrupt)):
            time.sleep(FIRST)  # torchrun ends all when one has ended: what befell every rank is for rank 0 to say
        say(error, rank, reason)
    if code in (75, 130) and DONE and rank == 0:  # a signal between the last stage and the end: the two must agree
        (DONE[-1] / "status.json").unlink(missing_ok=True)
        leave_status(DONE[-1], rank, code, reason)
    if out is not None:
        leave_status(out, rank, code, reason)
    return code


DONE: list[Path] = []  # the folder, if any, of which this process has last said that its run is done


@contextlib.contextmanager
def status(out: Path) -> Iterator[None]:
    """Within it, an ending of the run is also left in `out`/status.json, and said at once by the first rank it befalls.

    Use it inside the process group: a rank that has left ends the others' sums.
    """
    try:
        yield
    except ENDINGS as error:
        code, reason = ending(error)
        rank = int(os.environ.get("RANK", 0))
        if code != 1:
            leave_status(out, rank, code, reason)
            say(error, rank, reason)
            error.told = True  # type: ignore[union-attr]
        raise
    leave_status(out, int(os.environ.get("RANK", 0)), 0, "")
    DONE[:] = [out]


def _deaf() -> None:
    """Python takes handlers away as it shuts down, which would leave a late signal its own way. Not before: a process
    that this one starts would be deaf too."""
    for n in SIGNALS:
        signal.signal(n, signal.SIG_IGN)


def _open_standard() -> None:
    """Give a program that was started with a closed stdin, stdout or stderr an empty one.

    Else the next file that is opened, an adapter say, would be number 2, where libraries write their warnings.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")


def program(main: Callable[..., int | None]) -> Callable[..., int]:
    """A decorator: the `main` of a command line that returns an exit code for every ending and raises bugs only.

    @program
    def main(argv=None):
        \"\"\"The command line.\"\"\"
        ...  # raise InputError and the like; return nothing, or a code of your own
    """

    @functools.wraps(main)
    def whole(*args: Any, **kwargs: Any) -> int:
        _open_standard()
        if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
            return ended(*args, **kwargs)
        before = [signal.getsignal(n) for n in SIGNALS]
        with Stop(plain=True).listen():
            code = ended(*args, **kwargs)
        if before != [signal.getsignal(n) for n in SIGNALS]:  # one came
            atexit.register(_deaf)
        return code

    def ended(*args: Any, **kwargs: Any) -> int:
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()
        except ENDINGS as error:
            try:
                return settle(error, None)
            except (Stopped, KeyboardInterrupt):  # while it waited for rank 0 to speak
                return ending(error)[0]
        return code

    return whole
