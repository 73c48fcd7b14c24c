"""The last stage: results.json, the figures, report.html, the cards of the adapters, and the tables on stdout.

It reads what the other stages left and computes nothing they depend on. The model is loaded once, to show the
log-ratios of a few training rows.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import data
import eval as evaluation
import kto
import lora
from common.files import ROOT, each_row, read_json, read_jsonl, write_json
from common.model_config import ModelConfig
from common.table import markdown
from common.template import opens_thought
from common.tokens import token_offsets
from kernels.segment_logprob import segment_logprob
from llm import judge, remote
from pipeline import room
from pipeline.cards import set_values, write_card
from pipeline.evaluation import read_labels, short_sets
from pipeline.run import Run
from report import card, charts, figures, page, story, summary, tables

Rows = list[dict[str, Any]]


def write_report(run: Run, receipts: dict[str, Path]) -> dict[str, Any]:
    """Everything people look at. receipts: stage -> its receipt, of the stages before this one."""
    out = run.out
    scores, analysed = read_json(out / "eval" / "scores.json"), read_json(out / "eval" / "analysis.json")
    judged = read_json(out / "eval" / "judge.json") if run.cfg.judge else {"sets": {}}
    transitions, rows = read_json(out / "transitions.json"), data.load_train(out / "train.jsonl")
    shown = traces(run, rows, transitions)
    images = draw_figures(run, transitions, rows, analysed)
    if kto.LOSSES[shown_method(run)].z0:  # the picture is that of Eq. 12
        told = one_question(run, shown[0], rows, transitions)
        write_json(out / "figures" / "one_question.json", told)
        story.one_question_figure(told, out / "figures" / "one_question.svg")
    done = {name: read_json(path) for name, path in receipts.items() if path.exists()}
    results = {
        "receipt": provenance(run),
        "stages": {name: {"seconds": r["seconds"], **(r["result"] or {})} for name, r in done.items()},
        "weights": analysed["weights"],
        "scores": scores,
        "judge": judged,
    }
    notes = print_scores(scores, judged)
    tally = candidate_tally(done)
    shown_tables = {"Candidates by data set (Table 1)": tables.candidate_rows(tally)} if tally else {}
    shown_tables |= tables.of_run(results, analysed, shown_method(run))
    shown_tables["Labels of the training rows (Table 7)"] = tables.label_rows(rows)
    distances = matrix_distances(run, analysed)
    shown_tables["How wrong a weight may be: the bound of Eq. 15"] = tables.bound_rows(transitions, distances)
    pairs, changed = before_and_after(run)
    page.trace_page(
        shown,
        out / "report.html",
        f"MR-ALIGN run {out.name}",
        lead=summary.lead(results["receipt"], tally, scores, shown_method(run)),
        words=summary.WORDS,
        tables=shown_tables,
        images=images,
        facts={"Receipt": results["receipt"], "Settings": set_values(run)},
        pairs=pairs,
        changed=changed,
        notes=[*notes, *tables.notes_on(tally)],
    )
    for method in run.methods:
        write_card(run, method, scores)
    write_json(out / "results.json", results)
    print(f"\n{out}/results.json, {out}/report.html, {out}/figures/, adapters in {out}/<method>/\n")
    print(card.serve_commands(run.source, out / shown_method(run), run.cfg.lora_r))
    return {}


def candidate_tally(done: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The tally of stage candidates from its receipt, by data set and all together; {} without one."""
    result = done.get("candidates", {}).get("result") or {}
    by_set = result.get("by data set", {})
    return by_set | {"all": {k: n for k, n in result.items() if k != "by data set"}} if by_set else {}


def matrix_distances(run: Run, analysed: dict[str, Any]) -> dict[str, float]:
    """name -> E |delta| of Eq. 14: by chance (resampled traces), and between the annotators of a committee."""
    distances = {"resampled traces": analysed["intervals"]["P"]["mean_l1"]}
    path = run.out / "annotation" / "agreement.json"
    if path.exists():
        distances |= {pair: of["mean_l1"]["value"] for pair, of in read_json(path)["pairs"].items()}
    return distances


