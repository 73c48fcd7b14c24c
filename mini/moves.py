"""When do the weights help? Worlds of moves alone, in which the first step of every method can be worked out.

    python -m mini.moves            (a minute; no model, no text)

A thought is a walk over labels; its opener and a hidden state decide the next label, its moves change the hidden state,
and the state at the end is right or wrong. Every step also writes a few content tokens that mean nothing. The policy is
a table: a logit for (opener, label before, next label), and one for (opener, label, content token); `shared`: one table
for all openers. A network lies in between. Training rows are drawn and chosen as the pipeline does: right in all draws
and wrong without thinking, or the other way round.

From adapters of zero, the gradient of KTO is the sum over rows of +1 (chosen) or -lambda_r (rejected) times the
gradient of log p, and that of MR-ALIGN has w on every step (Eq. 9, 10; matrices by em.fit). `gain` of such a direction
is the rise of the share of right answers for a step of one small unit of distance, d Acc / sqrt(KL): the slope of the
curves of Acc over distance at their start. A method's gain over KTO's does not depend on the learning rate.

What differs between the worlds:

  mood       today's world (world.py): a hidden mood of the whole thought chooses careful or careless moves
  pairs      the world of pairs (hard.py): what a label does hangs on the class of the label before
  state      a label swaps the answer: it harms a right one, repairs a wrong one; labels do not tell which
  opener     like pairs, but in every second opener what loses elsewhere repairs, and the other way round
  symptom    like pairs, but after a wrong answer three labels that do nothing come four times as often

Left out: what happens after the first step.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import em
from common.endings import program
from common.files import write_json
from common.table import markdown
from mini import hard, world
from mini.kinds import receipt
from mini.world import CAREFUL, CARELESS, KEEPS, LOSES, REPAIRS

LENGTHS = {4: 3, 5: 4, 6: 4, 7: 3, 8: 2, 9: 1.5, 10: 1}  # moves after the first retrieval: weight
WORDS = 20  # how many words a content token is drawn from
MISLED = 0.6  # share of questions that are wrong without thinking
LAMBDA_R = 1.5
EVALUATED = 0.6  # temperature at which answers are counted; the distance is that at T = 1
SMALL = 1e-4  # step at which slopes are taken
METHODS = ("kto", "mralign", "shuffled", "mean")


@dataclass(frozen=True)
class Moves:
    """A world. O openers, H hidden states, L labels."""

    labels: tuple[str, ...]
    walk: np.ndarray  # (O, H, L, L) probability of the next label
    change: np.ndarray  # (O, L, L, H, H) of the hidden state by a move
    start: np.ndarray  # (O, H) of the hidden state after the first retrieval
    right: np.ndarray  # (H,) bool
    kinds: np.ndarray  # (L, L) str: loses, repairs or keeps


def sharpen(p: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities at another temperature, over the last axis."""
    q = p ** (1 / temperature)
    return q / q.sum(-1, keepdims=True)


# ---------- worlds


def pairs(seed: int = 0) -> Moves:
    """The world of hard.py; hidden states: gold, wrong."""
    of = hard.HardWorld(seed)
    labels = hard.BODY
    kinds = np.array([[of.kind(a, b) for b in labels] for a in labels])
    styles = np.array([[[style[a][b] for b in labels] for a in labels] for style in of.styles])
    walk = styles[list(of.style_of.values())][:, None].repeat(2, 1)
    walk /= walk.sum(-1, keepdims=True)
    n = len(walk)
    change = effects(kinds, hard.HAPPENS[LOSES], hard.HAPPENS[REPAIRS])[None].repeat(n, 0)
    start = np.tile([1 - hard.FIRST_WRONG, hard.FIRST_WRONG], (n, 1))
    return Moves(labels, walk, change, start, np.array([True, False]), kinds)


def effects(kinds: np.ndarray, loses: float, repairs: float) -> np.ndarray:
    """(L, L, 2, 2): what each move does to gold and wrong."""
    change = np.tile(np.eye(2), (*kinds.shape, 1, 1))
    change[kinds == LOSES, 0] = [1 - loses, loses]
    change[kinds == REPAIRS, 1] = [repairs, 1 - repairs]
    return change


