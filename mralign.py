"""MR-ALIGN (arXiv 2510.24794) from questions to a trained and evaluated adapter.

  python mralign.py --config configs/mini.json                        the whole pipeline, one process
  torchrun --standalone --nproc_per_node=4 mralign.py --config ...    the same on four GPUs (or CPU processes)
  python mralign.py --config configs/mini.json eval report            these stages only, where they are due
  python mralign.py --config configs/qwen3-8b.json --dry-run          what a run would take; no weights, no GPU

The method is five stages, in this file and in the paper's order, each reading and writing files under --out:
  sample      questions -> samples.jsonl: `draws` completions with thinking on and as many with it off (3.1.1)
  candidates  -> candidates.jsonl: thoughts that made the answer right (chosen) or wrong (rejected) (3.1.1)
  annotate    -> annotations.jsonl: one or two of 15 meta-reasoning labels for every step (3.1.2; docs/annotating.md)
  fit         -> transitions.json, train.jsonl: P, P_pos, P_neg by EM and the weight w of every step (3.2.2, Eq. 10)
  train       -> METHOD/adapter_model.safetensors: LoRA under DDP, Eq. 9-12; metrics.jsonl
What follows is measured, not trained (pipeline/evaluation.py, pipeline/reporting.py):
  search, eval, labels, judge, scores, analysis, report

A stage whose settings, inputs and code have not changed since it last finished is not run again; sampling, labels,
training, evaluation and judging are never redone because code changed. --redo STAGE does it (pipeline/reuse.py).
"""

import functools
import sys
from pathlib import Path
from typing import Any

import torch

import annotate
import data
import em
import kto
import lora
import sample
import train
from common import benchmarks, costs, hub
from common.endings import program, status
from common.errors import InputError
from common.files import each_row, read_jsonl, write_json, write_jsonl
from common.ranks import Progress, not_joined, only_writer, process_group
from common.rows import check_row
from common.settings import cli
from llm import labelling
from pipeline import cards, evaluation, ready, room
from pipeline import dry_run as run_plan
from pipeline import labels as own_labels
from pipeline.config import CandidateSettings, RunConfig, TransitionSettings, check, check_settings, names, placed
from pipeline.reuse import Stage, checksum, digest, perform
from pipeline.run import Run

# ---------- the method


def draw_samples(run: Run) -> dict[str, Any]:
    """Stage sample: draws with thinking on and off for every training question (3.1.1)."""
    cfg = run.cfg
    questions, tally = data.load_questions(cfg.questions, drop_repeated=True)
    run.ranks.log(f"{cfg.questions}: {tally}")
    if odd := [q for q in questions if not benchmarks.may_train(q.get("dataset"))]:
        raise InputError(f"{cfg.questions}: {odd[0]['dataset']} is for evaluation only; train on other questions")
    jobs = [(q, mode, k) for q in questions for mode in ("on", "off") for k in range(cfg.draws)]
    how = sample.Sampling(cfg.draw_temperature, cfg.draw_top_p, top_k=0, min_p=0.0)
    speed = run.draw(run.sampler("thinkon"), jobs, run.out / "samples.jsonl", "draws", cfg.draw_max_new, how)
    outcomes = data.count_outcomes(each_row(run.out / "samples.jsonl")) if run.ranks.rank == 0 else {}
    return {"tokens_per_second_per_rank": round(speed), "outcomes": outcomes}


def select_candidates(run: Run) -> dict[str, Any]:
    """Stage candidates: chosen and rejected thoughts from the draws (3.1.1)."""
    cfg = run.cfg
    samples = each_row(run.out / "samples.jsonl", data.SAMPLE_FIELDS, check_row)
    rows, tally = data.select_candidates(
        samples,
        run.tokenizer,
        n_draws=cfg.draws,
        keep=cfg.keep,
        segments=(cfg.min_segments, cfg.max_segments),
        think_tokens=(cfg.min_think_tokens, cfg.max_think_tokens),
        matcher=cfg.matcher,
        fold=cfg.fold,
    )
    write_jsonl(run.out / "candidates.jsonl", rows)
    return tally["all"] | {"by data set": {name: of for name, of in tally.items() if name != "all"}}


def label_steps(run: Run) -> dict[str, Any]:
    """Stage annotate: labels for every step of every candidate (3.1.2)."""
    fields = ("id", "question", "answers", "completion", "spans")
    rows = [{k: c[k] for k in fields} for c in each_row(run.out / "candidates.jsonl", fields, check_row)]
    if run.cfg.annotator == "self":
        return own_labels.label(run, rows, run.out)
    for other in run.cfg.lenders:
        labelling.lend_replies(other, run.out)
    progress = Progress(run.ranks, None, "annotation", "calls")
    tally = labelling.label(rows, run.cfg, run.out, run.cfg.seed, progress)
    if progress.done:
        progress.close()
    return tally


