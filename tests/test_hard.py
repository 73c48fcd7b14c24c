"""The world of pairs (mini/hard.py), what moves do (mini/kinds.py), and worlds of moves (mini/moves.py)."""

import math
import random
from collections import Counter

import numpy as np
import pytest

import data
import em
from annotate import CueAnnotator
from common.files import read_json
from mini import hard, kinds, moves
from mini.hard import BODY, CLASSES, MARKER, HardWorld, Rules
from mini.world import GOLD, HERE, KEEPS, LENGTHS, LOSES, NONE, REPAIRS, WRONG, World, draw


def share_right(world: HardWorld, styles: list, n: int = 1500) -> float:
    """Share of walks that end with the gold."""
    rng = random.Random(3)
    walks = [hard.walk(rng, rng.choice(styles), draw(rng, LENGTHS)) for _ in range(n)]
    ends = [hard.outcomes(rng, world.rules, labels)[-1] for labels in walks]
    return ends.count(GOLD) / n


@pytest.mark.parametrize("seed", [0, 1])
def test_every_label_loses_after_one_class_and_repairs_after_another(seed):
    rules = HardWorld(seed).rules
    assert len(rules.table) == 24
    for label in BODY:
        kinds_of = [rules.table.get((marker, label), KEEPS) for marker in CLASSES]
        assert Counter(kinds_of) == {LOSES: 1, REPAIRS: 1, KEEPS: 2}, label
    for marker in CLASSES:  # no class is the bad one
        assert Counter(kind for (m, _), kind in rules.table.items() if m == marker) == {LOSES: 3, REPAIRS: 3}
    assert rules.kind("framing", "retrieval") == KEEPS and all(rules.kind(x, x) == KEEPS for x in BODY)


@pytest.mark.parametrize("seed", [0, 1])
def test_right_moves_are_always_right_and_leaving_out_labels_is_no_way_out(seed):
    world = HardWorld(seed)
    base = share_right(world, world.styles)
    assert 0.5 < base < 0.75
    right = {a: {b: 1.0 for b in BODY if world.kind(a, b) == REPAIRS} for a in BODY}
    assert share_right(world, [right]) > 0.99
    idle = {a: {b: 1.0 for b in BODY if world.kind(a, b) == KEEPS} for a in BODY}
    assert share_right(world, [idle]) == pytest.approx(1 - hard.FIRST_WRONG, abs=0.05)
    rng = random.Random(0)
    for gone in ([label] for label in BODY):
        gone = [*gone, rng.choice([x for x in BODY if x not in gone])]
        styles = [{a: {b: w for b, w in of[a].items() if b not in gone} for a in BODY} for of in world.styles]
        assert share_right(world, styles, 600) < 0.88, gone


def test_outcomes_by_hand(monkeypatch):
    """After "maybe" a comparison loses, after "rather" a backtracking repairs; nothing happens before a retrieval."""
    monkeypatch.setattr(hard, "HAPPENS", {LOSES: 1.0, REPAIRS: 1.0})
    monkeypatch.setattr(hard, "FIRST_WRONG", 0.0)
    rules = Rules({("maybe", "comparison"): LOSES, ("rather", "backtracking"): REPAIRS})
    labels = ["framing", "retrieval", "comparison", "chaining", "comparison", "backtracking", "comparison"]
    assert hard.outcomes(random.Random(0), rules, labels) == [NONE, GOLD, WRONG, WRONG, WRONG, GOLD, GOLD]


def test_a_trace_reads_back():
    """Labels from the cue phrases, the answer is the candidate named last, after the marker of its label."""
    world, rng, annotator = HardWorld(0), random.Random(1), CueAnnotator(read_json(HERE / "cues.json"))
    for fact in rng.sample(world.facts, 60):
        opener, question = world.question(rng, fact)
        trace = world.think_on(rng, fact, opener)
        steps = annotator.label(question, trace.segments)
        assert [list(s.labels) for s in steps] == [sorted(x, key=em.LABELS.index) for x in trace.segment_labels] or [
            set(s.labels) for s in steps
        ] == [set(x) for x in trace.segment_labels]
        parsed = data.parse(trace.completion)
        assert (parsed.outcome, parsed.answer) == ("ok", trace.answer)
        thought = " ".join(trace.segments)
        last = {name: thought.rfind(name) for name in (fact.object, fact.distractor)}
        assert trace.answer == max(last, key=last.get)
        assert thought[: last[trace.answer]].split()[-1] == MARKER[trace.labels[-1]] or trace.labels[-1] == "retrieval"


def test_moves_of_the_null_world_say_nothing():
    null, real = (kinds.simulated(HardWorld(0, null=n), 6000) for n in (True, False))
    rules = HardWorld(0).rules
    for traces, low, high in ((null, 0.0, 0.05), (real, 0.15, 1.0)):
        shares = []
        for side in (True, False):
            found = [rules.kind(*m) == LOSES for t in traces if t.chosen is side for m in kinds.moves(t)]
            shares.append(sum(found) / len(found))
        assert low <= abs(shares[1] - shares[0]) <= high, shares


