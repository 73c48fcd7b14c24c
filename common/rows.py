"""The fields of the rows between the stages (docs/formats.md), in one table.

samples.jsonl, candidates.jsonl and train.jsonl may come from elsewhere, so what reads them as a user's files looks at
the type of every field it knows: a row of another shape is refused with its line, before it is counted wrong.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import InputError

LARGEST_ID = 2**31  # token ids are below it
LARGEST_WEIGHT = 3e38  # weights become 32-bit floats


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def are_ids(value: Any) -> bool:
    """Whether a value is a list of token ids, maybe an empty one."""
    if not isinstance(value, list) or not {*map(type, value)} <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < LARGEST_ID)


def are_weights(value: Any) -> bool:
    """Whether a value is a list of step weights."""
    return isinstance(value, list) and all(
        type(x) in (int, float) and math.isfinite(x) and 0 < x < LARGEST_WEIGHT for x in value
    )


def are_spans(value: Any) -> bool:
    """Whether a value is a list of ranges [first, last + 1] of characters, ascending and apart."""
    if not isinstance(value, list) or not all(isinstance(s, list) and len(s) == 2 for s in value):
        return False
    edges = [c for span in value for c in span]
    return {*map(type, edges)} <= {int} and edges == sorted(edges) and all(0 <= s[0] < s[1] for s in value)


def are_labels(value: Any) -> bool:
    """Whether a value is a list of the labels of steps."""
    return isinstance(value, list) and all(map(is_texts, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda x: isinstance(x, str) and x != "", "a text that is not empty"),
    "mode": (lambda x: x in ("on", "off"), "'on' or 'off'"),
    "draw": (lambda x: type(x) is int and x >= 0, "a whole number from 0"),
    "finish": (lambda x: x in ("stop", "length"), "'stop' or 'length'"),
    **dict.fromkeys(("dataset", "question", "prompt", "text", "completion"), (_is_text, "a text")),
    **dict.fromkeys(("ids", "prompt_ids", "completion_ids"), (are_ids, "a list of token ids")),
    **dict.fromkeys(("chosen", "label"), (_is_truth, "true or false")),
    "answers": (is_texts, "a list of texts"),
    "spans": (are_spans, "a list of ranges [first, last + 1] of characters, ascending and apart"),
    "labels": (are_labels, "a list of the labels of every step"),
    "w": (are_weights, "a list of positive numbers"),
}


def check_row(row: Mapping[str, Any]) -> None:
    """Raise InputError at the first field of a row that is not what FIELDS says. Fields that are not there pass."""
    for name in FIELDS.keys() & row.keys():
        good, wanted = FIELDS[name]
        if not good(row[name]):
            shown = repr(row[name])
            raise InputError(f"field {name!r} must be {wanted}, not {shown[:60]}; repair this row or make it again")
    if row.get("spans") and "completion" in row and row["spans"][-1][1] > len(row["completion"]):
        raise InputError("field 'spans' reaches beyond the completion; repair this row or make it again")
