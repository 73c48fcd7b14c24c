"""Labels from language models: two annotators, an adjudicator where they differ, and the rules between them (3.1.2, B).

Every trace goes to annotator a and annotator b. Their replies are read strictly (`parse_reply`); a reply that is wrong
is sent back once with what is wrong. The two are then compared segment by segment, because they may merge segments into
steps differently: the final steps are the largest runs of segments on which neither annotator changes step (`align`).

  segments      0    1    2    3
  annotator a   [framing] [ retrieval  ]          one step (0), one step (1, 2, 3)
  annotator b   [framing] [retr.] [evaluation]    (0), (1), (2, 3)
  blocks        (0)       (1)     (2, 3)          each with a's labels and b's labels

`aggregate` applies the paper's rules (i)-(iii) to each block. The blocks of a trace that it leaves open go to the
adjudicator in one call; an annotator without a usable reply leaves all its blocks open. A block that the adjudicator
cannot settle either is rejected: it carries no label, its weight is 1, and it is counted. No label is ever guessed.

With one endpoint only (no b, no judge) a's labels are the result. Left out: votes of more than two annotators.
"""

import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import em
from annotate import Block, Step, aggregate, align, check_steps
from common.errors import AnnotationError, InputError, Refused, Unanswered
from common.template import fill, load_prompt
from llm.chat import Chat, inert, sealed
from llm.client import in_threads

T = TypeVar("T")
FILES = ("annotate.txt", "adjudicate.txt", "again.txt")
CUT = " (it was cut off at the length limit: be brief)"  # what a second question says beside the problem
UNUSABLE = 0.5  # share of replies of no use above which the run ends: its labels would be mostly missing
IN_A_ROW = 3  # calls that fail one after the other before the run ends


# ---------- what is asked


def reply_schema() -> dict[str, Any]:
    """JSON schema of a reply, within the part of the language that strict modes take. Bounds are checked here later."""
    label = {"type": "string", "enum": list(em.LABELS)}
    number, whole = {"type": "number"}, {"type": "integer"}

    def record(**fields: Any) -> dict[str, Any]:
        return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}

    rating = record(strategy=label, confidence_rating=number)
    step = record(
        step_number=whole,
        thinking_step={"type": "array", "items": whole},
        meta_reasoning_strategies={"type": "array", "items": label},
        strategy_confidence_rating={"type": "array", "items": rating},
    )
    return record(index_base=whole, steps={"type": "array", "items": step}, final_confidence_rating=number)


def vocabulary() -> str:
    """The labels with their meanings under the macro strategies, as the prompts show them."""
    lines = []
    for macro, labels in em.TAXONOMY.items():
        lines += [f"{macro}:", *(f"- {label}: {meaning}" for label, meaning in labels.items())]
    return "\n".join(lines)


@dataclass
class Trace:
    """A thinking trace on its way to its labels. votes: per role the steps of a usable reply, None without one."""

    id: str
    question: str
    answers: list[str]
    segments: list[str]
    votes: dict[str, list[Step] | None] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def each_segment(self) -> list[Block]:
        """Every segment as a block of its own."""
        return [(i,) for i in range(len(self.segments))]

    def material(self) -> dict[str, Any]:
        """What every prompt shows of it. PAPER: Figures 8 and 9 show the gold answer too."""
        segments = [{"segment": i, "text": text} for i, text in enumerate(self.segments)]
        return {"question": self.question, "correct_answer": self.answers, "segments": segments}


@dataclass(frozen=True)
class Prompts:
    """The three templates, checked. Raises InputError when a place is missing or unknown."""

    annotate: str
    adjudicate: str
    again: str

    @classmethod
    def load(cls, folder: Path) -> "Prompts":
        """From annotate.txt, adjudicate.txt and again.txt."""
        return cls(*(load_prompt(folder / name) for name in FILES))

    def __post_init__(self) -> None:
        for template in (self.annotate, self.adjudicate):
            fill(template, labels="", material="")
        fill(self.again, problem="")

    def first(self, trace: Trace) -> list[dict[str, str]]:
        """The chat messages that ask for labels of a whole trace."""
        return _turn(self.annotate, trace.material())

    def second_opinion(self, trace: Trace, blocks: Sequence[Block]) -> list[dict[str, str]]:
        """What the adjudicator gets: the trace, and for every open block what the annotators proposed."""
        proposals = []
        for block in blocks:
            said = {}
            for name, role in (("first", "a"), ("second", "b")):
                steps = trace.votes[role]
                said[name] = None if steps is None else next(s for s in steps if block[0] in s.segments).votes()
            proposals.append({"thinking_step": list(block)} | said)
        return _turn(self.adjudicate, trace.material() | {"undecided": proposals})


def _turn(template: str, material: dict[str, Any]) -> list[dict[str, str]]:
    """One user message. The trace stands in JSON strings, which no text inside them can leave (`chat.sealed`)."""
    shown = sealed(material, indent=0)
    return [{"role": "user", "content": fill(template, labels=vocabulary(), material=shown)}]


