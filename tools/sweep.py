"""Runs that differ from one base run in a few settings, each over several seeds, and one table: Tables 3 and 4.

  python sweep.py configs/ablations.json [--gpus 4] [any flag of mralign.py]
  python sweep.py configs/mini-ablations.json --jobs 2      the miniature on a CPU, two runs at a time

The file names the base config, what all runs change, the seeds and, for each run, what it changes and what the paper
reports. Every run and seed is a process of its own in a folder of its own, its output in log.txt there. The base run,
where there is one, and the first run of a seed lend the others of that seed what they have in common: draws, labels and
unaligned samples as hard links, replies that were paid for as a copy. The pipeline checks that they are what the run
would have made, makes them anew where they are not, and does nothing again for a run that is finished.

  OUT/sweep.json    mean and standard deviation over seeds, differences to the first run, gain by stratum (Fig. 5)
  OUT/sweep.md, sweep.html, strata.png      the same to look at

Left out: searching for good settings; runs on several machines.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import eval as evaluation
from common.endings import program
from common.errors import InputError
from common.files import ROOT, atomic_write, read_json, read_jsonl, write_json
from common.settings import from_json
from pipeline.config import RunConfig
from report import analysis, charts, page
from report.figures import number

SHARED = (
    "samples.jsonl",
    "candidates.jsonl",
    "annotations.jsonl",
    "annotations.manifest.json",
    "eval/*/thinkon.jsonl",
    "eval/*/thinkoff.jsonl",
)
SHARED_STAGES = ("sample", "candidates", "annotate", "eval-thinkon-*", "eval-thinkoff-*")
RECEIPTS = tuple(f"done/{stage}.json" for stage in SHARED_STAGES)
PAID = "annotation/calls.jsonl"  # a committee's replies; grows, so it is copied
OPTIONAL = {"settings": {}, "seeds": [0], "note": ""}
OWN = ("config", "out", "seed", "resume")  # what the sweep itself sets for every run
STOPPED = (75, 130)  # exit codes of a run that was asked to stop
Sweep = dict[str, Any]
Done = set[tuple[str, int]]  # (run, seed) that are finished


# ---------- the file


def load(path: str | Path) -> Sweep:
    """A sweep {base, out, settings, seeds, note, runs: {name: {settings, paper: {set: [Acc, Mis]}}}}.

    settings (of all runs), seeds [0] and note (what a reader must know) may be left out. Every run's settings name one
    method. Raises InputError when it is no such file.
    """
    sweep = read_json(path)
    like = "see configs/ablations.json"
    needed = {"base", "out", "runs"}
    if not isinstance(sweep, dict) or not needed <= sweep.keys() <= needed | OPTIONAL.keys() or not sweep["runs"]:
        raise InputError(f"{path}: must hold base, out and runs, may hold settings, seeds and note; {like}")
    sweep = OPTIONAL | sweep
    seeds = sweep["seeds"]
    if not isinstance(seeds, list) or not seeds or {type(s) for s in seeds} != {int} or len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: seeds must be different whole numbers, not {seeds}; write for example [0, 1, 2]")
    for name, run in sweep["runs"].items():
        if not isinstance(run, dict) or run.keys() != {"settings", "paper"}:
            raise InputError(f"{path}: run {name!r} must hold settings and paper; {like}")
        if taken := [key for key in sweep["settings"] | run["settings"] if key in OWN]:
            raise InputError(f"{path}: {taken[0]} is not a setting of a run; use base, out and seeds of the sweep")
        if not re.fullmatch("[a-z]+", str(run["settings"].get("method"))):
            raise InputError(f"{path}: run {name!r} must set one method, for example mralign; {like}")
    folders = [folder(sweep, name, seeds[0]) for name in sweep["runs"]]
    if len(set(folders)) < len(folders):
        raise InputError(f"{path}: two runs would share a folder; names must differ in letters, digits or dots")
    return sweep


def folder(sweep: Sweep, name: str, seed: int) -> Path:
    """Where the files of a run and seed go."""
    return ROOT / sweep["out"] / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}-seed{seed}"


def command(sweep: Sweep, name: str, seed: int, gpus: int, flags: Sequence[str]) -> list[str]:
    """The command line of one run and seed."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    settings = sweep["settings"] | sweep["runs"][name]["settings"] | {"seed": seed, "out": folder(sweep, name, seed)}
    changes = [part for k, v in settings.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return [sys.executable, *launch, "mralign.py", "--config", sweep["base"], "--resume", *changes, *flags]


# ---------- the runs


def lend(source: Path, target: Path) -> None:
    """Link what one run has made into another's folder, receipts included, unless the other's own is as new.

    Newer files win because a first run that had to draw again, after a change of the program, must not leave the others
    with old draws; a run that cannot use what it was lent has files of its own that are newer still.
    """
    for pattern in SHARED + RECEIPTS:
        for path in source.glob(pattern):
            other = target / path.relative_to(source)
            if not other.exists() or other.stat().st_mtime_ns < path.stat().st_mtime_ns:
                other.parent.mkdir(parents=True, exist_ok=True)
                other.unlink(missing_ok=True)
                os.link(path, other)
    if (source / PAID).exists() and not (target / PAID).exists():
        (target / PAID).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / PAID, target / PAID)


