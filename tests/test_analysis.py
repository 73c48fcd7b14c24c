"""The analyses against numbers worked by hand, slow versions and scipy."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

import data
import em
import eval as evaluation
from common.errors import InputError
from report import analysis

F, R, E, B = "framing", "retrieval", "evaluation", "backtracking"


def sample(thought, answer, golds=("Paris",), name="q", draw=0, finish="stop"):
    text = f"<think>{thought}</think>\n\n<answer>{answer}</answer>"
    row = {"id": name, "mode": "on", "draw": draw, "question": "?", "answers": list(golds)}
    return row | {"text": text, "finish": finish, "ids": [], "prompt": ""}


# ---------- Fig. 1


def test_positions_by_hand():
    rows = [
        sample("ab Paris cd Paris", "Paris", name="1"),  # "ab paris cd paris": 17 characters, at 3 and 12
        sample("the Paris! 12345", "Paris", name="2"),  # "paris 12345": 11 characters, at 0
        sample("0123456789 Lutetia", "Rome", ["Paris", "Lutetia"], "3"),  # at 11 of 18
        sample("nothing", "Paris", name="4"),
        sample("Paris", "Rome", name="5", finish="length"),
        {**sample("", "", name="6"), "text": "<think>Paris and no end"},
        sample("x A+ y", "A+", ["A+"], name="7"),  # a gold that normalises to nothing is nowhere
    ]
    got = analysis.positions(rows)
    assert got["right"] == {"n": 2, "first": pytest.approx(50 * 3 / 17), "last": pytest.approx(50 * 12 / 17)}
    assert got["wrong"] == {"n": 1, "first": pytest.approx(1100 / 18), "last": pytest.approx(1100 / 18)}
    assert got["left_out"] == 4
    assert analysis.positions(rows[3:4])["right"] == {"n": 0, "first": None, "last": None}


# ---------- Fig. 5


def scored(cells, draw=0):
    """Scored rows from (em_t, em_a) of questions q0, q1, ..."""
    return [
        {"id": f"q{k}", "mode": "on", "draw": draw, "em_t": t, "em_a_equal": a, "em_a_contains": a}
        for k, (t, a) in enumerate(cells)
    ]


def test_strata_by_hand():
    base = scored([(1, 1), (1, 1), (1, 1), (1, 0), (0, 1), (1, 0), (1, 0), (0, 0)])
    other = scored([(1, 1), (1, 0), (1, 1), (1, 1), (1, 1), (1, 0), (1, 1), (0, 1)])
    got = analysis.strata(base, other)
    assert {name: (s["n"], s["gain"]) for name, s in got.items()} == {
        "both correct": (3, pytest.approx(-1 / 3)),
        "both wrong": (1, 0.0),
        "inconsistent": (4, 0.75),
    }
    assert got["inconsistent"]["chance"] is None and got["inconsistent"]["draws"] == [0.75]
    gains = np.array([1, 1, 0, 1.0])
    theirs = stats.bootstrap((gains,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    assert (got["inconsistent"]["low"], got["inconsistent"]["high"]) == pytest.approx(
        (theirs.low, theirs.high), abs=0.01
    )
    overall = sum(s["n"] * s["gain"] for s in got.values()) / 8
    assert overall == pytest.approx(evaluation.compare(base, other)["acc"]["difference"] * -1)
    assert analysis.strata(base[:3], other[:3])["both wrong"]["gain"] is None
    with pytest.raises(InputError, match="'q7' was scored in one run only"):
        analysis.strata(base, other[:-1])


def test_strata_over_draws_and_the_gain_that_chance_alone_gives():
    draws = [[(1, 1), (1, 0), (0, 0)], [(1, 0), (1, 1), (0, 0)], [(1, 1), (1, 1), (0, 0)]]
    base = [row for k, cells in enumerate(draws) for row in scored(cells, k)]
    got = analysis.strata(base, base)
    assert [got[s]["gain"] for s in analysis.STRATA] == [0, 0, 0]
    # both correct: q0 in draws 0 and 2, q1 in 1 and 2; their next draws are (1,0), (1,1), (1,1), (1,0)
    assert (got["both correct"]["n"], got["both correct"]["chance"]) == (4, -0.5)
    # inconsistent: q1 in draw 0, q0 in draw 1; next draws (1,1) and (1,1)
    assert (got["inconsistent"]["n"], got["inconsistent"]["chance"]) == (2, 1.0)
    assert got["inconsistent"]["draws"] == [0.0, 0.0, None]


# ---------- labels


def test_rows_to_label_are_finished_first_draws():
    rows = [
        sample("One.\n\nTwo.", "Paris", name="a"),
        sample("One.", "Paris", name="b", finish="length"),
        sample("One.", "Paris", name="c", draw=1),
        {**sample("", "", name="d"), "text": "<think>never ends"},
        {**sample("", "", name="e"), "mode": "off", "text": "Paris"},
    ]
    (row,) = analysis.to_label(rows)
    assert [row["completion"][a:b] for a, b in row["spans"]] == ["One.\n\n", "Two."]
    record = {"id": "a", "steps": [{"segments": [1], "labels": [R], "confidence": [9.0], "source": "x"}]}
    assert analysis.labels_of([row], [record]) == {"a": [(), (R,)]}


def test_a_sample_of_thoughts_is_the_same_questions_for_every_variant_and_another_with_another_seed():
    everyone = [sample("One.", "Paris", name=f"q{k}") for k in range(400)]
    unfinished = {f"q{k}" for k in range(0, 400, 10)}
    fewer = [row for row in everyone if row["id"] not in unfinished]
    one, two, other = (
        [r["id"] for r in analysis.to_label(rows, 100, seed)]
        for rows, seed in ((everyone, 0), (fewer, 0), (everyone, 1))
    )
    assert len(one) == len(two) == len(other) == 100 and one == sorted(one, key=lambda name: int(name[1:]))
    assert {*one} - unfinished <= {*two} and {*one} != {*other}
    assert 150 < np.mean([int(name[1:]) for name in one]) < 250  # from the whole file, not from its beginning


def test_the_bound_of_a_weight_by_hand():
    """Eq. 15 at E |delta| = .01 and M = e: .0172 / a; moves of .5, .1 and .004, seen 6, 3 and once."""
    P, C = np.zeros((2, 17, 17))
    for (i, j), p, n in (((1, 2), 0.5, 6), ((1, 3), 0.1, 3), ((2, 4), 0.004, 1)):
        P[i, j], C[i, j] = p, n
    P[5, 5] = 0.2  # never seen: not counted
    got = analysis.weight_bound(P, C, 0.01)
    low, mid, high = (0.01 * (np.e - 1) / a for a in (0.5, 0.1, 0.004))
    assert got["mean"] == pytest.approx((6 * low + 3 * mid + high) / 10)
    assert (got["median"], got["p90"]) == (pytest.approx(low), pytest.approx(mid))
    assert got["below .1"] == 0.6 and got["vacuous"] == pytest.approx(0.1)  # 4.3 is wider than e - 1/e


def test_the_distance_of_resampled_matrices_is_the_binomials():
    """A move with probability p out of a state left n times: E |p' - p| = sqrt(2 p (1 - p) / (pi n)), in two cells."""
    traces = [[(F,), (B,) if k % 4 == 0 else (R,), (E,)] for k in range(400)]
    got = analysis.matrix_intervals(traces, traces[:1], n_boot=200)["P_pos"]["mean_l1"]
    assert got == pytest.approx(2 * np.sqrt(2 * 0.25 * 0.75 / (np.pi * 400)) / 17**2, rel=0.2)


