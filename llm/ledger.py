"""Every call that may cost money is written down once, never made twice, and never made beyond the budget.

A ledger is one append-only JSONL file, a `files.Journal`. A row is a reply with what it cost (outcome "billed"), an
attempt that broke off and may have been billed (outcome "unknown", counted at its worst case), or what was learnt about
a server (outcome "dialect"). Reply and cost are one row, so no crash can keep one and lose the other: the ledger is
also the cache. A row is on the disk before its reply is used.

The budget is kept by reserving: before a request is sent its worst case is set aside (every byte of the prompt a token,
and max_tokens of reply), and a request that would not fit waits for others to come back cheaper, or ends the run.
Prices come from a dated JSON file; discounts for cached prompts are not taken off, so the cost is an upper bound.

Left out: several programs writing one ledger (the second is refused), currencies other than the price file's.
"""

import datetime
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import BudgetSpent, CallsStopped, InputError
from common.files import Journal, find, read_json


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    input: float
    output: float

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


def load_prices(path: str | Path) -> tuple[str, dict[str, Price]]:
    """(date the prices were noted, {model: Price}) of a price file. Raises InputError at a malformed one."""
    value = read_json(find(path))
    try:
        prices = {name: Price(float(row["input"]), float(row["output"])) for name, row in value["models"].items()}
        date = datetime.date.fromisoformat(value["as_of"]).isoformat()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        need = '{"as_of": "YYYY-MM-DD", "models": {name: {"input": usd, "output": usd}}}'
        raise InputError(f"{path}: must look like {need} ({type(error).__name__}: {error})") from None
    if bad := [name for name, price in prices.items() if not (0 <= price.input < 1e6 and 0 <= price.output < 1e6)]:
        raise InputError(f"{path}: the price of {bad[0]!r} is not a sensible number of dollars for a million tokens")
    return date, prices


