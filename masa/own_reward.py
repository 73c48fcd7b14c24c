"""A reward function of one's own in place of the verifier: `--reward FILE.py:NAME`, a file on this machine.

    def brevity(problem: str, answer: str, completion: str) -> float:
        return 1.0 if answer in completion and len(completion) < 500 else 0.0

It is called once a solution and returns a number or a bool. The number is the solution's reward. For the metas, a
solution of 0.5 or more counts as right. The file's code runs with all your rights, so name only files you trust; its
checksum is part of the run's identity, and a changed one is not resumed. Imports no torch.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from common.errors import InputError

Reward = Callable[[str, str, str], float]
RIGHT = 0.5  # a solution with this reward or more is right


def load(where: str) -> Reward:
    """The function NAME of FILE.py, its results checked. Raises InputError where there is none."""
    path, _, name = where.rpartition(":")
    if not path.endswith(".py") or not name:
        raise InputError(f"--reward {where!r} must look like my_rewards.py:function")
    if not Path(path).is_file():
        raise InputError(f"--reward: {path} is not there; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(f"own_reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path}: no function {name!r}; --reward names it after the colon")

    def checked(problem: str, answer: str, completion: str) -> float:
        value = function(problem, answer, completion)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where} returned {value!r}; a reward must be a finite number or a bool")
        return float(value)

    return checked
