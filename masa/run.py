"""MASA: while a model learns to solve problems it also learns to foresee how (arXiv 2510.03259; v2 calls it MAPR).

For every problem the model writes G solutions and M metas. A meta foresees three things about those solutions: the
share that will be right, how many tokens a right one takes, which notions it uses. What the solutions turn out to
be is the only ground truth there is for that; the problem's answer rewards the solutions. Both kinds are normalised in
their own group and trained by one policy gradient. Once foresight is good it saves work: problems that are foreseen as
all right or all wrong are not sampled (gate), solutions far beyond the foreseen length are cut (cutoff), foreseen
notions become hints.

    problems -> metas -> gate, cutoff, hint -> solutions -> verifier -> Outcome -> rewards -> advantages
             -> one update per step -> metas with their numbers corrected (experts) -> behaviour cloning

The order of this file is the order of a step. Equation numbers are those of the paper's first version unless v2 is
named. A problem's solutions and metas stay on one rank, so groups need no communication; gradients are summed by hand
and not by DDP, because gating leaves ranks with unequal work or none. The loss is divided by the tokens of all ranks:
it depends neither on the packing nor on the number of ranks.

    python masa.py --model Qwen/Qwen3-8B-Base --problems data/deepscaler-train.jsonl --out runs/masa
    torchrun --standalone --nproc_per_node=4 masa.py --preset v1-efficient ... --resume

Left out: a KL term and an entropy bonus (both are off in the paper), overlong penalties, value models, sharding.
"""

import hashlib
import json
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

import data
import lora
import model as qwen
import sample
from common import checkpoint, hub, verifier
from common.endings import ENDINGS, settle
from common.errors import InputError, MemoryFull, NumericsError, Stopped
from common.files import read_jsonl, sha256_file, write_json, write_jsonl
from common.ranks import Progress, Ranks, process_group
from common.settings import cli, opt
from common.template import ChatTemplate, fill, load_prompt
from common.tokens import encode, load_stop_ids, load_tokenizer
from common.weights import weight_files
from kernels.segment_logprob import default_impl, segment_logprob
from llm import remote
from llm.client import Endpoint
from masa import passk

GRID = 8  # a meta gives its pass rate as so many eighths, whatever G is
BASE = 0.01  # of the difficulty reward: one eighth off is worth 0.56, two 0.32
SHORTEST_CUT = 32  # tokens: no cutoff is lower
LOG_RATIO = 20.0  # log-ratios are clamped to +-this before exp
GENERIC = 0.9  # a notion found in this share of a problem's solutions says nothing
HEAD_CHUNK = 1024  # rows of logits at once where the head is trained too

PRESETS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1-efficient": {"experts": 128, "control_from": 120, "hint": True},
    "v2": {"metas": 8, "epochs": 3},
    "v2-efficient": {"metas": 8, "epochs": 3, "control_from": 80},
    "grpo": {"metas": 0},
    "dapo": {"metas": 0, "dynamic": True},
    "test": {"solutions": 8, "metas": 8, "experts": 16, "control_from": 60},
}


@dataclass(frozen=True)
class Settings:
    """Every setting. Defaults are the paper's first version (preset v1)."""

    preset: str = opt("v1", f"a row of settings, overridden by --config and flags: {', '.join(PRESETS)}", "what, where")
    model: str = opt("", "Hugging Face checkpoint: a directory, or an id of the Hub")
    revision: str = opt("", "branch, tag or commit of a model of the Hub")
    problems: str = opt("", "training problems, JSONL {id, problem, answer}")
    eval_sets: str = opt("", "held-out problems, comma-separated name=path")
    out: str = opt("runs/masa", "directory for everything the run writes")
    resume: bool = opt(False, "continue an interrupted run from its last checkpoint")
    solve_prompt: str = opt("prompts/masa_solve.txt", "user turn of a solution, with {problem}")
    meta_prompt: str = opt("prompts/masa_meta.txt", "user turn of a meta, with {problem} and, if wanted, {max_new}")
    eval_prompt: str = opt("prompts/masa_bare.txt", "user turn of a solution in evaluation, with {problem}")
    meta_system: str = opt("You are a helpful assistant.", "system turn of a meta; none: no such turn")
    dtype: str = opt("bfloat16", "dtype of the base weights: bfloat16 or float32; adapters are float32")

    solutions: int = opt(16, "G: solutions a problem and step", "sampling")
    metas: int = opt(16, "M: metas a problem and step; 0: plain GRPO or DAPO")
    batch: int = opt(128, "problems a step, over all ranks")
    epochs: int = opt(1, "passes over the problems")
    steps: int = opt(0, "steps; 0: as many as the epochs have")
    max_prompt: int = opt(2048, "longest prompt, tokens; problems beyond it are left out and counted")
    max_new: int = opt(8192, "longest completion, tokens")
    temperature: float = opt(1.0, "of sampling; the loss divides the logits by it too")
    dynamic: bool = opt(False, "DAPO: sample until the batch is full of problems solved rightly and wrongly")
    dynamic_tries: int = opt(4, "most batches sampled for one step of --dynamic")
    sample_batch: int = opt(128, "rows decoded together on one rank")
    base_url: str = opt("", "vLLM server that samples in our place, for example http://127.0.0.1:8000/v1; none: here")
    key_env: str = opt("", "NAME of the environment variable with that server's key; none: no key")
    concurrency: int = opt(64, "requests in flight at the server, over all ranks")

    full: bool = opt(False, "train all weights and not an adapter; needs --dtype float32", "training")
    lr: float = opt(0.0, "learning rate after the warm-up; 0: 1e-5 for an adapter, 1e-6 for all weights")
    warmup_steps: int = opt(20, "steps in which the learning rate rises")
    weight_decay: float = opt(0.1, "of AdamW")
    max_grad_norm: float = opt(1.0, "the gradient is scaled down to this norm")
    lora_r: int = opt(32, "LoRA rank")
    lora_alpha: float = opt(64.0, "LoRA scale is alpha / r")
    updates: int = opt(1, "optimiser steps a step, each on its share of the problems; above 1 the clipping matters")
    clip_low: float = opt(0.2, "the ratio counts from 1 - this")
    clip_high: float = opt(0.28, "to 1 + this (clip-higher)")
    clip_dual: float = opt(10.0, "a negative advantage counts at most this many times")
    agg: str = opt("token", "mean over all tokens, or seq: mean over the tokens of each completion, then over those")
    micro_tokens: int = opt(16384, "tokens in one forward pass; changes memory and speed, not the result")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass")
    save_every: int = opt(20, "steps between checkpoints")
    seed: int = opt(0, "seed of the order of the problems, of the adapters and of every sample")
    kernel: str = opt("", "log-probability op: torch or triton; none: triton where there is a GPU")

    experts: int = opt(0, "corrected metas collected before each behaviour cloning; 0: none", "experts, control")
    expert_updates: int = opt(5, "optimiser steps of a behaviour cloning")
    expert_notion: float = opt(0.2, "least notion reward of an expert")
    control_from: int = opt(0, "step from which metas come first and control the rest; 0: never")
    gate_std: float = opt(0.1, "a problem is gated if its foreseen pass rates spread less than this; 0: no gate")
    gate_margin: float = opt(0.0625, "and their mean is this close to 0 or 1")
    cutoff: float = opt(2.0, "solutions end after so many times the foreseen length; 0: no cutoff")
    hint: bool = opt(False, "give each solution the notions of one meta as a hint")

    lenient: bool = opt(False, "the released verifier's rules: percent, the last number, 1e-4", "rewards")
    notion_rate: bool = opt(False, "compare how often right and wrong solutions hold a notion, not how many do")
    shuffle_statistics: bool = opt(False, "control: score metas against another problem's solutions")

    eval_every: int = opt(0, "steps between evaluations; 0: only before and after", "evaluation")
    eval_samples: int = opt(32, "n: solutions a held-out problem")
    eval_metas: int = opt(0, "metas a held-out problem")
    eval_temperature: float = opt(0.6, "of the evaluation's samples")
    eval_max_new: int = opt(16384, "longest completion in evaluation, tokens")


