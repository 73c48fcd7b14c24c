"""Every setting of a run, in the order in which a run meets them; defaults are the paper's.

`RunConfig` is the whole; its parts are what single stages obey (pipeline/reuse.py asks them which settings those are).
configs/*.json and flags set them by name. Left out: settings that depend on other settings.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import kto
from common.benchmarks import name_of
from common.errors import InputError
from common.files import ROOT
from common.settings import opt
from data import MATCHERS
from llm import judge, labelling, retrieve
from llm.client import parse_endpoint
from train import TrainSettings

FETCH = "; python -m tools.fetch --for CONFIG fetches what a config names"
REFINE, RET = "refine", "+ret"  # variants beside thinkoff, thinkon and the methods: Self-Refine, search results first


@dataclass(frozen=True)
class WhereSettings:
    """Which model, which questions, which methods, who samples."""

    model: str = opt("", "Hugging Face checkpoint: a directory, or an id of the Hub", "what and where")
    revision: str = opt("", "branch, tag or commit of a model of the Hub; pin it to repeat a run")
    questions: str = opt("", "training questions, JSONL {id, dataset, question, answers}")
    eval_sets: str = opt("", "evaluation questions, comma-separated name=path")
    out: str = opt("runs/default", "directory for everything the run writes")
    method: str = opt("mralign", f"one or several with commas of {', '.join(kto.LOSSES)}")
    resume: bool = opt(False, "continue an interrupted training from its last checkpoint")
    reuse_from: str = opt("", "folders of other runs: what they made with the same settings and inputs is taken over")
    redo: str = opt("", "stages to do again although their result is there, comma-separated")
    prompt: str = opt("prompts/factual.txt", "user turn, with {question} in it (Fig. 11)")
    system: str = opt(
        "", "system turn, {thinking} in it becomes on or off; Nemotron-Nano: 'detailed thinking {thinking}'"
    )
    dtype: str = opt("bfloat16", "dtype of the base weights; adapters are float32", choices=("bfloat16", "float32"))
    backend: str = opt(
        "local",
        "who samples: local (this program) or openai (an OpenAI-compatible completions server)",
        choices=("local", "openai"),
    )
    base_url: str = opt("", "the server of --backend openai, for example http://127.0.0.1:8000/v1")
    served_model: str = opt("", "what that server calls the base model; none: --model. Adapters: the method's name")
    key_env: str = opt("", "NAME of the environment variable that holds the server's key; none: no key")
    concurrency: int = opt(64, "requests in flight at the server, over all ranks", low=1)


@dataclass(frozen=True)
class CandidateSettings:
    """Which draws are made and which of them become training rows (3.1.1)."""

    draws: int = opt(
        3, "completions per question and mode; right or wrong must hold in all", "candidates (3.1.1)", low=1
    )
    draw_temperature: float = opt(0.2, "sampling temperature of the draws", low=0)
    draw_top_p: float = opt(0.9, "nucleus of the draws", above=0, high=1)
    draw_max_new: int = opt(2048, "longest completion of a draw, tokens", low=1)
    sample_batch: int = opt(128, "rows decoded together on one rank", low=1)
    small_batches: bool = opt(
        False, "on a CPU, compute fewer than 16 rows as they are: faster, but a text then depends on its neighbours"
    )
    keep: str = opt("first", "which right or wrong draws become rows: first or all", choices=("first", "all"))
    min_segments: int = opt(4, "fewest thinking segments, inclusive", low=1)
    max_segments: int = opt(15, "most thinking segments, inclusive", low=1)
    min_think_tokens: int = opt(450, "shortest thought, tokens, inclusive", low=0)
    max_think_tokens: int = opt(1000, "longest thought, tokens, inclusive", low=1)
    matcher: str = opt(
        "equal",
        "an answer is right if it equals a gold, contains one (A.2), has it in whole words, has its value (verifier)",
        choices=MATCHERS,
    )
    fold: bool = opt(False, "before matching, fold accents, Unicode dashes, quotes and degree signs")


@dataclass(frozen=True)
class TransitionSettings:
    """How labels become P (3.2.2)."""

    transitions: str = opt(
        "em", "estimate of P: em or frequency (Table 3)", "transitions (3.2.2)", choices=("em", "frequency")
    )
    labels: str = opt("two", "labels a step keeps: two or one, the most confident (Table 3)", choices=("two", "one"))
    em_iterations: int = opt(5, "EM iterations; P is defined by running this many (Algorithm 2)", low=1)
    em_damping: float = opt(0.6, "share of the new estimate in each iteration (Algorithm 2)", above=0, high=1)
    em_prior: float = opt(0.1, "pseudo-count of every allowed transition (Algorithm 2)", above=0)


@dataclass(frozen=True)
class EvalSettings:
    """How the variants are sampled and what is measured on them (4.1, Table 15)."""

    score_matcher: str = opt(
        "", "matcher of Acc, Mis and all that follows; none: --matcher", "evaluation (Table 15)", choices=MATCHERS
    )
    temperature: float = opt(0.6, "sampling temperature", low=0)
    top_p: float = opt(0.95, "nucleus", above=0, high=1)
    top_k: int = opt(20, "most probable tokens kept; 0: all", low=0)
    min_p: float = opt(0.0, "tokens below this share of the most probable one are dropped", low=0, high=1)
    max_new: int = opt(8192, "longest completion, tokens", low=1)
    eval_draws: int = opt(1, "completions a question; with several, tables show mean and spread over them", low=1)
    also: str = opt("", "more variants: refine (Self-Refine of ThinkOn), a variant with +ret (search results first)")
    search: str = opt("", "who searches: serper (key in $SERPER_KEY), serper#VARIABLE, or a file of documents")
    search_cache: str = opt("", "file of search results to reuse and to add to; none: search.jsonl under --out")
    search_results: int = opt(5, "search results before a question (4.1)", low=1)
    label_eval: int = opt(0, "thoughts of NQ-Open (else of every set) to label, a variant (Fig. 4: 977)", low=0)
    judge_sets: str = opt("", "sets of short answers to judge too, comma-separated (SimpleQA's three grades)")


@dataclass(frozen=True)
class RunConfig(
    judge.JudgeSettings,
    EvalSettings,
    TrainSettings,
    TransitionSettings,
    labelling.LabelSettings,
    CandidateSettings,
    WhereSettings,
):
    """Every setting of a run."""

    @property
    def scored_by(self) -> str:
        """The matcher of every headline, difference and analysis: that of the candidates unless told."""
        return self.score_matcher or self.matcher

    @property
    def methods(self) -> list[str]:
        """What is trained, in order: names of kto.LOSSES."""
        return _parts(self.method)

    @property
    def more_variants(self) -> list[str]:
        """What is evaluated beside thinkoff, thinkon and the methods."""
        return _parts(self.also)

    @property
    def variants(self) -> list[str]:
        """Everything that is evaluated, in the order of the tables: ["thinkoff", "thinkon", "kto", "kto+ret", ...]."""
        return ["thinkoff", "thinkon", *self.methods, *self.more_variants]

    @property
    def eval_paths(self) -> dict[str, str]:
        """name -> path of every evaluation set."""
        return dict(part.split("=", 1) for part in _parts(self.eval_sets))

    @property
    def labelled_sets(self) -> list[str]:
        """The sets whose thoughts are labelled: NQ-Open as in the paper's Fig. 4, or all where a run has no NQ-Open."""
        return [name for name in self.eval_paths if name_of(name) == "nq_open"] or list(self.eval_paths)

    @property
    def judged_sets(self) -> list[str]:
        """The sets of short answers that a judge grades too."""
        return _parts(self.judge_sets)

    @property
    def lenders(self) -> list[Path]:
        """The folders of --reuse-from."""
        return [Path(part) for part in _parts(self.reuse_from)]

    @property
    def training(self) -> TrainSettings:
        """The part that training reads."""
        return TrainSettings(**{name: getattr(self, name) for name in names(TrainSettings)})


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def names(settings: type) -> tuple[str, ...]:
    """The names of a part's settings."""
    return tuple(field.name for field in dataclasses.fields(settings))


