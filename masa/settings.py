"""Settings of a run and the presets that stand for the paper's variants (v1, v2, GRPO, DAPO).

A preset is a row of settings; a --config file goes before it, and flags before both.
"""

from dataclasses import dataclass
from typing import Any

from common.errors import InputError
from common.settings import check as check_fields
from common.settings import opt

PRESETS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1-efficient": {"experts": 128, "control_from": 120, "hint": True},
    # v2, section 4.1: one epoch (314 steps). Three are for DAPO, and for Llama and Gemma on MATH.
    "v2": {"metas": 8},
    "v2-efficient": {"metas": 8, "control_from": 80},
    "grpo": {"metas": 0},
    "dapo": {"metas": 0, "dynamic": True, "epochs": 3},
    "dapo-meta": {"metas": 8, "dynamic": True, "epochs": 3},  # Table 6 of v2: DAPO with metas
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
    adapter: str = opt("", "adapter folder to start from or to score, ours or PEFT's; none: a new one")
    resume: bool = opt(False, "continue an interrupted run from its last checkpoint")
    solve_prompt: str = opt("prompts/masa_solve.txt", "user turn of a solution, with {problem}")
    meta_prompt: str = opt("prompts/masa_meta.txt", "user turn of a meta, with {problem} and, if wanted, {max_new}")
    eval_prompt: str = opt("prompts/masa_bare.txt", "user turn of a solution in evaluation, with {problem}")
    meta_system: str = opt("You are a helpful assistant.", "system turn of a meta; none: no such turn")
    dtype: str = opt(
        "bfloat16",
        "dtype of the base weights: bfloat16 or float32; adapters are float32",
        choices=("bfloat16", "float32"),
    )

    solutions: int = opt(16, "G: solutions a problem and step", "sampling", low=2)
    metas: int = opt(16, "M: metas a problem and step; 0: plain GRPO or DAPO", low=0)
    batch: int = opt(128, "problems a step, over all ranks", low=1)
    epochs: int = opt(1, "passes over the problems", low=1)
    steps: int = opt(0, "steps; 0: as many as the epochs have", low=0)
    max_prompt: int = opt(2048, "longest prompt, tokens; problems beyond it are left out and counted", low=1)
    max_new: int = opt(8192, "longest completion, tokens", low=1)
    temperature: float = opt(1.0, "of sampling; the loss divides the logits by it too", above=0)
    dynamic: bool = opt(False, "DAPO: sample until the batch is full of problems solved rightly and wrongly")
    dynamic_tries: int = opt(4, "most batches sampled for one step of --dynamic", low=1)
    sample_batch: int = opt(128, "rows decoded together on one rank", low=1)
    base_url: str = opt("", "vLLM server that samples in our place, for example http://127.0.0.1:8000/v1; none: here")
    key_env: str = opt("", "NAME of the environment variable with that server's key; none: no key")
    is_cap: float = opt(2.0, "a server's samples: largest importance weight of a token; 0: no correction")
    concurrency: int = opt(64, "requests in flight at the server, over all ranks", low=1)

    full: bool = opt(False, "train all weights and not an adapter; needs --dtype float32", "training")
    lr: float = opt(0.0, "learning rate after the warm-up; 0: 1e-5 for an adapter, 1e-6 for all weights", low=0)
    warmup_steps: int = opt(20, "steps in which the learning rate rises", low=0)
    weight_decay: float = opt(0.1, "of AdamW", low=0)
    max_grad_norm: float = opt(1.0, "the gradient is scaled down to this norm", above=0)
    lora_r: int = opt(32, "LoRA rank", low=1)
    lora_alpha: float = opt(64.0, "LoRA scale is alpha / r")
    updates: int = opt(
        1, "optimiser steps a step, each on its share of the problems; above 1 the clipping matters", low=1
    )
    clip_low: float = opt(0.2, "ratios below 1 - this are clipped", above=0, high=1)
    clip_high: float = opt(0.28, "ratios above 1 + this are clipped (clip-higher)", above=0)
    clip_dual: float = opt(10.0, "dual clip: with a negative advantage, ratios above this are clipped", above=1)
    kl: float = opt(0.0, "beta of a KL term to the model without its adapter; 0: none", low=0)
    agg: str = opt(
        "token",
        "mean over all tokens, or seq: mean over the tokens of each completion, then over those",
        choices=("token", "seq"),
    )
    micro_tokens: int = opt(16384, "tokens in one forward pass; changes memory and speed, not the result", low=1)
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass")
    samples_every: int = opt(10, "steps between samples kept to look at; 0: none", low=0)
    samples_problems: int = opt(2, "problems of such a step", low=1)
    save_every: int = opt(20, "steps between checkpoints", low=1)
    seed: int = opt(0, "seed of the order of the problems, of the adapters and of every sample")
    kernel: str = opt("", "log-probability op: torch or triton; none: triton where there is a GPU")

    experts: int = opt(0, "corrected metas collected before each behaviour cloning; 0: none", "experts, control", low=0)
    expert_updates: int = opt(5, "optimiser steps of a behaviour cloning", low=1)
    expert_notion: float = opt(0.2, "least notion reward of an expert", low=0, high=1)
    expert_lr: float = opt(0.0, "learning rate of a behaviour cloning; 0: that of the policy", low=0)
    expert_levels: bool = opt(False, "experts of every pass rate, 0 included, each rate with the same weight")
    control_from: int = opt(0, "step from which metas come first and control the rest; 0: never", low=0)
    gate_std: float = opt(0.1, "a problem is gated if its foreseen pass rates spread less than this; 0: no gate", low=0)
    gate_margin: float = opt(
        0.0625, "a problem is gated if, besides, their mean is less than this from 0 or from 1", low=0
    )
    refill_tries: int = opt(
        4, "most draws from the stream that replace gated problems in a step; 1: not replaced", low=1
    )
    gate_floor: float = opt(0.25, "share of the batch that is sampled even if the gate leaves less", low=0, high=1)
    gate_probe: float = opt(
        0.05, "share of the gated problems that are sampled, to see whether the gate is right", low=0, high=1
    )
    cutoff: float = opt(2.0, "solutions end after so many times the foreseen length; 0: no cutoff", low=0)
    hint: bool = opt(False, "give each solution the notions of one meta as a hint")

    reward: str = opt("", "FILE.py:FUNCTION that rewards solutions; none: the verifier does", "rewards")
    overlong_buffer: int = opt(0, "DAPO's penalty grows over so many tokens below --max-new; 0: none", low=0)
    lenient: bool = opt(False, "the released verifier's rules: percent, the last number, 1e-4")
    notion_rate: bool = opt(False, "compare how often right and wrong solutions hold a notion, not how many do")
    shuffle_statistics: bool = opt(False, "control: score metas against another problem's solutions")

    eval_every: int = opt(0, "steps between evaluations; 0: only before and after", "evaluation", low=0)
    eval_samples: int = opt(32, "n: solutions a held-out problem", low=1)
    eval_metas: int = opt(0, "metas a held-out problem", low=0)
    eval_temperature: float = opt(0.6, "of the evaluation's samples", low=0)
    eval_max_new: int = opt(16384, "longest completion in evaluation, tokens", low=1)


