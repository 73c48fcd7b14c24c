"""Figures and page against the numbers they are drawn from, worked by hand or by another route."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import em
import kto
from common.errors import InputError
from report import figures, page, story, summary

K = len(em.STATES)
SMALL = ("<start>", "framing", "retrieval", "evaluation", "<stop>")
F, R, E = "framing", "retrieval", "evaluation"


def embed(small: np.ndarray) -> list[list[float]]:
    """A 5-state matrix at its labels' places among all; the cells of labels it does not know stay 0."""
    at = [em.STATES.index(s) for s in SMALL]
    full = np.zeros((K, K))
    full[np.ix_(at, at)] = small
    return full.tolist()


@pytest.fixture(scope="module")
def transitions() -> dict[str, Any]:
    """Five traces over three labels: three chosen, two rejected."""
    pos = [[[F], [R], [R, E]], [[F], [R], [E]], [[F, R], [R], [E]]]
    neg = [[[F], [E], [F], [E]], [[F], [E, F], [E]]]
    out: dict[str, Any] = {"states": list(em.STATES), "n_pos": 3, "n_neg": 2}
    for suffix, traces in (("", pos + neg), ("_pos", pos), ("_neg", neg)):
        fitted = em.fit([o for t in traces for o in em.observations(t, SMALL)], states=SMALL)
        out |= {f"P{suffix}": embed(fitted.P), f"C{suffix}": embed(fitted.C)}
    return out


W = [0.9429, 2.2770, 1.0005]  # worked outside this program, with the numbers of `test_story_by_hand`
SEGMENTS = ["Okay, what is asked?", "Plates move & <b>shake</b> the ground.", "So: earthquakes, not $tides$."]


def train_row(transitions: dict[str, Any], chosen: bool = True) -> dict[str, Any]:
    """The training row of F -> R -> {R, E}."""
    text = "<think>\n" + "\n\n".join(SEGMENTS) + "\n</think>\n\n<answer>Earthquakes</answer>"
    spans = [[text.index(s), text.index(s) + len(s)] for s in SEGMENTS]
    labels = [[F], [R], [R, E]]
    own = np.array(transitions["P_pos" if chosen else "P_neg"])
    w = em.segment_weights(labels, own, np.array(transitions["P"]))
    return {"id": "sciq/17", "completion": text, "spans": spans, "label": chosen, "labels": labels, "w": w}


ANNOTATION = {
    "id": "sciq/17",
    "steps": [
        {"segments": [0], "labels": [F], "confidence": [9.0], "source": "agree"},
        {"segments": [1], "labels": [R], "confidence": [8.5], "source": "merge"},
        {"segments": [2], "labels": [E, R], "confidence": [7.5, 6.0], "source": "judge"},
    ],
}


def a_story(transitions: dict[str, Any], chosen: bool = True, **changes: Any) -> dict[str, Any]:
    """The worked example: steps .2, -.1, .3, answer .4, z0 .05, beta .1."""
    lambda_ = 1.0 if chosen else 1.5
    row = train_row(transitions, chosen) | changes
    return story.build_story(
        row,
        ANNOTATION,
        transitions,
        [0.2, -0.1, 0.3],
        0.4,
        0.05,
        0.1,
        lambda_,
        question="What phenomenon is primarily the result of plate tectonic motions?",
        golds=["earthquakes"],
        think_off_answer="<answer>Tides</answer>",
    )


def test_story_by_hand(transitions: dict[str, Any]) -> None:
    s = a_story(transitions)
    assert [g["p_class"] for g in s["segments"]] == pytest.approx([0.8713, 0.9004, 0.4580], abs=5e-5)
    assert [g["p_all"] for g in s["segments"]] == pytest.approx([0.9241, 0.3955, 0.4578], abs=5e-5)
    assert [g["w"] for g in s["segments"]] == pytest.approx(W, abs=5e-5)
    assert s["r_kto"] == pytest.approx(0.8, abs=1e-12)
    assert s["r_mralign"] == pytest.approx(0.66103, abs=5e-6)
    assert (s["v"], s["loss"]) == pytest.approx((0.515271, 0.484729), abs=5e-7)
    assert s["grad_answer"] == pytest.approx(-0.024977, abs=5e-7)
    # Products of the rounded numbers above, so the last digit may be off by one: unrounded the middle one is -.056871.
    assert s["grads"] == pytest.approx([-0.023551, -0.056872, -0.024989], abs=1.5e-6)
    assert s["segments"][2]["confidence"] == [6.0, 7.5]  # in the order of the row's labels, not of the annotation's
    assert [g["text"] for g in s["segments"]] == SEGMENTS
    assert s["answer"] == "<answer>Earthquakes</answer>"


