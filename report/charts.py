"""Pictures of an evaluation, drawn from the JSON of analysis.py and eval.py.

  positions_figure  where in the thought the gold comes up first and last, right against wrong (Fig. 1)
  change_figure     transitions that alignment strengthened and weakened most, as a graph (Fig. 4)
  strata_figure     gain over the base model by what the base did with the question (Fig. 5)
  outcomes_figure   Acc of traces with and without each label

Every number drawn stands in the JSON. The same input gives the same bytes. Left out: matrices and curves (report.py).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

import em
from report.analysis import STRATA
from report.figures import (
    CHOSEN,
    FAINT,
    INK,
    MACRO_COLOURS,
    REJECTED,
    RULE,
    STYLE,
    called,
    method_colours,
    number,
    save,
)

Node = tuple[float, float]
FEW = 10  # a share of fewer questions than this is drawn grey


# Fig. 1 ----------------------------------------------------------------------------------------------------------


def positions_figure(positions: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """A line from the first to the last place of the gold for right and wrong answers.

    positions: name of a row, such as "nq_open, base" -> `analysis.positions`.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(11, 0.62 * len(positions) + 1.1), layout="constrained")
        ax = figure.subplots()
        for row, of in enumerate(positions.values()):
            for side, colour, up in (("right", CHOSEN, 0.17), ("wrong", REJECTED, -0.17)):
                p, y = of[side], len(positions) - 1 - row + up
                ax.plot([0, 100], [y, y], color="#eceef0", lw=5, solid_capstyle="round", zorder=0)
                if p["n"]:
                    ax.plot([p["first"], p["last"]], [y, y], color=colour, lw=2)
                    ax.plot(p["first"], y, "o", color=colour, markersize=5)
                    ax.plot(p["last"], y, "s", color=colour, markersize=5)
                    ax.text(p["first"] - 1.2, y, f"{p['first']:.1f}", ha="right", va="center", fontsize=7, color=INK)
                    ax.text(p["last"] + 1.2, y, f"{p['last']:.1f}", va="center", fontsize=7, color=INK)
                ax.text(106, y, f"{side}, n = {p['n']}", va="center", fontsize=7, color=colour)
        names = [
            f"{head}, {called(setting)}" if head else name
            for name in positions
            for head, _, setting in [name.rpartition(", ")]
        ]
        ax.set_yticks(range(len(positions)), names[::-1], fontsize=8.5)
        ax.set_xlim(-7, 122)
        ax.set_xticks(range(0, 101, 25), [f"{x} %" for x in range(0, 101, 25)])
        ax.set_title("● first and ■ last place of the right answer in the thought, mean", loc="left")
        ax.tick_params(length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        save(figure, path)


# Fig. 4 ----------------------------------------------------------------------------------------------------------


def places(states: Sequence[str]) -> dict[str, Node]:
    """A place on the unit circle for every state, clockwise from the top in their order."""
    angles = [math.pi / 2 - 2 * math.pi * k / len(states) for k in range(len(states))]
    return {state: (math.cos(a), math.sin(a)) for state, a in zip(states, angles, strict=True)}


def change_figure(change: Mapping[str, Any], before: str, after: str, path: str | Path) -> None:
    """Two graphs: the moves alignment strengthened most (solid) and weakened most (dashed), width by |difference|.

    change: `analysis.change`. A number is the difference of P in points; a faint one has an interval that holds 0.
    """
    most = max((abs(m["delta"]) for m in change["up"] + change["down"]), default=1.0)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(13, 5.5))
        axes = figure.subplots(1, 2, gridspec_kw={"left": 0, "right": 1, "top": 0.95, "bottom": 0.03, "wspace": 0})
        for ax, key, colour, line, title in (
            (axes[0], "up", CHOSEN, "-", f"likelier after alignment: {called(after)} − {called(before)}"),
            (axes[1], "down", REJECTED, "--", "less likely after alignment"),
        ):
            _graph(ax, change[key], places(change["states"]), colour, line, most)
            ax.set_title(f"{title}, the {len(change[key])} largest of P", fontsize=10)
        figure.text(
            0.5,
            0.015,
            f"P fitted on {change['n_before']} traces before and {change['n_after']} after; numbers are points of "
            "probability, faint where the 95 % interval holds 0",
            ha="center",
            color=FAINT,
        )
        save(figure, path)


