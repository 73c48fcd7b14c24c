"""The dry run: what a training run will take, from a config.json and, where there is one, a train.jsonl.

No weights are read and no GPU is asked. Rows, steps and tokens are counted; weights, adapters and optimiser state
follow from the shapes; activations from a list of what each layer keeps for its backward pass; time from the number of
multiplications and an assumed share of the GPU's peak. Counts are exact, activations within some 10 %, time is a
prediction that no measurement stands behind. Left out: the memory of sampling, the allocator's slack, other formats
than bf16 and fp32.
"""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
import lora
import model as qwen
import moe
import train
from common.errors import InputError
from common.files import ROOT
from common.model_config import ModelConfig
from common.tokens import load_tokenizer, token_offsets
from em import LABELS
from kernels.segment_logprob import CUDA_CHUNK_BYTES
from report import analysis

SHAPES = ROOT / "configs" / "shapes"  # config.json of public models, for a dry run offline
GPUS = {  # name -> (peak of dense bf16 products in TFLOP/s, memory in GB), from the vendors' data sheets
    "h100": (989, 80),
    "h200": (989, 141),
    "a100-80": (312, 80),
    "a100-40": (312, 40),
    "a800-80": (312, 80),
    "a800-40": (312, 40),
    "l40s": (362, 48),
    "rtx4090": (165, 24),
}
UTILISATION = 0.35  # assumed share of the peak
RATIO = (1.0, 1.5)  # lambda_c n_c over lambda_r n_r, section 4.3
PAPER = {
    "rows": 6973,
    "chosen": 4830,
    "thought": (450, 1000),
    "prompt": 120,
    "answer": 60,
}  # Table 1; the last two ours


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of every training row and its class."""

    prompt: list[int]
    completion: list[int]
    chosen: list[bool]

    @property
    def total(self) -> list[int]:
        return [p + c for p, c in zip(self.prompt, self.completion, strict=True)]


def shape_of(model: str) -> tuple[ModelConfig, Path]:
    """The shape of `model`, a folder with a config.json or a model configs/shapes knows, and the file it is from."""
    for path in (Path(model) / "config.json", SHAPES / f"{model.rsplit('/', 1)[-1]}.json"):
        if path.is_file():
            return ModelConfig.from_json(path), path
    known = ", ".join(sorted(p.stem for p in SHAPES.glob("*.json")))
    raise InputError(f"--model {model!r}: no folder with a config.json, and none of {known}; put a config.json in one")


def assumed_lengths() -> Lengths:
    """The paper's rows: its counts, thoughts spread evenly over its length filter."""
    low, high = PAPER["thought"]
    n = PAPER["rows"]
    completion = [low + (high - low) * i // (n - 1) + PAPER["answer"] for i in range(n)]
    chosen = [i * PAPER["chosen"] // n != (i + 1) * PAPER["chosen"] // n for i in range(n)]
    return Lengths([PAPER["prompt"]] * n, completion, chosen)


def counts(config: ModelConfig, r: int) -> dict[str, int]:
    """Parameters: "layers", "rest" (embedding, head, final norm) and "adapters" of rank r; built without memory.

    "experts" of the layers' are experts', and "idle" of these a token does not meet.
    """
    with torch.device("meta"):
        model = qwen.Qwen3(config)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    targets = lora.targets_of(config)
    linears = [
        m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.rpartition(".")[2] in targets
    ]
    adapters = sum(r * (m.in_features + m.out_features) for m in linears)
    found = {"layers": layers, "rest": sum(p.numel() for p in model.parameters()) - layers, "adapters": adapters}
    experts = sum(p.numel() for block in moe.blocks(model) for p in block.experts.parameters())
    idle = experts - experts * config.moe.num_experts_per_tok // config.moe.num_experts if config.moe else 0
    return found | {"experts": experts, "idle": idle}


def kept_per_token(config: ModelConfig, r: int, size: int, experts: bool = False) -> int:
    """Bytes one token leaves in one layer, of one MLP or of experts, for the backward pass. size: of a base weight.

    Frozen weights keep no inputs; adapters keep one for all layers that read it. Counted is the torch text: the fused
    kernels of a GPU keep no fp32 copy of a norm's input and no silu(gate), so in bf16 they keep less.
    """
    E, inner = config.hidden_size, config.intermediate_size
    Q, KV = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    norms = 2 * 4 * E + (4 * (Q + KV) if size == 2 else 0)
    attention = size * (Q + 2 * KV) + size * (Q + KV) + size * Q  # before and after RoPE, result
    if config.moe and experts:
        n, k, inner = config.moe.num_experts, config.moe.num_experts_per_tok, config.moe.moe_intermediate_size
        routes = 4 * n + 40 * k  # probabilities in fp32; what is chosen, its weight, its place among the sorted rows
        inputs = size * (E + Q + 4 * r)  # q k v; o; A's outputs
        return norms + inputs + attention + routes + size * 4 * k * inner  # gate, silu(gate), up, times its weight
    inputs = size * (2 * E + inner + Q + 7 * r)  # q k v and gate up; down; o; A's outputs
    if config.moe:
        inputs = size * (E + Q + 4 * r)  # its MLP has no adapters
    return norms + inputs + attention + size * 3 * inner  # gate, silu(gate), up


def memory(
    config: ModelConfig, s: train.TrainSettings, size: int, world: int, lengths: Lengths
) -> dict[str, dict[str, float]]:
    """Bytes on one GPU at the fullest moment, by part, "plain" and with gradient "checkpointing"."""
    n, E, inner = counts(config, s.lora_r), config.hidden_size, config.intermediate_size
    longest = sorted(lengths.total, reverse=True)
    tokens = sum(longest[: s.micro_batch])
    no_grad = sum(longest[: s.micro_batch * train.NO_GRAD_PACK])
    L = config.num_hidden_layers
    with_experts = [config.moe is not None and config.moe.at(layer) for layer in range(L)]
    kept = [kept_per_token(config, s.lora_r, size, experts) for experts in with_experts]
    predicted = sum(sorted(lengths.completion, reverse=True)[: s.micro_batch])
    fixed = {
        "frozen weights": size * (n["layers"] / (world if s.shard else 1) + n["rest"]),
        "gathered layers": size * 2 * n["layers"] / L if s.shard and world > 1 else 0,
        "adapters": 4 * n["adapters"],
        "gradients and their sum": 8 * n["adapters"],
        "AdamW's moments": 8 * n["adapters"],
    }
    products = 5 * inner  # of an MLP
    if config.moe:  # of the experts: their input, gate and up, silu(gate), the product, the output
        k, inner = config.moe.num_experts_per_tok, config.moe.moe_intermediate_size
        products = k * (2 * E + 4 * inner)
    working = max(no_grad, tokens) * size * products
    head = min(CUDA_CHUNK_BYTES, 6 * predicted * config.vocab_size) + 2 * size * predicted * E
    moving = {"working set of one layer": working, "head chunk and its gradient": head}
    return {
        "plain": fixed | {"activations": sum(kept) * tokens} | moving,
        "checkpointing": fixed | {"activations": (size * E * L + max(kept)) * tokens} | moving,
    }


def step_flops(config: ModelConfig, s: train.TrainSettings, rows: int, lengths: Lengths) -> float:
    """Multiplications and additions of one optimiser step of `rows` mean rows: see the table in train.py."""
    n = counts(config, s.lora_r)
    T = sum(lengths.total) / len(lengths.total)
    C = sum(lengths.completion) / len(lengths.completion)
    attention = 2 * T * T * config.num_attention_heads * config.head_dim * config.num_hidden_layers  # causal: half of 4
    forward = 2 * T * (n["layers"] - n["idle"] + n["adapters"]) + attention
    head = 2 * C * config.vocab_size * config.hidden_size
    passes = 1 + s.kl_rows + 1 + s.gradient_checkpointing  # y, y', backward, recomputation
    return rows * (passes * forward + (2 + s.kl_rows) * head)  # the head's gradient is made in its forward pass


def bars(counted: dict[str, int]) -> list[str]:
    """A histogram as lines of text, for `counted` with at least one entry."""
    most, width = max(1, *counted.values()), max(map(len, counted))
    return [f"  {name:<{width}} {count:>8,} {'#' * round(40 * count / most)}" for name, count in counted.items()]


def weight_bins(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Steps by weight, in bins that are equal in log w between 1/e and e."""
    edges = [math.exp(-1 + k / 4) for k in range(9)]
    found = Counter(min(7, max(0, int((math.log(w) + 1) * 4))) for r in rows for w in r["w"])
    return {f"w {edges[k]:.2f} to {edges[k + 1]:.2f}": found[k] for k in range(8)}


def example(row: dict[str, Any], folder: Path) -> list[str]:
    """One row token group by token group: outside the loss, or with its weight. Needs the folder's tokenizer.json."""
    tokenizer = load_tokenizer(folder)
    w = data.to_rows([row], tokenizer)[0].w.tolist()
    text, offsets = token_offsets(tokenizer, row["completion_ids"])
    lines, start = [f"  {'not in the loss':>15}  {row['prompt']!r}"], 0
    for k in range(1, len(w) + 1):
        if k == len(w) or w[k] != w[start]:
            lines.append(f"  {f'weight {w[start]:.3f}':>15}  {text[offsets[start][0] : offsets[k - 1][1]]!r}")
            start = k
    return lines


def expert_lines(config: ModelConfig, n: dict[str, int]) -> list[str]:
    """Experts, total and active; none of a model with one MLP a layer."""
    if config.moe is None:
        return []
    experts, k = config.moe.num_experts, config.moe.num_experts_per_tok
    layers = sum(map(config.moe.at, range(config.num_hidden_layers)))
    active = n["layers"] + n["rest"] - n["idle"]
    return [
        f"experts    {experts} in each of {layers} layers, a token meets {k}: {active:,} parameters a token, of the "
        f"experts' {n['experts']:,} it meets {n['experts'] - n['idle']:,}; frozen, as the router is"
    ]


def data_lines(lengths: Lengths, s: train.TrainSettings, method: str) -> list[str]:
    """Rows, steps, tokens and the balance of the classes."""
    n, positive, total = len(lengths.chosen), sum(lengths.chosen), lengths.total
    steps = len(train.step_rows(n, s.batch_size, s.epochs, s.seed))
    lines = [
        f"rows       {n:,}: {positive:,} chosen, {n - positive:,} rejected",
        f"steps      {steps:,}: {s.epochs} epochs of {s.batch_size} rows a step ({method})",
        f"tokens     {sum(total):,} an epoch, {sum(lengths.completion):,} of them in the loss; "
        f"rows of {min(total):,} to {max(total):,}",
    ]
    if 0 < positive < n:
        ratio = s.lambda_c * positive / (s.lambda_r * (n - positive))
        inside = "inside" if RATIO[0] <= round(ratio, 2) <= RATIO[1] else "OUTSIDE"
        bound = f"[{RATIO[0]}, {RATIO[1]}]"
        lines.append(f"balance    lambda_c n_c / (lambda_r n_r) = {ratio:.3f}, {inside} the paper's {bound}")
    return lines


def memory_lines(table: dict[str, dict[str, float]], gpu: str, gpus: int) -> list[str]:
    """Memory by part, with and without checkpointing, beside what the GPU has."""
    lines = [f"memory of each of {gpus} {gpu}, GB{'plain':>24}{'checkpointing':>15}"]
    for part in table["plain"]:
        lines.append(f"  {part:<32}" + "".join(f"{table[way][part] / 1e9:>15.2f}" for way in table))
    sums = [sum(parts.values()) / 1e9 for parts in table.values()]
    lines.append(f"  {'sum':<32}" + "".join(f"{x:>15.2f}" for x in sums))
    room = 0.92 * GPUS[gpu][1]  # the rest is the context, the allocator's gaps and NCCL's buffers
    fits = "".join(f"{'fits' if x <= room else 'too much':>15}" for x in sums)
    return [*lines, f"  {f'of {GPUS[gpu][1]} GB, 8 % left free':<32}{fits}"]


def report_text(model: str, out: Path, method: str, dtype: str, s: train.TrainSettings, gpu: str, gpus: int) -> str:
    """The whole dry run as text. out: the run's folder, whose train.jsonl is read if it is there."""
    config, path = shape_of(model)
    size = {"float32": 4, "bfloat16": 2}[dtype]
    rows = data.load_train(out / "train.jsonl") if (out / "train.jsonl").exists() else []
    lengths = assumed_lengths()
    source = f"no {out}/train.jsonl yet: the paper's counts, thoughts of 450 to 1,000 tokens are assumed"
    if rows:
        source = str(out / "train.jsonl")
        lengths = Lengths(
            *([len(r[k]) for r in rows] for k in ("prompt_ids", "completion_ids")), [r["label"] for r in rows]
        )
    n = counts(config, s.lora_r)
    flops = step_flops(config, s, s.batch_size, lengths)
    seconds = flops / (gpus * GPUS[gpu][0] * 1e12 * UTILISATION)
    steps = len(train.step_rows(len(lengths.chosen), s.batch_size, s.epochs, s.seed))
    lines = [
        f"model      {model}: {n['layers'] + n['rest']:,} parameters, {n['adapters']:,} trained, from {path}",
        *expert_lines(config, n),
        f"data       {source}",
        *data_lines(lengths, s, method),
        "",
        *memory_lines(memory(config, s, size, gpus, lengths), gpu, gpus),
        "",
        f"time, predicted, not measured: {flops / 1e15:.2f} PFLOP a step / ({gpus} x {GPUS[gpu][0]} TFLOP/s x "
        f"{UTILISATION:.0%} assumed) = {seconds:.1f} s",
        f"  {steps:,} steps take about {steps * seconds / 3600:.1f} h, before sampling, labels and evaluation",
    ]
    if rows:
        labels = Counter(label for r in rows for step in r["labels"] for label in step)
        lines += ["", "labels", *bars({label: labels[label] for label in LABELS})]
        lines += ["", "weights of steps", *bars(weight_bins(rows))]
        if (path.parent / "tokenizer.json").exists():
            audits = analysis.weight_audit(rows, load_tokenizer(path.parent))
            lines += [f"  {', '.join(f'{k} {v}' for k, v in audit.items())}" for audit in audits]
            lines += ["", f"row {rows[0]['id']}", *example(rows[0], path.parent)]
    return "\n".join(lines)