@pytest.mark.parametrize("chosen", [True, False])
def test_story_gradient_is_autograds(transitions: dict[str, Any], chosen: bool) -> None:
    """Loss and per-token gradients equal those of the training loss, differentiated by torch in fp64."""
    s = a_story(transitions, chosen)
    logratio = torch.tensor([0.2, -0.1, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([g["w"] for g in s["segments"]] + [1.0], dtype=torch.float64)
    r, z0 = (w * logratio).sum()[None], torch.tensor(0.05, dtype=torch.float64)
    loss = kto.kto_loss(r, z0, torch.tensor([chosen]), 0.1, 1.0, 1.5)
    loss.sum().backward()
    assert s["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert [*s["grads"], s["grad_answer"]] == pytest.approx(logratio.grad.tolist(), rel=1e-12)
    assert s["v"] + s["loss"] == pytest.approx(1.0 if chosen else 1.5)


def test_sigmoid_does_not_overflow() -> None:
    assert [story.sigmoid(x) for x in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]
    assert story.sigmoid(1.3) == pytest.approx(1 / (1 + math.exp(-1.3)), rel=1e-15)


def test_steps_that_were_merged_or_skipped(transitions: dict[str, Any]) -> None:
    """Segments 1-2 are one step, 3 has no annotation: it and its successor have w = 1 and no probabilities."""
    text = "a\n\nb\n\nc\n\nd\n\ne</think>x"
    labels = [[F], [R], [], [E]]
    w = em.segment_weights(labels, np.array(transitions["P_pos"]), np.array(transitions["P"]))
    row = {"id": "m", "completion": text, "spans": [[0, 3], [3, 9], [9, 12], [12, 13]], "label": True}
    row |= {"labels": labels, "w": w}
    steps = [([0], F, 9.0), ([1, 2], R, 8.0), ([4], E, 7.0)]
    record = {"steps": [{"segments": s, "labels": [a], "confidence": [c], "source": "cue"} for s, a, c in steps]}
    got = story.step_records(row, record, transitions)
    assert [g["text"] for g in got] == ["a", "b\n\nc", "d", "e"]
    assert [g["confidence"] for g in got] == [[9.0], [8.0], [], [7.0]]
    assert [g["source"] for g in got] == ["cue", "cue", "none", "cue"]
    assert [g["w"] for g in got[2:]] == [1.0, 1.0]
    assert [g["p_class"] is None for g in got] == [False, False, True, True]


def test_files_of_different_runs(transitions: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"row 'sciq/17': its w in train.jsonl do not follow .* run the fit stage"):
        a_story(transitions, w=[1.0, 1.0, 1.0])
    P, P_pos = np.array(transitions["P"]), np.array(transitions["P_pos"])
    other = [[F], [R], [E]]
    with pytest.raises(InputError, match=r"row 'sciq/17': step 1 is \['evaluation'\] but annotated \['retrieval'\]"):
        labels = [[F], [E], [E]]
        a_story(transitions, labels=labels, w=em.segment_weights(labels, P_pos, P))
    a_story(transitions, labels=other, w=em.segment_weights(other, P_pos, P))  # one of the two labels was kept
    with pytest.raises(InputError, match=f"transitions: 'states' are not the {K} states"):
        figures.matrices(transitions | {"states": list(SMALL)})
    with pytest.raises(InputError, match="transitions: 'C_neg' is missing"):
        figures.matrices({k: v for k, v in transitions.items() if k != "C_neg"})
    with pytest.raises(InputError, match=r"transitions: 'P' has shape \(2, 2\)"):
        figures.matrices(transitions | {"P": [[1.0, 0.0], [0.0, 1.0]]})


# Figures: what is drawn is read back from the figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were about to be written."""
    drawn: list[Figure] = []
    for module in (figures, story):
        monkeypatch.setattr(module, "save", lambda figure, path, dpi=0: drawn.append(figure))
    return drawn


def test_weight_matrix_by_hand() -> None:
    P = np.zeros((K, K))
    P_class = np.zeros((K, K))
    P[1, 1:5], P_class[1, 1:5] = [0.2, 0.2, 0.2, 0.4], [0.1, 0.6, 0.05, 0.5]
    P[P == 0] = P_class[P_class == 0] = 0.01
    w, mark = figures.weight_matrix(P_class, P)
    assert w[1, 1:5] == pytest.approx([0.5, math.e, 1 / math.e, 1.25])
    assert mark[1, 1:5].tolist() == [0, 1, -1, 0]
    assert np.isnan(w[:, 0]).all() and np.isnan(w[-1, :-1]).all() and w[-1, -1] == 1
    assert np.abs(mark).sum() == 2


def cells(ax: Any) -> dict[tuple[int, int], str]:
    """(row, column) -> text of one heatmap."""
    return {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in ax.texts}


def test_transition_figure_shows_support_and_clips(drawn: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    t: dict[str, Any] = {"states": list(em.STATES), "n_pos": 7, "n_neg": 5}
    for name in ("P", "P_pos", "P_neg"):
        t[name] = rng.dirichlet(np.ones(K) * 50, size=K)
    for name in ("C", "C_pos", "C_neg"):
        t[name] = np.zeros((K, K))
    f, r = em.STATES.index(F), em.STATES.index(R)
    t["C"][f, r], t["C_pos"][f, r], t["C_neg"][f, r] = 12.6, 12.2, 0.4
    t["P"][f, r], t["P_pos"][f, r], t["P_neg"][f, r] = 0.10, 0.123, 0.01
    t["C_pos"][0, f], t["P"][0, f], t["P_pos"][0, f] = 23456.0, 0.1, 0.9
    figures.transition_figure({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in t.items()}, "x.png")
    p_pos, w_pos, p_neg, w_neg, p_all, _ = drawn[0].axes[:6]
    assert cells(p_all) == {(f, r): "13"}
    assert cells(p_pos) == {(f, r): "12", (0, f): "23k"}
    assert cells(p_neg) == {}  # support .4: faded and empty
    assert cells(w_pos) == {(f, r): "1.23", (0, f): "▲"}
    assert cells(w_neg) == {(f, r): "▼"}  # no support, but the clip shows
    strong, faded = w_pos.images[0].get_array()[0, f], w_neg.images[0].get_array()[f, r]
    assert strong[0] > 0.6 > 0.4 > strong[2], strong  # red at e
    assert faded[2] > faded[0] > 0.78, faded  # pale blue at 1/e without support
    assert [tick.get_text() for tick in p_all.get_yticklabels()][8] == "retrieval"
    assert any("7 chosen, 5 rejected" in text.get_text() for text in drawn[0].axes[5].texts)


def test_curves_are_the_metrics(drawn: list[Figure]) -> None:
    row = {"loss": 0.6, "kl": 0.1, "logps/chosen": -9.0, "grad_norm": 0.2, "learning_rate": 1e-4}
    rows = [row | {"step": 1, "rewards/chosen": 0.01}, row | {"step": 2}, row | {"step": 3, "rewards/chosen": 0.03}]
    figures.curves_figure({"sft": [row | {"step": 1, "loss": 2.0, "rewards/chosen": 0.0}], "kto": rows}, "x.png")
    lines = {ax.get_title(loc="left"): ax.lines for ax in drawn[0].axes}
    chosen = lines["rewards/chosen: β r"]
    assert [line.get_xydata().tolist() for line in chosen] == [[[1, 0.01], [3, 0.03]]]  # a step without the class: none
    assert [len(lines[t]) for t in ("loss (Eq. 4, 11)", "loss of SFT, nats a token", "grad_norm before clipping")] == [
        1,
        1,
        2,
    ]
    assert lines["loss of SFT, nats a token"][0].get_ydata().tolist() == [2.0]
    assert "logps/rejected, nats a row" not in lines  # nobody has it
    assert lines["grad_norm before clipping"][1].get_color() == figures.METHOD_COLOURS["kto"]


def test_weights_figure_counts_steps(drawn: list[Figure]) -> None:
    rows = [{"label": True, "w": [1.0, math.e, 1 / math.e]}, {"label": False, "w": [1.0]}]
    figures.weights_figure(rows, "x.png")
    heights = [[bar.get_height() for bar in ax.patches] for ax in drawn[0].axes]
    assert [i for i, h in enumerate(heights[0]) if h] == [0, 20, 40] and sum(heights[0]) == 3
    assert sum(heights[1]) == 1


def test_figures_are_deterministic(tmp_path: Path, transitions: dict[str, Any]) -> None:
    s = a_story(transitions)
    for name in ("a", "b"):
        story.one_question_figure(s, tmp_path / f"{name}.svg")
        figures.weights_figure([{"label": True, "w": W}], tmp_path / f"{name}.png")
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


@pytest.mark.parametrize("chosen", [True, False])
def test_one_question_has_every_number_as_text(tmp_path: Path, transitions: dict[str, Any], chosen: bool) -> None:
    s = a_story(transitions, chosen)
    story.one_question_figure(s, tmp_path / "x.svg")
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    joined = " ".join(texts)
    if chosen:
        for value in ("0.9429", "2.2770", "1.0005", "0.8713", "0.3955", "r = 0.66103", "KTO, all w = 1: 0.80000"):
            assert value in joined, value
        for value in ("v = 0.515271", "0.484729", "−0.024977", "−0.023551", "−0.056871", "−0.024989", "z0 = 0.0500"):
            assert value in joined, value
    for grad in (*s["grads"], s["grad_answer"]):
        assert f"{grad:+.6f}".replace("-", "−") in texts
    assert f"6  Pr({'P_pos' if chosen else 'P_neg'})".split() == " ".join(t for t in texts if "Pr(P_" in t).split()
    fonts = {re.search("font-family: ([^;]*)", t.get("style")).group(1) for t in root.iter() if t.tag.endswith("text")}
    assert fonts == {"'DejaVu Sans', 'Verdana', 'Helvetica', 'Arial', sans-serif"}  # never the browser's serif
    assert ("✓" in texts) and ("✗" in texts) and ("Tides" in texts)
    assert "Plates move & <b>shake</b> the" in joined and "$tides$" in joined  # nothing was taken for markup or maths


def test_one_question_fits_its_canvas(drawn: list[Figure], transitions: dict[str, Any]) -> None:
    """Long texts are cut; no text leaves the page or lies on another one."""
    s = a_story(transitions)
    s["question"] = "Which " + "very long question " * 30
    s["golds"] = ["a gold answer that is much too long for its box"] * 3
    s["answer"] = s["think_off_answer"] = "<answer>" + "x" * 400 + "</answer>"
    s["segments"][0] |= {
        "text": "word " * 200,
        "labels": ["self_verification", "causal_reasoning"],
        "logratio": -1234.5,
    }
    story.one_question_figure(s, "x.svg")
    figure = drawn[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in figure.axes[0].texts if t.get_text()]
    assert len(boxes) > 50
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        for other, its in boxes[:i]:
            wide = min(box.x1, its.x1) - max(box.x0, its.x0)
            high = min(box.y1, its.y1) - max(box.y0, its.y0)
            assert wide < 1 or high < 4, (text, other, wide, high)  # descenders may touch the next line


def test_wrap_keeps_all_words_or_says_so() -> None:
    text = "one two three four five six seven eight nine ten"
    lines = story.wrap(text, 80, 9, 99)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(story.text_width(line, 9) <= 80 for line in lines)
    cut = story.wrap(text, 80, 9, 2)
    assert len(cut) == 2 and cut[1].endswith("…") and story.text_width(cut[1], 9) <= 80
    assert "".join(story.wrap("x" * 60, 80, 9, 99)) == "x" * 60
    assert story.wrap("", 80, 9, 2) == []


# The page


class Checker(HTMLParser):
    """Collects what the page is made of and insists that every tag is closed in order."""

    VOID = {"meta", "br", "img", "input"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


EVIL = "<script>alert('x')</script> \"' onload=1 & \x00\x1b \ud800 </div></li> http://evil.example/x.png"


def trace(transitions: dict[str, Any]) -> dict[str, Any]:
    segments = story.step_records(train_row(transitions), ANNOTATION, transitions)
    segments[0] |= {"tokens": 6, "logratio": -0.25}
    for w in (1 / math.e, math.e, 1.0, 0.8, 1.25):
        segments.append(segments[1] | {"text": EVIL, "w": w})
    row = {"id": EVIL, "question": EVIL, "golds": ["Earthquake", EVIL], "chosen": True, "outcome": EVIL, "answer": EVIL}
    return row | {"segments": segments, "answer_logratio": 0.4}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, transitions: dict[str, Any]) -> tuple[str, Checker]:
    tmp_path = tmp_path_factory.mktemp("page")
    figures.weights_figure([{"label": True, "w": W}], tmp_path / "w.png")
    before, after = told(f"<think>Paris {EVIL}</think>Rome", [(F,)]), told("<think>Paris</think>Paris")
    sides = {"sides": {"thinkon": before, "mralign": after}}
    page.trace_page(
        [trace(transitions), trace(transitions) | {"chosen": False, "golds": []}],
        tmp_path / "report.html",
        EVIL,
        tables={"Results": [{"setting": EVIL, "Acc": 34.1}, {"setting": "kto", "Acc": 35.25, EVIL: None}], "None": []},
        images={EVIL: tmp_path / "w.png"},
        facts={"Receipts": {"command": EVIL, "lr": 5e-6}},
        pairs=[{"id": EVIL, "set": "t", "question": EVIL, "golds": ["Paris"], "kind": "found, then used"} | sides],
        changed=EVIL,
        lead=[EVIL, "The lead."],
        words={"Acc": EVIL},
        notes=[EVIL],
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    return text, checker


def test_page_is_whole_and_harmless(written: tuple[str, Checker]) -> None:
    text, checker = written
    assert checker.open == []
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in checker.tags}
    places = {attrs["id"] for _, attrs in checker.tags if "id" in attrs}
    for tag, attrs in checker.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        if "href" in attrs:  # inside the page only, and to a place that is there
            assert tag == "a" and attrs["href"][0] == "#" and attrs["href"][1:] in places
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert not re.search(r"(src|href|action)\s*=\s*[\"']?https?:", text)
    assert "default-src 'none'" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "<script>alert('x')</script>" in "".join(checker.texts)  # the reader sees it as text
    order = ["The lead.", 'class="note"', ">Words</h2>", ">Before and after</h2>", ">Traces</h2>", ">Results</h2>"]
    places = [text.index(part) for part in [*order, ">Figures</h2>", ">Receipts</h2>"]]
    assert places == sorted(places) and text.count("<h2 ") == 6  # the empty table has none
    assert "found, then used" in text and "wrong, gold in the thought" in text and "right, gold in the thought" in text
    assert text.count('class="note"') == 1 and "<i>framing</i><u>Paris</u>" in text


def test_page_colours_follow_w(written: tuple[str, Checker]) -> None:
    """Class and depth of each step, in order, from log w; the numbers stand beside and in the tip."""
    _, checker = written
    steps = [
        a for tag, a in checker.tags if tag == "div" and a.get("class", "").startswith("text ") and "tabindex" in a
    ]
    assert len(steps) == 16
    kinds = [a["class"].split()[1] for a in steps[:8]]
    assert kinds == ["down", "up", "even", "down", "up", "even", "down", "up"]
    depth = [float(a["style"].removeprefix("--a:")) for a in steps[:8]]
    expected = [0.6 * abs(math.log(w)) for w in (*W, 1 / math.e, math.e, 1.0, 0.8, 1.25)]
    assert depth == pytest.approx(expected, abs=6e-4)
    assert depth[3] == depth[4] == 0.6 == max(depth)
    titles = [a["title"] for tag, a in checker.tags if a.get("class") == "side" and "title" in a]
    assert titles[0].startswith("labels, confidence 0-10: framing 9; Pr(step | step before, P_pos): 0.8713; Pr(step |")
    assert titles[0].endswith("w: 0.9429; tokens: 6; log(π/π_ref), sum over its tokens: −0.2500")
    assert "w: 0.3679 (clipped at 1/e)" in titles[3] and "w: 2.7183 (clipped at e)" in titles[4]
    assert "P_neg): " in titles[8]
    beside = [t for t in checker.texts if re.fullmatch(r"\d\.\d{3}", t)]
    assert beside[:8] == ["0.943", "2.277", "1.000", "0.368", "2.718", "1.000", "0.800", "1.250"]


def test_gold_answers_are_underlined() -> None:
    def u(text: str, *golds: str) -> str:
        return page.underline_golds(text, golds)

    assert u("So earthQuakes < tides", "earthquakes") == "So <u>earthQuakes</u> &lt; tides"
    assert u("In the U.S., not us all", "US") == "In the <u>U.S</u>., not <u>us</u> all"
    assert u("the Beatles - beatles", "The Beatles") == "the <u>Beatles</u> - <u>beatles</u>"
    assert u("New York City, New  York", "New York", "New York City") == "<u>New York City</u>, <u>New  York</u>"
    assert u("a .* b", ".*", "--", "") == "a .* b"  # what normalises to nothing matches nothing
    assert u("calcium Ca", "Ca") == "calcium <u>Ca</u>"
    assert u("<u>", "u>") == "&lt;<u>u</u>&gt;"


def test_tables() -> None:
    assert page.column([74.8, 77.25, None, 3, "not run", -0.5]) == ["74.80", "77.25", "–", "3", "not run", "−0.50"]
    html = page.table_html([{"a": 1}, {"b": 2.5}])
    assert html.count("<td>–</td>") == 2 and "<th>a</th><th>b</th>" in html


# Evaluated completions -------------------------------------------------------------------------------------------


def told(text: str, labels: Any = None, **more: Any) -> dict[str, Any]:
    sample = {
        "id": "q",
        "mode": "on",
        "draw": 0,
        "question": "?",
        "answers": ["Paris"],
        "finish": "stop",
        "ids": [],
        "prompt": "",
    }
    return story.told(sample | {"text": text} | more, labels)


def test_told_is_what_was_written_and_how_it_scored() -> None:
    text = "<think>Is it Paris?\n\nYes.</think><answer>Paris</answer>"
    got = told(text, [(F,), (R, E)])
    assert got["segments"] == [{"text": "Is it Paris?", "labels": [F]}, {"text": "Yes.", "labels": [R, E]}]
    assert (got["answer"], got["verdict"], got["good"]) == ("Paris", "right, gold in the thought", True)
    assert [s["labels"] for s in told(text, [(F,)])["segments"]] == [[], []]  # labels of another segmentation
    got = told("<think>Is it Paris?</think><answer>Rome</answer>")
    assert (got["verdict"], got["good"]) == ("wrong, gold in the thought", False)
    sentence = {"id": "q", "mode": "on", "draw": 0, "question": "?", "answers": ["Zo\u00eb"], "finish": "stop"}
    sentence |= {"ids": [], "prompt": "", "text": "<think>Zoe?</think><answer>She is Zoe.</answer>"}
    assert not story.told(sentence, None)["good"] and story.told(sentence, None, "words", fold=True)["good"]
    got = told("<think>Is it Paris?", finish="length")
    assert (got["verdict"], got["answer"], got["good"]) == ("cut short", "", False)


def test_extremes_are_the_outer_fifteen_percent_of_supported_moves() -> None:
    w, support = np.full((K, K), np.nan), np.zeros((K, K))
    w[1, 1:17], support[1, 1:17] = np.arange(16), 1.0
    w[2, 1], support[2, 1] = 99.0, 0.4  # no support: not counted
    assert np.flatnonzero(figures.extremes(w, support)[1]).tolist() == [1, 2, 3, 14, 15, 16]
    assert not figures.extremes(w, support)[2].any() and not figures.extremes(w, support * 0).any()


def test_rows_with_few_cases_are_grey() -> None:
    text = page.table_html([{"": "a (n below 10)", "n": 9}, {"": "b", "n": 10}])
    assert text.count('<tr class="few">') == 1 and '<tr class="few"><td>a (n below 10)</td>' in text


def test_the_first_lines_say_what_came_out() -> None:
    """+29.2 points over ThinkOn for sure, +0.2 over KTO maybe: as the numbers given say."""
    metrics = {
        name: {"n": 516, "acc": {"share": acc}, "mis": {"share": mis}}
        for name, acc, mis in (("thinkon", 0.696, 0.3), ("kto", 0.986, 0.01), ("mralign", 0.988, 0.0))
    }
    differences = {
        "mralign - thinkon": {"acc": {"difference": 0.292, "low": 0.25, "high": 0.33}},
        "mralign - kto": {"acc": {"difference": 0.002, "low": -0.008, "high": 0.012}},
    }
    tally = {"all": {"questions": 1000, "chosen": 294, "rejected": 128}}
    scores = {"test": {"metrics": metrics, "differences": differences}}
    done, found, limits = summary.lead({"model": "mini/model"}, tally, scores, "mralign")
    assert "mini/model was aligned with MR-ALIGN" in done and "294" in done and "128" in done
    assert "516 completions each" in found and "from 69.6 to 98.8 %" in found and "from 30.0 to 0.0 %" in found
    assert "MR-ALIGN against ThinkOn: +29.2 points of Acc [+25.0, +33.0], which is more than" in found
    assert "MR-ALIGN against KTO: +0.2 points of Acc [−0.8, +1.2], which may be chance." in found
    assert "another seed" in summary.WORDS["95 %"] and "several seeds" in limits


def test_better_and_worse_by_hand() -> None:
    counts = summary.better_and_worse([True, True, False, False, False], [True, False, True, True, False])
    assert counts == {"better": 2, "worse": 1, "right in both": 1, "wrong in both": 1}
