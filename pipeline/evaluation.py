"""From adapters to figures: search, samples of every variant on every set, labels, judges, scores, analyses (4.1, A).

`stages` lists what is due in order. `eval` is the only one that needs a model; the others work on saved samples.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import eval as evaluation
import lora
import sample
from common.files import ROOT, read_jsonl, write_json, write_jsonl
from common.ranks import Progress
from common.template import fill, load_prompt
from llm import judge, labelling, retrieve, veriscore
from llm.client import parse_endpoint
from llm.ledger import Ledger
from pipeline import labels as own_labels
from pipeline.config import REFINE, RET
from pipeline.reuse import Stage
from pipeline.run import Question, Run
from report import analysis

Turn = Callable[[Question, int], str]  # (question, draw) -> what the user says
Answers = dict[tuple[str, int], str]  # (question id, draw) -> answer
MATCHING = ("matcher", "score_matcher", "fold")  # when an answer is right
DECODING = (
    *("system", "dtype", "seed", "small_batches"),
    *("temperature", "top_p", "top_k", "min_p", "max_new", "eval_draws"),
)
FITTING = ("transitions", "labels", "em_iterations", "em_damping", "em_prior")


def stages(run: Run, model: dict[str, Path], training: dict[str, Path]) -> list[Stage]:
    """Everything between training and the report. model: the base model's files; training: what fit and train left."""
    cfg, out = run.cfg, run.out
    which = ("method", "also", "eval_sets")
    sets = {f"questions of {name}": Path(path) for name, path in run.eval_sets.items()}
    samples = {f"{v} on {n}": run.samples(n, v) for v in run.variants for n in run.eval_sets}
    labels = {
        f"labels of {v} on {n}": run.file(n, v, "labels") for n in cfg.labelled_sets for v in ("thinkon", *run.methods)
    }
    snippets = {f"snippets of {name}": out / "eval" / name / "snippets.jsonl" for name in run.eval_sets}
    documents = {"documents": Path(cfg.search)} if cfg.search and not cfg.search.startswith("serper") else {}
    found: list[Stage] = []
    if any(v.endswith(RET) for v in run.variants):
        found.append(Stage("search", search, ("search", "search_results"), sets | documents, snippets, dear=True))
    for variant in run.variants:
        for name in run.eval_sets:
            work = functools.partial(draw_answers, variant=variant, name=name)
            made = {f"{variant} on {name}": run.samples(name, variant)}
            reads = model | _reads(run, variant, name)
            told = {f"feedback of {variant} on {name}": run.file(name, variant, "feedback")}
            found.append(
                Stage(f"eval {variant} {name}", work, DECODING, reads, made, everyone=True, dear=True, may_leave=told)
            )
    if cfg.label_eval:
        settings = (*labelling.SHAPING, "seed", "label_eval")
        settings += ("system", "dtype") if cfg.annotator == "self" else ()  # how the model is asked
        by = {path.name: path for path in labelling.inputs(cfg)}
        own, dear = cfg.annotator == "self", cfg.annotator != "cues"
        reads = samples | by | (model if own else {})
        also = {f"labels/{name}": path for name, path in labelling.may_leave(out / "eval" / "labels").items()}
        found.append(Stage("labels", label_thoughts, settings, reads, labels, everyone=own, dear=dear, may_leave=also))
    if cfg.judge:
        prompts = {path.name: path for path in sorted((ROOT / "prompts").glob("judge_*.txt"))}
        settings = ("judge", "judge_max_tokens", "judge_sets", "search", "verify_results", "claims_k", "seed", *which)
        made = {"judge.json": out / "eval" / "judge.json"}
        kinds = [(v, n, kind) for v in run.variants for n in run.eval_sets for kind in ("judged", "claims")]
        also = {f"{v} on {n}, {kind}": run.file(n, v, kind) for v, n, kind in kinds}
        reads = sets | samples | prompts | documents
        found.append(Stage("judge", judge_answers, settings, reads, made, dear=True, may_leave=also))
    questions = {"training questions": Path(cfg.questions)}
    made = {"scores.json": out / "eval" / "scores.json"}
    found.append(Stage("scores", score, (*which, *MATCHING), questions | sets | samples, made))
    reads = sets | samples | training | (labels if cfg.label_eval else {})
    made = {"analysis.json": out / "eval" / "analysis.json"}
    found.append(Stage("analysis", analyse, (*which, *MATCHING, "label_eval", "seed", *FITTING), reads, made))
    return found


