"""em.py against hand-worked numbers, an independent line-by-line Algorithm 2, and its stated properties."""

import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import em
from common.errors import InputError

TINY = ("<start>", "a", "b", "<stop>")
FIVE = ("<start>", "F", "R", "E", "<stop>")
K = len(em.STATES)
cases = settings(max_examples=100, derandomize=True, deadline=None)


# ---------------------------------------------------------------------------------------------- independent oracle


def oracle(obs, K, max_iter=5, tol=1e-6, dp=0.6, prior=0.1):
    """Algorithm 2 line by line: dicts of pairs, plain loops, nothing grouped. Returns (P, alpha_post, C)."""
    allowed = {(a, b) for a in range(K - 1) for b in range(1, K)} | {(K - 1, K - 1)}
    width = {a: sum(1 for c, _ in allowed if c == a) for a in range(K)}
    P = {(a, b): 1.0 / width[a] if (a, b) in allowed else 0.0 for a in range(K) for b in range(K)}
    last, C = dict(P), dict.fromkeys(P, 0.0)
    for _ in range(max_iter):
        C = dict.fromkeys(P, 0.0)
        for source, target in obs:
            pairs = [(a, b) for a in source for b in target if (a, b) in allowed]
            if not pairs:
                continue
            weight = {ab: P[ab] / len(source) for ab in pairs}
            total = sum(weight.values())
            for ab in pairs:
                C[ab] += weight[ab] / total if total > 0 else 1 / len(pairs)
        new = dict.fromkeys(P, 0.0)
        for a, b in allowed:
            new[a, b] = (C[a, b] + prior) / sum(C[a, c] + prior for c in range(K) if (a, c) in allowed)
        P = {ab: (1 - dp) * P[ab] + dp * new[ab] for ab in P}
        if max(abs(P[ab] - last[ab]) for ab in P) < tol:
            break
        last = dict(P)
    alpha = {ab: C[ab] + (prior if ab in allowed else 0.0) for ab in P}
    return tuple(np.array([[M[a, b] for b in range(K)] for a in range(K)]) for M in (P, alpha, C))


def oracle_objective(P, obs, prior=0.1):
    """Eq. 8 + prior * sum of log P over the allowed cells, one observation after the other."""
    K = len(P)
    total = prior * sum(math.log(P[a][b]) for a in range(K - 1) for b in range(1, K)) + prior * math.log(P[-1][-1])
    for source, target in obs:
        total += math.log(sum(P[a][b] / len(source) / len(target) for a in source for b in target))
    return total


def label_sets(labels):
    return st.lists(st.sampled_from(labels), min_size=0, max_size=2, unique=True)


@st.composite
def corpora(draw):
    """(states, traces): 1 or 2 labels (K = 3 or 4), up to 4 traces of up to 5 steps, unlabelled steps included."""
    states = draw(st.sampled_from([("<start>", "a", "<stop>"), TINY]))
    traces = draw(st.lists(st.lists(label_sets(states[1:-1]), max_size=5), max_size=4))
    return states, traces


def moves(traces, states=em.STATES):
    return [move for steps in traces for move in em.observations(steps, states)]


# ---------------------------------------------------------------------------------------------- vocabulary


def test_the_papers_labels_are_in_the_vocabulary():
    """Table 7's fifteen in its four macro strategies; whoever adds a label or a strategy keeps them."""
    table_7 = [
        "framing backtracking self_verification evaluation",
        "decomposition chaining",
        "causal_reasoning retrieval analogy synthesis comparison categorization case_analysis",
        "explanation summarization",
    ]
    for macro, labels in zip(list(em.TAXONOMY.values())[:4], table_7, strict=True):
        assert set(labels.split()) <= macro.keys()
    assert em.STATES == ("<start>", *em.LABELS, "<stop>") and len(set(em.STATES)) == len(em.STATES)
    assert all(meaning for labels in em.TAXONOMY.values() for meaning in labels.values())


# ---------------------------------------------------------------------------------------------- observations


