"""The dry run: all that a run takes, before anything is drawn. No weights, no GPU, no evaluation files and no keys.

  training              rows, steps, memory, time (pipeline/plan.py), from train.jsonl or from the paper's counts
  draws, evaluation     completions, tokens, hours and memory of sampling on a stated GPU
  labels, judge, search calls, tokens, dollars

What there is of a run is counted (questions, samples.jsonl, candidates.jsonl); what is not there yet follows from the
sizes of the benchmarks, the paper's Table 1 and ASSUMED, which is printed beside the figures. Completions, calls and
searches of short answers are counts; tokens, hours and dollars are predictions that no measurement stands behind.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import data
import sample
from common import costs, hub
from common.benchmarks import SOURCES, in_file
from common.errors import InputError
from common.files import ROOT, each_row, read_jsonl
from common.model_config import ModelConfig
from common.ranks import not_joined
from common.table import markdown
from kto import LOSSES
from llm import judge, labelling, ledger
from llm.client import parse_endpoint
from pipeline import plan, ready, room
from pipeline.config import REFINE, RET, RunConfig
from pipeline.run import Run, too_long

READING = 0.6  # assumed share of the bandwidth while a token is decoded
ASKED = {"nq_open": 79_168, "sciq": 11_679}  # the paper's questions (A.1), of which Table 1 keeps rows


@dataclass(frozen=True)
class Assumed:
    """Tokens and counts taken for granted where no file of the run tells them."""

    prompt: int = plan.PAPER["prompt"]
    thought: int = sum(plan.PAPER["thought"]) // 2  # the middle of the length filter
    answer: int = plan.PAPER["answer"]
    long_answer: int = 600  # of LongFact
    snippet: int = 60  # a search result
    sentence: int = 30
    claims: int = 16  # of a long answer: ThinkOn's in Table 2
    verdict: int = 12  # a judge's reply
    claim: int = 25


ASSUMED = Assumed()


@dataclass(frozen=True)
class Set:
    """Questions of a file: how many, of which data sets, of which task."""

    n: int
    datasets: dict[str, int]
    task: str
    there: bool


@dataclass(frozen=True)
class Need:
    """What one phase takes: completions, calls or searches, tokens read and written, hours on the GPUs, dollars."""

    phase: str
    units: int
    what: str
    read: int = 0
    written: int = 0
    hours: float | None = None
    usd: float | None = None


# ---------- what there is to draw and to ask


def questions_of(path: str) -> Set:
    """The questions of a file, counted, or by its name where it is not there. Raises InputError at another name."""
    if Path(path).is_file():
        rows = read_jsonl(path, ("id", "question"))
        datasets = Counter(str(row.get("dataset", "unnamed")) for row in rows)
        return Set(len(rows), dict(datasets), rows[0].get("task", "short") if rows else "short", True)
    named = in_file(path)
    if named is None:
        raise InputError(
            f"{path}: no such file, and not called SET-SPLIT.jsonl after a set of tools.fetch, whose size is known; "
            "give your questions as JSONL, or a name such as data/nq_open-train.jsonl"
        )
    names, split = named
    sizes = {name: SOURCES[name].splits[split].rows for name in names}
    return Set(sum(sizes.values()), sizes, SOURCES[names[0]].task, False)


def candidates_of(questions: Set) -> tuple[float, float]:
    """(chosen, rejected) to expect, fractions included: of each question what Table 1 keeps of its data set's.

    Questions of another data set yield what all of the paper's do. Files that are not there yet count as the paper's.
    """
    kept = [SOURCES[name].kept for name in ASKED]
    found = [0.0, 0.0]
    for name, n in questions.datasets.items():
        for side in (0, 1):
            share = sum(of[side] for of in kept) / sum(ASKED.values())
            if name in SOURCES:
                share = SOURCES[name].kept[side] / ASKED.get(name, n)
            found[side] += share * (n if questions.there else ASKED.get(name, n))
    return found[0], found[1]


def rows_of(cfg: RunConfig, questions: Set | None) -> plan.Rows:
    """The training rows there will be: counted in the run's files, else from its questions, else the paper's."""

    def counted(rows: list[dict[str, Any]], side: str) -> plan.Lengths:
        lengths = ([len(row[ids]) for row in rows] for ids in ("prompt_ids", "completion_ids"))
        return plan.Lengths(*lengths, [row[side] for row in rows])

    out = Path(cfg.out)
    if (path := out / "train.jsonl").exists():
        rows = data.load_train(path)
        return plan.Rows(counted(rows, "label"), str(path), rows)
    if (path := out / "candidates.jsonl").exists():
        rows = read_jsonl(path, ("id", "chosen", "prompt_ids", "completion_ids"))
        return plan.Rows(counted(rows, "chosen"), str(path), [])
    assumed = "thoughts of 450 to 1,000 tokens are assumed"
    if questions is None:
        return plan.Rows(plan.assumed_lengths(), f"no rows and no questions: the paper's counts; {assumed}", [])
    chosen, rejected = map(round, candidates_of(questions))
    source = f"no {out}/train.jsonl yet: what Table 1 keeps of so many questions; {assumed}"
    return plan.Rows(plan.assumed_lengths(chosen, rejected), source, [])


def drawn_lengths(out: Path) -> dict[str, tuple[float, float]]:
    """mode -> mean (prompt, completion) tokens: of samples.jsonl where it is there, else ASSUMED."""
    off = (ASSUMED.prompt, ASSUMED.answer)
    lengths = {"on": (ASSUMED.prompt, ASSUMED.thought + ASSUMED.answer), "off": off}
    if (out / "samples.jsonl").exists():
        sums = {mode: [0, 0, 0] for mode in lengths}  # rows, prompt tokens, completion tokens
        for row in each_row(out / "samples.jsonl", ("mode", "ids", "prompt_ids")):
            for k, n in enumerate((1, len(row["prompt_ids"]), len(row["ids"]))):
                sums[row["mode"]][k] += n
        lengths |= {mode: (prompt / n, ids / n) for mode, (n, prompt, ids) in sums.items() if n}
    return lengths


@dataclass(frozen=True)
class Decoding:
    """A model on one GPU that samples: its parameters, bytes of a weight, bytes of cache a token takes.

    experts: how many of the parameters are experts'; a token meets k of n.
    """

    config: ModelConfig
    params: int
    size: int
    gpu: str
    experts: int = 0

    def met(self, tokens: float) -> float:
        """Parameters that so many tokens together meet: all but the experts that none of them goes to."""
        if self.config.moe is None:
            return self.params
        share = self.config.moe.num_experts_per_tok / self.config.moe.num_experts
        return self.params - self.experts * (1 - share) ** tokens

    @property
    def cache_per_token(self) -> int:
        """Bytes of the keys and values of one token."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.size

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the cache."""
        return {4: torch.float32, 2: torch.bfloat16}[self.size]

    def rows(self, tokens: float) -> int:
        """Rows of so many tokens whose cache fits beside the weights."""
        usable = costs.ROOM * costs.GPUS[self.gpu].memory * 1e9  # as plan.memory_table leaves free
        free = usable - self.size * self.params
        return max(0, int(sample.CACHE_SHARE * free / (self.cache_per_token * tokens)))

    def seconds(self, completions: int, prompt: float, completion: float, batch: int) -> float:
        """Time of all completions on one GPU, `batch` rows together: read once, then written token by token.

        A step reads the weights and the rows' caches, or multiplies, whichever takes longer.
        """
        peak = costs.GPUS[self.gpu].tflops * 1e12 * costs.UTILISATION
        held = self.cache_per_token * (prompt + completion / 2)
        step = max(
            (self.size * self.met(batch) + batch * held) / (costs.GPUS[self.gpu].bandwidth * 1e9 * READING),
            2 * self.met(1) * batch / peak,
        )
        return completions * (2 * self.met(1) * prompt / peak + completion * step / batch)


def sampling_needs(cfg: RunConfig, questions: Set | None, sets: dict[str, Set], how: Decoding, gpus: int) -> list[Need]:
    """Draws of both modes, and the completions of every variant over all sets."""
    lengths, found = drawn_lengths(Path(cfg.out)), []

    def add(phase: str, n: int, prompt: float, completion: float, limit: int) -> None:
        batch = max(1, min(cfg.sample_batch, how.rows(prompt + limit)))
        hours = how.seconds(n, prompt, completion, batch) / 3600 / gpus
        found.append(Need(phase, n, "completions", round(n * prompt), round(n * completion), hours))

    for mode, (prompt, completion) in lengths.items() if questions else ():
        add(f"draws, thinking {mode}", questions.n * cfg.draws, prompt, completion, cfg.draw_max_new)
    for variant in cfg.variants if sets else ():
        bare, first = variant.removesuffix(RET), len(found)
        for of in sets.values():
            prompt, completion = lengths["off" if bare == "thinkoff" else "on"]
            prompt += cfg.search_results * ASSUMED.snippet if variant.endswith(RET) else 0
            completion += ASSUMED.long_answer - ASSUMED.answer if of.task == "long" else 0
            n = of.n * cfg.eval_draws * (2 if bare == REFINE else 1)  # Self-Refine: what is wrong, then the new answer
            add(f"eval {variant}", n, prompt, completion, cfg.max_new)
        found[first:] = [together(found[first:])]
    return found


def together(needs: list[Need]) -> Need:
    """Needs of one kind as one, under the first one's name."""
    units, read, written = (sum(getattr(n, name) for n in needs) for name in ("units", "read", "written"))
    hours, usd = (None if None in of else sum(of) for of in ([n.hours for n in needs], [n.usd for n in needs]))
    return Need(needs[0].phase, units, needs[0].what, read, written, hours, usd)


