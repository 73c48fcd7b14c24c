"""How long every stage takes that needs no GPU, and how much memory, as the questions become more.

  python -m tools.scale --questions 1000000 --out runs/scale     a tenth first, then all; the table on stdout
  python -m tools.scale --questions 100000 --whole               that size alone

The data is made up: every question has one draw with thinking on and one with it off, by a script that writes thoughts
of the miniature's cue phrases; a tenth of the questions become candidates, so 1,000,000 questions give 100,000 traces.
Each stage is a process of its own, on one thread: its CPU seconds, so that other work on the machine counts less, and
its highest memory, libraries included (the first row is a process with nothing to do). Needs some 4 kB of disk a
question. Left out: what draws, trains or asks somebody, which takes its time elsewhere.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.endings import program
from common.errors import InputError
from common.files import ROOT, atomic_write, read_json, write_jsonl
from common.table import markdown
from common.tokens import encode, load_tokenizer

MODEL = ROOT / "mini" / "model"
SHARES = (0.05, 0.05, 0.45)  # of the questions: chosen, rejected, right in both modes; the rest is wrong in both
SHUT = "<think>\n\n</think>\n\n"  # before an answer without thinking
POOL = 400  # different thoughts
USE = "import sys; from pathlib import Path; import data; run = Path(sys.argv[1])\n"
READ = "rows = data.load_train(run / 'train.jsonl')\n"
PARTS = {  # what has no command of its own
    "nothing": "import mralign",
    "questions, read and checked": USE + "data.load_questions(run.parent / 'questions.jsonl', drop_repeated=True)",
    "training rows, read and weighted": USE
    + "from common.tokens import load_tokenizer\n"
    + "rows = data.to_rows(data.load_train(run / 'train.jsonl'), load_tokenizer(Path(sys.argv[2])))",
    "report: its texts and figures of rows": USE
    + "import em\nfrom common.tokens import load_tokenizer\nfrom report import analysis, figures, tables\n"
    + READ
    + "classes = ([r['labels'] for r in rows if r['label'] is side] for side in (True, False))\n"
    + "analysis.matrix_intervals(*classes, em.fit)\nanalysis.weight_audit(rows, load_tokenizer(Path(sys.argv[2])))\n"
    + "tables.label_rows(rows)\nfigures.weights_figure(rows, run / 'weights.png')",
}


def thoughts(rng: random.Random) -> list[str]:
    """Thoughts of five to nine steps, each begun by a cue phrase; chosen and rejected ones do not differ."""
    cues = [phrase for of in read_json(ROOT / "mini" / "cues.json").values() for phrase in of]
    words = "the answer city name place fact known from memory river which is of in and that was first".split()

    def step() -> str:
        return f"{rng.choice(cues)} {' '.join(rng.choices(words, k=rng.randint(6, 12)))}."

    return ["\n\n".join(step() for _ in range(rng.randint(5, 9))) for _ in range(POOL)]


def make(out: Path, n: int) -> None:
    """OUT/questions.jsonl and OUT/run/samples.jsonl of n questions. Rows are put together from texts: it is quick."""
    rng, tokenizer = random.Random(0), load_tokenizer(MODEL)
    end = tokenizer.token_to_id("<|im_end|>")
    drawn: dict[tuple[str, bool], list[str]] = {}
    for right in (True, False):
        said = f"<answer>{'right' if right else 'wrong'}</answer>"
        texts = {"on": [f"<think>\n{t}\n</think>\n\n{said}" for t in thoughts(rng)], "off": [said]}
        for mode, of in texts.items():
            ids = tokenizer.encode_batch(of, add_special_tokens=False)
            drawn[mode, right] = [
                json.dumps({"mode": mode, "draw": 0, "text": t, "ids": [*i.ids, end]})[1:-1]
                for t, i in zip(of, ids, strict=True)
            ]
    before = (
        "<|im_start|>user\n",
        {m: f"<|im_end|>\n<|im_start|>assistant\n{x}" for m, x in (("on", ""), ("off", SHUT))},
    )
    ids = {x: encode(tokenizer, x) for x in (before[0], *before[1].values())}

    tail = '"answers": ["right"], "finish": "stop", "dataset": "scale", "model": "script", "engine": "script"'

    def kinds() -> Iterator[tuple[bool, bool]]:
        """Right with thinking on, and with it off, of every question."""
        chosen, rejected, both = SHARES
        for _ in range(n):
            x = rng.random()
            on = x < chosen or chosen + rejected <= x < chosen + rejected + both
            yield on, on if x >= chosen + rejected else not on

    def questions() -> Iterator[dict[str, Any]]:
        for i in range(n):
            yield {"id": f"q{i}", "question": f"Which of the {n:,} places is number {i}?", "answers": ["right"]}

    write_jsonl(out / "questions.jsonl", questions())
    with atomic_write(out / "run" / "samples.jsonl") as f:
        for i, kind in enumerate(kinds()):
            for mode, right in zip(("on", "off"), kind, strict=True):
                question = f"Which of the {n:,} places is number {i}?"
                whole = before[0] + question + before[1][mode]
                row = {"id": f"q{i}", "question": question, "prompt": whole}
                row["prompt_ids"] = ids[before[0]] + encode(tokenizer, question) + ids[before[1][mode]]
                f.write(f"{{{json.dumps(row)[1:-1]}, {rng.choice(drawn[mode, right])}, {tail}}}\n")


def commands(out: Path) -> dict[str, list[str]]:
    """stage -> what runs it, in the order in which they need each other."""
    run = out / "run"
    stage = ["mralign.py", "--config", "configs/mini.json", "--out", str(run)]
    stage += ["--questions", str(out / "questions.jsonl"), "--draws", "1"]
    stage += ["--min-think-tokens", "1", "--max-think-tokens", "10000"]
    parts = {name: ["-c", code, str(run), str(MODEL)] for name, code in PARTS.items()}
    found = {name: parts[name] for name in list(PARTS)[:2]}
    found["dry run, with samples"] = [*stage, "--dry-run"]
    found |= {name: [*stage, name] for name in ("candidates", "annotate", "fit")}
    found |= {name: parts[name] for name in list(PARTS)[2:]}
    for other, file in (("trl", "trl.jsonl"), ("llamafactory", "lf"), ("factalign", "factalign.jsonl")):
        model = ["--model", str(MODEL)]
        found[f"to {other}"] = ["-m", "tools.formats", f"to-{other}", str(run / "train.jsonl"), str(out / file), *model]
        found[f"from {other}"] = ["-m", "tools.formats", f"from-{other}", str(out / file), str(out / "back"), *model]
    return found


def measured(command: list[str], log: Path) -> tuple[float, float]:
    """(CPU seconds, peak MiB) of `python COMMAND`, on one thread. Raises InputError when it fails."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    with open(log, "ab") as to:
        files = [(os.POSIX_SPAWN_DUP2, to.fileno(), 1), (os.POSIX_SPAWN_DUP2, to.fileno(), 2)]
        pid = os.posix_spawn(sys.executable, [sys.executable, *command], env, file_actions=files)
        _, status, usage = os.wait4(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise InputError(f"{' '.join(command[:6])} ... ended with {code}; see {log}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def of_size(out: Path, n: int) -> dict[str, tuple[float, float]]:
    """stage -> (CPU seconds, peak MiB) with n questions. What is made is removed again."""
    shutil.rmtree(out, ignore_errors=True)
    make(out, n)
    found = {}
    for name, command in commands(out).items():
        started = time.perf_counter()
        found[name] = measured(command, out / "log.txt")
        seconds, peak = found[name]
        took = time.perf_counter() - started
        print(
            f"{n:,} questions, {name}: {seconds:.0f} CPU s, {took:.0f} s, {peak:,.0f} MiB", file=sys.stderr, flush=True
        )
    shutil.rmtree(out)
    return found


@program
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--questions", type=int, default=1_000_000, metavar="N", help="how many, at the most [1000000]")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), metavar="DIR", help="scratch [runs/scale]")
    parser.add_argument("--whole", action="store_true", help="not a tenth of them first")
    given = parser.parse_args(argv)
    os.chdir(ROOT)
    sizes = [given.questions] if given.whole else [given.questions // 10, given.questions]
    by_size = {n: of_size(given.out / str(n), n) for n in sizes}
    rows = []
    for name in by_size[sizes[0]]:
        row = {"stage": name}
        for n in sizes:
            seconds, peak = by_size[n][name]
            row |= {f"{n:,}: CPU s": f"{seconds:,.0f}", f"{n:,}: MiB": f"{peak:,.0f}"}
        rows.append(row)
    print(markdown(rows))


if __name__ == "__main__":
    sys.exit(main())