# ---------- kinds


def test_kinds_of_traces_counted_by_hand():
    """A hundred chosen and fifty rejected traces; P from em.fit, the means written out."""
    world = World(0)
    chosen, lost = (("retrieval",), ("comparison",)), (("retrieval",), ("backtracking",))
    traces = [kinds.Labelled(x, x is chosen, "a") for x in (chosen, chosen, lost) * 50]
    loses, repairs, keeps = kinds.table(traces, world)
    index = em.STATES.index
    P = {side: em.fit([o for t in traces if t.chosen in side for o in em.observations(t.labels)]).P
         for side in ((True, False), (True,), (False,))}  # fmt: skip
    at = index("retrieval"), index("backtracking")
    assert loses["share, pos"] == 0 and loses["share, neg"] == 1 and repairs["share, pos"] == 1
    assert loses["log ratio, neg"] == pytest.approx(math.log(P[False,][at] / P[True, False][at]))
    assert loses["wrong way, neg"] == 0 and repairs["wrong way, pos"] == 0 and keeps["pairs"] == 0
    assert loses["by opener, neg"] == pytest.approx(0, abs=0.02)  # one opener tells nothing: only the prior differs


def test_a_ratio_that_only_the_openers_make_is_seen_as_theirs():
    """Opener a is always right and likes explanation, b always wrong and likes chaining; neither does anything."""
    a = [kinds.Labelled([("retrieval",), ("explanation",)], True, "a")] * 30
    b = [kinds.Labelled([("retrieval",), ("chaining",)], False, "b")] * 30
    row = kinds.table(a + b, World(0))[2]
    assert row["kind"] == KEEPS and row["log ratio, pos"] > 0.5
    assert row["by opener, pos"] == pytest.approx(row["log ratio, pos"], abs=1e-9)


# ---------- moves


def test_accuracy_of_a_table_is_that_of_its_walks():
    of = moves.pairs(0)
    rng = np.random.default_rng(0)
    for temperature in (1.0, 0.5):
        sharp = moves.sharpened(of, of.walk, temperature)
        n = 20000
        drawn = moves.draw(of, rng, rng.integers(len(of.walk), size=n), temperature)
        assert drawn.right.mean() == pytest.approx(moves.accuracy(sharp, sharp.walk)[0], abs=4 * 0.5 / n**0.5)


def test_distance_is_the_kl_of_a_small_step():
    """Against the KL of the walks, move by move, from its definition."""
    of, rng = moves.pairs(1), np.random.default_rng(1)
    step, words = rng.normal(size=of.walk[:, 0].shape), np.zeros((1, len(of.walk), len(of.labels), moves.WORDS))
    size = 1e-3
    new = of.walk * np.exp(size * step[:, None])
    new /= new.sum(-1, keepdims=True)
    kl = (new * np.log(new / of.walk)).sum(-1)  # (O, H, L)
    visits = moves.accuracy(of, new)[1]
    assert (visits * kl).sum() / size**2 == pytest.approx(moves.distance(of, step, words)[0], rel=0.01)
    assert moves.distance(of, step + 3.0, words)[0] == pytest.approx(moves.distance(of, step, words)[0])


def test_the_gain_of_a_direction_hangs_on_neither_its_size_nor_its_constant():
    of = moves.pairs(0)
    step = np.random.default_rng(2).normal(size=of.walk[:, 0].shape)
    assert moves.slope(of, 2 * step) == pytest.approx(2 * moves.slope(of, step), rel=1e-3)
    assert moves.slope(of, step + 5.0) == pytest.approx(moves.slope(of, step), rel=1e-6)


def test_weights_help_where_effects_are_the_same_everywhere_and_not_where_openers_reverse_them():
    """Few rows, drawn once at T = 1. The same step for all methods but the weights."""
    found = {name: moves.gains(moves.WORLDS[name](0), 1000, 1.0, 1, 0) for name in ("pairs", "opener")}
    assert found["pairs"]["mralign"] > 1.2 * found["pairs"]["kto"]
    assert found["opener"]["mralign"] < 1.1 * found["opener"]["kto"]
    for of in found.values():
        assert of["mean"] == pytest.approx(of["kto"], rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize(("name", "seed"), [("model-hard", 0), ("model-hard-world1", 1)])
def test_the_shipped_models_know_the_rules(name, seed):
    """The world repairs in 99, loses in 95 and keeps in 100 % of the cases; 60 steps a case, so some room."""
    from mini.forced import forced
    from model import load

    folder = HERE / name
    found = {(row["kind"], row["before"]): row for row in forced(load(folder), folder, HardWorld(seed), 60)}
    assert found[REPAIRS, WRONG]["right"] > 0.9 and found[LOSES, GOLD]["wrong"] > 0.75
    assert found[KEEPS, GOLD]["right"] > 0.9 and found[KEEPS, WRONG]["wrong"] > 0.9
