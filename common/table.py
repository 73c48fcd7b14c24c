"""The one writer of tables: rows as Markdown that also lines up as plain text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def markdown(rows: Sequence[Mapping[str, Any]], missing: str = "–") -> str:
    """A list of dicts as a Markdown table; "" for none. Columns stand in order of first use.

    A column whose cells begin with digits goes to the right; None and a key that a row lacks are written as `missing`.

    >>> print(markdown([{"run": "kto", "Acc": "7.5"}, {"run": "mralign", "Acc": None}]))
    | run     | Acc |
    | ------- | --: |
    | kto     | 7.5 |
    | mralign |   – |
    """
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        known = [row[name] for row in rows if row.get(name) is not None]
        right = any(re.match(r"[-+−]?\d", str(value)) for value in known) and name != names[0]
        cells = [name, *(missing if row.get(name) is None else str(row[name]) for row in rows)]
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        width = max(3, *map(len, cells))
        padded = [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
        padded.insert(1, "-" * (width - 1) + (":" if right else "-"))
        columns.append(padded)
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
