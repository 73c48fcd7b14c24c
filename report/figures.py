"""Pictures of a run, drawn from the JSON and JSONL files it left: matrices, weights, curves.

  transition_figure    P, P_pos, P_neg and the weights of Eq. 10 as heatmaps, with the support of every cell
  weights_figure       how w is spread over the steps of the training rows
  curves_figure        metrics.jsonl of each method over the optimiser steps

Nothing is computed here that training depends on. The same input gives the same bytes.
Blue is w < 1, red is w > 1 everywhere: those steps count less, or more, than in plain KTO.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

import em
import kto
from common.errors import InputError
from common.files import atomic_write

INK, FAINT, RULE = "#1b1f24", "#68707a", "#c9ced4"
# Okabe and Ito's palette, apart for all common kinds of colour blindness, and three more; methods from the left,
# other settings from the right.
COLOURS = ("#E69F00", "#0072B2", "#D55E00", "#009E73", "#5B3A8E", "#8C6D1F", "#56B4E9", "#CC79A7")
METHOD_COLOURS = dict(zip(kto.LOSSES, itertools.cycle(COLOURS), strict=False))
CHOSEN, REJECTED = "#00785A", "#A8440B"
SETTINGS = {  # what every table, figure and sentence calls a setting
    "thinkoff": "ThinkOff",
    "thinkon": "ThinkOn",
    "refine": "Self-Refine",
    **{method: loss.title for method, loss in kto.LOSSES.items()},
    "thinkon+ret": "ThinkOn + Ret",
    "mralign+ret": "MR-ALIGN + Ret",
}
MACRO_COLOURS = dict(
    zip(em.TAXONOMY, itertools.cycle(("#0072B2", "#8C6D1F", "#00785A", "#A33B7B", "#5B3A8E", "#9A3412")))
)
W_MAP = colors.LinearSegmentedColormap.from_list("w", ["#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b"])
W_NORM = colors.Normalize(-1.0, 1.0)  # log w at the clips of Eq. 10
W_TICKS, W_TICK_TEXTS = (1 / math.e, 0.5, 0.75, 1, 1.5, 2, math.e), ("1/e", ".5", ".75", "1", "1.5", "2", "e")
STYLE = {
    # DejaVu ships with matplotlib, so every machine draws the same; the others are for browsers that show our SVG.
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial", "sans-serif"],
    "font.size": 8,
    "axes.titlesize": 9.5,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "mralign",
}


def called(setting: str) -> str:
    """What readers see of a setting.

    >>> called("mralign"), called("kto+ret"), called("lambda_r = 2")
    ('MR-ALIGN', 'KTO + Ret', 'lambda_r = 2')
    """
    if setting in SETTINGS:
        return SETTINGS[setting]
    bare = setting.removesuffix("+ret")
    return f"{SETTINGS[bare]} + Ret" if bare in SETTINGS else setting


def number(x: float | None, digits: int, sign: bool = False) -> str:
    """`x` with a fixed number of digits and a true minus sign; an en dash where there is none."""
    return "–" if x is None else f"{x:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def clean(text: str) -> str:
    """`text` without what XML and fonts cannot carry: control characters and lone surrogates become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def save(figure: Figure, path: str | Path, dpi: int = 130) -> None:
    """Write a figure as PNG or SVG, by the ending of `path`, without dates or versions in it."""
    kind = Path(path).suffix[1:]
    assert kind in ("png", "svg"), path
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format=kind, dpi=dpi, metadata=metadata, facecolor="white")


# Transition matrices ---------------------------------------------------------------------------------------------