def label_needs(cfg: RunConfig, questions: Set | None, gpu: str, gpus: int) -> list[Need]:
    """Labels of the candidates and of the evaluated thoughts of Fig. 4: calls of a committee, completions of self."""
    out, made, needs = Path(cfg.out), made_up(), []
    if cfg.annotator not in ("committee", "self"):
        return needs

    def add(phase: str, rows: list[dict[str, Any]], times: float) -> None:
        if cfg.annotator == "self":
            needs.extend(self_needs(cfg, phase, rows, times, gpu, gpus))
            return
        for role in labelling.estimate(rows, cfg, out, cfg.seed)[0]:
            usd = None if role.usd is None else times * role.usd
            calls, read, written = (round(times * n) for n in (role.calls, role.prompt, role.reply))
            needs.append(Need(f"{phase}, {role.role}: {role.endpoint.model}", calls, "calls", read, written, usd=usd))

    if (given := out / "candidates.jsonl").exists():
        add("labels of candidates", read_jsonl(given, ("id", "question", "answers", "completion", "spans")), 1)
    elif questions:
        add("labels of candidates", made, sum(candidates_of(questions)) / len(made))
    if thoughts := cfg.label_eval * (1 + len(cfg.methods)) * len(cfg.labelled_sets):
        add("labels of evaluated thoughts", made, thoughts / len(made))
    return needs


