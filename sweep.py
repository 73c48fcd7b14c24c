"""Several runs that differ from one base run in a few settings, and one table beside the paper's: Tables 3 and 4.

  python sweep.py configs/ablations.json [--gpus 4] [any flag of mralign.py]

The file names the base config and, for each run, what it changes and what the paper reports. Every run is a process of
its own in a folder of its own. The first lends the others its draws, labels and unaligned samples as hard links; the
pipeline checks that they are what the run would have made, and makes them anew where they are not. A run that is
finished is not run again. Left out: runs side by side, several seeds.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from files import InputError, read_json

ROOT = Path(__file__).resolve().parent
SHARED = (
    "samples.jsonl",
    "candidates.jsonl",
    "annotations.jsonl",
    "annotations.manifest.json",
    "eval/*/base.jsonl",
    "eval/*/thinkoff.jsonl",
)
RECEIPTS = tuple(f"done/{stage}.json" for stage in ("sample", "candidates", "annotate", "eval-base", "eval-thinkoff"))


def load(path: str | Path) -> dict[str, Any]:
    """A sweep {base, out, runs: {name: {settings, paper: {set: [Acc, Mis]}}}}. Raises InputError when it is not one."""
    sweep = read_json(path)
    if not isinstance(sweep, dict) or sweep.keys() != {"base", "out", "runs"} or not isinstance(sweep["runs"], dict):
        raise InputError(f"{path}: must hold base, out and runs; see configs/ablations.json")
    for name, run in sweep["runs"].items():
        if not isinstance(run, dict) or run.keys() != {"settings", "paper"}:
            raise InputError(f"{path}: run {name!r} must hold settings and paper; see configs/ablations.json")
    return sweep


def folder(sweep: dict[str, Any], name: str) -> Path:
    """Where a run's files go."""
    return ROOT / sweep["out"] / re.sub(r"[^a-z0-9.]+", "-", name.lower())


def lend(source: Path, target: Path) -> None:
    """Link what the first run has made into another run's folder, receipts included, unless it has its own."""
    for pattern in SHARED + RECEIPTS:
        for path in source.glob(pattern):
            other = target / path.relative_to(source)
            if not other.exists():
                other.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, other)


def command(sweep: dict[str, Any], name: str, gpus: int, flags: list[str]) -> list[str]:
    """The command line of one run."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    settings = sweep["runs"][name]["settings"] | {"out": folder(sweep, name)}
    changes = [part for k, v in settings.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return [sys.executable, *launch, "mralign.py", "--config", sweep["base"], "--resume", *changes, *flags]


def table(sweep: dict[str, Any]) -> str:
    """Acc and Mis of every finished run and set, ours and the paper's, as aligned text."""
    lines = [f"{'run':<36}{'set':<12}{'Acc':>8}{'Mis':>8}{'paper Acc':>12}{'Mis':>8}"]
    for name, run in sweep["runs"].items():
        path = folder(sweep, name) / "eval" / "scores.json"
        scores = read_json(path) if path.exists() else {}
        for eval_set in scores or run["paper"]:
            ours = scores[eval_set]["metrics"]["mralign"] if scores else None
            cells = [f"{100 * ours[k]['share']:.2f}" for k in ("acc", "mis")] if ours else ["not run", ""]
            paper = [f"{x:.2f}" for x in run["paper"].get(eval_set, [])] or ["", ""]
            lines.append(f"{name:<36}{eval_set:<12}{cells[0]:>8}{cells[1]:>8}{paper[0]:>12}{paper[1]:>8}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="FILE", help="JSON file of the sweep")
    parser.add_argument("--gpus", type=int, default=1, help="processes of each run [1]")
    given, flags = parser.parse_known_args()
    try:
        sweep = load(given.sweep)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    first = folder(sweep, next(iter(sweep["runs"])))
    for name in sweep["runs"]:
        if folder(sweep, name) != first:
            lend(first, folder(sweep, name))
        code = subprocess.run(command(sweep, name, given.gpus, flags), cwd=ROOT).returncode
        if code:
            print(f"error: {name} ended with exit code {code}; the same command goes on from there", file=sys.stderr)
            return code
    print(table(sweep))
    return 0


if __name__ == "__main__":
    sys.exit(main())
