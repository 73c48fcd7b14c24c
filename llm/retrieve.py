"""Search results for questions and claims, every one kept, so that others can replay a run without a key.

  serper           Google's results by way of serper.dev; the key is in $SERPER_KEY
  serper#VARIABLE  the same with the key in another variable
  serper@URL       the same from a server of that address, which speaks as serper.dev does
  FILE             documents {title, snippet, link}, one JSON object a line, ranked by shared words: a stand-in for a
                   search engine, for the miniature

A result is {title, snippet, link}. The cache is a JSONL file of {query, num, engine, fetched, results}; a query that is
in it is not asked again, and with all queries in it no key is needed. Left out: whole pages, other engines.
"""

import datetime
import io
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import data
from common.errors import InputError, ServiceError
from common.files import Journal, journal_rows, read_bytes, read_jsonl, utf8
from llm.client import Client, Endpoint, Limits, in_threads

SERPER = "https://google.serper.dev"
FIELDS = ("title", "snippet", "link")
Result = dict[str, str]


class Cache:
    """The file of what was searched before, a `files.Journal`. Safe to use from many threads; one program at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.known: dict[tuple[str, str, int], list[Result]] = {}
        self.journal: Journal | None = None  # opened for the first new row: with all queries known none is written
        if path.exists():
            raw = utf8(read_bytes(path), path).replace(b"\r\n", b"\n")  # others' caches come through editors and git
            journal_rows(io.BytesIO(raw), path, self._take)

    def _take(self, row: dict) -> None:
        _check(row)
        self.known[row["engine"], row["query"], row["num"]] = row["results"]

    def add(self, engine: str, query: str, num: int, results: list[Result]) -> None:
        """Keep the results of a query, on the disk first."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"query": query, "num": num, "engine": engine, "fetched": now, "results": results}
        with self.lock:
            self.journal = self.journal or Journal(self.path, sync=True)
            self.journal.add(row)
            self._take(row)


def _check(row: dict) -> None:
    """Raises ValueError or KeyError at a row of another shape."""
    results = row["results"]
    if not isinstance(results, list) or not all(
        isinstance(r, dict) and all(isinstance(r.get(name), str) for name in FIELDS) for r in results
    ):
        raise ValueError("'results' must be a list of {title, snippet, link}")


class Serper:
    """Google search by serper.dev. key_env: name of the variable with the key."""

    def __init__(self, key_env: str, cache: Cache, base_url: str = SERPER, limits: Limits | None = None) -> None:
        self.name = "serper" if base_url == SERPER else f"serper@{base_url}"
        self.endpoint = Endpoint("serper", base_url, key_env, "X-API-KEY")
        self.cache, self.limits = cache, limits

    def search(self, queries: Sequence[str], num: int, concurrency: int = 8) -> dict[str, list[Result]]:
        """query -> the first `num` organic results. Raises InputError without a key, ServiceError."""
        wanted = list(dict.fromkeys(queries))
        missing = [q for q in wanted if (self.name, q, num) not in self.cache.known]
        if missing:
            if not os.environ.get(self.endpoint.key_env):
                raise InputError(
                    f"{self.cache.path}: {len(missing)} of {len(wanted)} searches are not in it; export "
                    f"{self.endpoint.key_env} with a key of serper.dev, or use the cache of a run that made them"
                )
            self._fetch(missing, num, concurrency)
        return {q: self.cache.known[self.name, q, num] for q in wanted}

    def _fetch(self, queries: list[str], num: int, concurrency: int) -> None:
        stop = threading.Event()
        client = Client(self.endpoint, concurrency, limits=self.limits, stop=stop)

        def work(query: str) -> list[Result]:
            return organic(client.post("/search", {"q": query, "num": num}), num)

        for query, results in in_threads(work, queries, concurrency, stop):
            self.cache.add(self.name, query, num, results)


def organic(reply: dict, num: int) -> list[Result]:
    """The first organic results of a reply, without those that have no snippet. Raises ServiceError at a bad reply."""
    rows = reply.get("organic", [])
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ServiceError("serper: a reply without a list of organic results; look at its documentation")
    texts = [{name: r.get(name) if isinstance(r.get(name), str) else "" for name in FIELDS} for r in rows]
    return [r for r in texts if r["snippet"]][:num]


class Documents:
    """A stand-in for a search engine: documents ranked by the rarity of the words they share with the query."""

    def __init__(self, path: Path) -> None:
        self.rows = read_jsonl(path, FIELDS, _check_document)
        if not self.rows:
            raise InputError(f"{path}: holds no document; put one {{title, snippet, link}} a line in it")
        self.words = [_words(f"{r['title']} {r['snippet']}") for r in self.rows]
        self.spread = Counter(word for words in self.words for word in words)
        self.name = f"documents of {path.name}"

    def search(self, queries: Sequence[str], num: int) -> dict[str, list[Result]]:
        """query -> the `num` best documents that share a word with it; ties keep the file's order."""
        return {q: self._best(q, num) for q in dict.fromkeys(queries)}

    def _best(self, query: str, num: int) -> list[Result]:
        rarity = {w: math.log(1 + len(self.rows) / self.spread[w]) for w in _words(query) if w in self.spread}
        scores = [sum(rarity.get(w, 0.0) for w in words) / math.sqrt(len(words) or 1) for words in self.words]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:num]
        return [{name: self.rows[i][name] for name in FIELDS} for i in best if scores[i] > 0]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", data.normalise(text)))


def _check_document(row: dict) -> None:
    """Raises InputError at a field that is no text: "None" would be shown to the model."""
    if odd := [name for name in FIELDS if not isinstance(row[name], str)]:
        raise InputError(f"field {odd[0]!r} must be a text, not {row[odd[0]]!r}; repair this row")


Search = Callable[[Sequence[str], int], dict[str, list[Result]]]


def _is_serper(name: str) -> bool:
    return name == "serper" or name.startswith("serper@http")


def key_variable(text: str) -> str:
    """The variable with the key of the engine that a setting names, "" for a file of documents.

    >>> key_variable("serper"), key_variable("serper#MY_KEY"), key_variable("docs.jsonl")
    ('SERPER_KEY', 'MY_KEY', '')
    """
    name, _, variable = text.partition("#")
    return (variable or "SERPER_KEY") if _is_serper(name) else ""


def engine(text: str, cache: Path) -> Serper | Documents:
    """The engine that a setting names: "serper", "serper@URL", each with #VARIABLE, or a file. Raises InputError."""
    name, _, variable = text.partition("#")
    if _is_serper(name):
        return Serper(variable or "SERPER_KEY", Cache(cache), name.partition("@")[2] or SERPER)
    if not Path(text).is_file():
        raise InputError(f"--search {text!r} is neither serper, serper#KEY_VARIABLE nor a file of documents")
    return Documents(Path(text))


def as_text(results: Sequence[Result]) -> str:
    """Results as numbered lines for a prompt; each on one line, whatever it holds."""
    lines = [" ".join(f"{r['title']}: {r['snippet']}".split()) for r in results]
    return "\n".join(f"[{k}] {line}" for k, line in enumerate(lines, 1)) or "(nothing was found)"