def self_needs(cfg: RunConfig, phase: str, rows: list[dict[str, Any]], times: float, gpu: str, gpus: int) -> list[Need]:
    """Completions and hours of --annotator self for `rows`, `times` over: the model, a second one, the first again."""
    asked = {"a": cfg.model} | ({"b": cfg.annotator_model, "judge": cfg.model} if cfg.annotator_model else {})
    needs = []
    for role, model in asked.items():
        sizes = labelling.sizes(rows, role)
        prompt, reply = (sum(of) / len(sizes) for of in zip(*sizes, strict=True))
        how, n = decoding(model, cfg, gpu), times * len(sizes)
        batch = max(1, min(cfg.sample_batch, how.rows(prompt + cfg.annotate_max_tokens)))
        hours = how.seconds(round(n), prompt, reply, batch) / 3600 / gpus
        name = f"{phase}, {role}: {Path(model).name}"
        needs.append(Need(name, round(n), "completions", round(n * prompt), round(n * reply), hours))
    return needs


def decoding(model: str, cfg: RunConfig, gpu: str) -> Decoding:
    """How a model samples on a GPU, in the run's dtype."""
    config, _ = plan.shape_of(model)
    params = costs.parameters(config, cfg.lora_r)
    size = {"float32": 4, "bfloat16": 2}[cfg.dtype]
    return Decoding(config, params["layers"] + params["rest"], size, gpu, params["experts"])