def _reads(run: Run, variant: str, name: str) -> dict[str, Path]:
    """The files, beside the base model's, that one variant's samples on one set depend on."""
    method, prompts = run.adapter_of(variant), ROOT / "prompts"
    files = {"questions": Path(run.eval_sets[name]), "prompt": run.prompt_path}
    if method:
        files["adapter"] = run.adapter(method)
        files["adapter's config"] = run.adapter(method).with_name(lora.CONFIG)
    if variant.endswith(RET):
        files |= {"retrieval.txt": prompts / "retrieval.txt", "snippets": run.out / "eval" / name / "snippets.jsonl"}
    if variant.startswith(REFINE):
        files |= {text: prompts / text for text in ("refine_feedback.txt", "refine.txt")}
        files["first answers"] = run.samples(name, "thinkon" + variant.removeprefix(REFINE))
    return files


# ---------- search and samples


def search(run: Run) -> dict[str, Any]:
    """eval/<set>/snippets.jsonl: {id, results} for every question."""
    searched = {}
    for name, path in run.eval_sets.items():
        questions, _ = data.load_questions(path)
        found = _engine(run).search([q["question"] for q in questions], run.cfg.search_results)
        rows = ({"id": q["id"], "results": found[q["question"]]} for q in questions)
        searched[name] = write_jsonl(run.out / "eval" / name / "snippets.jsonl", rows)
    return searched


def _engine(run: Run) -> retrieve.Serper | retrieve.Documents:
    """Who searches, as --search says."""
    return retrieve.engine(run.cfg.search, Path(run.cfg.search_cache or run.out / "search.jsonl"))


def draw_answers(run: Run, variant: str, name: str) -> dict[str, Any]:
    """Samples of one variant on one evaluation set."""
    cfg, bare = run.cfg, variant.removesuffix(RET)
    how = sample.Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p)
    questions, _ = data.load_questions(run.eval_sets[name])
    mode = "off" if bare == "thinkoff" else "on"
    jobs = [(q, mode, k) for q in questions for k in range(cfg.eval_draws)]
    generate = run.sampler(variant)
    turn = plain = _with_results(run, name) if variant.endswith(RET) else lambda q, k: run.turn(q["question"])
    if bare == REFINE:
        first, told = (
            answers_of(run.samples(name, "thinkon" + variant.removeprefix(REFINE))),
            run.file(name, variant, "feedback"),
        )
        run.draw(generate, jobs, told, f"{variant} on {name}: feedback", cfg.max_new, how, _feedback(run, first))
        turn = _refined(run, plain, first, answers_of(told))
    speed = run.draw(generate, jobs, run.samples(name, variant), f"{variant} on {name}", cfg.max_new, how, turn)
    return {"tokens_per_second_per_rank": round(speed)}


def _with_results(run: Run, name: str) -> Turn:
    """User turns with the search results of each question in front (4.1)."""
    template = load_prompt(ROOT / "prompts" / "retrieval.txt")
    found = {r["id"]: r["results"] for r in read_jsonl(run.out / "eval" / name / "snippets.jsonl", ("id", "results"))}

    def turn(q: Question, k: int) -> str:
        return fill(template, snippets=run.text(retrieve.as_text(found[q["id"]])), prompt=run.turn(q["question"]))

    return turn


def answers_of(path: Path) -> Answers:
    """The answers of saved samples, "(none)" where there is none."""
    return {(r["id"], r["draw"]): data.parse_sample(r).answer or "(none)" for r in read_jsonl(path)}


def _feedback(run: Run, first: Answers) -> Turn:
    """User turns that ask what is wrong with the first answer."""
    template = load_prompt(ROOT / "prompts" / "refine_feedback.txt")
    return lambda q, k: fill(template, question=run.text(q["question"]), answer=run.text(first[q["id"], k]))


def _refined(run: Run, plain: Turn, first: Answers, told: Answers) -> Turn:
    """User turns of Self-Refine: the question, the first answer, what the model itself said about it.

    PAPER: Self-Refine, no prompts, no number of rounds.  HERE: one round with our own prompts.
    WHY:   a round costs two more completions, and how many the paper ran is not said.
    """
    template = load_prompt(ROOT / "prompts" / "refine.txt")

    def turn(q: Question, k: int) -> str:
        key = (q["id"], k)
        return fill(template, prompt=plain(q, k), answer=run.text(first[key]), feedback=run.text(told[key]))

    return turn


# ---------- labels and judges