def fit_transitions(run: Run) -> dict[str, Any]:
    """Stage fit: transition matrices and the weight of every step (3.2.2)."""
    path, fields = run.out / "candidates.jsonl", ("id", "chosen", "spans")  # texts and ids stay on the disk
    candidates = [{k: c[k] for k in fields} for c in each_row(path, (*fields, "prompt_ids"), check_row)]
    steps = annotate.read_steps(run.out / "annotations.jsonl", candidates)  # id -> steps of its trace
    labels = {name: [step.labels for step in of] for name, of in steps.items()}
    if run.cfg.labels == "one":
        labels = {n: em.one_label(labels[n], [step.confidence for step in of]) for n, of in steps.items()}

    def fit(rows: list[dict[str, Any]]) -> em.Transitions:
        return run.fit_matrix([move for c in rows for move in em.observations(labels[c["id"]])])

    positive, negative = ([c for c in candidates if c["chosen"] is side] for side in (True, False))
    everything, pos, neg = fit(candidates), fit(positive), fit(negative)
    w = {}
    for c in candidates:
        own = pos if c["chosen"] else neg
        w[c["id"]] = em.segment_weights(labels[c["id"]], own.P, everything.P)  # Eq. 10
    flat = [x for of in w.values() for x in of]
    coverage = annotate.check_coverage(steps.values(), flat)

    def weighted(c: dict[str, Any]) -> dict[str, Any]:
        spans = [[c["spans"][s.segments[0]][0], c["spans"][s.segments[-1]][1]] for s in steps[c["id"]]]
        row = {"id": c["id"], "prompt": c["prompt"], "completion": c["completion"], "label": c["chosen"]}
        row |= {"prompt_ids": c["prompt_ids"], "completion_ids": c["completion_ids"], "spans": spans}
        row |= {"dataset": c["dataset"]} if "dataset" in c else {}
        return row | {"labels": [list(x) for x in labels[c["id"]]], "w": w[c["id"]]}

    write_jsonl(run.out / "train.jsonl", map(weighted, each_row(path, ("prompt", "completion", "completion_ids"))))
    named = {"": everything, "_pos": pos, "_neg": neg}
    result = {"states": list(em.STATES), "n_pos": len(positive), "n_neg": len(negative)}
    result |= {f"P{k}": t.P.tolist() for k, t in named.items()} | {f"C{k}": t.C.tolist() for k, t in named.items()}
    write_json(run.out / "transitions.json", result)
    found = {"steps": len(flat), "mean_w": round(sum(flat) / len(flat), 4), "min_w": min(flat), "max_w": max(flat)}
    return found | coverage


def train_method(run: Run, method: str) -> dict[str, Any]:
    """Stage train: the adapter of one method (3.2.3)."""
    cfg, path = run.cfg, run.out / "train.jsonl"
    loss = kto.LOSSES[method]
    rows = [r for r in data.load_train(path) if loss.keeps(r["label"])]
    rows = data.reweighted(rows, loss.weights, cfg.seed)
    base = run.base_model(torch.device("cpu") if cfg.shard else None)
    origin = {"rows": checksum(path), "model": digest([checksum(p) for p in model_files(run.source.folder).values()])}
    metrics = train.train(
        base,
        data.to_rows(rows, run.tokenizer),
        method,
        cfg.training,
        run.ranks,
        run.out / method,
        run.impl,
        run.source.name,
        origin,
        cfg.resume or run.ranks.restarted,
        run.source.commit,
    )
    if run.ranks.rank == 0:
        cards.write_card(run, method, {})
    return metrics


def write_report(run: Run, receipts: dict[str, Path]) -> dict[str, Any]:
    """Stage report: tables, figures and the page."""
    from pipeline import reporting  # here, because its figures take a second to import

    return reporting.write_report(run, receipts)


# ---------- the stages in order


