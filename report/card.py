"""What travels with an adapter: the model card beside it and the commands that serve it."""

import json
import shlex
from pathlib import Path
from typing import Any

import lora
from common.files import atomic_write
from common.hub import Source

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values its --max-lora-rank takes; the default is 16
LICENCES = {
    "nq_open": "CC BY-SA 3.0",
    "sciq": "CC BY-NC 3.0 (no commercial use)",
    "simpleqa": "MIT",
    "truthfulqa": "Apache-2.0",
    "longfact": "CC BY 4.0",
    "mini": "see mini/LICENSES-data.md",
}


def vllm_rank(r: int) -> int:
    """The --max-lora-rank with which vLLM takes an adapter of rank r."""
    return next((n for n in VLLM_RANKS if n >= r), r)


def serve_commands(base: Source, adapter: Path, r: int) -> str:
    """The exact commands that serve the adapter (of rank r) with vLLM and SGLang, and those that check it. Lines."""
    name, path = adapter.resolve().name, str(adapter.resolve())
    model = base.name if base.commit else str(base.folder.resolve())
    at = ["--revision", base.commit] if base.commit else []
    modules = f"{name}={path}"
    vllm = [
        "vllm",
        "serve",
        model,
        *at,
        "--enable-lora",
        "--max-lora-rank",
        str(vllm_rank(r)),
        "--lora-modules",
        modules,
    ]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", model, *at, "--enable-lora"]
    sglang += ["--max-lora-rank", str(r), "--lora-paths", modules]
    check = ["python", "-m", "tools.export", "serve-check", path]
    lines = ["serve with vLLM:", vllm, [*check, f"{name}@http://127.0.0.1:8000/v1"]]
    lines += ["serve with SGLang:", sglang, [*check, f"{model}:{name}@http://127.0.0.1:30000/v1"]]
    return "\n".join(line if isinstance(line, str) else "  " + shlex.join(line) for line in lines)


def write_card(
    folder: Path,
    base: Source,
    method: str,
    settings: dict[str, Any],
    rows: dict[str, Any],
    metrics: dict[str, Any],
    scores: dict[str, str],
) -> None:
    """README.md of an adapter folder.

    rows: {"sha256", "chosen", "rejected", "datasets": {name: rows}}. metrics: of the last step, as in
    metrics.jsonl. scores: set -> Markdown table, {} before the evaluation.
    """
    front = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "kto", "mr-align", method]}
    if base.commit:
        front["base_model"] = base.name  # the Hub accepts ids only
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in front.items()), "---", ""]
    lines += [
        f"# {method} adapter for {base.name}",
        "",
        f"A LoRA adapter trained with the method `{method}` of MR-ALIGN",
    ]
    lines += [
        "(arXiv 2510.24794): KTO whose thinking steps are weighted by how they follow each other in good thoughts.",
        "",
    ]
    lines += _origin(base, rows)
    lines += [
        "## Last training step",
        "",
        *_table(["metric", "value"], [[k, _cell(v)] for k, v in metrics.items()]),
        "",
    ]
    for name, table in scores.items():
        lines += [f"## On {name}", "", table, ""]
    if not scores:
        lines += ["## Evaluation", "", "Not evaluated yet.", ""]
    lines += ["## Settings", "", *_table(["setting", "value"], [[k, f"`{v}`"] for k, v in settings.items()]), ""]
    r = lora.read_config(folder / lora.CONFIG)["r"]
    lines += ["## Serve", "", "```", serve_commands(base, folder, r), "```"]
    with atomic_write(folder / "README.md") as f:
        f.write("\n".join(lines) + "\n")


def _origin(base: Source, rows: dict[str, Any]) -> list[str]:
    """What the adapter was made from, and under which licences that stands."""
    name = f"{base.name} at commit {base.commit}" if base.commit else f"{base.name} (a local folder)"
    lines = ["## Trained on", "", f"- base model: {name}"]
    lines += [f"- rows: {rows['chosen']} chosen, {rows['rejected']} rejected; SHA-256 of the file `{rows['sha256']}`"]
    for dataset, count in sorted(rows["datasets"].items()):
        licence = LICENCES.get(dataset, "not known here: see where the questions came from")
        lines.append(f"- rows by data set: {dataset}, {count}; licence: {licence}")
    return [*lines, "- the licence of the base model holds for the adapter and for what it is merged into", ""]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
