"""One self-contained HTML page about a run: tables, figures, and thinking traces coloured by log w.

The page needs no network, no script and no other file, and its security policy forbids them: it shows text that a model
wrote. Blue is w < 1, red is w > 1, as in report.py. The same input gives the same bytes.
"""

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import em
from common.files import atomic_write
from report.figures import called, clean, number
from report.story import plain_answer

_CSS = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b1f24; --faint: #5d6670; --rule: #d5d9de; --card: #f6f7f9;
  --down: 33 102 172; --up: 190 40 50; --good: #00785a; --bad: #a8440b }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --ink: #e6e9ec; --faint: #9aa4ae; --rule: #343b43;
  --card: #1c2126; --down: 70 140 220; --up: 225 80 80; --good: #3fbf95; --bad: #e8945a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 74rem; padding: 1.2rem 1.5rem 4rem; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .3rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 }
p { margin: .3rem 0 }
.faint { color: var(--faint) }

.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap }
th { color: var(--faint); font-weight: 500 }
th:first-child, td:first-child { text-align: left }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .1rem 1.5rem; margin: .2rem 0;
  font-size: .87rem }
dl div { display: flex; gap: .6rem; border-bottom: 1px solid var(--rule); padding: .12rem 0; min-width: 0 }
dl .long { grid-column: 1 / -1 }
dt { color: var(--faint); flex: none }
dd { margin: 0; overflow-wrap: anywhere }

figure { margin: .6rem 0 1.4rem }
figcaption { font-size: .87rem; color: var(--faint) }
figure input { position: absolute; opacity: 0 }
figure div { overflow-x: auto; border-radius: 6px; background: #fff }
figure img { display: block; width: 100%; min-width: 46rem; cursor: zoom-in }
figure input:checked + div img { width: auto; max-width: none; cursor: zoom-out }
figure input:focus-visible + div { outline: 2px solid var(--faint) }

.lead { max-width: 62rem }
.few { color: var(--faint) }
.note { border-left: 3px solid var(--bad); padding: .1rem .7rem; margin: .4rem 0 }
nav { font-size: .87rem; columns: 3 16rem; margin: .8rem 0 }
nav a { display: block; color: inherit; text-decoration-color: var(--rule) }
details { margin: .35rem 0 }
summary { cursor: pointer; font-weight: 600 }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem }
.two h4 { margin: .5rem 0 .2rem; font-size: .87rem; color: var(--faint); font-weight: 500 }
.two .text { margin: .2rem 0 }
.two i { display: block; font-size: .75rem; font-style: normal; color: var(--faint) }