def shown_method(run: Run) -> str:
    """The method whose adapter page and picture show: mralign if it was trained, else the last that has a reward."""
    return "mralign" if "mralign" in run.methods else sorted(run.methods, key=lambda m: kto.LOSSES[m].reference)[-1]


def provenance(run: Run) -> dict[str, Any]:
    """What was run, on what."""
    commit = ""
    if shutil.which("git"):  # a downloaded archive runs on machines without it
        describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    cfg, device = run.cfg, run.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": " ".join(["mralign.py", *sys.argv[1:]]),
        "commit": commit or "unknown, not a git checkout",
        "model": run.source.name,
        "model commit": run.source.commit or "none, a directory",
        "annotator": cfg.annotator,
        "processes": run.ranks.world,
        "device": f"{device.type} {name}, {os.cpu_count()} cores",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, op {run.impl}",
        "seed": cfg.seed,
        "decoding": f"{cfg.eval_draws} draw(s), temperature {cfg.temperature}, top_p {cfg.top_p}, top_k {cfg.top_k}, "
        f"min_p {cfg.min_p}, at most {cfg.max_new} tokens, {cfg.backend}",
    }


# ---------- figures and tables


def draw_figures(run: Run, transitions: dict[str, Any], rows: Rows, analysed: dict[str, Any]) -> dict[str, Path]:
    """All figures of the run as PNG; caption -> file, in the order of the page."""
    folder, images = run.out / "figures", {}

    def add(caption: str, file: str, drawn: Callable[[Path], None]) -> None:
        drawn(folder / file)
        images[caption] = folder / file

    positions, strata, method = analysed["positions"], analysed["strata"], shown_method(run)
    if positions:
        add("Where the right answer is lost (Fig. 1)", "positions.png", lambda p: charts.positions_figure(positions, p))
        add("Who gains (Fig. 5)", "strata.png", lambda p: charts.strata_figure(strata, p))
    for name, of in analysed["change"].items():
        file = "change.png" if name == next(iter(analysed["change"])) else f"change-{name}.png"
        caption = f"How the thinking changed on {name} (Fig. 4)"
        add(caption, file, lambda p, of=of: charts.change_figure(of[method], "thinkon", method, p))
    for name, of in analysed["outcomes"].items():
        file = "outcomes.png" if name == next(iter(analysed["outcomes"])) else f"outcomes-{name}.png"
        two = {v: of[v] for v in ("thinkon", method)}
        add(f"Labels and outcomes on {name}", file, lambda p, two=two: charts.outcomes_figure(two, p))
    caption = "Transition matrices and step weights (Fig. 7)"
    add(caption, "transitions.png", lambda p: figures.transition_figure(transitions, p))
    add("Weights of all steps", "weights.png", lambda p: figures.weights_figure(rows, p))
    curves = {m: read_jsonl(run.out / m / "metrics.jsonl") for m in run.methods}
    add("Training", "curves.png", lambda p: figures.curves_figure(curves, p))
    return images


def print_scores(scores: dict[str, Any], judged: dict[str, Any]) -> list[str]:
    """The tables on stdout; returns what must be known before them, which goes to stderr and on the page."""
    notes = []
    for name, of in scores.items():
        print(f"\n{name}\n{evaluation.table(of['metrics'])}\n\n{differences_table(of['differences'])}")
        if text := evaluation.draws_table(of["metrics"]):
            print(f"\n{text}")
        notes += [f"{name}, {v}: {line}" for v, m in of["metrics"].items() for line in evaluation.warnings(m)]
        if of["seen_in_training"]:
            notes.append(f"{name}: {of['seen_in_training']} of its questions are also training questions")
        if len(set(of["engines"].values())) > 1:
            drawn = "; ".join(f"{v} by {engine}" for v, engine in of["engines"].items())
            notes.append(f"{name}: not all variants were drawn by the same engine, so they differ by more: {drawn}")
    for name, of in judged["sets"].items():
        print(f"\n{name}, judge: {judged['judge']}\n{tables.markdown(tables.judge_rows(of))}")
    if judged["sets"] and judged["judge"] == judge.STAND_IN:
        notes.append(
            "the judge is a stand-in that goes by rules: its figures show that the path works, not what is true"
        )
    print(f"\n{summary.ONE_RUN}")
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    return notes


