"""The paper's evaluation and training questions: fetched at a recorded revision, checked, written as our questions.

  python benchmarks.py                                                        what there is, with licences
  python benchmarks.py nq_open --split test --out data/nq_open-test.jsonl     fetch, check, convert
  python benchmarks.py sciq --out data/sciq.jsonl --from FOLDER               from files that are there already
  python benchmarks.py --for configs/qwen3-8b.json                            every file a config names and lacks

Every file has a checksum here; what arrives with another one is refused, a local copy with another one is used and said
so. Beside the questions stands FILE.manifest.json: source, revision, checksums, counts, licence. A question is
{id, dataset, question, answers, task}; task is "short" (exact match), "truthful" (a judge, with best_answer) or "long"
(claims are checked one by one; no answers). A mathematical problem is {id, dataset, problem, answer} and, where the set
says so, subject and level. Left out: passages, multiple choice, other data sets.
"""

import argparse
import ast
import hashlib
import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.endings import program
from common.errors import InputError
from common.files import atomic_write, csv_rows, read_bytes, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from common.table import markdown
from common.verifier import last_boxed, usable

NEVER_TRAIN = ("simpleqa", "truthfulqa", "longfact")  # their authors ask for it; LongFact rows carry a canary
LONGFACT_TOPICS = """20th-century-events US-foreign-policy accounting architecture astronomy biology business-ethics
celebrities chemistry clinical-knowledge computer-science computer-security economics electrical-engineering gaming
geography global-facts history immigration-law international-law jurisprudence machine-learning management marketing
mathematics medicine moral-disputes movies music philosophy physics prehistory psychology public-relations sociology
sports virology world-religions""".split()
LONGFACT_DRAW, LONGFACT_SEED = 250, 1
LONGFACT_TAIL = (
    " Provide as many specific details and examples as possible (such as names of people, numbers, events, locations, "
    "dates, times, etc.)"
)
# SciQ was made with four options; asked openly, such a stem has no one answer. 3 of the 1,000 test stems.
NEEDS_OPTIONS = re.compile(
    r"\bof (?:the|these|those) (?:following|choices|options|answers)\b"
    r"|\b(?:which|what|one) of (?:these|those)\b"
    r"|\b(?:all|none) of the above\b"
    r"|(?:^|[.;?] )which (?:one )?(?:is|are|was|were|has|have|does|do|can|would|will)\b(?!.*,.* or )",
    re.IGNORECASE,
)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class File:
    """One file of a data set. checksum: "sha256:..." or "git:..." (the blob id of the recorded commit).

    url: where it is; "hub:OWNER/NAME:PATH" for a file of a data set of the Hub. names: what local copies are called.
    """

    url: str
    checksum: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A split of a data set. convert: the content of its files, in order, to questions without ids."""

    files: tuple[File, ...]
    revision: str
    licence: str
    rows: int
    convert: Callable[[Sequence[tuple[str, bytes]]], Rows]


# ---------- conversion


def _jsonl(content: bytes) -> Rows:
    return [json.loads(line) for line in content.split(b"\n") if line.strip()]


def nq_open(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """NQ-Open: every alias of a question counts."""
    rows = _jsonl(contents[0][1])
    return [{"question": r["question"], "answers": [a for a in r["answer"] if a.strip()]} for r in rows]


def sciq(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """SciQ asked openly: no options, no passage. needs_options marks stems that point at the options (`eval`)."""
    return [
        {
            "question": r["question"],
            "answers": [r["correct_answer"].strip()],
            "needs_options": bool(NEEDS_OPTIONS.search(r["question"])),
        }
        for r in _table(*contents[0])
    ]


def _parquet(content: bytes) -> Rows:
    try:
        from pyarrow import parquet  # heavy, and only SciQ from the Hub and aime25 need it
    except ImportError:
        raise InputError("this set comes as parquet: pip install pyarrow, or give a JSON copy with --from") from None
    return parquet.read_table(io.BytesIO(content)).to_pylist()


def simpleqa(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """SimpleQA: one reference answer."""
    out = []
    for r in csv_rows(contents[0][1], contents[0][0]):
        about = ast.literal_eval(r["metadata"])  # a Python dict as text, as it is published; a literal, not code
        row = {"question": r["problem"].strip(), "answers": [r["answer"].strip()]}
        out.append(row | {"topic": about["topic"], "answer_type": about["answer_type"]})
    return out


def truthfulqa(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """TruthfulQA, generation: a judge compares with best_answer. The correct answers stand in `answers`."""
    out = []
    for r in csv_rows(contents[0][1], contents[0][0]):
        answers = [a.strip() for a in r["Correct Answers"].split(";") if a.strip()]
        row = {"question": r["Question"].strip(), "answers": answers, "task": "truthful"}
        out.append(row | {"best_answer": r["Best Answer"].strip(), "category": r["Category"]})
    return out


def longfact(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """250 of the 1,140 object prompts of LongFact, each with the request for details that its authors append."""
    # PAPER: "the 250 test examples"; the data's authors shuffle the files' prompts with seed 1 and take the first 250.
    # HERE:  the same, with the files in the order of their names.
    # WHY:   they read the folder in the file system's order, so their own 250 cannot be had from the code.
    prompts = [row["prompt"] for _, content in sorted(contents) for row in _jsonl(content)]
    random.Random(LONGFACT_SEED).shuffle(prompts)
    return [{"question": p + LONGFACT_TAIL, "answers": [], "task": "long"} for p in prompts[:LONGFACT_DRAW]]


def _table(name: str, content: bytes) -> Rows:
    if name.endswith(".parquet"):
        return _parquet(content)
    return json.loads(content) if content.lstrip().startswith(b"[") else _jsonl(content)


def _answer(value: Any) -> str:
    """One answer as text: a number as people write it (27.0 is 27), nothing for a missing one. Raises ValueError."""
    if isinstance(value, list):
        (value,) = value
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"an answer is a {type(value).__name__}")
    return "" if value is None else f"{value:.15g}" if isinstance(value, float) else str(value).strip()


def problems(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """Rows that have `problem` and `answer` already."""
    return [
        {"problem": r["problem"].strip(), "answer": _answer(r["answer"])}
        | {key: r[key] for key in ("subject", "level") if key in r}
        for r in _table(*contents[0])
    ]


def minerva(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """Minerva's problems: the answer is what the solution boxes."""
    rows = _jsonl(contents[0][1])
    return [
        {"problem": r["problem"].strip(), "answer": last_boxed(r["solution"]) or "", "subject": r["type"]} for r in rows
    ]


