"""The model card beside every adapter, from the files of the run."""

import dataclasses
from collections import Counter
from typing import Any

import eval as evaluation
from common.files import read_jsonl, sha256_file
from pipeline.run import Run
from report import card


def write_card(run: Run, method: str, scores: dict[str, Any]) -> None:
    """METHOD/README.md. scores: eval/scores.json, {} before there is one."""
    path, folder = run.out / "train.jsonl", run.out / method
    trained = read_jsonl(path, ("label",))
    labels = Counter(row["label"] for row in trained)
    datasets = Counter(str(row.get("dataset", "unnamed")) for row in trained)
    rows = {"sha256": sha256_file(path), "chosen": labels[True], "rejected": labels[False], "datasets": datasets}
    printed = {name: evaluation.table(of["metrics"]) for name, of in scores.items()}
    last = read_jsonl(folder / "metrics.jsonl")[-1]
    card.write_card(folder, run.source, method, set_values(run), rows, last, printed)


def set_values(run: Run) -> dict[str, Any]:
    """The settings that are not empty."""
    return {name: value for name, value in dataclasses.asdict(run.cfg).items() if value != ""}