def label_thoughts(run: Run) -> dict[str, Any]:
    """Labels of the evaluated thoughts of ThinkOn and every method, by the run's annotator, for Fig. 4.

    All are labelled together, so there is one file of paid calls: eval/labels/annotation/calls.jsonl.
    """
    cfg, folder = run.cfg, run.out / "eval" / "labels"
    keys = [(name, variant) for name in cfg.labelled_sets for variant in ("thinkon", *run.methods)]
    rows = [row | {"id": f"{n}/{v}/{row['id']}"} for n, v in keys for row in _to_label(run, n, v)]
    if cfg.annotator == "self":
        tally = own_labels.label(run, rows, folder)
    else:
        for other in cfg.lenders:
            labelling.lend_replies(other / "eval" / "labels", folder)
        progress = Progress(run.ranks, None, "labels of evaluated thoughts", "calls")
        tally = labelling.label(rows, cfg, folder, cfg.seed, progress)
        if progress.done:
            progress.close()
    if run.ranks.rank:
        return {}
    records = read_jsonl(folder / "annotations.jsonl", ("id", "steps"))
    for name, variant in keys:
        head = f"{name}/{variant}/"
        own = [r | {"id": r["id"].removeprefix(head)} for r in records if r["id"].startswith(head)]
        write_jsonl(run.file(name, variant, "labels"), own)
    return {"thoughts": len(rows)} | tally


def _to_label(run: Run, name: str, variant: str) -> list[dict[str, Any]]:
    return analysis.to_label(read_jsonl(run.samples(name, variant)), run.cfg.label_eval, run.cfg.seed)


def read_labels(run: Run, name: str, variant: str) -> dict[str, analysis.Labels]:
    """id -> labels of the evaluated thoughts that were labelled."""
    return analysis.labels_of(_to_label(run, name, variant), read_jsonl(run.file(name, variant, "labels")))


def judge_answers(run: Run) -> dict[str, Any]:
    """eval/judge.json: verdicts on truthful and chosen short answers, claims of long ones. Rank 0 asks, others wait."""
    cfg, stop = run.cfg, threading.Event()
    with contextlib.ExitStack() as stack:
        ledger = client = None
        if cfg.judge != "stand-in":
            path = run.out / "judge" / "calls.jsonl"
            ledger = stack.enter_context(Ledger(path, cfg.budget_usd, cfg.budget_tokens, stop))
            client = cfg.clients({"judge": parse_endpoint(cfg.judge)}, stop)["judge"]
        who, second = (judge.open_judge(cfg, ledger, client, cfg.seed + k) for k in range(2))
        out: dict[str, Any] = who.fingerprint() | {"abstentions": judge.probe(who), "sets": {}}
        for name, path in run.eval_sets.items():
            questions = {q["id"]: q for q in data.load_questions(path)[0]}
            task = next(iter(questions.values())).get("task", "short")
            if task == "long":
                out["sets"][name] = _judge_long(run, name, who, stop)
            elif task == "truthful" or name in cfg.judged_sets:
                out["sets"][name] = _judge_short(run, name, questions, who, second, stop)
        if ledger is not None:
            out["cost"] = {"usd": round(ledger.usd, 6), "tokens": ledger.tokens}
    write_json(run.out / "eval" / "judge.json", out)
    return {"judge": who.name, "sets": list(out["sets"])}


def _judge_short(
    run: Run,
    name: str,
    questions: dict[str, Question],
    who: judge.Judge,
    second: judge.Judge,
    stop: threading.Event,
) -> dict[str, Any]:
    """variant -> summary of the verdicts on one set, with the judge's agreement with itself."""
    out, threads = {}, run.cfg.annotate_concurrency
    for variant in run.variants:
        rows = read_jsonl(run.samples(name, variant))
        graded = judge.grade(rows, questions, who, threads, stop)
        write_jsonl(run.file(name, variant, "judged"), graded)
        again = judge.agreement(rows, questions, graded, second, threads, stop)
        out[variant] = judge.summary(graded) | {"again": again}
    return out


def _judge_long(run: Run, name: str, who: judge.Judge, stop: threading.Event) -> dict[str, Any]:
    """variant -> VeriScore of one set of long answers, under one K; without --search the numbers of claims."""
    cfg, rows, threads = run.cfg, {}, run.cfg.annotate_concurrency
    for variant in run.variants:
        rows[variant] = veriscore.extract(read_jsonl(run.samples(name, variant)), who, variant, threads, stop)
    if cfg.search:
        claims = [claim for of in rows.values() for row in of for claim in row["all_claims"]]
        results = _engine(run).search(claims, cfg.verify_results)
        rows = {v: veriscore.verify(of, results, who, threads, stop) for v, of in rows.items()}
    for variant, of in rows.items():
        write_jsonl(run.file(name, variant, "claims"), of)
    k = cfg.claims_k or veriscore.median_claims([row for of in rows.values() for row in of])
    return {variant: veriscore.summary(of, k) for variant, of in rows.items()}


