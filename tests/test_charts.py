"""Figures of the evaluation show the numbers of the JSON they are drawn from."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

import em
from report import analysis, charts


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were about to be written."""
    figures: list[Figure] = []
    monkeypatch.setattr(charts, "save", lambda figure, path, dpi=0: figures.append(figure))
    return figures


def texts(ax) -> list[str]:
    return [t.get_text() for t in ax.texts]


def test_positions_are_those_of_the_json(drawn):
    rows = {
        "nq, base": {
            "right": {"n": 12, "first": 26.67, "last": 87.32},
            "wrong": {"n": 3, "first": 24.03, "last": 94.9},
        },
        "nq, kto": {"right": {"n": 0, "first": None, "last": None}, "wrong": {"n": 1, "first": 10.0, "last": 10.0}},
    }
    charts.positions_figure(rows, "x.png")
    (ax,) = drawn[0].axes
    assert {t for t in texts(ax) if "n =" not in t} == {"26.7", "87.3", "24.0", "94.9", "10.0"}
    assert [t for t in texts(ax) if "n =" in t] == ["right, n = 12", "wrong, n = 3", "right, n = 0", "wrong, n = 1"]
    lines = {tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2} - {(0, 100)}
    assert lines == {(26.67, 87.32), (24.03, 94.9), (10.0, 10.0)}
    heights = [line.get_ydata()[0] for line in ax.lines if tuple(line.get_xdata()) == (26.67, 87.32)]
    assert heights[0] > 0.5  # the first row is the upper one
    assert [t.get_text() for t in ax.get_yticklabels()] == ["nq, KTO", "nq, base"]


def part(n, gain, low, high, chance=None, draws=()):
    return {"n": n, "gain": gain, "low": low, "high": high, "chance": chance, "draws": list(draws)}


STRATA = {
    "nq": {
        "kto": dict(
            zip(
                analysis.STRATA,
                [part(9, -0.02, -0.05, 0.01), part(4, None, None, None), part(5, 0.5, 0.2, 0.7, 0.1)],
                strict=True,
            )
        ),
        "mralign": dict(
            zip(
                analysis.STRATA,
                [part(9, 0.0, 0, 0), part(4, 0.25, 0, 0.5), part(5, 0.8, 0.6, 1, 0.1, [0.7, 0.9])],
                strict=True,
            )
        ),
    }
}


def test_strata_bars_are_the_gains(drawn):
    charts.strata_figure(STRATA, "x.png")
    (ax,) = drawn[0].axes
    assert sorted(round(bar.get_height(), 9) for bar in ax.patches) == [-2.0, 0.0, 25.0, 50.0, 80.0]
    assert sorted(texts(ax)) == sorted(["−2.0", "+0.0", "+25.0", "+50.0", "+80.0"])
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "both correct\nn = 9",
        "both wrong\nn = 4",
        "inconsistent\nn = 5",
    ]
    whiskers = {tuple(line.get_ydata()) for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[-1]}
    assert (20.0, 70.0) in whiskers and (60.0, 100.0) in whiskers
    chance = [line for line in ax.lines if list(line.get_ydata()) == [10.0, 10.0]]
    assert len(chance) == 2
    names = [t.get_text() for t in drawn[0].legends[0].get_texts()]
    assert names == ["KTO", "MR-ALIGN", "draws, each alone", "ThinkOn, another draw: chance alone"]
    dots = [line for line in ax.lines if line.get_marker() == "."]
    assert [y for line in dots for y in line.get_ydata()] == [70.0, 90.0]


def test_strata_rows():
    rows = charts.strata_rows(STRATA["nq"])
    gain = "gain in Acc, points (95 %)"
    assert rows[2][gain] == "+50.0 [+20.0, +70.0]" and rows[2]["by chance alone"] == "+10.0"
    assert rows[1][gain] == "– [–, –]" and rows[5]["sd over draws"] == "14.1"
    assert rows[0]["what ThinkOn did"] == "both correct (n below 10)" and rows[0]["questions"] == 9


def test_change_graph_has_an_arrow_and_a_number_for_every_move(drawn):
    rng = np.random.default_rng(0)

    def traces(n, p):
        return [
            [("framing",), ("retrieval",) if rng.random() < p else ("backtracking",), ("evaluation",)] for _ in range(n)
        ]

    change = analysis.change(traces(60, 0.3), traces(60, 0.9), n_boot=20)
    charts.change_figure(change, "thinkon", "mralign", "x.png")
    for ax, key in zip(drawn[0].axes, ("up", "down"), strict=True):
        arrows = [p for p in ax.patches if type(p).__name__ == "FancyArrowPatch"]
        assert len(arrows) == len(change[key]) > 0
        numbers = [t for t in texts(ax) if re.fullmatch(r"[+−]\d+\.\d", t)]
        expected = [f"{100 * m['delta']:+.1f}".replace("-", "−") for m in change[key]]
        assert numbers == expected
        widths = [a.get_linewidth() for a in arrows]
        assert np.argmax(widths) == np.argmax([abs(m["delta"]) for m in change[key]])
        assert {s.replace("_", " ") for s in em.STATES} <= set(texts(ax))
    assert "60 traces before and 60 after" in drawn[0].texts[0].get_text()
    dashes = {p.get_linestyle() for p in drawn[0].axes[1].patches}
    assert dashes == {"--"}


def test_places_are_apart():
    where = charts.places(em.STATES)
    points = np.array(list(where.values()))
    gaps = np.linalg.norm(points[:, None] - points[None], axis=-1) + 9 * np.eye(len(points))
    assert where["<start>"] == pytest.approx((0, 1)) and gaps.min() == pytest.approx(2 * np.sin(np.pi / len(points)))


def test_outcomes_are_those_of_the_json(drawn):
    with_, without = (
        {"k": k, "n": n, "share": k / n, "low": k / n - 0.1, "high": k / n + 0.1} for k, n in ((3, 4), (1, 2))
    )
    labels = [{"name": "framing", "steps": 0.5, "with": with_, "without": without}]
    labels.append({"name": "self_verification", "steps": 0.0, "with": None, "without": with_})
    outcomes = {"thinkon": {"n": 6, "labels": labels, "moves": [labels[0] | {"name": "a → b"}]}}
    charts.outcomes_figure(outcomes, "x.png")
    (ax,) = drawn[0].axes
    dots = [(line.get_xdata()[0], line.get_markerfacecolor()) for line in ax.lines if line.get_marker() == "o"]
    assert [x for x, _ in dots] == [75.0, 50.0] and dots[1][1] == "white"
    assert texts(ax) == ["4"] and ax.get_title(loc="left") == "ThinkOn, 6 traces"
    rows = charts.outcome_rows(outcomes["thinkon"], "labels")
    assert rows[0] == {
        "label": "framing",
        "share of labels": "50.0 %",
        "traces with": 4,
        "Acc with (95 %)": "75.0 [65.0, 85.0]",
        "traces without": 2,
        "Acc without (95 %)": "50.0 [40.0, 60.0]",
    }
    assert rows[1]["Acc with (95 %)"] == "–" and charts.outcome_rows(outcomes["thinkon"], "moves")[0]["move"] == "a → b"


def test_figures_are_files_that_do_not_change(tmp_path):
    for name in ("a", "b"):
        charts.strata_figure(STRATA, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
