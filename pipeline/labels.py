"""Labels without a paid key: the model that is aligned labels its own thoughts, alone or with a second local model.

It is asked as the committee is (llm/committee.py): the same prompts with thinking off, the same strict replies, a reply
of no use is asked for once more. With a second model (--annotator-model) the paper's rules (i)-(iii) make one labelling
of the two, and the aligned model is the adjudicator. All ranks ask, --backend says who answers, and a reply is on disk
as soon as it is there. How far such labels are from the paper's: docs/annotating.md.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import annotate
import sample
from annotate import Block, Step
from common import hub
from common.errors import AnnotationError, InputError
from common.files import read_jsonl, sha256_file, write_json
from common.template import fill
from common.tokens import encode_guarded
from llm import agreement, committee, labelling
from llm.committee import Committee, Trace, parse_reply, unlabelled
from pipeline.run import Generate, Run

Asked = list[tuple[Trace, str, Sequence[Block] | None]]  # a trace, the words, the blocks a reply must have (None: any)


def label(run: Run, rows: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """annotations.jsonl, its manifest and, with two models, annotation/agreement.json in `out`; returns the tally."""
    prompts, outcomes = committee.Prompts.load(labelling.PROMPTS), Counter()
    panel = Committee(None, None, None, prompts)  # its book of traces; nobody behind it is asked
    panel.add(rows)
    traces = list(panel.traces.values())
    first: Asked = [(t, prompts.first(t)[0]["content"], None) for t in traces]
    votes = ask(run, run.sampler("thinkon"), first, "a", outcomes, out)
    for trace, steps in zip(traces, votes, strict=True):
        trace.votes["a"] = steps
    if run.cfg.annotator_model:
        _second_model(run, prompts, traces, first, outcomes, out)
    else:
        for trace in traces:
            steps = trace.votes["a"]
            trace.steps = unlabelled(trace.each_segment(), "rejected") if steps is None else steps
    committee.check_usable(outcomes)
    records, tally = annotate.annotate(rows, panel)
    if run.ranks.rank == 0:
        made = {"annotator": "self", "a": run.source.name, "commit": run.source.commit, "seed": run.cfg.seed}
        made |= {"b": run.cfg.annotator_model, "temperature": run.cfg.annotate_temperature}
        made |= {"prompts": {name: sha256_file(labelling.PROMPTS / name) for name in committee.FILES}}
        labelling.write_annotations(rows, records, made, out)
    run.ranks.wait()
    return tally | dict(sorted(outcomes.items()))


def _second_model(
    run: Run, prompts: committee.Prompts, traces: list[Trace], first: Asked, outcomes: Counter[str], out: Path
) -> None:
    """The second model's votes, rules (i) and (ii), and the aligned model on what they leave open (iii)."""
    other = run.beside(hub.locate(run.cfg.annotator_model))
    for trace, steps in zip(traces, ask(other, other.sampler("thinkon"), first, "b", outcomes, out), strict=True):
        trace.votes["b"] = steps
    open_traces, asked = [], []
    for trace in traces:
        trace.steps, is_open = Committee.decide(trace)
        if is_open:
            blocks = [step.segments for step in trace.steps if not step.source]
            asked.append((trace, prompts.second_opinion(trace, blocks)[0]["content"], blocks))
            open_traces.append(trace)
    decided = ask(run, run.sampler("thinkon"), asked, "judge", outcomes, out)
    for trace, (_, _, blocks), steps in zip(open_traces, asked, decided, strict=True):
        by_block = {step.segments: step for step in steps or unlabelled(blocks, "rejected")}
        trace.steps = [by_block.get(step.segments, step) for step in trace.steps]
    both = [t for t in traces if t.votes["a"] is not None and t.votes["b"] is not None]
    if both and run.ranks.rank == 0:
        found = {"a": [t.votes["a"] for t in both], "b": [t.votes["b"] for t in both], "final": [t.steps for t in both]}
        result = agreement.report(found)
        write_json(out / "annotation" / "agreement.json", result)
        print(agreement.table(result))


def ask(
    run: Run, generate: Generate, asked: Asked, role: str, outcomes: Counter[str], out: Path
) -> list[list[Step] | None]:
    """The steps of every trace as one model labels it, None where two replies were of no use. All ranks get all.

    role: "a", "b" or "judge"; the replies stay in annotation/ROLE.jsonl and ROLE-again.jsonl.
    """
    again = committee.Prompts.load(labelling.PROMPTS).again
    source = "judge" if role == "judge" else role if run.cfg.annotator_model else "single"
    found: list[list[Step] | None] = [None] * len(asked)
    words = {k: text for k, (_, text, _) in enumerate(asked)}
    todo, long = list(words), list[int]()
    for name, outcome in ((role, "usable"), (f"{role}-again", "usable when asked again")):
        todo, longer = _with_room(run, asked, words, todo)
        long += longer
        if not todo:
            break
        texts, failed = [(asked[k][0], words[k]) for k in todo], list[int]()
        replies = _replies(run, generate, texts, out / "annotation" / f"{name}.jsonl")
        for k, (reply, finish) in zip(todo, replies, strict=True):
            trace, text, blocks = asked[k]
            try:
                found[k] = parse_reply(reply, len(trace.segments), blocks, source)
                outcomes[f"{role}: {outcome}"] += 1
            except AnnotationError as error:
                problem = f"{error}{committee.CUT * (finish == 'length')}"
                said = f"Your last reply was:\n{reply[:4000] or '(empty)'}\n\n{fill(again, problem=problem)}"
                words[k] = f"{text}\n\n{said}"
                failed.append(k)
        todo = failed
    if long:
        told = f"{role}: {len(long)} prompts leave no room for a reply in the model's {run.room:,} positions"
        if len(long) == len(asked):
            raise InputError(f"annotator {told}, all there are; take --annotator committee, or a model with more")
        run.ranks.log(told)
    if todo or long:
        outcomes[f"{role}: not usable"] += len(todo) + len(long)
    return found


def _with_room(run: Run, asked: Asked, words: dict[int, str], which: list[int]) -> tuple[list[int], list[int]]:
    """`which` of them leave the model room for a reply of the usual length, and which do not."""
    room: dict[bool, list[int]] = {True: [], False: []}
    for k in which:
        prompt = len(encode_guarded(run.tokenizer, run.prompt(words[k], "off")))
        reply = labelling.REPLY_TOKENS * len(asked[k][0].segments)
        room[prompt + min(reply, run.cfg.annotate_max_tokens) <= run.room].append(k)
    return room[True], room[False]


def _replies(run: Run, generate: Generate, asked: list[tuple[Trace, str]], path: Path) -> list[tuple[str, str]]:
    """What the model says to each text, thinking off, and how it ended; the replies stay in `path`."""
    cfg = run.cfg
    texts = {t.id: run.text(text) for t, text in asked}
    jobs = [({"id": t.id, "question": t.question, "answers": t.answers}, "off", 0) for t, _ in asked]
    how = sample.Sampling(cfg.annotate_temperature, 1.0, 0, 0.0)
    what, longest = f"labels, {path.stem}", cfg.annotate_max_tokens
    run.draw(generate, jobs, path, what, longest, how, lambda q, k: texts[q["id"]], shorten=True)
    return [(row["text"], row["finish"]) for row in read_jsonl(path)]
