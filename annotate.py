r"""Labels for the segments of a trace: the annotator interface, the annotation record, and an offline annotator.

An annotator reads a question and the segments of one thinking trace and returns steps: one or more adjacent segments,
the 0-2 meta-reasoning labels they carry together, a confidence (0-10) for each label, and where the labels came from.
`annotate` runs one over candidate rows and writes annotation records; `validate` checks a record from anywhere;
`steps_of` reads it back with the gaps filled, ready for em.observations and em.segment_weights.

`align` and `aggregate` are the paper's rules by which the labels of two annotators become one set (Section 3.1.2); who
asks the annotators, and what it costs, is llm/committee.py. The only annotator here, `CueAnnotator`, looks for fixed
phrases: right for the miniature, whose traces are built from them, and no substitute for a language model on real ones.

  cues      {"framing": ["The question asks"], "self_verification": ["Let me check", "Wait"]}
  segments  ["The question asks for a river.\n\n", "Wait, let me check that.\n\n", "The Nile."]
  steps     (0,) framing 10 | (1,) self_verification 10 | (2,) no label
"""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import em
from common.errors import InputError
from common.files import each_row, find, read_json
from common.rows import check_row

OPENING_CONFIDENCE = 10.0  # the cue is the first thing the segment says
INNER_CONFIDENCE = 8.0  # the cue comes later in the segment
LEAST_LABELLED, MOST_ONES = 0.5, 0.8  # shares of segments with a label, of weights that are 1
CONFIDENT = 7.0  # rule (ii): a label of one annotator counts if its confidence is above this

Votes = dict[str, float]  # label -> confidence, in the order given
Block = tuple[int, ...]  # adjacent segments that are decided together


@dataclass(frozen=True)
class Step:
    """Adjacent segments that were labelled together.

    segments: 0-based indices, ascending and without a gap. labels: 0-2 of em.LABELS. confidence: 0-10, one per label.
    source: who decided, for example "cue"; "none" for a segment that no annotated step covers.
    """

    segments: tuple[int, ...]
    labels: tuple[str, ...]
    confidence: tuple[float, ...]
    source: str

    def as_json(self) -> dict[str, Any]:
        """The step as it stands in an annotation record."""
        return {
            "segments": list(self.segments),
            "labels": list(self.labels),
            "confidence": list(self.confidence),
            "source": self.source,
        }

    def votes(self) -> dict[str, float]:
        """Label -> confidence."""
        return dict(zip(self.labels, self.confidence, strict=True))


class Annotator(Protocol):
    """Anything that labels traces. The result must depend on the arguments only, not on what was labelled before."""

    name: str

    def label(self, question: str, segments: list[str]) -> list[Step]:
        """Steps of one trace in order. Segments may be left uncovered: they count as steps without a label."""
        ...


# ---------- two labellings become one: the paper's rules


def align(a: list[Step], b: list[Step]) -> list[tuple[Block, Votes, Votes]]:
    """The blocks of a trace, each with a's and b's votes. a and b must cover the same segments, in order.

    A block is a largest run of segments that lies within one step of a and within one step of b.
    """
    owners = []
    for steps in (a, b):
        owners.append([step for step in steps for _ in step.segments])
    covered = [i for step in a for i in step.segments]
    assert covered == [i for step in b for i in step.segments], (a, b)
    blocks = []
    for _, run in itertools.groupby(range(len(covered)), key=lambda k: (owners[0][k].segments, owners[1][k].segments)):
        at = list(run)
        block = tuple(covered[k] for k in at)
        blocks.append((block, owners[0][at[0]].votes(), owners[1][at[0]].votes()))
    return blocks


