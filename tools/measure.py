"""How times and memory are measured, and how measurements are shown. Shared by bench.py and gpu_check.py.

Left out: profiles, plots, statistics beyond median, lowest and highest.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import costs, table
from common.files import ROOT

MIB = 2**20
NAMED = ("torch", "numpy", "triton", "transformers", "peft", "trl", "liger-kernel")
Table = list[dict[str, Any]]


def clock(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """`run` as a function that returns how many seconds it took, until the device was done."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def timed() -> float:
        wait()
        start = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start

    return timed


def alternate(cases: dict[str, Callable[[], float]], rounds: int, warm: bool = False) -> dict[str, list[float]]:
    """What each case (a `clock`) returns in `rounds` calls, taken in turn; unless `warm`, a first call is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    for _ in range(rounds + (not warm)):
        for name, case in cases.items():
            seconds[name].append(case())
    return {name: taken[-rounds:] for name, taken in seconds.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of some measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compared(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """For each case its seconds and their ratio to `base` in the same round, each as a `spread`."""
    ratio = {name: [a / b for a, b in zip(taken, seconds[base], strict=True)] for name, taken in seconds.items()}
    return {name: {"seconds": spread(seconds[name]), f"time / {base}": spread(ratio[name])} for name in seconds}


def extra_memory(run: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """Peak memory of `run` in MiB: beyond what was held before it, and of the whole process (on CUDA: its tensors).

    A first run is not measured: what is made once (the optimiser's state, lazy imports) counts as held before. On a
    CPU it is the kernel's own high-water mark, set back first. That is exact only where freed memory is handed back at
    once, so call it as `in_fresh_process` does. None where there is no /proc.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / MIB
        run()
        peak = torch.cuda.max_memory_allocated(device) / MIB
    elif not Path("/proc/self/clear_refs").exists():
        return {"extra MiB": None, "peak MiB": None}
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        before = _process_mib("VmRSS")
        run()
        peak = _process_mib("VmHWM")
    return {"extra MiB": peak - before, "peak MiB": peak}


def _process_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def in_fresh_process(program: list[str], task: dict[str, Any], threads: int, ranks: int = 1) -> dict[str, Any]:
    """The JSON that `python PROGRAM --task TASK` prints last, run alone or as `ranks` processes under torchrun.

    threads: of each. Without MALLOC_ variables: those of the Makefile make the allocator keep freed memory.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, *launch, *program, "--task", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(device: torch.device) -> dict[str, str]:
    """What a timing depends on besides the code: machine, threads, versions, the allocator's settings."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else (names or [platform.processor()])[0]
    found = {d.metadata["Name"].replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    here = {"machine": machine, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    here |= {"python": platform.python_version()} | {name: found.get(name, "-") for name in NAMED}
    return here | {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "OMP_"))}


def peak_tflops(device: torch.device) -> float | None:
    """What the device could do in bf16; None for one that costs.GPUS does not know."""
    name = costs.gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return costs.GPUS[name].tflops if name else None


def installed(package: str) -> bool:
    """Whether a package is there, found without importing it."""
    return importlib.util.find_spec(package) is not None


def shown(value: Any) -> str:
    """A table cell: three digits that count; a `spread` as median (low..high)."""
    if isinstance(value, dict):
        return f"{shown(value['median'])} ({shown(value['low'])}..{shown(value['high'])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def markdown(rows: Table) -> str:
    """Rows as a Markdown table; a cell is empty where a row lacks the column."""
    return table.markdown([{name: shown(value) for name, value in row.items()} for row in rows], missing="")