def olympiadbench(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """OlympiadBench, its English competition problems without pictures. Each has a list of one answer, which may list
    several values."""
    return [
        {"problem": r["question"].strip(), "answer": _answer(r["final_answer"]), "subject": r["subfield"]}
        for r in _jsonl(contents[0][1])
    ]


def aime25(contents: Sequence[tuple[str, bytes]]) -> Rows:
    """AIME 2025 as the authors of MASA evaluate it: a prompt that is the bare problem, and its target."""
    rows = _table(*contents[0])
    if "problem" in rows[0]:  # a plain copy
        return problems(contents)
    return [{"problem": r["prompt"][0]["content"], "answer": r["reward_model"]["ground_truth"]["target"]} for r in rows]


# ---------- sources

_NQ = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/{}/nq_open/NQ-open.{}.jsonl"
_NQ_REVISION = "fb26a3073b1fe636c97302890a27b491d6530130"
_SCIQ_REVISION = "2c94ad3e1aafab77146f384e23536f97a4849815"
_TRUTHFUL_REVISION = "fdd8ad1c0d00a478cf8b0bb41a3ad8378c16293b"
_LONG_REVISION = "9d27158d198ced0a9d8271a80147cae580614601"
_LONG = "https://raw.githubusercontent.com/google-deepmind/long-form-factuality/{}/longfact/"
_LONG += "longfact-objects_gpt4_01-12-2024_noduplicates/longfact-objects_{}.jsonl"
# Of the 38 files together: SHA-256 over the lines "HASH  NAME\n" that sha256sum prints, sorted by name.
LONGFACT_SHA256 = "d485c26988cfaef7305dbb72653a0e54170eef1527bc7432bc9cf27a78620ad0"


def _nq(split: str, checksum: str, names: tuple[str, ...], rows: int) -> Source:
    return Source(
        (File(_NQ.format(_NQ_REVISION, split), checksum, names),), _NQ_REVISION, "CC BY-SA 3.0", rows, nq_open
    )


def _sciq(split: str, sha256: str, rows: int) -> Source:
    name = f"{split}-00000-of-00001.parquet"
    names = (name, f"{split}.json", f"{split}.jsonl", f"sciq_{split}.jsonl")
    file = File(f"hub:allenai/sciq:data/{name}", f"sha256:{sha256}", names)
    return Source((file,), _SCIQ_REVISION, "CC BY-NC 3.0 (no commercial use)", rows, sciq)


_GITHUB = "https://raw.githubusercontent.com"
_QWEN_REVISION = "a45202bd16f1ec06f433442dc1152d0074773465"
_PRM_REVISION = "7ecc794703b2877f63226f2477a49b34f9b25163"
_MASA_REVISION = "fad5726e5570e6eefdecc35dc7be5db42c909e93"
_RLLM_REVISION = "874daa4acb7f451dc2a4b2b6e8ce28f5aa88d1f5"


def _maths(name: str, url: str, checksum: str, revision: str, licence: str, rows: int, convert: Callable) -> Source:
    names = (f"{name}{Path(url).suffix}", f"{name}.json", f"{name}.jsonl", Path(url).name)
    return Source((File(url, checksum, names),), revision, licence, rows, convert)


def _qwen(name: str, folder: str, blob: str, licence: str, rows: int, convert: Callable = problems) -> Source:
    url = f"{_GITHUB}/QwenLM/Qwen2.5-Math/{_QWEN_REVISION}/evaluation/data/{folder}/test.jsonl"
    return _maths(name, url, f"git:{blob}", _QWEN_REVISION, licence, rows, convert)


SOURCES: dict[str, dict[str, Source]] = {
    "nq_open": {
        "test": _nq(  # what everybody calls the test set is the original dev file
            "dev",
            "sha256:f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616",
            ("NQ-open.dev.jsonl",),
            3610,
        ),
        "train": _nq("train", "git:cfb6afd0df24a0e2dc193cd39fa6c22f495c3e2f", ("NQ-open.train.jsonl",), 87925),
    },
    "sciq": {
        "test": _sciq("test", "3a719356a29b127fc54ef3c7f51a034db4bd105d5717215e8c85d2aa58d60667", 1000),
        "train": _sciq("train", "19644360954006d06e9ad3df07bddb34f8535c081b831d48f604603c713ac167", 11679),
    },
    "simpleqa": {
        "test": Source(
            (
                File(
                    "https://openaipublic.blob.core.windows.net/simple-evals/simple_qa_test_set.csv",
                    "sha256:feee3f7e7db3617e94e8fcf1977b756ec420ef8568f4e0fcbbe0e92e9d5fc032",
                    ("simple_qa_test_set.csv",),
                ),
            ),
            "no revisions; the checksum is the record",
            "MIT",
            4326,
            simpleqa,
        )
    },
    "truthfulqa": {
        "test": Source(
            (
                File(
                    f"https://raw.githubusercontent.com/sylinrl/TruthfulQA/{_TRUTHFUL_REVISION}/TruthfulQA.csv",
                    "sha256:f9bd9e859cc102cb1f647f1064da7e009be752c416845cf9fa56e6eaae403a7d",
                    ("TruthfulQA.csv",),
                ),
            ),
            _TRUTHFUL_REVISION,
            "Apache-2.0",
            817,
            truthfulqa,
        )
    },
    "longfact": {
        "test": Source(
            tuple(
                File(_LONG.format(_LONG_REVISION, topic), "", (f"longfact-objects_{topic}.jsonl",))
                for topic in LONGFACT_TOPICS
            ),
            _LONG_REVISION,
            "CC BY 4.0",
            LONGFACT_DRAW,
            longfact,
        )
    },
    "aime24": {"test": _qwen("aime24", "aime24", "bb72e176e8d30c09cd67037e17cfc41e6ff48f70", "MIT; MAA problems", 30)},
    "aime25": {
        "test": _maths(
            "aime25",
            f"{_GITHUB}/akatigre/MASA-RL/{_MASA_REVISION}/data/aime2025/test.parquet",
            "git:d20016a620b2cb244982229ca1b3a4081e8d94d4",
            _MASA_REVISION,
            "none stated; MAA problems",
            30,
            aime25,
        )
    },
    "amc23": {"test": _qwen("amc23", "amc23", "6894ad7c49a0b3a64210af32954f4d049d934ea0", "MIT; MAA problems", 40)},
    "math500": {
        "test": _maths(  # the repository keeps it in Git LFS, whose pointer is this checksum
            "math500",
            f"https://media.githubusercontent.com/media/openai/prm800k/{_PRM_REVISION}/prm800k/math_splits/test.jsonl",
            "sha256:35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
            _PRM_REVISION,
            "MIT",
            500,
            problems,
        )
    },
    "minerva": {
        "test": _qwen(
            "minerva",
            "minerva_math",
            "123c5cd351cac2b8ead5413bc084629d7ff651de",
            "MIT; from MIT OpenCourseWare (CC BY-NC-SA)",
            272,
            minerva,
        )
    },
    "olympiadbench": {
        "test": _qwen(
            "olympiadbench", "olympiadbench", "ec36280b1de8f5bbee92da696c2ae84f5f6e6beb", "MIT", 675, olympiadbench
        )
    },
    "deepscaler": {
        "train": _maths(
            "deepscaler",
            f"{_GITHUB}/agentica-project/rllm/{_RLLM_REVISION}/rllm/data/train/math/deepscaler.json",
            "git:4bc7b76e082e1982b0b435e3fff32fab60b51b46",
            _RLLM_REVISION,
            "MIT",
            40315,
            problems,
        )
    },
}


# ---------- getting files


def digest(content: bytes, checksum: str) -> str:
    """The checksum of `content` in the kind of `checksum` ("sha256:..." or "git:...")."""
    if checksum.startswith("git:"):
        return "git:" + hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return "sha256:" + hashlib.sha256(content).hexdigest()


def matches(source: Source, contents: Sequence[tuple[str, bytes]]) -> bool:
    """Are these the very files that were recorded?"""
    if len(source.files) > 1:
        lines = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in contents)
        return hashlib.sha256("".join(f"{h}  {n}\n" for n, h in lines).encode()).hexdigest() == LONGFACT_SHA256
    (file,) = source.files
    return digest(contents[0][1], file.checksum) == file.checksum


