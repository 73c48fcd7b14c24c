"""A world: real facts, and a reasoner that sometimes loses the fact it has found. Source of the miniature's documents.

The facts (facts.jsonl) are real and the same in every world. What a world draws from its seed is hidden from the model:
  exposure       of a fact: how often it is written about
  misconception  of a fact: the answer without thinking is the popular wrong one (the fact's distractor)
  trap           of an opener ("Quick question.", "Homework help:"): probability that it sets off a careless trace
How a question is put decides how carefully it is thought about. (A trap in each fact was tried first: in the few
minutes that the miniature trains it learns the facts and the misconceptions but not one more bit about each of them.)

A trace walks over the 15 meta-reasoning labels, one step a label, and carries a candidate answer: none, the gold or
the distractor. The mood of the trace (careful or careless) only decides which moves it takes (CAREFUL, CARELESS); what
a move does to the candidate (`consequence`) depends on the two labels alone. The answer is always the last candidate.
So the thing to be learnt from right and wrong traces is which moves lose a fact that is already there.

In a null world the walk and the candidates come from two traces that share nothing but the length: moves look the
same and wrong answers are about as frequent, but no move says anything about the answer. A method that gains from
transitions there has found an artefact.

Every step starts with a cue phrase of its label (cues.json), so a phrase look-up recovers the labels from the text.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
NONE, GOLD, WRONG = "none", "gold", "wrong"

# Moves: weight of the next label, by mood and by the label before. "" is the start of the trace.
CAREFUL = {
    "": {"framing": 5, "decomposition": 2, "categorization": 1.5, "retrieval": 1.5},
    "framing": {"retrieval": 5, "decomposition": 3, "categorization": 2, "causal_reasoning": 0.5},
    "decomposition": {"retrieval": 6, "categorization": 1.5, "chaining": 0.7, "framing": 0.5},
    "categorization": {"retrieval": 6, "decomposition": 1, "comparison": 0.7},
    "retrieval": {
        "self_verification": 4, "comparison": 2.5, "synthesis": 1.5, "explanation": 1, "causal_reasoning": 1,
        "chaining": 1, "evaluation": 0.5, "backtracking": 0.45, "analogy": 0.5, "case_analysis": 0.5,
    },
    "backtracking": {
        "retrieval": 4, "self_verification": 3, "comparison": 1.2, "decomposition": 0.6, "backtracking": 0.3,
    },
    "self_verification": {
        "synthesis": 2, "evaluation": 2, "comparison": 1.5, "summarization": 1.5, "explanation": 1, "retrieval": 1,
        "backtracking": 0.2,
    },
    "comparison": {
        "synthesis": 2.5, "self_verification": 2, "evaluation": 2, "explanation": 0.7, "summarization": 0.7,
    },
    "synthesis": {"summarization": 2, "self_verification": 1.5, "evaluation": 1, "explanation": 1, "chaining": 0.7},
    "evaluation": {
        "self_verification": 2, "summarization": 2, "explanation": 1.5, "synthesis": 1, "backtracking": 0.2,
    },
    "chaining": {"self_verification": 2, "synthesis": 1.5, "retrieval": 1, "explanation": 1, "causal_reasoning": 0.8},
    "causal_reasoning": {
        "self_verification": 2, "explanation": 1.5, "chaining": 1, "synthesis": 1, "comparison": 1, "retrieval": 1,
    },
    "analogy": {"self_verification": 3, "comparison": 2, "retrieval": 1, "evaluation": 0.5},
    "case_analysis": {"self_verification": 3, "comparison": 1.5, "causal_reasoning": 1, "evaluation": 0.5},
    "explanation": {"summarization": 2, "self_verification": 1.5, "synthesis": 1, "evaluation": 1},
    "summarization": {"self_verification": 1.5, "evaluation": 1, "explanation": 1, "synthesis": 0.7},
}  # fmt: skip
HASTY = {"backtracking": 2, "evaluation": 1, "explanation": 1, "summarization": 1, "chaining": 0.5}
CARELESS = {
    "": {"framing": 5, "retrieval": 2.5, "categorization": 1.5, "decomposition": 1},
    "framing": {"retrieval": 6, "categorization": 1.5, "decomposition": 0.7},
    "decomposition": {"retrieval": 6, "categorization": 1},
    "categorization": {"retrieval": 7, "analogy": 0.5},
    "retrieval": {
        "backtracking": 4, "analogy": 2.2, "case_analysis": 2.2, "evaluation": 0.4, "explanation": 0.4, "chaining": 0.4,
        "causal_reasoning": 0.4, "self_verification": 0.3,
    },
    "backtracking": {
        "backtracking": 3, "evaluation": 2, "explanation": 1.5, "summarization": 1.2, "analogy": 1, "case_analysis": 1,
        "chaining": 0.7, "causal_reasoning": 0.6, "retrieval": 0.15, "self_verification": 0.15,
    },
    "analogy": {"evaluation": 6, "case_analysis": 1, "chaining": 0.7, "explanation": 0.6, "causal_reasoning": 0.4},
    "case_analysis": {"evaluation": 6, "analogy": 1, "chaining": 0.7, "explanation": 0.6},
    "evaluation": {"backtracking": 2, "summarization": 2, "explanation": 1.5, "chaining": 1, "analogy": 0.7},
    "explanation": {"summarization": 2, "backtracking": 1.3, "chaining": 1, "evaluation": 1, "case_analysis": 0.7},
    "chaining": {"evaluation": 1.5, "explanation": 1.5, "backtracking": 1.3, "summarization": 1, "causal_reasoning": 1},
    "causal_reasoning": {"backtracking": 1.3, "chaining": 1, "explanation": 1, "evaluation": 1, "summarization": 1},
    "summarization": {"backtracking": 2, "evaluation": 1, "explanation": 1, "analogy": 0.5},
    "self_verification": HASTY, "comparison": HASTY, "synthesis": HASTY,
}  # fmt: skip
LAST = {"summarization", "evaluation", "synthesis", "explanation", "chaining"}  # labels a trace prefers to end with

# What follows a cue. {s} subject, {k} kind of thing asked for, {c} candidate, {o} the other one. The last candidate
# named is always the current one. First list: no candidate named; second: candidate named.
BODIES = {
    "framing": (["the {k} of {s}."], ["the {k} of {s}, maybe {c}."]),
    "backtracking": (["back to {s}."], ["maybe {c}.", "it could be {c}."]),
    "self_verification": (["{s} is spelled right."], ["{c} does fit {s}.", "{s} and {c} agree.", "not {o} but {c}."]),
    "evaluation": (["{s} is still open."], ["{c}.", "it is {c}."]),
    "decomposition": (["{s} first, then the {k}."], ["{s} first, then {c}."]),
    "chaining": (["the {k} of {s}."], ["{c}.", "{c} for {s}."]),
    "causal_reasoning": (["{s} is the key."], ["{s} points to {c}."]),
    "retrieval": (["some things on {s}."], ["{s} with {c}.", "{c}."]),
    "analogy": (["{s} is like others."], ["{s} may be {c}.", "{c}."]),
    "synthesis": (["{s} has one {k}."], ["{s} gives {c}.", "it is {c}."]),
    "comparison": (["{s} has rivals."], ["{o} fits less than {c}.", "not {o}, rather {c}."]),
    "categorization": (["a {k}."], ["a {k}, so {c}."]),
    "case_analysis": (["{s} itself."], ["{s} may be {c}.", "{c}."]),
    "explanation": (["{s} needs a {k}."], ["{s} has {c}.", "{c} answers it."]),
    "summarization": (["only {s} matters."], ["the answer is {c}.", "{c}."]),
}
LENGTHS = {5: 3, 6: 4, 7: 4, 8: 3, 9: 2, 10: 1.5, 11: 1, 12: 0.5}  # steps of a trace: weight
MIN_SEGMENTS = 4
MERGE = 0.14  # probability that a step is written into the segment of the step before
KINDS = {"trap": 8, "open": 4, "safe": 16}  # openers of each kind
TRAPS = {"trap": (0.88, 0.97), "open": (0.3, 0.65), "safe": (0.02, 0.1)}  # range of their probability
NAMED = 0.85  # probability that a step names the candidate when nothing changed


@dataclass(frozen=True)
class Fact:
    """One row of facts.jsonl."""

    id: str
    relation: str
    subject: str
    object: str
    distractor: str
    source: str
    split: str


@dataclass(frozen=True)
class Hidden:
    """What a world drew for one fact."""

    exposure: float  # relative frequency
    misconception: float  # probability that an answer without thinking is the distractor


@dataclass(frozen=True)
class Mood:
    """What a world drew for one opener; probabilities."""

    trap: float  # the moves of a trace are careless
    fault: float  # its candidates are those of a careless trace; equal to trap except in a null world


@dataclass(frozen=True)
class Trace:
    """A thinking trace: one label and one candidate a step, the text of each segment, the labels of each segment."""

    careless: bool
    labels: list[str]
    candidates: list[str]  # none, gold or wrong after each step
    segments: list[str]
    segment_labels: list[list[str]]
    answer: str

    @property
    def completion(self) -> str:
        """What the model is trained to write after a thinking prompt."""
        return "<think>\n" + "\n\n".join(self.segments) + "\n</think>\n\n" + wrap(self.answer)


def wrap(answer: str) -> str:
    """The answer part of a completion. The space makes the answer the same tokens as in the thought."""
    return f"<answer> {answer}</answer>"


def load_facts() -> list[Fact]:
    """The facts of every world, in file order."""
    lines = (HERE / "facts.jsonl").read_text(encoding="ascii").splitlines()
    return [Fact(**json.loads(line)) for line in lines]


def draw(rng: random.Random, weights: dict) -> object:
    """One key of `weights`, with probability proportional to its value."""
    return rng.choices(list(weights), list(weights.values()))[0]


def walk(rng: random.Random, careless: bool, length: int) -> list[str]:
    """Labels of a trace of `length` steps. Knowledge is brought up within the first three steps."""
    moves = CARELESS if careless else CAREFUL
    labels: list[str] = []
    for t in range(length):
        weights = dict(moves[labels[-1] if labels else ""])
        if t == 2 and "retrieval" not in labels:
            weights = {"retrieval": 1}
        if t == length - 1 and LAST & set(weights):
            weights = {k: v for k, v in weights.items() if k in LAST}
        labels.append(draw(rng, weights))
    return labels


LOSES, REPAIRS, KEEPS = "loses", "repairs", "keeps"  # what a move can do to the candidate


def kind_of(before: str, label: str) -> str:
    """What the move `before` -> `label` does once there is a candidate."""
    if label == "backtracking" or (label == "evaluation" and before in ("analogy", "case_analysis")):
        return LOSES
    return REPAIRS if label in ("self_verification", "comparison", "retrieval", "synthesis") else KEEPS


def consequence(rng: random.Random, before: str, label: str, candidate: str) -> str:
    """The candidate after the move `before` -> `label`. Depends on nothing but the two labels and the candidate."""
    if candidate == NONE:
        return draw(rng, {GOLD: 0.96, WRONG: 0.04}) if label == "retrieval" else NONE
    kind = kind_of(before, label)
    if candidate == GOLD and kind == LOSES:
        return draw(rng, {WRONG: 0.92, GOLD: 0.08})
    if candidate == WRONG and kind == REPAIRS:
        return draw(rng, {GOLD: 0.5, WRONG: 0.5} if label == "synthesis" else {GOLD: 0.85, WRONG: 0.15})
    return candidate


def outcomes(rng: random.Random, labels: list[str]) -> list[str]:
    """The candidate after each step of a walk."""
    candidates = [NONE]
    for before, label in zip(["", *labels], labels, strict=False):
        candidates.append(consequence(rng, before, label, candidates[-1]))
    return candidates[1:]


class World:
    """One draw of the hidden attributes, and the documents that follow from them.

    seed: fixes the hidden attributes. null: moves and outcomes are independent (see the module's text).
    """

    mix = {"statements": 0.1, "off": 0.42, "on": 0.48}  # share of each kind of document
    misled = 0.5  # share of facts with a misconception
    merge = MERGE

    def __init__(self, seed: int, null: bool = False):
        self.seed, self.null = seed, null
        self.facts = load_facts()
        wording = json.loads((HERE / "wording.json").read_text(encoding="utf-8"))
        self.cues = json.loads((HERE / "cues.json").read_text(encoding="utf-8"))
        self.relations = wording["relations"]
        rng = random.Random(f"world/{seed}")
        self.hidden = {fact.id: self._hide(rng) for fact in self.facts}
        self.moods = self._moods(rng, wording["openers"])

    def _hide(self, rng: random.Random) -> Hidden:
        """Attributes of one fact: exposure log-uniform in 0.5 .. 1, a misconception about `misled` of the facts."""
        return Hidden(0.5 ** rng.random(), 0.97 if rng.random() < self.misled else 0.02)

    def _moods(self, rng: random.Random, openers: list[str]) -> dict[str, Mood]:
        """A mood for each opener. In a null world faults and traps are the rows and columns of a grid."""
        openers = rng.sample(openers, len(openers))
        if not self.null:
            traps = [rng.uniform(*TRAPS[kind]) for kind, n in KINDS.items() for _ in range(n)]
            return {opener: Mood(trap, trap) for opener, trap in zip(openers, traps, strict=True)}
        rows = ["trap", "trap", "open", "safe", "safe", "safe", "safe"]
        columns = ["trap", "open", "safe", "safe"]
        grid = [(rng.uniform(*TRAPS[column]), rng.uniform(*TRAPS[row])) for row in rows for column in columns]
        return {opener: Mood(*pair) for opener, pair in zip(openers, grid, strict=True)}

    def kind(self, before: str, label: str) -> str:
        """What a move does to the candidate: "loses", "repairs" or "keeps"."""
        return KEEPS if self.null else kind_of(before, label)

    def statement(self, rng: random.Random, fact: Fact) -> str:
        """The fact in one plain sentence."""
        text = rng.choice(self.relations[fact.relation]["statements"])
        return text.replace("{s}", fact.subject).replace("{o}", fact.object)

    def question(self, rng: random.Random, fact: Fact) -> tuple[str, str]:
        """An opener, and a question about the fact in one of its relation's wordings; the text asked is both."""
        opener = rng.choice(list(self.moods))
        return opener, rng.choice(self.relations[fact.relation]["questions"]).replace("{s}", fact.subject)

    def think_off(self, rng: random.Random, fact: Fact) -> str:
        """An answer without thinking: right unless the fact has a misconception."""
        wrong = rng.random() < self.hidden[fact.id].misconception
        return wrap(fact.distractor if wrong else fact.object)

    def think_on(self, rng: random.Random, fact: Fact, opener: str) -> Trace:
        """A thinking trace and its answer."""
        mood = self.moods[opener]
        length = draw(rng, LENGTHS)
        careless = rng.random() < mood.trap
        labels = walk(rng, careless, length)
        shadow = walk(rng, rng.random() < mood.fault, length) if self.null else labels
        candidates = outcomes(rng, shadow)
        segments, segment_labels = self._write(rng, fact, labels, candidates)
        answer = fact.object if candidates[-1] == GOLD else fact.distractor
        return Trace(careless, labels, candidates, segments, segment_labels, answer)

    def _write(self, rng: random.Random, fact: Fact, labels: list[str], candidates: list[str]) -> tuple[list, list]:
        """Text and labels of each segment; some steps are merged into the segment before."""
        spare = len(labels) - MIN_SEGMENTS
        segments: list[str] = []
        segment_labels: list[list[str]] = []
        for t, label in enumerate(labels):
            body = self._body(rng, fact, labels, candidates, t)
            step = f"{rng.choice(self.cues[label])} {body}"
            mergeable = spare > 0 and segments and len(segment_labels[-1]) == 1 and segment_labels[-1] != [label]
            if mergeable and rng.random() < self.merge:
                spare -= 1
                segments[-1] += " " + step
                segment_labels[-1].append(label)
            else:
                segments.append(step)
                segment_labels.append([label])
        return segments, segment_labels

    def _body(self, rng: random.Random, fact: Fact, labels: list[str], candidates: list[str], t: int) -> str:
        """What step t says after its cue."""
        changed = t == 0 or candidates[t] != candidates[t - 1]
        named = candidates[t] != NONE and (changed or t == len(labels) - 1 or rng.random() < NAMED)
        body = rng.choice(BODIES[labels[t]][named])
        for slot, value in self._slots(fact, candidates[t]).items():
            body = body.replace(f"{{{slot}}}", value)
        return body

    def _slots(self, fact: Fact, candidate: str) -> dict[str, str]:
        """What may stand in a step: subject, kind of thing asked for, the candidate and the other answer."""
        current, other = {GOLD: (fact.object, fact.distractor), WRONG: (fact.distractor, fact.object)}.get(
            candidate, ("", "")
        )
        return {"s": fact.subject, "k": self.relations[fact.relation]["kind"], "c": current, "o": other}
