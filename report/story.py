"""One question on its way from text to weight update: every number (`build_story`) and the picture of it."""

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import TextToPath

import data
import em
import eval as evaluation
from common.errors import InputError
from report.figures import CHOSEN, FAINT, INK, REJECTED, RULE, STYLE, W_MAP, W_NORM, clean, matrices, number, save


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


def told(
    sample: Mapping[str, Any], labels: Sequence[Sequence[str]] | None, matcher: str = "equal", fold: bool = False
) -> dict[str, Any]:
    """One completion for the page: {"segments": [{text, labels}], "answer", "verdict", "good"}.

    sample: a sample record. labels: of every step where each segment is one, None where it was not labelled.
    matcher, fold: when the answer is right (`eval.score`).
    """
    parsed = data.parse_sample(sample)
    spans = data.split_segments(sample["text"], *parsed.span) if parsed.span else []
    fits = labels is not None and len(labels) == len(spans)
    segments = [
        {"text": sample["text"][a:b].strip(), "labels": list(labels[k]) if fits else []}
        for k, (a, b) in enumerate(spans)
    ]
    scored = evaluation.score(sample, fold=fold)
    right = scored[f"em_a_{matcher}"]
    found = "in the thought" if scored["em_t"] else "not in the thought"
    if scored["truncated"]:
        verdict = "cut short"
    else:
        verdict = f"{'right' if right else 'wrong'}, gold {found}"
    good = scored["em_t"] and right
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


_WIDTH, _MARGIN, _TEXT = 800.0, 14.0, 262.0  # page, margin, width of a step's text; points
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
