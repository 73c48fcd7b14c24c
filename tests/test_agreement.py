"""agreement.py: rates by hand, kappa against scikit-learn, entailment against a slow version, confusion by hand."""

import math
import random
from collections import Counter

import numpy as np
import pytest

import em
from annotate import Step
from llm import agreement
from llm.agreement import compare, confusion, entails, histogram, mean_l1, rates, report, segment_sets


def step(segments, labels, confidence=None, source="x"):
    return Step(tuple(segments), tuple(labels), tuple(confidence or [5.0] * len(labels)), source)


F, R, A, S, C = "framing", "retrieval", "analogy", "synthesis", "chaining"
# one trace of six segments; b cuts it differently
HAND_A = [step([0], [F]), step([1, 2], [R]), step([3], [R, S]), step([4], []), step([5], [A])]
HAND_B = [step([0], [F]), step([1], [R]), step([2], [S]), step([3], [S]), step([4], []), step([5], [C, A])]


def test_by_hand():
    got = compare([HAND_A], [HAND_B], resamples=10)
    assert got["segments"] == 6
    assert got["strict"]["value"] == pytest.approx(3 / 6, abs=1e-6)  # segments 0, 1, 4
    assert got["entailment"]["value"] == pytest.approx(5 / 6, abs=1e-6)  # and 3 and 5; 2 is R against S
    # chance, strict: sets of a F, R, R, RS, -, A; of b F, R, S, S, -, AC: F 1*1, R 2*1, S 0*2, - 1*1 of 36
    assert got["kappa_strict"]["value"] == pytest.approx((3 / 6 - 4 / 36) / (1 - 4 / 36), abs=1e-6)
    # entailing pairs besides those four: RS with R (1) and S (2), A with AC (1)
    assert got["kappa_entailment"]["value"] == pytest.approx((5 / 6 - 8 / 36) / (1 - 8 / 36), abs=1e-6)
    assert got["kappa_entailment_strict_chance"]["value"] == pytest.approx((5 / 6 - 4 / 36) / (1 - 4 / 36), abs=1e-6)
    # macro: segment 2 is knowledge twice, 3 too (R and S are both knowledge), 5 is K against {problem, K}
    assert got["macro"]["strict"]["value"] == pytest.approx(5 / 6, abs=1e-6)
    assert got["macro"]["entailment"]["value"] == 1.0


def test_the_empty_set_entails_only_itself():
    assert entails((), ()) and not entails((), (F,)) and not entails((F,), ())
    assert entails((F,), (F, R)) and entails((F, R), (R,)) and not entails((F, R), (F, S)) and entails((F,), (F,))


def draw(rng, n_traces):
    """Two annotations that agree now and then, and merge differently."""
    both = []
    for _ in range(2):
        both.append([])
    for _ in range(n_traces):
        n = rng.randrange(1, 9)
        truth = [rng.choice(em.LABELS[:6]) for _ in range(n)]
        for annotation in both:
            steps, i = [], 0
            while i < n:
                width = min(rng.choice([1, 1, 2]), n - i)
                labels = {truth[i]} if rng.random() < 0.7 else set(rng.sample(em.LABELS, rng.choice([0, 1, 2, 2])))
                steps.append(step(range(i, i + width), sorted(labels)))
                i += width
            annotation.append(steps)
    return both


def test_kappa_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    a, b = draw(random.Random(1), 300)
    got = compare(a, b, resamples=2)
    for macro, of in ((False, got), (True, got["macro"])):
        flat = [[s for steps in x for s in segment_sets(steps)] for x in (a, b)]
        names = [[str(agreement.macro(s) if macro else s) for s in sets] for sets in flat]
        assert of["kappa_strict"]["value"] == pytest.approx(metrics.cohen_kappa_score(*names), abs=1e-6)


def test_entailment_is_the_slow_version():
    a, b = draw(random.Random(2), 80)
    sets = [[set(s) for steps in x for s in segment_sets(steps)] for x in (a, b)]

    def inside(s, t):
        return s == t or bool(s and t and (s < t or t < s))

    n = len(sets[0])
    observed = sum(inside(s, t) for s, t in zip(*sets, strict=True)) / n
    chance = sum(inside(s, t) for s in sets[0] for t in sets[1]) / n**2
    got = compare(a, b, resamples=2)
    assert got["entailment"]["value"] == pytest.approx(observed, abs=1e-6)
    assert got["kappa_entailment"]["value"] == pytest.approx((observed - chance) / (1 - chance), abs=1e-6)


