"""The study's statistics: means per fact, the crossed bootstrap, the cells."""

import numpy as np
import pytest

from mini import study


def test_crossed_bootstrap_has_the_width_of_an_additive_table():
    """For cell + fact effects the resampled mean varies by var(cells)/cells + var(facts)/facts, both population."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 0.03, 6), rng.normal(0.05, 0.4, 250)
    mean, low, high = study.crossed_bootstrap(a[:, None] + b)
    sd = np.sqrt(a.var() / 6 + b.var() / 250)
    assert mean == pytest.approx(a.mean() + b.mean(), abs=1e-12)
    assert (high - low) == pytest.approx(2 * 1.96 * sd, rel=0.05)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.1 * sd)


def test_questions_of_a_fact_are_averaged_first():
    row = {"mode": "on", "draw": 0, "em_a_equal": True}
    scored = [row | {"id": "x#0", "em_t": True}, row | {"id": "x#1", "em_t": False}, row | {"id": "y#0", "em_t": True}]
    assert study.by_fact(scored, "acc") == {"x": 0.5, "y": 1.0}
    assert study.by_fact(scored, "mis") == {"x": 0.5, "y": 0.0}


def test_label_shares_count_labels_not_segments():
    from annotate import CueAnnotator

    annotator = CueAnnotator({"retrieval": ["i recall"], "evaluation": ["i pick"], "framing": ["the task"]})
    text = "<think>\nThe task is x.\n\nI recall y. I pick y.\n\nI recall z.\n</think>\n\n<answer>y</answer>"
    row = {"text": text, "finish": "stop", "question": "q", "mode": "on", "prompt": ""}
    shares = study.label_shares([row], annotator)
    assert shares == {"framing": 0.25, "retrieval": 0.5, "evaluation": 0.25}


def test_every_dial_compares_with_a_plain_cell_of_the_same_world_and_seed():
    cells = study.cells()
    assert len(set(c.out for c in cells)) == len(cells)
    plain = {(c.world, c.seed) for c in cells if c.plain}
    assert all((c.world, c.seed) in plain for c in cells if c.world != "null")
    assert len(plain) == len(study.WORLDS) * len(study.SEEDS) >= 2 * 3
    first_dial = min(i for i, c in enumerate(cells) if not c.plain)
    assert all(c.plain for c in cells[:first_dial])
