"""The table of benchmarks: everything the project knows of a data set stands in its one entry of SOURCES.

A `Source` says where the files are, at which revision and with which checksums, their licence, how their rows are read,
what kind of task it is, how tables call it, whether it may be trained on, and what the paper measured on it. Fetching
(tools/fetch.py), table headings (report/tables.py) and the refusal to train on evaluation sets read it here, so adding
a benchmark is adding an entry. A question is {question, answers, task}; a mathematical problem {problem, answer} and,
where the set says so, subject and level. Left out: passages, multiple choice.
"""

import ast
import io
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import csv_rows
from common.verifier import last_boxed

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
COLUMNS = {  # task -> the two figures of a cell of Table 2; "maths" is MASA's and has none
    "short": "Acc / Mis",
    "truthful": "true / informative",
    "long": "F1@K / claims",
}
BACKBONES = (
    "Qwen3-8B",
    "Qwen3-4B",
    "DeepSeek-R1-Distill-Qwen-7B",
    "Llama-3.1-Nemotron-Nano-4B-v1.1",
    "Qwen3-14B",
)


@dataclass(frozen=True)
class File:
    """One file of a data set. checksum: "sha256:..." or "git:..." (the blob id of the recorded commit).

    url: where it is; "hub:OWNER/NAME:PATH" for a file of a data set of the Hub. names: what local copies are called.
    """

    url: str
    checksum: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Files and number of questions of a split, before any is dropped.

    checksum: of several files together, over the lines that sha256sum prints for them, sorted by name; "" for one file,
    which has its own.
    """

    files: tuple[File, ...]
    rows: int
    checksum: str = ""


@dataclass(frozen=True)
class Source:
    """A benchmark.

    read: the content of a split's files, [(name, bytes), ...], to questions without ids. task: "short" (exact match),
    "truthful" (a judge, with best_answer), "long" (claims are checked one by one; no answers) or "maths".
    short: another name that eval_sets and samples may use for it. may_train: False where its authors ask not to.
    paper: lines of Tables 2, 5 and 12 of arXiv 2510.24794v2, a setting each with a cell for each of BACKBONES: percent
    of the two COLUMNS of its task, "-" for what is not printed. kept: its chosen and rejected
    rows in Table 1 (Qwen3-8B), zeros for none. note: what a reader of the numbers must know.
    """

    heading: str
    licence: str
    revision: str
    splits: dict[str, Split]
    read: Callable[[Sequence[tuple[str, bytes]]], Rows]
    task: str = "short"
    short: str = ""
    may_train: bool = True
    paper: str = ""
    kept: tuple[int, int] = (0, 0)
    note: str = ""


# ---------- readers: the content of a split's files, in order, to questions without ids


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


# ---------- the table

_GITHUB = "https://raw.githubusercontent.com"
_NQ_REVISION = "fb26a3073b1fe636c97302890a27b491d6530130"
_NQ = f"{_GITHUB}/google-research-datasets/natural-questions/{_NQ_REVISION}/nq_open"
_TRUTHFUL_REVISION = "fdd8ad1c0d00a478cf8b0bb41a3ad8378c16293b"
_LONG_REVISION = "9d27158d198ced0a9d8271a80147cae580614601"
_LONG = f"{_GITHUB}/google-deepmind/long-form-factuality/{_LONG_REVISION}/longfact/"
_LONG += "longfact-objects_gpt4_01-12-2024_noduplicates/longfact-objects_{}.jsonl"
_QWEN_REVISION = "a45202bd16f1ec06f433442dc1152d0074773465"
_PRM_REVISION = "7ecc794703b2877f63226f2477a49b34f9b25163"
_MASA_REVISION = "fad5726e5570e6eefdecc35dc7be5db42c909e93"
_RLLM_REVISION = "874daa4acb7f451dc2a4b2b6e8ce28f5aa88d1f5"


def _one(url: str, checksum: str, rows: int, *names: str) -> Split:
    """A split of one file; names: what local copies are called, first its name in the cache."""
    return Split((File(url, checksum, names or (url.rpartition("/")[2],)),), rows)


def _sciq(split: str, sha256: str, rows: int) -> Split:
    name = f"{split}-00000-of-00001.parquet"
    names = (name, f"{split}.json", f"{split}.jsonl", f"sciq_{split}.jsonl")
    return _one(f"hub:allenai/sciq:data/{name}", f"sha256:{sha256}", rows, *names)


def _maths(name: str, url: str, checksum: str, rows: int) -> Split:
    return _one(url, checksum, rows, f"{name}{Path(url).suffix}", f"{name}.json", f"{name}.jsonl", Path(url).name)


def _qwen(name: str, folder: str, blob: str, rows: int) -> dict[str, Split]:
    url = f"{_GITHUB}/QwenLM/Qwen2.5-Math/{_QWEN_REVISION}/evaluation/data/{folder}/test.jsonl"
    return {"test": _maths(name, url, f"git:{blob}", rows)}


SOURCES: dict[str, Source] = {
    "nq_open": Source(
        "NQ-Open",
        "CC BY-SA 3.0",
        _NQ_REVISION,
        {
            "test": _one(  # what everybody calls the test set is the original dev file
                f"{_NQ}/NQ-open.dev.jsonl",
                "sha256:f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616",
                3610,
            ),
            "train": _one(f"{_NQ}/NQ-open.train.jsonl", "git:cfb6afd0df24a0e2dc193cd39fa6c22f495c3e2f", 87925),
        },
        nq_open,
        short="nq",
        paper="""
    thinkoff           22.66/-       27.78/-             -             -             -
    thinkon         34.10/9.89    29.92/6.62    2.85/18.59    13.99/9.47    39.81/8.84
    refine          35.26/9.36    29.72/7.60    1.19/12.13             -             -
    sft             34.43/8.63    28.45/6.45   10.94/10.38    14.09/8.56    35.82/9.28
    kto             35.48/8.69    29.20/6.04    8.45/13.07    13.52/9.72    37.40/8.75
    mralign         37.34/7.20    31.00/6.01    12.80/8.84    14.96/7.48    39.70/8.39
    thinkon+ret     62.80/8.44    63.49/7.78   56.34/11.74             -             -
    mralign+ret     64.18/7.34    65.18/6.81   57.42/11.25             -             -
