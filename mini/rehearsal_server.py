"""The outside world of the rehearsal as one server on this machine: a drawing model, annotators, judges, a search.

  python -m mini.rehearsal_server --model FOLDER [--port 8765]     prints its address, serves until it is stopped

  POST /v1/completions        the model, by any name; an adapter's name plays that method (vLLM's return_token_ids)
  POST /v1/chat/completions   annotator-a, annotator-b, adjudicator, judge
  POST /v1/search             Serper
  GET  /v1/counts             requests answered so far, by kind

Every reply is a pure function of the request: nothing depends on the order of the requests or on time. Questions,
people and places are invented here; a question says by its wording which data set it belongs to, and its gold is a
function of its text. Draws (temperature below 0.5) are right and wrong as often as Table 1's yields ask for; samples at
other temperatures as Table 2 says for the variant. A thought is a Markov chain of meta-reasoning labels, from one
matrix where the answer is right and from another where it is wrong: `true_transitions` gives both exactly. The first
sentence of a segment shows its label to the annotators, who confuse labels, each in their own way.

It proves the pipeline, not the method: the rates come from the paper's tables, so the tables that come out say only
that the path from samples to tables keeps them.
"""

import argparse
import functools
import itertools
import json
import random
import re
import socket
import sys
import threading
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

import em
from common.benchmarks import SOURCES, name_of, paper_figures
from common.files import ROOT, read_text
from common.tokens import encode, load_tokenizer
from llm import judge
from llm.veriscore import SUPPORTED, UNSUPPORTED

# ---------- questions

TRAIN = {"nq": 79_168, "sciq": 11_679}  # questions of A.1: 90,847
TEST = {"nq": 3_610, "sciq": 1_000, "simpleqa": 4_326, "truthfulqa": 817, "longfact": 250}
WORDING = {
    "nq": "who founded the old port of {}",
    "sciq": "What do we call the compound that forms when rock from {} cools slowly?",
    "simpleqa": "Who was made keeper of the archive of {} in the spring after the great flood?",
    "truthfulqa": "What happens to you if you open a jar from {} at night?",
    "longfact": "Tell me about the bridges of {}. Provide as many specific details as possible.",
}
PATTERNS = {name: re.compile(re.escape(w).replace(r"\{\}", "([A-Z][a-z]+)")) for name, w in WORDING.items()}
PLACE = [a + b for a in "bdgklmnprstvz" for b in ("a", "e", "i", "o", "u", "or")]  # syllables of places
PERSON = [
    a + b for a in ("br", "ch", "dr", "fl", "gr", "h", "j", "qu", "w", "y") for b in ("ai", "eo", "in", "um", "ys")
]
START = {(name, train): 4_000_000 * k for k, (name, train) in enumerate(itertools.product(TEST, (True, False)), 1)}


def place(number: int) -> str:
    """The name of a place; different numbers have different names.

    >>> place(1234567)
    'Nagidasaba'
    """
    word = ""
    for _ in range(5):
        number, k = divmod(number, len(PLACE))
        word += PLACE[k]
    return word.capitalize()


def question(name: str, train: bool, number: int) -> dict[str, Any]:
    """The question row of a data set."""
    text = WORDING[name].format(place(START[name, train] + number))
    row = {"id": f"{name}-{'train' if train else 'test'}-{number}", "dataset": name_of(name), "question": text}
    gold = gold_of(text)
    if name == "truthfulqa":
        return row | {"answers": [gold], "best_answer": gold, "task": "truthful"}
    if name == "longfact":
        return row | {"answers": [], "task": "long"}
    return row | {"answers": [gold, f"{gold} the Elder"] if name == "nq" else [gold]}


def about(text: str) -> tuple[str, str, str]:
    """(data set, place, question) of the one question that stands in a prompt. Raises ValueError without one."""
    for name, pattern in PATTERNS.items():
        if match := pattern.search(text):
            return name, match[1], match[0]
    raise ValueError("there is no question of the rehearsal in this prompt")


def invent(*key: object) -> str:
    """A name, by its key: "Bryschum Yeohin"."""
    rng = random.Random("/".join(map(str, key)))
    return " ".join("".join(rng.choices(PERSON, k=2)).capitalize() for _ in range(2))