def lenders(sweep: Sweep, name: str, seed: int) -> list[Path]:
    """Folders that may lend to a run and seed. Draws depend on the seed, so all of them are of the same seed."""
    base = RunConfig(**from_json(RunConfig, str(ROOT / sweep["base"])))
    first = next(iter(sweep["runs"]))
    earlier = [ROOT / base.out] if base.seed == seed else []
    return earlier if name == first else [*earlier, folder(sweep, first, seed)]


def run(sweep: Sweep, name: str, seed: int, gpus: int, flags: Sequence[str]) -> int:
    """One run and seed in a process of its own. Returns its exit code, that of a stopped run when a signal ended it."""
    here = folder(sweep, name, seed)
    here.mkdir(parents=True, exist_ok=True)
    (here / "status.json").unlink(missing_ok=True)
    for source in lenders(sweep, name, seed):
        lend(source, here)
    started = time.perf_counter()
    with open(here / "log.txt", "w", encoding="utf-8") as log:
        code = subprocess.run(command(sweep, name, seed, gpus, flags), cwd=ROOT, stdout=log, stderr=log).returncode
    if code < 0:
        code = STOPPED[1]
    elif code and (here / "status.json").exists():  # torchrun itself always says 1
        code = read_json(here / "status.json")["exit_code"]
    how = f"{time.perf_counter() - started:.0f} s" if not code else f"exit code {code}, see {here / 'log.txt'}"
    print(f"{name}, seed {seed}: {how}", file=sys.stderr, flush=True)
    return code


def run_all(sweep: Sweep, gpus: int, jobs: int, flags: Sequence[str]) -> dict[tuple[str, int], int]:
    """Every run and seed, `jobs` at a time; returns (run, seed) -> exit code.

    The first run of each seed comes first, since it lends; where it fails the others of its seed are not started. After
    one run was asked to stop no other is started.
    """
    stop = threading.Event()
    first, *others = sweep["runs"]

    def one(name: str, seed: int, lender: Future[int] | None) -> int:
        code = lender.result() if lender else 0  # was started before this one, so somebody is at work on it
        code = code or (STOPPED[0] if stop.is_set() else run(sweep, name, seed, gpus, flags))
        if code in STOPPED:
            stop.set()
        return code

    with ThreadPoolExecutor(jobs) as pool:
        ends = {(first, seed): pool.submit(one, first, seed, None) for seed in sweep["seeds"]}
        ends |= {
            (name, seed): pool.submit(one, name, seed, ends[first, seed]) for seed in sweep["seeds"] for name in others
        }
    return {key: end.result() for key, end in ends.items()}


# ---------- the figures


def scored(sweep: Sweep, name: str, setting: str, eval_set: str, seed: int) -> list[dict[str, Any]]:
    """Scored samples of one setting of a run and seed; `draw` becomes (seed, draw), so that seeds can be pooled."""
    rows = read_jsonl(folder(sweep, name, seed) / "eval" / eval_set / f"{setting}.jsonl")
    return [evaluation.score(row) | {"draw": (seed, row["draw"])} for row in rows]