""",
        kept=(4070, 1785),
        # PAPER: A.1 trains on 79,168 questions.
        # HERE:  all 87,925 of the public split, unless a file of questions to leave out is given.
        # WHY:   the 8,757 others are the development questions of DPR, which the public file does not mark.
        note="train: 87,925 questions, the paper's 79,168 and DPR's 8,757 development questions; leave those out with "
        "--exclude FILE (NQ's dev topics of castorini/anserini-tools)",
    ),
    "sciq": Source(
        "SciQ",
        "CC BY-NC 3.0 (no commercial use)",
        "2c94ad3e1aafab77146f384e23536f97a4849815",
        {
            "test": _sciq("test", "3a719356a29b127fc54ef3c7f51a034db4bd105d5717215e8c85d2aa58d60667", 1000),
            "train": _sciq("train", "19644360954006d06e9ad3df07bddb34f8535c081b831d48f604603c713ac167", 11679),
        },
        sciq,
        paper="""
    thinkoff           55.60/-       67.80/-             -             -             -
    thinkon        67.10/14.10   68.40/11.50   13.60/52.40   52.40/25.90   70.60/11.50
    refine         65.10/17.80   65.60/16.00    3.60/44.30             -             -
    sft            68.20/13.40   65.80/13.10   36.10/31.40   53.00/22.90   68.50/13.00
    kto            69.30/12.60   66.50/12.90   28.50/40.30   53.60/21.30   68.80/12.40
    mralign        70.70/11.70    71.00/9.70   39.60/25.50   54.40/20.40   70.40/11.30
    thinkon+ret     75.30/9.00   74.40/10.30   70.60/12.00             -             -
    mralign+ret     77.10/8.10    76.20/8.90    72.00/9.90             -             -
