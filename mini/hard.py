"""A world in which no label can be dropped: what a move does hangs on the pair of labels.

Facts, questions, cue phrases and answers without thinking are those of world.py. What differs is the thinking:

  class    each of the 12 labels that follow the first retrieval belongs to one of four classes; a step says the
           marker word of its class ("But wait, only Paris.")
  effect   of a label after a class: it loses the gold, it repairs (the gold comes back), or nothing. Every label
           loses after one class, repairs after another and does nothing after the two others; which, a world draws.
           12 rules lose and 12 repair, 36 pairs of labels each
  habit    each opener has one of seven styles. A style has two favourite next labels after every label; the first
           loses with the style's probability and repairs otherwise, the second is any
  start    the first retrieval names both answers, the current one last, and that is the wrong one with probability
           FIRST_WRONG; every later step names the current one

A trace that only makes repairing moves ends with the gold; one that only makes moves without effect stays as bad as the
first retrieval; leaving out any two labels helps little (tests/test_hard.py). In the null world effects follow another
walk, in a style that the trace's style does not tell.
"""

import random
from dataclasses import dataclass

from mini.world import (
    CAREFUL,
    GOLD,
    KEEPS,
    LENGTHS,
    LOSES,
    NONE,
    REPAIRS,
    WRONG,
    Fact,
    Trace,
    World,
    draw,
)

CLASSES = {
    "maybe": ("retrieval", "analogy", "case_analysis"),
    "rather": ("comparison", "self_verification", "synthesis"),
    "only": ("backtracking", "summarization", "evaluation"),
    "first": ("chaining", "causal_reasoning", "explanation"),
}
MARKER = {label: marker for marker, labels in CLASSES.items() for label in labels}
BODY = tuple(MARKER)  # labels of the steps after the first retrieval
OPENING = ("framing", "decomposition", "categorization")
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # of each style: probability that a first favourite loses
FLAT, SELF, FAVOURITES = 0.3, 0.05, (6.0, 2.0)  # weight of any next label, of the same label again, of the favourites
FIRST_WRONG = 0.35
HAPPENS = {LOSES: 0.95, REPAIRS: 0.99}  # probability that it happens
MERGE = 0.05  # probability that a step is written into the segment of the step before
OPENED = "{s}, so the {k}."  # before a candidate is there
FOUND = "{s} with {o} or {c}, {m}."  # the first retrieval: both answers, the current one last
STEP = "{m} {c}."  # afterwards

Style = dict[str, dict[str, float]]  # label -> next label -> weight


@dataclass(frozen=True)
class Rules:
    """What a label does after a class: {(marker, label): "loses" or "repairs"}, the others do nothing."""

    table: dict[tuple[str, str], str]

    @classmethod
    def drawn(cls, rng: random.Random) -> "Rules":
        """Every label loses after one class and repairs after another; every class is equally often either."""
        markers, table = list(CLASSES), {}
        for i, label in enumerate(rng.sample(BODY, len(BODY))):
            table[markers[i % 4], label] = LOSES
            table[markers[(i + 1 + i // 4) % 4], label] = REPAIRS
        return cls(table)

    def kind(self, before: str, label: str) -> str:
        """What a move does; a label after itself does nothing."""
        return KEEPS if before == label else self.table.get((MARKER.get(before, ""), label), KEEPS)


def habits(rng: random.Random, rules: Rules, share: float) -> Style:
    """A style whose first favourites lose with probability `share` and repair otherwise."""
    style = {}
    for before in BODY:
        weights = {label: SELF if label == before else FLAT for label in BODY}
        wanted = LOSES if rng.random() < share else REPAIRS
        first = rng.choice([label for label in BODY if rules.kind(before, label) == wanted])
        second = rng.choice([label for label in BODY if label not in (first, before)])
        weights[first] += FAVOURITES[0]
        weights[second] += FAVOURITES[1]
        style[before] = weights
    return style


def opening(rng: random.Random) -> list[str]:
    """The steps up to the first retrieval, which is the third one at the latest."""
    labels: list[str] = []
    while True:
        weights = {x: w for x, w in CAREFUL[labels[-1] if labels else ""].items() if x in (*OPENING, "retrieval")}
        labels.append(str(draw(rng, weights)) if len(labels) < 2 else "retrieval")
        if labels[-1] == "retrieval":
            return labels


def walk(rng: random.Random, style: Style, length: int) -> list[str]:
    """Labels of a trace of `length` steps."""
    labels = opening(rng)
    while len(labels) < length:
        labels.append(str(draw(rng, style[labels[-1]])))
    return labels


def outcomes(rng: random.Random, rules: Rules, labels: list[str]) -> list[str]:
    """The candidate after each step of a walk."""
    candidates = []
    for t, label in enumerate(labels):
        if NONE in candidates[-1:] or not candidates:
            found = WRONG if rng.random() < FIRST_WRONG else GOLD
            candidates.append(found if label == "retrieval" else NONE)
            continue
        kind = rules.kind(labels[t - 1], label)
        happens = kind != KEEPS and rng.random() < HAPPENS[kind]
        candidates.append({LOSES: WRONG, REPAIRS: GOLD}[kind] if happens else candidates[-1])
    return candidates


class HardWorld(World):
    """One draw of the hidden attributes, the rules, the styles and which opener has which style."""

    mix = {"statements": 0.1, "off": 0.15, "on": 0.75}
    misled = 0.54
    merge = MERGE

    def __init__(self, seed: int, null: bool = False):
        super().__init__(seed, null)
        rng = random.Random(f"hard/{seed}")
        self.rules = Rules.drawn(rng)
        self.styles = [habits(rng, self.rules, share) for share in SHARES]
        openers = list(self.moods)
        self.style_of = {opener: i % len(SHARES) for i, opener in enumerate(openers)}
        # Of the null world: the style of the walk that decides the candidates; each meets every style of the labels.
        self.shadow_of = {opener: 2 * (i // len(SHARES)) for i, opener in enumerate(openers)}

    def kind(self, before: str, label: str) -> str:
        """What a move does to the candidate: "loses", "repairs" or "keeps"."""
        return KEEPS if self.null else self.rules.kind(before, label)

    def think_on(self, rng: random.Random, fact: Fact, opener: str) -> Trace:
        """A thinking trace and its answer."""
        length = int(draw(rng, LENGTHS))
        labels = walk(rng, self.styles[self.style_of[opener]], length)
        candidates = outcomes(rng, self.rules, labels)
        if self.null:
            candidates = self._strangers(rng, opener, labels)
        segments, segment_labels = self._write(rng, fact, labels, candidates)
        answer = fact.object if candidates[-1] == GOLD else fact.distractor
        return Trace(False, labels, candidates, segments, segment_labels, answer)

    def _strangers(self, rng: random.Random, opener: str, labels: list[str]) -> list[str]:
        """The candidates of another walk, from the first retrieval on."""
        before = labels.index("retrieval")
        other = ["retrieval"]
        while len(other) < len(labels) - before:
            other.append(str(draw(rng, self.styles[self.shadow_of[opener]][other[-1]])))
        return [NONE] * before + outcomes(rng, self.rules, other)

    def _body(self, rng: random.Random, fact: Fact, labels: list[str], candidates: list[str], t: int) -> str:
        """What step t says after its cue."""
        first = candidates[t] != NONE and (t == 0 or candidates[t - 1] == NONE)
        body = OPENED if candidates[t] == NONE else FOUND if first else STEP
        return body.format(m=MARKER.get(labels[t], ""), **self._slots(fact, candidates[t]))
