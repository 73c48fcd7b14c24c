"""Labels outside factual questions: thoughts about arithmetic whose right and wrong a program decides.

  python -m mini.sums [--out runs/sums]

The documents of mini/arithmetic.py are written work, right and wrong. Here a document is the thought of a draw with
thinking on, a step a line, and its box the answer; the draw with thinking off is the box of another document of the
same problem. These samples go through the pipeline as anybody's would, from their own samples.jsonl:

  python mralign.py --config configs/mini.json --out RUN --matcher verifier --draws 1 --annotator cues \\
      --cues mini/sums-cues.json candidates annotate fit
  python -m tools.questions labels RUN

The verifier (common/verifier.py) says which answers are right, in place of string match: no answer is a gold as text,
since it stands in a box. A sum that the digits alone do not settle ("carry", "borrow") is what chosen and rejected
thoughts differ in.

The annotator is phrases made for these documents: copying the problem is framing, a line named by its place is
decomposition, a carry or borrow is chaining (the next column rests on it). A bare column such as 2+5=7 and a guess are
none of the 15: nothing in the vocabulary says "calculates". So the share without a fitting label speaks of these
phrases and these documents, not of a language model's opinion of real solutions.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mralign
from common.endings import program
from common.files import ROOT, write_json, write_jsonl
from common.table import markdown
from common.tokens import encode, load_tokenizer
from mini import arithmetic, build
from mini.ambiguous import machine
from tools import questions

MODEL = ROOT / "mini" / "model"  # for its tokenizer
CUES = ROOT / "mini" / "sums-cues.json"
EACH = 150  # problems of each kind
SETTINGS = ["--matcher", "verifier", "--draws", "1", "--min-segments", "2", "--min-think-tokens", "0"]


def samples(seed: int) -> Iterator[dict[str, Any]]:
    """Two samples of every problem, thinking on and off."""
    tokenizer, rng, used = load_tokenizer(MODEL), random.Random(f"sums/{seed}"), set[str]()
    for kind in arithmetic.KINDS:
        for _ in range(EACH):
            while (problem := kind.draw(rng)) in used:
                pass
            used.add(problem)
            row = {"id": f"{kind.name}/{problem}", "dataset": kind.tier, "question": problem, "draw": 0}
            row |= {"answers": [str(arithmetic.answer(problem))]}
            for mode in ("on", "off"):
                *lines, box = arithmetic.solution(problem, kind, rng).split("\n")
                thought = "<think>\n" + "\n\n".join(lines) + "\n</think>\n\n" if mode == "on" else ""
                text, prompt = f"{thought}<answer>{box}</answer>", build.prompt(problem, mode == "on")
                ids = {"prompt_ids": encode(tokenizer, prompt), "ids": encode(tokenizer, text + build.END_OF_TURN)}
                yield row | ids | {"mode": mode, "prompt": prompt, "text": text, "finish": "stop"}


def run(out: Path, seed: int) -> dict[str, Any]:
    """Samples, then candidates, labels and weights by the pipeline; what came out, by tier."""
    write_jsonl(out / "samples.jsonl", samples(seed))
    words = ["--config", "configs/mini.json", "--out", str(out), "--annotator", "cues", "--cues", str(CUES)]
    if mralign.main([*words, *SETTINGS, "candidates", "annotate", "fit"]):
        raise SystemExit(3)
    candidates, steps = questions.read_run(out)
    labels = {key: questions.labels_of(of) for key, of in steps.items()}
    chosen = {c["id"]: bool(c["chosen"]) for c in candidates}
    w = questions.weights(labels, chosen)
    into = {
        side: [
            x
            for key, of in labels.items()
            if chosen[key] == right
            for s, x in zip(of, w[key], strict=True)
            if "chaining" in s
        ]
        for side, right in (("chosen", True), ("rejected", False))
    }
    return {
        "candidates": {"chosen": sum(chosen.values()), "rejected": len(chosen) - sum(chosen.values())},
        "labels": questions.label_counts(candidates, labels),
        "mean w of steps that carry or borrow": {k: sum(x) / len(x) if x else None for k, x in into.items()},
    }


@program
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sums", help="folder to write [runs/sums]")
    parser.add_argument("--seed", type=int, default=0, help="of problems and documents [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    given = parser.parse_args(argv)
    found = run(given.out, given.seed)
    means = found["mean w of steps that carry or borrow"]
    said = {f"mean w of a carry or borrow, {k}": "none" if v is None else f"{v:.3f}" for k, v in means.items()}
    rows = [found["candidates"] | said]
    print(f"{markdown(rows)}\n\n{questions.label_text(found['labels'])}")
    if given.json:
        write_json(given.json, {"command": "python -m mini.sums", "seed": given.seed} | machine() | found)


if __name__ == "__main__":
    sys.exit(main())
