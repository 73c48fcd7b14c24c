"""Runs that differ from one base run in a few settings, each over several seeds, and one table: Tables 3 and 4.

  python -m tools.sweep configs/ablations.json [--gpus 4] [any flag of mralign.py]
  python -m tools.sweep configs/mini-ablations.json --jobs 2      the miniature on a CPU, two runs at a time

The file names the base config, what all runs change, the seeds and, for each run, what it changes and what the paper
reports. Every run and seed is a process of its own in a folder of its own, its output in log.txt there. The base run,
where there is one, and the first run of a seed lend the others of that seed what they have in common (--reuse-from):
draws, labels, unaligned samples, replies that were paid for. The pipeline checks that they are what the run would have
made, makes them anew where they are not, and does nothing again for a run that is finished. Ctrl-C and
SIGTERM stop every run where it can go on; a second one kills them. `run_all` is the runner of mini/study.py and
mini/masa_study.py too.

  OUT/sweep.json    mean and standard deviation over seeds, differences to the first run, gain by stratum (Fig. 5)
  OUT/sweep.md, sweep.html, strata.png      the same to look at

Left out: searching for good settings; runs on several machines.
"""

import argparse
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import eval as evaluation
from common.endings import ignored, program
from common.errors import InputError
from common.files import ROOT, atomic_write, read_json, read_jsonl, write_json
from common.ranks import ENDS, Ranks, only_writer
from common.settings import cli, from_json
from common.table import markdown
from pipeline.config import RunConfig, check, placed
from report import analysis, charts, page
from report.figures import number

OPTIONAL = {"settings": {}, "seeds": [0], "note": ""}
OWN = ("config", "out", "seed", "resume", "reuse_from")  # what the sweep itself sets for every run
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
    for name, kind in {"base": str, "out": str, "note": str, "settings": dict, "runs": dict}.items():
        if not isinstance(sweep[name], kind):
            raise InputError(f"{path}: {name} must be {'a text' if kind is str else 'an object'}; {like}")
    seeds = sweep["seeds"]
    if not isinstance(seeds, list) or not seeds or {type(s) for s in seeds} != {int} or len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: seeds must be different whole numbers, not {seeds}; write for example [0, 1, 2]")
    for name, run in sweep["runs"].items():
        if not isinstance(run, dict) or run.keys() != {"settings", "paper"} or not isinstance(run["settings"], dict):
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


def flag(name: str, value: Any) -> list[str]:
    """A setting as words of a command line.

    >>> flag("lambda_r", 1.5), flag("compile", False)
    (['--lambda-r', '1.5'], ['--no-compile'])
    """
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{words}" if value else f"--no-{words}"]
    return [f"--{words}", str(value)]


