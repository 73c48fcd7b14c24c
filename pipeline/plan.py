"""The dry run: what a training run will take, from a config.json and, where there is one, a train.jsonl.

No weights are read and no GPU is asked. Rows, steps and tokens are counted; weights, adapters, optimiser state and
activations follow from the shapes (common/costs.py); time from the number of operations and an assumed share of the
GPU's peak. Counts are exact, activations within some 10 %, time is a prediction that no measurement stands behind. Left
out: the memory of sampling, the allocator's slack, other formats than bf16 and fp32.
"""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import data
import train
from common import costs, passes
from common.errors import InputError
from common.files import ROOT
from common.model_config import ModelConfig
from common.table import markdown
from common.tokens import load_tokenizer, token_offsets
from em import LABELS
from report import analysis

SHAPES = ROOT / "configs" / "shapes"  # config.json of public models, for a dry run offline
RATIO = (1.0, 1.5)  # lambda_c n_c over lambda_r n_r, section 4.3
PAPER: dict[str, Any] = {
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


def knows(model: str) -> Path | None:
    """The file that has the shape of `model`: its folder's config.json, or one of configs/shapes; None for neither."""
    files = (Path(model) / "config.json", SHAPES / f"{model.rsplit('/', 1)[-1]}.json")
    return next((path for path in files if path.is_file()), None)


def shape_of(model: str) -> tuple[ModelConfig, Path]:
    """The shape of `model`, a folder with a config.json or a model configs/shapes knows, and the file it is from."""
    if path := knows(model):
        return ModelConfig.from_json(path), path
    known = ", ".join(sorted(p.stem for p in SHAPES.glob("*.json")))
    raise InputError(f"--model {model!r}: no folder with a config.json, and none of {known}; put a config.json in one")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Training rows, there or to come: their lengths, where these are from, and what train.jsonl holds already."""

    lengths: Lengths
    source: str
    there: list[dict[str, Any]]


def assumed_lengths(chosen: int = PAPER["chosen"], rejected: int = PAPER["rows"] - PAPER["chosen"]) -> Lengths:
    """So many rows, by default the paper's, with thoughts spread evenly over its length filter."""
    low, high = PAPER["thought"]
    n = chosen + rejected
    completion = [low + (high - low) * i // max(1, n - 1) + PAPER["answer"] for i in range(n)]
    sides = [i * chosen // n != (i + 1) * chosen // n for i in range(n)]
    return Lengths([PAPER["prompt"]] * n, completion, sides)


def level_and_tokens(
    config: ModelConfig, s: train.TrainSettings, size: int, gpu: str, world: int, lengths: Lengths
) -> tuple[str, int]:
    """What is recomputed on such a GPU and how many tokens a pass holds, as training plans them before it measures."""
    return passes.planned(s, config, lengths.total, size, costs.ROOM * costs.GPUS[gpu].memory * 1e9, world)


def memory(
    config: ModelConfig, s: train.TrainSettings, size: int, gpu: str, world: int, lengths: Lengths
) -> dict[str, dict[str, float]]:
    """For each level of recomputation the tokens of a pass, and bytes at the fullest moment by part."""
    table = {}
    for level in costs.RECOMPUTE:
        _, tokens = level_and_tokens(
            config, dataclasses.replace(s, recompute=level, compile=False), size, gpu, world, lengths
        )
        no_grad = passes.Limit(tokens=tokens).without_gradient().tokens
        shards = world if s.shard else 1
        parts = costs.memory(config, s.lora_r, size, tokens, tokens, level, True, no_grad, shards)
        table[level] = {"tokens": tokens} | parts
    return table


def step_flops(
    config: ModelConfig, s: train.TrainSettings, rows: int, lengths: Lengths, level: str, size: int
) -> float:
    """Operations of one optimiser step of `rows` mean rows. level: of recomputation, which is counted too.

    size: bytes of a weight.
    """
    of = list(zip(lengths.total, lengths.completion, strict=True))
    policy = sum(costs.step_flops(config, s.lora_r, of, [], level, size).values())
    return rows / len(of) * (policy + s.kl_rows * sum(costs.forward_flops(config, s.lora_r, of).values()))


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
        inside = "inside (to two digits)" if RATIO[0] <= round(ratio, 2) <= RATIO[1] else "OUTSIDE"
        bound = f"[{RATIO[0]}, {RATIO[1]}]"
        lines.append(f"balance    lambda_c n_c / (lambda_r n_r) = {ratio:.3f}, {inside} the paper's {bound}")
    return lines


def memory_table(table: dict[str, dict[str, float]], gpu: str, gpus: int) -> str:
    """Memory by part at each level of recomputation, beside what the GPU has."""
    what = f"each of {gpus} {gpu}, GB, recomputed:"
    parts = [name for name in table["none"] if name != "tokens"]
    sums = {level: sum(of[part] for part in parts) / 1e9 for level, of in table.items()}
    memory = costs.GPUS[gpu].memory
    rows = [{what: "tokens of one pass"} | {level: f"{of['tokens']:,}" for level, of in table.items()}]
    rows += [{what: part} | {level: f"{of[part] / 1e9:.2f}" for level, of in table.items()} for part in parts]
    rows += [{what: "sum"} | {level: f"{x:.2f}" for level, x in sums.items()}]
    fits = {level: "fits" if x <= costs.ROOM * memory else "too much" for level, x in sums.items()}
    return markdown([*rows, {what: f"of {memory} GB, {1 - costs.ROOM:.0%} left free"} | fits])


def host_line(n: dict[str, int], size: int, gpus: int) -> str:
    """What --shard takes of the host: a process reads all weights before it keeps its part of them on its GPU."""
    whole = size * (n["layers"] + n["rest"]) / 1e9
    return (
        f"host       each of {gpus} processes first reads the whole model: {gpus} x {whole:.1f} = {gpus * whole:.0f} GB"
    )


def report_text(model: str, given: Rows, method: str, dtype: str, s: train.TrainSettings, gpu: str, gpus: int) -> str:
    """The training part of the dry run as text: rows, steps, memory, time."""
    config, path = shape_of(model)
    size = {"float32": 4, "bfloat16": 2}[dtype]
    rows, lengths = given.there, given.lengths
    n = costs.parameters(config, s.lora_r)
    lines = [
        f"model      {model}: {n['layers'] + n['rest']:,} parameters, {n['adapters']:,} trained, from {path}",
        *expert_lines(config, n),
        f"data       {given.source}",
    ]
    if not lengths.chosen:
        return "\n".join([*lines, "rows       0: nothing to train on"])
    level, _ = level_and_tokens(config, s, size, gpu, gpus, lengths)
    flops = step_flops(config, s, s.batch_size, lengths, level, size)
    card = costs.GPUS[gpu]
    seconds = flops / (gpus * card.tflops * 1e12 * costs.UTILISATION)
    steps = len(train.step_rows(len(lengths.chosen), s.batch_size, s.epochs, s.seed))
    lines += [
        *data_lines(lengths, s, method),
        "",
        memory_table(memory(config, s, size, gpu, gpus, lengths), gpu, gpus),
        f"recomputed is: {level}",
        *([host_line(n, size, gpus)] if s.shard else []),
        "",
        f"time, predicted, not measured: {flops / 1e15:.2f} PFLOP a step / ({gpus} x {card.tflops} TFLOP/s x "
        f"{costs.UTILISATION:.0%} assumed) = {seconds:.1f} s",
        f"  {steps:,} steps of {method} take about {steps * seconds / 3600:.1f} h of training",
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