def aggregate(a: Votes, b: Votes) -> tuple[Votes, str] | None:
    """Rules (i) and (ii) of 3.1.2: (label -> confidence, source), or None where rule (iii) asks the adjudicator.

    a: the annotator whose confidences count when both agree (the paper's GPT-4o). Source "agree" or "merge".
    PAPER: nothing on equal confidences.  HERE: the label that comes first in em.LABELS.  WHY: any order will do, as
    long as it is always the same.

    >>> aggregate({"framing": 6}, {"framing": 9})
    ({'framing': 6}, 'agree')
    >>> aggregate({"framing": 6, "analogy": 8}, {"framing": 9, "retrieval": 7})
    ({'framing': 9, 'analogy': 8}, 'merge')
    >>> aggregate({"framing": 6}, {"framing": 9, "retrieval": 7})
    """
    if a.keys() == b.keys():
        return dict(a), "agree"  # rule (i)
    higher = {label: max(a.get(label, -1), b.get(label, -1)) for label in em.LABELS if label in a or label in b}
    kept = [label for label in higher if label in a and label in b]  # rule (ii)
    single = sorted((label for label in higher if label not in kept), key=lambda label: -higher[label])
    kept += [label for label in single if higher[label] > CONFIDENT][: 2 - len(kept)]
    return ({label: higher[label] for label in kept}, "merge") if len(kept) == 2 else None


# ---------- cue phrases


def read_cues(path: str | Path) -> dict[str, list[str]]:
    """A cue table {label: [phrase, ...]} from JSON. Raises InputError on a wrong label, an empty or repeated phrase."""
    cues = read_json(find(path))
    if not isinstance(cues, dict) or not cues:
        raise InputError(f"{path}: must be a JSON object of label -> list of phrases; see mini/cues.json")
    owner: dict[str, str] = {}
    for label, phrases in cues.items():
        em.check_labels([label], str(path))
        good = isinstance(phrases, list) and all(isinstance(phrase, str) and phrase.strip() for phrase in phrases)
        if not good or not phrases:
            raise InputError(f"{path}: label {label!r} needs a list of non-empty phrases; fill or remove its entry")
        for phrase in phrases:
            key = " ".join(phrase.casefold().split())
            if key in owner:
                raise InputError(f"{path}: phrase {phrase!r} is under {owner[key]!r} and {label!r}; keep it once")
            owner[key] = label
    return cues


class CueAnnotator:
    """Labels a segment by the phrases in it; every segment is a step of its own. Source "cue", or "noise" (see below).

    cues: {label: [phrase, ...]} as `read_cues` returns it. A phrase matches whole words in any case, and any white
    space where it has a space. Matches are taken from the left; where several phrases start, the longest wins and its
    text is used up. The first two distinct labels are kept, each with confidence 10 if its cue opens the segment and 8
    if not. A segment without a cue gets no label.

    noise: share of the labelled segments, in [0, 1], whose labels are all replaced by other ones drawn uniformly. The
    draw is seeded by (seed, question, position, segment text), so it does not depend on the order of the rows, and what
    a small noise disturbs a larger one disturbs too, in the same way. Confidences stay: the annotator does not know.
    """

    name = "cue"

    def __init__(self, cues: dict[str, list[str]], noise: float = 0.0, seed: int = 0):
        if not 0 <= noise <= 1:
            raise InputError(f"annotator noise {noise} is not a share; give a number from 0 to 1")
        by_length = sorted(
            ((phrase.split(), label) for label, phrases in cues.items() for phrase in phrases),
            key=lambda entry: -len(" ".join(entry[0])),
        )
        alternatives = (r"(" + r"\s+".join(re.escape(word) for word in words) + r")" for words, _ in by_length)
        # One group per phrase, longest first: the group that matched tells the label.
        self._pattern = re.compile(r"(?<!\w)(?:" + "|".join(alternatives) + r")(?!\w)", re.IGNORECASE)
        self._labels = [label for _, label in by_length]
        self._noise, self._seed = noise, seed

    def label(self, question: str, segments: list[str]) -> list[Step]:
        """One step per segment, in order."""
        steps = []
        for i, segment in enumerate(segments):
            found = self._find(segment)
            labels, source = tuple(found), "cue"
            rng = random.Random(f"{self._seed}/{i}/{question}/{segment}")
            if labels and rng.random() < self._noise:
                others = [label for label in em.LABELS if label not in labels]
                labels, source = tuple(rng.sample(others, len(labels))), "noise"
            steps.append(Step((i,), labels, tuple(found.values()), source))
        return steps

    def _find(self, segment: str) -> dict[str, float]:
        """{label: confidence} of the first two distinct labels, in order of appearance."""
        opening = len(segment) - len(segment.lstrip())
        found: dict[str, float] = {}
        for match in self._pattern.finditer(segment):
            assert match.lastindex is not None  # every alternative is a group
            label = self._labels[match.lastindex - 1]
            found.setdefault(label, OPENING_CONFIDENCE if match.start() == opening else INNER_CONFIDENCE)
            if len(found) == 2:
                break
        return found