def test_kappa_is_not_defined_where_only_one_set_occurs():
    got = compare([[step([0], [F])]], [[step([0], [F])]], resamples=5)
    assert got["strict"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert got["kappa_strict"] == {"value": None, "low": None, "high": None}


def test_intervals_cover_what_they_should():
    """200 corpora whose true strict rate is known: the 95 % interval holds it in nearly 95 % of them."""
    rng, held = random.Random(3), 0
    for seed in range(200):
        a, b = [], []
        for _ in range(60):
            same = [rng.random() < 0.6 for _ in range(3)]
            a.append([step([i], [F if i % 2 else R]) for i in range(3)])
            b.append([step([i], [(F if i % 2 else R) if same[i] else A]) for i in range(3)])
        pairs = [list(zip(segment_sets(x), segment_sets(y), strict=True)) for x, y in zip(a, b, strict=True)]
        weight = agreement._resampled(60, 200, seed)
        number = agreement._with_interval(rates(*agreement._totals(pairs, weight))["strict"])
        held += number["low"] <= 0.6 <= number["high"]
    assert 0.88 <= held / 200 <= 0.99


def test_mean_l1_by_hand_and_of_the_fitted_matrices():
    cells = len(em.STATES) ** 2
    x, y = np.zeros((2, len(em.STATES), len(em.STATES)))
    x[0, 1], y[0, 2] = 1.0, 1.0
    assert mean_l1(x, y) == pytest.approx(2 / cells)
    a, b = draw(random.Random(4), 40)
    fits = [em.fit([o for steps in x for o in em.observations([s.labels for s in steps])]).P for x in (a, b)]
    got = compare(a, b, resamples=30)["mean_l1"]
    assert got["value"] == pytest.approx(np.abs(fits[0] - fits[1]).sum() / cells, abs=1e-6)
    assert got["low"] < got["value"] < got["high"]
    assert compare(a, a, resamples=3)["mean_l1"]["value"] == 0


def test_confusion_by_hand():
    pairs = {((F,), (F,)): 3, ((F,), (R,)): 2, ((F,), ()): 4, ((), ()): 9, ((), (S,)): 1}
    pairs |= {((A, F), (F, R)): 1}  # F on the diagonal, A against R
    pairs |= {((A, F), (R,)): 1}  # both against R
    pairs |= {((A, F), (R, S)): 2}  # four cells, half of each of the two
    assert confusion(Counter(pairs)) == {
        "(none)": {S: 1},
        A: {R: 1 + 1 + 1, S: 1},
        F: {F: 3 + 1, R: 2 + 1 + 1, "(none)": 4, S: 1},
    }


def test_histogram_by_hand():
    steps = [[step([0], [F, R], [0, 0.99]), step([1], [A], [10])], [step([0], [S], [9])]]
    assert histogram(steps) == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_report_counts_who_decided():
    final = [[step([0], [F], source="agree"), step([1], [R], source="judge")], [step([0], [], source="rejected")]]
    a = [[step([0, 1], [F])], [step([0], [F])]]
    b = [[step([0], [F]), step([1], [S])], [step([0], [R])]]
    got = report({"a": a, "b": b, "final": final}, resamples=3)
    assert got["sources"] == {"agree": 1, "judge": 1, "rejected": 1} and (got["traces"], got["steps"]) == (2, 3)
    assert got["escalated_steps"] == pytest.approx(2 / 3, abs=1e-6) and got["escalated_traces"] == 1.0
    assert list(got["pairs"]) == ["a vs b", "a vs final", "b vs final"]
    lines = agreement.table(got).splitlines()
    assert "to the adjudicator: 66.7% of the steps, 100.0% of the traces" == lines[-1]
    strict = next(line for line in lines if line.startswith("| strict"))
    assert strict.split("|")[2].split()[0] == "0.333" and not math.isnan(got["pairs"]["a vs b"]["strict"]["low"])
