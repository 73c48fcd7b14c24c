"""A page on which a person labels thoughts, or grades answers, with the keyboard; no server, nothing to install.

  python -m tools.by_hand thoughts RUN --n 30 --out hand.html                 steps of a run's candidates
  python -m tools.by_hand answers RUN --set test --variant mralign --out hand.html   answers, as the judge sees them

Open the file in a browser; it keeps the work and exports JSONL: annotation records {id, steps} with source "hand", or
verdicts {id, draw, verdict}. Then

  python -m tools.questions compare RUN hand.jsonl                      a person beside the run's annotator (B.3 to B.5)
  python -m tools.questions grades RUN/eval/test/mralign.judged.jsonl hand.jsonl     a person beside the judge

The sample is drawn by its seed, as many chosen as rejected candidates, and shows neither which they are nor what any
annotator said. Two people get the same page, and their files compare like any others.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import em
from common.endings import program
from common.errors import InputError
from common.files import ROOT, atomic_write, read_jsonl, read_text
from report.figures import clean

VERDICTS = (("c", "correct"), ("i", "incorrect"), ("n", "not_attempted"))


def label_keys() -> list[str]:
    """A key for each of em.LABELS: the first letter of its name that is free, else of the alphabet; x exports."""
    keys: list[str] = []
    for label in em.LABELS:
        keys.append(next(c for c in label.replace("_", "") + "abcdefghijklmnopqrstuvwyz" if c not in [*keys, "x"]))
    return keys


def thoughts(run: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """A sample of a run's candidates, {id, question, segments}, half of them chosen, in random order."""
    rows = read_jsonl(run / "candidates.jsonl", ("id", "question", "chosen", "completion", "spans"))
    rng = random.Random(seed)
    picked = []
    for side, count in ((True, (n + 1) // 2), (False, n // 2)):
        of = [row for row in rows if row["chosen"] is side]
        picked += rng.sample(of, min(count, len(of)))
    rng.shuffle(picked)
    return [
        {"id": r["id"], "question": r["question"], "segments": [r["completion"][a:b] for a, b in r["spans"]]}
        for r in picked
    ]


def answers(samples: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """A sample of the answers of a file of samples, {id, draw, question, golds, answer}, without empty ones."""
    fields = ("id", "mode", "draw", "question", "answers", "prompt", "text", "finish")
    items = [
        {"id": r["id"], "draw": r["draw"], "question": r["question"], "golds": r["answers"], "answer": answer}
        for r in read_jsonl(samples, fields)
        if (answer := data.parse_sample(r).answer)
    ]
    return random.Random(seed).sample(items, min(n, len(items)))


def as_script(value: Any) -> str:
    """JSON that may stand inside a script element: no "<", and characters no page can carry replaced."""
    return clean(json.dumps(value, ensure_ascii=False)).replace("<", "\\u003c")


def page(kind: str, items: Sequence[dict[str, Any]], file: str) -> str:
    """The page as HTML. kind: "thoughts" or "answers"; file: the name it exports to."""
    if kind == "thoughts":
        meanings = {label: meaning for labels in em.TAXONOMY.values() for label, meaning in labels.items()}
        keys = [[key, label, meanings[label]] for key, label in zip(label_keys(), em.LABELS, strict=True)]
    else:
        keys = [[key, verdict, ""] for key, verdict in VERDICTS]
    key = hashlib.sha256(as_script(list(items)).encode()).hexdigest()[:16]
    content = as_script({"kind": kind, "key": key, "items": list(items), "keys": keys, "file": file})
    return read_text(ROOT / "tools" / "by_hand.html").replace("DATA", content, 1)


@program
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("thoughts", "answers"))
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--set", default="test", help="answers: the evaluation set [test]")
    parser.add_argument("--variant", default="mralign", help="answers: whose [mralign]")
    parser.add_argument("--n", type=int, default=30, help="how many [30]")
    parser.add_argument("--seed", type=int, default=0, help="which ones [0]")
    parser.add_argument("--out", type=Path, default=Path("hand.html"), help="the page [hand.html]")
    given = parser.parse_args(argv)
    if given.kind == "thoughts":
        items = thoughts(given.run, given.n, given.seed)
    else:
        items = answers(given.run / "eval" / given.set / f"{given.variant}.jsonl", given.n, given.seed)
    if not items:
        raise InputError(f"{given.run}: holds nothing to show; run its stages first")
    with atomic_write(given.out) as f:
        f.write(page(given.kind, items, given.out.with_suffix(".jsonl").name))
    print(f"{given.out}: {len(items)} {given.kind}; open it in a browser")


if __name__ == "__main__":
    sys.exit(main())