def test_observations_by_hand():
    framing, evaluation, retrieval = (em.STATES.index(name) for name in ("framing", "evaluation", "retrieval"))
    steps = [["framing"], ("retrieval", "evaluation"), {"retrieval"}]
    assert em.observations(steps) == [
        ((0,), (framing,)),
        ((framing,), (evaluation, retrieval)),
        ((evaluation, retrieval), (retrieval,)),
        ((retrieval,), (len(em.STATES) - 1,)),
    ]


def test_a_step_without_label_breaks_the_chain():
    assert em.observations([["a"], [], ["b"]], TINY) == [((0,), (1,)), ((2,), (3,))]  # neither a -> b nor a -> stop
    assert em.observations([[], ["b"], []], TINY) == []
    assert em.incoming([["a"], [], ["b"], ["a"]], TINY) == [((0,), (1,)), None, None, ((2,), (1,))]
    assert em.observations([], TINY) == [] and em.incoming([], TINY) == []


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (["framng"], r"^step 1: unknown label 'framng'; did you mean framing\?$"),
        (["zzz"], r"^step 1: unknown label 'zzz'; use one of framing, .*, [a-z_]+$"),
        (["<start>"], r"^step 1: unknown label '<start>'"),
        (["<stop>", "framing"], r"^step 1: unknown label '<stop>'"),
        (["framing", "analogy", "synthesis"], r"^step 1: 3 labels \(analogy, framing, synthesis\); keep at most two$"),
    ],
)
def test_bad_labels_are_named(step, message):
    for function in (em.observations, em.incoming):
        with pytest.raises(InputError, match=message) as error:
            function([["framing"], step])
        assert "\n" not in str(error.value)


def test_check_labels_for_other_callers():
    em.check_labels(["framing", "analogy"], "here")
    em.check_labels([], "here")
    with pytest.raises(InputError, match="^here: 3 labels"):
        em.check_labels(["framing", "analogy", "synthesis"], "here")


# ---------------------------------------------------------------------------------------------- EM


def test_two_iterations_by_hand():
    """The example of em.py's docstring in exact fractions."""
    obs = em.observations([["a"], ["a", "b"]], TINY)
    F, d = Fraction, Fraction(6, 10)
    one = em.fit(obs, max_iter=1, states=TINY)
    assert one.C.tolist() == [[0, 1, 0, 0], [0, 0.5, 0.5, 0.5], [0, 0, 0, 0.5], [0, 0, 0, 0]]
    uniform = F(1, 3)
    P1 = [
        [0, (1 - d) * uniform + d * F(11, 13), (1 - d) * uniform + d * F(1, 13), (1 - d) * uniform + d * F(1, 13)],
        [0, uniform, uniform, uniform],
        [0, (1 - d) * uniform + d * F(1, 8), (1 - d) * uniform + d * F(1, 8), (1 - d) * uniform + d * F(6, 8)],
        [0, 0, 0, 1],
    ]
    np.testing.assert_allclose(one.P, np.array(P1, dtype=float), rtol=0, atol=1e-15)
    assert em.pair_prob(one.P, (1, 2), (3,)) == pytest.approx(float((uniform + F(7, 12)) / 2), abs=1e-15)  # Eq. 7

    two = em.fit(obs, max_iter=2, states=TINY)
    assert two.C[1, 3] == pytest.approx(4 / 11, abs=1e-15) and two.C[2, 3] == pytest.approx(7 / 11, abs=1e-15)
    row_a = [F(1, 2) + F(1, 10), F(1, 2) + F(1, 10), F(4, 11) + F(1, 10)]
    for b in (1, 2, 3):
        expected = (1 - d) * uniform + d * row_a[b - 1] / sum(row_a)
        assert two.P[1, b] == pytest.approx(float(expected), abs=1e-15)
    np.testing.assert_allclose(two.alpha_post, two.C + 0.1 * em.mask(4), rtol=0, atol=1e-15)


# The worked trace's corpus, 21 moves: chosen F->R->{R,E}, F->R->E, {F,R}->R->E; rejected F->E->F->E, F->{E,F}->E.
POSITIVE = [[["F"], ["R"], ["R", "E"]], [["F"], ["R"], ["E"]], [["F", "R"], ["R"], ["E"]]]
NEGATIVE = [[["F"], ["E"], ["F"], ["E"]], [["F"], ["E", "F"], ["E"]]]