def placed(cfg: RunConfig) -> RunConfig:
    """The same settings with input files where they lie: as given, or a relative path beside the project.

    A file that is in neither place keeps its name, for `check` or the dry run to say so.
    """

    def place(path: str) -> str:
        beside = ROOT / path
        return str(beside) if path and not Path(path).exists() and beside.is_file() else path

    given = {name: place(getattr(cfg, name)) for name in ("prompt", "questions", "search", "annotator")}
    sets = [name + sign + place(path) for name, sign, path in (part.partition("=") for part in _parts(cfg.eval_sets))]
    return dataclasses.replace(cfg, eval_sets=",".join(sets), **given)


METHOD = ("sample", "candidates", "annotate", "fit", "train")
MEASURED = ("search", "eval", "labels", "judge", "scores", "analysis", "report")  # stages that need evaluation sets


READS = {  # stages that read what another one leaves under --out: file -> who writes it
    "candidates": {"samples.jsonl": "sample"},
    "annotate": {"candidates.jsonl": "candidates"},
    "fit": {"candidates.jsonl": "candidates", "annotations.jsonl": "annotate"},
    "train": {"train.jsonl": "fit"},
}


def check(cfg: RunConfig, wanted: Sequence[str] = ()) -> None:
    """Refuse settings that cannot work, before any time is spent. Raises InputError.

    wanted: the stages that will run, none for all; what the others need is not asked for. Training needs train.jsonl
    under --out and no question.
    """

    def due(*names: str) -> bool:
        return not wanted or any(name in wanted for name in names)

    for name in ("model", *["questions"] * due("sample", "scores"), *["eval_sets"] * due(*MEASURED)):
        if not getattr(cfg, name):
            raise InputError(f"--{name.replace('_', '-')} is not set; give it, or --config configs/mini.json")
    check_settings(cfg, wanted)
    sets = cfg.eval_paths.values() if due(*MEASURED) else ()
    for path in (cfg.prompt, *[cfg.questions] * due("sample", "scores"), *sets):
        if not Path(path).exists():
            hint = "" if path == cfg.prompt else FETCH
            raise InputError(f"{path}: no such file, here or beside the project{hint}")
    for stage in wanted:
        for name, writer in READS.get(stage, {}).items():
            if writer not in wanted and not (path := Path(cfg.out) / name).exists():
                raise InputError(
                    f"{path}: no such file, which {stage} reads; run the stage {writer} first, or put it there"
                )
    _check_keys(cfg, due)