""",
        kept=(760, 358),
    ),
    "simpleqa": Source(
        "SimpleQA",
        "MIT",
        "no revisions; the checksum is the record",
        {
            "test": _one(
                "https://openaipublic.blob.core.windows.net/simple-evals/simple_qa_test_set.csv",
                "sha256:feee3f7e7db3617e94e8fcf1977b756ec420ef8568f4e0fcbbe0e92e9d5fc032",
                4326,
            )
        },
        simpleqa,
        may_train=False,
        paper="""
    thinkoff            4.10/-        3.93/-             -             -             -
    thinkon          4.51/5.24     4.07/3.86     0.96/4.28     1.76/4.53     6.10/4.55
    refine           3.63/6.26     3.54/5.17     1.06/1.84             -             -
    sft              4.35/4.04     3.93/3.56     2.21/3.22     2.43/3.51     4.58/4.67
    kto              4.69/5.20     3.70/3.63     1.85/4.12     2.57/2.73     5.57/4.65
    mralign          5.11/4.46     4.05/3.86     2.77/2.95     2.43/4.09     5.83/4.25
    thinkon+ret     66.44/8.39    66.76/7.99   58.90/10.42             -             -
    mralign+ret     67.11/7.48    68.08/6.98    59.29/9.68             -             -
""",
    ),
    "truthfulqa": Source(
        "TruthfulQA",
        "Apache-2.0",
        _TRUTHFUL_REVISION,
        {
            "test": _one(
                f"{_GITHUB}/sylinrl/TruthfulQA/{_TRUTHFUL_REVISION}/TruthfulQA.csv",
                "sha256:f9bd9e859cc102cb1f647f1064da7e009be752c416845cf9fa56e6eaae403a7d",
                817,
            )
        },
        truthfulqa,
        task="truthful",
        may_train=False,
        paper="""
    thinkoff       62.62/76.38   68.05/88.13             -             -             -
    thinkon        80.91/81.27   69.52/88.13   30.97/50.92             -             -
    refine         81.64/91.80   72.09/92.04   24.85/49.71             -             -
    sft            82.25/94.12   70.13/88.62   34.03/64.99             -             -
    kto            82.37/94.61   68.30/89.84   35.74/73.19             -             -
    mralign        83.11/94.12   68.79/93.39   36.59/73.44             -             -
    thinkon+ret    80.78/91.68   71.60/89.11   48.59/72.58             -             -
    mralign+ret    81.76/93.27   72.58/92.41   50.55/81.27             -             -
""",
    ),
    "longfact": Source(
        "LongFact",
        "CC BY 4.0",
        _LONG_REVISION,
        {
            "test": Split(
                tuple(File(_LONG.format(t), "", (f"longfact-objects_{t}.jsonl",)) for t in LONGFACT_TOPICS),
                LONGFACT_DRAW,
                "sha256:d485c26988cfaef7305dbb72653a0e54170eef1527bc7432bc9cf27a78620ad0",
            )
        },
        longfact,
        task="long",
        may_train=False,  # its rows carry a canary
        paper="""
    thinkoff       80.89/19.00   80.77/19.00             -             -             -
    thinkon        81.13/16.00   80.07/19.00    54.90/5.00             -             -
    refine         83.93/16.00   78.92/14.00             -             -             -
    sft            84.95/13.00   80.85/18.00   62.11/16.00             -             -
    kto            80.72/15.00   80.94/19.00   61.96/16.00             -             -
    mralign        83.29/19.00   81.36/20.00   64.28/15.00             -             -
    thinkon+ret    89.12/13.00   89.68/13.00   83.97/13.00             -             -
    mralign+ret    90.14/13.00   90.77/13.00   85.53/12.00             -             -