# ---------- figures


def load_scored(run: Run, name: str) -> dict[str, list[dict[str, Any]]]:
    """variant -> scored samples of one set."""
    return {
        v: [evaluation.score(r, run.tokenizer, run.cfg.fold) for r in read_jsonl(run.samples(name, v))]
        for v in run.variants
    }


def short_sets(run: Run) -> dict[str, list[Question]]:
    """name -> questions of the sets that are scored by exact match: their answers are short."""
    loaded = {name: data.load_questions(path)[0] for name, path in run.eval_sets.items()}
    return {name: of for name, of in loaded.items() if of[0].get("task", "short") == "short"}


def thinking_variants(run: Run) -> list[list[str]]:
    """Variants with thinking on that are compared with each other: without search results, and with them."""
    on = [v for v in run.variants if v.removesuffix(RET) != "thinkoff"]
    return [[v for v in on if v.endswith(RET) is ret] for ret in (False, True)]


def score(run: Run) -> dict[str, Any]:
    """eval/scores.json: per set and variant the metrics, per set the paired differences between variants."""
    scores: dict[str, Any] = {}
    seen = {data.normalise(q["question"]) for q in data.load_questions(run.cfg.questions)[0]}
    for name, questions in short_sets(run).items():
        scored = load_scored(run, name)
        pairs = [(a, b) for order in thinking_variants(run) for i, a in enumerate(order) for b in order[:i]]
        # Ids that differ after "#" only ask for the same fact; the bootstrap draws them together.
        by = run.cfg.scored_by
        fact: dict[str, str] | None = {q["id"]: q["id"].partition("#")[0] for q in questions}
        if len(set(fact.values())) == len(fact):
            fact = None  # every question stands alone: McNemar's test applies
        scores[name] = {
            "metrics": {variant: evaluation.metrics(rows, run.cfg.scored_by) for variant, rows in scored.items()},
            "differences": {f"{a} - {b}": evaluation.compare(scored[a], scored[b], by, fact) for a, b in pairs},
            "seen_in_training": sum(data.normalise(q["question"]) in seen for q in questions),
            "engines": {v: read_jsonl(run.samples(name, v))[0].get("engine", "unknown") for v in run.variants},
        }
        if any(q.get("needs_options") for q in questions):
            kept = {q["id"] for q in questions if not q.get("needs_options")}
            fewer = {v: [row for row in rows if row["id"] in kept] for v, rows in scored.items()}
            scores[f"{name}, no stems that need options"] = {
                "metrics": {variant: evaluation.metrics(rows, run.cfg.scored_by) for variant, rows in fewer.items()},
                "differences": {},
                "seen_in_training": scores[name]["seen_in_training"],
                "engines": scores[name]["engines"],
            }
    write_json(run.out / "eval" / "scores.json", scores)
    return {name: len(of["metrics"]) for name, of in scores.items()}


def analyse(run: Run) -> dict[str, Any]:
    """eval/analysis.json: where golds are lost (Fig. 1), who gains (Fig. 5), how thinking changed (Fig. 4), weights."""
    out: dict[str, Any] = {"positions": {}, "strata": {}, "outcomes": {}, "change": {}}
    for name in short_sets(run):
        scored = load_scored(run, name)
        plain, by = thinking_variants(run)[0], run.cfg.scored_by
        for variant in plain:
            out["positions"][f"{name}, {variant}"] = analysis.positions(
                read_jsonl(run.samples(name, variant)), by, run.cfg.fold
            )
        out["strata"][name] = {v: analysis.strata(scored["thinkon"], scored[v], by) for v in plain if v != "thinkon"}
        if run.cfg.label_eval and name in run.cfg.labelled_sets:
            labels = {v: read_labels(run, name, v) for v in ("thinkon", *run.methods)}
            out["outcomes"][name] = {v: analysis.label_outcomes(scored[v], of, matcher=by) for v, of in labels.items()}
            before = list(labels["thinkon"].values())
            out["change"][name] = {
                m: analysis.change(before, list(labels[m].values()), run.fit_matrix, seed=run.cfg.seed)
                for m in run.methods
            }
    rows = data.load_train(run.out / "train.jsonl")
    classes = ([r["labels"] for r in rows if r["label"] is side] for side in (True, False))
    out["intervals"] = analysis.matrix_intervals(*classes, run.fit_matrix, seed=run.cfg.seed)
    out["weights"] = analysis.weight_audit(rows, run.tokenizer)
    write_json(run.out / "eval" / "analysis.json", out)
    return {"sets": list(out["strata"])}