def annotate(
    rows: Iterable[dict[str, Any]], annotator: Annotator, progress: Callable[[int], None] | None = None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(annotation records, tally) for candidate rows; `progress` is called with the number of rows done so far.

    rows need "id", "question", "completion" and "spans" ([[c0, c1], ...]: a segment is completion[c0:c1]).
    tally: rows, segments, steps, steps with 0, 1 and 2 labels, steps by source. Raises InputError on a repeated id.
    An annotator that returns an invalid step is a programmer's mistake that ends in the same InputError as a bad file.
    """
    records: list[dict[str, Any]] = []
    seen: set[str] = set()
    n_segments = 0
    for row in rows:
        if row["id"] in seen:
            raise InputError(f"candidate {row['id']}: this id occurs twice; give every candidate its own id")
        seen.add(row["id"])
        segments = [row["completion"][c0:c1] for c0, c1 in row["spans"]]
        steps = annotator.label(row["question"], segments)
        record = {"id": row["id"], "steps": [step.as_json() for step in steps]}
        validate(record, len(segments), f"annotator {annotator.name}, candidate {row['id']}")
        records.append(record)
        n_segments += len(segments)
        if progress is not None:
            progress(len(records))
    return records, tally_of(records, n_segments)


def read_steps(path: str | Path, candidates: Iterable[dict[str, Any]]) -> dict[str, list[Step]]:
    """Candidate id -> the steps of its trace, every segment in exactly one, from an annotations.jsonl.

    candidates: rows with "id" and "spans". Raises InputError when one has no annotation or one that is not sound.
    """
    sizes = {c["id"]: len(c["spans"]) for c in candidates}
    found = {}
    for record in each_row(path, ("id", "steps"), check_row):
        if record["id"] in sizes:
            validate(record, sizes[record["id"]], f"{path}: {record['id']}")
            found[record["id"]] = steps_of(record, sizes[record["id"]])
    if lacking := [name for name in sizes if name not in found]:
        raise InputError(f"{path}: no annotation for candidate {lacking[0]!r}; run the annotate stage again")
    return {name: found[name] for name in sizes}


def check_coverage(steps: Iterable[Sequence[Step]], weights: Iterable[float]) -> dict[str, float]:
    """{"labelled": share of segments that carry a label, "weights of 1": share of step weights within 1e-6 of 1}.

    Raises InputError when fewer than half of the segments are labelled or more than 80 % of the weights are 1: what
    would be trained is KTO, whatever it is called.
    """
    of_segments = [bool(step.labels) for trace in steps for step in trace for _ in step.segments]
    flat = [abs(w - 1) < 1e-6 for w in weights]
    labelled, ones = sum(of_segments) / max(1, len(of_segments)), sum(flat) / max(1, len(flat))
    if labelled < LEAST_LABELLED or ones > MOST_ONES:
        raise InputError(
            f"{labelled:.1%} of {len(of_segments):,} segments carry a label and {ones:.1%} of {len(flat):,} weights "
            "are 1: training on them would be plain KTO; label with a language model (--annotator self or committee, "
            "docs/annotating.md)"
        )
    return {"labelled": round(labelled, 4), "weights of 1": round(ones, 4)}


def tally_of(records: list[dict[str, Any]], n_segments: int) -> dict[str, int]:
    """rows, segments, steps, steps with 0, 1 and 2 labels, steps by source."""
    steps = [step for record in records for step in record["steps"]]
    tally = {"rows": len(records), "segments": n_segments, "steps": len(steps)}
    for count, name in enumerate(("no label", "one label", "two labels")):
        tally[name] = sum(len(step["labels"]) == count for step in steps)
    return tally | Counter(f"source {step['source']}" for step in steps)


def validate(record: dict[str, Any], n_segments: int, where: str) -> None:
    """Raise InputError, starting with `where` (file:line or row id), unless `record` is a sound annotation of a trace.

    Sound: {"id": str, "steps": [...]}, each step with "segments" (adjacent ascending indices below n_segments, each
    used once and in order over the steps), "labels" (0-2 distinct of em.LABELS), "confidence" (one number in 0-10 per
    label) and "source" (text). Steps need not cover every segment. Nothing is repaired.
    """
    if not isinstance(record.get("id"), str) or not isinstance(record.get("steps"), list):
        raise InputError(f'{where}: a record needs "id" (text) and "steps" (list); annotate this row again')
    check_steps(record["steps"], n_segments, where)


def check_steps(steps: list[Any], n_segments: int, where: str) -> None:
    """`validate` for the steps of a record alone."""
    free = 0  # first segment that the next step may use
    for number, step in enumerate(steps):
        place = f"{where}: step {number}"
        if not isinstance(step, dict):
            raise InputError(f"{place}: must be an object, got {type(step).__name__}; annotate this row again")
        for field in ("segments", "labels", "confidence", "source"):
            kind = str if field == "source" else list
            if not isinstance(step.get(field), kind):
                raise InputError(f"{place}: field {field!r} must be a {kind.__name__}; annotate this row again")
        _check_segments(step["segments"], free, n_segments, place)
        _check_confidence(step["labels"], step["confidence"], place)
        free = step["segments"][-1] + 1


def _check_segments(segments: list[Any], free: int, n_segments: int, place: str) -> None:
    if not segments or any(type(index) is not int for index in segments):
        raise InputError(f"{place}: segments {segments} must be one or more whole numbers; annotate this row again")
    outside = [index for index in segments if not 0 <= index < n_segments]
    if outside:
        raise InputError(
            f"{place}: segment {outside[0]} does not exist, the trace has {n_segments} (counted from 0); "
            "annotate this row again, or use the candidates it was made from"
        )
    if segments != list(range(segments[0], segments[0] + len(segments))):
        raise InputError(f"{place}: segments {segments} are not adjacent and ascending; annotate this row again")
    if segments[0] < free:
        raise InputError(f"{place}: segment {segments[0]} is used twice or out of order; annotate this row again")


def _check_confidence(labels: list[Any], confidence: list[Any], place: str) -> None:
    em.check_labels(labels, place)
    if len(set(labels)) != len(labels):
        raise InputError(f"{place}: label {labels[0]!r} is given twice; keep it once")
    if len(confidence) != len(labels):
        raise InputError(
            f"{place}: {len(labels)} label(s) but {len(confidence)} confidence(s); give one for each label"
        )
    for value in confidence:
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= 10:
            raise InputError(f"{place}: confidence {value!r} is not a number from 0 to 10; annotate this row again")


def steps_of(record: dict[str, Any], n_segments: int) -> list[Step]:
    """All steps of a trace in order, every segment in exactly one: uncovered ones become steps without a label.

    record: a validated annotation record. [step.labels for step in ...] is what em.observations and em.segment_weights
    take; step.segments says which segments share the step's weight. The bare steps break the chain, as the paper's
    empty label set does; bridging them would invent a move nobody saw.
    """
    by_first = {step["segments"][0]: step for step in record["steps"]}
    steps: list[Step] = []
    i = 0
    while i < n_segments:
        if i in by_first:
            found = by_first[i]
            steps.append(
                Step(tuple(found["segments"]), tuple(found["labels"]), tuple(found["confidence"]), found["source"])
            )
        else:
            steps.append(Step((i,), (), (), "none"))
        i = steps[-1].segments[-1] + 1
    return steps