def test_worked_trace():
    """Numbers of the README's trace, computed once by a plain-Python script with five states."""
    P_pos, P_neg, P = (em.fit(moves(t, FIVE), states=FIVE).P for t in (POSITIVE, NEGATIVE, POSITIVE + NEGATIVE))
    steps = [["F"], ["R"], ["R", "E"]]
    into = em.incoming(steps, FIVE)
    assert [em.pair_prob(P_pos, *move) for move in into] == pytest.approx([0.8713, 0.9004, 0.4580], abs=5e-5)
    assert [em.pair_prob(P, *move) for move in into] == pytest.approx([0.9241, 0.3955, 0.4578], abs=5e-5)
    assert em.segment_weights(steps, P_pos, P, states=FIVE) == pytest.approx([0.9429, 2.2770, 1.0005], abs=5e-5)
    assert P_neg[0, 1] == pytest.approx(0.869, abs=5e-4)


def test_worked_trace_likelihood():
    """Eq. 8 goes from -29.11 nats to -13.12 as the fifth E-step sees it, and to -12.82 with the final P."""
    obs = moves(POSITIVE + NEGATIVE, FIVE)
    fitted = em.fit(obs, states=FIVE)
    assert len(obs) == 21 and len(fitted.objective) == 6
    matrices = [em.fit(obs, max_iter=n, states=FIVE).P for n in (0, 4, 5)]
    prior_terms = [0.1 * np.log(P[em.mask(5) > 0]).sum() for P in matrices]
    likelihoods = [fitted.objective[n] - term for n, term in zip((0, 4, 5), prior_terms, strict=True)]
    assert likelihoods == pytest.approx([-29.11, -13.12, -12.82], abs=5e-3)
    assert fitted.objective[5] == pytest.approx(oracle_objective(matrices[2], obs), abs=1e-12)


@cases
@given(corpora(), st.floats(0.05, 1.0), st.floats(0.01, 2.0), st.integers(1, 8))
def test_equals_the_oracle(corpus, damping, prior, max_iter):
    states, traces = corpus
    obs = moves(traces, states)
    fitted = em.fit(obs, max_iter=max_iter, damping=damping, prior=prior, states=states)
    P, alpha, C = oracle(obs, len(states), max_iter=max_iter, dp=damping, prior=prior)
    np.testing.assert_allclose(fitted.P, P, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fitted.C, C, rtol=0, atol=1e-10)
    np.testing.assert_allclose(fitted.alpha_post, alpha, rtol=0, atol=1e-10)
    assert fitted.objective[-1] == pytest.approx(oracle_objective(P, obs, prior), abs=1e-9)


def random_traces(seed, n, labels=em.LABELS):
    rng = random.Random(seed)
    return [[rng.sample(labels, rng.choice((0, 1, 2, 2, 2))) for _ in range(rng.randint(1, 9))] for _ in range(n)]


def test_equals_the_oracle_with_all_states_and_defaults():
    obs = moves(random_traces(0, 60))
    P, alpha, C = oracle(obs, len(em.STATES))
    fitted = em.fit(obs)
    np.testing.assert_allclose(fitted.P, P, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fitted.C, C, rtol=0, atol=1e-10)
    assert fitted.C.sum() == pytest.approx(len(obs), abs=1e-9)  # every observation is one edge


def test_forbidden_edges_take_no_count():
    """Moves that `observations` never makes: into <start> or out of <stop>. Algorithm 2 skips them (lines 3, 8-9)."""
    obs = [((3,), (1,)), ((1,), (0,)), ((1,), (0, 2))]
    P, alpha, C = oracle(obs, 4)
    fitted = em.fit(obs, states=TINY)
    np.testing.assert_allclose(fitted.P, P, rtol=0, atol=1e-14)
    assert fitted.C.sum() == 1.0 and fitted.C[1, 2] == 1.0  # of the three, only a -> b has an allowed edge