# ---------- what comes back


def parse_reply(text: str, n_segments: int, blocks: Sequence[Block] | None = None, source: str = "") -> list[Step]:
    """The steps of a reply. One leading <think> block and one code fence are taken off; nothing else is repaired.

    Every segment must be in exactly one step; with `blocks` the steps must be exactly these. Raises AnnotationError.
    """
    value = load_reply(text)
    if value.get("index_base", 0) != 0:
        raise AnnotationError("index_base must be 0: count segments from 0")
    if not isinstance(value.get("steps"), list):
        raise AnnotationError('"steps" must be a list')
    steps = [_step(step, f"step {number}", source) for number, step in enumerate(value["steps"], 1)]
    try:
        check_steps([step.as_json() for step in steps], n_segments, "")
    except InputError as error:
        problem = str(error).removeprefix(": ").rpartition("; ")[0]
        raise AnnotationError(f"{problem} (steps counted from 0)") from None
    found = [step.segments for step in steps]
    if blocks is not None and found != list(blocks):
        raise AnnotationError(f"thinking_step must be, in this order, {[list(block) for block in blocks]}")
    if blocks is None and len(list(itertools.chain(*found))) < n_segments:
        missing = sorted({*range(n_segments)} - {*itertools.chain(*found)})
        raise AnnotationError(f"segment {missing[0]} is in no step: put every segment into exactly one step")
    return steps


def ask_twice(
    chat: Chat, messages: list[dict[str, str]], again: str, parse: Callable[[str], T]
) -> tuple[T | None, str]:
    """(what `parse` makes of the reply, outcome). A reply that it refuses is sent back once, with the reason.

    again: template of the second message, with {problem} in it. None when the second reply is no better.
    """
    for outcome in ("usable", "usable when asked again"):
        answer = chat.ask(messages)
        try:
            return parse(answer.text), outcome
        except AnnotationError as error:
            cut = CUT * (answer.finish == "length")
            said = {"role": "assistant", "content": inert(answer.text[:8000]) or "(empty)"}
            messages = [*messages, said, {"role": "user", "content": fill(again, problem=inert(f"{error}{cut}"))}]
    return None, "not usable"


def check_usable(outcomes: Mapping[str, int]) -> None:
    """Raise InputError when more than half of an annotator's replies were of no use, even when asked again.

    outcomes: "ROLE: usable", "ROLE: usable when asked again", "ROLE: not usable" -> how many.
    """
    for role in sorted({name.partition(": ")[0] for name in outcomes}):
        counts = {name.partition(": ")[2]: n for name, n in outcomes.items() if name.startswith(f"{role}: ")}
        bad, total = counts.get("not usable", 0), sum(counts.values())
        if bad > UNUSABLE * total:
            raise InputError(
                f"annotator {role}: {bad} of {total} replies are of no use even when asked again; use a stronger model "
                "(--annotator committee, or self with --annotator-model), or raise --annotate-max-tokens"
            )


def load_reply(text: str) -> dict[str, Any]:
    """The JSON object of a reply, strictly. Raises AnnotationError."""
    text = text.strip()
    if text.startswith("<think>"):
        text = text.partition("</think>")[2].strip()
    elif not text.startswith("{"):  # some servers cut off the first tag
        text = text.rpartition("</think>")[2].strip()
    if text.startswith("```") and text.endswith("```") and len(text) > 6:
        text = re.sub(r"^json\b", "", text[3:-3], flags=re.IGNORECASE)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise AnnotationError("a key occurs twice in one object")
        return dict(pairs)

    def constant(name: str) -> None:
        raise AnnotationError(f"{name} is not a JSON number")

    if not text:
        raise AnnotationError("it is empty")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # an escape may spell half a surrogate pair: no UTF-8 file holds it
    except AnnotationError:
        raise
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"it is not one JSON object ({error})") from None
    if not isinstance(value, dict):
        raise AnnotationError("it is not one JSON object")
    return value


def _step(value: Any, place: str, source: str) -> Step:
    """A Step whose types are right; its meaning is checked by annotate.check_steps."""
    if not isinstance(value, dict):
        raise AnnotationError(f"{place} must be an object")
    segments, labels, ratings = (
        value.get(name) for name in ("thinking_step", "meta_reasoning_strategies", "strategy_confidence_rating")
    )
    if not isinstance(segments, list):
        raise AnnotationError(f"{place}: thinking_step must be a list of segment numbers")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AnnotationError(f"{place}: meta_reasoning_strategies must be a list of labels")
    if not isinstance(ratings, list) or not all(isinstance(r, dict) for r in ratings):
        raise AnnotationError(f"{place}: strategy_confidence_rating must be a list of objects")
    rated = [r.get("strategy") for r in ratings]
    if rated != labels:
        raise AnnotationError(f"{place}: strategy_confidence_rating must rate each label of the step once, in order")
    return Step(tuple(segments), tuple(labels), tuple(r.get("confidence_rating") for r in ratings), source)