def check_settings(cfg: RunConfig, wanted: Sequence[str] = ()) -> None:
    """What `check` refuses of settings alone, without the run's data, model and keys: the dry run refuses it too."""

    def due(*names: str) -> bool:
        return not wanted or any(name in wanted for name in names)

    redo = _parts(cfg.redo)
    if unknown := [name for name in (*wanted, *redo) if name not in (*METHOD, *MEASURED)]:
        raise InputError(f"unknown stage {unknown[0]!r}; the stages are {', '.join((*METHOD, *MEASURED))}")
    if (cfg.backend == "openai") != bool(cfg.base_url):
        raise InputError("--backend openai and --base-url http://HOST:PORT/v1 go together; give both or neither")
    if cfg.base_url:
        parse_endpoint(f"m@{cfg.base_url}")
    check_names(cfg)
    if lost := [folder for folder in cfg.lenders if not folder.is_dir()]:
        raise InputError(f"--reuse-from {lost[0]}: no such folder; without it all that it holds would be made again")
    if due("sample", "candidates"):
        for name in ("segments", "think_tokens"):
            low, high = getattr(cfg, f"min_{name}"), getattr(cfg, f"max_{name}")
            if low > high:
                flag = name.replace("_", "-")
                raise InputError(f"--min-{flag} {low} is above --max-{flag} {high}: no thought would be kept")
    if due("annotate", "labels"):
        labelling.check(cfg)
    if due(*MEASURED):
        _check_variants(cfg)
        judge.check(cfg)


