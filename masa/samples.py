"""Samples to look at: a few problems of a step with all their solutions and metas, as JSONL and as one HTML page.

A reward that is earned the wrong way shows here first. `python -m masa samples --out RUN` writes RUN/samples.html from
the files RUN/samples/step-*.jsonl, newest step first. A row is one problem:

    {step, id, problem, answer, p, solutions: [{text, tokens, reward, advantage, right, cut}],
     metas: [{text, tokens, reward, advantage, length, difficulty, notion}]}

Imports no torch.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import atomic_write, read_jsonl

STYLE = (
    "body{font:14px/1.4 sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
    "pre{white-space:pre-wrap;background:#f4f4f4;padding:.5rem;margin:.2rem 0}"
    ".right{border-left:4px solid #2a7}.wrong{border-left:4px solid #c44}.meta{border-left:4px solid #47a}"
)


def sample_rows(groups: Iterable[Any], step: int, most: int) -> list[dict[str, Any]]:
    """Rows of the first `most` problems (by place) of a step's groups (see masa/rollouts.py)."""
    rows = []
    for g in sorted(groups, key=lambda g: g.place)[:most]:
        row = {"step": step, "id": g.problem.id, "problem": g.problem.text, "answer": g.problem.answer}
        solutions = [
            _of(r) | {"right": right, "cut": r.cut} for r, right in zip(g.solutions, g.outcome.correct, strict=True)
        ]
        names = ("length", "difficulty", "notion")
        metas = [_of(r) | dict(zip(names, parts, strict=True)) for r, parts in zip(g.metas, g.parts, strict=True)]
        rows.append(row | {"p": g.outcome.p, "solutions": solutions, "metas": metas})
    return rows


def _of(r: Any) -> dict[str, Any]:
    return {"text": r.text, "tokens": len(r.ids), "reward": r.reward, "advantage": r.advantage}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows as one HTML page without scripts; model output is shown as text, never as HTML."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Samples</title><style>{STYLE}</style><h1>Samples</h1>"]
    for row in rows:
        head = f"step {row['step']}, {row['id']}: {100 * row['p']:.0f} % right, answer {row['answer']}"
        parts.append(f"<h2>{html.escape(head)}</h2><pre>{html.escape(row['problem'])}</pre>")
        for kind in ("solutions", "metas"):
            shown = sorted(row[kind], key=lambda x: -x["reward"])
            parts.append(f"<details><summary>{len(shown)} {kind}, best first</summary>")
            parts += [_box(x, kind) for x in shown]
            parts.append("</details>")
    return "\n".join(parts) + "\n"


def _box(x: Mapping[str, Any], kind: str) -> str:
    said = f"reward {x['reward']:.3f}, advantage {x['advantage']:+.2f}, {x['tokens']} tokens"
    if kind == "metas":
        said += f" (length {x['length']:.0f}, difficulty {x['difficulty']:.3f}, notion {x['notion']:.2f})"
        shade = "meta"
    else:
        said += ", cut" if x["cut"] else ""
        shade = "right" if x["right"] else "wrong"
    return f"<div>{said}</div><pre class={shade}>{html.escape(x['text'])}</pre>"


def write_page(out: Path) -> Path:
    """samples.html of a run's folder; its path. Raises InputError when the run kept no samples."""
    files = sorted((out / "samples").glob("step-*.jsonl"), reverse=True)
    if not files:
        raise InputError(f"{out / 'samples'}: no samples; train with --samples-every 10")
    with atomic_write(out / "samples.html") as f:
        f.write(page([row for file in files for row in read_jsonl(file)]))
    return out / "samples.html"
