"""Questions of the listed benchmarks: fetched at a recorded revision, checked, written as our questions.

  python -m tools.fetch                                                        what there is, with licences
  python -m tools.fetch nq_open --split test --out data/nq_open-test.jsonl     fetch, check, convert
  python -m tools.fetch sciq --out data/sciq.jsonl --from FOLDER               from files that are there already
  python -m tools.fetch --for configs/qwen3-8b.json                            every file a config names and lacks

The sets stand in common/benchmarks.py. What arrives with another checksum than recorded is refused, a local copy with
another one is used and said so. Beside the questions stands FILE.manifest.json: source, revision, checksums, counts,
licence. A question is {id, dataset, question, answers, task}, a problem {id, dataset, problem, answer}.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.benchmarks import SOURCES, File, Rows, Split, in_file
from common.endings import program
from common.errors import InputError
from common.files import atomic_write, read_bytes, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from common.table import markdown
from common.verifier import usable
from data import normalise

# ---------- getting files


def digest(content: bytes, checksum: str) -> str:
    """The checksum of `content` in the kind of `checksum` ("sha256:..." or "git:...")."""
    if checksum.startswith("git:"):
        return "git:" + hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return "sha256:" + hashlib.sha256(content).hexdigest()


def matches(split: Split, contents: Sequence[tuple[str, bytes]]) -> bool:
    """Are these the very files that were recorded?"""
    if split.checksum:
        lines = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in contents)
        return digest("".join(f"{h}  {n}\n" for n, h in lines).encode(), split.checksum) == split.checksum
    (file,) = split.files
    return digest(contents[0][1], file.checksum) == file.checksum


def local(split: Split, folder: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the files of a split in a folder. Raises InputError naming what is missing."""
    found = []
    for file in split.files:
        path = next((folder / name for name in file.names if (folder / name).is_file()), None)
        if path is None:
            raise InputError(f"{folder}: none of {', '.join(file.names)} is there; leave out --from to fetch it")
        found.append((path.name, read_bytes(path)))
    return found


