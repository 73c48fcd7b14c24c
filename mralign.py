"""MR-ALIGN (arXiv 2510.24794) from questions to a trained and evaluated adapter.

  python mralign.py --config configs/mini.json                        the whole pipeline, one process
  torchrun --standalone --nproc_per_node=4 mralign.py --config ...    the same on four GPUs (or CPU processes)
  python mralign.py --config configs/mini.json eval report            these stages only, from the files already there

Stages, each reading and writing files under --out:
  sample      questions -> samples.jsonl: `draws` completions with thinking on and as many with it off (3.1.1)
  candidates  -> candidates.jsonl: thoughts that made the answer right (chosen) or wrong (rejected) (3.1.1)
  annotate    -> annotations.jsonl: one or two of 15 meta-reasoning labels for every step, by cue phrases or by a
              committee of language models (3.1.2; docs/annotating.md)
  fit         -> transitions.json, train.jsonl: P, P_pos, P_neg by EM and the weight w of every step (3.2.2, Eq. 10)
  train       -> <method>/adapter_model.safetensors: LoRA under DDP, Eq. 9-12; metrics.jsonl
  eval        -> eval/<set>/<setting>.jsonl, eval/scores.json: Acc, Mis and their intervals (A.2)
  report      -> the tables on stdout, results.json, report.html, figures/

A stage whose settings, inputs and code have not changed since it last finished is not run again. A stage that is named
on the command line always runs. Left out here: LLM judges.
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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import annotate
import data
import em
import eval as evaluation
import export
import hub
import labelling
import lora
import model as qwen
import page
import remote
import report
import sample
import train
from client import Client, Limits, ServiceError, parse_endpoint
from files import InputError, Journal, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from kernels.segment_logprob import default_impl, segment_logprob
from ranks import Progress, Ranks, process_group
from settings import cli, opt

ROOT = Path(__file__).resolve().parent
# A server that samples is silent until a completion is finished.
PATIENCE = Limits(read=3600.0, exchange=3600.0, total=7200.0)


@dataclass(frozen=True)
class Config(train.TrainSettings, labelling.LabelSettings):
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


class Run:
    """One run: its settings, this process among the ranks, and where its files are."""

    def __init__(self, cfg: Config, source: hub.Source, ranks: Ranks) -> None:
        self.cfg, self.source, self.ranks, self.out = cfg, source, ranks, Path(cfg.out)
        self.methods = [m.strip() for m in cfg.method.split(",")]
        self.eval_sets = dict(part.split("=", 1) for part in cfg.eval_sets.split(",") if part)
        self.settings = ["thinkoff", "base", *self.methods]  # what is evaluated
        self.impl = cfg.kernel or default_impl(ranks.device)
        self.tokenizer = data.load_tokenizer(source.folder)
        self.template = data.ChatTemplate(source.folder, cfg.system)
        self.template.check(self.tokenizer)
        self.user_turn = data.load_prompt(cfg.prompt)
        self.stop_ids = stop_ids(source.folder, self.tokenizer)
        self.key = ""  # of the unit under way, see `perform`

    def base_model(self) -> qwen.Qwen3:
        """The base model, freshly loaded on this rank's device, frozen."""
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.cfg.dtype]
        return qwen.load(self.source.folder, dtype, self.ranks.device).requires_grad_(False)

    def samples_path(self, name: str, setting: str) -> Path:
        """The samples of one setting on one evaluation set."""
        return self.out / "eval" / name / f"{setting}.jsonl"

    def prompt(self, question: str, mode: str) -> str:
        """The rendered prompt of a question, thinking "on" or "off"."""
        return self.template.prompt(data.fill(self.user_turn, question=question), thinking=mode == "on")


def stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a completion: eos_token_id of generation_config.json if it is there, else of config.json.

    Raises InputError when there is none, or one the tokenizer does not have.
    """
    paths = [hub.member(folder, name) for name in ("generation_config.json", "config.json")]
    found = [(path, read_json(path).get("eos_token_id")) for path in paths if path.exists()]
    path, ids = next(((path, ids) for path, ids in found if ids is not None), (paths[-1], []))
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(i) is int and i >= 0 and tokenizer.id_to_token(i) is not None for i in ids):
        raise InputError(f"{path}: eos_token_id is {ids}; it must name tokens of tokenizer.json, restore both files")
    return set(ids)


def sampler(run: Run, setting: str) -> Callable[..., None]:
    """What completes prompts as `setting` does ("base", "thinkoff" or a trained method), as --backend says.

    Call it with (prompts, seeds, max_new, how: sample.Sampling, finished(index, completion)).
    """
    cfg = run.cfg
    if cfg.backend == "openai":
        name = setting if setting in run.methods else cfg.served_model or run.source.name
        endpoint = parse_endpoint(f"{name}@{cfg.base_url}" + (f"#{cfg.key_env}" if cfg.key_env else ""))
        client = Client(endpoint, concurrency=max(1, cfg.concurrency // run.ranks.world), limits=PATIENCE)
        eos = qwen.Config.from_json(run.source.folder / "config.json").eos_token_id
        end_id = eos if isinstance(eos, int) else eos[0]

        def by_server(prompts: Any, seeds: Any, max_new: int, how: sample.Sampling, finished: Any) -> None:
            encode = functools.partial(data.encode, run.tokenizer)
            stops = {"stop_ids": run.stop_ids, "end_id": end_id}
            again = remote.generate(
                client, encode, prompts, seeds, max_new=max_new, sampling=how, finished=finished, **stops
            )
            if again:
                run.ranks.log(f"{again} of {len(prompts)} completions came without ids and were encoded again")

        return by_server
    model = run.base_model()
    if setting in run.methods:
        lora.load(model, run.out / setting)
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
) -> float:
    """Sample every (question, mode, draw) of `jobs` and write one JSONL row each to `path`. Returns tokens a second.

    The ranks share the jobs; the seed of a completion comes from its identity, so the file does not depend on how.
    A completion is on disk as soon as it is finished: a run that is killed and started again does the others only.
    """
    ranks, cfg = run.ranks, run.cfg
    mine = jobs[ranks.rank :: ranks.world]
    prompts = [run.prompt(q["question"], mode) for q, mode, _ in mine]
    prompt_ids = [data.encode(run.tokenizer, text) for text in prompts]
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
        text, _ = data.token_offsets(run.tokenizer, c.ids[:-1] if c.finish == "stop" else c.ids)
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
    jobs = [(q, mode, k) for q in questions for mode in ("on", "off") for k in range(cfg.draws)]
    how = sample.Sampling(cfg.draw_temperature, cfg.draw_top_p, top_k=0, min_p=0.0)
    speed = draw(run, sampler(run, "base"), jobs, run.out / "samples.jsonl", "draws", cfg.draw_max_new, how)
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
        obs = [o for c in rows for o in em.observations(labels[c["id"]])]
        if cfg.transitions == "frequency":
            return em.frequency(obs, prior=cfg.em_prior)
        return em.fit(obs, max_iter=cfg.em_iterations, damping=cfg.em_damping, prior=cfg.em_prior)

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
    settings = train.TrainSettings(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(train.TrainSettings)})
    base = run.base_model()
    origin = {"rows": checksum(path), "model": digest([checksum(p) for p in model_files(run.source.folder)])}
    metrics = train.train(
        base,
        data.to_rows(rows, run.tokenizer),
        method,
        settings,
        run.ranks,
        run.out / method,
        run.impl,
        run.source.name,
        origin,
        cfg.resume,
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


def model_files(folder: Path) -> list[Path]:
    """The files that make a checkpoint what it is."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))


def stage_eval(run: Run, setting: str) -> None:
    """Samples of one setting ("thinkoff", "base" or a trained method) on every evaluation set."""
    cfg, generate = run.cfg, sampler(run, setting)
    mode = "off" if setting == "thinkoff" else "on"
    how = sample.Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p)
    for name, path in run.eval_sets.items():
        questions, _ = data.load_questions(path)
        jobs = [(q, mode, 0) for q in questions]
        draw(run, generate, jobs, run.samples_path(name, setting), f"{setting} on {name}", cfg.max_new, how)


