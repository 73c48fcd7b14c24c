"""tools/questions.py: what the paper leaves open, on hand-worked annotations and on chains whose matrix is known."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from scipy.stats import spearmanr

import em
from annotate import Step
from common.errors import InputError
from common.files import write_jsonl
from tools import questions, sweep

NAMES = ("framing", "retrieval", "evaluation", "backtracking")


def walk(rng: np.random.Generator, rows: dict[str, dict[str, float]], length: int) -> list[tuple[str, ...]]:
    """A trace of one-label steps from "framing" on, by the rows of a matrix."""
    steps = ["framing"]
    while len(steps) < length:
        names, p = zip(*rows[steps[-1]].items(), strict=True)
        steps.append(str(rng.choice(names, p=p)))
    return [(x,) for x in steps]


EVEN = {a: {b: 0.25 for b in NAMES} for a in NAMES}
LOOSE = EVEN | {"retrieval": {"framing": 0.1, "retrieval": 0.1, "evaluation": 0.1, "backtracking": 0.7}}


def test_rank_correlation_is_scipys_with_ties():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, 200), rng.normal(size=200)
    y = np.round(y + 0.3 * x, 1)
    assert questions.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert questions.spearman([1, 1, 1], [1, 2, 3]) is None


def test_weights_apart_by_hand():
    a = {"x": [1.0, 2.0, 0.5], "y": [2.0]}
    b = {"x": [1.0, 0.5, 0.5], "y": [2.0]}
    found = questions.weights_apart(a, b, {"x": True, "y": False})
    assert found["chosen"]["n"] == 3 and found["rejected"]["n"] == 1
    assert found["chosen"]["log w apart"] == pytest.approx(np.log(4) / 3)
    assert found["chosen"]["opposite"] == pytest.approx(1 / 3)  # only 2 against .5
    assert found["rejected"] == {"n": 1, "spearman": None, "log w apart": 0.0, "opposite": 0.0}


def test_a_move_that_only_rejected_traces_make_weighs_more_there():
    """Worked with em.fit alone: the weights are those of the formula on the three matrices."""
    labels = {"p": [("framing",), ("retrieval",)], "n": [("framing",), ("backtracking",)]}
    chosen = {"p": True, "n": False}
    w = questions.weights(labels, chosen)
    move = ((1,), (2,))
    both = em.fit([o for of in labels.values() for o in em.observations(of)]).P
    own = em.fit(em.observations(labels["n"])).P
    assert w["n"][1] == pytest.approx(min(np.e, own[move[0][0], move[1][0]] / both[move[0][0], move[1][0]]))
    assert w["n"][1] > 1.2 < w["p"][1] and w["n"][0] == pytest.approx(w["p"][0], abs=0.06)


def write_run(folder, labels, chosen, name="annotations.jsonl"):
    """A run's candidates and annotations, one step a segment."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"id": k, "chosen": chosen[k], "spans": [[i, i + 1] for i in range(len(of))], "dataset": k[0]}
        for k, of in labels.items()
    ]
    write_jsonl(folder / "candidates.jsonl", rows)
    write_labels(folder / name, labels)


def write_labels(path, labels):
    def step(i, x):
        return Step((i,), tuple(x), (10.0,) * len(x), "x").as_json()

    write_jsonl(path, [{"id": k, "steps": [step(i, x) for i, x in enumerate(of)]} for k, of in labels.items()])


