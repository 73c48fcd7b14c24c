"""Whether one GPU holds the model where this program samples; where it does not, what to type instead.

Training can spread a model over GPUs (`--shard`), sampling, evaluation and report hold it whole on each. A model that
is too large is refused before anything is fetched or joined. A server that shards it (vLLM) then does the sampling, and
the report asks that server for the few log-probabilities it shows.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

import sample
from common import hub
from common.errors import InputError
from common.model_config import ModelConfig
from pipeline import plan
from pipeline.config import RunConfig
from report.card import vllm_rank

SHARE = 0.85  # of a card for the weights and one row; vLLM takes 0.9 of it by default, what is left is for more rows


def stages_that_hold(cfg: RunConfig, wanted: Sequence[str]) -> list[str]:
    """Of the wanted stages (none: all) those in which this program holds the whole model on one GPU."""
    if cfg.backend == "openai":
        return []
    holding = ["sample", *["annotate"] * (cfg.annotator == "self"), "eval"]
    holding += ["labels"] * (cfg.annotator == "self" and cfg.label_eval > 0) + ["report"]
    return [name for name in holding if not wanted or name in wanted]


def need(cfg: RunConfig, config: ModelConfig) -> int:
    """Bytes of a GPU that holds the model and one completion of the longest kind."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    return sample.memory(config, dtype, 1, max(cfg.draw_max_new, cfg.max_new))


def gpu_bytes() -> int | None:
    """Memory of this process's GPU; None where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def holds(cfg: RunConfig, config: ModelConfig) -> bool:
    """Whether this process's GPU, if there is one, holds the model while it samples."""
    total = gpu_bytes()
    return total is None or need(cfg, config) <= total


def cards(bytes_needed: int, total: int) -> int:
    """Over how many cards of `total` bytes a server spreads so much: a power of two, which divides the heads.

    >>> cards(61, 80), cards(66, 40), cards(470, 80)
    (1, 2, 8)
    """
    n = 1
    while bytes_needed > SHARE * total * n:
        n *= 2
    return n


def server_lines(cfg: RunConfig, argv: Sequence[str], n: int) -> list[list[str]]:
    """The two command lines that sample with vLLM on n cards; argv: what was typed after mralign.py."""
    adapters = [f"{method}={Path(cfg.out) / method}" for method in cfg.methods]
    serve = ["vllm", "serve", cfg.model, "--tensor-parallel-size", str(n)]
    serve += ["--enable-lora", "--max-lora-rank", str(vllm_rank(cfg.lora_r)), "--lora-modules", *adapters]
    trained = all((Path(cfg.out) / method / "adapter_config.json").exists() for method in cfg.methods)
    again = ["python", "mralign.py", *argv, "--backend", "openai", "--base-url", "http://127.0.0.1:8000/v1"]
    return [serve if trained else serve[:5], again]


def check(cfg: RunConfig, wanted: Sequence[str], argv: Sequence[str], source: hub.Source | None = None) -> None:
    """Raise InputError where a wanted stage cannot hold the model on this process's GPU, with the lines to type.

    Without a source, before the weights are fetched, config.json alone is, where the shape is not known here.
    """
    total, holding = gpu_bytes(), stages_that_hold(cfg, wanted)
    if total is None or not holding:
        return
    if source is None and not plan.knows(cfg.model):
        path = hub.config_of(cfg.model, cfg.revision)
        if path is None:
            return
        config = ModelConfig.from_json(path)
    else:
        config, _ = plan.shape_of(str(source.folder) if source else cfg.model)
    if (wants := need(cfg, config)) <= total:
        return
    serve, again = (shlex.join(line) for line in server_lines(cfg, argv, cards(wants, total)))
    row = f"one row of {max(cfg.draw_max_new, cfg.max_new):,} tokens"
    raise InputError(
        f"{', '.join(holding)}: {cfg.model} and {row} need {wants / 2**30:.1f} GiB, the GPU has {total / 2**30:.1f}; "
        f"let a server sample: `{serve}`, then `{again}`; training shards with --shard train"
    )
