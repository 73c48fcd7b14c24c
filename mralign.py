"""MR-ALIGN (arXiv 2510.24794) from questions to a trained and evaluated adapter.

  python mralign.py --config configs/mini.json                        the whole pipeline, one process
  torchrun --standalone --nproc_per_node=4 mralign.py --config ...    the same on four GPUs (or CPU processes)
  python mralign.py --config configs/mini.json eval report            these stages only, from the files already there
  python mralign.py --config configs/qwen3-8b.json --dry-run          what training would take; no weights, no GPU

Stages, each reading and writing files under --out:
  sample      questions -> samples.jsonl: `draws` completions with thinking on and as many with it off (3.1.1)
  candidates  -> candidates.jsonl: thoughts that made the answer right (chosen) or wrong (rejected) (3.1.1)
  annotate    -> annotations.jsonl: one or two of 15 meta-reasoning labels for every step, by cue phrases or by a
              committee of language models (3.1.2; docs/annotating.md)
  fit         -> transitions.json, train.jsonl: P, P_pos, P_neg by EM and the weight w of every step (3.2.2, Eq. 10)
  train       -> <method>/adapter_model.safetensors: LoRA under DDP, Eq. 9-12; metrics.jsonl
  search      -> eval/<set>/snippets.jsonl: search results, for settings that end in +ret
  eval        -> eval/<set>/<setting>.jsonl: samples of every setting on every evaluation set
  labels      -> eval/<set>/<setting>.labels.jsonl: meta-reasoning labels of evaluated thoughts (--label-eval)
  judge       -> eval/<set>/<setting>.judged.jsonl, .claims.jsonl, eval/judge.json: TruthfulQA, VeriScore (--judge)
  scores      -> eval/scores.json: Acc, Mis, their intervals and paired differences (A.2)
  analysis    -> eval/analysis.json: hit gap, strata, labels and outcomes, transitions before and after (4.4)
  report      -> the tables on stdout, results.json, report.html, figures/

`labels`, `judge`, `scores` and `analysis` need no model: they work on saved samples. `report` loads it, to show the
log-ratios of a few training rows.

A stage whose settings, inputs and code have not changed since it last finished is not run again. A stage that is named
on the command line always runs.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import annotate
import data
import em
import eval as evaluation
import lora
import model as qwen
import sample
import train
from common import benchmarks, hub
from common.endings import ENDINGS, settle
from common.errors import InputError
from common.files import ROOT, Journal, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from common.model_config import ModelConfig
from common.ranks import Progress, Ranks, process_group
from common.settings import cli, opt
from common.template import ChatTemplate, fill, load_prompt, opens_thought
from common.tokens import encode, load_stop_ids, load_tokenizer, token_offsets
from kernels.segment_logprob import default_impl, segment_logprob
from llm import judge, labelling, remote, retrieve, veriscore
from llm.client import Client, parse_endpoint
from llm.ledger import Ledger
from pipeline import plan
from report import analysis, charts, figures, page, tables
from tools import export

REFINE, RET = "refine", "+ret"  # settings beside thinkoff, base and the methods


@dataclass(frozen=True)
class Config(train.TrainSettings, labelling.LabelSettings, judge.JudgeSettings):
    """Every setting of a run. Defaults are the paper's; configs/mini.json holds the miniature's."""

    model: str = opt("", "Hugging Face checkpoint: a directory, or an id of the Hub", "what and where")
    revision: str = opt("", "branch, tag or commit of a model of the Hub; pin it to repeat a run")
    questions: str = opt("", "training questions, JSONL {id, dataset, question, answers}")
    eval_sets: str = opt("", "evaluation questions, comma-separated name=path")
    out: str = opt("runs/default", "directory for everything the run writes")
    method: str = opt("mralign", "sft, kto, mralign, shuffled (weights permuted: a placebo), or several with commas")
    resume: bool = opt(False, "continue an interrupted training from its last checkpoint")
    prompt: str = opt("prompts/factual.txt", "user turn, with {question} in it (Fig. 11)")
    system: str = opt(
        "", "system turn, {thinking} in it becomes on or off; Nemotron-Nano: 'detailed thinking {thinking}'"
    )
    dtype: str = opt("bfloat16", "dtype of the frozen base weights: bfloat16 or float32; adapters are float32")
    backend: str = opt("local", "who samples: local (this program) or openai (an OpenAI-compatible completions server)")
    base_url: str = opt("", "the server of --backend openai, for example http://127.0.0.1:8000/v1")
    served_model: str = opt("", "what that server calls the base model; none: --model. Adapters: the method's name")
    key_env: str = opt("", "NAME of the environment variable that holds the server's key; none: no key")
    concurrency: int = opt(64, "requests in flight at the server, over all ranks")

    draws: int = opt(3, "completions per question and mode; right or wrong must hold in all", "candidates (3.1.1)")
    draw_temperature: float = opt(0.2, "sampling temperature of the draws")
    draw_top_p: float = opt(0.9, "nucleus of the draws")
    draw_max_new: int = opt(2048, "longest completion of a draw, tokens")
    sample_batch: int = opt(128, "rows decoded together on one rank")
    keep: str = opt("first", "which right or wrong draws become rows: first or all")
    min_segments: int = opt(4, "fewest thinking segments, inclusive")
    max_segments: int = opt(15, "most thinking segments, inclusive")
    min_think_tokens: int = opt(450, "shortest thought, tokens, inclusive")
    max_think_tokens: int = opt(1000, "longest thought, tokens, inclusive")
    matcher: str = opt("equal", "answer counts as right if it equals a gold, or contains one: equal or contains (A.2)")

    transitions: str = opt("em", "estimate of P: em or frequency (Table 3)", "transitions (3.2.2)")
    labels: str = opt("two", "labels a step keeps: two or one, the most confident (Table 3)")
    em_iterations: int = opt(5, "EM iterations; P is defined by running this many (Algorithm 2)")
    em_damping: float = opt(0.6, "share of the new estimate in each iteration (Algorithm 2)")
    em_prior: float = opt(0.1, "pseudo-count of every allowed transition (Algorithm 2)")

    temperature: float = opt(0.6, "sampling temperature", "evaluation (Table 15)")
    top_p: float = opt(0.95, "nucleus")
    top_k: int = opt(20, "most probable tokens kept; 0: all")
    min_p: float = opt(0.0, "tokens below this share of the most probable one are dropped")
    max_new: int = opt(8192, "longest completion, tokens")
    eval_draws: int = opt(1, "completions a question; with several, tables show mean and spread over them")
    also: str = opt("", "more settings: refine (Self-Refine of the base), a setting with +ret (search results first)")
    search: str = opt("", "who searches: serper (key in $SERPER_KEY), serper#VARIABLE, or a file of documents")
    search_cache: str = opt("", "file of search results to reuse and to add to; none: search.jsonl under --out")
    search_results: int = opt(5, "search results before a question (4.1)")
    label_eval: int = opt(0, "evaluated thoughts to label, a setting and set, for Fig. 4 (paper: 977); 0: none")
    judge_sets: str = opt("", "sets of short answers to judge too, comma-separated (SimpleQA's three grades)")


class Run:
    """One run: its settings, this process among the ranks, and where its files are."""

    def __init__(self, cfg: Config, source: hub.Source, ranks: Ranks) -> None:
        self.cfg, self.source, self.ranks, self.out = cfg, source, ranks, Path(cfg.out)
        self.methods = [m.strip() for m in cfg.method.split(",")]
        self.eval_sets = dict(part.split("=", 1) for part in cfg.eval_sets.split(",") if part)
        self.also = [part.strip() for part in cfg.also.split(",") if part.strip()]
        self.settings = ["thinkoff", "thinkon", *self.methods, *self.also]  # what is evaluated
        self.impl = cfg.kernel or default_impl(ranks.device)
        self.tokenizer = load_tokenizer(source.folder)
        self.template = ChatTemplate(source.folder, cfg.system)
        self.template.check(self.tokenizer)
        self.user_turn = load_prompt(cfg.prompt)
        self.stop_ids = load_stop_ids(source.folder, self.tokenizer)
        self.key = ""  # of the unit under way, see `perform`

    def base_model(self, device: torch.device | None = None) -> qwen.Qwen3:
        """The base model, freshly loaded on `device` (None: this rank's), frozen."""
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.cfg.dtype]
        return qwen.load(self.source.folder, dtype, device or self.ranks.device).requires_grad_(False)

    def samples_path(self, name: str, setting: str) -> Path:
        """The samples of one setting on one evaluation set."""
        return self.out / "eval" / name / f"{setting}.jsonl"

    def turn(self, question: str) -> str:
        """What the user says: the question in its template."""
        return fill(self.user_turn, question=question)

    def prompt(self, turn: str, mode: str) -> str:
        """The rendered prompt of a user turn, thinking "on" or "off"."""
        return self.template.prompt(turn, thinking=mode == "on")

    def file(self, name: str, setting: str, kind: str) -> Path:
        """A file about one setting on one evaluation set: kind "labels", "judged", "claims" or "feedback"."""
        return self.samples_path(name, setting).with_suffix(f".{kind}.jsonl")


