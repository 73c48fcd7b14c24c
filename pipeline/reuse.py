"""A stage whose settings, inputs and code are what they were is not run again.

Every finished stage leaves a receipt, done/STAGE.json: the settings it obeyed, and the checksums of what it read, what
it made and of its code. The next run compares:

  nothing changed           reused
  settings or inputs        done again
  code only                 done again if it takes seconds; kept, and said so, if it costs hours or money (`Stage.dear`)
  an output damaged         done again if it takes seconds (the page, a figure); refused with the remedy if it is dear
  --redo STAGE              done again
  --reuse-from RUN          what that run made with the same settings and inputs (and, if it takes seconds, by the same
                            code) is taken over; where only the questions of something dear differ, what both have

Inputs count by content, not by path: a file that moved is the same file. The code of a stage is its function, what that
calls in its own file, and every project file these import, without comments. Left out: a stage that reads a setting
it does not declare is not noticed.
"""

import ast
import functools
import hashlib
import inspect
import json
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import ROOT, link_or_copy, read_json, sha256_file, write_json
from pipeline.run import Run


@dataclass(frozen=True)
class Stage:
    """A piece of work with what it obeys, reads and makes.

    name: its first word is what the command line calls it ("train kto" is one of the stages called train).
    work: what does it; returns what is worth a line in the log. settings: names in RunConfig. inputs, outputs: files by
    a name that stays the same wherever they lie, such as {"samples.jsonl": Path("runs/mini/samples.jsonl")}.
    everyone: all ranks work on it, else rank 0 alone. dear: it costs hours or money. lent: another run's will do.
    may_read, may_leave: files and folders of files, by name too, that need not be there: figures, say, of which there
    are more or fewer.
    """

    name: str
    work: Callable[[Run], dict[str, Any] | None]
    settings: tuple[str, ...]
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]
    everyone: bool = False
    dear: bool = False
    lent: bool = True
    may_read: Mapping[str, Path] = field(default_factory=dict)
    may_leave: Mapping[str, Path] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """Its name on the command line."""
        return self.name.split()[0]

    def receipt(self, out: Path) -> Path:
        """Where it notes what it was last done with."""
        return out / "done" / f"{self.name.replace(' ', '-')}.json"

    def left(self) -> dict[str, Path]:
        """Every file that it must leave, and those there are of what it may leave."""
        return {**self.outputs, **present(self.may_leave)}


def present(named: Mapping[str, Path]) -> dict[str, Path]:
    """The files that are there, by name; a folder's as "figures/weights.png" where its name is "figures"."""
    found: dict[str, Path] = {}
    for name, path in named.items():
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[name if file == path else f"{name}/{file.relative_to(path).as_posix()}"] = file
    return found


# ---------- what a stage depends on


def depends(stage: Stage, cfg: Any) -> dict[str, dict[str, Any]]:
    """{"settings": name -> value, "inputs": name -> checksum, "code": file -> checksum}."""
    return {
        "settings": {name: getattr(cfg, name) for name in stage.settings},
        "inputs": {n: checksum(p) for n, p in sorted({**stage.inputs, **present(stage.may_read)}.items())},
        "code": code_of(stage.work),
    }


def key_of(depends: Mapping[str, Any]) -> str:
    """One checksum of the settings and inputs a stage depends on; finished pieces of an interrupted stage carry it."""
    return digest([depends["settings"], depends["inputs"]])


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file, read once as long as its size and time stay: the weights are an input of many stages."""
    if not path.exists():
        return sha256_file(path)  # which says so
    stat = path.stat()
    return _checksum_as_of(path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _checksum_as_of(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_file(path)


def code_of(work: Callable[..., Any]) -> dict[str, str]:
    """file -> checksum of the code that `work` runs; of its own file only the functions and classes it reaches.

    >>> sorted(code_of(digest))
    ['pipeline/reuse.py: digest']
    """
    return dict(_code_of(work.func if isinstance(work, functools.partial) else work))


@functools.cache
def _code_of(work: Callable[..., Any]) -> dict[str, str]:
    """`code_of` of a function: the stages of every variant and evaluation set share one."""
    found: dict[str, str] = {}
    queue: list[Any] = [work]
    while queue:
        item = queue.pop()
        place = f"{_file_of(item)}: {item.__qualname__}"
        if place in found:
            continue
        source = inspect.getsource(item)
        found[place], late = _read(source)
        found |= {f: _read_file(f)[0] for file in late for f in imported(file)}
        home = sys.modules[item.__module__]
        for name in _names(item):
            value = vars(home).get(name)
            file = _file_of(value)
            if file is None:
                continue
            if isinstance(value, types.ModuleType) or value.__module__ != item.__module__:
                found |= {f: _read_file(f)[0] for f in imported(file)}
            elif inspect.isfunction(value) or inspect.isclass(value):
                queue.append(value)
    return dict(sorted(found.items()))


def _names(item: Any) -> set[str]:
    """The names that a function or class mentions, but in annotations: a type is no code that runs."""
    tree = ast.parse(inspect.getsource(item))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _file_of(value: Any) -> str | None:
    """The project's file, relative to its folder, that a module, class or function stands in; None for others."""
    if not isinstance(value, types.ModuleType | types.FunctionType | type | functools._lru_cache_wrapper):
        return None
    module = value if isinstance(value, types.ModuleType) else sys.modules.get(value.__module__)
    file = Path(getattr(module, "__file__", None) or "/").resolve()
    inside = file.is_relative_to(ROOT) and ".venv" not in file.parts and file.suffix == ".py"
    return file.relative_to(ROOT).as_posix() if inside else None