@cases
@given(corpora(), st.floats(0.05, 1.0))
def test_matrix_properties(corpus, damping):
    states, traces = corpus
    fitted = em.fit(moves(traces, states), damping=damping, states=states)
    assert fitted.P.dtype == fitted.C.dtype == np.float64
    np.testing.assert_allclose(fitted.P.sum(1), 1, rtol=0, atol=1e-12)
    forbidden = np.ones(fitted.P.shape, dtype=bool)
    forbidden[:-1, 1:] = False
    forbidden[-1, -1] = False
    assert (fitted.P[forbidden] == 0).all() and (fitted.C[forbidden] == 0).all()
    assert (fitted.P[~forbidden] > 0).all()
    assert fitted.P[-1, -1] == pytest.approx(1, abs=1e-15)  # <stop> absorbs
    assert (np.diff(fitted.objective) >= -1e-9).all()  # never falls


@cases
@given(corpora(), st.integers(0, 2**32), st.integers(1, 4))
def test_order_and_repetition(corpus, seed, copies):
    """Order of observations and of labels: not one bit. A corpus given n times = a Counter with n-fold counts."""
    states, traces = corpus
    rng = random.Random(seed)
    obs = moves(traces, states)
    shuffled = moves([[rng.sample(step, len(step)) for step in steps] for steps in traces], states)
    rng.shuffle(shuffled)
    expected = em.fit(obs, states=states)
    assert (em.fit(shuffled, states=states).P == expected.P).all()
    assert (em.fit(Counter(obs), states=states).P == expected.P).all()
    many = em.fit(Counter({move: copies * n for move, n in Counter(obs).items()}), states=states)
    assert (em.fit(obs * copies, states=states).P == many.P).all()


@cases
@given(st.lists(st.lists(st.sampled_from(["a", "b"]).map(lambda label: [label]), min_size=1, max_size=6), max_size=5))
def test_singletons_undamped_give_smoothed_counts(traces):
    counts = np.zeros((4, 4))
    for steps in traces:
        path = ["<start>", *(step[0] for step in steps), "<stop>"]
        for i in range(len(path) - 1):
            counts[TINY.index(path[i]), TINY.index(path[i + 1])] += 1
    fitted = em.fit(moves(traces, TINY), damping=1.0, states=TINY)
    np.testing.assert_allclose(fitted.C, counts, rtol=0, atol=1e-12)
    for a in range(3):
        np.testing.assert_allclose(fitted.P[a, 1:], (counts[a, 1:] + 0.1) / (counts[a].sum() + 0.3), rtol=0, atol=1e-14)


def test_empty_corpus_is_uniform():
    fitted = em.fit([])
    np.testing.assert_allclose(fitted.P[:-1, 1:], 1 / (len(em.STATES) - 1), rtol=0, atol=1e-15)
    assert (fitted.P[:, 0] == 0).all() and fitted.P[-1, -1] == 1 and (fitted.C == 0).all()
    assert len(fitted.objective) == 2  # nothing moves, so the first iteration is already below tol


def test_long_run_ends_at_the_maximum():
    """Run to convergence: no other row-stochastic matrix has a higher objective (it is concave, so one maximum)."""
    obs = moves(POSITIVE + NEGATIVE, FIVE)
    best = em.fit(obs, max_iter=5000, damping=1.0, tol=1e-14, states=FIVE).P
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(25):
            other = np.zeros((5, 5))
            other[:4, 1:] = rng.dirichlet(np.ones(4), size=4)
            other[4, 4] = 1
            mixed = (1 - scale) * best + scale * other
            assert oracle_objective(mixed, obs) < oracle_objective(best, obs)


def test_stops_at_tol_and_default_runs_all_five():
    obs = moves(random_traces(1, 40))
    assert len(em.fit(obs).objective) == 6
    loose = em.fit(obs, tol=0.5)
    assert len(loose.objective) == 2 and (loose.P == em.fit(obs, max_iter=1).P).all()


@pytest.mark.parametrize("bad", [{"prior": 0.0}, {"damping": 0.0}, {"damping": 1.5}])
def test_settings_that_have_no_meaning(bad):
    """prior 0 would leave rows without counts at 0/0, damping 0 would never move."""
    with pytest.raises(AssertionError):
        em.fit([], **bad)


