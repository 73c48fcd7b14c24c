"""annotate.py: cue matching by hand-worked segments, the noise dial, and every way a record can be wrong."""

import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import annotate
import em
from annotate import CueAnnotator, Step
from common.errors import InputError

CUES = {
    "framing": ["The question asks", "okay"],
    "retrieval": ["I recall", "so I recall"],
    "self_verification": ["let me check", "Wait,"],
    "backtracking": ["wait, no"],
    "summarization": ["so"],
}


def cue(text):
    (step,) = CueAnnotator(CUES).label("q", [text])
    return dict(zip(step.labels, step.confidence, strict=True))


# ---------------------------------------------------------------------------------------------- cue annotator


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The question asks for a river.", {"framing": 10}),
        ("  \n the QUESTION\nasks for a river.", {"framing": 10}),  # case, leading and inner white space
        ("Hm, the question asks for a river.", {"framing": 8}),
        ("So the Nile.", {"summarization": 10}),
        ("Also the sofa, soon.", {}),  # "so" only as a whole word
        ("So I recall the Nile.", {"retrieval": 10}),  # longest phrase at the same place
        ("Wait, no, the Amazon.", {"backtracking": 10}),
        ("Wait, let me check.", {"self_verification": 10}),  # one label twice: the first place counts
        ("I recall it. So let me check.", {"retrieval": 10, "summarization": 8}),  # the first two labels only
        ("Hm. Let me check. Okay.", {"self_verification": 8, "framing": 8}),
        ("The Nile is a river.", {}),
        ("", {}),
    ],
)
def test_cues_by_hand(text, expected):
    assert cue(text) == expected
    assert list(cue(text)) == list(expected)  # in order of appearance


def test_each_segment_is_a_step():
    steps = CueAnnotator(CUES).label("q", ["Okay.\n\n", "The Nile.\n\n", "So."])
    assert steps == [
        Step((0,), ("framing",), (10.0,), "cue"),
        Step((1,), (), (), "cue"),
        Step((2,), ("summarization",), (10.0,), "cue"),
    ]


def test_phrases_are_text_not_patterns():
    annotator = CueAnnotator({"analogy": ["a.c (like)"], "framing": ["a+"]})
    assert annotator.label("q", ["abc like", "a.c (like) this", "aa"]) == [
        Step((0,), (), (), "cue"),
        Step((1,), ("analogy",), (10.0,), "cue"),
        Step((2,), (), (), "cue"),
    ]


def test_more_than_a_hundred_phrases():
    cues = {label: [f"cue {label} {i}" for i in range(20)] for label in em.LABELS}
    texts = [f"Cue {label} {i}." for label in em.LABELS for i in range(20)]
    steps = CueAnnotator(cues).label("q", texts)
    assert [step.labels for step in steps] == [(label,) for label in em.LABELS for _ in range(20)]


# ---------------------------------------------------------------------------------------------- noise

NOISY_SEGMENTS = ["Okay.", "I recall it. So let me check.", "The Nile.", "So."]


def noisy(noise, seed=0, n=1000):
    annotator = CueAnnotator(CUES, noise=noise, seed=seed)
    return [step for q in range(n) for step in annotator.label(f"question {q}", NOISY_SEGMENTS)]


def test_noise_disturbs_the_stated_share_and_only_labels():
    clean, disturbed = noisy(0.0), noisy(0.3)
    labelled = [(a, b) for a, b in zip(clean, disturbed, strict=True) if a.labels]
    changed = [(a, b) for a, b in labelled if a.labels != b.labels]
    assert len(changed) / len(labelled) == pytest.approx(0.3, abs=0.03)  # 3,000 draws, 3.6 standard deviations
    assert all(b.source == "noise" for _, b in changed)
    for a, b in zip(clean, disturbed, strict=True):
        assert (b.segments, b.confidence, len(b.labels)) == (a.segments, a.confidence, len(a.labels))
    for a, b in changed:
        assert not set(a.labels) & set(b.labels) and len(set(b.labels)) == len(b.labels)


def test_full_noise_draws_uniformly_from_the_other_labels():
    drawn = Counter(step.labels[0] for step in noisy(1.0) if step.segments == (0,))
    assert set(drawn) == set(em.LABELS) - {"framing"}
    assert max(abs(n - 1000 / 14) for n in drawn.values()) < 5 * math.sqrt(1000 / 14)


def test_noise_depends_on_content_and_seed_only():
    annotator = CueAnnotator(CUES, noise=0.5, seed=1)
    questions = [f"question {q}" for q in range(50)]
    forward = {q: annotator.label(q, NOISY_SEGMENTS) for q in questions}
    random.Random(0).shuffle(questions)
    again = CueAnnotator(CUES, noise=0.5, seed=1)
    assert {q: again.label(q, NOISY_SEGMENTS) for q in questions} == forward
    assert noisy(0.5, seed=1, n=50) != noisy(0.5, seed=2, n=50)


def test_more_noise_disturbs_more_of_the_same():
    clean, some, more = noisy(0.0), noisy(0.2), noisy(0.6)
    for a, b, c in zip(clean, some, more, strict=True):
        assert b == a or c == b