# ---------- problems and prompts


@dataclass(frozen=True)
class Problem:
    id: str
    text: str
    answer: str


def load_problems(path: str | Path) -> tuple[list[Problem], int]:
    """(problems, how many were left out because no answer can be read from their `answer`).

    A row: problem (a text), answer (a text or a number), id (a text; without one: NAME/LINE). Raises InputError.
    """
    seen: set[str] = set()

    def check(row: dict[str, Any]) -> None:
        if not isinstance(row["problem"], str) or not row["problem"].strip():
            raise InputError(f"field 'problem' must be a text with words, not {row['problem']!r}; repair the row")
        if not isinstance(row["answer"], str | int | float) or isinstance(row["answer"], bool):
            raise InputError(f"field 'answer' must be a text or a number, not {row['answer']!r}; repair the row")
        row.setdefault("id", f"{Path(path).stem}/{len(seen)}")
        if not isinstance(row["id"], str) or row["id"] in seen:
            raise InputError(f"field 'id' is {row['id']!r}; it must be a text that no earlier row has")
        seen.add(row["id"])

    rows = read_jsonl(path, ("problem", "answer"), check)
    problems = [Problem(r["id"], r["problem"], str(r["answer"])) for r in rows]
    usable = [p for p in problems if verifier.usable(p.answer)]
    if not usable:
        raise InputError(f"{path}: no problem with a readable answer; rows need problem and answer")
    return usable, len(problems) - len(usable)