def gold_of(text: str) -> str:
    """The gold answer of a question."""
    name = about(text)[0]
    if name == "sciq":
        return "".join(invent("gold", text).lower().split()) + "ite"
    return f"nothing but the smell of {invent('gold', text)}" if name == "truthfulqa" else invent("gold", text)


def wrong_of(text: str, number: int) -> str:
    """One of the wrong answers of a question."""
    name, wrong = about(text)[0], invent("wrong", number, text)
    if name == "sciq":
        return "".join(wrong.lower().split()) + "ite"
    return f"you turn into {wrong} for a year" if name == "truthfulqa" else wrong


# ---------- thoughts

OPENERS = {
    label: tuple(form.format(words) for form in ("{}.", "Now {}.", "Here {}."))
    for label, words in {
        "framing": "one short name is wanted",
        "backtracking": "that path leads nowhere, so another one must be tried",
        "self_verification": "the last claim ought to be tested once more",
        "evaluation": "of the names at hand one fits the evidence best",
        "decomposition": "the task falls into two smaller ones",
        "chaining": "from this the following can be inferred at once",
        "causal_reasoning": "the cause of this lies in what came before",
        "retrieval": "an old fact about it comes to mind",
        "analogy": "it is much like a case that is better known",
        "synthesis": "all of this makes one picture",
        "comparison": "the two of them differ in one respect",
        "categorization": "it belongs to a certain kind",
        "case_analysis": "one example may be worked through",
        "explanation": "the reason for it can be spelled out",
        "summarization": "in short the points were these",
    }.items()
}
LABEL_OF = {opener: label for label, openers in OPENERS.items() for opener in openers}
LABELLED = re.compile("|".join(map(re.escape, sorted(LABEL_OF, key=len, reverse=True))))
FILLER = tuple(
    f" {subject} {verb} {rest}."
    for subject in ("The chronicle", "A traveller", "The map", "One letter", "The older record")
    for verb in ("speaks of", "leaves out", "puts much weight on", "was copied after")
    for rest in ("the northern harbour and its walls", "several families of the region", "what the merchants had said")
)
BEFORE_GOLD = (" That points to", " The name would be", " It must have been")
LENGTHS = {n: 1.0 / (1 + abs(n - 8) ** 1.5 / 6) for n in range(4, 16)}  # segments of a thought: relative frequency
SECOND = 0.2  # share of the segments that carry a second label, drawn at random
TOKENS = (470, 970)  # of a thought, before its last sentence
ODD_LENGTHS = {"few segments": 0.01, "many segments": 0.01, "few tokens": 0.01, "many tokens": 0.01}


@functools.cache
def chains() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first (15,), Q_right (15, 15), Q_wrong (15, 15)): the label of segment 1, and of the next one given one."""
    rng = np.random.default_rng(20251)
    n = len(em.LABELS)
    first = rng.dirichlet(np.full(n, 0.6))
    base, tilt = rng.gamma(0.8, size=(n, n)) + 0.05, rng.normal(size=(n, n))
    right, wrong = base * np.exp(0.5 * tilt), base * np.exp(-0.5 * tilt)
    return first, right / right.sum(1, keepdims=True), wrong / wrong.sum(1, keepdims=True)


def true_counts(right: bool) -> np.ndarray:
    """(K, K) expected moves of one thought in em.STATES' order, <start> and <stop> with it."""
    first, of_right, of_wrong = chains()
    Q, total = of_right if right else of_wrong, sum(LENGTHS.values())
    C = np.zeros((len(em.STATES), len(em.STATES)))
    C[0, 1:-1] = first
    m, left = first, 1.0  # distribution of label t; share of the thoughts that have a segment t
    for t in range(1, max(LENGTHS) + 1):
        ends = LENGTHS.get(t, 0.0) / total
        C[1:-1, -1] += m * ends
        left -= ends
        C[1:-1, 1:-1] += left * m[:, None] * Q
        m = m @ Q
    return C


def true_transitions(n_pos: float, n_neg: float) -> dict[str, np.ndarray]:
    """The matrices behind so many chosen and rejected thoughts: {"P": ..., "P_pos": ..., "P_neg": ...}, (K, K) each."""
    pos, neg = true_counts(True), true_counts(False)
    out = {}
    for name, C in (("P", n_pos * pos + n_neg * neg), ("P_pos", pos), ("P_neg", neg)):
        C = C.copy()
        C[-1, -1] = 1.0
        out[name] = C / C.sum(1, keepdims=True)
    return out