def matrices(transitions: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """P, P_pos, P_neg, C, C_pos, C_neg of a transitions.json as (K, K) float64.

    Raises InputError when a matrix is missing or misshapen or the states are not those of em.STATES.
    """
    again = "run the fit stage again"
    if list(transitions.get("states", [])) != list(em.STATES):
        raise InputError(f"transitions: 'states' are not the {len(em.STATES)} states of the method; {again}")
    out = {}
    for name in ("P", "P_pos", "P_neg", "C", "C_pos", "C_neg"):
        if name not in transitions:
            raise InputError(f"transitions: {name!r} is missing; {again}")
        out[name] = np.array(transitions[name], dtype=np.float64)
        if out[name].shape != (len(em.STATES),) * 2:
            size = len(em.STATES)
            raise InputError(f"transitions: {name!r} has shape {out[name].shape}, must be {size} by {size}; {again}")
    return out


def weight_matrix(P_class: np.ndarray, P_all: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w of every single-label move and where it was clipped (Eq. 10).

    Returns w (K, K) float64, NaN where the move is forbidden, and mark (K, K) int: -1 at 1/e, +1 at e, else 0.
    """
    allowed = em.mask(len(P_all)) > 0
    ratio = np.divide(P_class, P_all, out=np.full_like(P_all, np.nan), where=allowed)
    low, high = em.CLIP
    mark = (ratio >= high).astype(int) - (ratio <= low).astype(int)
    return np.clip(ratio, low, high), mark


def _count(x: float) -> str:
    return f"{x / 1000:.0f}k" if x >= 9999.5 else f"{x:.0f}"


def _frame(ax: Axes, title: str, left: bool) -> None:
    """State names on both axes, coloured by macro strategy, and lines between the strategies."""
    n = len(em.STATES)
    names = [s.replace("_", " ") for s in em.STATES]
    ax.set_title(title, loc="left", color=INK)
    ax.set_xticks(range(n), names, rotation=90, fontsize=7)
    ax.set_yticks(range(n), names if left else [], fontsize=7)
    ax.tick_params(length=0, pad=2)
    owner = {label: strategy for strategy, labels in em.TAXONOMY.items() for label in labels}
    for ticks in (ax.get_xticklabels(), ax.get_yticklabels()):
        for tick, state in zip(ticks, em.STATES, strict=False):  # no names at the side of an inner panel
            tick.set_color(MACRO_COLOURS[owner[state]] if state in owner else INK)
    edges = np.cumsum([1, *(len(labels) for labels in em.TAXONOMY.values())]) - 0.5
    for edge in edges:
        ax.axhline(edge, color=FAINT, lw=0.6)
        ax.axvline(edge, color=FAINT, lw=0.6)
    for a, b in np.argwhere(em.mask(n) == 0):
        ax.add_patch(Rectangle((b - 0.5, a - 0.5), 1, 1, fc="#eef0f2", ec="#d5d9de", hatch="////", lw=0))


def extremes(w: np.ndarray, support: np.ndarray) -> np.ndarray:
    """(K, K) bool: moves whose weight is among the highest or lowest 15 % of those with support (Fig. 7)."""
    seen = ~np.isnan(w) & (support >= 1)
    if not seen.any():
        return seen
    low, high = np.quantile(w[seen], [0.15, 0.85])
    return seen & ((w <= low) | (w >= high))


def _cells(ax: Axes, rgba: np.ndarray, texts: np.ndarray, support: np.ndarray, bold: np.ndarray | None = None) -> None:
    """Coloured cells with a text in each; cells with support below 1 are faded and stay empty."""
    rgba = rgba.copy()
    faded = support < 1
    rgba[faded, :3] = 0.22 * rgba[faded, :3] + 0.78  # towards white
    ax.imshow(rgba, interpolation="nearest")
    dark = rgba[..., :3] @ [0.299, 0.587, 0.114] < 0.55
    for (a, b), text in np.ndenumerate(texts):
        if text:
            weight = "bold" if bold is not None and bold[a, b] else "normal"
            tint = "white" if dark[a, b] else INK
            ax.text(b, a, text, ha="center", va="center_baseline", fontsize=6, color=tint, weight=weight)


def probability_colours(P: np.ndarray) -> np.ndarray:
    """RGBA of probabilities on a square-root scale, so that .01 and .05 still differ."""
    return matplotlib.colormaps["Purples"](np.sqrt(P) * 0.92)


def _probability_panel(ax: Axes, P: np.ndarray, C: np.ndarray, title: str, left: bool) -> None:
    """P as colour, rounded soft counts as numbers."""
    texts = np.where(C >= 1, np.vectorize(_count)(C), "")
    _cells(ax, probability_colours(P), texts, C)
    _frame(ax, title, left)


def _weight_panel(ax: Axes, w: np.ndarray, mark: np.ndarray, C: np.ndarray, title: str, left: bool) -> None:
    """log w as colour; a triangle where it is clipped, else w as a number where the class has support."""
    rgba = W_MAP(W_NORM(np.log(np.where(np.isnan(w), 1.0, w))))
    texts = np.where(C >= 1, np.vectorize(lambda x: f"{x:.2f}".removeprefix("0"))(w), "")
    texts = np.where(mark > 0, "▲", np.where(mark < 0, "▼", texts))
    _cells(ax, rgba, np.where(np.isnan(w), "", texts), C, extremes(w, C))
    _frame(ax, title, left)


def _colour_bar(ax: Axes, y: float, title: str, rgba: np.ndarray, ticks: Mapping[float, str]) -> None:
    """A horizontal bar of colours (n, 4); ticks: place from 0 to 1 -> text."""
    bar = ax.inset_axes((-0.22, y, 0.62, 0.04))
    bar.imshow(rgba[None], aspect="auto", extent=(0, 1, 0, 1))
    bar.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
    bar.set_yticks([])
    bar.set_title(title, fontsize=8, loc="left", pad=2)


def _legend_panel(ax: Axes, n_pos: int, n_neg: int) -> None:
    """How to read the five matrices: what colours, numbers and marks mean, and the macro strategies."""
    ax.axis("off")
    lines = (
        "Row: the step before.  Column: the step after.",
        "P: colour = Pr(after | before), number = soft count of such moves.",
        "w: colour = log w, number = w; it multiplies every token of the step after.",
        "▲ clipped at e      ▼ clipped at 1/e      hatched: move forbidden",
        "Bold: the highest and the lowest 15 % of w.",
        "Faded: fewer than one such move in that set of traces.",
        "A move into <stop> is counted but weights no token.",
        f"Traces: {n_pos} chosen, {n_neg} rejected.",
    )
    for i, line in enumerate(lines):
        ax.text(-0.22, 0.98 - 0.06 * i, line, fontsize=8, transform=ax.transAxes)
    handles = [Patch(color=colour, label=strategy) for strategy, colour in MACRO_COLOURS.items()]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.26, 0.53), frameon=False, fontsize=8)
    places = np.linspace(0, 1, 256)
    _colour_bar(ax, 0.19, "P", probability_colours(places), {0: "0", 0.25: ".25", 0.5: ".5", 0.75: ".75", 1: "1"})
    ticks = {(math.log(w) + 1) / 2: text for w, text in zip(W_TICKS, W_TICK_TEXTS, strict=True)}
    _colour_bar(ax, 0.02, "w", W_MAP(places), ticks)


def transition_figure(transitions: Mapping[str, Any], path: str | Path) -> None:
    """Heatmaps of P, P_pos, P_neg and, below, of the weights both classes get from them.

    transitions: a transitions.json. path: .png or .svg. Raises InputError on a malformed input.
    """
    m = matrices(transitions)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(10.4, 16.6))  # at the width of a page (1366 px) a number is 10 px high
        grid = figure.subplots(3, 2, gridspec_kw={"left": 0.125, "right": 0.995, "top": 0.98, "bottom": 0.065})
        figure.subplots_adjust(wspace=0.04, hspace=0.3)
        for row, side, title in ((0, "pos", "chosen"), (1, "neg", "rejected")):
            w, mark = weight_matrix(m[f"P_{side}"], m["P"])
            _probability_panel(grid[row, 0], m[f"P_{side}"], m[f"C_{side}"], f"P_{side}: {title} traces", True)
            _weight_panel(grid[row, 1], w, mark, m[f"C_{side}"], f"w = P_{side} / P: {title} traces", False)
        _probability_panel(grid[2, 0], m["P"], m["C"], "P: all traces", True)
        _legend_panel(grid[2, 1], transitions["n_pos"], transitions["n_neg"])
        save(figure, path)


# Weights of the training rows ------------------------------------------------------------------------------------


def weights_figure(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Histogram of log w over the steps of train.jsonl, one panel a class."""
    edges = np.linspace(-1, 1, 42)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(13, 2.9), layout="constrained")
        for ax, (name, side) in zip(figure.subplots(1, 2), (("chosen", True), ("rejected", False)), strict=True):
            w = np.array([w for r in rows if r["label"] is side for w in r["w"]])
            heights, _ = np.histogram(np.clip(np.log(w), -1, 1), edges)
            centres = (edges[1:] + edges[:-1]) / 2
            ax.bar(centres, heights, width=edges[1] - edges[0], color=W_MAP(W_NORM(centres)), ec=FAINT, lw=0.4)
            ax.set_xticks(np.log(W_TICKS), W_TICK_TEXTS)
            ax.set_title(f"w of the {len(w)} steps of {name} traces", loc="left")
            ax.set_ylabel("steps")
            ax.spines[["top", "right"]].set_visible(False)
        save(figure, path)


# Training curves -------------------------------------------------------------------------------------------------

PANELS = (  # field of metrics.jsonl, title, drawn for methods with a reference (True), without (False), all (None)
    ("loss", "loss (Eq. 4, 11)", True),
    ("rewards/chosen", "rewards/chosen: β r", True),
    ("rewards/rejected", "rewards/rejected: β r", True),
    ("rewards/margins", "rewards/margins", True),
    ("kl", "kl (z0 before the clamp), nats", True),
    ("logps/chosen", "logps/chosen, nats a row", None),
    ("logps/rejected", "logps/rejected, nats a row", None),
    ("grad_norm", "grad_norm before clipping", None),
    ("learning_rate", "learning_rate", None),
    ("loss", "loss of SFT, nats a token", False),
)


def curve(rows: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; a step that lacks it (a batch without that class) is left out."""
    points = [(row["step"], row[field]) for row in rows if field in row]
    return [step for step, _ in points], [value for _, value in points]


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for every method: those of LOSSES keep theirs, others take what is left, in turn."""
    used = {METHOD_COLOURS[m] for m in methods if m in METHOD_COLOURS}
    spare = itertools.cycle([*(c for c in COLOURS[::-1] if c not in used), *COLOURS])
    return {m: METHOD_COLOURS[m] if m in METHOD_COLOURS else next(spare) for m in methods}


def curves_figure(metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Training curves of each method: one panel a metric, one line a method.

    metrics: method -> its metrics.jsonl rows. SFT's loss has another unit and gets its own panel.
    """
    palette = method_colours(list(metrics))
    drawn = []
    for field, title, reference in PANELS:
        names = [m for m in metrics if reference is None or kto.LOSSES[m].reference is reference]
        lines = {m: curve(metrics[m], field) for m in names}
        drawn.append((title, {m: line for m, line in lines.items() if line[0]}))
    drawn = [(title, lines) for title, lines in drawn if lines]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(13, 2.5 * math.ceil(len(drawn) / 4) + 0.5), layout="constrained")
        axes = figure.subplots(math.ceil(len(drawn) / 4), 4, squeeze=False).ravel()
        for ax in axes[len(drawn) :]:
            ax.axis("off")
        for ax, (title, lines) in zip(axes, drawn, strict=False):
            for method, (steps, values) in lines.items():
                dot = "." if len(steps) < 40 else ""
                ax.plot(steps, values, color=palette[method], lw=1.4, marker=dot, markersize=3)
            ax.set_title(title, loc="left")
            ax.grid(color="#eceef0", lw=0.6)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            ax.ticklabel_format(axis="y", scilimits=(-3, 4))
        handles = [Line2D([], [], color=c, lw=2, label=called(m)) for m, c in palette.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
        figure.supxlabel("optimiser step", fontsize=8, color=FAINT)
        save(figure, path)