def local(source: Source, folder: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the files of a split in a folder. Raises InputError naming what is missing."""
    found = []
    for file in source.files:
        path = next((folder / name for name in file.names if (folder / name).is_file()), None)
        if path is None:
            raise InputError(f"{folder}: none of {', '.join(file.names)} is there; leave out --from to fetch it")
        found.append((path.name, read_bytes(path)))
    return found


def fetch(source: Source, cache: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the files of a split, from `cache` or the network. Raises InputError.

    The Hub's own variables are obeyed (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
    """
    found = []
    for file in source.files:
        path = cache / file.names[0]
        if not path.is_file():
            content = _from_hub(file, source.revision) if file.url.startswith("hub:") else _from_web(file.url)
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


def _from_web(url: str) -> bytes:
    import requests

    try:
        reply = requests.get(url, timeout=(10, 60))
        reply.raise_for_status()
    except requests.RequestException as error:
        reason = type(error).__name__ if error.response is None else f"status {error.response.status_code}"
        raise InputError(f"{url}: could not be fetched ({reason}); fetch it elsewhere and use --from") from None
    return reply.content


# ---------- questions


def questions(name: str, split: str, contents: Sequence[tuple[str, bytes]]) -> tuple[Rows, dict[str, int]]:
    """(questions, tally) of a split. ids are NAME-SPLIT/NUMBER by place in the file. Raises InputError at a bad file.

    A row without a question, or without an answer where there must be one, is left out and counted; so is a problem
    whose answer `verifier` cannot read.
    """
    try:
        converted = SOURCES[name][split].convert(contents)
    except (KeyError, ValueError, SyntaxError, TypeError, AttributeError, IndexError) as error:
        files = ", ".join(n for n, _ in contents[:2])
        raise InputError(f"{files}: not the published format of {name} ({type(error).__name__}: {error})") from None
    rows, dropped = [], 0
    for number, row in enumerate(converted):
        if "problem" in row:
            complete = row["problem"] and usable(row["answer"])
        else:
            row = row | {"task": row.get("task", "short")}
            complete = row["question"].strip() and (row["task"] == "long" or row["answers"])
        if complete:
            rows.append({"id": f"{name}-{split}/{number}", "dataset": name} | row)
        else:
            dropped += 1
    return rows, {"questions": len(rows), "dropped": dropped}


def write(name: str, split: str, out: Path, folder: str, cache: Path) -> dict[str, Any]:
    """Write the questions and their manifest; returns the manifest. Raises InputError."""
    source = SOURCES[name][split]
    contents = local(source, Path(folder)) if folder else fetch(source, cache)
    recorded = matches(source, contents)
    if not recorded and not folder:
        for file in source.files:
            (cache / file.names[0]).unlink()
        raise InputError(f"{name} {split}: what was fetched has another checksum than recorded; fetch it again")
    rows, tally = questions(name, split, contents)
    write_jsonl(out, rows)
    manifest = {"dataset": name, "split": split, "revision": source.revision, "licence": source.licence}
    manifest |= {"files": {n: hashlib.sha256(content).hexdigest() for n, content in contents}}
    manifest |= {"as_recorded": recorded, "from": folder or source.files[0].url, **tally}
    manifest |= {"complete": len(rows) + tally["dropped"] == source.rows, "sha256": sha256_file(out)}
    if name == "sciq":
        manifest["need_options"] = sum(row["needs_options"] for row in rows)
    if name == "longfact":
        manifest["draw"] = f"files by name, random.Random({LONGFACT_SEED}).shuffle, first {LONGFACT_DRAW}"
    write_json(out.with_suffix(".manifest.json"), manifest)
    return manifest


def missing(config: str) -> list[tuple[Path, list[str], str]]:
    """(file, data sets, split) of the questions and problems that a config names and that are not there.

    A file is called SET-SPLIT.jsonl, or SET+SET-SPLIT.jsonl for several in one. Raises InputError at another name.
    """
    values = read_json(config)
    named = [values.get("questions", ""), values.get("problems", "")]
    named += [part.partition("=")[2] for part in values.get("eval_sets", "").split(",")]
    found = []
    for path in (Path(name) for name in named if name and not Path(name).exists()):
        sets, _, split = path.stem.rpartition("-")
        names = sets.split("+")
        if path.suffix != ".jsonl" or not all(split in SOURCES.get(name, {}) for name in names):
            raise InputError(f"{config}: {path} is not there and not called SET-SPLIT.jsonl after a set listed here")
        found.append((path, names, split))
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
    for name, splits in SOURCES.items():
        for split, source in splits.items():
            revision = source.revision[:12] if " " not in source.revision else "checksum"
            row = {"data set": name, "split": split, "questions": f"{source.rows:,}"}
            rows.append(row | {"licence": source.licence, "revision": revision})
    return markdown(rows)


@program
def main(argv: Iterable[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=SOURCES, help="data set; none: list them")
    parser.add_argument("--split", default="test", help="split [test]")
    parser.add_argument("--out", default="", metavar="FILE", help="questions to write [data/NAME-SPLIT.jsonl]")
    parser.add_argument("--from", dest="folder", default="", metavar="FOLDER", help="read the files from this folder")
    parser.add_argument("--cache", default="data/raw", metavar="FOLDER", help="where fetched files stay [data/raw]")
    parser.add_argument("--for", dest="config", default="", metavar="CONFIG", help="fetch what this config names")
    given = parser.parse_args(argv)
    if given.config:
        made = provide(given.config, Path(given.cache))
        print("\n".join(map(str, made)) or f"{given.config}: everything it names is there")
        return
    if given.name is None:
        print(listing())
        return
    if given.split not in SOURCES[given.name]:
        raise InputError(f"{given.name} has no split {given.split!r}; it has {', '.join(SOURCES[given.name])}")
    out = Path(given.out or f"data/{given.name}-{given.split}.jsonl")
    manifest = write(given.name, given.split, out, given.folder, Path(given.cache))
    if not manifest["as_recorded"]:
        print("note: these files are not byte for byte the recorded ones; the manifest says so", file=sys.stderr)
    print(f"{out}: {manifest['questions']} questions, licence {manifest['licence']}")


if __name__ == "__main__":
    sys.exit(main())