def differences_table(differences: dict[str, Any]) -> str:
    """Paired differences between variants, in points with a 95 % interval, as a table."""
    rows = []
    for pair, of in differences.items():
        row = {"paired difference, points": pair}
        for name, d in zip(("Acc", "Mis"), of.values(), strict=True):
            row[name] = f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        rows.append(row)
    return markdown(rows)


# ---------- questions before and after, training rows with their numbers


def before_and_after(run: Run, n: int = 6) -> tuple[Rows, str]:
    """Questions of the first set as ThinkOn and the aligned model thought about them, and how many changed in all.

    First where ThinkOn dropped the gold and the aligned model used it, then where alignment made it worse, then where
    both fail; what is shown is the first of each kind in the order of the questions, not a choice. As many of a kind
    as its share of the three, and at least one where there is one.
    """
    method = shown_method(run)
    for name in list(short_sets(run))[:1]:
        kinds: dict[str, list[str]] = {"found, then used": [], "made worse": [], "wrong in both": []}
        goods: list[list[bool]] = []
        sides: dict[str, dict[str, Any]] = {}
        for variant in ("thinkon", method):
            sides[variant] = {r["id"]: r for r in read_jsonl(run.samples(name, variant)) if r["draw"] == 0}
        labelled = run.cfg.label_eval and name in run.cfg.labelled_sets
        labels = {v: read_labels(run, name, v) if labelled else {} for v in sides}
        for key, sample_before in sides["thinkon"].items():
            right = f"em_a_{run.cfg.scored_by}"
            before, after = (evaluation.score(x, fold=run.cfg.fold) for x in (sample_before, sides[method][key]))
            good = [bool(x["em_t"] and x[right]) for x in (before, after)]
            goods.append(good)
            if good == [False, True] and before["em_t"]:
                kinds["found, then used"].append(key)
            elif not good[1]:
                kinds["made worse" if good[0] else "wrong in both"].append(key)
        total, shown = sum(map(len, kinds.values())), []
        for kind, keys in kinds.items():
            for key in keys[: max(1, round(n * len(keys) / max(1, total)))]:
                told = {
                    v: story.told(sides[v][key], labels[v].get(key), run.cfg.scored_by, run.cfg.fold) for v in sides
                }
                asked = sides["thinkon"][key]
                pair = {"id": key, "question": asked["question"], "golds": asked["answers"]}
                shown.append(pair | {"kind": f"{kind} ({len(keys)} such questions)", "set": name, "sides": told})
        counts = summary.better_and_worse([a for a, _ in goods], [b for _, b in goods])
        told_counts = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        return shown, f"{len(goods)} questions of {name}: {told_counts}. Some of them:"
    return [], ""