@functools.cache
def _cumulated(which: str) -> tuple[tuple[float, ...], ...]:
    first, right, wrong = chains()
    table = {"first": first[None], "right": right, "wrong": wrong, "lengths": np.array([list(LENGTHS.values())])}[which]
    return tuple(tuple(row) for row in np.cumsum(table / table.sum(1, keepdims=True), axis=1).tolist())


def _pick(rng: random.Random, cumulated: Sequence[float]) -> int:
    return min(bisect(cumulated, rng.random()), len(cumulated) - 1)


def chain(rng: random.Random, right: bool, length: int) -> list[str]:
    """The labels of `length` segments."""
    at = _pick(rng, _cumulated("first")[0])
    labels, table = [em.LABELS[at]], _cumulated("right" if right else "wrong")
    for _ in range(length - 1):
        at = _pick(rng, table[at])
        labels.append(em.LABELS[at])
    return labels


def labels_in(segment: str) -> tuple[str, ...]:
    """The true labels of a segment, from its words; () for one that is not the script's."""
    return tuple(dict.fromkeys(LABEL_OF[found] for found in LABELLED.findall(segment)))[:2]


class Script:
    """What the drawing model says. tokenizer: of the model's folder, for the ids."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.ids = functools.lru_cache(maxsize=200_000)(lambda piece: tuple(encode(self.tokenizer, piece)))
        self.end = self.tokenizer.token_to_id("<|im_end|>")

    def size(self, parts: Sequence[str]) -> int:
        """Tokens of some pieces."""
        return sum(len(self.ids(part)) for part in parts)

    def thought(self, rng: random.Random, right: bool, mentioned: str, odd: str = "") -> list[str]:
        """The pieces of a thought. mentioned: a name that comes up in it, "" for none. odd: one of ODD_LENGTHS."""
        lengths = list(LENGTHS)
        n = lengths[_pick(rng, _cumulated("lengths")[0])]
        wanted = rng.randint(*TOKENS)
        n = {"few segments": 3, "many segments": rng.randint(16, 18)}.get(odd, n)
        wanted = {"few tokens": 250, "many tokens": 1100}.get(odd, wanted)
        n = min(n, 8) if odd == "few tokens" else n
        # A right answer is found late and kept; a wrong one is passed by early on.
        spots = {
            int(n * rng.betavariate(4, 2) if right else n * rng.betavariate(2, 3)) for _ in range(rng.randint(1, 3))
        }
        parts, done = [], 0
        for k, label in enumerate(chain(rng, right, n)):
            here = [rng.choice(OPENERS[label])]
            if rng.random() < SECOND:
                other = rng.choice([x for x in em.LABELS if x != label])
                here += [" ", rng.choice(OPENERS[other])]
            if mentioned and k in spots:
                here += [rng.choice(BEFORE_GOLD), f" {mentioned}", "."]
            done += self.size(here)
            while done < wanted * (k + 1) / n:
                here.append(rng.choice(FILLER))
                done += len(self.ids(here[-1]))
            parts += [*here, "\n\n"] if k < n - 1 else here
        return parts


# ---------- outcomes of completions

LOST = ("no_thought", "no_close", "cut", "placeholder", "empty")  # no answer can be taken
BENT = ("multiple", "no_open", "unclosed")  # the answer can be taken, the trace not
ODD = ("twice", "leading", "trailing")  # usable
KINDS = {kind: 0.01 for kind in LOST} | {kind: 0.02 for kind in BENT + ODD}  # thinking on: share of the completions
KINDS_OFF = {kind: 0.01 for kind in ("cut", "placeholder", "empty")} | {
    k: 0.02 for k in ("multiple", "unclosed", "trailing")
}
BOTH_RIGHT, DISAGREE = {"nq": 0.18, "sciq": 0.45}, {"nq": 0.2, "sciq": 0.2}
TELLS = 0.7  # share of Mis in which the thought had the gold; in the rest only the answer has it
ECHO = 0.8  # share of the questions that an aligned model takes as ThinkOn did
DROPPED = 0.4  # share of the wrong draws in whose thought the gold comes up


def readable(on: bool) -> float:
    """Share of the completions from which an answer can be taken."""
    return 1 - sum((KINDS if on else KINDS_OFF).get(kind, 0.0) for kind in LOST)


def kept_share(right: bool) -> float:
    """Share of the questions of a class whose draw 0 becomes a row: the others fall to malformed draws or lengths."""
    usable = (readable(True) - sum(KINDS[kind] for kind in BENT)) * (1 - sum(ODD_LENGTHS.values()))
    # Draws 1 and 2 only have to be right; a rejected question has to be right in all three draws without thinking.
    return usable * (readable(True) ** 2 if right else readable(False) ** 3)


@functools.cache
def classes(name: str) -> tuple[tuple[str, float], ...]:
    """How often a training question is of each class, so that Table 1's chosen and rejected rows come out."""
    chosen, rejected = SOURCES[name_of(name)].kept
    stray = DISAGREE[name] / 64  # of the questions whose six draws are coins: three heads, three tails
    shares = {
        "chosen": chosen / TRAIN[name] / kept_share(True) - stray,
        "rejected": rejected / TRAIN[name] / kept_share(False) - stray,
        "right in both": BOTH_RIGHT[name],
        "coin": DISAGREE[name],
    }
    return (*shares.items(), ("wrong in both", 1 - sum(shares.values())))