def mood(seed: int = 0) -> Moves:
    """The world of world.py; hidden states: gold and wrong of the careful mood, then of the careless one."""
    labels = em.LABELS
    kinds = np.array([[world.kind_of(a, b) for b in labels] for a in labels])
    tables = np.array([[[of[a].get(b, 0.0) for b in labels] for a in labels] for of in (CAREFUL, CARELESS)])
    tables /= tables.sum(-1, keepdims=True)
    traps = [m.trap for m in world.World(seed).moods.values()]
    walk = np.tile(tables[[0, 0, 1, 1]], (len(traps), 1, 1, 1))
    one = effects(kinds, 0.92, 0.85)
    one[kinds == REPAIRS, 1] = [0.85, 0.15]
    one[np.logical_and(kinds == REPAIRS, np.array(labels)[None] == "synthesis"), 1] = [0.5, 0.5]
    change = np.zeros((*kinds.shape, 4, 4))
    change[..., :2, :2] = change[..., 2:, 2:] = one
    start = np.array([[0.96 * (1 - t), 0.04 * (1 - t), 0.96 * t, 0.04 * t] for t in traps])
    return Moves(labels, walk, change[None].repeat(len(traps), 0), start, np.array([True, False] * 2), kinds)


def state(seed: int = 0) -> Moves:
    """Four labels swap the answer, the others keep it."""
    of = pairs(seed)
    kinds = np.full_like(of.kinds, KEEPS)
    change = np.tile(np.eye(2), (*kinds.shape, 1, 1))
    change[:, :4] = [[0.1, 0.9], [0.9, 0.1]]
    return replace(of, change=change[None].repeat(len(of.walk), 0), kinds=kinds)


def opener(seed: int = 0) -> Moves:
    """In every second opener the losing moves repair and the repairing ones lose."""
    of = pairs(seed)
    other = np.select([of.kinds == LOSES, of.kinds == REPAIRS], [REPAIRS, LOSES], KEEPS)
    change = of.change.copy()
    change[1::2] = effects(other, hard.HAPPENS[LOSES], hard.HAPPENS[REPAIRS])
    return replace(of, change=change)


def symptom(seed: int = 0) -> Moves:
    """After a wrong answer the labels of one class, which do nothing here, are four times as frequent."""
    of = pairs(seed)
    marks = [i for i, label in enumerate(of.labels) if label in hard.CLASSES["first"]]
    kinds, walk = of.kinds.copy(), of.walk.copy()
    kinds[:, marks] = KEEPS
    walk[:, 1, :, marks] *= 4
    walk /= walk.sum(-1, keepdims=True)
    change = effects(kinds, hard.HAPPENS[LOSES], hard.HAPPENS[REPAIRS])
    return replace(of, kinds=kinds, walk=walk, change=change[None].repeat(len(walk), 0))


WORLDS: dict[str, Callable[[int], Moves]] = {
    "mood": mood,
    "pairs": pairs,
    "state": state,
    "opener": opener,
    "symptom": symptom,
}


# ---------- what a policy is worth