class Prompts:
    """Problem texts to token ids, and completions to text."""

    def __init__(self, folder: Path, s: Settings) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.plain, self.with_system = ChatTemplate(folder), ChatTemplate(folder, s.meta_system)
        self.with_system.check(self.tokenizer)
        self.turns = {k: load_prompt(getattr(s, f"{k}_prompt")) for k in ("solve", "meta", "eval")}
        self.max_new = s.max_new
        # Base checkpoints disagree on which of the two ends a turn, so both do.
        ends = {self.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")} - {None}
        own = load_stop_ids(folder, self.tokenizer)
        self.end, self.stop_ids = min(own), own | ends

    def solve(self, problem: str, hint: Sequence[str] = ()) -> list[int]:
        """q_sol, with notions as a hint if there are any."""
        if hint:
            problem += f" The problem could be solved using the following math notions: {', '.join(hint)}."
        text = fill(self.turns["solve"], problem=problem)
        return self.encode(self.plain.prompt(text, thinking=True))

    def meta(self, problem: str) -> list[int]:
        """q_meta, which holds all of q_sol's turn."""
        places = {"max_new": str(self.max_new)} if "{max_new}" in self.turns["meta"] else {}
        text = fill(self.turns["meta"], problem=fill(self.turns["solve"], problem=problem), **places)
        return self.encode(self.with_system.prompt(text, thinking=True))

    def evaluation(self, problem: str) -> list[int]:
        """The prompt of an evaluated solution; the paper's is the bare problem, unlike in training."""
        text = fill(self.turns["eval"], problem=problem)
        return self.encode(self.plain.prompt(text, thinking=True))

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def text(self, ids: list[int]) -> str:
        """A completion as text, without its end token."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=False)


# ---------- what a meta says


@dataclass(frozen=True)
class Prediction:
    """A parsed meta; a part that is missing or of the wrong kind is None and earns nothing."""

    reasoning: str | None  # what stands between <meta> and </meta>
    notions: tuple[str, ...] | None
    p_hat: float | None  # 0, 1/8, ..., 1
    length: int | None  # tokens


def meta_text(reasoning: str, notions: Sequence[str], eighths: int, length: int) -> str:
    """A meta in the form that q_meta asks for."""
    numbers = {"math_notion": list(notions), "pass_rate": eighths, "solution_length": length}
    return f"<meta>{reasoning}</meta>\n{json.dumps(numbers, ensure_ascii=False)}"


def parse_meta(text: str) -> Prediction | None:
    """The prediction in a completion: the last JSON object after </meta> with one of the keys, or None."""
    head, tag, tail = text.rpartition("</meta>")
    tail = tail if tag else text
    keys, decoder = {"math_notion", "pass_rate", "solution_length"}, json.JSONDecoder()
    starts = [m.start() for m in re.finditer(r"\{", tail)][-50:]  # a bound for text made of braces
    for start in reversed(starts):
        try:
            found, _ = decoder.raw_decode(tail, start)
        except (ValueError, RecursionError):
            continue
        if keys & found.keys():
            break
    else:
        return None
    notions, rate, length = (found.get(key) for key in ("math_notion", "pass_rate", "solution_length"))
    listed = isinstance(notions, list) and all(isinstance(n, str) for n in notions)
    return Prediction(
        reasoning=head.rpartition("<meta>")[2] if "<meta>" in head else None,
        notions=tuple(notions) if listed else None,
        p_hat=rate / GRID if type(rate) is int and 0 <= rate <= GRID else None,  # a bool is no int
        length=length if type(length) is int and length > 0 else None,
    )


def lemma(notion: str) -> str:
    """A regular English plural without its ending, everything else as it is.

    >>> [lemma(n) for n in ("identities", "boxes", "medians", "class", "power series")]
    ['identity', 'box', 'median', 'class', 'power series']
    """
    low = notion.lower()
    if low.endswith("series") or low.endswith("ss") or not low.endswith("s"):
        return notion
    if low.endswith("ies"):
        return notion[:-3] + "y"
    return notion[:-2] if low.endswith(("ches", "shes", "xes", "zes", "oes")) else notion[:-1]


# ---------- rewards


@dataclass(frozen=True)
class Outcome:
    """What a problem's G solutions turned out to be: the ground truth of its metas."""

    correct: tuple[bool, ...]
    answered: tuple[bool, ...]  # whether there was an answer at all
    lengths: tuple[int, ...]  # tokens, with the end token
    texts: tuple[str, ...]
    failed: int = 0  # solutions that are wrong only because the verifier failed

    @property
    def p(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def correct_lengths(self) -> list[int]:
        return [n for n, right in zip(self.lengths, self.correct, strict=True) if right]


def reward_length(length: int | None, outcome: Outcome) -> float:
    """1 if the foreseen length lies within those of the right solutions, both ends included; 0 without any. Eq. 1."""
    # PAPER: min <= length <= max.  RELEASED CODE: <, so that one right solution can never be foreseen.  HERE: <=.
    right = outcome.correct_lengths
    return float(length is not None and bool(right) and min(right) <= length <= max(right))


def reward_difficulty(p_hat: float | None, p: float) -> float:
    """0.01 ** |p_hat - p|, Eq. 2."""
    return 0.0 if p_hat is None else BASE ** abs(p_hat - p)


def reward_notion(notions: Sequence[str] | None, problem: str, outcome: Outcome, rate: bool = False) -> float:
    """The share of the notions that more right than wrong solutions hold, Eq. 3 and 4.

    Notions are cut to their lemma, those in the problem's own text do not count, nor does a repetition. rate: compare
    shares of right and wrong solutions; counts reward any common word once p > 1/2.
    """
    # RELEASED CODE: leaves out every notion found in the meta prompt, its instructions included.
    # HERE:          those of the problem.
    # WHY:           the paper says the problem; the instructions' words would go too.
    distinct = {lemma(n) for n in notions or ()}
    distinct = {n for n in distinct if n.strip() and n not in problem}
    if not distinct:
        return 0.0
    n_right = sum(outcome.correct)
    n_wrong = len(outcome.correct) - n_right
    per = (max(n_right, 1), max(n_wrong, 1)) if rate else (1, 1)
    won = 0
    for notion in distinct:
        held = [right for right, text in zip(outcome.correct, outcome.texts, strict=True) if notion in text]
        won += sum(held) / per[0] > (len(held) - sum(held)) / per[1]
    return won / len(distinct)


def reward_meta(
    prediction: Prediction | None, problem: str, outcome: Outcome, rate: bool = False
) -> tuple[float, float, float]:
    """(length, difficulty, notion): a meta's reward is their mean, a part that is missing counts 0. v2 Eq. 2."""
    if prediction is None:
        return 0.0, 0.0, 0.0
    length = reward_length(prediction.length, outcome)
    return (
        length,
        reward_difficulty(prediction.p_hat, outcome.p),
        reward_notion(prediction.notions, problem, outcome, rate),
    )


# ---------- the objective


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-6) of one group, std with n - 1. All equal: 0. One alone: its reward (mean 0, std 1)."""
    if len(rewards) == 1:
        return [rewards[0] / (1 + 1e-6)]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(r - mean) / (std + 1e-6) if std else 0.0 for r in rewards]


def policy_loss(
    logp: Tensor, old: Tensor, advantage: Tensor, low: float, high: float, dual: float
) -> tuple[Tensor, Tensor]:
    """Each token's loss (M,), to be minimised, and whether clipping took its gradient (M,) bool. Section 3.1.

    logp, old (M,): log-probabilities under the policy and under the one that sampled. advantage (M,).
    """
    ratio = (logp - old).clamp(-LOG_RATIO, LOG_RATIO).exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)  # - min[rho A, clip(rho) A]
    bound = -advantage * dual  # DAPO's code: a wrong token that became far more likely must not dominate
    limited = (advantage < 0) & (bound < loss)
    return torch.where(limited, bound, loss), (clipped > plain) | limited


def token_logp(model: qwen.Qwen3, batch: data.Batch, temperature: float, impl: str) -> Tensor:
    """(M,) fp32: log-probability of every completion token at the temperature it was sampled with."""
    hidden = model(batch.ids, batch.cu_seqlens)[batch.predict] / temperature  # (M, E)
    M = len(batch.targets)
    if not model.head.requires_grad:  # each token is a sequence of its own to the op
        return segment_logprob(hidden, model.head, batch.targets, batch.w, torch.arange(M + 1), impl)[1]
    parts = zip(hidden.split(HEAD_CHUNK), batch.targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([recompute(_head_logp, h, model.head, y, use_reentrant=False) for h, y in parts])


def _head_logp(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")


# ---------- control: gate, cutoff, hint


def is_gated(predictions: Sequence[Prediction | None], std: float, margin: float) -> bool:
    """Whether a problem is foreseen, with little spread, to be solved always or never (3.3): it would teach nothing."""
    # PAPER: v1 "std < 0.1" and beyond or below capacity; v2 "the mean prediction is 0 or 1".
    # HERE:  std < gate_std, the mean within gate_margin of 0 or 1, and at least half of the metas parsed.
    # WHY:   a mean that is exactly 0 or 1 has no spread, so the first test only means something with a margin.
    rates = [p.p_hat for p in predictions if p is not None and p.p_hat is not None]
    if not std or 2 * len(rates) < len(predictions):
        return False
    mean = statistics.fmean(rates)
    return statistics.pstdev(rates) < std and not margin <= mean <= 1 - margin


def cut_at(predictions: Sequence[Prediction | None], times: float, max_new: int) -> int:
    """Most tokens of a solution (3.3): `times` the median foreseen length; max_new if fewer than half foresee one."""
    lengths = [p.length for p in predictions if p is not None and p.length is not None]
    if not times or 2 * len(lengths) < len(predictions):
        return max_new
    return min(max(int(times * statistics.median(lengths)), SHORTEST_CUT), max_new)


def hint_of(predictions: Sequence[Prediction | None], seed: int) -> tuple[str, ...]:
    """The notions of one meta, drawn among those that name any."""
    named = [p.notions for p in predictions if p is not None and p.notions]
    return random.Random(seed).choice(named) if named else ()


# ---------- one step


@dataclass
class Rollout:
    """One completion and what it earned. logp: (T,) under the policy that sampled it, kept where updates > 1."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    cut: bool  # ended at its limit and not by itself
    limit: int
    reward: float = 0.0
    advantage: float = 0.0
    logp: Tensor | None = None


@dataclass
class Group:
    """A problem and all that was sampled for it in one step. place: its number among the problems of the step."""

    place: int
    problem: Problem
    metas: list[Rollout] = field(default_factory=list)
    solutions: list[Rollout] = field(default_factory=list)
    predictions: list[Prediction | None] = field(default_factory=list)
    parts: list[tuple[float, float, float]] = field(default_factory=list)  # of each meta's reward
    outcome: Outcome | None = None  # None: gated

    @property
    def flat(self) -> bool:
        """All solutions right, or all wrong: no gradient."""
        return len({r.reward for r in self.solutions}) < 2


@dataclass(frozen=True)
class Job:
    """A completion to sample. seed: see sample.seed_of."""

    prompt_ids: list[int]
    seed: int
    limit: int


Expert = tuple[list[int], list[int]]  # prompt_ids of a meta, its corrected completion

# What a step counts, summed over ranks, and the metrics made of it: name -> (numerator, denominator).
COUNTS = (
    *("problems", "gated", "solutions", "correct", "answered", "failed", "cut", "at_limit", "solution_tokens"),
    *("solved_groups", "flat", "flat_metas", "metas", "parsed", "estimates", "error", "meta_tokens"),
    *("scored", "length", "difficulty", "notion", "notions", "generic", "loss", "clipped", "trained"),
    *(f"p_hat/{k}" for k in range(GRID + 1)),
)
SHARES = {
    "accuracy": ("correct", "solutions"),
    "share/answered": ("answered", "solutions"),
    "share/verifier_failed": ("failed", "solutions"),
    "solution_length": ("solution_tokens", "solutions"),
    "share/at_limit": ("at_limit", "solutions"),  # unfinished for want of room
    "share/cut": ("cut", "solutions"),  # ended by the cutoff
    "share/gated": ("gated", "problems"),
    "share/flat": ("flat", "solved_groups"),  # all right or all wrong
    "meta_length": ("meta_tokens", "metas"),
    "meta/parsed": ("parsed", "metas"),
    "meta/error": ("error", "estimates"),  # mean |p_hat - p|
    "meta/length": ("length", "scored"),
    "meta/difficulty": ("difficulty", "scored"),
    "meta/notion": ("notion", "scored"),
    "share/flat_metas": ("flat_metas", "solved_groups"),
    "share/generic": ("generic", "notions"),  # foreseen notions that nearly every solution holds
    "share/clipped": ("clipped", "trained"),
}


class Tally(dict[str, float]):
    """COUNTS of this rank."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(COUNTS, 0.0))

    def metrics(self, ranks: Ranks) -> dict[str, Any]:
        """The step's row, over all ranks; a share of nothing is None."""
        total = ranks.sum(torch.tensor([self[name] for name in COUNTS], dtype=torch.float64, device=ranks.device))
        count = dict(zip(COUNTS, total.tolist(), strict=True))
        row: dict[str, Any] = {k: count[a] / count[b] if count[b] else None for k, (a, b) in SHARES.items()}
        row |= {"loss": count["loss"], "sampled": int(count["solution_tokens"] + count["meta_tokens"])}
        row |= {"solution_tokens": int(count["solution_tokens"]), "meta_tokens": int(count["meta_tokens"])}
        return row | {"p_hat": [int(count[f"p_hat/{k}"]) for k in range(GRID + 1)]}


class Masa:
    """The policy, its problems, and all that lasts from step to step."""

    def __init__(self, model: qwen.Qwen3, prompts: Prompts, problems: list[Problem], s: Settings, ranks: Ranks) -> None:
        self.model, self.prompts, self.s, self.ranks = model, prompts, s, ranks
        self.impl = s.kernel or default_impl(ranks.device)
        self.lr = s.lr or (1e-6 if s.full else 1e-5)  # LoRA needs about ten times the rate of all weights
        if s.full:
            model.requires_grad_(True)
        else:
            lora.add(model, s.lora_r, s.lora_alpha, seed=s.seed)
        model.gradient_checkpointing = s.gradient_checkpointing
        self.names = dict(model.named_parameters()) if s.full else lora.state(model)
        self.optimizer = torch.optim.AdamW(
            self.names.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay
        )
        self.problems = self.fitting(problems)
        self.taken = self.sampled = 0  # problems taken from the stream, tokens sampled, by all ranks
        self.experts: list[Expert] = []
        self.server = None
        if s.base_url:
            base = Endpoint(s.model, s.base_url, s.key_env)
            share = max(1, s.concurrency // ranks.world)
            self.server = remote.Served(base, share, Path(s.out) / "served", prompts.encode)

    def fitting(self, problems: list[Problem]) -> list[Problem]:
        """The problems with short enough prompts. Raises InputError when there are none or the model has no room."""
        s, room = self.s, self.model.config.max_position_embeddings
        longest = {p.id: max(len(self.prompts.solve(p.text)), len(self.prompts.meta(p.text))) for p in problems}
        kept = [p for p in problems if longest[p.id] <= s.max_prompt]
        if not kept:
            raise InputError(
                f"no problem's prompts fit into {s.max_prompt} tokens (the shortest has {min(longest.values())}); "
                "raise --max-prompt"
            )
        need = max(longest[p.id] for p in kept) + s.max_new
        if need > room:
            raise InputError(f"prompts and --max-new need {need} positions, the model has {room}; lower --max-new")
        self.ranks.log(f"{len(kept):,} problems, {len(problems) - len(kept):,} left out beyond {s.max_prompt} tokens")
        return kept

    # -- sampling

    def complete(self, jobs: list[Job], temperature: float, what: str) -> list[Rollout]:
        """Sample every job of this rank: here, or at the server."""
        progress = Progress(self.ranks, None, what, "tokens")
        how = sample.Sampling(temperature, top_p=1.0, top_k=0)  # a cut distribution would bias the ratios
        prompts, seeds, limits = [j.prompt_ids for j in jobs], [j.seed for j in jobs], [j.limit for j in jobs]
        common: dict[str, Any] = {"stop_ids": self.prompts.stop_ids, "progress": progress}
        self.ranks.check_stop()
        if self.server is None:
            common |= {"batch_size": self.s.sample_batch, **asdict(how)}
            done = sample.generate(self.model, prompts, seeds, max_new=limits, **common)
        else:
            done = self.server.generate(prompts, seeds, limits, sampling=how, end_id=self.prompts.end, **common)
        if time.perf_counter() - progress.started > 10:
            progress.close()
        texts = [self.prompts.text(c.ids) for c in done]
        return [
            Rollout(job.prompt_ids, c.ids, text, c.finish == "length", job.limit)
            for job, c, text in zip(jobs, done, texts, strict=True)
        ]

    def publish(self, number: int) -> None:
        """Give the policy as it stands after `number` steps to the server, if one samples."""
        if self.server is not None:
            save = partial(lora.save, self.model, base_name=self.s.model, revision=self.s.revision)
            self.server.publish(save, str(number), self.ranks)

    def jobs(self, problem: Problem, kind: str, when: str, n: int, limit: int, hints: Sequence = ()) -> list[Job]:
        """n completions of one kind, "meta", "solution" or "evaluation", of a problem. when: part of their seeds."""
        make = {"meta": self.prompts.meta, "solution": self.prompts.solve, "evaluation": self.prompts.evaluation}[kind]
        seeds = [sample.seed_of(self.s.seed, f"{when}/{problem.id}", kind, k) for k in range(n)]
        plain = make(problem.text)
        out = []
        for k, seed in enumerate(seeds):
            ids = self.prompts.solve(problem.text, hints[k]) if hints and hints[k] else plain
            out.append(Job(ids if len(ids) <= self.s.max_prompt else plain, seed, limit))
        return out

    def next_batch(self) -> list[Group]:
        """This rank's share of the next `batch` problems of the stream, each epoch in its own seeded order."""
        s, n, groups = self.s, len(self.problems), []
        for place in range(s.batch):
            epoch, at = divmod(self.taken + place, n)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(s.seed * 1000 + epoch))
            groups.append(Group(place, self.problems[int(order[at])]))
        self.taken += s.batch
        return groups[self.ranks.rank :: self.ranks.world]

    def roll_out(self, groups: list[Group], number: int, when: str) -> None:
        """Sample metas and solutions of the groups: in one go, or metas first once they are in control."""
        s = self.s
        at = {g.place: f"{when}.{g.place}" for g in groups}  # the same problem twice in a batch gets its own samples
        metas = [self.jobs(g.problem, "meta", at[g.place], s.metas, s.max_new) for g in groups]
        if not (s.control_from and number >= s.control_from and s.metas):
            solutions = [self.jobs(g.problem, "solution", at[g.place], s.solutions, s.max_new) for g in groups]
            done = self.complete([j for part in metas + solutions for j in part], s.temperature, "rollouts")
            split = len(groups) * s.metas
            self.hand_out(groups, done[:split], done[split:])
            return
        self.hand_out(groups, self.complete([j for part in metas for j in part], s.temperature, "metas"), [])
        open_groups = [g for g in groups if not is_gated(g.predictions, s.gate_std, s.gate_margin)]
        solutions = []
        for g in open_groups:
            seeds = [sample.seed_of(s.seed, at[g.place], "hint", k) for k in range(s.solutions)]
            hints = [hint_of(g.predictions, seed) for seed in seeds] if s.hint else ()
            limit = cut_at(g.predictions, s.cutoff, s.max_new)
            solutions += self.jobs(g.problem, "solution", at[g.place], s.solutions, limit, hints)
        self.hand_out(open_groups, [], self.complete(solutions, s.temperature, "solutions"))

    def hand_out(self, groups: list[Group], metas: list[Rollout], solutions: list[Rollout]) -> None:
        """Give every group its rollouts; they come in the groups' order."""
        for k, g in enumerate(groups):
            if metas:
                n = len(metas) // len(groups)
                g.metas = metas[k * n : (k + 1) * n]
                g.predictions = [parse_meta(r.text) for r in g.metas]
            if solutions:
                n = len(solutions) // len(groups)
                g.solutions = solutions[k * n : (k + 1) * n]

    # -- rewards

    def score(self, groups: list[Group]) -> None:
        """Rewards and advantages of every rollout of the groups that were not gated."""
        solved = [g for g in groups if g.solutions]
        for g in solved:
            g.outcome = judge(g.solutions, g.problem, self.s.lenient)
            for r, right in zip(g.solutions, g.outcome.correct, strict=True):
                r.reward = float(right)  # correctness alone: no reward for the format
            spread(g.solutions)
        shifted = solved[1:] + solved[:1]
        if self.s.shuffle_statistics and len(solved) == 1:
            raise InputError("--shuffle-statistics needs two problems a rank and step; raise --batch")
        for g, other in zip(solved, shifted if self.s.shuffle_statistics else solved, strict=True):
            g.parts = [reward_meta(p, g.problem.text, other.outcome, self.s.notion_rate) for p in g.predictions]
            for r, parts in zip(g.metas, g.parts, strict=True):
                r.reward = sum(parts) / 3  # v2 Eq. 2
            spread(g.metas)

    def collect(self, number: int, tally: Tally) -> list[Group]:
        """The scored groups this rank trains on: of one batch, or with `dynamic` of as many as it takes."""
        s, kept = self.s, []
        for attempt in range(s.dynamic_tries if s.dynamic else 1):
            groups = self.next_batch()
            self.roll_out(groups, number, f"{number}.{attempt}")
            self.score(groups)
            for g in groups:
                count(tally, g, s.max_new)
                g.place += attempt * s.batch
            kept += [g for g in groups if g.solutions and not (s.dynamic and g.flat)]
            if s.dynamic:
                places = sorted(place for part in self.ranks.gather([g.place for g in kept]) for place in part)
                if len(places) >= s.batch:
                    return [g for g in kept if g.place <= places[s.batch - 1]]
        return kept

    # -- updates

    def packs(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        """Rollouts in forward passes of at most micro_tokens tokens (or one rollout), longest first."""
        packs: list[list[Rollout]] = []
        size = 0
        for r in sorted(rollouts, key=lambda r: -len(r.prompt_ids) - len(r.ids)):
            length = len(r.prompt_ids) + len(r.ids)
            if not packs or size + length > self.s.micro_tokens:
                packs.append([])
                size = 0
            packs[-1].append(r)
            size += length
        return packs

    def batch_of(self, rollouts: list[Rollout], weights: list[float]) -> data.Batch:
        """Rollouts packed; every token of a rollout carries its weight in the loss."""
        rows = [(r.prompt_ids, r.ids, torch.full((len(r.ids),), w)) for r, w in zip(rollouts, weights, strict=True)]
        return data.pack(rows).to(self.ranks.device)

    def remember(self, rollouts: list[Rollout]) -> None:
        """Keep the log-probabilities of the policy that sampled, before the first of several updates."""
        with torch.no_grad():
            for pack in self.packs(rollouts):
                logp = token_logp(self.model, self.batch_of(pack, [1.0] * len(pack)), self.s.temperature, self.impl)
                for r, part in zip(pack, logp.split([len(r.ids) for r in pack]), strict=True):
                    r.logp = part

    def update(self, rollouts: list[Rollout], lr: float, tally: Tally) -> float | None:
        """One optimiser step on the rollouts of all ranks; the gradient's norm, None when no rank has any."""
        s = self.s
        mine = [float(sum(len(r.ids) for r in rollouts)), float(len(rollouts))]
        tokens, sequences = self.ranks.sum(torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)).tolist()
        if not tokens:
            return None
        for pack in self.packs([r for r in rollouts if r.advantage]):  # the others have no gradient, and count above
            weights = [1 / tokens if s.agg == "token" else 1 / (sequences * len(r.ids)) for r in pack]
            batch = self.batch_of(pack, weights)
            lengths = torch.tensor([len(r.ids) for r in pack], device=self.ranks.device)
            advantage = torch.tensor([r.advantage for r in pack], device=self.ranks.device).repeat_interleave(lengths)
            logp = token_logp(self.model, batch, s.temperature, self.impl)
            old = logp.detach() if pack[0].logp is None else torch.cat([r.logp for r in pack])
            loss, clipped = policy_loss(logp, old, advantage, s.clip_low, s.clip_high, s.clip_dual)
            total = (loss * batch.w).sum()
            total.backward()
            tally["loss"] += float(total.detach()) / s.updates
            tally["clipped"] += float(clipped.sum())
            tally["trained"] += len(clipped)
        return self.apply(lr)

    def apply(self, lr: float) -> float:
        """Sum the gradients of all ranks, clip, step. Returns the norm before clipping."""
        for p in self.names.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.ranks.sum(p.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.names.values()), self.s.max_grad_norm))
        if not math.isfinite(norm):
            raise NumericsError("the gradient is not finite; lower --lr or look at the last rows of metrics.jsonl")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def learn(self, groups: list[Group], lr: float, tally: Tally) -> float | None:
        """`updates` optimiser steps on the groups' rollouts; the last gradient's norm."""
        s, norm = self.s, None
        if s.updates > 1:
            self.remember([r for g in groups for r in g.solutions + g.metas if r.advantage])
        last = int(max((max(part, default=-1) for part in self.ranks.gather([g.place for g in groups])), default=-1))
        for k in range(s.updates):
            part = [g for g in groups if g.place * s.updates // (last + 1) == k]
            norm = self.update([r for g in part for r in g.solutions + g.metas], lr, tally) or norm
        return norm

    # -- experts

    def clone(self, groups: list[Group], lr: float) -> dict[str, float]:
        """Collect experts; when there are enough, clone them and start again. Eq. 5, Algorithm 1."""
        s = self.s
        if not s.experts:
            return {}
        found = {g.place: expert for g in groups if (expert := expert_of(g, self.prompts, s.expert_notion))}
        merged = {place: e for part in self.ranks.gather(found) for place, e in part.items()}
        self.experts += [merged[place] for place in sorted(merged)]
        row: dict[str, float] = {"experts": len(self.experts)}
        if len(self.experts) < s.experts:
            return row
        # PAPER: theta - beta * grad L_BC after the RL step, beta not given, "5 gradient updates per outer loop".
        # HERE:  beta is the RL learning rate, each update on all experts, then the set is emptied (Algorithm 1).
        # WHY:   one optimiser for both, as in the released code, whose own loop keeps what is beyond N.
        tokens = sum(len(ids) for _, ids in self.experts)
        mine = [Rollout(prompt, ids, "", False, 0) for prompt, ids in self.experts[self.ranks.rank :: self.ranks.world]]
        losses = []
        for _ in range(s.expert_updates):
            nats = torch.zeros((), device=self.ranks.device)
            for pack in self.packs(mine):
                batch = self.batch_of(pack, [1 / tokens] * len(pack))
                loss = -(token_logp(self.model, batch, s.temperature, self.impl) * batch.w).sum()  # L_BC of Eq. 5
                loss.backward()
                nats += loss.detach()
            self.apply(lr)
            losses.append(float(self.ranks.sum(nats)))
        self.experts = []
        return row | {"bc_loss/first": losses[0], "bc_loss/last": losses[-1]}

    def step(self, number: int) -> dict[str, Any]:
        """One step of Algorithm 1; its row of metrics."""
        started, tally = time.perf_counter(), Tally()
        self.publish(number)
        groups = self.collect(number, tally)
        lr = self.lr * min(1.0, (number + 1) / max(1, self.s.warmup_steps))
        try:
            norm = self.learn(groups, lr, tally)
            cloned = self.clone(groups, lr)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
            raise MemoryFull(
                f"{reason}; use --micro-tokens {self.s.micro_tokens // 2}, the result is the same"
            ) from None
        row = tally.metrics(self.ranks)
        self.sampled += row["sampled"]
        if number == 0 and row["meta/parsed"] == 0:
            heard = next((r.text for g in groups for r in g.metas), "")[:200]
            raise InputError(
                f"no meta of the first step could be parsed (one: {heard!r}); the model must follow q_meta"
            )
        row |= {"grad_norm": norm, "learning_rate": lr, **cloned, "tokens": self.sampled}
        return {"step": number + 1, **row, "seconds": round(time.perf_counter() - started, 3)}

    # -- evaluation

    def evaluate(self, number: int, name: str, problems: list[Problem]) -> list[dict[str, Any]]:
        """One row a problem: n solutions, how many are right, and what metas foresaw. On every rank, all rows."""
        self.publish(number)
        s, rows = self.s, []
        mine = problems[self.ranks.rank :: self.ranks.world]
        limit = min(s.eval_max_new, self.model.config.max_position_embeddings - s.max_prompt)
        when = f"eval.{number}"
        solutions = [self.jobs(p, "evaluation", when, s.eval_samples, limit) for p in mine]
        metas = [self.jobs(p, "meta", when, s.eval_metas, s.max_new) for p in mine]
        groups = [Group(k, p) for k, p in enumerate(mine)]
        done = self.complete([j for part in metas + solutions for j in part], s.eval_temperature, f"evaluating {name}")
        self.hand_out(groups, done[: len(mine) * s.eval_metas], done[len(mine) * s.eval_metas :])
        for g in groups:
            outcome = judge(g.solutions, g.problem, s.lenient)
            parts = [reward_meta(p, g.problem.text, outcome, s.notion_rate) for p in g.predictions]
            row = {"step": number, "set": name, "id": g.problem.id, "n": len(g.solutions)}
            row |= {"correct": sum(outcome.correct), "correct_lengths": outcome.correct_lengths}
            row |= {"lengths": outcome.lengths, "at_limit": sum(r.cut for r in g.solutions)}
            if g.metas:
                said = [p for p in g.predictions if p is not None]
                row |= {"metas": len(g.metas), "parsed": len(said), "meta_tokens": sum(len(r.ids) for r in g.metas)}
                row |= {"p_hats": [p.p_hat for p in said if p.p_hat is not None]}
                row |= {"l_hats": [p.length for p in said if p.length is not None]}
                means = [statistics.fmean(column) for column in zip(*parts, strict=True)]
                row |= dict(zip(("r_length", "r_difficulty", "r_notion"), means, strict=True))
                row["gated"] = is_gated(g.predictions, s.gate_std, s.gate_margin)
                row["cut_at"] = cut_at(g.predictions, s.cutoff, limit)
            rows.append(row)
        found = {row["id"]: row for part in self.ranks.gather(rows) for row in part}
        return [found[p.id] for p in problems]


def judge(solutions: list[Rollout], problem: Problem, lenient: bool) -> Outcome:
    """The verifier's word on each solution; one that was cut off is judged as it stands."""
    grades = [verifier.grade(r.text, problem.answer, lenient) for r in solutions]
    correct, answered = tuple(g.correct for g in grades), tuple(g.found for g in grades)
    lengths, texts = tuple(len(r.ids) for r in solutions), tuple(r.text for r in solutions)
    return Outcome(correct, answered, lengths, texts, sum(g.failed for g in grades))


def spread(rollouts: list[Rollout]) -> None:
    """Advantages within one group of rollouts."""
    for r, a in zip(rollouts, advantages([r.reward for r in rollouts]) if rollouts else [], strict=True):
        r.advantage = a


def count(tally: Tally, g: Group, max_new: int) -> None:
    """Add one scored group to the counts of a step."""
    tally["problems"] += 1
    tally["gated"] += not g.solutions
    tally["metas"] += len(g.metas)
    tally["meta_tokens"] += sum(len(r.ids) for r in g.metas)
    for p in g.predictions:
        tally["parsed"] += p is not None
        if p is not None and p.p_hat is not None:
            tally[f"p_hat/{round(GRID * p.p_hat)}"] += 1
    if g.outcome is None:
        return
    tally["solved_groups"] += 1
    tally["flat"] += g.flat
    tally["flat_metas"] += len({r.reward for r in g.metas}) < 2
    tally["solutions"] += len(g.solutions)
    tally["correct"] += sum(g.outcome.correct)
    tally["answered"] += sum(g.outcome.answered)
    tally["failed"] += g.outcome.failed
    tally["solution_tokens"] += sum(g.outcome.lengths)
    tally["cut"] += sum(r.cut and r.limit < max_new for r in g.solutions)
    tally["at_limit"] += sum(r.cut and r.limit == max_new for r in g.solutions)
    for p, parts in zip(g.predictions, g.parts, strict=True):
        for name, value in zip(("length", "difficulty", "notion"), parts, strict=True):
            tally[name] += value
        tally["scored"] += 1
        if p is not None and p.p_hat is not None:
            tally["estimates"] += 1
            tally["error"] += abs(p.p_hat - g.outcome.p)
        for notion in {lemma(n) for n in (p.notions if p is not None and p.notions else ())}:
            tally["notions"] += 1
            tally["generic"] += sum(notion in text for text in g.outcome.texts) >= GENERIC * len(g.outcome.texts)


def expert_of(g: Group, prompts: Prompts, least: float) -> Expert | None:
    """A group's meta with the best notions, its two numbers replaced by what the solutions turned out to be.

    None when no meta has <meta> tags and a notion reward of `least` or more, which takes a right solution.
    """
    # The reasoning is left as it is and may contradict the corrected numbers; the paper does the same.
    ranked = [
        (parts[2], -k) for k, (parts, p) in enumerate(zip(g.parts, g.predictions, strict=True)) if p and p.reasoning
    ]
    if not ranked or max(ranked)[0] < least or not g.outcome.correct_lengths:
        return None
    k = -max(ranked)[1]
    chosen, end = g.predictions[k], prompts.end if g.metas[k].cut else g.metas[k].ids[-1]  # the policy's own way to end
    length = int(statistics.fmean(g.outcome.correct_lengths))
    text = meta_text(chosen.reasoning, chosen.notions, round(GRID * g.outcome.p), length)
    return prompts.meta(g.problem.text), [*prompts.encode(text), end]


# ---------- the run


def identity_of(s: Settings, source: hub.Source, evals: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit: everything that shapes the result."""
    free = {"micro_tokens", "gradient_checkpointing", "save_every", "kernel", "resume", "out", "sample_batch"}
    free |= {"base_url", "key_env", "concurrency", "problems", "eval_sets", "model", "revision"}
    values = {k: v for k, v in asdict(s).items() if k not in free}
    values |= {name: load_prompt(values[name]) for name in ("solve_prompt", "meta_prompt", "eval_prompt")}
    weights = hashlib.sha256("".join(sha256_file(f) for f in weight_files(source.folder)).encode()).hexdigest()
    digests = {name: sha256_file(path) for name, path in evals.items()}
    return checkpoint.identity_of(
        {"base": weights, "problems": sha256_file(s.problems), "eval_sets": digests, **values}
    )


class Run:
    """A training on disk: log, evaluations, checkpoints, results."""

    def __init__(
        self, s: Settings, source: hub.Source, masa: Masa, evals: dict[str, list[Problem]], identity: dict
    ) -> None:
        self.s, self.source, self.masa, self.evals, self.identity = s, source, masa, evals, identity
        self.out, self.ranks = Path(s.out), masa.ranks
        self.total = s.steps or math.ceil(s.epochs * len(masa.problems) / s.batch)
        self.log: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.saved = -1

    def take_up(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        manifest = checkpoint.latest(self.out, self.identity)
        if len({str(found) for found in self.ranks.gather(manifest and manifest["step"])}) > 1:
            raise InputError(
                f"{self.out}: not every rank sees the same checkpoint; put it where all can read and write"
            )
        if manifest is None:
            return
        masa = self.masa
        checkpoint.restore(manifest["path"], masa.names, masa.optimizer)
        masa.taken, masa.sampled = manifest["taken"], manifest["sampled"]
        masa.experts = [(prompt, ids) for prompt, ids in manifest["experts"]]
        self.log = read_jsonl(self.out / "metrics.jsonl")[: manifest["step"]]
        rows = read_jsonl(self.out / "evals.jsonl") if (self.out / "evals.jsonl").exists() else []
        self.evaluations = [row for row in rows if row["step"] <= manifest["step"]]
        self.saved = manifest["step"]
        self.ranks.log(f"{self.out}: continuing after step {self.saved} of {self.total}")

    def save(self) -> None:
        """A checkpoint of the last finished step."""
        masa, step = self.masa, len(self.log)
        if self.ranks.rank == 0 and step > max(self.saved, 0):
            write_jsonl(self.out / "metrics.jsonl", self.log)
            state = {"identity": self.identity, "taken": masa.taken, "sampled": masa.sampled, "experts": masa.experts}
            checkpoint.save(self.out, step, masa.names, masa.optimizer, state)
        self.saved = step

    def evaluate(self, number: int) -> None:
        """All evaluation sets as they stand after `number` steps, unless that has been done."""
        for name, problems in self.evals.items():
            if any(row["step"] == number and row["set"] == name for row in self.evaluations):
                continue
            self.evaluations += self.masa.evaluate(number, name, problems)
            if self.ranks.rank == 0:
                write_jsonl(self.out / "evals.jsonl", self.evaluations)
        self.ranks.wait()

    def train(self) -> None:
        """All steps that are left. Raises Stopped after the last finished step has been saved."""
        s, progress = self.s, Progress(self.ranks, self.total, "training", "steps")
        progress(len(self.log))
        if self.ranks.rank == 0:
            checkpoint.check_space(self.out, self.masa.names)
        with self.ranks.stop.hold():
            try:
                for number in range(len(self.log), self.total):
                    if number == 0 or (s.eval_every and number % s.eval_every == 0):
                        self.evaluate(number)
                    before = self.masa.taken, self.masa.sampled
                    try:
                        self.log.append(self.masa.step(number))
                    except Stopped:  # raised while sampling, so no weight has changed
                        self.masa.taken, self.masa.sampled = before
                        raise
                    progress()
                    self.ranks.log(step_line(self.log[-1], self.total))
                    if len(self.log) % s.save_every == 0 or len(self.log) == self.total:
                        self.save()
                self.evaluate(self.total)
            except Stopped:
                self.save()
                self.ranks.log(
                    f"{self.out}: stopped after step {len(self.log)}; the same command with --resume goes on"
                )
                raise
        progress.close()

    def finish(self) -> None:
        """Leave the adapter or the model, and results.json; print the table."""
        if self.ranks.rank == 0:
            if self.s.full:
                qwen.save(self.masa.model, self.out / "model")
            else:
                lora.save(self.masa.model, self.out, self.source.name, self.source.commit)
            results = passk.summaries(self.evaluations)
            facts = {"settings": asdict(self.s), "steps": self.total, "sampled": self.masa.sampled, "evals": results}
            facts["seconds"] = round(sum(row["seconds"] for row in self.log), 1)
            write_json(self.out / "results.json", facts)
            if results:
                print(passk.table(results))
        self.ranks.wait()


def step_line(m: Mapping[str, Any], total: int) -> str:
    """One step's metrics as a line for people."""
    named = {"acc": "accuracy", "parsed": "meta/parsed", "|p_hat-p|": "meta/error", "len": "meta/length"}
    named |= {"notion": "meta/notion", "gated": "share/gated", "cut": "share/cut", "grad": "grad_norm"}
    shown = " ".join(f"{name} {m[key]:.3f}" for name, key in named.items() if m[key] is not None)
    return f"step {m['step']}/{total} {shown} tokens {m['tokens']:,} ({m['seconds']:.1f} s)"


def check(s: Settings) -> None:
    """Refuse settings that cannot be. Raises InputError."""
    for name in ("model", "problems"):
        if not getattr(s, name):
            raise InputError(f"--{name} is missing; python masa.py --help lists all settings")
    rules = {
        "solutions": s.solutions >= 2,
        "metas": s.metas >= 0,
        "batch": s.batch >= 1,
        "updates": 1 <= s.updates <= s.batch,
        "micro_tokens": s.micro_tokens >= 1,
        "temperature": s.temperature > 0,
        "eval_samples": s.eval_samples >= 1,
        "agg": s.agg in ("token", "seq"),
        "dtype": s.dtype in ("bfloat16", "float32"),
    }
    for name, good in rules.items():
        if not good:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(s, name)!r}, which cannot be; see --help")
    if s.full and s.dtype != "float32":
        raise InputError("--full updates of 1e-6 vanish in bfloat16; give --dtype float32")
    if s.full and s.base_url:
        raise InputError("--base-url samples from an adapter; leave out --full")
    if not s.metas and (s.experts or s.control_from):
        raise InputError("--experts and --control-from need metas; give --metas or leave them out")
    for part in s.eval_sets.split(",") if s.eval_sets else ():
        if "=" not in part:
            raise InputError(f"--eval-sets {part!r} must look like name=path.jsonl")


def work(s: Settings, source: hub.Source) -> None:
    """Join the other processes, train, and leave adapter or model, log, evaluations and results in `s.out`."""
    with process_group() as ranks, ranks.stop.listen():
        prompts = Prompts(source.folder, s)
        problems, unreadable = load_problems(s.problems)
        ranks.log(f"{len(problems):,} problems, {unreadable:,} left out because their answer cannot be read")
        paths = dict(part.split("=", 1) for part in s.eval_sets.split(",") if part)
        evals = {name: load_problems(path)[0] for name, path in paths.items()}
        for name, ids in (("solution", prompts.solve("PROBLEM")), ("meta", prompts.meta("PROBLEM"))):
            ranks.log(f"prompt of a {name}: {prompts.tokenizer.decode(ids, skip_special_tokens=False)!r}")
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[s.dtype]
        net = qwen.load(source.folder, dtype, ranks.device).requires_grad_(False)
        masa = Masa(net, prompts, problems, s, ranks)
        ranks.log(f"{ranks.world} process(es) on {ranks.device.type}, log-probability op: {masa.impl}")
        run = Run(s, source, masa, evals, identity_of(s, source, paths))
        if s.resume or ranks.restarted:
            run.take_up()
        elif ranks.rank == 0:
            for old in checkpoint.found(run.out):
                raise InputError(f"{old}: another run's checkpoint; give --resume, or another --out")
        run.train()
        run.finish()


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code, see endings.py."""

    def more(parser: Any) -> None:
        what = "train (and evaluate before and after), or shapley: what explains the gains of a finished run"
        parser.add_argument("command", nargs="?", default="train", choices=("train", "shapley"), help=what)

    out = None
    try:
        s, rest = cli(Settings, argv, __doc__, more, PRESETS)
        if rest.command == "shapley":
            shares = passk.shapley_of(read_jsonl(Path(s.out) / "evals.jsonl"))
            print(
                "\n".join(f"{name:<14}{share:8.4f}" for name, share in [*shares.items(), ("R2", sum(shares.values()))])
            )
            return 0
        check(s)
        source = hub.locate(s.model, s.revision)
        out = Path(s.out)
        work(s, source)
    except ENDINGS as error:
        return settle(error, out)
    return settle(None, out)


if __name__ == "__main__":
    sys.exit(main())