def test_label_outcomes_by_hand():
    labels = {"q0": [(F,), (R, E)], "q1": [(F,), (B,)], "q2": [(F,), (R,)], "q3": [()]}
    rows = scored([(1, 1), (1, 0), (1, 1), (0, 0)])
    got = analysis.label_outcomes(rows + scored([(0, 0)], draw=1), labels, least=2)
    table = {row["name"]: row for row in got["labels"]}
    assert got["n"] == 4 and list(table) == list(em.LABELS)
    assert sum(row["steps"] for row in table.values()) == pytest.approx(1) and table[F]["steps"] == 3 / 7
    assert [(table[F][k]["k"], table[F][k]["n"]) for k in ("with", "without")] == [(2, 3), (0, 1)]
    assert [(table[B][k]["k"], table[B][k]["n"]) for k in ("with", "without")] == [(0, 1), (2, 3)]
    assert table["analogy"]["with"] is None
    assert [(m["name"], m["with"]["k"], m["with"]["n"]) for m in got["moves"]] == [(f"{F} → {R}", 2, 2)]


# ---------- Fig. 4, intervals


def test_change_is_the_difference_of_the_two_fits():
    before = [[(F,), (B,), (R,)]] * 30 + [[(F,), (R,), (E,)]] * 10 + [[("analogy",), (E,)]]
    after = [[(F,), (R,), (E,)]] * 35 + [[(F,), (B,), (R,)]] * 5
    got = analysis.change(before, after, n_boot=50)
    fits = [em.fit([o for t in traces for o in em.observations(t)]).P for traces in (before, after)]
    delta = np.array(got["delta"])
    np.testing.assert_allclose(delta, fits[1] - fits[0], atol=1e-15)
    np.testing.assert_allclose(delta.sum(1), 0, atol=1e-12)
    index = em.STATES.index
    # by hand: of 40 moves out of framing 10 go to retrieval before and 35 after, and the same happens to retrieval's
    # moves to evaluation and to the end, so .25 -> .875 twice each way; five damped steps come near
    assert {(r["from"], r["to"]) for r in got["up"][:2]} == {(F, R), (R, E)}
    assert {(r["from"], r["to"]) for r in got["down"][:2]} == {(F, B), (R, "<stop>")}
    assert all(0.5 < abs(r["delta"]) < 0.625 for r in got["up"][:2] + got["down"][:2])
    assert all(r["delta"] == delta[index(r["from"]), index(r["to"])] for r in got["up"] + got["down"])
    assert all(row["low"] <= row["delta"] <= row["high"] for row in got["up"][:1] + got["down"][:1])
    # seen once before and never after: not ranked
    assert all("analogy" != row["from"] for row in got["up"] + got["down"]) and got["support"][index("analogy")] == 0
    values = [row["delta"] for row in got["up"]]
    assert values == sorted(values, reverse=True) and all(v > 0 for v in values) and len(values) <= 10
    with pytest.raises(InputError, match="no finished thought"):
        analysis.change([], after)