def _graph(
    ax: Axes, moves: Sequence[Mapping[str, Any]], where: Mapping[str, Node], colour: str, line: str, most: float
) -> None:
    owner = {label: strategy for strategy, labels in em.TAXONOMY.items() for label in labels}
    used = {m["from"] for m in moves} | {m["to"] for m in moves}
    for m in moves:
        sure = m["low"] > 0 or m["high"] < 0
        a, b = where[m["from"]], where[m["to"]]
        text_at = _edge(ax, a, b, colour if sure else RULE, line, 0.8 + 4.2 * abs(m["delta"]) / most)
        shown = number(100 * m["delta"], 1, True)
        box = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.85}
        ax.text(*text_at, shown, fontsize=7, ha="center", va="center", color=INK if sure else FAINT, bbox=box, zorder=4)
    for state, (x, y) in where.items():
        tint = MACRO_COLOURS[owner[state]] if state in owner else INK
        ax.plot(x, y, "o", color=tint if state in used else RULE, markersize=9, zorder=3)
        side = "left" if x > 0.05 else "right" if x < -0.05 else "center"
        ax.text(1.09 * x, 1.09 * y, state.replace("_", " "), ha=side, va="center", fontsize=8.5, color=tint, zorder=5)
    ax.set_xlim(-1.75, 1.75)
    ax.set_ylim(-1.28, 1.28)
    ax.set_aspect("equal")
    ax.axis("off")


def _edge(ax: Axes, a: Node, b: Node, colour: str, line: str, width: float) -> Node:
    """An arrow from a to b, or a loop outwards when they are the same; returns the place of its number."""
    shape = {"arrowstyle": "-|>", "mutation_scale": 8 + 1.6 * width, "color": colour, "lw": width, "linestyle": line}
    if a == b:
        x, y = a
        side = (-0.11 * y, 0.11 * x)
        start, end = (0.96 * x + side[0], 0.96 * y + side[1]), (0.96 * x - side[0], 0.96 * y - side[1])
        ax.add_patch(FancyArrowPatch(start, end, connectionstyle="arc3,rad=-1.6", zorder=2, **shape))
        return 0.76 * x, 0.76 * y
    # A bend to one side, so that there and back are two arrows.
    bend = FancyArrowPatch(a, b, connectionstyle="arc3,rad=0.16", shrinkA=8, shrinkB=9, zorder=2, **shape)
    ax.add_patch(bend)
    middle = ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2)
    length = math.dist(a, b)
    away = max(0.08 * length, 0.12) / length  # the number of a short edge stands beside it
    return middle[0] + away * (b[1] - a[1]), middle[1] + away * (a[0] - b[0])


# Fig. 5 ----------------------------------------------------------------------------------------------------------


def strata_figure(strata: Mapping[str, Mapping[str, Mapping[str, Any]]], path: str | Path, over: str = "draws") -> None:
    """Bars of the gain in Acc by stratum, a panel a set, a colour a setting, whiskers the 95 % intervals.

    strata: set -> setting -> `analysis.strata`. A dot is one of several draws (over: what "draws" holds, draws or
    seeds), a tick across a bar the gain that chance alone gives. A stratum of fewer than FEW questions is grey.
    """
    palette = method_colours(list(dict.fromkeys(setting for of in strata.values() for setting in of)))
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(13, 3.6), layout="constrained")
        for ax, (name, of) in zip(figure.subplots(1, len(strata), squeeze=False)[0], strata.items(), strict=True):
            width = 0.8 / len(of)
            for k, (setting, parts) in enumerate(of.items()):
                for x, stratum in enumerate(STRATA):
                    colour = palette[setting] if parts[stratum]["n"] >= FEW else RULE
                    _bar(ax, x + (k - (len(of) - 1) / 2) * width, width, parts[stratum], colour)
            sizes = [next(iter(of.values()))[stratum]["n"] for stratum in STRATA]
            ax.set_xticks(range(3), [f"{s}\nn = {n}" for s, n in zip(STRATA, sizes, strict=True)])
            ax.axhline(0, color=FAINT, lw=0.8)
            ax.set_title(name, loc="left")
            ax.set_ylabel("Acc − Acc of ThinkOn, points")
            ax.spines[["top", "right"]].set_visible(False)
            ax.margins(y=0.14)
        handles = [Line2D([], [], color=c, lw=5, label=called(m)) for m, c in palette.items()]
        drawn = [part for of in strata.values() for parts in of.values() for part in parts.values()]
        if any(len(part["draws"]) > 1 for part in drawn):
            handles.append(Line2D([], [], color=INK, marker=".", lw=0, label=f"{over}, each alone"))
        if any(part["chance"] is not None for part in drawn):
            handles.append(Line2D([], [], color=INK, lw=1.5, label="ThinkOn, another draw: chance alone"))
        columns = min(len(handles), 6)
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)
        save(figure, path)