def accuracy(of: Moves, walk: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of right answers under a walk (O, H, L, L), and how often (O, H, L) a thought moves on from there."""
    n = len(walk)
    d = np.zeros((n, len(of.right), len(of.labels)))  # hidden state, last label
    d[:, :, of.labels.index("retrieval")] = of.start / n
    total, visits, right, alive = sum(LENGTHS.values()), np.zeros_like(d), 0.0, 1.0
    for t in range(1, max(LENGTHS) + 1):
        visits += alive * d
        d = np.einsum("ohb,ohba,obahk->oka", d, walk, of.change, optimize=True)
        right += LENGTHS.get(t, 0) / total * d[:, of.right].sum()
        alive -= LENGTHS.get(t, 0) / total
    return right, visits


def sharpened(of: Moves, walk: np.ndarray, temperature: float) -> Moves:
    """The world with a policy's walk, sampled at a temperature: what a model draws, answers included, gets sharper."""
    parts = {"walk": walk, "start": of.start, "change": of.change}
    return replace(of, **{name: sharpen(p, temperature) for name, p in parts.items()})


def slope(of: Moves, step: np.ndarray, temperature: float = EVALUATED) -> float:
    """d Acc / d size along a change (O, L, L) of the logits; Acc at the temperature of the evaluation."""
    both = (sharpened(of, of.walk * np.exp(sign * SMALL * step[:, None]), temperature) for sign in (1, -1))
    a, b = (accuracy(x, x.walk)[0] for x in both)
    return (a - b) / (2 * SMALL)


def distance(of: Moves, step: np.ndarray, words: np.ndarray) -> tuple[float, float]:
    """KL of a small change, over its size squared: of the moves, and of the content (content tokens, O, L, WORDS)."""
    visits = accuracy(of, of.walk)[1]
    mean = (of.walk * step[:, None]).sum(-1, keepdims=True)
    of_moves = (visits[..., None] * of.walk * (step[:, None] - mean) ** 2).sum() / 2
    written = np.einsum("ohb,ohba->oa", visits, of.walk)  # how often a label is written
    words = words - words.mean(-1, keepdims=True)
    return float(of_moves), float((written[None, :, :, None] * words**2).sum() / WORDS / 2)


# ---------- rows and directions


@dataclass(frozen=True)
class Rows:
    """N walks: opener (N,), hidden state before each move (N, T), labels (N, T + 1), -1 after the end, right (N,)."""

    opener: np.ndarray
    hidden: np.ndarray
    labels: np.ndarray
    right: np.ndarray

    def only(self, keep: np.ndarray) -> "Rows":
        return Rows(self.opener[keep], self.hidden[keep], self.labels[keep], self.right[keep])


def draw(of: Moves, rng: np.random.Generator, openers: np.ndarray, temperature: float) -> Rows:
    """One walk an opener given."""

    def pick(p: np.ndarray) -> np.ndarray:
        return (rng.random((len(p), 1)) > p.cumsum(-1)).sum(-1).clip(max=p.shape[-1] - 1)

    n, most, of = len(openers), max(LENGTHS), sharpened(of, of.walk, temperature)
    h = pick(of.start[openers])
    weights = np.array(list(LENGTHS.values()))
    length = rng.choice(list(LENGTHS), n, p=weights / weights.sum())
    labels, hidden = np.full((n, most + 1), -1), np.zeros((n, most), int)
    labels[:, 0] = of.labels.index("retrieval")
    for t in range(most):
        hidden[:, t], before = h, labels[:, t].clip(0)
        a, going = pick(of.walk[openers, h, before]), t < length
        h = np.where(going, pick(of.change[openers, before, a, h]), h)
        labels[:, t + 1] = np.where(going, a, -1)
    return Rows(openers, hidden, labels, of.right[h])


def candidates(of: Moves, rng: np.random.Generator, questions: int, temperature: float, draws: int) -> Rows:
    """The first draw of the questions that are right in all draws though wrong without thinking, or the reverse."""
    openers, misled = rng.integers(len(of.walk), size=questions), rng.random(questions) < MISLED
    drawn = [draw(of, rng, openers, temperature) for _ in range(draws)]
    right = np.array([x.right for x in drawn])
    return drawn[0].only(np.where(misled, right.all(0), (~right).all(0)))


def matrix(labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """P (L, L) as a run fits it."""
    steps = [[(names[x],) for x in row if x >= 0] for row in labels]
    at = [em.STATES.index(name) for name in names]
    return em.fit([o for of in steps for o in em.observations(of)]).P[np.ix_(at, at)]


def log_ratios(of: Moves, rows: Rows) -> dict[bool, np.ndarray]:
    """log(P_pos / P) and log(P_neg / P), (L, L), before clipping."""
    P = matrix(rows.labels, of.labels)
    return {side: np.log(matrix(rows.labels[rows.right == side], of.labels) / P) for side in (True, False)}


def weights(of: Moves, rows: Rows, method: str, rng: np.random.Generator) -> np.ndarray:
    """w (N, T) of every move."""
    before, label = rows.labels[:, :-1].clip(0), rows.labels[:, 1:].clip(0)
    there = rows.labels[:, 1:] >= 0
    if method == "kto":
        return np.ones(there.shape)
    ratio = log_ratios(of, rows)
    w = np.where(rows.right[:, None], ratio[True][before, label], ratio[False][before, label])
    w = np.exp(w.clip(-1, 1))
    for side in (True, False):
        own = there & (rows.right == side)[:, None]
        if method == "shuffled":
            w[own] = rng.permutation(w[own])
        elif method == "mean":
            w[own] = w[own].mean()
    return w


def direction(of: Moves, rows: Rows, w: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first update: of the logits of the moves (O, L, L), and of the content (C, O, L, WORDS).

    words (C, N, T): the content of every step, C tokens.
    """
    there = rows.labels[:, 1:] >= 0
    before, label = rows.labels[:, :-1][there], rows.labels[:, 1:][there]
    opener = np.broadcast_to(rows.opener[:, None], there.shape)[there]
    v = (w * np.where(rows.right, 1.0, -LAMBDA_R)[:, None])[there] / len(rows.right)
    step = np.zeros((len(of.walk), len(of.labels), len(of.labels)))
    np.add.at(step, (opener, before, label), v)
    np.add.at(step, (opener, before), -v[:, None] * of.walk[opener, rows.hidden[there], before])
    content = np.zeros((len(words), len(of.walk), len(of.labels), WORDS))
    for one, written in zip(content, words[:, there], strict=True):
        np.add.at(one, (opener, label, written), v)
    return step, content


def gains(of: Moves, questions: int, temperature: float, draws: int, seed: int, content: int = 4) -> dict[str, Any]:
    """Gain of every method on one set of rows, how many rows, and the ratios by kind of move."""
    rng = np.random.default_rng(seed)
    rows = candidates(of, rng, questions, temperature, draws)
    there = rows.labels[:, 1:] >= 0
    words = rng.integers(WORDS, size=(content, *there.shape))
    found: dict[str, Any] = {"chosen": int(rows.right.sum()), "rejected": int((~rows.right).sum())}
    for method in METHODS:
        step, written = direction(of, rows, weights(of, rows, method, rng), words)
        found[method] = slope(of, step) / sum(distance(of, step, written)) ** 0.5
        step, written = (np.broadcast_to(x.sum(axis, keepdims=True), x.shape) for x, axis in ((step, 0), (written, 1)))
        found[f"{method}, shared"] = slope(of, step) / sum(distance(of, step, written)) ** 0.5
    ratio, sides = log_ratios(of, rows), np.broadcast_to(rows.right[:, None], there.shape)[there]
    moves = rows.labels[:, :-1][there], rows.labels[:, 1:][there]
    kind = of.kinds[moves]
    for name, sign in ((LOSES, -1), (REPAIRS, 1)):
        for side, class_sign in ((True, 1), (False, -1)):
            mine = ratio[side][moves][(kind == name) & (sides == side)] * sign * class_sign
            if len(mine):
                found[f"wrong way, {name}, {'pos' if side else 'neg'}"] = float((mine < 0).mean())
    return found


DRAWS = {"once at T = 1": (1.0, 1), "3 of 3 at T = .2": (0.2, 3)}


def over(each: Sequence[dict[str, Any]], a: str, b: str) -> dict[str, float]:
    """{mean, sd}: the mean of a over the mean of b, less 1, and the spread of a - b in the same unit."""
    values, base = np.array([[x[a], x[b]] for x in each]), np.mean([x[b] for x in each])
    apart = (values[:, 0] - values[:, 1]) / base
    return {"mean": float(apart.mean()), "sd": float(apart.std(ddof=1))}


def measure(questions: Sequence[int], repeats: int, content: int) -> list[dict[str, Any]]:
    """Every world, way of drawing and number of questions: mean gains, each repeat with a world and rows of its own."""
    out = []
    for name, make in WORLDS.items():
        worlds = [make(seed) for seed in range(repeats)]
        base = float(np.mean([accuracy(x, x.walk)[0] for x in (sharpened(of, of.walk, EVALUATED) for of in worlds)]))
        for how, (temperature, draws) in DRAWS.items():
            for n in questions:
                each = [gains(of, n, temperature, draws, seed, content) for seed, of in enumerate(worlds)]
                row: dict[str, Any] = {"world": name, "draws": how, "questions": n, "Acc": base}
                row |= {key: float(np.mean([x[key] for x in each if key in x])) for key in each[0]}
                for method in METHODS[1:]:
                    row[f"{method} over kto"] = over(each, method, "kto")
                row["mralign over kto, shared"] = over(each, "mralign, shared", "kto, shared")
                out.append(row)
    return out


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/results.md."""
    lines = []
    for row in rows:
        line = {key: row[key] for key in ("world", "draws", "questions")}
        line |= {
            "chosen : rejected": f"{row['chosen']:.0f} : {row['rejected']:.0f}",
            "gain of KTO": f"{row['kto']:.3f}",
        }
        for method in (*(f"{m} over kto" for m in METHODS[1:]), "mralign over kto, shared"):
            of = row[method]
            shown = f"{100 * of['mean']:+.0f} ± {100 * of['sd']:.0f} %"
            line[method.replace("kto", "KTO")] = shown if of["sd"] < 1 else "–"  # KTO's gain is too near 0 to divide by
        for name in (LOSES, REPAIRS):
            parts = [row.get(f"wrong way, {name}, {side}") for side in ("pos", "neg")]
            line[f"wrong way, {name}"] = " / ".join("–" if x is None else f"{100 * x:.0f} %" for x in parts)
        lines.append(line)
    return markdown(lines)


@program
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", default="500,1000,4000", help="questions drawn, comma-separated")
    parser.add_argument("--repeats", type=int, default=6, help="worlds and sets of rows each [6]")
    parser.add_argument("--content", type=int, default=4, help="content tokens a step [4]")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args(argv)
    rows = measure([int(x) for x in args.questions.split(",")], args.repeats, args.content)
    if args.json:
        seeds = list(range(args.repeats))
        write_json(args.json, receipt("mini.moves", argv) | {"seeds": seeds, "rows": rows})
    print(text(rows))


if __name__ == "__main__":
    sys.exit(main())