def stages(run: Run) -> list[Stage]:
    """The pipeline in order, with what each part obeys, reads and writes."""
    cfg, out = run.cfg, run.out
    model = model_files(run.source.folder)
    drawing = ("system", "dtype", "seed", "small_batches", "draws", "draw_temperature", "draw_top_p", "draw_max_new")
    sampling = ("sample_batch", "small_batches")
    filters = tuple(n for n in names(CandidateSettings) if not n.startswith("draw_") and n not in sampling)
    samples, candidates, annotations, transitions, rows = (
        {name: out / name}
        for name in ("samples.jsonl", "candidates.jsonl", "annotations.jsonl", "transitions.json", "train.jsonl")
    )
    questions = {"questions": Path(cfg.questions), "prompt": run.prompt_path}
    labels = candidates | {path.name: path for path in labelling.inputs(cfg)}
    manifest = labelling.manifest_path(out / "annotations.jsonl")
    own = cfg.annotator == "self"  # then the model, and how it is asked, are inputs of the labels
    labels |= model if own else {}
    label_settings = (*labelling.SHAPING, "seed", "system", "dtype") if own else (*labelling.SHAPING, "seed")
    labelled = annotations | {manifest.name: manifest}
    training = ("dtype", *(n for n in names(train.TrainSettings) if n not in train.SPEED_ONLY))
    votes = labelling.may_leave(out)
    before = [
        Stage("sample", draw_samples, drawing, model | questions, samples, everyone=True, dear=True),
        Stage("candidates", select_candidates, filters, samples, candidates),
        Stage("annotate", label_steps, label_settings, labels, labelled, own, cfg.annotator != "cues", may_leave=votes),
        Stage("fit", fit_transitions, names(TransitionSettings), candidates | annotations, transitions | rows),
    ]
    for method in run.methods:
        work = functools.partial(train_method, method=method)
        left = (lora.WEIGHTS, lora.CONFIG, "metrics.jsonl")
        made = {f"{method}/{name}": out / method / name for name in left}
        before.append(Stage(f"train {method}", work, training, model | rows, made, everyone=True, dear=True))
    measured = [*before, *evaluation.stages(run, model, transitions | rows)]
    receipts = {stage.name: stage.receipt(out) for stage in measured}
    reads = {name: path for stage in measured for name, path in stage.outputs.items()}
    shown = functools.partial(write_report, receipts=receipts)
    pages = ("results.json", "report.html", *(f"{method}/README.md" for method in run.methods))
    made = {name: out / name for name in pages}
    figures, votes = {"figures": out / "figures"}, {"agreement.json": votes["agreement.json"]}
    how = ("method", "also", "eval_sets")
    # Its pages name the folder, so those of another run will not do.
    return [*measured, Stage("report", shown, how, reads, made, may_read=votes, may_leave=figures, lent=False)]


def model_files(folder: Path) -> dict[str, Path]:
    """The files that make a checkpoint what it is."""
    found = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    return {f"model/{path.name}": path for path in found}


def run_stages(cfg: RunConfig, source: hub.Source, wanted: list[str]) -> None:
    """Join the other processes and do what is due, of the named stages or of all. Raises what `main` settles."""
    run = Run(cfg, source, not_joined())
    work = stages(run)
    redo = [part.strip() for part in cfg.redo.split(",") if part.strip()]
    ready.check(run, list(dict.fromkeys(stage.called for stage in work)), wanted, redo)
    with (
        process_group() as ranks,
        only_writer(run.out, ranks),
        status(run.out),
        ranks.stop.listen(),
    ):
        run.ranks = ranks
        if ranks.rank == 0:
            (run.out / "status.json").unlink(missing_ok=True)
        ranks.log(f"model {source.name}, " + (f"commit {source.commit}" if source.commit else "a directory"))
        for told in (run.template.by_hand(), ready.miniature(cfg)):
            if told:
                ranks.log(told)
        for mode in ("on", "off"):
            ranks.log(f"prompt, thinking {mode}: {run.prompt(run.turn('QUESTION'), mode)!r}")
        ranks.log(f"{ranks.world} process(es) on {ranks.device.type}, log-probability op: {run.impl}")
        for stage in work:
            if not wanted or stage.called in wanted:
                perform(run, stage, stage.called in redo, work)


# ---------- the command line


def dry_run(cfg: RunConfig, gpu: str, gpus: int, wanted: list[str]) -> None:
    """Print what a run would take; nothing is run, sent or written."""
    check_settings(cfg, wanted)
    print(run_plan.report_text(cfg, gpu, gpus))
    if cfg.annotator == "committee" and (Path(cfg.out) / "candidates.jsonl").exists():
        rows = read_jsonl(Path(cfg.out) / "candidates.jsonl", ("id", "question", "answers", "completion", "spans"))
        print("\n" + labelling.price_table(rows, cfg, Path(cfg.out), cfg.seed))


@program
def main(argv: list[str] | None = None) -> None:
    """The command line. Returns the exit code, see common/endings.py."""

    def more(parser: Any) -> None:
        parser.add_argument("stages", nargs="*", metavar="STAGE", help="these stages only; none: all that are due")
        what = "print all that a run would take (tokens, hours, memory, calls, dollars), and stop"
        parser.add_argument("--dry-run", action="store_true", help=what)
        parser.add_argument("--gpu", default="a800-40", choices=costs.GPUS, help="dry run: which GPU [a800-40]")
        parser.add_argument("--gpus", type=int, default=4, metavar="int", help="dry run: how many of them [4]")

    cfg, rest = cli(RunConfig, argv, __doc__, more)
    cfg = placed(cfg)
    if rest.dry_run:
        if rest.gpus < 1:
            raise InputError(f"--gpus is {rest.gpus}, must be at least 1")
        dry_run(cfg, rest.gpu, rest.gpus, rest.stages)
        return
    check(cfg, rest.stages)
    typed = sys.argv[1:] if argv is None else argv
    room.check(cfg, rest.stages, typed)
    # Before the ranks join, since a download may take longer than they wait for each other; the cache has locks.
    source = hub.locate(cfg.model, cfg.revision)
    room.check(cfg, rest.stages, typed, source)
    run_stages(cfg, source, rest.stages)


if __name__ == "__main__":
    sys.exit(main())
