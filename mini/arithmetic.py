"""The miniature of MASA: arithmetic problems, their written work, and a small model that half knows it.

    python -m mini.arithmetic --out runs/masa/base

A Qwen3 of half a million parameters learns from three kinds of documents. A solution works a problem out column by
column, always correctly, and ends with the boxed answer. A description reads off what the problem looks like, in the
form of a meta but with counts of digits and lines. A meta describes the problem and then foresees a pass rate, a length
and notions at random, whatever the problem is. So the model knows the form of a meta and that numbers may depend on the
problem, and nothing about which problems it can solve: all foresight it has later comes from the rewards of masa/.

Problems come in three tiers. Easy ones fill most documents. Middle ones are longer and rarer, so that sampling slips in
some column. Hard ones are too long, or ask for a whole product in one statement, for so few documents. Both the chance
of a right solution and its length can be read off a problem's look: its operation and its digits.

What did not work, all weights trained: without descriptions no number of a meta depends on the problem, and under the
rewards the foreseen pass rate becomes the same for all problems before it can begin to. The same happens when a third
of the training problems is never solved: their metas have no noise from lengths and notions, so that "0" gets the
largest advantages.

    kinds -> problems (train.jsonl, heldout.jsonl) -> documents about other problems -> model, in Hugging Face's format
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import model as qwen3
from common.endings import program
from common.files import write_jsonl
from common.model_config import ModelConfig
from mini import build

VOCABULARY = 400
SHAPE = build.SHAPE | dict(hidden_size=96, intermediate_size=256)
STEPS = 900
MIX = {"solution": 0.65, "description": 0.15, "meta": 0.2}  # share of the documents
HELD_OUT = 120  # problems, a third from each tier
TIERS = ("easy", "middle", "hard")
PLACES = ("ones", "tens", "hundreds", "thousands", "more")
# What a meta may foresee: words of the work, most of one kind of problem only, and two that never come up.
NOTIONS = ("carry", "borrow", "partial", "sum", "ones", "tens", "hundreds", "thousands", "remainder", "prime")
LENGTHS = (15, 69)  # tokens a meta may foresee, both included
WORDS = {"+": "plus", "-": "minus", "*": "times"}


@dataclass(frozen=True)
class Kind:
    """Problems that look alike."""

    name: str
    tier: str
    op: str
    digits: tuple[int, int]  # of each operand; one digit means 2, 3 or 4, so that the table of products is short
    weight: float  # among the documents, relative
    train: int  # problems to train on

    def draw(self, rng: random.Random) -> str:
        """A problem, for example "472 - 85". A difference is never negative."""
        a, b = (rng.randrange(10 ** (d - 1), 10**d) if d > 1 else rng.randrange(2, 5) for d in self.digits)
        return f"{max(a, b)} - {min(a, b)}" if self.op == "-" else f"{a} {self.op} {b}"


KINDS = (
    Kind("add2", "easy", "+", (2, 2), 2.0, 40),
    Kind("add3", "easy", "+", (3, 3), 1.5, 40),
    Kind("sub2", "easy", "-", (2, 2), 3.0, 40),
    Kind("mul2", "easy", "*", (2, 1), 2.0, 40),
    Kind("add4", "middle", "+", (4, 4), 0.5, 53),
    Kind("sub3", "middle", "-", (3, 3), 1.2, 53),
    Kind("mul3", "middle", "*", (3, 1), 0.6, 53),
    Kind("sub4", "hard", "-", (4, 4), 0.3, 40),
    Kind("mul4", "hard", "*", (4, 1), 0.15, 40),
    Kind("add5", "hard", "+", (5, 5), 0.1, 20),
    Kind("mul2x2", "hard", "*", (2, 2), 0.2, 20),
)


# ---------- problems and their work


def parts(problem: str) -> tuple[int, str, int]:
    """(left operand, operation, right operand)."""
    left, op, right = problem.split(" ")
    return int(left), op, int(right)


def apply(a: int, op: str, b: int) -> int:
    """One operation."""
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def answer(problem: str) -> int:
    """The number a problem asks for."""
    return apply(*parts(problem))


def columns(a: int, op: str, b: int) -> list[str]:
    """One statement a column, ones first, for example 15-1-9=5 borrow. The right operand of a product is one digit.

    A carry of a sum and a borrow are 1; that of a product is written. What a statement adds or takes away besides the
    two digits is what the one before it carried or borrowed.
    """
    out, carry, last = [], 0, len(str(max(a, b))) - 1
    for k in range(last + 1):
        x, y = (n // 10**k % 10 for n in (a, b))
        if op == "-":
            ten = 10 * (x - carry - y < 0)
            out.append(f"{x + ten}{'-1' * carry}-{y}={x + ten - carry - y}" + " borrow" * (ten > 0))
            carry = ten // 10
        else:
            y = b if op == "*" else y
            total = apply(x, op, y) + carry
            out.append(f"{x}{op}{y}{f'+{carry}' * (carry > 0)}={total}")
            carry = total // 10
            out[-1] += "" if not carry else f" carry {carry}" * (k < last) if op == "*" else " carry"
    return out


def work(problem: str) -> list[tuple[str, str]]:
    """(name, statement) of each line of the work."""
    a, op, b = parts(problem)
    if op == "*" and b > 9:
        tens, ones = b // 10 * 10, b % 10
        lines = [("partial", f"{a}*{n}={a * n}") for n in (ones, tens)]
        return [*lines, ("sum", f"{a * ones}+{a * tens}={a * b}")]
    return list(zip(PLACES, columns(a, op, b), strict=False))


def solution(problem: str, rng: random.Random) -> str:
    """Work and boxed answer. Chance decides whether the problem is copied first and whether lines bear their names.

    So the right solutions of a problem differ in length, as those of a real model do.
    """
    named, copied = rng.random() < 0.5, rng.random() < 0.5
    lines = [f"work {problem.replace(' ', '')}"] * copied
    lines += [f"{name} {statement}" if named else statement for name, statement in work(problem)]
    return "\n".join([*lines, f"\\boxed{{{answer(problem)}}}"])


# ---------- descriptions and metas


def look(problem: str) -> str:
    """Operation and numbers of digits: "minus, 3 by 2"."""
    a, op, b = parts(problem)
    return f"{WORDS[op]}, {len(str(a))} by {len(str(b))}"


def notions(rng: random.Random) -> list[str]:
    """One or two words, at random."""
    return rng.sample(NOTIONS, rng.randint(1, 2))


def description(problem: str, rng: random.Random) -> str:
    """The problem's look, and numbers that can be read off it; in a meta's form but about nothing that is foreseen."""
    digits = sum(c.isdigit() for c in problem)
    facts = {"math_notion": notions(rng), "digits": digits, "lines": len(work(problem))}
    return f"<meta>{look(problem)}</meta>\n{json.dumps(facts)}"


def meta(problem: str, rng: random.Random) -> str:
    """The problem's look and an uninformed prediction, in the form that masa/problems.py reads."""
    foreseen = {"math_notion": notions(rng), "pass_rate": rng.randint(0, 8), "solution_length": rng.randint(*LENGTHS)}
    return f"<meta>{look(problem)}</meta>\n{json.dumps(foreseen)}"