""",
        note=f"files by name, random.Random({LONGFACT_SEED}).shuffle, first {LONGFACT_DRAW}",
    ),
    "aime24": Source(
        "AIME 2024",
        "MIT; MAA problems",
        _QWEN_REVISION,
        _qwen("aime24", "aime24", "bb72e176e8d30c09cd67037e17cfc41e6ff48f70", 30),
        problems,
        task="maths",
    ),
    "aime25": Source(
        "AIME 2025",
        "none stated; MAA problems",
        _MASA_REVISION,
        {
            "test": _maths(
                "aime25",
                f"{_GITHUB}/akatigre/MASA-RL/{_MASA_REVISION}/data/aime2025/test.parquet",
                "git:d20016a620b2cb244982229ca1b3a4081e8d94d4",
                30,
            )
        },
        aime25,
        task="maths",
    ),
    "amc23": Source(
        "AMC 2023",
        "MIT; MAA problems",
        _QWEN_REVISION,
        _qwen("amc23", "amc23", "6894ad7c49a0b3a64210af32954f4d049d934ea0", 40),
        problems,
        task="maths",
    ),
    "math500": Source(
        "MATH-500",
        "MIT",
        _PRM_REVISION,
        {
            "test": _maths(  # the repository keeps it in Git LFS, whose pointer is this checksum
                "math500",
                f"https://media.githubusercontent.com/media/openai/prm800k/{_PRM_REVISION}/prm800k/math_splits/test.jsonl",
                "sha256:35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
                500,
            )
        },
        problems,
        task="maths",
    ),
    "minerva": Source(
        "Minerva",
        "MIT; from MIT OpenCourseWare (CC BY-NC-SA)",
        _QWEN_REVISION,
        _qwen("minerva", "minerva_math", "123c5cd351cac2b8ead5413bc084629d7ff651de", 272),
        minerva,
        task="maths",
    ),
    "olympiadbench": Source(
        "OlympiadBench",
        "MIT",
        _QWEN_REVISION,
        _qwen("olympiadbench", "olympiadbench", "ec36280b1de8f5bbee92da696c2ae84f5f6e6beb", 675),
        olympiadbench,
        task="maths",
    ),
    "deepscaler": Source(
        "DeepScaleR",
        "MIT",
        _RLLM_REVISION,
        {
            "train": _maths(
                "deepscaler",
                f"{_GITHUB}/agentica-project/rllm/{_RLLM_REVISION}/rllm/data/train/math/deepscaler.json",
                "git:4bc7b76e082e1982b0b435e3fff32fab60b51b46",
                40315,
            )
        },
        problems,
        task="maths",
    ),
}


# ---------- what others ask of the table


def name_of(own: str) -> str:
    """The benchmark that a set of a run is called after: its name, or its short one; else `own` itself."""
    return next((name for name, source in SOURCES.items() if source.short == own), own)


def in_file(path: str | Path) -> tuple[list[str], str] | None:
    """(sets, split) that a file of questions holds by its name, SET-SPLIT.jsonl or SET+SET-SPLIT.jsonl, else None.

    >>> in_file("data/nq_open+sciq-train.jsonl")
    (['nq_open', 'sciq'], 'train')
    """
    sets, _, split = Path(path).stem.rpartition("-")
    names = sets.split("+")
    known = Path(path).suffix == ".jsonl" and all(name in SOURCES and split in SOURCES[name].splits for name in names)
    return (names, split) if known else None


def may_train(name: str | None) -> bool:
    """Whether questions of this data set may be trained on; an unlisted one may."""
    return name not in SOURCES or SOURCES[name].may_train


def compared() -> dict[str, Source]:
    """name -> source of the sets of which Table 2 has figures, in its order."""
    return {name: source for name, source in SOURCES.items() if source.task in COLUMNS and source.paper}


def paper_figures(name: str) -> dict[str, dict[str, list[float | None] | None]]:
    """backbone -> setting -> the paper's two figures on a benchmark, None for what it does not print.

    >>> paper_figures("nq_open")["Qwen3-8B"]["thinkon"]
    [34.1, 9.89]
    """
    out: dict[str, dict[str, list[float | None] | None]] = {backbone: {} for backbone in BACKBONES}
    for line in SOURCES[name].paper.strip().splitlines():
        setting, *cells = line.split()
        for backbone, cell in zip(BACKBONES, cells, strict=True):
            pair = [None if x == "-" else float(x) for x in cell.split("/")]
            out[backbone][setting] = pair if len(pair) == 2 else None
    return out