def search_price(path: str | Path) -> float | None:
    """US dollars for one search at serper.dev, as a price file has it for a thousand; None where it does not.

    Raises InputError at one that is no price.
    """
    whole = read_json(find(path))
    searches = whole.get("searches", {}) if isinstance(whole, dict) else None
    value = searches.get("serper", 0) if isinstance(searches, dict) else None
    if type(value) not in (int, float) or not 0 <= value < 1e6:
        raise InputError(f'{path}: "searches" must look like {{"serper": US dollars for a thousand searches}}')
    return float(value) / 1000 if "serper" in searches else None


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Ledger:
    """The file, what has been spent, and what is set aside for requests under way. Use it as a context manager.

    budget_usd, budget_tokens: most that may be spent over the file's whole life, 0 for no limit. stop: ends waiting.
    A damaged row is left out and said on stderr (its call would be made again, its cost is no longer counted).
    Raises InputError when the file is in use by another program.
    """

    def __init__(
        self, path: Path, budget_usd: float = 0.0, budget_tokens: int = 0, stop: threading.Event | None = None
    ) -> None:
        self.path, self.stop = path, stop or threading.Event()
        self.budget_usd, self.budget_tokens = budget_usd, budget_tokens
        self.replies: dict[str, dict[str, Any]] = {}  # by cache key
        self.dialects: dict[str, dict[str, Any]] = {}  # by endpoint
        self.usd = 0.0  # spent, "unknown" rows at their worst case
        self.tokens = 0
        self.open_calls: list[Call] = []
        self.changed = threading.Condition()
        self.probing = threading.Lock()  # one caller at a time finds out a dialect
        self.journal = Journal(path, sync=True, use=self._count)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file; requests that are still under way are noted as possibly billed."""
        with self.changed:
            for call in self.open_calls:
                self._append(call.row("unknown"))
            self.open_calls.clear()
            self.journal.close()

    def _count(self, row: dict[str, Any]) -> None:
        if row["outcome"] == "dialect":
            self.dialects[row["endpoint"]] = dict(row["dialect"])
            return
        usd, tokens = float(row["usd"]), int(row["prompt_tokens"]) + int(row["completion_tokens"])
        if row["outcome"] == "billed":
            self.replies[row["key"]] = row | {"content": str(row["content"])}
        self.usd, self.tokens = self.usd + usd, self.tokens + tokens

    def _append(self, row: dict[str, Any]) -> None:
        """On the disk, then in memory."""
        self.journal.add(row)
        self._count(row)

    def learn(self, endpoint: str, dialect: dict[str, Any]) -> None:
        """Note how a server wants to be spoken to, so that a later run sends the same bytes and finds its replies."""
        with self.changed:
            if self.dialects.get(endpoint) != dialect:
                self._append({"outcome": "dialect", "endpoint": endpoint, "dialect": dialect})

    def left(self) -> str:
        """What has been spent, and of how much."""
        usd = f"{self.usd:.4f} USD" + (f" of {self.budget_usd:g}" if self.budget_usd else "")
        return f"{usd}, {self.tokens:,} tokens" + (f" of {self.budget_tokens:,}" if self.budget_tokens else "")


@dataclass(eq=False)
class Call:
    """One call on its way: the account that client.post tells about every attempt.

    facts: what the ledger says about it besides cost and time. price: None when it costs nothing.
    prompt_bound, completion_bound: most tokens each side can have.
    """

    ledger: Ledger
    facts: dict[str, Any]
    price: Price | None
    prompt_bound: int
    completion_bound: int
    attempts: int = 0
    started: float = field(default_factory=time.monotonic)

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        return self.price.usd(prompt_tokens, completion_tokens) if self.price else 0.0

    def row(self, outcome: str, **more: Any) -> dict[str, Any]:
        """A ledger row, at the worst case unless `more` knows better."""
        row = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "outcome": outcome}
        row |= self.facts | {"attempts": self.attempts, "seconds": round(time.monotonic() - self.started, 3)}
        row |= {"prompt_tokens": self.prompt_bound, "completion_tokens": self.completion_bound}
        row |= more
        return row | {"usd": round(self.usd(row["prompt_tokens"], row["completion_tokens"]), 9)}

    def reserve(self) -> None:
        """Set the worst case aside. Raises BudgetSpent when it cannot fit even once all others have come back."""
        ledger, usd = self.ledger, self.usd(self.prompt_bound, self.completion_bound)
        tokens = self.prompt_bound + self.completion_bound
        with ledger.changed:
            while True:
                others = ledger.open_calls
                all_usd = ledger.usd + usd + sum(c.usd(c.prompt_bound, c.completion_bound) for c in others)
                all_tokens = ledger.tokens + tokens + sum(c.prompt_bound + c.completion_bound for c in others)
                over = bool(ledger.budget_usd) and all_usd > ledger.budget_usd + 1e-9
                over |= bool(ledger.budget_tokens) and all_tokens > ledger.budget_tokens
                if not over:
                    break
                if not others:
                    need = f"the next call may take {usd:.4f} USD and {tokens:,} tokens"
                    raise BudgetSpent(
                        f"budget: spent {ledger.left()}, {need}; raise --budget-usd or --budget-tokens and run the "
                        "same command again: what is paid for is kept"
                    )
                ledger.changed.wait(0.2)
                if ledger.stop.is_set():
                    raise CallsStopped("stopped")
            ledger.open_calls.append(self)
        self.attempts += 1
        self.started = time.monotonic()

    def release(self, maybe_billed: bool) -> None:
        """An attempt without a reply."""
        self._finish(self.row("unknown") if maybe_billed else None)

    def settle(self, usage: Any, **more: Any) -> dict[str, Any]:
        """A reply: its row, now on the disk. usage: as the server gave it; the worst case when it gave none."""
        tokens = {}
        for name in ("prompt_tokens", "completion_tokens"):
            value = usage.get(name) if isinstance(usage, dict) else None
            if type(value) is int and 0 <= value < 10**9:
                tokens[name] = value
        row = self.row("billed", **tokens, **more, estimated=len(tokens) < 2)
        self._finish(row)
        return row

    def _finish(self, row: dict[str, Any] | None) -> None:
        ledger = self.ledger
        with ledger.changed:
            if self not in ledger.open_calls:  # the ledger was closed meanwhile and has noted this call
                raise CallsStopped("stopped")
            ledger.open_calls.remove(self)
            if row is not None:
                ledger._append(row)
            ledger.changed.notify_all()