def choose(shares: Sequence[tuple[str, float]], u: float) -> str:
    """The entry of (name, share), ... in which a number of [0, 1) falls; the last one where shares fall short of 1."""
    for name, share in shares:
        u -= share
        if u < 0:
            return name
    return shares[-1][0]


def malformed(rng: random.Random, on: bool) -> str:
    """A kind of malformed completion, mostly "ok"."""
    kinds = KINDS if on else KINDS_OFF
    return choose([("ok", 1 - sum(kinds.values())), *kinds.items()], rng.random())


@functools.cache
def paper(name: str) -> dict[str, Any]:
    """variant -> the paper's two figures on a set, for Qwen3-8B."""
    return paper_figures(name_of(name))["Qwen3-8B"]


@functools.cache
def cells(name: str, variant: str) -> list[tuple[str, float]]:
    """Shares of a short set's readable samples: right in both thought and answer, in one of them, in neither."""
    acc, mis = paper(name)[variant]
    if mis is None:
        return [("answer", acc / 100 / readable(False)), ("neither", 1.0)]
    acc, mis = acc / 100 / readable(True), mis / 100 / readable(True)
    return [("both", acc), ("thought", TELLS * mis), ("answer", (1 - TELLS) * mis), ("neither", 1.0)]


def variant_of(model: str, prompt: str) -> str:
    """The variant of Table 2 that a request belongs to."""
    bare = model if model in ("sft", "kto", "mralign") else "thinkon"
    if "\nAn earlier answer to this was: " in prompt:
        bare = "refine"
    if prompt.endswith("<think>\n\n</think>\n\n"):
        bare = "thinkoff"
    return bare + "+ret" * ("These search results may help" in prompt)


def paper_variant(name: str, variant: str) -> str:
    """The variant whose figures stand for one that the paper did not measure."""
    return variant if variant in paper(name) else variant.removesuffix("+ret")


def complete(script: Script, body: dict[str, Any]) -> dict[str, Any]:
    """A reply of /completions."""
    prompt = script.tokenizer.decode(body["prompt"], skip_special_tokens=False)
    name, where, text = about(prompt)
    on = not prompt.endswith("<think>\n\n</think>\n\n")
    rng = random.Random(f"{text}/{on}/{body['seed']}/{body['model']}/{len(body['prompt'])}")
    kind = malformed(rng, on)
    odd = choose([*ODD_LENGTHS.items(), ("", 1.0)], rng.random())
    variant = paper_variant(name, variant_of(body["model"], prompt))
    if "Find out what is wrong, doubtful or missing" in prompt:
        right, mentioned, answer, kind, odd = (
            True,
            "",
            "The answer may be right, but its source is not given.",
            "ok",
            "",
        )
    elif body["temperature"] < 0.5:
        right, mentioned, answer = draw(rng, name, text, on)
    elif name == "longfact":
        right, mentioned, answer = True, "", long_answer(rng, where, text, variant)
    elif name == "truthfulqa":
        right, mentioned, answer = truthful_answer(rng, text, variant)
    else:
        right, mentioned, answer = short_answer(rng, name, text, variant)
    if kind in LOST:
        mentioned = ""  # so that what has no answer is no part of Mis
    thought = script.thought(rng, right, mentioned, odd) if on and kind != "no_thought" else []
    parts, stop = put_together(kind, on, thought, answer)
    ids = [i for part in parts for i in script.ids(part)]
    if stop:
        ids.append(script.end)
    else:
        while len(ids) < body["max_tokens"]:
            parts.append(rng.choice(FILLER))
            ids += script.ids(parts[-1])
    stop = stop and len(ids) <= body["max_tokens"]
    ids = ids[: body["max_tokens"]]
    words = "".join(parts) if stop else script.tokenizer.decode(ids, skip_special_tokens=False)
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
    choice = {"index": 0, "text": words, "token_ids": ids, "finish_reason": "stop" if stop else "length"}
    return {"object": "text_completion", "choices": [choice | {"stop_reason": None}], "usage": usage}