def command(sweep: Sweep, name: str, seed: int, gpus: int, flags: Sequence[str]) -> list[str]:
    """The command line of one run and seed, without the Python that runs it."""
    launch = ["-m", "tools.torchrun", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    settings = sweep["settings"] | sweep["runs"][name]["settings"] | {"seed": seed, "out": folder(sweep, name, seed)}
    settings |= {"reuse_from": ",".join(str(path) for path in lenders(sweep, name, seed) if path.is_dir())}
    changes = [word for setting in settings.items() for word in flag(*setting)]
    return [*launch, str(ROOT / "mralign.py"), "--config", str(ROOT / sweep["base"]), "--resume", *changes, *flags]


def check_runs(sweep: Sweep, gpus: int, flags: Sequence[str]) -> None:
    """Refuse what every run would be refused for, before the first one starts. Raises InputError."""

    def stages(parser: Any) -> None:
        parser.add_argument("stages", nargs="*")

    for seed in sweep["seeds"]:
        for name in sweep["runs"]:
            words = command(sweep, name, seed, gpus, flags)
            cfg, rest = cli(RunConfig, words[words.index("--config") :], "", stages)
            check(placed(cfg), rest.stages)


# ---------- the runs


def lenders(sweep: Sweep, name: str, seed: int) -> list[Path]:
    """Folders that may lend to a run and seed. Draws depend on the seed, so all of them are of the same seed."""
    base = RunConfig(**from_json(RunConfig, str(ROOT / sweep["base"])))
    first = next(iter(sweep["runs"]))
    earlier = [ROOT / base.out] if base.seed == seed else []
    return earlier if name == first else [*earlier, folder(sweep, first, seed)]


def plan(sweep: Sweep, gpus: int, flags: Sequence[str]) -> dict[tuple[str, int], "Child"]:
    """(run, seed) -> its process, in the order of start: the first run of every seed lends, so it comes first."""
    first = next(iter(sweep["runs"]))
    keys = sorted(((n, s) for s in sweep["seeds"] for n in sweep["runs"]), key=lambda key: key[0] != first)
    return {
        (name, seed): Child(
            f"{name}, seed {seed}",
            folder(sweep, name, seed),
            functools.partial(command, sweep, name, seed, gpus, flags),
            after="" if name == first else f"{first}, seed {seed}",
        )
        for name, seed in keys
    }


# ---------- the runner


@dataclass(frozen=True)
class Child:
    """A run: a process of its own that writes to a folder of its own.

    arguments() gives the words after `python` when the run starts, since they may depend on what `after` has made.
    after: name of the run that must have ended well before this one starts.
    """

    name: str
    out: Path
    arguments: Callable[[], list[str]]
    after: str = ""


class Processes:
    """The processes at work, and what a signal does: the first is passed on to them, a second kills them."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a second signal may come while the first is passed on
        self.alive: set[subprocess.Popen[bytes]] = set()
        self.stopped = 0  # the exit code of what was asked to stop, 0 as long as nobody asked

    def __call__(self, number: int, frame: object) -> None:
        with self.lock:
            for process in self.alive:
                if self.stopped:
                    kill(process.pid)
                else:
                    process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
            if not self.stopped:
                print("stopping the runs; once more kills them", file=sys.stderr, flush=True)
            self.stopped = self.stopped or STOPPED[number == signal.SIGINT]

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Inside, signals come here, and after it too if one came: then the program is ending. Main thread only."""
        heard = [number for number in self.SIGNALS if number != signal.SIGHUP or not ignored(number)]  # nohup
        before = {number: signal.signal(number, self) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items() if not self.stopped else ():
                signal.signal(number, handler)

    def run(self, child: Child) -> int:
        """Run one to its end. Returns its exit code, STOPPED's where it was asked to stop, 128 + n if signal n did."""
        child.out.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        words, env = [sys.executable, *child.arguments()], os.environ | {"PYTHONPATH": str(ROOT), ENDS: "1"}
        with open(child.out / "log.txt", "a", encoding="utf-8") as log:
            with self.lock:
                if self.stopped:
                    return self.stopped
                # a session of its own: a terminal's Ctrl-C reaches the run through us, once
                process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
                self.alive.add(process)
            code = process.wait()
            with self.lock:
                self.alive.remove(process)
        if code and self.stopped:
            code = self.stopped
        elif code < 0:
            code = 128 - code
        how = f"{time.perf_counter() - started:.0f} s" if not code else f"exit code {code}, see {child.out}/log.txt"
        print(f"{child.name}: {how}", file=sys.stderr, flush=True)
        return code


def kill(pid: int) -> None:
    """Kill a process and all below it; torchrun's workers are in sessions of their own."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        below = [int(word) for f in Path(f"/proc/{pid}/task").glob("*/children") for word in f.read_text().split()]
        os.kill(pid, signal.SIGKILL)
        for other in below:
            kill(other)


def run_all(children: Sequence[Child], jobs: int, out: Path) -> dict[str, int]:
    """Run all, `jobs` at a time, in their order; returns name -> exit code. Nobody else may write to `out` meanwhile.

    One whose `after` failed is not started and counts as failed alike. After a signal, or when a run was asked to stop,
    no other is started. Raises InputError when another process is at work in `out`.
    """
    processes = Processes()
    ends: dict[str, Future[int]] = {}

    def one(child: Child) -> int:
        code = ends[child.after].result() if child.after else 0  # it started before this one, so it will end
        code = code or processes.stopped or processes.run(child)
        if code in STOPPED:
            processes.stopped = processes.stopped or code
        return code

    if jobs > 1:  # or each run would take all cores for itself
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    alone = Ranks(0, 1, torch.device("cpu"))
    with only_writer(out, alone), processes.listen(), ThreadPoolExecutor(jobs) as pool:
        for child in children:
            ends[child.name] = pool.submit(one, child)
        return {name: end.result() for name, end in ends.items()}


def unfinished(ends: Mapping[str, int], children: Sequence[Child]) -> int:
    """The exit code of the first run that did not end well, after a line about it on stderr; 0 if all did."""
    for child in children:
        if code := ends[child.name]:
            log = child.out / "log.txt"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
            said = next((f" ({line})" for line in reversed(lines) if line.startswith("error")), "")
            where = f"{child.name}{said}, see {log}"
            print(f"error: exit code {code} of {where}; the same command goes on from there", file=sys.stderr)
            return code
    return 0


# ---------- the figures


def scored(sweep: Sweep, name: str, setting: str, eval_set: str, seed: int, fold: bool) -> list[dict[str, Any]]:
    """Scored samples of one setting of a run and seed; `draw` becomes (seed, draw), so that seeds can be pooled."""
    rows = read_jsonl(folder(sweep, name, seed) / "eval" / eval_set / f"{setting}.jsonl")
    return [evaluation.score(row, fold=fold) | {"draw": (seed, row["draw"])} for row in rows]


def over_seeds(each: Mapping[int, Sequence[Mapping[str, Any]]], matcher: str) -> dict[str, Any]:
    """{"acc": {mean, sd, all}, "mis": ...} of seed -> scored rows; all: the share of every seed, sd with n - 1."""
    return evaluation.over_draws([row | {"draw": seed} for seed, rows in each.items() for row in rows], matcher)


def strata(
    base: Mapping[int, Sequence[Mapping[str, Any]]], other: Mapping[int, Sequence[Mapping[str, Any]]], matcher: str
) -> dict[str, dict[str, Any]]:
    """`analysis.strata` of seed -> scored rows, seeds pooled; "draws" holds the gain of every seed (Fig. 5)."""
    pooled = analysis.strata(sum(base.values(), []), sum(other.values(), []), matcher)
    each = [analysis.strata(base[seed], other[seed], matcher, n_boot=1) for seed in other]
    return {name: part | {"draws": [one[name]["gain"] for one in each]} for name, part in pooled.items()}


def settings_of(sweep: Sweep, name: str, flags: Sequence[str]) -> RunConfig:
    """The settings of a run, as its command line gives them."""
    words = command(sweep, name, sweep["seeds"][0], 1, flags)
    return cli(RunConfig, words[1:], "")[0]


def summary(sweep: Sweep, done: Done, flags: Sequence[str] = ()) -> dict[str, Any]:
    """{"matcher", "thinkon": set -> over_seeds, "runs": name -> {settings, paper, seeds, sets}} of what is done.

    sets: set -> {acc, mis, difference, strata}; difference: `eval.compare` to the first run over the seeds that both
    have finished, questions about the same fact drawn together; None for the first run itself. All answers are matched
    as the first run matches its own.
    """
    first = next(iter(sweep["runs"]))
    cfg = settings_of(sweep, first, flags)
    by = cfg.scored_by
    result: dict[str, Any] = {"matcher": by + ", folded" * cfg.fold, "thinkon": {}, "runs": {}}
    reference: dict[str, dict[int, list[dict[str, Any]]]] = {}  # set -> seed -> rows of the first run
    for name, of in sweep["runs"].items():
        seeds = [seed for seed in sweep["seeds"] if (name, seed) in done]
        entry = result["runs"][name] = of | {"seeds": seeds, "sets": {}}
        names = read_json(folder(sweep, name, seeds[0]) / "eval" / "analysis.json")["strata"] if seeds else []
        for eval_set in names:  # those with short answers
            base, own = (
                {seed: scored(sweep, name, setting, eval_set, seed, cfg.fold) for seed in seeds}
                for setting in ("thinkon", of["settings"]["method"])
            )
            if name == first:
                result["thinkon"][eval_set], reference[eval_set] = over_seeds(base, by), own
            difference = versus(own, reference[eval_set], by) if name != first and eval_set in reference else None
            gains = strata(base, own, by)
            entry["sets"][eval_set] = over_seeds(own, by) | {"difference": difference, "strata": gains}
    return result


def versus(
    own: Mapping[int, list[dict[str, Any]]], first: Mapping[int, list[dict[str, Any]]], matcher: str
) -> dict[str, dict[str, float | None]] | None:
    """`eval.compare` of two runs, seed -> scored rows, over the seeds of both; None where they share none."""
    left, right = ([row for seed in own.keys() & first.keys() for row in of[seed]] for of in (own, first))
    if not left:
        return None
    return evaluation.compare(left, right, matcher, {row["id"]: row["id"].partition("#")[0] for row in left})


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
    by = "" if result["matcher"] == "equal" else f" (answers: {result['matcher']})"
    out = {f"Acc and Mis{by}, percent, mean ± standard deviation over seeds": result_rows(result)}
    for eval_set, of in strata_of(result).items():
        out[f"Gain over the base model by stratum on {eval_set}, points (Fig. 5)"] = charts.strata_rows(of, "seeds")
    return out


HOW_TO_READ = (
    "A seed is a run of its own: other draws, other adapters, other samples. A difference is paired, in points, to the "
    "first run; its interval draws questions anew, seeds pooled. A stratum is what the unaligned model did with a "
    "question in thought and answer; its n counts all seeds."
)


def text(result: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    parts = [f"# Sweep {Path(result['file']).stem}", *([result["note"]] if result["note"] else []), HOW_TO_READ]
    parts += [f"## {heading}\n\n{markdown(rows)}" for heading, rows in all_tables(result).items()]
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
    if taken := [word for word in flags if re.fullmatch(f"--({'|'.join(OWN)}|method)(=.*)?", word)]:
        raise InputError(f"{taken[0]} is set by the sweep itself; change {given.sweep} instead")
    check_runs(sweep, given.gpus, flags)
    children = plan(sweep, given.gpus, flags)
    ends = run_all(list(children.values()), given.jobs, ROOT / sweep["out"])
    if not any(code in STOPPED for code in ends.values()):
        done = {key for key, child in children.items() if not ends[child.name]}
        head = {"file": given.sweep, "receipt": receipt(sweep, done, words), "note": sweep["note"]}
        result = head | {"settings": sweep["settings"]} | summary(sweep, done, flags)
        write(sweep, result)
        print(f"{text(result)}\n{sweep['out']}/sweep.html, sweep.md, sweep.json")
    return unfinished(ends, list(children.values()))


if __name__ == "__main__":
    sys.exit(main())