def test_resamples_are_whole_traces():
    traces = [[(F,), (R,)], [(F, E), (R,), (B,)], [(E,)]]
    each = [Counter(em.observations(t)) for t in traces]
    sums = [sum((each[i] for i in picks), Counter()) for picks in itertools.combinations_with_replacement(range(3), 3)]
    drawn = list(analysis.bootstrap_counts(traces, 200, 0))
    assert all(counts in sums for counts in drawn) and len({tuple(sorted(c.items())) for c in drawn}) == len(sums)
    again, other = (list(analysis.bootstrap_counts(traces, 200, seed)) for seed in (0, 1))
    assert drawn == again != other


def test_intervals_cover_the_fit_and_shrink_with_the_data():
    rng = np.random.default_rng(0)

    def traces(n, p):
        return [[(F,), (B,) if rng.random() < p else (R,), (E,)] for _ in range(n)]

    positive, negative = traces(100, 0.2), traces(50, 0.6)
    got = analysis.matrix_intervals(positive, negative, n_boot=100)
    obs = [[o for t in side for o in em.observations(t)] for side in (positive, negative)]
    P = {"P_pos": em.fit(obs[0]).P, "P_neg": em.fit(obs[1]).P, "P": em.fit(obs[0] + obs[1]).P}
    a, b = em.STATES.index(F), em.STATES.index(B)
    for name, matrix in P.items():
        assert got[name]["low"][a][b] < matrix[a, b] < got[name]["high"][a][b]
    w = min(P["P_neg"][a, b] / P["P"][a, b], em.CLIP[1])
    assert got["w_neg"]["low"][a][b] < w < got["w_neg"]["high"][a][b] <= em.CLIP[1]
    # the width of a share is that of the binomial: 2 * 1.96 * sqrt(p (1 - p) / n), times the damping's (1 - .4^5)
    share = np.mean([B in t[1] for t in positive])
    width = got["P_pos"]["high"][a][b] - got["P_pos"]["low"][a][b]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 100), rel=0.35)
    more = analysis.matrix_intervals(traces(1600, 0.2), traces(800, 0.6), n_boot=100)
    ratio = width / (more["P_pos"]["high"][a][b] - more["P_pos"]["low"][a][b])
    assert ratio == pytest.approx(4, rel=0.35)  # sixteen times the traces, a quarter of the width
    assert np.array(got["w_pos"]["low"]).shape == (len(em.STATES),) * 2 and got["w_pos"]["low"][3][0] == 1.0


# ---------- weights


def test_weight_audit_counts_tokens_by_hand(tiny_tokenizer):
    text = "<think>\nIs it Paris?\n\nYes.\n</think>\n\n<answer>Paris</answer><|im_end|>"
    ids = tiny_tokenizer.encode(text).ids
    start, end = text.index("<think>") + 7, text.index("</think>")
    spans = data.split_segments(text, start, end)
    pieces = [tiny_tokenizer.decode([i], skip_special_tokens=False) for i in ids]  # ASCII: a token is its characters
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    owner = [next((k for k, (a, b) in enumerate(spans) if a <= s < b), None) for s in starts]
    first, second, rest = owner.count(0), owner.count(1), owner.count(None)
    assert "".join(pieces) == text and first > 0 and second > 0
    row = {"completion": text, "completion_ids": ids, "spans": [list(s) for s in spans], "label": True}
    (got,) = analysis.weight_audit([row | {"w": [em.CLIP[1], 0.5]}], tiny_tokenizer)
    heavy = em.CLIP[1] * first + 0.5 * second
    assert got["thought"] == f"{100 * (first + second) / len(ids):.1f} %"
    assert got["thought, effective"] == f"{100 * heavy / (heavy + rest):.1f} %"
    assert got["answer, effective"] == f"{100 * rest / (heavy + rest):.1f} %"
    assert (got["clipped at e"], got["clipped at 1/e"], got["mean w"]) == ("50.0 %", "0.0 %", 1.609)
    assert got["traces"] == 1 and got["steps"] == 2