def put_together(kind: str, on: bool, thought: list[str], answer: str) -> tuple[list[str], bool]:
    """(pieces of a completion of this kind, whether it ends by itself)."""
    said = ["<answer>", answer, "</answer>"]
    said = {
        "cut": ["<answer>", "To begin with,"],
        "placeholder": ["<answer>", " your answer ", "</answer>"],
        "empty": ["<answer>", " ", "</answer>"],
        "multiple": ["<answer>", "not this one", "</answer>", "\n", *said],
        "unclosed": said[:2],
        "trailing": [*said, " I hope that this helps."],
    }.get(kind, said)
    if not on:
        return said, kind != "cut"
    opened, closed = ["<think>", "\n"], ["\n", "</think>", "\n\n"]
    if kind == "no_thought":
        return said, True
    if kind == "no_close":
        return [*opened, *thought], False
    if kind == "no_open":
        opened = []
    if kind == "leading":
        opened = ["Gladly.", "\n", *opened]
    if kind == "twice":
        closed = [*closed, "<think>", "\n", "So be it.", "\n", "</think>", "\n\n"]
    return [*opened, *thought, *closed, *said], kind != "cut"


def draw(rng: random.Random, name: str, text: str, on: bool) -> tuple[bool, str, str]:
    """(right, the gold where the thought mentions it, answer) of a draw for a training question."""
    of = choose(classes(name), random.Random(f"class/{text}").random())
    right = {"chosen": on, "rejected": not on, "right in both": True, "wrong in both": False}.get(
        of, rng.random() < 0.5
    )
    gold = gold_of(text)
    if right:
        return True, gold, gold
    return False, gold if rng.random() < DROPPED else "", wrong_of(text, rng.randrange(4))


def short_answer(rng: random.Random, name: str, text: str, variant: str) -> tuple[bool, str, str]:
    """(right, the gold where the thought mentions it, answer) of an evaluated sample."""
    u = random.Random(f"cell/{text}").random() if rng.random() < ECHO else rng.random()
    cell, gold = choose(cells(name, variant), u), gold_of(text)
    answer = gold if cell in ("both", "answer") else wrong_of(text, rng.randrange(4))
    # What alignment is to do: fewer thoughts of the wrong kind.
    good = cell == "both" or (variant.startswith("mralign") and rng.random() < 0.5)
    return good, gold if cell in ("both", "thought") else "", answer


def truthful_answer(rng: random.Random, text: str, variant: str) -> tuple[bool, str, str]:
    """The same for TruthfulQA: truthful and informative, an abstention (truthful), or a wrong claim (informative)."""
    keep = 100 * readable(variant != "thinkoff")
    truth, informative = (min(1.0, x / keep) for x in paper("truthfulqa")[variant])
    shares = [("both", truth + informative - 1), ("abstains", 1 - informative), ("wrong", 1.0)]
    cell = choose(shares, random.Random(f"cell/{text}").random() if rng.random() < ECHO else rng.random())
    gold = gold_of(text)
    if cell == "both":
        return True, gold, gold
    return False, "", "I have no comment." if cell == "abstains" else wrong_of(text, rng.randrange(4))


# ---------- long answers, claims, search


def fact(where: str, number: int, true: bool = True) -> str:
    """The sentence about one bridge of a place."""
    year = 1200 + random.Random(f"fact/{where}/{number}").randrange(700) + (0 if true else 1)
    return f"Bridge number {number} of {where} was finished in {year}."


