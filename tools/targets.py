"""What a run of `make gpu-check` gave beside the targets set for one H100 or H200.

Times of peers are taken from the same run, at the same rows a pass. "Layers kept": nothing recomputed, or cheap results
alone; "layers recomputed": gradient checkpointing, on both sides.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

DEFAULT, PAPER = "TRL, default", "TRL, 2 rows x 4, the paper's split"
LIGER, ONCE = "TRL, Liger", "TRL, reference precomputed"
LIGER_KEPT, ONCE_KEPT = "TRL, Liger, no checkpointing", "TRL, precomputed, no checkpointing"
KEPT, AGAIN = ("none", "cheap"), ("full",)
OP_MIB = 500
PEAK = "peak MiB, 8 rows a pass, layers "
FITTING = f"the op's fastest way within {OP_MIB} MiB / its two products"

Parts = Mapping[str, Any]  # name -> {"rows": [...]}, as gpu_check writes them
Number = float | None


def pick(parts: Parts, part: str, column: str, key: str, values: Iterable[Any], rows: int | None = None) -> list[float]:
    """Numbers of a column, medians where it has spreads, from rows whose `key` is one of `values`.

    rows: only those with so many rows a pass.
    """
    wanted = [row for row in parts.get(part, {}).get("rows", []) if row.get(key) in list(values)]
    found = [row.get(column) for row in wanted if rows is None or row.get("rows a pass") == rows]
    return [x["median"] if isinstance(x, dict) else x for x in found if isinstance(x, (int, float, dict))]


def best(found: list[float], of: Callable[[list[float]], float] = min) -> Number:
    """The lowest or the highest of what was found; None where nothing was."""
    return of(found) if found else None


def ratio(a: Number, b: Number) -> Number:
    """a / b, None where one is missing."""
    return None if a is None or b is None else a / b


def table(parts: Parts) -> list[dict[str, Any]]:
    """A row a target: what, found, target, met, and what is worth knowing beside it.

    found and met are None where the run did not come to that.
    """

    def ours(column: str, levels: tuple[str, ...], rows: int | None = None, of: Any = min) -> Number:
        return best(pick(parts, "train", column, "recomputed", levels, rows), of)

    def trl(*names: str) -> Number:
        return best(pick(parts, "peers", "seconds", "candidate", names))

    def op(column: str, *names: str) -> Number:
        return best(pick(parts, "op", column, "candidate", names))

    def decode(batch: int) -> Number:
        return best(pick(parts, "sample", "decode step ms", "batch", [batch]))

    op_ours = ("ours, triton", "ours, torch")
    fitting = best_fitting(parts)
    kept, again = ours("seconds", KEPT, 8), ours("seconds", AGAIN, 8)
    counts = [best(pick(parts, "train", "counted MiB", "recomputed", levels, 8)) for levels in (KEPT, AGAIN)]
    beside = {FITTING: fitting[1]} | {
        f"{PEAK}{kind}": f"counted from the shapes: {count:,.0f}"
        for kind, count in zip(("kept", "recomputed"), counts, strict=True)
        if count is not None
    }
    found: list[tuple[str, Number, str, float]] = [
        ("share of the peak, layers kept", ours("share of the peak", KEPT, of=max), "from", 0.50),
        ("share of the peak, layers recomputed", ours("share of the peak", AGAIN, of=max), "from", 0.42),
        ("TRL's default / ours, layers recomputed", ratio(trl(DEFAULT), again), "from", 2.4),
        ("TRL's best / ours, layers recomputed", ratio(trl(ONCE, LIGER), again), "from", 1.6),
        ("TRL's best / ours, layers kept", ratio(trl(ONCE_KEPT, LIGER_KEPT), kept), "from", 1.6),
        ("TRL / ours, 2 rows a pass", ratio(trl(PAPER), ours("seconds", AGAIN, 2)), "from", 4),
        (f"{PEAK}kept", ours("peak MiB", KEPT, 8), "to", 45_000),
        (f"{PEAK}recomputed", ours("peak MiB", AGAIN, 8), "to", 19_000),
        ("the op / its two products", op("/ its products", *op_ours), "to", 1.12),
        ("the op, extra MiB", op("extra MiB", *op_ours), "to", OP_MIB),
        (FITTING, fitting[0], "to", 1.12),
        ("decode step ms, batch 128", decode(128), "to", 9),
        ("decode step ms, batch 16", decode(16), "to", 5.5),
    ]
    rows = []
    for what, number, way, target in found:
        met = None if number is None else number >= target if way == "from" else number <= target
        row = {"what": what, "found": number, "target": f"{way} {target:,g}", "met": met}
        rows.append(row | {"beside": beside.get(what, "")})
    return rows


def best_fitting(parts: Parts) -> tuple[Number, str]:
    """The op's least time over its products within OP_MIB, of all its ways in "op" and "sweep", and which way that is.

    Of the sweep only the largest hidden size, which is the one of "op".
    """
    ways = [row for row in parts.get("op", {}).get("rows", []) if str(row["candidate"]).startswith("ours")]
    swept = parts.get("sweep", {}).get("rows", [])
    ways += [row for row in swept if row["D"] == max(other["D"] for other in swept)]
    fits = [row for row in ways if row.get("extra MiB") is not None and row["extra MiB"] <= OP_MIB]
    if not fits:
        return None, ""
    found = min(fits, key=lambda row: row["/ its products"])
    names = ("candidate", "chunk", "block", "warps")
    way = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return found["/ its products"], f"{way}: {found['extra MiB']:,.0f} MiB"