def _bar(ax: Axes, x: float, width: float, part: Mapping[str, Any], colour: str) -> None:
    if part["gain"] is None:
        return
    gain, low, high = (100 * part[key] for key in ("gain", "low", "high"))
    ax.bar(x, gain, width * 0.9, color=colour)
    ax.plot([x, x], [low, high], color=INK, lw=0.8)
    each = [100 * g for g in part["draws"] if g is not None]
    if len(part["draws"]) > 1:
        ax.plot([x + width * 0.25] * len(each), each, ".", color=INK, markersize=2.5)
    above = max(gain, high, *each) if gain >= 0 else min(gain, low, *each)
    ax.annotate(
        number(gain, 1, True),
        (x, above),
        xytext=(0, 3 if gain >= 0 else -3),
        textcoords="offset points",
        ha="center",
        va="bottom" if gain >= 0 else "top",
        fontsize=6.5,
    )
    if part["chance"] is not None:
        ax.plot([x - width * 0.45, x + width * 0.45], [100 * part["chance"]] * 2, color=INK, lw=1.5)


# Labels and outcomes ---------------------------------------------------------------------------------------------


def outcomes_figure(outcomes: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Acc of the traces with (dot) and without (ring) each label, with intervals; a panel a setting.

    outcomes: setting -> `analysis.label_outcomes`. Labels that no trace has are left out.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        axes = figure.subplots(1, len(outcomes), squeeze=False, sharey=True)[0]
        for ax, (name, of) in zip(axes, outcomes.items(), strict=True):
            for y, row in enumerate(of["labels"]):
                for part, shift, mark in ((row["with"], 0.15, "o"), (row["without"], -0.15, "o")):
                    if part and row["with"]:
                        full = part is row["with"]
                        colour = INK if full else FAINT
                        ax.plot([100 * part["low"], 100 * part["high"]], [y - shift] * 2, color=colour, lw=1)
                        face = colour if full else "white"
                        ax.plot(
                            100 * part["share"], y - shift, mark, color=colour, markerfacecolor=face, markersize=4.5
                        )
                if row["with"]:
                    ax.text(103, y, f"{row['with']['n']}", va="center", fontsize=7, color=FAINT)
            ax.set_yticks(range(len(of["labels"])), [r["name"].replace("_", " ") for r in of["labels"]])
            ax.set_ylim(len(of["labels"]) - 0.5, -0.5)
            ax.set_xlim(-3, 112)
            ax.set_xticks(range(0, 101, 25))
            ax.grid(axis="x", color="#eceef0", lw=0.6)
            ax.set_title(f"{called(name)}, {of['n']} traces", loc="left")
            ax.set_xlabel("Acc, %")
            ax.tick_params(length=0)
            ax.spines[["top", "right", "left"]].set_visible(False)
        figure.suptitle(
            "● traces with the label (their number at the right)   ○ traces without it", x=0.01, ha="left", fontsize=8.5
        )
        save(figure, path)


def percent(x: float | None) -> str:
    """A share as percent with one digit; a dash where there is none."""
    return number(None if x is None else 100 * x, 1)


def outcome_rows(outcomes: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """`analysis.label_outcomes` as rows of a table; part: "labels" or "moves"."""
    rows = []
    for row in outcomes[part]:
        line: dict[str, Any] = {part[:-1]: row["name"].replace("_", " ")}
        if "steps" in row:
            line["share of labels"] = f"{percent(row['steps'])} %"
        for side in ("with", "without"):
            s = row[side]
            line[f"traces {side}"] = s["n"] if s else 0
            line[f"Acc {side} (95 %)"] = (
                f"{percent(s['share'])} [{percent(s['low'])}, {percent(s['high'])}]" if s else "–"
            )
        rows.append(line)
    return rows


def strata_rows(strata: Mapping[str, Mapping[str, Any]], over: str = "draws") -> list[dict[str, Any]]:
    """setting -> `analysis.strata` as rows of a table, points; over: what "draws" holds, draws or seeds."""
    rows = []
    for setting, parts in strata.items():
        for stratum, p in parts.items():
            shown = [number(None if x is None else 100 * x, 1, True) for x in (p["gain"], p["low"], p["high"])]
            each = [100 * g for g in p["draws"] if g is not None]
            spread = f"{number(float(np.std(each, ddof=1)), 1)}" if len(each) > 1 else "–"
            few = f" (n below {FEW})" if p["n"] < FEW else ""
            row = {"setting": called(setting), "what ThinkOn did": f"{stratum}{few}", "questions": p["n"]}
            gain = f"{shown[0]} [{shown[1]}, {shown[2]}]"
            row |= {"gain in Acc, points (95 %)": gain, f"sd over {over}": spread}
            chance = None if p["chance"] is None else 100 * p["chance"]
            rows.append(row | {"by chance alone": number(chance, 1, True)})
    return rows
