"""The miniature of MASA: arithmetic problems in three tiers, written work, and a small model that half knows it.

    python -m mini.arithmetic --out runs/masa/base

A Qwen3 of half a million parameters learns from two kinds of documents. A solution works a problem out column by column
and ends with the boxed answer. A meta says what the problem looks like and foresees a pass rate, a length and a notion.

Problems come in three tiers, a third of them each, which a look at operation and digits tells apart:

    trivial   at most two digits, nothing to carry or borrow: the model is always right
    open      three digits; some documents carry and borrow, the others forget to: a choice of method
    hopeless  products; the documents only guess, and long, so no sample is right and nothing can be learned

So the right method of open problems is known and not always taken, which is what a policy gradient can change, and two
thirds of the problems teach nothing, which is what foresight can save. Metas are slightly informed: INFORMED of them
foresee the pass rate of the documents, all others any rate. Lengths and notions are foreseen at random.

    kinds -> problems (train.jsonl, heldout.jsonl) -> documents about other problems -> model, in Hugging Face's format
"""

import argparse
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
from masa.problems import GRID, meta_text
from mini import build

VOCABULARY = 400
SHAPE = build.SHAPE | dict(hidden_size=96, intermediate_size=256)
STEPS = 1500
METAS = 0.2  # share of the documents; the others are solutions
INFORMED = 0.5  # share of the metas that foresee the pass rate of their kind of problem
TRAIN, HELD_OUT = 40, 10  # problems of each kind
TIERS = ("trivial", "open", "hopeless")
PLACES = ("ones", "tens", "hundreds")
NOTIONS = ("carry", "borrow", "ones", "hundreds", "try", "prime")  # what a meta may foresee; the last never comes up
LENGTHS = (15, 69)  # tokens a meta may foresee, both included
GUESSES = (5, 8)  # tries before a hopeless answer, both included
# What metas share is one token each, so that they are as short beside solutions as the paper's.
FORM = ["<meta>", "</meta>", '\n{"math_notion": ["', '"], "pass_rate": ', ', "solution_length": ']
WORDS = {"+": "plus", "-": "minus", "*": "times"}


@dataclass(frozen=True)
class Kind:
    """Problems that look alike."""

    name: str
    tier: str
    op: str
    digits: tuple[int, int]  # of each operand
    weight: float  # among the documents, relative
    right: float  # share of the documents whose work is right

    def draw(self, rng: random.Random) -> str:
        """A problem, for example "472 - 85". No difference is negative; trivial ones carry and borrow nothing.

        Open ones have another answer to those who forget to carry and borrow.
        """
        while True:
            a, b = (rng.randrange(10 ** (d - 1), 10**d) for d in self.digits)
            problem = f"{max(a, b)} - {min(a, b)}" if self.op == "-" else f"{a} {self.op} {b}"
            forgetful, result = columns(*parts(problem), forget=True)
            fits = {"trivial": forgetful == columns(*parts(problem))[0], "open": result != answer(problem)}
            if fits.get(self.tier, True):
                return problem


