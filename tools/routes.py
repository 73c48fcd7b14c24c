"""How much of the log-ratio comes from tokens that the adapter sends to other experts.

    python -m tools.routes MODEL ADAPTER RUN/train.jsonl          a trained adapter on its training rows
    python -m tools.routes --random                               random mixtures, adapters of several sizes

An adapter on attention moves what the routers read, so policy and reference may choose different experts for a token.
Four log-probabilities of each completion token: the reference, the policy with its own routes, the policy with the
reference's routes imposed, the reference with the policy's. With r = log pi / pi_ref under own routes and r' the same
with the reference's routes imposed, r - r' is what changed routing makes of the log-ratio. Shown are means over tokens
and over rows (sums over their tokens), and the share: mean |r - r'| over mean |r|.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import data
import lora
import moe
from common.endings import program
from common.errors import InputError
from common.model_config import MixtureConfig, ModelConfig
from kernels.segment_logprob import segment_logprob
from model import Qwen3, load
from tools.measure import Table, markdown

SHAPE = dict(vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True)
SHAPE |= dict(max_position_embeddings=512, eos_token_id=0, model_type="qwen3_moe")
MIXTURES = {"8 experts, 2 a token": (8, 2, 192), "64 experts, 8 a token": (64, 8, 48)}


def logps(model: Qwen3, batch: data.Batch) -> Tensor:
    """(C,) float64: log-probability of each completion token of packed rows, nats."""
    each = torch.arange(len(batch.targets) + 1)
    hidden = model(batch.ids, batch.cu_seqlens)[batch.predict]
    return segment_logprob(hidden, model.head, batch.targets, batch.w, each, "torch")[1].double()


@torch.no_grad()
def measured(model: Qwen3, batch: data.Batch) -> dict[str, Any]:
    """One row of the table for a model with an adapter. Raises InputError for a model without experts."""
    if not moe.blocks(model):
        raise InputError("the model has no experts; give a mixture")
    with moe.recorded(model) as own:
        policy = logps(model, batch)
    with lora.disabled(model), moe.recorded(model) as theirs:
        reference = logps(model, batch)
    with moe.imposed(model, theirs):
        held = logps(model, batch)
    with moe.imposed(model, own), lora.disabled(model):
        moved = logps(model, batch)
    changed = torch.stack([moe.changed(p, q) for p, q in zip(own, theirs, strict=True)])  # (L, N)
    r, routing = policy - reference, policy - held
    rows = batch.cu_targets.diff().tolist()
    r_rows, routing_rows = (torch.stack([part.sum() for part in x.split(rows)]) for x in (r, routing))
    k = own[0].shape[1]
    return {
        "tokens": len(r),
        "tokens changed": float((changed > 0).any(0).double().mean()),
        "choices changed": float(changed.double().mean() / k),
        "|r| a token": float(r.abs().mean()),
        "|r - r'| a token": float(routing.abs().mean()),
        "share": float(routing.abs().mean() / r.abs().mean()),
        "|r| a row": float(r_rows.abs().mean()),
        "share of rows": float(routing_rows.abs().mean() / r_rows.abs().mean()),
        "mean r - r' a token": float(routing.mean()),
        "reference moved": float((moved - reference).abs().mean()),
    }


def random_mixture(experts: int, k: int, inner: int, spread: float) -> Qwen3:
    """A random model of a miniature's size whose logits and routers are not flat."""
    torch.manual_seed(0)
    net = Qwen3(ModelConfig(**SHAPE, moe=MixtureConfig(experts, k, inner, True))).requires_grad_(False)
    for p in net.parameters():
        p.mul_(spread if p.ndim > 1 else 1.0)
    return net


def random_table(seed: int = 0) -> Table:
    """Random mixtures with adapters of random B; the size is the deviation of B's entries."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 512, (8, 200), generator=generator).tolist()
    batch = data.pack([(row[:40], row[40:], torch.ones(160)) for row in ids])
    rows: Table = []
    for name, sizes in MIXTURES.items():
        for size in (0.0, 1e-3, 1e-2, 1e-1):
            net = random_mixture(*sizes, spread=4.0)
            for p in lora.add(net, 8, 16.0, seed=seed)[1::2]:
                p.data += size * torch.randn(p.shape, generator=generator)
            found = measured(net, batch)
            if not size:  # before training: nothing may have moved
                found = {key: value for key, value in found.items() if value == value}
            rows.append({"mixture": name, "B": size} | found)
    return rows


def trained_table(model: Path, adapter: Path, train: Path, rows: int) -> Table:
    """The first chosen and rejected training rows, apart, in fp32."""
    found: Table = []
    net = load(model).requires_grad_(False)
    lora.load(net, adapter)
    for label in (True, False):
        picked = [r for r in data.load_train(train) if r["label"] is label][:rows]
        if not picked:  # rows of one class
            continue
        packed = [(r["prompt_ids"], r["completion_ids"], torch.ones(len(r["completion_ids"]))) for r in picked]
        kind = "chosen" if label else "rejected"
        found.append({"rows": f"{len(picked)} {kind}"} | measured(net, data.pack(packed)))
    return found


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="MODEL ADAPTER TRAIN.jsonl")
    parser.add_argument("--random", action="store_true", help="random mixtures instead")
    parser.add_argument("--rows", type=int, default=32, help="training rows of each class [32]")
    given = parser.parse_args(argv)
    if given.random == bool(given.paths) or len(given.paths) not in (0, 3):
        raise InputError("give MODEL ADAPTER TRAIN.jsonl, or --random")
    if given.rows < 1:
        raise InputError(f"--rows is {given.rows}, must be at least 1")
    print(markdown(random_table() if given.random else trained_table(*given.paths, given.rows)))


if __name__ == "__main__":
    sys.exit(main())