def check(s: Settings, command: str = "train") -> None:
    """Refuse settings that cannot be, for the command train or score. Raises InputError."""
    for name in ("model", "problems" if command == "train" else "eval_sets"):
        if not getattr(s, name):
            raise InputError(f"--{name.replace('_', '-')} is missing; python -m masa --help lists all settings")
    check_fields(s)
    rules = {
        "is_cap": s.is_cap == 0 or s.is_cap >= 1,
        "updates": s.updates <= s.batch,
        "overlong_buffer": s.overlong_buffer < s.max_new,
        "gate_margin": s.gate_margin < 0.5,
    }
    for name, good in rules.items():
        if not good:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(s, name)!r}, which cannot be; see --help")
    if s.full and s.dtype != "float32":
        raise InputError("--full updates of 1e-6 vanish in bfloat16; give --dtype float32")
    if s.full and (s.kl or s.adapter):
        raise InputError("--kl and --adapter need the model without its adapter as the reference; leave out --full")
    if s.full and s.base_url:
        raise InputError("--base-url samples from an adapter; leave out --full")
    if not s.metas and (s.experts or s.control_from):
        raise InputError("--experts and --control-from need metas; give --metas or leave them out")
    named = [part.partition("=") for part in s.eval_sets.split(",")] if s.eval_sets else []
    for name, sign, path in named:
        if not (name and sign and path):
            raise InputError(f"--eval-sets {name + sign + path!r} must look like name=path.jsonl")
        if sum(other == name for other, _, _ in named) > 1:
            raise InputError(f"--eval-sets names {name!r} twice; give each set a name of its own")