def adapter_of(run: Run, setting: str) -> str:
    """The method whose adapter a setting uses, "" for the base model."""
    bare = setting.removesuffix(RET)
    return bare if bare in run.methods else ""


def sampler(run: Run, setting: str) -> Callable[..., None]:
    """What completes prompts as `setting` does (the base model or a trained method), as --backend says.

    Call it with (prompts, seeds, max_new, how: sample.Sampling, finished(index, completion)).
    """
    cfg, method = run.cfg, adapter_of(run, setting)
    if cfg.backend == "openai":
        name = method or cfg.served_model or run.source.name
        endpoint = parse_endpoint(f"{name}@{cfg.base_url}" + (f"#{cfg.key_env}" if cfg.key_env else ""))
        client = Client(endpoint, concurrency=max(1, cfg.concurrency // run.ranks.world), limits=remote.PATIENCE)
        eos = ModelConfig.from_json(run.source.folder / "config.json").eos_token_id
        end_id = eos if isinstance(eos, int) else eos[0]

        def by_server(prompts: Any, seeds: Any, max_new: int, how: sample.Sampling, finished: Any) -> None:
            to_ids = functools.partial(encode, run.tokenizer)
            stops = {"stop_ids": run.stop_ids, "end_id": end_id}
            again = remote.generate(
                client, to_ids, prompts, seeds, max_new=max_new, sampling=how, finished=finished, **stops
            )
            if again:
                run.ranks.log(f"{again} of {len(prompts)} completions came without ids and were encoded again")

        return by_server
    model = run.base_model()
    if method:
        lora.load(model, run.out / method)
        if cfg.dtype == "float32":  # faster; in bfloat16 it would round the adapter away
            lora.merge(model)

    def by_model(prompts: Any, seeds: Any, max_new: int, how: sample.Sampling, finished: Any) -> None:
        common = {"stop_ids": run.stop_ids, "batch_size": cfg.sample_batch, "finished": finished}
        sample.generate(model, prompts, seeds, max_new=max_new, **dataclasses.asdict(how), **common)

    return by_model


def draw(
    run: Run,
    generate: Callable[..., None],
    jobs: list[tuple[dict[str, Any], str, int]],
    path: Path,
    what: str,
    max_new: int,
    how: sample.Sampling,
    turn: Callable[[dict[str, Any], int], str] | None = None,
) -> float:
    """Sample every (question, mode, draw) of `jobs` and write one JSONL row each to `path`. Returns tokens a second.

    turn: (question, draw) -> what the user says; None: the question in its template.
    The ranks share the jobs; the seed of a completion comes from its identity, so the file does not depend on how.
    A completion is on disk as soon as it is finished: a run that is killed and started again does the others only.
    """
    ranks, cfg = run.ranks, run.cfg
    mine = jobs[ranks.rank :: ranks.world]
    prompts = [run.prompt(turn(q, k) if turn else run.turn(q["question"]), mode) for q, mode, k in mine]
    prompt_ids = [encode(run.tokenizer, text) for text in prompts]
    seeds = [sample.seed_of(cfg.seed, q["id"], mode, k) for q, mode, k in mine]
    part = path.with_suffix(f".rank{ranks.rank}.jsonl")
    journal = Journal(part, digest([run.key, str(path), ranks.world]))
    done = {row["row"]: sample.Completion(row["ids"], row["finish"]) for row in journal.rows}
    if done:
        ranks.log(f"{what}: {len(done)} of {len(mine)} were finished before")
    left = [i for i in range(len(mine)) if i not in done]
    progress = Progress(ranks, None, what, "tokens")

    def finished(index: int, c: sample.Completion) -> None:
        done[left[index]] = c
        journal.add({"row": left[index], "ids": c.ids, "finish": c.finish})
        progress(len(c.ids))

    generate([prompt_ids[i] for i in left], [seeds[i] for i in left], max_new, how, finished)
    speed = progress.close()
    journal.close()
    rows = []
    for i, ((q, mode, k), prompt, ids) in enumerate(zip(mine, prompts, prompt_ids, strict=True)):
        c = done[i]
        text, _ = token_offsets(run.tokenizer, c.ids[:-1] if c.finish == "stop" else c.ids)
        row = {"id": q["id"], "mode": mode, "draw": k, "question": q["question"], "answers": q["answers"]}
        rows.append(row | {"prompt": prompt, "prompt_ids": ids, "ids": c.ids, "text": text, "finish": c.finish})
    share = path.with_suffix(f".share{ranks.rank}.jsonl")
    write_jsonl(share, rows)
    ranks.wait()
    if ranks.rank == 0:
        shares = [read_jsonl(path.with_suffix(f".share{r}.jsonl")) for r in range(ranks.world)]
        write_jsonl(path, (shares[i % ranks.world][i // ranks.world] for i in range(len(jobs))))
    ranks.wait()
    share.unlink()
    part.unlink()
    return speed


def stage_sample(run: Run) -> dict[str, Any]:
    """Draws with thinking on and off for every training question."""
    cfg = run.cfg
    questions, tally = data.load_questions(cfg.questions, drop_repeated=True)
    run.ranks.log(f"{cfg.questions}: {tally}")
    if odd := [q for q in questions if q.get("dataset") in benchmarks.NEVER_TRAIN]:
        raise InputError(f"{cfg.questions}: {odd[0]['dataset']} is for evaluation only; train on other questions")
    jobs = [(q, mode, k) for q in questions for mode in ("on", "off") for k in range(cfg.draws)]
    how = sample.Sampling(cfg.draw_temperature, cfg.draw_top_p, top_k=0, min_p=0.0)
    speed = draw(run, sampler(run, "thinkon"), jobs, run.out / "samples.jsonl", "draws", cfg.draw_max_new, how)
    return {"tokens_per_second_per_rank": round(speed)}


def stage_candidates(run: Run) -> dict[str, Any]:
    """Chosen and rejected thoughts from the draws."""
    cfg = run.cfg
    samples = read_jsonl(run.out / "samples.jsonl", ("id", "mode", "draw", "text", "ids", "prompt_ids"))
    rows, tally = data.select_candidates(
        samples,
        run.tokenizer,
        n_draws=cfg.draws,
        keep=cfg.keep,
        segments=(cfg.min_segments, cfg.max_segments),
        think_tokens=(cfg.min_think_tokens, cfg.max_think_tokens),
        matcher=cfg.matcher,
    )
    write_jsonl(run.out / "candidates.jsonl", rows)
    return tally


def stage_annotate(run: Run) -> dict[str, Any]:
    """Labels for every step of every candidate."""
    if run.cfg.annotator == "committee" and run.ranks.world > 1:
        raise InputError(
            "a committee may take hours, and other processes do not wait that long: label with one process first "
            "(python mralign.py ... annotate); this command then reuses the labels"
        )
    progress = Progress(run.ranks, None, "annotation", "calls")
    tally = labelling.label(candidates_to_label(run.cfg), run.cfg, run.out, run.cfg.seed, progress)
    if run.cfg.annotator == "committee":
        progress.close()
    return tally


def candidates_to_label(cfg: Config) -> list[dict[str, Any]]:
    """The rows of candidates.jsonl."""
    return read_jsonl(Path(cfg.out) / "candidates.jsonl", ("id", "question", "answers", "completion", "spans"))


def fitter(cfg: Config) -> Callable[..., em.Transitions]:
    """How observations become P: EM or the frequency baseline, as set."""
    if cfg.transitions == "frequency":
        return functools.partial(em.frequency, prior=cfg.em_prior)
    return functools.partial(em.fit, max_iter=cfg.em_iterations, damping=cfg.em_damping, prior=cfg.em_prior)


def stage_fit(run: Run) -> dict[str, Any]:
    """Transition matrices and step weights."""
    cfg = run.cfg
    candidates = read_jsonl(run.out / "candidates.jsonl", ("id", "chosen", "completion", "spans"))
    path = run.out / "annotations.jsonl"
    records = {r["id"]: r for r in read_jsonl(path, ("id", "steps"))}
    steps, labels = {}, {}
    for c in candidates:
        if c["id"] not in records:
            raise InputError(f"{path}: no annotation for candidate {c['id']!r}; run the annotate stage again")
        annotate.validate(records[c["id"]], len(c["spans"]), f"{path}: {c['id']}")
        steps[c["id"]] = annotate.steps_of(records[c["id"]], len(c["spans"]))
        labels[c["id"]] = [s.labels for s in steps[c["id"]]]
        if cfg.labels == "one":
            labels[c["id"]] = em.one_label(labels[c["id"]], [s.confidence for s in steps[c["id"]]])

    def fit(rows: list[dict[str, Any]]) -> em.Transitions:
        return fitter(cfg)([o for c in rows for o in em.observations(labels[c["id"]])])

    positive, negative = ([c for c in candidates if c["chosen"] is side] for side in (True, False))
    everything, pos, neg = fit(candidates), fit(positive), fit(negative)
    rows = []
    for c in candidates:
        own = pos if c["chosen"] else neg
        w = em.segment_weights(labels[c["id"]], own.P, everything.P)  # Eq. 10
        spans = [[c["spans"][s.segments[0]][0], c["spans"][s.segments[-1]][1]] for s in steps[c["id"]]]
        row = {"id": c["id"], "prompt": c["prompt"], "completion": c["completion"], "label": c["chosen"]}
        row |= {"prompt_ids": c["prompt_ids"], "completion_ids": c["completion_ids"], "spans": spans}
        rows.append(row | {"labels": [list(x) for x in labels[c["id"]]], "w": w})
    write_jsonl(run.out / "train.jsonl", rows)
    named = {"": everything, "_pos": pos, "_neg": neg}
    result = {"states": list(em.STATES), "n_pos": len(positive), "n_neg": len(negative)}
    result |= {f"P{k}": t.P.tolist() for k, t in named.items()} | {f"C{k}": t.C.tolist() for k, t in named.items()}
    write_json(run.out / "transitions.json", result)
    flat = [w for r in rows for w in r["w"]]
    return {"steps": len(flat), "mean_w": round(sum(flat) / len(flat), 4), "min_w": min(flat), "max_w": max(flat)}


def stage_train(run: Run, method: str) -> dict[str, Any]:
    """One adapter."""
    cfg, path = run.cfg, run.out / "train.jsonl"
    rows = data.load_train(path)
    if method == "sft":
        rows = [r for r in rows if r["label"]]
    if method == "shuffled":
        rows = data.shuffle_weights(rows, cfg.seed)
    if method in ("sft", "kto"):
        rows = [r | {"w": [1.0] * len(r["w"])} for r in rows]
    base = run.base_model(torch.device("cpu") if cfg.shard else None)
    origin = {"rows": checksum(path), "model": digest([checksum(p) for p in model_files(run.source.folder)])}
    metrics = train.train(
        base,
        data.to_rows(rows, run.tokenizer),
        method,
        train_settings(cfg),
        run.ranks,
        run.out / method,
        run.impl,
        run.source.name,
        origin,
        cfg.resume or run.ranks.restarted,
        run.source.commit,
    )
    if run.ranks.rank == 0:
        write_card(run, method, {})
        print(export.serve_commands(run.source, run.out / method, cfg.lora_r))
    return metrics


def write_card(run: Run, method: str, scores: dict[str, Any]) -> None:
    """README.md beside an adapter, from the files of the run. scores: eval/scores.json, {} before there is one."""
    path, folder = run.out / "train.jsonl", run.out / method
    labels = Counter(row["label"] for row in read_jsonl(path, ("label",)))
    datasets = Counter(str(row.get("dataset", "unnamed")) for row in read_jsonl(run.cfg.questions))
    rows = {"sha256": sha256_file(path), "chosen": labels[True], "rejected": labels[False], "datasets": datasets}
    settings = {k: v for k, v in dataclasses.asdict(run.cfg).items() if v != ""}
    tables = {name: evaluation.table(of["metrics"]) for name, of in scores.items()}
    last = read_jsonl(folder / "metrics.jsonl")[-1]
    export.write_card(folder, run.source, method, settings, rows, last, tables)


def train_settings(cfg: Config) -> train.TrainSettings:
    """The part of the settings that training reads."""
    return train.TrainSettings(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(train.TrainSettings)})


def model_files(folder: Path) -> list[Path]:
    """The files that make a checkpoint what it is."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))


def stage_search(run: Run) -> dict[str, Any]:
    """eval/<set>/snippets.jsonl: {id, results} for every question."""
    searched = {}
    for name, path in run.eval_sets.items():
        questions, _ = data.load_questions(path)
        found = open_search(run).search([q["question"] for q in questions], run.cfg.search_results)
        rows = ({"id": q["id"], "results": found[q["question"]]} for q in questions)
        searched[name] = write_jsonl(run.out / "eval" / name / "snippets.jsonl", rows)
    return searched


def open_search(run: Run) -> retrieve.Serper | retrieve.Documents:
    """The engine of --search."""
    return retrieve.engine(run.cfg.search, Path(run.cfg.search_cache or run.out / "search.jsonl"))


def stage_eval(run: Run, setting: str) -> None:
    """Samples of one setting on every evaluation set."""
    cfg, generate = run.cfg, sampler(run, setting)
    bare = setting.removesuffix(RET)
    mode = "off" if bare == "thinkoff" else "on"
    how = sample.Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p)
    for name, path in run.eval_sets.items():
        questions, _ = data.load_questions(path)
        jobs = [(q, mode, k) for q in questions for k in range(cfg.eval_draws)]
        turn = plain = with_results(run, name) if setting.endswith(RET) else lambda q, k: run.turn(q["question"])
        if bare == REFINE:
            source = run.samples_path(name, "thinkon" + setting.removeprefix(REFINE))
            first, what = answers_of(source), f"{setting} on {name}: feedback"
            feedback = load_prompt(ROOT / "prompts" / "refine_feedback.txt")
            told = run.file(name, setting, "feedback")

            def criticise(q: dict[str, Any], k: int, text: str = feedback, first: dict = first) -> str:
                return fill(text, question=q["question"], answer=first[q["id"], k])

            draw(run, generate, jobs, told, what, cfg.max_new, how, criticise)
            turn = refined(plain, first, answers_of(told))
        draw(run, generate, jobs, run.samples_path(name, setting), f"{setting} on {name}", cfg.max_new, how, turn)


def with_results(run: Run, name: str) -> Callable[[dict[str, Any], int], str]:
    """User turns with the search results of each question in front (4.1)."""
    template = load_prompt(ROOT / "prompts" / "retrieval.txt")
    found = {r["id"]: r["results"] for r in read_jsonl(run.out / "eval" / name / "snippets.jsonl", ("id", "results"))}

    def turn(q: dict[str, Any], k: int) -> str:
        return fill(template, snippets=retrieve.as_text(found[q["id"]]), prompt=run.turn(q["question"]))

    return turn


def answers_of(path: Path) -> dict[tuple[str, int], str]:
    """(id, draw) -> answer of saved samples, "(none)" where there is none."""
    return {(r["id"], r["draw"]): data.parse_sample(r).answer or "(none)" for r in read_jsonl(path)}


def refined(
    plain: Callable[[dict[str, Any], int], str], first: dict[tuple[str, int], str], told: dict[tuple[str, int], str]
) -> Callable[[dict[str, Any], int], str]:
    """User turns of Self-Refine: the question, the first answer, what the model itself said about it.

    PAPER: Self-Refine, no prompts, no number of rounds.  HERE: one round with our own prompts.
    WHY:   a round costs two more completions, and how many the paper ran is not said.
    """
    template = load_prompt(ROOT / "prompts" / "refine.txt")

    def turn(q: dict[str, Any], k: int) -> str:
        return fill(template, prompt=plain(q, k), answer=first[q["id"], k], feedback=told[q["id"], k])

    return turn


def thinking_settings(run: Run) -> list[list[str]]:
    """Settings with thinking on that are compared with each other: without search results, and with them."""
    on = [s for s in run.settings if s.removesuffix(RET) != "thinkoff"]
    return [[s for s in on if s.endswith(RET) is ret] for ret in (False, True)]


def stage_labels(run: Run) -> dict[str, Any]:
    """Labels of the evaluated thoughts, for the base model and every method."""
    annotator = annotate.CueAnnotator(annotate.read_cues(run.cfg.cues))
    labelled = {}
    for name in run.eval_sets:
        for setting in ("thinkon", *run.methods):
            rows = analysis.to_label(read_jsonl(run.samples_path(name, setting)), run.cfg.label_eval)
            records, _ = annotate.annotate(rows, annotator)
            labelled[f"{name}, {setting}"] = write_jsonl(run.file(name, setting, "labels"), records)
    return labelled


def stage_judge(run: Run) -> dict[str, Any]:
    """eval/judge.json: verdicts on truthful and chosen short answers, claims of long ones."""
    cfg, stop, server = run.cfg, threading.Event(), run.cfg.judge != "stand-in"
    if server and run.ranks.world > 1:
        raise InputError(
            "a judge may take hours, and other processes do not wait that long: judge with one process "
            "(python mralign.py ... judge); this command then reuses its verdicts"
        )
    with contextlib.ExitStack() as stack:
        ledger = client = None
        if server:
            path = run.out / "judge" / "calls.jsonl"
            ledger = stack.enter_context(Ledger(path, cfg.budget_usd, cfg.budget_tokens, stop))
            client = cfg.clients({"judge": parse_endpoint(cfg.judge)}, stop)["judge"]
        who, second = (judge.open_judge(cfg, ledger, client, cfg.seed + k) for k in range(2))
        out: dict[str, Any] = who.fingerprint() | {"abstentions": judge.probe(who), "sets": {}}
        for name, path in run.eval_sets.items():
            questions = {q["id"]: q for q in data.load_questions(path)[0]}
            task = next(iter(questions.values())).get("task", "short")
            if task == "long":
                out["sets"][name] = judge_long(run, name, who, stop)
            elif task == "truthful" or name in cfg.judge_sets.split(","):
                out["sets"][name] = judge_answers(run, name, questions, who, second, stop)
        if ledger is not None:
            out["cost"] = {"usd": round(ledger.usd, 6), "tokens": ledger.tokens}
    write_json(run.out / "eval" / "judge.json", out)
    return {"judge": who.name, "sets": list(out["sets"])}


def judge_answers(
    run: Run,
    name: str,
    questions: dict[str, dict[str, Any]],
    who: judge.Judge,
    second: judge.Judge,
    stop: threading.Event,
) -> dict[str, Any]:
    """setting -> summary of the verdicts on one set, with the judge's agreement with itself."""
    out = {}
    for setting in run.settings:
        rows = read_jsonl(run.samples_path(name, setting))
        graded = judge.grade(rows, questions, who, run.cfg.annotate_concurrency, stop)
        write_jsonl(run.file(name, setting, "judged"), graded)
        again = judge.agreement(rows, questions, graded, second, run.cfg.annotate_concurrency, stop)
        out[setting] = judge.summary(graded) | {"again": again}
    return out


def judge_long(run: Run, name: str, who: judge.Judge, stop: threading.Event) -> dict[str, Any]:
    """setting -> VeriScore of one set of long answers, under one K; without --search the numbers of claims."""
    cfg, rows = run.cfg, {}
    for setting in run.settings:
        samples = read_jsonl(run.samples_path(name, setting))
        rows[setting] = veriscore.extract(samples, who, setting, cfg.annotate_concurrency, stop)
    if cfg.search:
        claims = [claim for of in rows.values() for row in of for claim in row["all_claims"]]
        results = open_search(run).search(claims, cfg.verify_results)
        rows = {s: veriscore.verify(of, results, who, cfg.annotate_concurrency, stop) for s, of in rows.items()}
    for setting, of in rows.items():
        write_jsonl(run.file(name, setting, "claims"), of)
    k = cfg.claims_k or veriscore.median_claims([row for of in rows.values() for row in of])
    return {setting: veriscore.summary(of, k) for setting, of in rows.items()}


def load_scored(run: Run, name: str) -> dict[str, list[dict[str, Any]]]:
    """setting -> scored samples of one set."""
    return {
        setting: [evaluation.score(r, run.tokenizer) for r in read_jsonl(run.samples_path(name, setting))]
        for setting in run.settings
    }


def short_sets(run: Run) -> dict[str, list[dict[str, Any]]]:
    """name -> questions of the sets that are scored by exact match: their answers are short."""
    loaded = {name: data.load_questions(path)[0] for name, path in run.eval_sets.items()}
    return {name: of for name, of in loaded.items() if of[0].get("task", "short") == "short"}


def stage_scores(run: Run) -> None:
    """eval/scores.json: per set and setting the metrics, per set the paired differences between settings."""
    scores: dict[str, Any] = {}
    seen = {data.normalise(q["question"]) for q in data.load_questions(run.cfg.questions)[0]}
    for name, questions in short_sets(run).items():
        scored = load_scored(run, name)
        pairs = [(a, b) for order in thinking_settings(run) for i, a in enumerate(order) for b in order[:i]]
        # Ids that differ after "#" only ask for the same fact; the bootstrap draws them together.
        fact: dict[str, str] | None = {q["id"]: q["id"].partition("#")[0] for q in questions}
        if len(set(fact.values())) == len(fact):
            fact = None  # every question stands alone: McNemar's test applies
        scores[name] = {
            "metrics": {setting: evaluation.metrics(rows) for setting, rows in scored.items()},
            "differences": {f"{a} - {b}": evaluation.compare(scored[a], scored[b], cluster=fact) for a, b in pairs},
            "seen_in_training": sum(data.normalise(q["question"]) in seen for q in questions),
        }
        if any(q.get("needs_options") for q in questions):
            kept = {q["id"] for q in questions if not q.get("needs_options")}
            fewer = {s: [row for row in rows if row["id"] in kept] for s, rows in scored.items()}
            scores[f"{name}, no stems that need options"] = {
                "metrics": {setting: evaluation.metrics(rows) for setting, rows in fewer.items()},
                "differences": {},
                "seen_in_training": scores[name]["seen_in_training"],
            }
    write_json(run.out / "eval" / "scores.json", scores)


def stage_analysis(run: Run) -> None:
    """eval/analysis.json (analysis.py)."""
    out: dict[str, Any] = {"positions": {}, "strata": {}, "outcomes": {}, "change": {}}
    for name in short_sets(run):
        scored = load_scored(run, name)
        plain = thinking_settings(run)[0]
        for setting in plain:
            samples = read_jsonl(run.samples_path(name, setting))
            out["positions"][f"{name}, {setting}"] = analysis.positions(samples)
        out["strata"][name] = {s: analysis.strata(scored["thinkon"], scored[s]) for s in plain if s != "thinkon"}
        if run.cfg.label_eval:
            labels = {s: read_labels(run, name, s) for s in ("thinkon", *run.methods)}
            out["outcomes"][name] = {s: analysis.label_outcomes(scored[s], of) for s, of in labels.items()}
            before = list(labels["thinkon"].values())
            out["change"][name] = {
                m: analysis.change(before, list(labels[m].values()), fitter(run.cfg), seed=run.cfg.seed)
                for m in run.methods
            }
    rows = data.load_train(run.out / "train.jsonl")
    classes = ([r["labels"] for r in rows if r["label"] is side] for side in (True, False))
    out["intervals"] = analysis.matrix_intervals(*classes, fitter(run.cfg), seed=run.cfg.seed)
    out["weights"] = analysis.weight_audit(rows, run.tokenizer)
    write_json(run.out / "eval" / "analysis.json", out)


def read_labels(run: Run, name: str, setting: str) -> dict[str, analysis.Labels]:
    """id -> labels of the evaluated thoughts that were labelled."""
    rows = analysis.to_label(read_jsonl(run.samples_path(name, setting)), run.cfg.label_eval)
    return analysis.labels_of(rows, read_jsonl(run.file(name, setting, "labels")))


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done again only when something it depends on has changed."""

    name: str
    work: Callable[[], dict[str, Any] | None]
    settings: tuple[str, ...]
    inputs: list[Path]
    outputs: list[Path]
    everyone: bool  # all ranks work on it; else rank 0 alone


def units(run: Run) -> list[Unit]:
    """The pipeline in order, with what each part reads, obeys and writes."""
    cfg, out = run.cfg, run.out
    model = model_files(run.source.folder)
    decoding = ("model", "prompt", "system", "dtype", "seed", "kernel", "backend", "base_url", "served_model")
    draws = ("draws", "draw_temperature", "draw_top_p", "draw_max_new")
    filters = ("draws", "keep", "min_segments", "max_segments", "min_think_tokens", "max_think_tokens", "matcher")
    fit = ("transitions", "labels", "em_iterations", "em_damping", "em_prior")
    training = ("dtype", *(f.name for f in dataclasses.fields(train.TrainSettings)))
    labelling_settings = (*labelling.SHAPING, "seed")
    drawing = (*decoding, "temperature", "top_p", "top_k", "min_p", "max_new")
    evaluating = ("eval_sets", *drawing, "eval_draws", "search", "search_results")
    sets = [Path(p) for p in run.eval_sets.values()]
    adapter = {m: [out / m / lora.WEIGHTS] for m in run.methods}
    sampled_on = {s: [run.samples_path(name, s) for name in run.eval_sets] for s in run.settings}
    rows, sampled, labelled = out / "candidates.jsonl", out / "samples.jsonl", out / "annotations.jsonl"
    fitted = [out / "transitions.json", out / "train.jsonl"]
    scores, analysed = out / "eval" / "scores.json", out / "eval" / "analysis.json"
    snippets = [out / "eval" / name / "snippets.jsonl" for name in run.eval_sets]
    labels = [run.file(name, s, "labels") for name in run.eval_sets for s in ("thinkon", *run.methods)]
    judged = out / "eval" / "judge.json"
    judging = (
        "judge",
        "judge_max_tokens",
        "judge_sets",
        "search",
        "verify_results",
        "claims_k",
        "seed",
    )
    which = ("method", "also", "eval_sets")
    prompts = sorted((ROOT / "prompts").glob("judge_*.txt"))
    all_samples = sum(sampled_on.values(), [])
    documents = [Path(cfg.search)] if cfg.search and not cfg.search.startswith("serper") else []
    questions = [Path(cfg.questions)]
    return [
        Unit("sample", lambda: stage_sample(run), decoding + draws, model + questions, [sampled], True),
        Unit("candidates", lambda: stage_candidates(run), filters, [sampled], [rows], False),
        Unit(
            "annotate",
            lambda: stage_annotate(run),
            labelling_settings,
            [rows, *labelling.inputs(cfg)],
            [labelled, labelling.manifest_path(labelled)],
            False,
        ),
        Unit("fit", lambda: stage_fit(run), fit, [rows, labelled], fitted, False),
        *(
            Unit(f"train {m}", lambda m=m: stage_train(run, m), training, [*model, fitted[1]], adapter[m], True)
            for m in run.methods
        ),
        *(
            [Unit("search", lambda: stage_search(run), ("search", "search_results"), sets + documents, snippets, False)]
            if any(s.endswith(RET) for s in run.settings)
            else []
        ),
        *(
            Unit(f"eval {s}", lambda s=s: stage_eval(run, s), evaluating, reads(run, s), sampled_on[s], True)
            for s in run.settings
        ),
        *(
            [Unit("labels", lambda: stage_labels(run), ("label_eval",), [*all_samples, Path(cfg.cues)], labels, False)]
            if cfg.label_eval
            else []
        ),
        *(
            [Unit("judge", lambda: stage_judge(run), judging + which, [*sets, *all_samples, *prompts], [judged], False)]
            if cfg.judge
            else []
        ),
        Unit("scores", lambda: stage_scores(run), which, [*questions, *sets, *all_samples], [scores], False),
        Unit(
            "analysis",
            lambda: stage_analysis(run),
            (*which, "label_eval", "seed", *fit),
            [*sets, *all_samples, *fitted, *(labels if cfg.label_eval else [])],
            [analysed],
            False,
        ),
        Unit(
            "report",
            lambda: stage_report(run),
            which,
            [*fitted, scores, analysed, *([judged] if cfg.judge else [])],
            [out / "results.json"],
            False,
        ),
    ]


def reads(run: Run, setting: str) -> list[Path]:
    """The files that the samples of a setting depend on."""
    method, out = adapter_of(run, setting), run.out
    files = [*model_files(run.source.folder), *map(Path, run.eval_sets.values())]
    files += [out / method / lora.WEIGHTS] if method else []
    if setting.endswith(RET):
        files += [ROOT / "prompts" / "retrieval.txt"]
        files += [out / "eval" / name / "snippets.jsonl" for name in run.eval_sets]
    if setting.startswith(REFINE):
        files += [ROOT / "prompts" / name for name in ("refine_feedback.txt", "refine.txt")]
        files += [run.samples_path(name, "thinkon" + setting.removeprefix(REFINE)) for name in run.eval_sets]
    return files


def perform(run: Run, unit: Unit, forced: bool) -> None:
    """Do the unit's work unless its receipt says that nothing has changed since; leave a new receipt."""
    receipt = receipt_path(run, unit)
    known = torch.zeros(
        33, dtype=torch.int64, device=run.ranks.device
    )  # rank 0 tells: reuse it?, the 32 bytes of its key
    if run.ranks.rank == 0:
        key = unit_key(run, unit)
        old = read_json(receipt) if receipt.exists() else {"key": None}
        known[0] = not forced and old["key"] == key and all(p.exists() for p in unit.outputs)
        known[1:] = torch.tensor(list(bytes.fromhex(key)))
    reuse, *key_bytes = run.ranks.sum(known).tolist()
    run.key = bytes(key_bytes).hex()
    if reuse:
        run.ranks.log(f"[{unit.name}] unchanged, reused (took {old['seconds']} s)" if run.ranks.rank == 0 else "")
        return
    run.ranks.log(f"[{unit.name}]")
    started = time.perf_counter()
    result = unit.work() if unit.everyone or run.ranks.rank == 0 else None
    run.ranks.wait()
    if run.ranks.rank == 0:
        seconds = round(time.perf_counter() - started, 1)
        write_json(receipt, {"key": run.key, "seconds": seconds, "result": result})
        run.ranks.log(f"[{unit.name}] {seconds} s {json.dumps(result)}")


def receipt_path(run: Run, unit: Unit) -> Path:
    """Where the unit notes what it was last done with."""
    return run.out / "done" / f"{unit.name.replace(' ', '-')}.json"


def unit_key(run: Run, unit: Unit) -> str:
    """What the unit depends on: its settings, the bytes of its inputs, the program."""
    settings = {name: getattr(run.cfg, name) for name in unit.settings}
    inputs = [[str(p), checksum(p)] for p in unit.inputs]
    code = [[str(p.relative_to(ROOT)), checksum(p)] for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])]
    return digest([unit.name, settings, inputs, code])


def checksum(path: Path) -> str:
    """SHA-256 of a file, read once as long as its size and time stay: the weights are an input of many units."""
    if not path.exists():
        return sha256_file(path)  # which says so
    stat = path.stat()
    return _checksum_as_of(path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _checksum_as_of(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_file(path)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def stage_report(run: Run) -> dict[str, Any]:
    """results.json, the figures, report.html and the tables on stdout."""
    out = run.out
    scores, analysed = read_json(out / "eval" / "scores.json"), read_json(out / "eval" / "analysis.json")
    judged = read_json(out / "eval" / "judge.json") if run.cfg.judge else {"sets": {}}
    transitions = read_json(out / "transitions.json")
    rows = data.load_train(out / "train.jsonl")
    shown = traces(run, rows, transitions)
    images = draw_figures(run, transitions, rows, analysed)
    if run.methods != ["sft"]:  # SFT has no reward to draw
        story = one_question(run, shown[0], rows, transitions)
        write_json(out / "figures" / "one_question.json", story)
        figures.one_question_figure(story, out / "figures" / "one_question.svg")
    stages = {u.name: read_json(p) for u in units(run) if (p := receipt_path(run, u)).exists()}
    results = {
        "receipt": receipt(run),
        "stages": {name: {"seconds": r["seconds"], **(r["result"] or {})} for name, r in stages.items()},
        "weights": analysed["weights"],
        "scores": scores,
        "judge": judged,
    }
    notes = print_scores(scores, judged)
    settings = {k: v for k, v in dataclasses.asdict(run.cfg).items() if v != ""}
    page.trace_page(
        shown,
        out / "report.html",
        f"MR-ALIGN run {out.name}",
        tables=tables.of_run(results, analysed, weighted_method(run)),
        images=images,
        facts={"Receipt": results["receipt"], "Settings": settings},
        pairs=before_and_after(run),
        notes=notes,
    )
    for method in run.methods:
        write_card(run, method, scores)
    write_json(out / "results.json", results)
    print(f"\n{out}/results.json, {out}/report.html, {out}/figures/, adapters in {out}/<method>/")
    return {}


def draw_figures(
    run: Run, transitions: dict[str, Any], rows: list[dict[str, Any]], analysed: dict[str, Any]
) -> dict[str, Path]:
    """All figures of the run as PNG; caption -> file, in the order of the page."""
    folder, images = run.out / "figures", {}

    def add(caption: str, file: str, drawn: Callable[[Path], None]) -> None:
        drawn(folder / file)
        images[caption] = folder / file

    positions, strata, method = analysed["positions"], analysed["strata"], weighted_method(run)
    if positions:
        add("Where the right answer is lost (Fig. 1)", "positions.png", lambda p: charts.positions_figure(positions, p))
        add("Who gains (Fig. 5)", "strata.png", lambda p: charts.strata_figure(strata, p))
    for name, of in analysed["change"].items():
        file = "change.png" if name == next(iter(analysed["change"])) else f"change-{name}.png"
        caption = f"How the thinking changed on {name} (Fig. 4)"
        add(caption, file, lambda p, of=of: charts.change_figure(of[method], "thinkon", method, p))
    for name, of in analysed["outcomes"].items():
        file = "outcomes.png" if name == next(iter(analysed["outcomes"])) else f"outcomes-{name}.png"
        two = {s: of[s] for s in ("thinkon", method)}
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
        print(f"\n{name}\n{evaluation.table(of['metrics'])}\n\n{difference_lines(of['differences'])}")
        if text := evaluation.draws_table(of["metrics"]):
            print(f"\n{text}")
        notes += [f"{name}, {s}: {line}" for s, m in of["metrics"].items() for line in evaluation.warnings(m)]
        if of["seen_in_training"]:
            notes.append(f"{name}: {of['seen_in_training']} of its questions are also training questions")
    for name, of in judged["sets"].items():
        print(f"\n{name}, judge: {judged['judge']}\n{tables.markdown(tables.judge_rows(of))}")
    if judged["sets"] and judged["judge"] == judge.STAND_IN:
        notes.append(
            "the judge is a stand-in that goes by rules: its figures show that the path works, not what is true"
        )
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    return notes


def before_and_after(run: Run, n: int = 6) -> list[dict[str, Any]]:
    """Questions of the first set as the base model and the aligned one thought about them.

    First where the base dropped the gold and the aligned model used it, then where alignment made it worse, then where
    both fail; what is shown is the first of each kind in the order of the questions, not a choice.
    """
    method = weighted_method(run)
    for name in list(short_sets(run))[:1]:
        kinds: dict[str, list[dict[str, Any]]] = {"found, then used": [], "made worse": [], "wrong in both": []}
        sides = {
            s: {r["id"]: r for r in read_jsonl(run.samples_path(name, s)) if r["draw"] == 0}
            for s in ("thinkon", method)
        }
        labels = {s: read_labels(run, name, s) if run.cfg.label_eval else {} for s in sides}
        for key, sample_before in sides["thinkon"].items():
            before, after = evaluation.score(sample_before), evaluation.score(sides[method][key])
            good = [x["em_t"] and x["em_a_equal"] for x in (before, after)]
            if good == [False, True] and before["em_t"]:
                kind = "found, then used"
            elif not good[1]:
                kind = "made worse" if good[0] else "wrong in both"
            else:
                continue
            if len(kinds[kind]) < n // 2:
                told = {s: figures.told(sides[s][key], labels[s].get(key)) for s in sides}
                pair = {"id": key, "question": sample_before["question"], "golds": sample_before["answers"]}
                kinds[kind].append(pair | {"kind": kind, "set": name, "sides": told})
        return [pair for of in kinds.values() for pair in of][:n]
    return []


def difference_lines(differences: dict[str, Any]) -> str:
    """Paired differences between settings as aligned text, in points with a 95 % interval."""
    lines = [f"{'paired difference, points':<26}{'Acc':>24}{'Mis':>26}"]
    for pair, of in differences.items():
        cells = [f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]" for d in of.values()]
        lines.append(f"{pair:<26}" + "".join(f"{c:>24}  " for c in cells).rstrip())
    return "\n".join(lines)


def receipt(run: Run) -> dict[str, Any]:
    """What was run, on what."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = ""
    if shutil.which("git"):  # a downloaded archive runs on machines without it
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name(run.ranks.device) if run.ranks.device.type == "cuda" else platform.machine()
    return {
        "command": " ".join(["mralign.py", *sys.argv[1:]]),
        "commit": commit or "unknown, not a git checkout",
        "model": run.source.name,
        "model commit": run.source.commit or "none, a directory",
        "processes": run.ranks.world,
        "device": f"{run.ranks.device.type} {device}, {os.cpu_count()} cores",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, op {run.impl}",
        "seed": run.cfg.seed,
        "decoding": f"{run.cfg.eval_draws} draw(s), temperature {run.cfg.temperature}, top_p {run.cfg.top_p}, top_k "
        f"{run.cfg.top_k}, min_p {run.cfg.min_p}, at most {run.cfg.max_new} tokens, {run.cfg.backend}",
    }


def traces(run: Run, rows: list[dict[str, Any]], transitions: dict[str, Any], n: int = 6) -> list[dict[str, Any]]:
    """The first chosen and rejected training rows for the page, with the log-ratios MR-ALIGN's adapter gives them.

    Rejected rows that found a gold and dropped it come first: they are what the method is about.
    """
    candidates = {r["id"]: r for r in read_jsonl(run.out / "candidates.jsonl")}
    records = {r["id"]: r for r in read_jsonl(run.out / "annotations.jsonl")}

    def dropped(r: dict[str, Any]) -> bool:
        return data.exact_match(parsed(r).thought, "", candidates[r["id"]]["answers"])[0]

    telling = sorted(rows, key=lambda r: not dropped(r))
    picked = [r for label in (False, True) for r in [r for r in telling if r["label"] is label][: n // 2]]
    shown = []
    model = run.base_model()
    lora.load(model, run.out / weighted_method(run))
    for r in picked:
        steps = figures.step_records(r, records[r["id"]], transitions)
        *per_step, rest = step_logratios(model, r, run)
        for s, (tokens, logratio) in zip(steps, per_step, strict=True):
            s |= {"tokens": tokens, "logratio": logratio}
        candidate = candidates[r["id"]]
        answer = parsed(r).answer
        shown.append(
            {
                "id": r["id"],
                "question": candidate["question"],
                "golds": candidate["answers"],
                "chosen": r["label"],
                "outcome": "right" if r["label"] else "gold found and dropped" if dropped(r) else "gold not found",
                "answer": answer,
                "segments": steps,
                "answer_logratio": rest[1],
            }
        )
    return shown


def parsed(row: dict[str, Any]) -> data.Parsed:
    """The completion of a training row."""
    return data.parse(row["completion"], opened=opens_thought(row["prompt"]))


def weighted_method(run: Run) -> str:
    """The method whose adapter the page and the picture show: mralign if it was trained, else the last but sft."""
    return "mralign" if "mralign" in run.methods else sorted(run.methods, key=lambda m: m != "sft")[-1]


def one_question(
    run: Run, trace: dict[str, Any], rows: list[dict[str, Any]], transitions: dict[str, Any]
) -> dict[str, Any]:
    """Every number between one shown trace and its gradient, after the last training step (report.build_story)."""
    cfg = run.cfg
    row = next(r for r in rows if r["id"] == trace["id"])
    annotation = next(r for r in read_jsonl(run.out / "annotations.jsonl") if r["id"] == trace["id"])
    drawn = read_jsonl(run.out / "samples.jsonl")
    off = next(s for s in drawn if f"{trace['id']}#".startswith(f"{s['id']}#") and s["mode"] == "off")
    last = read_jsonl(run.out / weighted_method(run) / "metrics.jsonl")[-1]
    return figures.build_story(
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


@torch.no_grad()
def step_logratios(model: qwen.Qwen3, row: dict[str, Any], run: Run) -> list[tuple[int, float]]:
    """(tokens, log pi / pi_ref in nats) of every step of a training row, then of all its other tokens."""
    completion = row["completion_ids"]
    batch = data.pack([(row["prompt_ids"], completion, torch.ones(len(completion)))]).to(run.ranks.device)
    each = torch.arange(len(completion) + 1)  # every token a sequence of its own
    logp = []
    for context in (contextlib.nullcontext(), lora.disabled(model)):
        with context:
            hidden = model(batch.ids, batch.cu_seqlens)[batch.predict]
            logp.append(segment_logprob(hidden, model.head, batch.targets, batch.w, each, run.impl)[1].double().cpu())
    _, offsets = token_offsets(run.tokenizer, completion)
    owner = data.token_steps(offsets, row["spans"])  # step of each token, -1 outside
    ratio = logp[0] - logp[1]
    return [(int((owner == k).sum()), float(ratio[owner == k].sum())) for k in [*range(len(row["spans"])), -1]]


def check(cfg: Config) -> None:
    """Refuse settings that cannot work, before any time is spent. Raises InputError."""
    for name in ("model", "questions", "eval_sets"):
        if not getattr(cfg, name):
            raise InputError(f"--{name.replace('_', '-')} is not set; give it, or --config configs/mini.json")
    allowed = {
        "dtype": ("float32", "bfloat16"),
        "backend": ("local", "openai"),
        "keep": ("first", "all"),
        "matcher": ("equal", "contains"),
        "transitions": ("em", "frequency"),
        "labels": ("one", "two"),
        "kernel": ("", "torch", "triton"),
    }
    for name, values in allowed.items():
        if getattr(cfg, name) not in values:
            raise InputError(f"--{name} is {getattr(cfg, name)!r}, must be one of {', '.join(v for v in values if v)}")
    if (cfg.backend == "openai") != bool(cfg.base_url):
        raise InputError("--backend openai and --base-url http://HOST:PORT/v1 go together; give both or neither")
    for method in cfg.method.split(","):
        if method.strip() not in train.METHODS:
            raise InputError(f"--method {method!r} is not one of {', '.join(train.METHODS)}")
    for part in cfg.eval_sets.split(","):
        if "=" not in part:
            raise InputError(f"--eval-sets {part!r} must look like name=path.jsonl")
    labelling.check(cfg)
    check_settings(cfg)
    for path in (cfg.questions, cfg.prompt, *(part.split("=", 1)[1] for part in cfg.eval_sets.split(","))):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file; paths are relative to the current directory")


def check_settings(cfg: Config) -> None:
    """Refuse evaluation settings that do not exist or lack what they need. Raises InputError."""
    methods = [m.strip() for m in cfg.method.split(",")]
    also = [part.strip() for part in cfg.also.split(",") if part.strip()]
    known = {REFINE, *(s + RET for s in ("thinkoff", "thinkon", REFINE, *methods))}
    for k, setting in enumerate(also):
        if setting not in known or setting in also[:k]:
            raise InputError(f"--also {setting!r} is not one of {', '.join(sorted(known))}, each once")
        if setting.endswith(RET) and not cfg.search:
            raise InputError(f"--also {setting} needs --search: serper, serper#KEY_VARIABLE or a file of documents")
        if setting == REFINE + RET and "thinkon" + RET not in also[:k]:
            raise InputError(f"--also {setting} refines the samples of base{RET}; put base{RET} before it")
    for name in ("eval_draws", "search_results"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, must be 1 or more")
    if cfg.label_eval and cfg.annotator != "cues":
        raise InputError("--label-eval labels by cue phrases only; use --annotator cues or leave --label-eval at 0")
    judge.check(cfg)


def perform_stages(cfg: Config, source: hub.Source, stages: list[str]) -> None:
    """Join the other processes and do what is due, or the stages that are named. Raises what `main` translates."""
    with process_group() as ranks, ranks.stop.listen():
        run = Run(cfg, source, ranks)
        work = units(run)
        known = [u.name.split()[0] for u in work]
        if unknown := [s for s in stages if s not in known]:
            raise InputError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(dict.fromkeys(known))}")
        if ranks.rank == 0:
            (run.out / "status.json").unlink(missing_ok=True)
        ranks.log(f"model {source.name}, " + (f"commit {source.commit}" if source.commit else "a directory"))
        for mode in ("on", "off"):
            ranks.log(f"prompt, thinking {mode}: {run.prompt(run.turn('QUESTION'), mode)!r}")
        ranks.log(f"{ranks.world} process(es) on {ranks.device.type}, log-probability op: {run.impl}")
        for unit in work:
            if not stages or unit.name.split()[0] in stages:
                perform(run, unit, forced=bool(stages))


def dry_run(cfg: Config, gpu: str, gpus: int) -> None:
    """Print what training would take and, with a committee, what its labels would cost; nothing is run or sent."""
    print(plan.report_text(cfg.model, Path(cfg.out), cfg.method, cfg.dtype, train_settings(cfg), gpu, gpus))
    if cfg.annotator == "committee":
        labelling.check(cfg)
        print("\n" + labelling.price_table(candidates_to_label(cfg), cfg, Path(cfg.out), cfg.seed))


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code, see endings.py."""

    def more(parser: Any) -> None:
        parser.add_argument("stages", nargs="*", metavar="STAGE", help="run these stages only; none: all that are due")
        what = "print what training would take and what a committee's labels would cost, and stop"
        parser.add_argument("--dry-run", action="store_true", help=what)
        parser.add_argument("--gpu", default="a800-40", choices=plan.GPUS, help="dry run: which GPU [a800-40]")
        parser.add_argument("--gpus", type=int, default=4, metavar="int", help="dry run: how many of them [4]")

    out = None
    try:
        cfg, rest = cli(Config, argv, __doc__, more)
        if rest.dry_run:
            dry_run(cfg, rest.gpu, rest.gpus)
            return 0
        check(cfg)
        # Before the ranks join, since a download may take longer than they wait for each other; the cache has locks.
        source = hub.locate(cfg.model, cfg.revision)
        out = Path(cfg.out)
        perform_stages(cfg, source, rest.stages)
    except ENDINGS as error:
        return settle(error, out)
    return settle(None, out)


if __name__ == "__main__":
    sys.exit(main())
