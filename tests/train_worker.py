"""Trains a tiny random model, for test_train.py: under torchrun on any number of ranks, or interrupted.

usage: train_worker.py OUT METHOD ROWS.json SETTINGS.json MODEL_DIR [--resume] [--die STEP]
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from ranks import process_group  # noqa: E402


def main() -> None:
    out, method, rows, settings, base = sys.argv[1:6]
    resume = "--resume" in sys.argv
    if "--die" in sys.argv:
        fatal, step = int(sys.argv[sys.argv.index("--die") + 1]), train.Trainer.step

        def dying_step(self, number, *args):
            if number == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, number, *args)

        train.Trainer.step = dying_step
    loaded = [
        data.Row(r["id"], r["chosen"], r["prompt_ids"], r["completion_ids"], torch.tensor(r["w"]))
        for r in json.loads(Path(rows).read_text())
    ]
    torch.set_num_threads(1)
    with process_group(timeout_minutes=10) as ranks:
        train.train(
            model.load(base).requires_grad_(False),
            loaded,
            method,
            train.TrainSettings(**json.loads(Path(settings).read_text())),
            ranks,
            Path(out),
            "torch",
            "tiny",
            {"rows": "r", "model": "m"},
            resume,
        )


if __name__ == "__main__":
    main()
