"""Pictures of a run, drawn from the JSON and JSONL files it left: matrices, curves, one question, a page of traces.

  transition_figure    P, P_pos, P_neg and the weights of Eq. 10 as heatmaps, with the support of every cell
  weights_figure       how w is spread over the steps of the training rows
  curves_figure        metrics.jsonl of each method over the optimiser steps
  one_question_figure  one question on its way from text to weight update, with its numbers (`build_story`)
  trace_page           one HTML file: tables, these figures, and thinking traces coloured by log w

Nothing is computed here that training depends on. The same input gives the same bytes. The page needs no network, no
script and no other file. Blue is w < 1, red is w > 1 everywhere: those steps count less, or more, than in plain KTO.
"""

import bisect
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
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.textpath import TextToPath

import data
import em
import eval as evaluation
from common.errors import InputError
from common.files import atomic_write

INK, FAINT, RULE = "#1b1f24", "#68707a", "#c9ced4"
METHOD_COLOURS = {  # Okabe and Ito's palette: apart for all common kinds of colour blindness
    "sft": "#E69F00",
    "kto": "#0072B2",
    "mralign": "#D55E00",
    "shuffled": "#009E73",
}
SPARE_COLOURS = ("#CC79A7", "#56B4E9", "#8C6D1F", "#5B3A8E")
CHOSEN, REJECTED = "#00785A", "#A8440B"
MACRO_COLOURS = dict(zip(em.MACRO, ("#0072B2", "#8C6D1F", "#00785A", "#A33B7B"), strict=True))
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
    """P, P_pos, P_neg, C, C_pos, C_neg of a transitions.json as (17, 17) float64.

    Raises InputError when a matrix is missing or misshapen or the states are not the 17 of em.STATES.
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
            raise InputError(f"transitions: {name!r} has shape {out[name].shape}, must be (17, 17); {again}")
    return out


def weight_matrix(P_class: np.ndarray, P_all: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w of every single-label move and where it was clipped (Eq. 10).

    Returns w (17, 17) float64, NaN where the move is forbidden, and mark (17, 17) int: -1 at 1/e, +1 at e, else 0.
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
    owner = {label: strategy for strategy, labels in em.MACRO.items() for label in labels}
    for ticks in (ax.get_xticklabels(), ax.get_yticklabels()):
        for tick, state in zip(ticks, em.STATES, strict=False):  # no names at the side of an inner panel
            tick.set_color(MACRO_COLOURS[owner[state]] if state in owner else INK)
    edges = np.cumsum([1, *(len(labels) for labels in em.MACRO.values())]) - 0.5
    for edge in edges:
        ax.axhline(edge, color=FAINT, lw=0.6)
        ax.axvline(edge, color=FAINT, lw=0.6)
    for a, b in np.argwhere(em.mask(n) == 0):
        ax.add_patch(Rectangle((b - 0.5, a - 0.5), 1, 1, fc="#eef0f2", ec="#d5d9de", hatch="////", lw=0))


def extremes(w: np.ndarray, support: np.ndarray) -> np.ndarray:
    """(17, 17) bool: moves whose weight is among the highest or lowest 15 % of those with support (Fig. 7)."""
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
        figure = Figure(figsize=(15.6, 11.4))
        grid = figure.subplots(2, 3, gridspec_kw={"left": 0.085, "right": 0.995, "top": 0.97, "bottom": 0.095})
        figure.subplots_adjust(wspace=0.04, hspace=0.34)
        _probability_panel(grid[0, 0], m["P"], m["C"], "P: all traces", True)
        _probability_panel(grid[0, 1], m["P_pos"], m["C_pos"], "P_pos: chosen traces", False)
        _probability_panel(grid[0, 2], m["P_neg"], m["C_neg"], "P_neg: rejected traces", False)
        for ax, side, title in ((grid[1, 1], "pos", "chosen"), (grid[1, 2], "neg", "rejected")):
            w, mark = weight_matrix(m[f"P_{side}"], m["P"])
            _weight_panel(ax, w, mark, m[f"C_{side}"], f"w = P_{side} / P: {title} traces", side == "pos")
        _legend_panel(grid[1, 0], transitions["n_pos"], transitions["n_neg"])
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

PANELS = (  # field of metrics.jsonl, title, methods it is drawn for ("" = all that have the field)
    ("loss", "loss (Eq. 4, 11)", "-sft"),
    ("rewards/chosen", "rewards/chosen: β r", "-sft"),
    ("rewards/rejected", "rewards/rejected: β r", "-sft"),
    ("rewards/margins", "rewards/margins", "-sft"),
    ("kl", "kl (z0 before the clamp), nats", "-sft"),
    ("logps/chosen", "logps/chosen, nats a row", ""),
    ("logps/rejected", "logps/rejected, nats a row", ""),
    ("grad_norm", "grad_norm before clipping", ""),
    ("learning_rate", "learning_rate", ""),
    ("loss", "loss of SFT, nats a token", "sft"),
)


def curve(rows: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; a step that lacks it (a batch without that class) is left out."""
    points = [(row["step"], row[field]) for row in rows if field in row]
    return [step for step, _ in points], [value for _, value in points]


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for every method: known ones keep theirs, others take the spare ones, then the unused, in turn."""
    unused = [colour for method, colour in METHOD_COLOURS.items() if method not in methods]
    spare = itertools.cycle([*SPARE_COLOURS, *unused])
    return {m: METHOD_COLOURS[m] if m in METHOD_COLOURS else next(spare) for m in methods}


def curves_figure(metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Training curves of each method: one panel a metric, one line a method.

    metrics: method -> its metrics.jsonl rows. SFT's loss has another unit and gets its own panel.
    """
    palette = method_colours(list(metrics))
    drawn = []
    for field, title, only in PANELS:
        names = [m for m in metrics if only == "" or (m == "sft") == (only == "sft")]
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
        handles = [Line2D([], [], color=c, lw=2, label=m) for m, c in palette.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
        figure.supxlabel("optimiser step", fontsize=8, color=FAINT)
        save(figure, path)


# One step after another, with its numbers ------------------------------------------------------------------------


def step_records(
    train_row: Mapping[str, Any], annotation: Mapping[str, Any], transitions: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What is known about each step of a training row before training.

    train_row, annotation: the row of train.jsonl and of annotations.jsonl with the same id.
    Returns per step {"text", "labels", "confidence" [float] parallel to labels, "source", "p_class", "p_all", "w"};
    p_class and p_all are Pr(step | step before) (Eq. 7) under the class's matrix and under P, None for a step that no
    labelled move leads into. Raises InputError if labels or weights do not belong to these files.
    """
    where, again = f"row {train_row['id']!r}", "the files are of different runs; run the fit stage again"
    m = matrices(transitions)
    own = m["P_pos"] if train_row["label"] else m["P_neg"]
    weights = em.segment_weights(train_row["labels"], own, m["P"])  # Eq. 10
    if not np.allclose(weights, train_row["w"], rtol=0, atol=1e-6):
        raise InputError(f"{where}: its w in train.jsonl do not follow from transitions.json; {again}")
    starts = {s["segments"][0]: s for s in annotation["steps"]}
    records, segment = [], 0
    for (c0, c1), labels, move, w in zip(
        train_row["spans"], train_row["labels"], em.incoming(train_row["labels"]), weights, strict=True
    ):
        # A segment that the annotation skips is a step of its own, without labels.
        source = starts.get(segment, {"segments": [segment], "labels": [], "confidence": [], "source": "none"})
        sure = dict(zip(source["labels"], source["confidence"], strict=True))
        if not set(labels) <= set(sure):
            raise InputError(f"{where}: step {len(records)} is {labels} but annotated {source['labels']}; {again}")
        segment = source["segments"][-1] + 1
        records.append(
            {
                "text": train_row["completion"][c0:c1].strip(),
                "labels": list(labels),
                "confidence": [sure[label] for label in labels],
                "source": source["source"],
                "p_class": None if move is None else em.pair_prob(own, *move),  # Eq. 7
                "p_all": None if move is None else em.pair_prob(m["P"], *move),
                "w": w,
            }
        )
    return records


def told(sample: Mapping[str, Any], labels: Sequence[Sequence[str]] | None) -> dict[str, Any]:
    """One completion for the page: {"segments": [{text, labels}], "answer", "verdict", "good"}.

    sample: a sample record. labels: of every step where each segment is one, None where it was not labelled.
    """
    parsed = data.parse_sample(sample)
    spans = data.split_segments(sample["text"], *parsed.span) if parsed.span else []
    fits = labels is not None and len(labels) == len(spans)
    segments = [
        {"text": sample["text"][a:b].strip(), "labels": list(labels[k]) if fits else []}
        for k, (a, b) in enumerate(spans)
    ]
    scored = evaluation.score(sample)
    found = "in the thought" if scored["em_t"] else "not in the thought"
    if scored["truncated"]:
        verdict = "cut short"
    else:
        verdict = f"{'right' if scored['em_a_equal'] else 'wrong'}, gold {found}"
    good = scored["em_t"] and scored["em_a_equal"]
    return {"segments": segments, "answer": parsed.answer, "verdict": verdict, "good": good}


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))


def build_story(
    train_row: Mapping[str, Any],
    annotation: Mapping[str, Any],
    transitions: Mapping[str, Any],
    step_logratios: Sequence[float],
    answer_logratio: float,
    z0: float,
    beta: float,
    lambda_: float,
    *,
    question: str,
    golds: Sequence[str],
    think_off_answer: str,
) -> dict[str, Any]:
    """Every number between one training row and its gradient, in plain floats.

    step_logratios (S,): per step the sum over its tokens of log(pi / pi_ref), nats. answer_logratio: the same sum over
    all other completion tokens (tags, answer, end token), whose weight is 1. lambda_: that of the row's class.
    "grads" and "grad_answer" are d loss / d log pi(token) for a token of each step and of the answer, for this row
    alone (the batch mean divides them by the number of rows). Raises InputError as `step_records` does.
    """
    steps = step_records(train_row, annotation, transitions)
    for step, logratio in zip(steps, step_logratios, strict=True):
        step["logratio"] = float(logratio)
    r_kto = sum(s["logratio"] for s in steps) + answer_logratio  # Eq. 1
    r_mralign = sum(s["w"] * s["logratio"] for s in steps) + answer_logratio  # Eq. 9
    side = 1.0 if train_row["label"] else -1.0
    s = sigmoid(side * beta * (r_mralign - z0))
    slope = -side * lambda_ * beta * s * (1 - s)  # d loss / d r_theta, from Eq. 11-12
    return {
        "id": train_row["id"],
        "question": question,
        "golds": list(golds),
        "chosen": bool(train_row["label"]),
        "think_off_answer": think_off_answer,
        "segments": steps,
        "answer": train_row["completion"].partition("</think>")[2].strip(),
        "answer_logratio": float(answer_logratio),
        "r_kto": r_kto,
        "r_mralign": r_mralign,
        "z0": float(z0),
        "beta": float(beta),
        "lambda": float(lambda_),
        "v": lambda_ * s,  # Eq. 12
        "loss": lambda_ * (1 - s),  # Eq. 11
        "grad_answer": slope,
        "grads": [slope * step["w"] for step in steps],
    }


# The picture of one question -------------------------------------------------------------------------------------

_MEASURE = TextToPath()


def text_width(text: str, size: float) -> float:
    """Width of one line in points."""
    font = FontProperties(family="DejaVu Sans", size=size)
    return _MEASURE.get_text_width_height_descent(text, font, ismath=False)[0]


def _fitting(word: str, width: float, size: float) -> int:
    """How many characters of a word that is too long fit into a line, at least 1."""
    return max(1, bisect.bisect_right(range(len(word)), width, key=lambda n: text_width(word[:n], size)) - 1)


def wrap(text: str, width: float, size: float, max_lines: int) -> list[str]:
    """Break `text` into at most `max_lines` lines of `width` points; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in clean(text).split():
        if len(lines) > max_lines:
            break
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(joined, size) <= width:
            lines[-1] = joined
            continue
        while text_width(word, size) > width:  # a word longer than a line
            n = _fitting(word, width, size)
            lines.append(word[:n])
            word = word[n:]
        lines.append(word)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while text_width(last + " …", size) > width:
            last = last.rpartition(" ")[0] or last[:-1]
        lines = [*lines[: max_lines - 1], last + " …"]
    return lines


class _Canvas:
    """An axis whose unit is the point and whose y grows downwards, with the few things the picture is made of."""

    def __init__(self, width: float) -> None:
        self.width, self.figure = width, Figure()
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.axis("off")

    def finish(self, height: float) -> Figure:
        """The figure, cut to `height` points."""
        self.figure.set_size_inches(self.width / 72, height / 72)
        self.ax.set(xlim=(0, self.width), ylim=(height, 0))
        return self.figure

    def text(self, x: float, y: float, text: str, size: float = 9, color: str = INK, **look: Any) -> None:
        """One line; y is its baseline. Dollar signs mean nothing special."""
        self.ax.text(x, y, clean(text), fontsize=size, color=color, parse_math=False, va="baseline", **look)

    def lines(self, x: float, y: float, lines: Sequence[str], size: float = 9, color: str = INK) -> None:
        """Lines under one another, the first baseline at y."""
        for i, line in enumerate(lines):
            self.text(x, y + i * size * 1.3, line, size, color)

    def box(self, x: float, y: float, width: float, height: float, face: Any = "white", edge: str = RULE) -> None:
        """A rounded box; x, y is its upper left corner."""
        shape = "round,pad=0,rounding_size=5"
        self.ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc=face, ec=edge, lw=0.9))

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A small arrow."""
        head = "-|>,head_width=0.16,head_length=0.3"
        self.ax.annotate(
            "", end, start, arrowprops={"arrowstyle": head, "color": FAINT, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
        )


_WIDTH, _MARGIN, _TEXT = 800.0, 14.0, 262.0  # page, margin, width of a step's text; points
_LABELS_AT = _MARGIN + _TEXT + 26
_COLUMNS = (  # heading, note under it, right edge in points
    ("6  Pr({own})", "Eq. 7", 448.0),
    ("Pr(P)", "Eq. 7", 503.0),
    ("7  w", "Eq. 10", 552.0),
    ("8  log-ratio", "Σ log π/π_ref", 622.0),
    ("9  w × log-ratio", "Eq. 9", 698.0),
    ("11  gradient", "per token", 780.0),
)


def tint(w: float, strength: float = 1.0) -> tuple[float, float, float]:
    """The colour of a weight: blue below 1, white at 1, red above; strength < 1 mixes in white."""
    rgb = np.array(W_MAP(W_NORM(math.log(w)))[:3])
    red, green, blue = (1 - strength + strength * rgb).tolist()
    return red, green, blue


def plain_answer(completion: str) -> str:
    """The answer without its tags, for display."""
    return re.sub(r"</?answer>", "", completion).strip()


def _story_head(c: _Canvas, story: Mapping[str, Any], y: float) -> float:
    """Question, draws and verdict, left to right. Returns the y below them."""
    question = wrap(story["question"], 262, 10, 3)
    height = 35 + 13.0 * max(len(question), 2) - 11
    chosen = story["chosen"]
    colour = CHOSEN if chosen else REJECTED
    for x, width, title in (
        (_MARGIN, 284, "1  question"),
        (324, 246, "2  the same model, two ways"),
        (596, 190, "3  training row"),
    ):
        c.text(x, y + 8, title, 8, FAINT)
        c.box(x, y + 14, width, height, edge=colour if x == 596 else RULE)
    c.lines(_MARGIN + 10, y + 31, question, 10)
    gold = "".join(wrap("gold: " + " / ".join(story["golds"]), 262, 10, 1))
    c.text(_MARGIN + 10, y + 31 + 13 * len(question), gold, 10, FAINT)
    draws = (("thinking on", story["answer"], chosen), ("thinking off", story["think_off_answer"], not chosen))
    for i, (mode, answer, right) in enumerate(draws):
        c.text(334, y + 32 + 18 * i, mode, 9, FAINT)
        c.text(400, y + 32 + 18 * i, "✓" if right else "✗", 11, CHOSEN if right else REJECTED, weight="bold")
        c.text(416, y + 32 + 18 * i, "".join(wrap(plain_answer(answer), 146, 10, 1)), 10)
    c.text(606, y + 32, "chosen (D+)" if chosen else "rejected (D−)", 11, colour, weight="bold")
    c.text(606, y + 50, "thinking found the answer" if chosen else "thinking lost the answer", 9)
    c.arrow((298, y + 14 + height / 2), (323, y + 14 + height / 2))
    c.arrow((570, y + 14 + height / 2), (595, y + 14 + height / 2))
    c.arrow((691, y + 14 + height), (691, y + 14 + height + 17))
    return y + 14 + height + 30


def _story_row(
    c: _Canvas, y: float, height: float, lines: Sequence[str], labels: Sequence[str], numbers: Sequence[str], w: float
) -> None:
    """One line of the table: tinted text, labels, a number for each of _COLUMNS."""
    c.box(_MARGIN, y, _TEXT + 16, height - 5, face=tint(w, 0.55))
    c.lines(_MARGIN + 8, y + 14, lines, 8.5)
    c.lines(_LABELS_AT, y + 14, labels, 8.5)
    right = _COLUMNS[2][2]
    c.box(right - 42, y + 2.5, 46, 17, face=tint(w), edge="none")
    for i, ((_, _, right), text) in enumerate(zip(_COLUMNS, numbers, strict=True)):
        on_dark = i == 2 and abs(math.log(w)) > 0.75
        c.text(right, y + 14, text, 9, "white" if on_dark else INK, ha="right")


def _story_table(c: _Canvas, story: Mapping[str, Any], y: float) -> float:
    """One line a step and one for the answer. Returns the y below them."""
    c.text(_MARGIN, y, "4  the thought, step by step", 8, FAINT)
    c.text(_LABELS_AT, y, "5  labels", 8, FAINT)
    for title, note, right in _COLUMNS:
        c.text(right, y, title.format(own="P_pos" if story["chosen"] else "P_neg"), 8, FAINT, ha="right")
        c.text(right, y + 10, note, 6.5, FAINT, ha="right")
    y += 17
    for step, grad in zip(story["segments"], story["grads"], strict=True):
        lines = wrap(step["text"], _TEXT, 8.5, 3)
        labels = [label.replace("_", " ") for label in step["labels"]] or ["no label"]
        numbers = [number(step[name], 4) for name in ("p_class", "p_all", "w")]
        numbers += [number(step["logratio"], 4, True), number(step["w"] * step["logratio"], 4, True)]
        height = 13 + 11.05 * max(len(lines), len(labels))
        _story_row(c, y, height, lines, labels, [*numbers, number(grad, 6, True)], step["w"])
        y += height
    lines = wrap(plain_answer(story["answer"]), _TEXT, 8.5, 2)
    logratio = number(story["answer_logratio"], 4, True)
    numbers = ["", "", number(1.0, 4), logratio, logratio, number(story["grad_answer"], 6, True)]
    height = 13 + 11.05 * max(len(lines), 1)
    _story_row(c, y, height, lines, ["answer and tags"], numbers, 1.0)
    return y + height


def _story_foot(c: _Canvas, story: Mapping[str, Any], y: float) -> float:
    """Reward, value, loss and slope, left to right. Returns the y below them."""
    name, lam, beta = "λ_c" if story["chosen"] else "λ_r", f"{story['lambda']:g}", f"{story['beta']:g}"
    r, z0, v = number(story["r_mralign"], 5), number(story["z0"], 4), number(story["v"], 6)
    if story["chosen"]:
        gap, gap_in_numbers, sign = "r − z0", f"{r} − {z0}", "−"
    else:
        gap, gap_in_numbers, sign = "z0 − r", f"{z0} − ({r})", ""
    slope = number(story["grad_answer"], 6, True)
    boxes = (  # width, heading, number, formula, the formula in numbers
        (186, "reward, Eq. 9", f"r = {r}", "sum of column 9", f"KTO, all w = 1: {number(story['r_kto'], 5)}"),
        (
            222,
            f"value, Eq. 12;  z0 = {z0}, Eq. 2",
            f"v = {v}",
            f"{name} σ(β ({gap}))",
            f"{lam} · σ({beta} · ({gap_in_numbers}))",
        ),
        (136, "loss, Eq. 11", number(story["loss"], 6), f"{name} − v", f"{lam} − {v}"),
        (162, "slope", slope, f"∂loss/∂r = {sign}{name} β σ(1−σ)", "× w = column 11"),
    )
    c.text(_MARGIN, y + 8, "10  one number for the row", 8, FAINT)
    x = _MARGIN
    for width, heading, value, formula, in_numbers in boxes:
        if x > _MARGIN:
            c.arrow((x - 22, y + 47), (x - 1, y + 47))
        c.box(x, y + 14, width, 66)
        c.text(x + 10, y + 28, heading, 8, FAINT)
        c.text(x + 10, y + 44, value, 11.5, weight="bold")
        c.text(x + 10, y + 58, formula, 8.5)
        c.text(x + 10, y + 71, in_numbers, 8.5, FAINT)
        x += width + 22
    c.arrow((768, y + 14), (768, y - 3))  # back up to the gradient column
    return y + 80


def one_question_figure(story: Mapping[str, Any], path: str | Path) -> None:
    """Draw a `build_story`: question, draws, steps, labels, Pr, w, log-ratio, reward, loss, gradient.

    path: .svg (text stays text) or .png. Every number of the story is in the picture.
    """
    with style.context(["default", STYLE]):
        c = _Canvas(_WIDTH)
        y = _story_head(c, story, 8)
        y = _story_table(c, story, y)
        y = _story_foot(c, story, y + 4)
        save(c.finish(y + 12), path, dpi=150)