# ---------- data sets, documents


def problem_sets(seed: int) -> dict[str, list[dict[str, str]]]:
    """Rows {id, problem, answer, tier} of "train" and "heldout", no problem twice."""
    rng, used = random.Random(f"problems/{seed}"), set()
    tiers = {tier: [kind for kind in KINDS if kind.tier == tier] for tier in TIERS}
    by_turns = [tiers[TIERS[k % 3]] for k in range(HELD_OUT)]
    held_out = [kinds[k // 3 % len(kinds)] for k, kinds in enumerate(by_turns)]

    def row(kind: Kind) -> dict[str, str]:
        while (problem := kind.draw(rng)) in used:
            pass
        used.add(problem)
        facts = {"id": f"{kind.name}/{problem}", "problem": problem, "answer": str(answer(problem))}
        return facts | {"tier": kind.tier}

    train = [row(kind) for kind in KINDS for _ in range(kind.train)]
    return {"train": train, "heldout": [row(kind) for kind in held_out]}


def documents(rng: random.Random, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs about problems that are not in `without`."""
    weights = [kind.weight for kind in KINDS]
    turns = {"solution": ("", solution), "description": ("Describe ", description), "meta": ("Predict ", meta)}
    while True:
        problem = rng.choices(KINDS, weights)[0].draw(rng)
        if problem not in without:
            verb, write = turns[rng.choices(list(MIX), list(MIX.values()))[0]]
            yield build.prompt(verb + problem, thinking=True), write(problem, rng) + build.END_OF_TURN


# ---------- the model


def make(out: Path, seed: int, steps: int) -> None:
    """Write the problems, then the tokenizer, and last the model, so that a folder with weights is whole."""
    sets = problem_sets(seed)
    for name, rows in sets.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    used = frozenset(row["problem"] for rows in sets.values() for row in rows)
    stream = documents(random.Random("tokenizer"))
    texts = ["".join(next(stream)) for _ in range(5000)]
    tokenizer = build.byte_bpe(texts, VOCABULARY, ["<meta>", "</meta>"])
    build.write_tokenizer(tokenizer, out)
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=VOCABULARY, eos_token_id=tokenizer.token_to_id(build.END_OF_TURN), **SHAPE)
    net = qwen3.Qwen3(config)
    build.train(net, build.packed(documents(random.Random(f"documents/{seed}"), used), tokenizer), steps)
    qwen3.save(net, out)


@program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the documents and the weights [0]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of {build.BATCH_TOKENS} tokens [{STEPS}]")
    args = parser.parse_args()
    start = time.monotonic()
    make(args.out, args.seed, args.steps)
    print(f"{args.out}: made in {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