KINDS = (
    Kind("add2", "trivial", "+", (2, 2), 1.0, 1.0),
    Kind("sub2", "trivial", "-", (2, 2), 1.0, 1.0),
    Kind("add2x1", "trivial", "+", (2, 1), 0.7, 1.0),
    Kind("add3", "open", "+", (3, 3), 1.5, 0.5),
    Kind("sub3", "open", "-", (3, 3), 2.0, 0.6),
    Kind("sub3x2", "open", "-", (3, 2), 1.5, 0.5),
    Kind("mul2x2", "hopeless", "*", (2, 2), 0.3, 0.0),
    Kind("mul3x2", "hopeless", "*", (3, 2), 0.3, 0.0),
    Kind("mul3x3", "hopeless", "*", (3, 3), 0.3, 0.0),
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


def columns(a: int, op: str, b: int, forget: bool = False) -> tuple[list[str], int]:
    """(one statement a column, ones first, for example "15-1-9=5 borrow"; the answer that they make).

    What a statement adds or takes away besides the two digits is what the one before it carried or borrowed. forget:
    nothing is carried, and the smaller digit is taken from the larger one.
    """
    out, digits, carry, last = [], [], 0, len(str(max(a, b))) - 1
    for k in range(last + 1):
        x, y = (n // 10**k % 10 for n in (a, b))
        if op == "-":
            if forget:
                x, y = max(x, y), min(x, y)
            ten = 10 * (x - carry - y < 0)
            result = x + ten - carry - y
            out.append(f"{x + ten}{'-1' * carry}-{y}={result}" + " borrow" * (ten > 0))
            digits.append(result)
            carry = ten // 10
        else:
            total = x + y + carry
            out.append(f"{x}+{y}{'+1' * carry}={total}")
            digits.append(total if k == last else total % 10)
            carry = 0 if forget else total // 10
            out[-1] += " carry" * carry
    return out, sum(digit * 10**k for k, digit in enumerate(digits))


def solution(problem: str, kind: Kind, rng: random.Random) -> str:
    """Work and boxed answer, right or wrong as often as the kind's documents are.

    Chance decides whether the problem is copied first and whether lines bear their names, so the right solutions of a
    problem differ in length, as those of a real model do.
    """
    named, copied = rng.random() < 0.5, rng.random() < 0.5
    lines = [f"work {problem.replace(' ', '')}"] * copied
    if kind.tier == "hopeless":
        size = 10 ** (len(str(answer(problem))) - 1)
        guesses = [rng.randrange(size, 10 * size) for _ in range(rng.randint(*GUESSES))]
        return "\n".join([*lines, *(f"try {guess}" for guess in guesses), f"\\boxed{{{guesses[-1]}}}"])
    statements, result = columns(*parts(problem), forget=rng.random() >= kind.right)
    lines += [f"{place} {s}" if named else s for place, s in zip(PLACES, statements, strict=False)]
    return "\n".join([*lines, f"\\boxed{{{result}}}"])


# ---------- metas


def look(problem: str) -> str:
    """Operation and numbers of digits: "minus 3 2"."""
    a, op, b = parts(problem)
    return f"{WORDS[op]} {len(str(a))} {len(str(b))}"


def meta(problem: str, kind: Kind, rng: random.Random) -> str:
    """The problem's look and a prediction that knows little, in the form that masa/problems.py reads."""
    rate = round(GRID * kind.right) if rng.random() < INFORMED else rng.randint(0, GRID)
    return meta_text(look(problem), [rng.choice(NOTIONS)], rate, rng.randint(*LENGTHS))


# ---------- data sets, documents


def problem_sets(seed: int) -> dict[str, list[dict[str, str]]]:
    """Rows {id, problem, answer, tier} of "train" and "heldout", as many of every kind, no problem twice."""
    rng, used = random.Random(f"problems/{seed}"), set()

    def row(kind: Kind) -> dict[str, str]:
        while (problem := kind.draw(rng)) in used:
            pass
        used.add(problem)
        facts = {"id": f"{kind.name}/{problem}", "problem": problem, "answer": str(answer(problem))}
        return facts | {"tier": kind.tier}

    sizes = {"train": TRAIN, "heldout": HELD_OUT}
    return {name: [row(kind) for kind in KINDS for _ in range(n)] for name, n in sizes.items()}


def documents(rng: random.Random, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs about problems that are not in `without`."""
    weights = [kind.weight for kind in KINDS]
    while True:
        kind = rng.choices(KINDS, weights)[0]
        problem = kind.draw(rng)
        if problem not in without:
            verb, write = ("Predict ", meta) if rng.random() < METAS else ("", solution)
            yield build.prompt(verb + problem, thinking=True), write(problem, kind, rng) + build.END_OF_TURN


# ---------- the model


def make(out: Path, seed: int, steps: int) -> None:
    """Write the problems, then the tokenizer, and last the model, so that a folder with weights is whole."""
    sets = problem_sets(seed)
    for name, rows in sets.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    used = frozenset(row["problem"] for rows in sets.values() for row in rows)
    stream = documents(random.Random("tokenizer"))
    texts = ["".join(next(stream)) for _ in range(5000)]
    tokenizer = build.byte_bpe(texts, VOCABULARY, FORM)
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
