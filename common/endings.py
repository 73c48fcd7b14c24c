"""How a program ends: what an error means as an exit code, a line for people, and status.json for whoever waits.

0 done, 3 bad input, 4 a server, a key or the budget ended the run, 5 numbers that cannot be right or memory that does
not suffice, 75 stopped or a full disk and can be resumed, 130 interrupted and can be resumed. Anything else is a bug
and keeps its traceback.
"""

import contextlib
import errno
import os
import signal
import sys
from pathlib import Path

import torch

from common.errors import InputError, MemoryFull, NumericsError, ServiceError, Stopped
from common.files import write_json

ENDINGS = (InputError, ServiceError, NumericsError, MemoryFull, torch.OutOfMemoryError, Stopped, OSError)


def ending(error: BaseException) -> tuple[int, str]:
    """What one of ENDINGS means to whoever started the program: (exit code, a line); code 1 is a bug."""
    again = "the same command with --resume goes on"
    if isinstance(error, Stopped):
        return 130 if error.number == signal.SIGINT else 75, f"stopped by {error}; {again}"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return 75 if full else 1, f"{error}; free some space, {again}"
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).partition(". ")[0]
        return 5, f"{reason}; use a smaller --sample-batch in sampling and evaluation, --shard in training"
    codes = {InputError: 3, ServiceError: 4}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 5), str(error)


def leave_status(out: Path, rank: int, code: int, reason: str) -> None:
    """status.json: what the run ended with, as torchrun itself always exits with 1. An error of a rank comes first."""
    path = out / "status.json"
    if code not in (0, 75, 130) or (rank == 0 and not path.exists()):
        state = {0: "done", 75: "stopped, can be resumed", 130: "stopped, can be resumed"}
        with contextlib.suppress(OSError):  # on a full disk the line on stderr has to do
            write_json(path, {"state": state.get(code, "failed"), "exit_code": code, "rank": rank, "reason": reason})


def settle(error: BaseException | None, out: Path | None) -> int:
    """The exit code of a program that ended with `error`, one of ENDINGS, or None when all went well.

    Says why on stderr and leaves status.json in `out` (None: the program had not come as far as knowing it). A bug is
    raised again.
    """
    rank = int(os.environ.get("RANK", 0))
    code, reason = (0, "") if error is None else ending(error)
    if code == 1:
        raise error
    if code and (rank == 0 or out is not None):
        print(f"error{f' on rank {rank}' if rank else ''}: {reason}", file=sys.stderr)
    if out is not None:
        leave_status(out, rank, code, reason)
    return code