def fetch(split: Split, revision: str, cache: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the files of a split, from `cache` or the network. Raises InputError.

    The Hub's own variables are obeyed (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
    """
    found = []
    for file in split.files:
        path = cache / file.names[0]
        if not path.is_file():
            content = _from_hub(file, revision) if file.url.startswith("hub:") else _from_web(file.url, file.names[0])
            with atomic_write(path, "wb") as f:
                f.write(content)
        found.append((path.name, read_bytes(path)))
    return found


def _from_hub(file: File, revision: str) -> bytes:
    from huggingface_hub import errors, hf_hub_download  # reads its environment when imported

    _, repository, name = file.url.split(":")
    try:
        return read_bytes(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
    except (errors.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = f"where there is a network run: hf download --repo-type dataset {repository} {name}, and use --from"
        raise InputError(f"{repository}: {name} could not be fetched ({reason}); {remedy}") from None


def _from_web(url: str, name: str) -> bytes:
    import requests

    try:
        reply = requests.get(url, timeout=(10, 60))
        reply.raise_for_status()
    except requests.RequestException as error:
        reason = type(error).__name__ if error.response is None else f"status {error.response.status_code}"
        told = f"could not be fetched ({reason}); fetch it elsewhere, as FOLDER/{name}, and use --from FOLDER"
        raise InputError(f"{url}: {told}") from None
    return reply.content


# ---------- questions


def questions(name: str, split: str, contents: Sequence[tuple[str, bytes]]) -> tuple[Rows, dict[str, int]]:
    """(questions, tally) of a split. ids are NAME-SPLIT/NUMBER by place in the file. Raises InputError at a bad file.

    A row without a question, or without an answer where there must be one, is left out and counted; so is a problem
    whose answer `verifier` cannot read.
    """
    try:
        converted = SOURCES[name].read(contents)
    except (KeyError, ValueError, SyntaxError, TypeError, AttributeError, IndexError) as error:
        files = ", ".join(n for n, _ in contents[:2])
        raise InputError(f"{files}: not the published format of {name} ({type(error).__name__}: {error})") from None
    rows, dropped = [], 0
    for number, row in enumerate(converted):
        if "problem" in row:
            complete = row["problem"] and usable(row["answer"])
        else:
            row = row | {"task": SOURCES[name].task}
            complete = row["question"].strip() and (row["task"] == "long" or row["answers"])
        if complete:
            rows.append({"id": f"{name}-{split}/{number}", "dataset": name} | row)
        else:
            dropped += 1
    return rows, {"questions": len(rows), "dropped": dropped}


def write(name: str, split: str, out: Path, folder: str, cache: Path, exclude: str = "") -> dict[str, Any]:
    """Write the questions and their manifest; returns the manifest. Raises InputError.

    exclude: a file of rows with a `question` each (as NQ-Open's own) to leave out, compared in the normal form.
    """
    source, of = SOURCES[name], SOURCES[name].splits[split]
    contents = local(of, Path(folder)) if folder else fetch(of, source.revision, cache)
    recorded = matches(of, contents)
    if not recorded and not folder:
        for file in of.files:
            (cache / file.names[0]).unlink()
        raise InputError(f"{name} {split}: what was fetched has another checksum than recorded; fetch it again")
    rows, tally = questions(name, split, contents)
    complete = len(rows) + tally["dropped"] == of.rows
    if exclude:
        held = {normalise(row["question"]) for row in read_jsonl(exclude, ("question",))}
        kept = [row for row in rows if normalise(row.get("question", row.get("problem", ""))) not in held]
        tally, rows = tally | {"questions": len(kept), "excluded": len(rows) - len(kept)}, kept
    write_jsonl(out, rows)
    manifest = {"dataset": name, "split": split, "revision": source.revision, "licence": source.licence}
    manifest |= {"files": {n: hashlib.sha256(content).hexdigest() for n, content in contents}}
    manifest |= {"as_recorded": recorded, "from": folder or of.files[0].url, **tally}
    manifest |= {"complete": complete, "sha256": sha256_file(out)}
    if source.note:
        manifest["note"] = source.note
    if any("needs_options" in row for row in rows):
        manifest["need_options"] = sum(row["needs_options"] for row in rows)
    write_json(out.with_suffix(".manifest.json"), manifest)
    return manifest


def missing(config: str) -> list[tuple[Path, list[str], str]]:
    """(file, data sets, split) of the questions and problems that a config names and that are not there.

    A file is called SET-SPLIT.jsonl, or SET+SET-SPLIT.jsonl for several in one. Raises InputError at another name.
    """
    values = read_json(config)
    files = [values.get("questions", ""), values.get("problems", "")]
    files += [part.partition("=")[2] for part in values.get("eval_sets", "").split(",")]
    found = []
    for path in (Path(name) for name in files if name and not Path(name).exists()):
        named = in_file(path)
        if named is None:
            raise InputError(f"{config}: {path} is not there and not called SET-SPLIT.jsonl after a set listed here")
        found.append((path, *named))
    return found


def provide(config: str, cache: Path) -> list[Path]:
    """Write what `missing` finds, fetched; several sets in one file after each other. Raises InputError."""
    files = missing(config)
    for out, names, split in files:
        parts = [out.with_name(f"{name}-{split}.jsonl") for name in names]
        for name, part in zip(names, parts, strict=True):
            if not part.exists():
                write(name, split, part, "", cache)
        if len(parts) > 1:
            write_jsonl(out, [row for part in parts for row in read_jsonl(part)])
    return [out for out, _, _ in files]


def listing() -> str:
    """The data sets as a Markdown table."""
    rows = []
    for name, source in SOURCES.items():
        for split, of in source.splits.items():
            revision = source.revision[:12] if " " not in source.revision else "checksum"
            row = {"data set": name, "split": split, "questions": f"{of.rows:,}"}
            rows.append(row | {"licence": source.licence, "revision": revision})
    return markdown(rows)


@program
def main(argv: Iterable[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=SOURCES, help="data set; none: list them")
    parser.add_argument("--split", default="test", help="split [test]")
    parser.add_argument("--out", default="", metavar="FILE", help="questions to write [data/NAME-SPLIT.jsonl]")
    parser.add_argument("--from", dest="folder", default="", metavar="FOLDER", help="read the files from this folder")
    parser.add_argument("--cache", default="data/raw", metavar="FOLDER", help="where fetched files stay [data/raw]")
    parser.add_argument("--for", dest="config", default="", metavar="CONFIG", help="fetch what this config names")
    parser.add_argument("--exclude", default="", metavar="FILE", help="leave out the questions of this JSONL file")
    given = parser.parse_args(argv)
    if given.config:
        made = provide(given.config, Path(given.cache))
        print("\n".join(map(str, made)) or f"{given.config}: everything it names is there")
        return 0
    if given.name is None:
        print(listing())
        return 0
    if given.split not in SOURCES[given.name].splits:
        known = ", ".join(SOURCES[given.name].splits)
        raise InputError(f"{given.name} has no split {given.split!r}; it has {known}")
    out = Path(given.out or f"data/{given.name}-{given.split}.jsonl")
    manifest = write(given.name, given.split, out, given.folder, Path(given.cache), given.exclude)
    if not manifest["as_recorded"]:
        print("note: these files are not byte for byte the recorded ones; the manifest says so", file=sys.stderr)
    if SOURCES[given.name].note:
        print(f"note: {SOURCES[given.name].note}", file=sys.stderr)
    print(f"{out}: {manifest['questions']} questions, licence {manifest['licence']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