def long_answer(rng: random.Random, where: str, text: str, variant: str) -> str:
    """Sentences about the bridges of a place: as many as the paper counts claims, right as often as its F1@K says."""
    f1, claims = paper("longfact")[variant]
    n = max(1, int(claims) + rng.randint(-3, 3))
    return " ".join(fact(where, k, rng.random() < f1 / 100) for k in range(1, n + 1))


def searched(query: str, num: int) -> dict[str, Any]:
    """A reply of Serper: for a question its gold, for a claim what is true of its bridge, else nothing of use."""
    noise = [f"Travel notes, part {k}: nothing about this." for k in range(1, num)]
    claim = re.search(r"Bridge number (\d+) of ([A-Z][a-z]+)", query)
    try:
        found = fact(claim[2], int(claim[1])) if claim else f"The records agree on {gold_of(about(query)[2])}."
    except ValueError:
        found = "There is no entry under this name."
    rows = [{"title": "Register", "snippet": text, "link": "https://register.invalid/"} for text in [found, *noise]]
    return {"organic": rows[:num]}


# ---------- annotators and judges

SPOILT = 0.04  # share of the first replies that cannot be used


@dataclass(frozen=True)
class Habit:
    """How an annotator errs. right: share of its labels that are the true one; second: share of the steps to which it
    gives one label more than there are true ones; shared: share of its errors that all annotators incline to."""

    right: float
    second: float = 0.0
    shared: float = 0.0


@dataclass(frozen=True)
class Panel:
    """The annotators: model -> habit, and who says which labels of a segment are true."""

    habits: Mapping[str, Habit]
    truth: Callable[[str], tuple[str, ...]]


@functools.cache
def confusion(model: str, right: float, shared: float = 0.0) -> np.ndarray:
    """(15, 15): how often an annotator says label b where a is true; each has errors of its own.

    shared: share of the errors drawn from rows that are the same for all and mostly hold one or two labels.
    """
    rng = np.random.default_rng([len(model), ord(model[-1])])
    n = len(em.LABELS)
    errors = rng.gamma(0.5, size=(n, n)) * (1 - np.eye(n))
    errors /= errors.sum(1, keepdims=True)
    common = np.random.default_rng(15).gamma(0.1, size=(n, n)) * (1 - np.eye(n))
    errors = (1 - shared) * errors + shared * common / common.sum(1, keepdims=True)
    return right * np.eye(n) + (1 - right) * errors


@functools.cache
def _confused(model: str, habit: Habit) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in np.cumsum(confusion(model, habit.right, habit.shared), axis=1).tolist())


PANEL = Panel({"annotator-a": Habit(0.85), "annotator-b": Habit(0.75), "adjudicator": Habit(0.9)}, labels_in)


def opinion(model: str, key: str, texts: Sequence[str], panel: Panel = PANEL) -> dict[str, float]:
    """label -> confidence that a model gives a step of some segments.

    For every true label one drawn from its row of the confusion matrix; a second one, where the habit adds it, is drawn
    from the row of the first true label until it is another one.
    """
    rng, habit = random.Random(f"{model}/{key}/{'/'.join(texts)}"), panel.habits[model]
    said: dict[str, float] = {}
    true = dict.fromkeys(label for text in texts for label in panel.truth(text))
    table = _confused(model, habit)

    def hear(label: str) -> None:
        heard = em.LABELS[_pick(rng, table[em.LABELS.index(label)])]
        said.setdefault(heard, float(rng.randint(7, 10) if heard == label else rng.randint(3, 9)))

    for label in true:
        hear(label)
    if habit.second and len(said) == 1 and rng.random() < habit.second:
        while len(said) == 1:
            hear(next(iter(true)))
    return dict(itertools.islice(said.items(), 2))


def as_reply(steps: Sequence[tuple[Sequence[int], dict[str, float]]]) -> str:
    """An annotation in the paper's schema, from (segments, label -> confidence) of every step."""
    rows = [
        {
            "step_number": number,
            "thinking_step": list(segments),
            "meta_reasoning_strategies": list(labels),
            "strategy_confidence_rating": [{"strategy": k, "confidence_rating": v} for k, v in labels.items()],
        }
        for number, (segments, labels) in enumerate(steps, 1)
    ]
    return json.dumps({"index_base": 0, "steps": rows, "final_confidence_rating": 7.0})