def check_names(cfg: RunConfig) -> None:
    """Raise InputError at a method that is none, and at a set without a path or with a name that can be no folder's."""
    for k, method in enumerate(cfg.methods):
        if method not in kto.LOSSES or method in cfg.methods[:k]:
            raise InputError(f"--method {method!r} is not one of {', '.join(kto.LOSSES)}, each once")
    if not cfg.methods:
        raise InputError(f"--method is empty; give one or several of {', '.join(kto.LOSSES)}")
    seen: set[str] = set()
    for part in _parts(cfg.eval_sets):
        name, given, _ = part.partition("=")
        if not given:
            raise InputError(f"--eval-sets {part!r} must look like name=path.jsonl")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"--eval-sets {part!r}: the name may hold letters, digits, and . _ - after the first")
        if name in seen:
            raise InputError(f"--eval-sets names {name!r} twice; give each set a name of its own")
        seen.add(name)


def _check_keys(cfg: RunConfig, due: Callable[..., bool]) -> None:
    """Refuse what asks a server whose key is not in the environment, and say how to do without. Raises InputError.

    Where replies of an earlier run lie (of this one, or of --reuse-from), nothing is refused: they may be all there is
    to ask for, and a call that does need the key says so.
    """
    asked: list[tuple[list[str], str, str]] = []  # key variables, the file of earlier replies, how to do without
    if cfg.annotator == "committee":
        keys = [endpoint.key_env for endpoint in labelling.endpoints(cfg).values()]
        local = "--annotator self"
        if due("annotate"):
            asked.append((keys, "annotation/calls.jsonl", local))
        if cfg.label_eval and due("labels"):
            asked.append((keys, "eval/labels/annotation/calls.jsonl", local))
    if cfg.judge not in ("", "stand-in") and due("judge"):
        asked.append(([parse_endpoint(cfg.judge).key_env], "judge/calls.jsonl", "--judge ''"))
    plain = ",".join(v for v in cfg.more_variants if not v.endswith(RET))
    if plain != ",".join(cfg.more_variants) and due("search") or cfg.judge and due("judge"):
        cache = cfg.search_cache or "search.jsonl"
        asked.append(([retrieve.key_variable(cfg.search)], cache, f"--search '' --also '{plain}'"))
    missing: dict[str, None] = {}  # as an ordered set
    ways: dict[str, None] = {}
    for keys, replies, without in asked:
        if not any((folder / replies).exists() for folder in (Path(cfg.out), *cfg.lenders)):
            unset = [key for key in keys if key and not os.environ.get(key)]
            missing |= dict.fromkeys(unset)
            ways |= {without: None} if unset else {}
    if missing:
        told = f"export {' '.join(missing)}, or do without: {' '.join(ways)}"
        raise InputError(f"no key in the environment: {told} (docs/running.md)")


def _check_variants(cfg: RunConfig) -> None:
    """Refuse variants that do not exist or lack what they need. Raises InputError."""
    also = cfg.more_variants
    if cfg.search and not cfg.search.startswith("serper") and not Path(cfg.search).exists():
        raise InputError(
            f"--search {cfg.search}: no such file; give serper, serper#KEY_VARIABLE or a file of documents"
        )
    known = {REFINE, *(v + RET for v in ("thinkoff", "thinkon", REFINE, *cfg.methods))}
    for k, variant in enumerate(also):
        if variant not in known or variant in also[:k]:
            raise InputError(f"--also {variant!r} is not one of {', '.join(sorted(known))}, each once")
        if variant.endswith(RET) and not cfg.search:
            raise InputError(f"--also {variant} needs --search: serper, serper#KEY_VARIABLE or a file of documents")
        if variant == REFINE + RET and "thinkon" + RET not in also[:k]:
            raise InputError(f"--also {variant} refines the samples of thinkon{RET}; put thinkon{RET} before it")
    if odd := [name for name in cfg.judged_sets if name not in cfg.eval_paths]:
        raise InputError(f"--judge-sets {odd[0]!r} is not one of --eval-sets: {', '.join(cfg.eval_paths)}")
    if cfg.label_eval and cfg.annotator.endswith(".jsonl"):
        raise InputError("--label-eval needs an annotator that can label, not a finished file; leave it at 0")