def test_comparing_an_annotation_with_itself_and_with_a_relabelled_one(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = {f"{'ab'[k % 2]}{k}": walk(rng, EVEN, 6) for k in range(40)}
    chosen = {key: k % 3 > 0 for k, key in enumerate(labels)}
    write_run(tmp_path / "run", labels, chosen)
    write_labels(tmp_path / "same.jsonl", labels)
    swap = {"framing": "retrieval", "retrieval": "framing"}
    other = {k: [tuple(swap.get(x, x) for x in step) for step in of] for k, of in labels.items()}
    sample = dict(list(other.items())[:25])  # a person labelled some of them
    write_labels(tmp_path / "other.jsonl", sample)

    same = questions.compare(tmp_path / "run", tmp_path / "same.jsonl", resamples=20)
    assert same["agreement"]["strict"]["value"] == same["weights"]["chosen"]["spearman"] == 1
    assert same["mean L1"] == {"P": 0, "P_pos": 0, "P_neg": 0} and same["candidates"] == 40

    changed = questions.compare(tmp_path / "run", tmp_path / "other.jsonl", resamples=20)
    steps = [step[0] for key in sample for step in labels[key]]
    kept = sum(x not in swap for x in steps) / len(steps)
    assert changed["candidates"] == 25 and changed["agreement"]["strict"]["value"] == pytest.approx(kept, abs=1e-6)
    # The same steps under two names: the weights depend on the partition of the moves alone.
    assert changed["weights"]["chosen"]["spearman"] == pytest.approx(1)
    assert changed["mean L1"]["P"] > 0.01

    assert questions.main(["compare", str(tmp_path / "run"), str(tmp_path / "other.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "25 candidates, 150 segments" in shown
    n = sum(x == "framing" for x in steps)
    assert any("framing" in line and "retrieval" in line and f" {n} " in line for line in shown.splitlines())
    with pytest.raises(InputError, match="labels none of the candidates"):
        write_labels(tmp_path / "none.jsonl", {"z": [("framing",)]})
        questions.compare(tmp_path / "run", tmp_path / "none.jsonl")


def test_sensitivity_agrees_with_fits_of_its_own():
    rng = np.random.default_rng(3)
    labels = {str(k): walk(rng, LOOSE if k % 2 else EVEN, 7) for k in range(60)}
    chosen = {key: int(key) % 2 == 0 for key in labels}
    found = {row["settings"]: row for row in questions.sensitivity(labels, chosen)}
    moves = [o for of in labels.values() for o in em.observations(of)]
    want = np.abs(em.fit(moves, prior=1.0).P - em.fit(moves).P).mean()
    assert found["prior 1"]["mean L1"]["P"] == pytest.approx(want)
    first = next(iter(found.values()))
    assert first["mean L1"] == {"P": 0, "P_pos": 0, "P_neg": 0} and first["weights"]["chosen"]["log w apart"] == 0
    # With one label a step every iteration sees the same counts, so more of them change P by (1 - damping)^n alone.
    assert found["10 iterations"]["mean L1"]["P"] < found["2 iterations"]["mean L1"]["P"] < 0.05
    assert found["200 iterations"]["mean L1"]["P"] == pytest.approx(
        found["200 iterations, damping 1"]["mean L1"]["P"], abs=1e-5
    )


def test_halves_by_hand():
    labels = [("framing",), ("retrieval",), ("evaluation",), (), ("framing",), ("retrieval",)]
    f, r, e = (em.STATES.index(x) for x in ("framing", "retrieval", "evaluation"))
    assert questions.halves(labels) == ([((f,), (r,)), ((r,), (e,))], [((f,), (r,))])
    assert questions.halves(labels[:1]) == ([], [])


def test_the_gain_of_two_chains_by_hand():
    """That of two multinomials, less some 1.6 nats: the prior takes as much from each of the three fits."""
    moves = [((1,), (2,))] * 30 + [((1,), (3,))] * 10 + [((1,), (2,))] * 10 + [((1,), (3,))] * 50
    late = np.array([False] * 40 + [True] * 60)
    found = questions.divided(moves, late)

    def best(*counts):
        return sum(n * np.log(n / sum(counts)) for n in counts)

    assert found["ratio"] == pytest.approx(best(30, 10) + best(10, 50) - best(40, 60) - 1.6, abs=0.6)
    assert found["delta"][1, 2] == pytest.approx(10 / 60 - 30 / 40, abs=0.04)


def test_a_chain_passes_and_a_change_in_the_middle_is_found():
    rng = np.random.default_rng(5)
    plain = [walk(rng, LOOSE, 9) for _ in range(80)]
    first = questions.by_halves(plain, n=60)
    assert first["p"] > 0.05 and not first["moves"]
    changed = [[*walk(rng, EVEN, 5), *walk(rng, LOOSE, 8)[1:]] for _ in range(80)]
    second = questions.by_halves(changed, n=60)
    assert second["p"] == pytest.approx(1 / 61)
    assert ("retrieval", "backtracking") == (second["moves"][0]["from"], second["moves"][0]["to"])
    assert second["moves"][0]["delta"] > 0.2


@pytest.mark.long
def test_the_p_value_is_uniform_where_nothing_differs():
    """Over many data sets without a difference a test at 20 % rejects about one in five."""
    p, named = [], 0
    for k in range(60):
        rng = np.random.default_rng(k)
        traces = [walk(rng, LOOSE, int(rng.integers(4, 9))) for _ in range(30)]
        found = questions.by_trace([questions.inner(t) for t in traces], [i % 2 == 0 for i in range(30)], n=39, seed=k)
        p.append(found["p"])
        named += bool(found["moves"])
    assert 4 <= sum(x <= 0.2 for x in p) <= 22 and named <= 9


def test_groups_of_traces(tmp_path):
    rng = np.random.default_rng(7)
    labels = {f"{'ab'[k % 2]}{k}": walk(rng, LOOSE if k % 2 else EVEN, 6) for k in range(80)}
    candidates = [{"id": key, "chosen": True, "dataset": key[0]} for key in labels]
    found = questions.stationarity(candidates, labels, "dataset", n=60)
    (name, of), *_ = found.items()
    assert "against" in name and of["p"] == pytest.approx(1 / 61) and of["moves"]
    with pytest.raises(InputError, match="of one data set"):
        questions.stationarity(candidates[::2], labels, "dataset")


def test_the_intervals_narrow_as_the_square_root_of_the_traces():
    rng = np.random.default_rng(9)
    labels = {str(k): walk(rng, LOOSE if k % 2 else EVEN, 7) for k in range(400)}
    chosen = {key: int(key) % 2 == 0 for key in labels}
    quarter, whole, more = questions.trace_counts(labels, chosen, (0.25, 1.0, 4.0), n=40)
    assert (quarter["chosen traces"], whole["chosen traces"], more["rejected traces"]) == (50, 200, 800)
    for side in ("chosen", "rejected"):
        widths = [of[side]["width"] for of in (quarter, whole, more)]
        for a, b in itertools.pairwise(widths):
            assert a / b == pytest.approx(2, rel=0.4)
        assert quarter[side]["sure"] <= more[side]["sure"] and quarter[side]["rank"] < more[side]["rank"]


def test_label_counts_by_hand(tmp_path, capsys):
    labels = {"a1": [("framing",), ()], "b1": [("framing", "retrieval"), ("evaluation",)]}
    write_run(tmp_path, labels, {"a1": True, "b1": False})
    found = questions.label_counts([{"id": "a1", "dataset": "a"}, {"id": "b1", "dataset": "b"}], labels)
    assert (found["all"]["steps"], found["all"]["none"], found["all"]["two"]) == (4, 0.25, 0.25)
    assert found["a"]["none"] == 0.5 and found["all"]["labels"]["framing"] == 0.5
    assert questions.main(["labels", str(tmp_path), "--json", str(tmp_path / "x.json")]) == 0
    assert "25.0 %" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["answer"]["all"]["two"] == 0.25


def test_two_graders_by_hand(tmp_path):
    """Both say right 4 times, wrong 2 times; they differ on 2 of 8: p_o = .75, p_e = (5*5 + 3*3)/64."""
    a, b = "RRRRRWWW", "RRRRWRWW"
    for name, letters in (("a", a), ("b", b)):
        write_jsonl(tmp_path / name, [{"id": str(k), "draw": 0, "verdict": x} for k, x in enumerate(letters)])
    found = questions.grades(tmp_path / "a", tmp_path / "b", n_boot=200)
    assert found["answers"] == 8 and found["strict"][0] == 0.75
    chance = Counter(a)["R"] / 8 * Counter(b)["R"] / 8 + 9 / 64
    assert found["kappa"][0] == pytest.approx((0.75 - chance) / (1 - chance))
    assert found["confusion"] == {"R": {"R": 4, "W": 1}, "W": {"R": 1, "W": 2}}
    assert found["strict"][1] < 0.75 < found["strict"][2]


def test_training_with_each_alternative_is_a_sweep_on_the_draws_and_labels_of_the_run(tmp_path, monkeypatch):
    run, config = tmp_path / "run", tmp_path / "config.json"
    config.write_text('{"model": "mini/model", "out": "runs/elsewhere", "annotator": "cues"}')
    asked = []

    def end_well(words):
        file = sweep.load(words[0])
        asked.append((file, [sweep.command(file, name, 1, 1, words[1:]) for name in file["runs"]]))
        (tmp_path / "run" / "questions" / "sensitivity" / "sweep.json").write_text('{"runs": {}}')
        return 0

    monkeypatch.setattr(questions.sweep, "main", end_well)
    runs = questions.alternatives("prior 1; 200 iterations, damping 1")
    assert questions.train_each(run, config, "sensitivity", runs, "1,2", ["--lr", "3e-4"]) == {"runs": {}}
    ((file, commands),) = asked
    assert file["seeds"] == [1, 2] and list(file["runs"])[1:] == ["prior 1", "200 iterations, damping 1"]
    assert sweep.settings_of(file, "prior 1", []).em_prior == 1.0
    assert [c[c.index("--annotator") + 1] for c in commands] == [str(run / "annotations.jsonl")] * 3
    assert all(c[-2:] == ["--lr", "3e-4"] for c in commands)
    last = commands[2]
    assert last[last.index("--em-iterations") + 1] == "200" and last[last.index("--em-damping") + 1] == "1.0"
    assert sweep.lenders(file, "prior 1", 0)[0] == run  # its draws are those of seed 0
    with pytest.raises(InputError, match="--only 'prior 2' is not one of: damping .2; "):
        questions.alternatives("prior 2")
    with pytest.raises(InputError, match="--seeds 'one' must be whole numbers"):
        questions.train_each(run, config, "sensitivity", runs, "one", [])