# ---------------------------------------------------------------------------------------------- ablations


def test_frequency_splits_evenly():
    obs = [((0,), (1, 2)), ((1, 2), (1, 2)), ((1,), (3,)), ((1,), (3,))]
    fitted = em.frequency(obs, states=TINY)
    assert fitted.C.tolist() == [[0, 0.5, 0.5, 0], [0, 0.25, 0.25, 2], [0, 0.25, 0.25, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(fitted.P[1, 1:], [0.35 / 2.8, 0.35 / 2.8, 2.1 / 2.8], rtol=0, atol=1e-15)
    np.testing.assert_allclose(fitted.P[2, 1:], [0.35 / 0.8, 0.35 / 0.8, 0.1 / 0.8], rtol=0, atol=1e-15)


def test_one_label_keeps_the_most_confident():
    steps = [["retrieval", "framing"], ["analogy"], [], ["summarization", "framing"]]
    assert em.one_label(steps, [[7, 9], [2], [], [8, 8]]) == [("framing",), ("analogy",), (), ("framing",)]
    with pytest.raises(ValueError):
        em.one_label([["framing"]], [[1, 2]])


# ---------------------------------------------------------------------------------------------- weights


def random_matrix(seed, n_states=K):
    P = np.zeros((n_states, n_states))
    P[:-1, 1:] = np.random.default_rng(seed).dirichlet(np.full(n_states - 1, 0.3), size=n_states - 1) + 1e-9
    P[-1, -1] = 1
    return P / P.sum(1, keepdims=True)


@cases
@given(st.lists(label_sets(em.LABELS), max_size=8), st.integers(0, 1000))
def test_weight_properties(steps, seed):
    P_class, P_all = random_matrix(seed), random_matrix(seed + 1)
    weights = em.segment_weights(steps, P_class, P_all)
    assert len(weights) == len(steps)
    assert all(1 / math.e <= w <= math.e for w in weights)
    assert weights == em.segment_weights([step[::-1] for step in steps], P_class, P_all)  # label order
    assert em.segment_weights(steps, P_all, P_all) == [1.0] * len(steps)  # exactly 1 where nothing differs
    previous = ["<start>"]
    for labels, w in zip(steps, weights, strict=True):
        edges = [(em.STATES.index(a), em.STATES.index(b)) for a in previous for b in labels]
        if edges:  # the plain ratio of sums: 1/|I| and 1/|J| have cancelled
            ratio = math.fsum(P_class[ab] for ab in edges) / math.fsum(P_all[ab] for ab in edges)
            assert w == pytest.approx(min(max(ratio, 1 / math.e), math.e), rel=1e-12)
        else:
            assert w == 1.0
        previous = labels


def test_pair_prob_is_eq_7():
    P = random_matrix(3)
    expected = sum(0.5 * P[a, b] * 0.5 for a in (1, 4) for b in (2, 9))
    assert em.pair_prob(P, (1, 4), (2, 9)) == pytest.approx(expected, rel=1e-14)


def test_weights_are_clipped_on_both_sides():
    P_class, P_all = np.full((4, 4), 0.1), np.full((4, 4), 0.1)
    P_class[0, 1], P_all[1, 2] = 0.9, 0.9  # ratios 9, then 1/9, then 1
    steps = [["a"], ["b"], ["a"]]
    assert em.segment_weights(steps, P_class, P_all, states=TINY) == [math.e, 1 / math.e, 1.0]
    assert em.segment_weights(steps, P_class, P_all, clip=(0.5, 4.0), states=TINY) == [4.0, 0.5, 1.0]


def test_weights_across_a_gap():
    P_class, P_all = random_matrix(5, 4), random_matrix(6, 4)
    weights = em.segment_weights([["a"], [], ["b"], ["a"]], P_class, P_all, clip=(0, 1e9), states=TINY)
    assert weights[1:3] == [1.0, 1.0]
    assert weights[0] == pytest.approx(P_class[0, 1] / P_all[0, 1])
    assert weights[3] == pytest.approx(P_class[2, 1] / P_all[2, 1])