class Committee:
    """An annotator (annotate.Annotator) that is given all its traces first: `prepare`, then `label`.

    a: the first annotator, and the only one if b is None; then judge must be None too.
    outcomes: how many replies of each role were usable, usable after asking again, and not usable.
    """

    name = "committee"

    def __init__(self, a: Chat, b: Chat | None, judge: Chat | None, prompts: Prompts) -> None:
        assert (b is None) == (judge is None), (b, judge)
        self.a, self.b, self.judge, self.prompts = a, b, judge, prompts
        self.traces: dict[tuple[str, tuple[str, ...]], Trace] = {}
        self.outcomes: Counter[str] = Counter()
        self.failed: list[tuple[Trace, Unanswered]] = []
        self.in_a_row = 0
        self.lock = threading.Lock()

    def label(self, question: str, segments: list[str]) -> list[Step]:
        """The steps of a trace that `prepare` has seen."""
        return self.traces[question, tuple(segments)].steps

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take in candidate rows. Equal thoughts on the same question are asked about once."""
        for row in rows:
            segments = [row["completion"][c0:c1] for c0, c1 in row["spans"]]
            trace = Trace(row["id"], row["question"], row["answers"], segments)
            self.traces.setdefault((row["question"], tuple(segments)), trace)

    def prepare(self, threads: int, stop: threading.Event, progress: Callable[[int], None]) -> None:
        """Make all calls, `threads` at a time: first the annotators', then the adjudicator's. Raises ServiceError.

        A call without an answer does not end the run at once: all others are made, so that the next run has only this
        one left. Three such calls in a row do.
        """
        traces = list(self.traces.values())
        chats = [chat for chat in (self.a, self.b) if chat]
        first = [(trace, chat) for trace in traces for chat in chats]
        for _ in in_threads(lambda job: self._patiently(job[0], self._vote, *job), first, threads, stop):
            progress(1)
        self._raise_failed()
        if self.judge is None:
            for trace in traces:
                vote = trace.votes["a"]
                trace.steps = unlabelled(trace.each_segment(), "rejected") if vote is None else vote
            return
        undecided = []
        for trace in traces:
            trace.steps, is_open = self.decide(trace)
            if is_open:
                undecided.append(trace)
        for _ in in_threads(lambda trace: self._patiently(trace, self._adjudicate, trace), undecided, threads, stop):
            progress(1)
        self._raise_failed()

    def _patiently(self, trace: Trace, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Unanswered as error:
            with self.lock:
                self.failed.append((trace, error))
                self.in_a_row += 1
                if self.in_a_row >= IN_A_ROW:
                    raise
        except Refused as error:
            if error.status in (400, 413, 422):
                raise Refused(f"trace {trace.id}: {error}", error.status) from None
            raise
        else:
            with self.lock:
                self.in_a_row = 0

    def _raise_failed(self) -> None:
        if self.failed:
            trace, error = self.failed[0]
            raise Unanswered(f"{len(self.failed)} call(s) without an answer, the first for trace {trace.id}: {error}")

    def _ask(
        self, chat: Chat, messages: list[dict[str, str]], n_segments: int, blocks: Sequence[Block] | None
    ) -> list[Step] | None:
        """The steps of a usable reply, at the second try if need be; None when both are unusable."""
        source = "single" if self.b is None else "judge" if blocks is not None else chat.role
        steps, outcome = ask_twice(
            chat, messages, self.prompts.again, lambda text: parse_reply(text, n_segments, blocks, source)
        )
        with self.lock:
            self.outcomes[f"{chat.role}: {outcome}"] += 1
        return steps

    def _vote(self, trace: Trace, chat: Chat) -> None:
        steps = self._ask(chat, self.prompts.first(trace), len(trace.segments), None)
        with self.lock:
            trace.votes[chat.role] = steps

    @staticmethod
    def decide(trace: Trace) -> tuple[list[Step], bool]:
        """The trace's steps after rules (i) and (ii), source "" where the adjudicator has to decide, and if any has."""
        a, b = trace.votes["a"], trace.votes["b"]
        if a is None or b is None:
            one = a if b is None else b
            blocks = trace.each_segment() if one is None else [step.segments for step in one]
            return unlabelled(blocks, ""), True
        steps = []
        for block, votes_a, votes_b in align(a, b):
            votes, source = aggregate(votes_a, votes_b) or ({}, "")  # rule (iii)
            steps.append(Step(block, tuple(votes), tuple(votes.values()), source))
        return steps, any(not step.source for step in steps)

    def _adjudicate(self, trace: Trace) -> None:
        blocks = [step.segments for step in trace.steps if not step.source]
        messages = self.prompts.second_opinion(trace, blocks)
        decided = self._ask(self.judge, messages, len(trace.segments), blocks) or unlabelled(blocks, "rejected")
        by_unit = {step.segments: step for step in decided}
        trace.steps = [by_unit.get(step.segments, step) for step in trace.steps]


def unlabelled(blocks: Iterable[Block], source: str) -> list[Step]:
    """Steps without a label."""
    return [Step(tuple(block), (), (), source) for block in blocks]