@pytest.mark.parametrize("noise", [-0.1, 1.5, math.nan])
def test_noise_must_be_a_share(noise):
    with pytest.raises(InputError, match="give a number from 0 to 1"):
        CueAnnotator(CUES, noise=noise)


# ---------------------------------------------------------------------------------------------- cue table


def test_cue_table_round_trip(tmp_path):
    path = tmp_path / "cues.json"
    path.write_text(json.dumps(CUES))
    assert annotate.read_cues(path) == CUES


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "must be a JSON object"),
        ({"framng": ["x"]}, "unknown label 'framng'; did you mean framing"),
        ({"framing": "okay"}, "'framing' needs a list of non-empty phrases"),
        ({"framing": []}, "'framing' needs a list of non-empty phrases"),
        ({"framing": ["okay", " "]}, "'framing' needs a list of non-empty phrases"),
        ({"framing": ["Okay  then"], "analogy": ["okay then"]}, "'okay then' is under 'framing' and 'analogy'"),
    ],
)
def test_bad_cue_tables_are_named(tmp_path, table, message):
    path = tmp_path / "cues.json"
    path.write_text(json.dumps(table))
    with pytest.raises(InputError, match=message) as error:
        annotate.read_cues(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- annotate


def candidate(row_id, segments):
    """Candidate row whose completion has <think> before and an answer after the segments."""
    text, spans = "<think>\n", []
    for segment in segments:
        spans.append([len(text), len(text) + len(segment)])
        text += segment
    return {"id": row_id, "question": "Which river?", "completion": text + "</think>\n\nNile", "spans": spans}


def test_annotate_by_hand():
    rows = [candidate("a", ["Okay.\n\n", "The Nile.\n\n", "I recall it. So."]), candidate("b", ["So."])]
    done = []
    records, tally = annotate.annotate(rows, CueAnnotator(CUES), done.append)
    assert records == [
        {
            "id": "a",
            "steps": [
                {"segments": [0], "labels": ["framing"], "confidence": [10.0], "source": "cue"},
                {"segments": [1], "labels": [], "confidence": [], "source": "cue"},
                {"segments": [2], "labels": ["retrieval", "summarization"], "confidence": [10.0, 8.0], "source": "cue"},
            ],
        },
        {"id": "b", "steps": [{"segments": [0], "labels": ["summarization"], "confidence": [10.0], "source": "cue"}]},
    ]
    assert tally == {
        "rows": 2, "segments": 4, "steps": 4, "no label": 1, "one label": 2, "two labels": 1, "source cue": 4
    }  # fmt: skip
    assert done == [1, 2]
    assert json.loads(json.dumps(records)) == records


def test_annotate_checks_ids_and_annotators():
    row = candidate("a", ["Okay."])
    with pytest.raises(InputError, match="candidate a: this id occurs twice"):
        annotate.annotate([row, row], CueAnnotator(CUES))

    class Wrong:
        name = "wrong"

        def label(self, question, segments):
            return [Step((1,), ("framing",), (5.0,), "wrong")]

    with pytest.raises(InputError, match="annotator wrong, candidate a: step 0: segment 1 does not exist"):
        annotate.annotate([row], Wrong())


# ---------------------------------------------------------------------------------------------- validate


def step(segments, labels=(), confidence=(), source="agree"):
    return {"segments": list(segments), "labels": list(labels), "confidence": list(confidence), "source": source}


def test_sound_records_pass():
    two = step([1, 2], ["framing", "analogy"], [0, 10.0])
    for steps in ([], [step([0])], [step([0], ["framing"], [7]), two, step([4])]):
        assert annotate.validate({"id": "a", "steps": steps}, 5, "here") is None  # BAD_STEPS below are refused


BAD_STEPS = [
    ("text", "must be an object"),
    ({"segments": [0], "labels": [], "confidence": []}, "field 'source' must be a str"),
    ({**step([0]), "labels": "framing"}, "field 'labels' must be a list"),
    (step([]), "must be one or more whole numbers"),
    (step([True]), "must be one or more whole numbers"),
    (step([0.0]), "must be one or more whole numbers"),
    (step(["0"]), "must be one or more whole numbers"),
    (step([5]), r"segment 5 does not exist, the trace has 5 \(counted from 0\)"),
    (step([-1]), "segment -1 does not exist"),
    (step([4, 5]), "segment 5 does not exist"),
    (step([2, 1]), "not adjacent and ascending"),
    (step([1, 3]), "not adjacent and ascending"),
    (step([1, 1]), "not adjacent and ascending"),
    (step([0], ["framng"], [5]), "unknown label 'framng'; did you mean framing"),
    (step([0], [["framing"]], [5]), "unknown label"),
    (step([0], [None], [5]), "unknown label None"),
    (step([0], ["framing", "analogy", "synthesis"], [5, 5, 5]), "3 labels .*; keep at most two"),
    (step([0], ["framing", "framing"], [5, 5]), "label 'framing' is given twice"),
    (step([0], ["framing"], []), r"1 label\(s\) but 0 confidence\(s\)"),
    (step([0], [], [5]), r"0 label\(s\) but 1 confidence\(s\)"),
    (step([0], ["framing"], [10.5]), "confidence 10.5 is not a number from 0 to 10"),
    (step([0], ["framing"], [-1]), "confidence -1 is not"),
    (step([0], ["framing"], [math.nan]), "confidence nan is not"),
    (step([0], ["framing"], ["9/10"]), "confidence '9/10' is not"),
    (step([0], ["framing"], [True]), "confidence True is not"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_STEPS)
def test_bad_steps_are_named(bad, message):
    with pytest.raises(InputError, match=message) as error:
        annotate.validate({"id": "a", "steps": [bad]}, 5, "labels.jsonl:7 (id a)")
    assert str(error.value).startswith("labels.jsonl:7 (id a): step 0: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("second", [[1], [0], [1, 2]])
def test_overlap_and_order_between_steps(second):
    with pytest.raises(InputError, match=f"here: step 1: segment {second[0]} is used twice or out of order"):
        annotate.validate({"id": "a", "steps": [step([1]), step(second)]}, 5, "here")


@pytest.mark.parametrize("record", [{}, {"id": "a"}, {"id": 3, "steps": []}, {"id": "a", "steps": {}}])
def test_bad_records_are_named(record):
    with pytest.raises(InputError, match='^here: a record needs "id"'):
        annotate.validate(record, 5, "here")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.floats(-2, 12) | st.sampled_from([*em.LABELS, "", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
wild_steps = st.fixed_dictionaries(
    {
        "segments": json_values | st.lists(st.integers(-1, 6), max_size=3),
        "labels": json_values | st.lists(st.sampled_from(em.LABELS), max_size=3),
        "confidence": json_values | st.lists(st.floats(-1, 11), max_size=3),
        "source": st.just("x") | json_values,
    }
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(json_values | wild_steps, max_size=3))
def test_only_input_errors_escape_and_accepted_records_are_usable(steps):
    record = {"id": "a", "steps": steps}
    try:
        annotate.validate(record, 5, "here")
    except InputError:
        return
    filled = annotate.steps_of(record, 5)
    assert [i for s in filled for i in s.segments] == [0, 1, 2, 3, 4]
    assert len(em.observations([s.labels for s in filled])) <= len(filled) + 1


# ---------------------------------------------------------------------------------------------- steps_of


def test_gaps_become_bare_steps_that_break_the_chain():
    record = {"id": "a", "steps": [step([1, 2], ["framing"], [9]), step([4], ["analogy", "framing"], [8, 7], "merge")]}
    steps = annotate.steps_of(record, 6)
    assert steps == [
        Step((0,), (), (), "none"),
        Step((1, 2), ("framing",), (9,), "agree"),
        Step((3,), (), (), "none"),
        Step((4,), ("analogy", "framing"), (8, 7), "merge"),
        Step((5,), (), (), "none"),
    ]
    assert em.observations([s.labels for s in steps]) == []
    assert annotate.steps_of({"id": "a", "steps": []}, 2) == [Step((0,), (), (), "none"), Step((1,), (), (), "none")]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=5), st.integers(0, 2))
def test_every_segment_is_in_exactly_one_step(layout, tail):
    """layout: (uncovered segments before, length) of each step."""
    steps, i = [], 0
    for gap, length in layout:
        steps.append(step(range(i + gap, i + gap + length), ["framing"], [5]))
        i += gap + length
    record, n = {"id": "a", "steps": steps}, i + tail
    annotate.validate(record, n, "here")
    filled = annotate.steps_of(record, n)
    assert [k for s in filled for k in s.segments] == list(range(n))
    assert [list(s.segments) for s in filled if s.labels] == [s["segments"] for s in steps]
    assert sum(1 for s in filled if not s.labels) == tail + sum(gap for gap, _ in layout)


def test_labels_that_would_make_it_kto_are_refused():
    def trace(labelled: int, bare: int) -> list[Step]:
        steps = [Step((k,), ("framing",), (9.0,), "x") for k in range(labelled)]
        return [*steps, *(Step((labelled + k,), (), (), "none") for k in range(bare))]

    assert annotate.check_coverage([trace(5, 5)], [1.0] * 8 + [1.1, 0.9]) == {"labelled": 0.5, "weights of 1": 0.8}
    with pytest.raises(InputError, match=r"40.0% of 10 segments carry a label and 0.0% of 1 weights.*plain KTO"):
        annotate.check_coverage([trace(4, 6)], [1.2])
    with pytest.raises(InputError, match=r"100.0% of 2 segments carry a label and 90.0% of 10 weights"):
        annotate.check_coverage([trace(2, 0)], [1.0] * 9 + [1.1])
    merged = [Step((0, 1, 2), ("framing",), (9.0,), "x"), Step((3,), (), (), "none")]  # three of four segments
    assert annotate.check_coverage([merged], [1.5])["labelled"] == 0.75
