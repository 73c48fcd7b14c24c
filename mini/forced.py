"""Has a model learnt the rules of the world of pairs? Its step after a forced cue, against the world's own.

    python -m mini.forced mini/model-hard --world 0

A thought that the world writes about a development fact is cut after a step, and the cue of another label is put there:
a label that repairs, loses or keeps after that step. The model writes on (T = 1, nothing cut), and the answer that it
names next is the gold or not. A model that has learnt the rules repairs, loses and keeps as often as the world
does (99, 95 and 100 %). Without this no difference between methods is one in what they do to the moves.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sample
from common.endings import program
from common.files import write_json
from common.table import markdown
from common.tokens import encode, load_tokenizer
from mini import build
from mini.hard import BODY, HardWorld
from mini.kinds import receipt
from mini.world import GOLD, KEEPS, LOSES, REPAIRS, WRONG, Trace
from model import Qwen3, load

CASES = ((REPAIRS, WRONG), (LOSES, GOLD), (KEEPS, GOLD), (KEEPS, WRONG))


def cut(rng: random.Random, world: HardWorld, trace: Trace, kind: str, now: str) -> str | None:
    """The thought up to a step with candidate `now`, and the cue of a label of that kind; None if there is none."""
    at = [i for i, x in enumerate(trace.candidates) if x == now]
    if not at or any(len(labels) > 1 for labels in trace.segment_labels):
        return None
    i = rng.choice(at)
    labels = [x for x in BODY if x != trace.labels[i] and world.rules.kind(trace.labels[i], x) == kind]
    cue = rng.choice(world.cues[rng.choice(labels)])
    return "<think>\n" + "\n\n".join(trace.segments[: i + 1]) + "\n\n" + cue


def forced(model: Qwen3, folder: Path, world: HardWorld, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """{kind, before, right, wrong}: shares of n forced steps of each case that leave the candidate right and wrong."""
    rng, tokenizer = random.Random(f"forced/{seed}"), load_tokenizer(folder)
    facts = [fact for fact in world.facts if fact.split == "dev"]
    rows = []
    for kind, now in CASES:
        prompts, pairs = [], []
        while len(prompts) < n:
            fact = rng.choice(facts)
            opener, question = world.question(rng, fact)
            trace = world.think_on(rng, fact, opener)
            text = cut(rng, world, trace, kind, now)
            if text:
                prompts.append(encode(tokenizer, build.prompt(f"{opener} {question}", True) + text))
                pairs.append((fact.object, fact.distractor))
        how = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        stop = {tokenizer.token_to_id(build.END_OF_TURN)}
        done = sample.generate(model, prompts, list(range(n)), max_new=16, stop_ids=stop, **how)
        texts = [tokenizer.decode(c.ids).split(".")[0] for c in done]
        named = [[name in text for name in pair] for text, pair in zip(texts, pairs, strict=True)]
        right, wrong = (sum(x == [k == 0, k == 1] for x in named) / n for k in (0, 1))
        rows.append({"kind": kind, "before": now, "right": right, "wrong": wrong})
    return rows


@program
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a miniature")
    parser.add_argument("--world", type=int, default=0, help="seed of its world [0]")
    parser.add_argument("-n", type=int, default=400, help="steps a case [400]")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args(argv)
    rows = forced(load(args.model), args.model, HardWorld(args.world), args.n)
    if args.json:
        write_json(args.json, receipt("mini.forced", argv) | {"seed": 0, "rows": rows})
    print(markdown([{k: f"{100 * v:.1f} %" if isinstance(v, float) else v for k, v in row.items()} for row in rows]))


if __name__ == "__main__":
    sys.exit(main())