.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; align-items: center; font-size: .87rem }
.bar { display: inline-flex; vertical-align: middle; margin: 0 .4rem }
.bar i { width: 1.5rem; height: .9rem }
.trace { border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; margin: 1rem 0 }
.verdict { font-weight: 600 }
.good { color: var(--good) }
.bad { color: var(--bad) }
ol { list-style: none; margin: .6rem 0 0; padding: 0 }
.step { position: relative; display: grid; grid-template-columns: 11.5rem 1fr; gap: .8rem; margin: .2rem 0 }
.side { font-size: .78rem; line-height: 1.35; color: var(--faint); text-align: right; padding-top: .2rem }
.side b { color: var(--ink); font-variant-numeric: tabular-nums }
.text { padding: .2rem .6rem; border-left: 3px solid var(--rule); border-radius: 3px; outline-offset: 1px;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.text:focus { outline: 2px solid var(--faint) }
.text u { text-decoration-thickness: 2px; text-underline-offset: 3px }
.down { background: rgb(var(--down) / var(--a)) }
.up { background: rgb(var(--up) / var(--a)) }
.text.down { border-color: rgb(var(--down)) }
.text.up { border-color: rgb(var(--up)) }
.even, .answer { background: var(--card) }
.tip { display: none; position: absolute; z-index: 2; left: 12.4rem; top: 100%; margin-top: 2px; padding: .4rem .7rem;
  background: var(--bg); border: 1px solid var(--faint); border-radius: 6px; box-shadow: 0 4px 14px rgb(0 0 0 / .25) }
.tip td, .tip th { padding: .05rem .9rem .05rem 0; border: 0; text-align: left; white-space: normal }
.text:hover + .tip, .text:focus + .tip { display: block }
@media (max-width: 44rem) {
  .two { grid-template-columns: 1fr }
  .step { grid-template-columns: 1fr; gap: 0 }
  .side { text-align: left }
  .side br { display: none }
  .tip { left: 0 }
}
@media print {
  :root { color-scheme: light; --bg: #fff; --ink: #000; --faint: #555; --rule: #ccc; --card: #f4f4f4;
    --down: 33 102 172; --up: 190 40 50; --good: #00785a; --bad: #a8440b }
  body { max-width: none; padding: 0; font-size: 10pt }
  .wide { overflow: visible }
  table { font-size: 8pt }
  @page { size: A4 landscape; margin: 12mm }
  th { white-space: normal }
  th, td { padding-right: .5rem }
  .step, figure, tr { break-inside: avoid }
  h2, h3, .head { break-after: avoid }
  .tip, nav { display: none !important }
  details::details-content { content-visibility: visible; display: block }
  .two .text, .two h4 { break-inside: avoid }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


def escape(value: Any) -> str:
    """`value` as HTML text or attribute: markup, quotes and characters that HTML forbids are made harmless."""
    return html.escape(clean(str(value)), quote=True)


def colour_class(w: float) -> tuple[str, float]:
    """The class of a step's background, "down" w < 1, "up" w > 1, "even", and its opacity, proportional to |log w|."""
    depth = round(min(abs(math.log(w)), 1.0) * 0.6, 3)
    return ("even" if depth < 0.006 else "up" if w > 1 else "down"), depth


def underline_golds(text: str, golds: Sequence[str]) -> str:
    """`text` escaped, with every gold answer underlined.

    Case, punctuation inside a gold and an article before it do not matter; a gold of one or two letters must be a word
    of its own. This is for the eye: the score is eval's.
    """
    patterns = []
    for gold in sorted(golds, key=len, reverse=True):
        bare = re.sub(r"^(the|an?)\s+", "", gold.strip(), flags=re.I)
        words = [w for w in (re.sub(r"\W", "", word) for word in bare.split()) if w]
        if words:
            pattern = r"[\W_]+".join(r"[^\w\s]*".join(word) for word in words)  # \w needs no escaping
            patterns.append(rf"(?<!\w){pattern}(?!\w)" if len("".join(words)) < 3 else pattern)
    if not patterns:
        return escape(text)
    parts = re.split(f"({'|'.join(patterns)})", text, flags=re.I)  # odd parts are the matches
    return "".join(f"<u>{escape(part)}</u>" if i % 2 else escape(part) for i, part in enumerate(parts))


def column(values: Sequence[Any]) -> list[str]:
    """One column of a table as text: its floats share their digits, what is missing is a dash.

    column([74.8, 77.25, None, 3, "not run"]) -> ["74.80", "77.25", "–", "3", "not run"]
    """
    shown = [f"{v:.4g}" for v in values if isinstance(v, float)]
    digits = max((len(text.partition(".")[2]) for text in shown if "e" not in text), default=0)
    return ["–" if v is None else number(v, digits) if isinstance(v, float) else str(v) for v in values]


def table_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """A list of dicts as a table; the columns are all keys in order of first use. A row that says so has few cases."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [column([row.get(name) for row in rows]) for name in names]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for line in zip(*columns, strict=True):
        few = ' class="few"' if any("(n below " in text for text in line) else ""
        body += f"<tr{few}>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts_html(facts: Mapping[str, Any]) -> str:
    """Names and values as a compact list; long values get the whole width."""
    items = []
    for name, value in facts.items():
        shown = escape(value)
        wide = ' class="long"' if len(str(name)) + len(shown) > 44 else ""
        items.append(f"<div{wide}><dt>{escape(name)}</dt><dd>{shown}</dd></div>")
    return f"<dl>{''.join(items)}</dl>"


def image_html(caption: str, path: str | Path) -> str:
    """A PNG inside the page; a click or the space bar switches between fitting width and full size."""
    code = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    text = escape(caption)
    return (
        f'<figure><label><input type="checkbox" aria-label="full size: {text}"><div><img alt="{text}" '
        f'src="data:image/png;base64,{code}"></div></label>'
        f"<figcaption>{text} ({escape(Path(path).name)}; click for full size)</figcaption></figure>"
    )


def step_facts(step: Mapping[str, Any], side: str) -> list[tuple[str, str]]:
    """What hovering over a step says, as (name, value)."""
    low, high = em.CLIP
    clip = " (clipped at e)" if step["w"] >= high else " (clipped at 1/e)" if step["w"] <= low else ""
    sure = [f"{label} {c:g}" for label, c in zip(step["labels"], step["confidence"], strict=True)]
    facts = [("labels, confidence 0-10", ", ".join(sure) or "none")]
    facts += [(f"Pr(step | step before, P_{side})", number(step["p_class"], 4))]
    facts += [("Pr(step | step before, P)", number(step["p_all"], 4)), ("w", number(step["w"], 4) + clip)]
    if "tokens" in step:
        facts.append(("tokens", str(step["tokens"])))
    if "logratio" in step:
        facts.append(("log(π/π_ref), sum over its tokens", number(step["logratio"], 4, True)))
    return facts


def step_html(step: Mapping[str, Any], golds: Sequence[str], side: str) -> str:
    """One step: labels and w at the side, tinted text, and a tip that shows on hover and on keyboard focus."""
    name, depth = colour_class(step["w"])
    facts = step_facts(step, side)
    title = escape("; ".join(f"{key}: {value}" for key, value in facts))
    tip = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts)
    labels = " + ".join(escape(label.replace("_", " ")) for label in step["labels"]) or "no label"
    return (
        f'<li class="step"><div class="side" title="{title}">{labels} <br>w <b>{number(step["w"], 3)}</b></div>'
        f'<div class="text {name}" style="--a:{depth}" tabindex="0">{underline_golds(step["text"], golds)}</div>'
        f'<div class="tip" role="tooltip"><table>{tip}</table></div></li>'
    )


def trace_html(row: Mapping[str, Any]) -> str:
    """One trace: question, verdict, steps, answer."""
    side, good = ("pos", "good") if row["chosen"] else ("neg", "bad")
    verdict = "chosen" if row["chosen"] else "rejected"
    steps = "".join(step_html(step, row["golds"], side) for step in row["segments"])
    answer = underline_golds(plain_answer(row["answer"]), row["golds"])
    extra = f", log(π/π_ref) {number(row['answer_logratio'], 4, True)}" if "answer_logratio" in row else ""
    return (
        f'<article class="trace"><div class="head"><h3>{escape(row["question"])}</h3>'
        f'<p><span class="verdict {good}">{verdict}</span> <span class="faint">{escape(row["outcome"])} · gold: '
        f"{escape(' / '.join(row['golds']))} · {escape(row['id'])}</span></p></div><ol>{steps}"
        f'<li class="step"><div class="side">answer, w <b>1</b>{extra}</div>'
        f'<div class="text answer">{answer}</div></li></ol></article>'
    )


def side_html(name: str, side: Mapping[str, Any], golds: Sequence[str]) -> str:
    """One model's completion: verdict, labelled segments, answer."""
    mark = "good" if side["good"] else "bad"
    parts = [f'<h4>{escape(called(name))}: <span class="verdict {mark}">{escape(side["verdict"])}</span></h4>']
    for segment in side["segments"]:
        labels = " + ".join(label.replace("_", " ") for label in segment["labels"])
        tag = f"<i>{escape(labels)}</i>" if labels else ""
        parts.append(f'<div class="text even">{tag}{underline_golds(segment["text"], golds)}</div>')
    answer = underline_golds(plain_answer(side["answer"]), golds) or "(no answer)"
    return f'<div>{"".join(parts)}<div class="text answer"><i>answer</i>{answer}</div></div>'


def pair_html(pair: Mapping[str, Any]) -> str:
    """One question as two models thought about it, side by side."""
    sides = "".join(side_html(name, side, pair["golds"]) for name, side in pair["sides"].items())
    return (
        f'<article class="trace"><div class="head"><h3>{escape(pair["question"])}</h3><p class="faint">'
        f"{escape(pair['kind'])} · gold: {escape(' / '.join(pair['golds']))} · {escape(pair['set'])}, "
        f'{escape(pair["id"])}</p></div><div class="two">{sides}</div></article>'
    )


def legend_html() -> str:
    """The colour scale of w."""
    bars = []
    for w in (1 / math.e, 0.5, 0.75, 1.0, 4 / 3, 2.0, math.e):
        name, depth = colour_class(w)
        bars.append(f'<i class="{name}" style="--a:{depth}"></i>')
    return (
        f'<div class="legend"><span>w = 1/e <span class="bar">{"".join(bars)}</span> w = e</span>'
        "<span>blue: counts less than in KTO</span><span>red: counts more</span><span><u>gold answer</u></span>"
        '<span class="faint">hover or tab to a step for its numbers</span></div>'
    )


def anchor(name: str) -> str:
    """The id of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def heading_html(name: str) -> str:
    """A heading that the contents point at."""
    return f'<h2 id="{escape(anchor(name))}">{escape(name)}</h2>'


def section_html(name: str, table: str, folded: bool) -> str:
    """A table under its heading; folded: the heading opens it."""
    if not folded:
        return heading_html(name) + table
    return f'<details id="{escape(anchor(name))}"><summary>{escape(name)}</summary>{table}</details>'


def contents_html(names: Sequence[str]) -> str:
    """Links to the sections."""
    links = "".join(f'<a href="#{escape(anchor(name))}">{escape(name)}</a>' for name in names)
    return f"<nav>{links}</nav>"


def trace_page(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str,
    *,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    images: Mapping[str, str | Path],
    facts: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]] = (),
    changed: str = "",
    lead: Sequence[str] = (),
    words: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write one self-contained HTML page about a run.

    rows: traces {"id", "question", "golds" [str], "chosen" bool, "outcome" str, "answer" str, "segments": step_records,
    each with "tokens" int and "logratio" float where known, "answer_logratio" float where known}; none: no section.
    tables: heading -> rows of a table. images: caption -> PNG file. facts: heading -> name -> value, such as settings
    and receipts. pairs: questions before and after alignment {"id", "set", "question", "golds", "kind", "sides": model
    -> `report.told`}; changed: a sentence on how many questions changed in all. lead: paragraphs of what was done and
    found. words: term -> what it means. notes: what a reader must know first. The order: lead, notes, words, pairs,
    traces, tables, images, facts. Tables after the first four are folded; in print they are open.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="lead">{escape(line)}</p>' for line in lead)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    places = [(name, table_html(table)) for name, table in tables.items() if table]
    first = ["Words"] * bool(words) + ["Before and after"] * bool(pairs) + ["Traces"] * bool(rows)
    parts.append(contents_html([*first, *(name for name, _ in places), *["Figures"] * bool(images)]))
    if words:
        parts += [heading_html("Words"), facts_html(words)]
    if pairs:
        parts += [heading_html("Before and after"), f"<p>{escape(changed)}</p>" * bool(changed)]
        parts += [pair_html(pair) for pair in pairs]
    if rows:
        parts += [heading_html("Traces"), legend_html(), *(trace_html(row) for row in rows)]
    parts += [section_html(name, table, folded=k >= 4) for k, (name, table) in enumerate(places)]
    if images:
        parts += [heading_html("Figures"), *(image_html(caption, png) for caption, png in images.items())]
    parts += [f"{heading_html(name)}{facts_html(fact)}" for name, fact in facts.items() if fact]
    body = "\n".join(parts)
    # The page shows text that a model wrote: nothing in it may run or load anything.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    with atomic_write(path) as f:
        f.write(page)