def stage_scores(run: Run) -> None:
    """eval/scores.json: per set and setting the metrics, per set the paired differences between settings."""
    scores: dict[str, Any] = {}
    for name in run.eval_sets:
        scored = {
            setting: [evaluation.score(r, run.tokenizer) for r in read_jsonl(run.samples_path(name, setting))]
            for setting in run.settings
        }
        order = ["base", *run.methods]
        pairs = [(a, b) for i, a in enumerate(order) for b in order[:i]]
        # Ids that differ after "#" only ask for the same fact; the bootstrap draws them together.
        fact = {r["id"]: r["id"].partition("#")[0] for r in scored["base"]}
        scores[name] = {
            "metrics": {setting: evaluation.metrics(rows) for setting, rows in scored.items()},
            "differences": {f"{a} - {b}": evaluation.compare(scored[a], scored[b], cluster=fact) for a, b in pairs},
        }
    write_json(run.out / "eval" / "scores.json", scores)


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
    scoring = ("eval_sets", *decoding, "temperature", "top_p", "top_k", "min_p", "max_new")
    sets = [Path(p) for p in run.eval_sets.values()]
    adapter = {s: [out / s / lora.WEIGHTS] if s in run.methods else [] for s in run.settings}
    sampled_on = {s: [run.samples_path(name, s) for name in run.eval_sets] for s in run.settings}
    rows, sampled, labelled = out / "candidates.jsonl", out / "samples.jsonl", out / "annotations.jsonl"
    fitted = [out / "transitions.json", out / "train.jsonl"]
    scores = [out / "eval" / "scores.json"]
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
            Unit(f"eval {s}", lambda s=s: stage_eval(run, s), scoring, model + sets + adapter[s], sampled_on[s], True)
            for s in run.settings
        ),
        Unit(
            "eval scores",
            lambda: stage_scores(run),
            ("method", "eval_sets"),
            sum(sampled_on.values(), []),
            scores,
            False,
        ),
        Unit("report", lambda: stage_report(run), ("method",), [*fitted, *scores], [out / "results.json"], False),
    ]


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
    code = [[p.name, checksum(p)] for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")])]
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
    out, figures = run.out, run.out / "figures"
    scores, transitions = read_json(out / "eval" / "scores.json"), read_json(out / "transitions.json")
    rows = data.load_train(out / "train.jsonl")
    curves = {m: read_jsonl(out / m / "metrics.jsonl") for m in run.methods}
    report.transition_figure(transitions, figures / "transitions.png")
    report.weights_figure(rows, figures / "weights.png")
    report.curves_figure(curves, figures / "curves.png")
    shown = traces(run, rows, transitions)
    if run.methods != ["sft"]:  # SFT has no reward to draw
        story = one_question(run, shown[0], rows, transitions)
        write_json(figures / "one_question.json", story)
        report.one_question_figure(story, figures / "one_question.svg")
    stages = {u.name: read_json(p) for u in units(run) if (p := receipt_path(run, u)).exists()}
    results = {
        "receipt": receipt(run),
        "stages": {name: {"seconds": r["seconds"], **(r["result"] or {})} for name, r in stages.items()},
        "weights": report.weight_audit(rows),
        "scores": scores,
    }
    tables = {}
    for name, of in scores.items():
        text = evaluation.table(of["metrics"])
        print(f"\n{name}\n{text}\n\n{difference_lines(of['differences'])}")
        tables[f"Results on {name}"] = page.markdown_rows(text)
    tables["Step weights by class"] = results["weights"]
    settings = {k: v for k, v in dataclasses.asdict(run.cfg).items() if v != ""}
    page.trace_page(
        shown,
        out / "report.html",
        f"MR-ALIGN run {out.name}",
        tables=tables,
        images={
            "Transition matrices and step weights": figures / "transitions.png",
            "Weights of all steps": figures / "weights.png",
            "Training": figures / "curves.png",
        },
        facts={"Receipt": results["receipt"], "Settings": settings},
    )
    for method in run.methods:
        write_card(run, method, scores)
    write_json(out / "results.json", results)
    print(f"\n{out}/results.json, {out}/report.html, {out}/figures/, adapters in {out}/<method>/")
    return {}


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
        steps = report.step_records(r, records[r["id"]], transitions)
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
    return data.parse(row["completion"], opened=data.opens_thought(row["prompt"]))


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
    return report.build_story(
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
    _, offsets = data.token_offsets(run.tokenizer, completion)
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
    for path in (cfg.questions, cfg.prompt, *(part.split("=", 1)[1] for part in cfg.eval_sets.split(","))):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file; paths are relative to the current directory")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code.

    0 done, 3 bad input, 4 a server, a key or the budget ended the run, 5 numbers that are not finite or not right,
    130 interrupted.
    """

    def stages(parser: Any) -> None:
        parser.add_argument("stages", nargs="*", metavar="STAGE", help="run these stages only; none: all that are due")
        what = "print what annotating the candidates would cost, and send nothing"
        parser.add_argument("--dry-run", action="store_true", help=what)

    rank = int(os.environ.get("RANK", 0))
    try:
        cfg, rest = cli(Config, argv, __doc__, stages)
        check(cfg)
        if rest.dry_run:
            print(labelling.price_table(candidates_to_label(cfg), cfg, Path(cfg.out), cfg.seed))
            return 0
        # Before the ranks join, since a download may take longer than they wait for each other; the cache has locks.
        source = hub.locate(cfg.model, cfg.revision)
    except InputError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 3
    try:
        with process_group() as ranks:
            run = Run(cfg, source, ranks)
            work = units(run)
            known = [u.name.split()[0] for u in work]
            if unknown := [s for s in rest.stages if s not in known]:
                raise InputError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(dict.fromkeys(known))}")
            ranks.log(f"model {source.name}, " + (f"commit {source.commit}" if source.commit else "a directory"))
            for mode in ("on", "off"):
                ranks.log(f"prompt, thinking {mode}: {run.prompt('QUESTION', mode)!r}")
            ranks.log(f"{ranks.world} process(es) on {ranks.device.type}, log-probability op: {run.impl}")
            for unit in work:
                if not rest.stages or unit.name.split()[0] in rest.stages:
                    perform(run, unit, forced=bool(rest.stages))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except train.NumericsError as error:
        print(f"error on rank {rank}: {error}", file=sys.stderr)
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main())