def made_up() -> list[dict[str, Any]]:
    """48 candidates as long as the paper's: thoughts of 450 to 1,000 tokens of four bytes, of 4 to 15 segments."""
    rows, (low, high) = [], plan.PAPER["thought"]
    for k in range(48):
        segments, tokens = 4 + k % 12, low + (high - low) * k // 47
        each = "abc " * (tokens // segments)
        spans = [[i * (len(each) + 2), (i + 1) * (len(each) + 2)] for i in range(segments)]
        row = {"id": str(k), "question": f"{k} " + "abc " * 12, "answers": ["abc abc"], "spans": spans}
        rows.append(row | {"completion": f"{each}\n\n" * segments})
    return rows


def judge_needs(cfg: RunConfig, sets: dict[str, Set]) -> list[Need]:
    """Calls of the judge; each kind's prompt is its template and what is filled in."""
    if cfg.judge in ("", "stand-in"):
        return []
    _, prices = cfg.price_list({"judge": parse_endpoint(cfg.judge)})
    needs = []

    def need(phase: str, kind: str, calls: float, filled: int, reply: int) -> None:
        template = (ROOT / "prompts" / judge.KINDS[kind][0]).stat().st_size // 4
        read, written = round(calls * (template + filled)), round(calls * reply)
        usd = prices["judge"].usd(read, written) if prices["judge"] else None
        needs.append(Need(phase, round(calls), "calls", read, written, usd=usd))

    need("judge: abstentions, first of all", "truthful", len(judge.ABSTENTIONS), ASSUMED.answer, ASSUMED.verdict)
    for name, of in sets.items():
        n = of.n * cfg.eval_draws * len(cfg.variants)
        if of.task == "long":
            near = 5 * ASSUMED.sentence + ASSUMED.prompt // 2
            need(f"judge: claims of {name}", "claims", n * sentences(), near, ASSUMED.claim)
            if cfg.search:
                evidence = ASSUMED.claim + cfg.verify_results * ASSUMED.snippet
                need(f"judge: support on {name}", "support", n * ASSUMED.claims, evidence, ASSUMED.verdict)
        elif of.task == "truthful" or name in cfg.judged_sets:
            kind = "truthful" if of.task == "truthful" else "short"
            filled = ASSUMED.prompt // 2 + ASSUMED.answer
            need(f"judge: {name}", kind, n * (1 + judge.AGAIN), filled, ASSUMED.verdict)  # a twentieth twice
    return needs


def sentences() -> int:
    """Sentences of a long answer."""
    return ASSUMED.long_answer // ASSUMED.sentence


def search_needs(cfg: RunConfig, sets: dict[str, Set]) -> list[Need]:
    """Searches: each question once for all variants with search results, each claim of a long answer."""
    needs, price = [], ledger.search_price(cfg.prices) if cfg.search.startswith("serper") else 0.0

    def need(phase: str, n: int) -> None:
        needs.append(Need(phase, n, "searches", usd=None if price is None else n * price))

    if any(v.endswith(RET) for v in cfg.variants):
        need("search: questions", sum(of.n for of in sets.values()))
    if cfg.judge not in ("", "stand-in") and cfg.search:
        for name, of in sets.items():
            if of.task == "long":
                need(f"search: claims of {name}", of.n * cfg.eval_draws * len(cfg.variants) * ASSUMED.claims)
    return needs


def training_needs(cfg: RunConfig, config: ModelConfig, lengths: plan.Lengths, gpu: str, gpus: int) -> list[Need]:
    """Training of every method on the rows of these lengths."""
    needs, s = [], cfg.training
    if not lengths.chosen:
        return [Need(f"train {method}", 0, "rows", hours=0.0) for method in cfg.methods]
    size = {"float32": 4, "bfloat16": 2}[cfg.dtype]
    level, _ = plan.level_and_tokens(config, s, size, gpu, gpus, lengths)
    for method in cfg.methods:
        kept = [i for i, chosen in enumerate(lengths.chosen) if LOSSES[method].keeps(chosen)]
        own = plan.Lengths(*([of[i] for i in kept] for of in (lengths.prompt, lengths.completion, lengths.chosen)))
        flops = s.epochs * plan.step_flops(config, s, len(kept), own, level, size)
        seconds = flops / (gpus * costs.GPUS[gpu].tflops * 1e12)
        tokens = round(s.epochs * sum(own.total))
        needs.append(Need(f"train {method}", len(kept), "rows", tokens, 0, seconds / costs.UTILISATION / 3600))
    return needs


# ---------- as text


def memory_lines(cfg: RunConfig, how: Decoding, gpus: int) -> list[str]:
    """Memory while sampling: the weights, and how many rows fit beside them."""
    lengths, mem = drawn_lengths(Path(cfg.out)), costs.GPUS[how.gpu].memory
    weights = how.size * how.params / 1e9
    lines = [
        f"memory while sampling, each of {gpus} {how.gpu}: weights {weights:.2f} GB of {mem}; a row's cache takes "
        f"{how.cache_per_token * 1000 / 1e9:.3f} GB for 1,000 tokens"
    ]
    for what, limit in (("draws", cfg.draw_max_new), ("evaluation", cfg.max_new)):
        prompt, completion = lengths["on"]
        full, mean = how.rows(prompt + limit), how.rows(prompt + completion)
        fits = f"{full:,} rows of {prompt + limit:,.0f} tokens fit, {mean:,} of the mean {prompt + completion:,.0f}"
        lines.append(f"  {what}: {fits}; --sample-batch {cfg.sample_batch}")
        flag = "--draw-max-new" if what == "draws" else "--max-new"
        try:
            sample.check_memory(how.config, how.dtype, round(prompt + limit), int(mem * 1e9), flag)
        except InputError as error:
            n = room.cards(sample.memory(how.config, how.dtype, 1, round(prompt + limit)), int(mem * 1e9))
            serve, again = (" ".join(line) for line in room.server_lines(cfg, ["--model", cfg.model, "..."], n))
            lines += [f"  {what} DO NOT FIT on a {how.gpu}: {error}", f"    over {n} of them: {serve}", f"    {again}"]
    return lines


def length_lines(cfg: RunConfig, config: ModelConfig) -> list[str]:
    """What the run would refuse for the model's positions; with an assumed prompt where none can be counted."""
    folder, lines = plan.shape_of(cfg.model)[1].parent, []
    run = Run(cfg, hub.Source(folder, cfg.model), not_joined()) if (folder / "tokenizer.json").exists() else None
    for what, flag, limit, paths in (
        ("draws", "--draw-max-new", cfg.draw_max_new, [cfg.questions] if cfg.questions else []),
        ("evaluation", "--max-new", cfg.max_new, list(cfg.eval_paths.values())),
    ):
        prompt = ready.Prompt(ASSUMED.prompt, "a prompt of assumed length")
        if run and paths and all(Path(path).is_file() for path in paths):
            prompt = ready.longest_prompt(run, {path: data.load_questions(path)[0] for path in paths}, limit)
        if told := too_long(flag, limit, prompt.tokens, prompt.what, config.max_position_embeddings):
            lines.append(f"  {what} would be REFUSED: {told}")
    return [*lines, *(["  " + told] if (told := ready.miniature(cfg)) else [])]


def table(needs: list[Need], gpu: str, gpus: int) -> str:
    """One row a phase, and their sum."""

    def row(name: str, units: str, read: int, written: int, hours: float | None, usd: float | None) -> dict[str, Any]:
        cells = {"phase": name, "how many": units, "tokens read": f"{read:,}", "written": f"{written:,}"}
        cells[f"hours on {gpus} {gpu}"] = None if hours is None else f"{hours:.2f}"
        return cells | {"USD": None if usd is None else f"{usd:.2f}"}

    rows = [row(n.phase, f"{n.units:,} {n.what}", n.read, n.written, n.hours, n.usd) for n in needs]
    read, written = sum(n.read for n in needs), sum(n.written for n in needs)
    hours, usd = (sum(x or 0.0 for x in of) for of in ([n.hours for n in needs], [n.usd for n in needs]))
    return markdown([*rows, row("all", "", read, written, hours, usd)])


def annotator_line(cfg: RunConfig) -> str:
    """Who labels."""
    if cfg.annotator == "self":
        second = f" and {cfg.annotator_model}" if cfg.annotator_model else ""
        return f"{'annotator':<15} self: the model itself{second}, no cost; hours in the table, under labels"
    if cfg.annotator != "committee":
        return f"{'annotator':<15} {cfg.annotator}{f' ({cfg.cues})' * (cfg.annotator == 'cues')}: no calls, no cost"
    named = ", ".join(f"{role} {endpoint}" for role, endpoint in labelling.endpoints(cfg).items())
    return f"{'annotator':<15} committee: {named}"


def report_text(cfg: RunConfig, gpu: str, gpus: int) -> str:
    """The whole dry run as text. Raises InputError at settings it cannot count with."""
    config, _ = plan.shape_of(cfg.model)
    questions = questions_of(cfg.questions) if cfg.questions else None
    sets = {name: questions_of(path) for name, path in cfg.eval_paths.items()}
    how = decoding(cfg.model, cfg, gpu)
    needs = sampling_needs(cfg, questions, sets, how, gpus) + label_needs(cfg, questions, gpu, gpus)
    rows = rows_of(cfg, questions)
    needs += training_needs(cfg, config, rows.lengths, gpu, gpus) + search_needs(cfg, sets) + judge_needs(cfg, sets)
    lines = [plan.report_text(cfg.model, rows, cfg.method, cfg.dtype, cfg.training, gpu, gpus)]
    lines += ["", annotator_line(cfg), *counted_lines(cfg, questions, sets), "", *memory_lines(cfg, how, gpus)]
    lines += length_lines(cfg, config)
    lines += ["", table(needs, gpu, gpus), "", *assumption_lines(cfg, gpu)]
    return "\n".join(lines)


def counted_lines(cfg: RunConfig, questions: Set | None, sets: dict[str, Set]) -> list[str]:
    """Where the numbers of questions and candidates come from."""
    lines = []
    for name, path, of in [
        *([("questions", cfg.questions, questions)] if questions else []),
        *((f"set {name}", cfg.eval_paths[name], of) for name, of in sets.items()),
    ]:
        how = "counted" if of.there else "not there yet: the published size"
        lines.append(f"{name:<15} {of.n:,} in {path}, {how}")
    if questions and not (Path(cfg.out) / "candidates.jsonl").exists():
        chosen, rejected = candidates_of(questions)
        few = "" if min(chosen, rejected) >= 1 else "; too few to train on, draw for more questions"
        lines.append(
            f"{'candidates':<15} {chosen:,.4g} chosen, {rejected:,.4g} rejected, as Table 1 keeps of the paper's "
            f"questions (Qwen3-8B; others keep others){few}"
        )
    return lines


def assumption_lines(cfg: RunConfig, gpu: str) -> list[str]:
    """What the figures rest on, beside counts."""
    date, _ = ledger.load_prices(cfg.prices)
    tokens = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in dataclasses.asdict(ASSUMED).items())
    drawn = "means of samples.jsonl stand in for prompt, thought and answer; " * (
        (Path(cfg.out) / "samples.jsonl").exists()
    )
    return [
        f"assumed: tokens of a {tokens} (claims: their number); {drawn}sentences of a long answer {sentences()}",
        f"assumed: {READING:.0%} of {costs.GPUS[gpu].bandwidth} GB/s while decoding, {costs.UTILISATION:.0%} of "
        f"{costs.GPUS[gpu].tflops} TFLOP/s else; every trace goes to the adjudicator, no reply is asked for twice",
        "left out: longer thoughts than the filter keeps, reasoning tokens of paid models, waiting for servers",
        f"prices of {date} ({cfg.prices}), without discounts: check them; nothing was sent",
    ]
