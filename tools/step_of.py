"""One optimiser step of the code in a folder, each time a line comes in: what `tools.bench before` puts side by side.

    python tools/step_of.py FOLDER '{"hidden": 256, "layers": 4, "V": 32768, "shortest": 75, "longest": 200, "rows": 8}'

Not `-m`: FOLDER, an earlier commit's files, comes before this project's own on the path. Prints CPU seconds and loss.
"""

import importlib
import json
import sys
import time
from typing import Any, TextIO


def main(folder: str, size: dict[str, Any], lines: TextIO) -> None:
    """size: of `tools.bench.StepSize`, and "settings", those of train.TrainSettings that both commits know."""
    sys.path[0] = folder
    try:
        bench = importlib.import_module("tools.bench")
    except ModuleNotFoundError:  # before the commands had a folder
        bench = importlib.import_module("bench")
    import torch

    ranks = sys.modules[importlib.import_module("train").Ranks.__module__]

    settings = size.pop("settings", {})
    with ranks.process_group() as group:
        rows = bench.random_rows(size["rows"], size["shortest"], size["longest"], size["V"])
        model = bench.random_model(size["hidden"], size["layers"], size["V"], torch.device("cpu"))
        stepper = bench.our_stepper(model, rows, group, **settings)
        print(json.dumps({"ready": True}), flush=True)
        for _ in lines:
            start = time.process_time()
            stepper.step()
            # Of this process alone: what else runs on the machine hardly counts.
            print(json.dumps({"seconds": time.process_time() - start, "loss": stepper.losses[-1]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.stdin)
