"""torchrun with a short end: what the failed process said stays the last line, and its exit code becomes ours.

  python -m tools.torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=4 mralign.py --config ...

The arguments, the processes and the restarts are torchrun's. torchrun itself ends every failed run with exit code 1 and
a traceback of its own, some forty lines below the line that says what is wrong. Here the code is that of the process
that failed first (common/endings.py), 128 + n if signal n killed it, 75 or 130 where the run was asked to stop.
"""

import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from common.endings import ignored

STOPPED = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    if ignored(signal.SIGHUP):  # by nohup; torch's launcher would end at it all the same
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    args = run.parse_args(argv)
    if int(args.max_restarts) == 0:  # else the log says what each restart was for
        logging.disable(logging.ERROR)
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        told = f"rank {rank} was killed by {failure.signal_name()}"
        hint = " (out of memory?)" if -failure.exitcode == signal.SIGKILL else ""
        print(f"error: {told}{hint}; the same command with --resume goes on", file=sys.stderr)
        return 128 - failure.exitcode
    except RendezvousError as error:
        reason = " ".join(str(error).split())
        print(f"error: the launchers did not find each other ({reason}); check --rdzv-endpoint", file=sys.stderr)
        return 4
    except SignalException as stop:
        return STOPPED.get(stop.sigval, 128 + stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