def traces(run: Run, rows: Rows, transitions: dict[str, Any], n: int = 6) -> Rows:
    """The first chosen and rejected training rows for the page, with the log-ratios the shown adapter gives them.

    Rejected rows that found a gold and dropped it come first: they are what the method is about.
    """
    candidates = {r["id"]: r for r in read_jsonl(run.out / "candidates.jsonl")}
    records = {r["id"]: r for r in read_jsonl(run.out / "annotations.jsonl")}

    def dropped(r: dict[str, Any]) -> bool:
        return data.exact_match(_parsed(r).thought, "", candidates[r["id"]]["answers"])[0]

    telling = sorted(rows, key=lambda r: not dropped(r))
    picked = [r for label in (False, True) for r in [r for r in telling if r["label"] is label][: n // 2]]
    shown = []
    logps = token_logps(run)
    for r in picked:
        steps = story.step_records(r, records[r["id"]], transitions)
        *per_step, rest = step_logratios(logps(r), r, run)
        for s, (tokens, logratio) in zip(steps, per_step, strict=True):
            s |= {"tokens": tokens, "logratio": logratio}
        candidate = candidates[r["id"]]
        shown.append(
            {
                "id": r["id"],
                "question": candidate["question"],
                "golds": candidate["answers"],
                "chosen": r["label"],
                "outcome": "right" if r["label"] else "gold found and dropped" if dropped(r) else "gold not found",
                "answer": _parsed(r).answer,
                "segments": steps,
                "answer_logratio": rest[1],
            }
        )
    return shown


def _parsed(row: dict[str, Any]) -> data.Parsed:
    """The completion of a training row."""
    return data.parse(row["completion"], opened=opens_thought(row["prompt"]))


def one_question(run: Run, trace: dict[str, Any], rows: Rows, transitions: dict[str, Any]) -> dict[str, Any]:
    """Every number between one shown trace and its gradient, after the last training step (story.build_story)."""
    cfg = run.cfg
    row = next(r for r in rows if r["id"] == trace["id"])
    annotation = next(r for r in read_jsonl(run.out / "annotations.jsonl") if r["id"] == trace["id"])
    drawn = each_row(run.out / "samples.jsonl")
    off = next(s for s in drawn if f"{trace['id']}#".startswith(f"{s['id']}#") and s["mode"] == "off")
    last = read_jsonl(run.out / shown_method(run) / "metrics.jsonl")[-1]
    return story.build_story(
        row,
        annotation,
        transitions,
        [s["logratio"] for s in trace["segments"]],
        trace["answer_logratio"],
        last["z0"],
        cfg.beta,
        cfg.lambda_c if row["label"] else cfg.lambda_r,
        question=trace["question"],
        golds=trace["golds"],
        think_off_answer=data.parse(off["text"], thinking=False).answer,
    )


def token_logps(run: Run) -> Callable[[dict[str, Any]], tuple[Tensor, Tensor]]:
    """What gives a training row its tokens' log-probabilities, (policy, reference), each (C,) float64, nats.

    Policy is the shown method. This program computes them, or the server of --base-url where the model does not fit.
    """
    config = ModelConfig.from_json(run.source.folder / "config.json")
    if run.cfg.backend == "openai" and not room.holds(run.cfg, config):
        clients = run.client(shown_method(run)), run.client("")

        def asked(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
            policy, reference = (remote.logprobs(c, row["prompt_ids"], row["completion_ids"]) for c in clients)
            return torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)

        return asked
    model = run.base_model()
    lora.load(model, run.out / shown_method(run))

    @torch.no_grad()
    def computed(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        completion = row["completion_ids"]
        batch = data.pack([(row["prompt_ids"], completion, torch.ones(len(completion)))]).to(run.ranks.device)
        each = torch.arange(len(completion) + 1)  # every token a sequence of its own
        found = []
        for context in (contextlib.nullcontext(), lora.disabled(model)):
            with context:
                hidden = model(batch.ids, batch.cu_seqlens)[batch.predict]
                logp = segment_logprob(hidden, model.head, batch.targets, batch.w, each, run.impl)[1]
                found.append(logp.double().cpu())
        return found[0], found[1]

    return computed


def step_logratios(logps: tuple[Tensor, Tensor], row: dict[str, Any], run: Run) -> list[tuple[int, float]]:
    """(tokens, log pi / pi_ref in nats) of every step of a training row, then of all its other tokens.

    logps: of its tokens, policy and reference. Two steps and an answer: [(31, -0.8), (27, 1.4), (9, 0.2)].
    """
    _, offsets = token_offsets(run.tokenizer, row["completion_ids"])
    owner = data.token_steps(offsets, row["spans"])  # step of each token, -1 outside
    ratio = logps[0] - logps[1]
    return [(int((owner == k).sum()), float(ratio[owner == k].sum())) for k in [*range(len(row["spans"])), -1]]