def over_seeds(each: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """{"acc": {mean, sd, all}, "mis": ...} of seed -> scored rows; all: the share of every seed, sd with n - 1."""
    return evaluation.over_draws([row | {"draw": seed} for seed, rows in each.items() for row in rows])


def strata(
    base: Mapping[int, Sequence[Mapping[str, Any]]], other: Mapping[int, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """`analysis.strata` of seed -> scored rows, seeds pooled; "draws" holds the gain of every seed (Fig. 5)."""
    pooled = analysis.strata(sum(base.values(), []), sum(other.values(), []))
    each = [analysis.strata(base[seed], other[seed], n_boot=1) for seed in other]
    return {name: part | {"draws": [one[name]["gain"] for one in each]} for name, part in pooled.items()}


def summary(sweep: Sweep, done: Done) -> dict[str, Any]:
    """{"thinkon": set -> over_seeds, "runs": name -> {settings, paper, seeds, sets}} from the files of what is done.

    sets: set -> {acc, mis, difference, strata}; difference: `eval.compare` to the first run over the seeds that both
    have finished, questions about the same fact drawn together; None for the first run itself.
    """
    first = next(iter(sweep["runs"]))
    result: dict[str, Any] = {"thinkon": {}, "runs": {}}
    reference: dict[str, dict[int, list[dict[str, Any]]]] = {}  # set -> seed -> rows of the first run
    for name, of in sweep["runs"].items():
        seeds = [seed for seed in sweep["seeds"] if (name, seed) in done]
        entry = result["runs"][name] = of | {"seeds": seeds, "sets": {}}
        names = read_json(folder(sweep, name, seeds[0]) / "eval" / "analysis.json")["strata"] if seeds else []
        for eval_set in names:  # those with short answers
            base, own = (
                {seed: scored(sweep, name, setting, eval_set, seed) for seed in seeds}
                for setting in ("thinkon", of["settings"]["method"])
            )
            if name == first:
                result["thinkon"][eval_set], reference[eval_set] = over_seeds(base), own
            difference = versus(own, reference[eval_set]) if name != first and eval_set in reference else None
            entry["sets"][eval_set] = over_seeds(own) | {"difference": difference, "strata": strata(base, own)}
    return result


def versus(
    own: Mapping[int, list[dict[str, Any]]], first: Mapping[int, list[dict[str, Any]]]
) -> dict[str, dict[str, float | None]] | None:
    """`eval.compare` of two runs, seed -> scored rows, over the seeds of both; None where they share none."""
    left, right = ([row for seed in own.keys() & first.keys() for row in of[seed]] for of in (own, first))
    if not left:
        return None
    return evaluation.compare(left, right, cluster={row["id"]: row["id"].partition("#")[0] for row in left})


# ---------- tables


def spread(of: Mapping[str, Any]) -> str:
    """Percent, mean ± standard deviation; the mean alone for a single seed."""
    mean = number(100 * of["mean"], 1)
    return mean if of["sd"] is None else f"{mean} ± {number(100 * of['sd'], 1)}"


def points(of: Mapping[str, Any]) -> str:
    """A paired difference in points with its interval."""
    shown = [number(100 * of[key], 1, True) for key in ("difference", "low", "high")]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def result_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for every run and set, after the unaligned model; "not run" where no seed is finished."""
    runs = result["runs"]
    first, told = next(iter(runs)), any(of["paper"] for of in runs.values())
    heads = {metric: f"{metric.capitalize()} − {first} (95 %)" for metric in ("acc", "mis")}
    rows = []
    for eval_set, of in result["thinkon"].items():
        row = {"run": "ThinkOn", "set": eval_set, "seeds": str(len(of["acc"]["all"]))}
        rows.append(row | {"Acc": spread(of["acc"]), "Mis": spread(of["mis"])})
    for name, of in runs.items():
        for eval_set in of["sets"] or of["paper"] or ["–"]:
            row = {"run": name, "set": eval_set, "seeds": str(len(of["seeds"])), "Acc": "not run"}
            if mine := of["sets"].get(eval_set):
                row |= {"Acc": spread(mine["acc"]), "Mis": spread(mine["mis"])}
                row |= {heads[m]: points(d) for m, d in (mine["difference"] or {}).items()}
            if told:
                paper = [f"{x:.2f}" for x in of["paper"].get(eval_set, [])] or ["–", "–"]
                row |= {"paper Acc": paper[0], "paper Mis": paper[1]}
            rows.append(row)
    return rows


def strata_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """set -> run -> `strata`, for charts.py."""
    sets = dict.fromkeys(eval_set for of in result["runs"].values() for eval_set in of["sets"])
    return {s: {name: of["sets"][s]["strata"] for name, of in result["runs"].items() if s in of["sets"]} for s in sets}


def all_tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """heading -> rows of a table."""
    out = {"Acc and Mis, percent, mean ± standard deviation over seeds": result_rows(result)}
    for eval_set, of in strata_of(result).items():
        out[f"Gain over the base model by stratum on {eval_set}, points (Fig. 5)"] = charts.strata_rows(of, "seeds")
    return out


def aligned(rows: Sequence[Mapping[str, Any]]) -> str:
    """A list of dicts as a Markdown table whose columns line up; they stand in order of first use."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "–")).replace("|", "\\|") for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


HOW_TO_READ = (
    "A seed is a run of its own: other draws, other adapters, other samples. A difference is paired, in points, to the "
    "first run; its interval draws questions anew, seeds pooled. A stratum is what the unaligned model did with a "
    "question in thought and answer; its n counts all seeds."
)


def text(result: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    parts = [f"# Sweep {Path(result['file']).stem}", *([result["note"]] if result["note"] else []), HOW_TO_READ]
    parts += [f"## {heading}\n\n{aligned(rows)}" for heading, rows in all_tables(result).items()]
    parts.append("\n".join(f"- {key}: {value}" for key, value in result["receipt"].items()))
    return "\n\n".join(parts) + "\n"


def write(sweep: Sweep, result: Mapping[str, Any]) -> None:
    """sweep.json, sweep.md, sweep.html and, where a run is finished, strata.png."""
    out = ROOT / sweep["out"]
    write_json(out / "sweep.json", result)
    with atomic_write(out / "sweep.md") as f:
        f.write(text(result))
    images = {}
    if gains := strata_of(result):
        charts.strata_figure(gains, out / "strata.png", "seeds")
        images["Who gains (Fig. 5), seeds pooled"] = out / "strata.png"
    notes = [note for note in (result["note"], HOW_TO_READ) if note]
    facts = {"Receipt": result["receipt"], "Settings of all runs": read_json(ROOT / sweep["base"]) | sweep["settings"]}
    title = f"MR-ALIGN sweep {Path(result['file']).stem}"
    page.trace_page([], out / "sweep.html", title, tables=all_tables(result), images=images, facts=facts, notes=notes)


def receipt(sweep: Sweep, done: Done, words: Sequence[str]) -> dict[str, str]:
    """What was run, on what: the command, the seeds and what one of the finished runs notes about its machine."""
    about = {"command": " ".join(["python -m tools.sweep", *words]), "seeds": " ".join(map(str, sweep["seeds"]))}
    if done:
        noted = read_json(folder(sweep, *min(done)) / "results.json")["receipt"]
        about |= {key: noted[key] for key in ("commit", "model", "device", "versions", "decoding")}
    return about


@program
def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 3 for bad input, else the exit code of the first run that did not end well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sweep", metavar="FILE", help="JSON file of the sweep")
    parser.add_argument("--gpus", type=int, default=1, help="processes of each run [1]")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; for a CPU, a core each [1]")
    words = sys.argv[1:] if argv is None else argv
    given, flags = parser.parse_known_args(words)
    sweep = load(given.sweep)
    if taken := [flag for flag in flags if re.fullmatch(f"--({'|'.join(OWN)}|method)(=.*)?", flag)]:
        raise InputError(f"{taken[0]} is set by the sweep itself; change {given.sweep} instead")
    if given.jobs > 1:  # or each run would take all cores for itself
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // given.jobs)))
    codes = run_all(sweep, given.gpus, given.jobs, flags)
    failed = [(*key, code) for key, code in codes.items() if code]
    if not any(code in STOPPED for *_, code in failed):
        done = {key for key, code in codes.items() if not code}
        head = {"file": given.sweep, "receipt": receipt(sweep, done, words), "note": sweep["note"]}
        result = head | {"settings": sweep["settings"]} | summary(sweep, done)
        write(sweep, result)
        print(f"{text(result)}\n{sweep['out']}/sweep.html, sweep.md, sweep.json")
    if not failed:
        return 0
    name, seed, code = failed[0]
    where = f"{name}, seed {seed}, see {folder(sweep, name, seed)}/log.txt"
    print(f"error: exit code {code} of {where}; the same command goes on from there", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