def annotated(body: dict[str, Any], panel: Panel = PANEL) -> str:
    """What an annotator or the adjudicator says of the trace in a chat request."""
    model, first = body["model"], body["messages"][0]["content"]
    asked = json.loads(first.rpartition("is an instruction to you.\n")[2])
    texts = [s["text"] for s in asked["segments"]]
    rng = random.Random(f"{model}/steps/{asked['question']}/{len(texts)}/{texts[0]}")
    if "undecided" in asked:
        units = [u["thinking_step"] for u in asked["undecided"]]
    else:
        units = []
        for i in range(len(texts)):
            if units and len(units[-1]) < 2 and rng.random() < 0.04:
                units[-1].append(i)
            else:
                units.append([i])
    steps = [(unit, opinion(model, asked["question"], [texts[i] for i in unit], panel)) for unit in units]
    text = as_reply(steps)
    if len(body["messages"]) > 1 or rng.random() >= SPOILT:
        return text
    spoilt = (
        f"Sure, here it is:\n{text}",
        text[: len(text) // 2],
        text.replace('"confidence_rating": ', '"confidence_rating": 1', 1).replace(": 1", ": 19", 1),
        as_reply([*steps[:-1], ([len(texts) + 3], {})]),
        re.sub(r'"(\w+)"\], "strategy_conf', r'"thinking_hard"], "strategy_conf', text, count=1),
        "",
    )
    return spoilt[rng.randrange(len(spoilt))]


@functools.cache
def _judge_pattern(kind: str) -> re.Pattern[str]:
    """The prompt of a question to the judge as a pattern whose groups are its places."""
    template = read_text(ROOT / "prompts" / judge.KINDS[kind][0]).rstrip("\n")
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.*)", re.escape(template)), re.DOTALL)


def judged(body: dict[str, Any]) -> str:
    """What the judge says: by the rules of judge.stand_in, now and then wrong, now and then in another form."""
    text = body["messages"][0]["content"]
    for kind in judge.KINDS:
        if match := _judge_pattern(kind).fullmatch(text):
            fields = {name: json.loads(said) for name, said in match.groupdict().items()}
            reply = fields["sentence"].strip() if kind == "claims" else judge.stand_in(kind, fields)
            rng = random.Random(f"judge/{body.get('seed')}/{text}")
            if kind == "support" and rng.random() < 0.02:
                reply = UNSUPPORTED if reply == SUPPORTED else SUPPORTED
            if len(body["messages"]) == 1 and rng.random() < SPOILT:
                return "" if kind == "claims" else f"I would say: {reply}!"
            return reply
    raise ValueError("this is none of the judge's prompts")


# ---------- the server


class Handler(BaseHTTPRequestHandler):
    """Answers by path; a request that it does not understand gets 400 and the reason."""

    protocol_version = "HTTP/1.1"
    script: Script
    panel: Panel
    counts: Counter[str]
    lock: threading.Lock

    def log_message(self, *args: Any) -> None:
        """Nothing is logged: the counts say what was asked."""

    def do_GET(self) -> None:
        self._send(200, dict(self.counts))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            kind, reply = self._answer(body)
        except (ValueError, KeyError) as error:
            self._send(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
            return
        with self.lock:
            self.counts[kind] += 1
        self._send(200, reply)

    def _answer(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if self.path == "/v1/search":
            return "search", searched(body["q"], body["num"])
        if self.path == "/v1/completions":
            reply = complete(self.script, body)
            return "draws" if body["temperature"] < 0.5 else "samples", reply
        text = judged(body) if body["model"] == "judge" else annotated(body, self.panel)
        asked = sum(len(m["content"]) for m in body["messages"]) // 4
        usage = {"prompt_tokens": asked, "completion_tokens": len(text) // 4, "total_tokens": asked + len(text) // 4}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return body["model"], {"id": "0", "object": "chat.completion", "choices": [choice], "usage": usage}

    def _send(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} .\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self.wfile.write(head.encode() + content)  # one packet: else the client waits for the second


class Server(ThreadingHTTPServer):
    """The server of one tokenizer and one panel of annotators; port 0 takes a free one."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, port: int = 0, panel: Panel = PANEL) -> None:
        fields = {"script": Script(folder), "panel": panel, "counts": Counter(), "lock": threading.Lock()}
        super().__init__(("127.0.0.1", port), type("Bound", (Handler,), fields))
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0: a free one [0]")
    given = parser.parse_args()
    with Server(given.model, given.port) as server:
        print(server.url, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
