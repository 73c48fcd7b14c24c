"""metrics.jsonl of trainings as TensorBoard runs, while they train or afterwards.

  python -m tools.tensorboard runs/mini                every metrics.jsonl below, a run a folder, into runs/mini/tb
  python -m tools.tensorboard runs/mini --follow 5     and again every 5 seconds, until Ctrl-C
  tensorboard --logdir runs/mini/tb

Needs the package tensorboard, which nothing else here does. A step is written once: a second call goes on where the
first one stopped. A training that was started anew (its file is shorter than what was written) is written anew.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.endings import program
from common.errors import InputError
from common.files import read_json, read_jsonl, write_json

STATE = "written.json"  # steps that are written, beside the event files


def writer(folder: Path) -> Any:
    """TensorBoard's event writer of a folder. Raises InputError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("TensorBoard is not installed; pip install tensorboard") from None
    return SummaryWriter(str(folder))


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a step: its numbers, but the step itself."""
    return {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}


def write(source: Path, folder: Path) -> int:
    """Write the steps of `source`, a metrics.jsonl, that `folder` does not hold yet. Returns how many."""
    rows = read_jsonl(source, ("step",))
    state = folder / STATE
    done = read_json(state)["step"] if state.exists() else 0
    if rows and rows[-1]["step"] < done:
        for old in folder.glob("events.*"):
            old.unlink()
        done = 0
    new = [row for row in rows if row["step"] > done]
    if new:
        out = writer(folder)
        for row in new:
            for name, value in numbers(row).items():
                out.add_scalar(name, value, row["step"])
        out.close()
        write_json(state, {"step": new[-1]["step"]})
    return len(new)


def sources(run: Path, out: Path) -> dict[Path, Path]:
    """metrics.jsonl -> the folder of its events, for all below `run` that are not copies in checkpoints."""
    found = [p for p in sorted(run.rglob("metrics.jsonl")) if not p.parent.name.startswith("checkpoint")]
    return {p: out / p.parent.relative_to(run) for p in found}


@program
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or one with several runs")
    parser.add_argument("--out", type=Path, help="where the events go [RUN/tb]")
    parser.add_argument("--follow", type=float, default=0.0, metavar="SECONDS", help="look again so often [once]")
    given = parser.parse_args(argv)
    out = given.out or given.run / "tb"
    if not sources(given.run, out) and not given.follow:
        raise InputError(f"{given.run}: no metrics.jsonl below it; train first, or wait with --follow 5")
    while True:
        for source, folder in sources(given.run, out).items():
            if n := write(source, folder):
                print(f"{source}: {n} steps", flush=True)
        if not given.follow:
            return
        time.sleep(given.follow)


if __name__ == "__main__":
    sys.exit(main())