@functools.cache
def imported(file: str) -> frozenset[str]:
    """`file` and every project file it imports, directly or not, relative to the project's folder."""
    found, queue = set(), [file]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        queue += _read_file(name)[1]
    return frozenset(found)


@functools.cache
def _read(source: str) -> tuple[str, tuple[str, ...]]:
    """Of a text of code: a checksum that no comment and no docstring changes, and the project's files it imports."""
    tree, modules = ast.parse(source), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value.value = ""
    paths = (f"{module.replace('.', '/')}.py" for module in modules)
    return digest(ast.dump(tree)), tuple(path for path in paths if (ROOT / path).is_file())


@functools.cache
def _read_file(file: str) -> tuple[str, tuple[str, ...]]:
    return _read((ROOT / file).read_text(encoding="utf-8"))


# ---------- what is due


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """What differs between two `depends`, by kind, in words: {"settings": ["temperature 0.6, was 0.7"], ...}."""
    said: dict[str, list[str]] = {"settings": [], "inputs": [], "code": []}
    for kind, of in said.items():
        before, now = old.get(kind, {}), new[kind]
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                was = f" {now.get(name)!r}, was {before.get(name)!r}" if kind == "settings" else ""
                of.append(name + was)
    return said


def due(stage: Stage, old: Mapping[str, Any] | None, new: Mapping[str, Any], redo: bool) -> tuple[bool, str]:
    """(whether the stage has to be done, what to say). old: its receipt, None without one; new: `depends` now.

    Raises InputError when an output of a dear stage is not what the stage left.
    """
    if old is None:
        return True, ""
    if redo:
        return True, "asked for"
    changed = changes(old["depends"], new)
    if hard := changed["settings"] + changed["inputs"]:
        return True, f"done again: {_few(hard)} changed"
    left = stage.left()
    damaged = [n for n in {**stage.outputs, **old["outputs"]} if _sha_or_none(left.get(n)) != old["outputs"].get(n)]
    if damaged and stage.dear and any(path.exists() for path in stage.outputs.values()):
        raise InputError(
            f"{left.get(damaged[0], damaged[0])}: not the file that the stage {stage.name} left (checksum); put that "
            f"back, or make it anew with --redo {stage.called}"
        )
    if damaged:
        return True, f"done again: {_few(damaged)} is not as it was left"
    if changed["code"] and not stage.dear:
        return True, f"done again: {_few(changed['code'])} changed"
    if changed["code"]:
        return False, f"kept, took {old['seconds']} s; {_few(changed['code'])} changed since (--redo {stage.called})"
    return False, f"unchanged, reused (took {old['seconds']} s)"


def _sha_or_none(path: Path | None) -> str | None:
    return checksum(path) if path and path.exists() else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_inputs(stage: Stage, stages: Sequence[Stage], out: Path) -> None:
    """Raise InputError when an input of `stage` is not what the stage that made it, one of `stages`, left."""
    inputs = {*stage.inputs.values(), *present(stage.may_read).values()}
    for maker in stages:
        old = _receipt(maker.receipt(out))
        for name, path in maker.left().items() if old else ():
            known = name in maker.outputs or name in old["outputs"]
            if known and path in inputs and _sha_or_none(path) != old["outputs"].get(name):
                raise InputError(
                    f"{path}: not the file that the stage {maker.name} left (checksum); put that back, make it anew "
                    f"with --redo {maker.called}, or remove {maker.receipt(out)} if the file is your own"
                )


def perform(run: Run, stage: Stage, redo: bool, stages: Sequence[Stage] = ()) -> None:
    """Do the stage's work unless its receipt says that nothing has changed since; leave a new receipt.

    stages: those of the run, whose receipts say what the inputs must be.
    """
    told: dict[str, Any] = {}  # by rank 0, who alone looks at files
    if run.ranks.rank == 0:
        old, new = _receipt(stage.receipt(run.out)), depends(stage, run.cfg)
        needed, words = due(stage, old, new, redo)
        lent = None
        for other in run.cfg.lenders if needed and stage.lent and not redo else []:
            needed, words, some = take_over(stage, other, run.out, new, words)
            lent = some or lent
            if not needed:
                break
        if needed:
            check_inputs(stage, stages, run.out)
        left = list(old["outputs"]) if old else []
        told = {"needed": needed, "words": words, "depends": new, "lent": lent, "left": left}
    told = run.ranks.gather(told)[0]
    run.lent = told["lent"]
    run.ranks.log(f"[{stage.name}] {told['words']}".rstrip())
    if not told["needed"]:
        return
    run.key = key_of(told["depends"])
    started = time.perf_counter()
    if run.ranks.rank == 0:
        stage.receipt(run.out).unlink(missing_ok=True)  # what it speaks of is about to change
        for name, path in present(stage.may_leave).items():  # it may leave fewer of them this time
            if name in stage.may_leave or name in told["left"]:  # else a file that somebody has put beside them
                path.unlink()
    result = stage.work(run) if stage.everyone or run.ranks.rank == 0 else None
    run.ranks.wait()
    if run.ranks.rank == 0:
        seconds = round(time.perf_counter() - started, 1)
        outputs = {name: checksum(path) for name, path in stage.left().items()}
        told |= {"seconds": seconds, "result": result, "outputs": outputs}
        _write_receipt(stage.receipt(run.out), {k: told[k] for k in ("depends", "outputs", "seconds", "result")})
        run.ranks.log(f"[{stage.name}] {seconds} s {json.dumps(result)}")
    run.ranks.wait()
    for journal in run.journals:  # not before the receipt: it holds what a kill must not lose
        journal.unlink(missing_ok=True)
    run.journals.clear()


def take_over(
    stage: Stage, other: Path, out: Path, new: Mapping[str, Any], words: str
) -> tuple[bool, str, Path | None]:
    """(whether it is still due, what to say, a file of rows of which some may fit), from another run's folder."""
    old = _receipt(stage.receipt(other))
    if old is None:
        return True, words, None
    places = {name: path.relative_to(out) for name, path in stage.may_leave.items()}
    lent = {name: other / path.relative_to(out) for name, path in stage.outputs.items()}
    extra = present({name: other / path for name, path in places.items()})
    if any(_sha_or_none({**lent, **extra}.get(n)) != old["outputs"].get(n) for n in {**lent, **old["outputs"]}):
        return True, words, None
    changed = changes(old["depends"], new)
    if changed["settings"] or any(not name.startswith("questions") for name in changed["inputs"]):
        return True, words, None
    if not stage.dear and (changed["inputs"] or changed["code"]):
        return True, words, None
    if changed["inputs"]:
        return True, f"{words} questions differ from those of {other}".strip(), next(iter(lent.values()))
    for path in (*lent.values(), *(extra[name] for name in extra if name in old["outputs"])):
        link_or_copy(path, out / path.relative_to(other))
    _write_receipt(stage.receipt(out), old)
    since = f"; {_few(changed['code'])} changed since (--redo {stage.called})" if changed["code"] else ""
    return False, f"taken over from {other} (took {old['seconds']} s there){since}", None


def _write_receipt(path: Path, receipt: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(receipt))
    write_json(path, plain | {"check": digest(plain)})


def _receipt(path: Path) -> dict[str, Any] | None:
    """A receipt, None without one or with one of an older form. Raises InputError at a damaged one."""
    if not path.exists():
        return None
    told = f"{path}: not as it was written; put it back, or remove it, and the stage is done again"
    try:
        found = read_json(path)
    except InputError as error:
        raise InputError(f"{told} ({str(error).removeprefix(f'{path}: ').partition('; ')[0]})") from None
    fields = {"depends", "outputs", "seconds"}
    if not isinstance(found, dict) or "check" in found and found.pop("check") != digest(found):  # older ones have none
        raise InputError(f"{told} (checksum)")
    if fields & found.keys() and not fields <= found.keys():
        raise InputError(f"{told} (no {min(fields - found.keys())})")
    return found if fields <= found.keys() else None
