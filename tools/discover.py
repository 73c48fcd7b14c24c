"""Where the 15 labels come from (Stage A; 3.1.2, B.1): open labels, clusters, names. Run once, if at all.

  python -m tools.discover --candidates runs/x/candidates.jsonl --out runs/x/discovery \\
    --namer gpt-5@https://api.openai.com/v1#OPENAI_API_KEY --embedder bge-m3@http://localhost:8001/v1

A strong model names the strategy of every step of a sample of traces in its own words; names used fewer than
--min-count times are dropped; the others are embedded through /v1/embeddings, clustered by OPTICS under cosine distance
and judged by their silhouette; the model gives every cluster a name, a definition, one of the four macro strategies and
the closest of the 15 labels. Results under --out:

  discovery.json   the clusters with their members, counts, names, and which of the 15 they map onto
  vocabulary.txt   the clusters as TAXONOMY: put it in place of that in em.py to label with them instead
  clusters.png     the embedded names in two dimensions (principal components), noise in grey
  calls.jsonl      every call and its cost; a second run pays for nothing again

Needs scikit-learn: pip install -r requirements-discover.txt. Left out: choosing OPTICS' settings by search, merging
clusters by hand.
"""

import json
import random
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import em
from common.endings import program
from common.errors import AnnotationError, InputError
from common.files import atomic_write, read_jsonl, write_json
from common.rows import check_row
from common.settings import cli, opt
from common.table import markdown
from common.template import fill, load_prompt
from llm.chat import Chat, sealed
from llm.client import Client, Endpoint, in_threads, parse_endpoint
from llm.committee import Trace, ask_twice, load_reply, vocabulary
from llm.labelling import PROMPTS, ServiceSettings
from llm.ledger import Call, Ledger, Price, sha256_json
from report import figures

BATCH = 64  # names in one embedding request
NOISE = -1  # OPTICS' name for what is in no cluster


@dataclass(frozen=True)
class Settings(ServiceSettings):
    """What is labelled, by whom, and how it is clustered. Defaults are the paper's where it states them."""

    candidates: str = opt("", "candidates.jsonl whose thoughts are named", "discovery (B.1)")
    out: str = opt("runs/discovery", "directory for everything this writes")
    namer: str = opt("", "MODEL@BASE_URL#KEY_VARIABLE that names steps and clusters (paper: GPT-5)")
    embedder: str = opt("", "MODEL@BASE_URL#KEY_VARIABLE with /embeddings (paper: bge-m3)")
    sample: int = opt(2000, "traces to name", low=1)
    min_count: int = opt(5, "a name used fewer times is dropped", low=1)
    min_samples: int = opt(5, "OPTICS: neighbours that make a name a core point, and fewest names in a cluster", low=2)
    max_tokens: int = opt(4096, "longest reply, tokens", low=1)
    temperature: float = opt(0.0, "sampling temperature", low=0)
    seed: int = opt(0, "seed of the sample and of the requests")


# ---------- names in the model's own words


def tidy(name: str) -> str:
    """A strategy's name, as one spelling: lower case, blanks for _ and -, at most 60 characters."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())[:60]


def parse_names(text: str) -> list[str]:
    """All strategy names of an open reply. Raises AnnotationError."""
    steps = load_reply(text).get("steps")
    if not isinstance(steps, list) or not steps:
        raise AnnotationError('"steps" must be a list that is not empty')
    names = []
    for number, step in enumerate(steps, 1):
        given = step.get("meta_reasoning_strategies") if isinstance(step, dict) else None
        if not isinstance(given, list) or not all(isinstance(name, str) and tidy(name) for name in given):
            raise AnnotationError(f"step {number}: meta_reasoning_strategies must be a list of names")
        if len(given) > 2:
            raise AnnotationError(f"step {number}: more than two names")
        names += [tidy(name) for name in given]
    return names


def open_names(traces: list[Trace], chat: Chat, threads: int, stop: threading.Event) -> tuple[Counter[str], int]:
    """(how often each name was used, traces without a usable reply)."""
    template, again = load_prompt(PROMPTS / "discover.txt"), load_prompt(PROMPTS / "again.txt")

    def work(trace: Trace) -> list[str] | None:
        shown = sealed(trace.material(), indent=0)
        messages = [{"role": "user", "content": fill(template, material=shown)}]
        return ask_twice(chat, messages, again, parse_names)[0]

    counts: Counter[str] = Counter()
    unusable = 0
    for _, names in in_threads(work, traces, threads, stop):
        counts.update(names or [])
        unusable += names is None
    return counts, unusable


# ---------- clusters


def embed(names: list[str], client: Client, ledger: Ledger, price: Price | None) -> np.ndarray:
    """(len(names), dimension) float64, from the ledger or the server. Raises ServiceError and InputError."""
    rows: list[list[float]] = []
    for start in range(0, len(names), BATCH):
        body = {"model": client.endpoint.model, "input": names[start : start + BATCH]}
        key = sha256_json([client.endpoint.base_url, "/embeddings", body])
        if key not in ledger.replies:
            facts = {
                "role": "embedder",
                "endpoint": str(client.endpoint),
                "key": key,
                "prompt_sha256": sha256_json(body),
            }
            bound = sum(len(name.encode()) + 8 for name in body["input"])
            call = Call(ledger, facts, price, bound, 0)
            reply = client.post("/embeddings", body, tokens=bound // 4, account=call)
            told = reply.get("usage")
            prompt_tokens = told.get("prompt_tokens") if isinstance(told, dict) else None
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
            call.settle(usage, content=json.dumps(_vectors(reply, len(body["input"]), client.endpoint)), finish="stop")
        rows += json.loads(ledger.replies[key]["content"])
    return np.array(rows)


def _vectors(reply: dict[str, Any], count: int, endpoint: Endpoint) -> list[list[float]]:
    """The vectors of a reply, by their index: finite numbers, as many in each. Raises InputError at anything else."""
    try:
        by_index = {item["index"]: [float(x) for x in item["embedding"]] for item in reply["data"]}
        vectors = [by_index[i] for i in range(count)]
        if len({len(vector) for vector in vectors}) > 1 or not np.isfinite(vectors).all() or not vectors[0]:
            raise ValueError("not as many finite numbers in each")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{endpoint}: /embeddings did not return {count} vectors ({error!r}); check the model"
        ) from None
    return vectors


def cluster(points: np.ndarray, min_samples: int) -> tuple[np.ndarray, float | None]:
    """(cluster of every point, NOISE for none; silhouette of the clustered points, None below two clusters)."""
    try:
        from sklearn.cluster import OPTICS
        from sklearn.metrics import silhouette_score
    except ImportError:
        raise InputError("scikit-learn is missing; pip install -r requirements-discover.txt") from None
    if len(points) < max(2, min_samples):
        raise InputError(f"{len(points)} names are too few to cluster; raise --sample or lower --min-count")
    labels = OPTICS(min_samples=min_samples, metric="cosine").fit_predict(points)
    inside = labels != NOISE
    if len(set(labels[inside])) < 2:
        return labels, None
    return labels, float(silhouette_score(points[inside], labels[inside], metric="cosine"))


def picture(points: np.ndarray, labels: np.ndarray, names: dict[int, str], path: Path) -> None:
    """A scatter of the first two principal components, clusters in colour with their names, noise in grey."""
    centred = points - points.mean(0)
    flat = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    figure = Figure(figsize=(8, 6))
    ax = figure.add_subplot()
    ax.scatter(*flat[labels == NOISE].T, c="0.8", s=12)
    inside = labels != NOISE
    ax.scatter(*flat[inside].T, c=labels[inside], cmap="tab20", s=16)
    for number, name in names.items():
        ax.annotate(name, flat[labels == number].mean(0), ha="center", fontsize=8)
    ax.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second principal component")
    figures.save(figure, path)


# ---------- names for clusters


def parse_cluster_name(text: str) -> dict[str, str]:
    """{"name", "definition", "macro", "closest"} of a reply. Raises AnnotationError."""
    value = load_reply(text)
    if not all(isinstance(value.get(k), str) and value[k].strip() for k in ("name", "definition", "macro", "closest")):
        raise AnnotationError('it needs the texts "name", "definition", "macro" and "closest"')
    if value["macro"] not in em.TAXONOMY:
        raise AnnotationError(f"macro must be one of {', '.join(em.TAXONOMY)}")
    if value["closest"] not in (*em.LABELS, "none"):
        raise AnnotationError(f'closest must be "none" or one of {", ".join(em.LABELS)}')
    definition = " ".join(value["definition"].split())
    return {
        "name": tidy(value["name"]).replace(" ", "_"),
        "definition": definition,
        "macro": value["macro"],
        "closest": value["closest"],
    }


def name_clusters(
    clusters: dict[int, dict[str, int]], chat: Chat, threads: int, stop: threading.Event
) -> dict[int, Any]:
    """Cluster number -> parse_cluster_name's fields; a cluster whose replies are unusable is called by its number."""
    template, again = load_prompt(PROMPTS / "name_cluster.txt"), load_prompt(PROMPTS / "again.txt")

    def work(number: int) -> dict[str, str]:
        fields = {"macros": "; ".join(em.TAXONOMY), "labels": vocabulary()}
        shown = sealed(clusters[number], indent=0)
        messages = [{"role": "user", "content": fill(template, material=shown, **fields)}]
        nothing = {"name": f"cluster_{number}", "definition": "", "macro": next(iter(em.TAXONOMY)), "closest": "none"}
        return ask_twice(chat, messages, again, parse_cluster_name)[0] or nothing

    return dict(in_threads(work, sorted(clusters), threads, stop))


def as_vocabulary(named: list[dict[str, Any]]) -> str:
    """The clusters as the table of em.py, macro strategy by macro strategy."""
    table = {macro: {c["name"]: c["definition"] for c in named if c["macro"] == macro} for macro in em.TAXONOMY}
    return f"TAXONOMY = {json.dumps(table, indent=4)}\n"


# ---------- all of it


def discover(cfg: Settings) -> dict[str, Any]:
    """Everything under cfg.out; returns what discovery.json holds. Raises InputError and ServiceError."""
    for name in ("candidates", "namer", "embedder"):
        if not getattr(cfg, name):
            raise InputError(f"--{name} is not set; see python -m tools.discover --help")
    endpoints = {"namer": parse_endpoint(cfg.namer), "embedder": parse_endpoint(cfg.embedder)}
    rows = read_jsonl(cfg.candidates, ("id", "question", "answers", "completion", "spans"), check_row)
    rows = random.Random(cfg.seed).sample(rows, min(cfg.sample, len(rows)))
    traces = [
        Trace(r["id"], r["question"], r["answers"], [r["completion"][c0:c1] for c0, c1 in r["spans"]]) for r in rows
    ]
    out, stop = Path(cfg.out), threading.Event()
    clients, (_, prices) = cfg.clients(endpoints, stop), cfg.price_list(endpoints)
    with Ledger(out / "calls.jsonl", cfg.budget_usd, cfg.budget_tokens, stop) as ledger:
        limits = {"max_tokens": cfg.max_tokens, "temperature": cfg.temperature, "seed": cfg.seed, "schema": None}
        chat = Chat("namer", endpoints["namer"], clients["namer"], ledger, prices["namer"], **limits)
        counts, unusable = open_names(traces, chat, cfg.annotate_concurrency, stop)
        kept = sorted(name for name, count in counts.items() if count >= cfg.min_count)
        points = embed(kept, clients["embedder"], ledger, prices["embedder"]) if kept else np.zeros((0, 1))
        labels, silhouette = cluster(points, cfg.min_samples)
        members: dict[int, dict[str, int]] = {}
        for name, number in zip(kept, labels.tolist(), strict=True):
            members.setdefault(number, {})[name] = counts[name]
        noise = members.pop(NOISE, {})
        named = name_clusters(members, chat, cfg.annotate_concurrency, stop)
        cost = {"usd": round(ledger.usd, 6), "tokens": ledger.tokens}
    total = sum(sum(of.values()) for of in members.values())
    clusters = [
        named[k] | {"share": round(sum(of.values()) / total, 6), "members": dict(Counter(of).most_common())}
        for k, of in sorted(members.items(), key=lambda item: -sum(item[1].values()))
    ]
    result = {
        "traces": len(traces),
        "traces_without_a_usable_reply": unusable,
        "names_used": sum(counts.values()),
        "distinct_names": len(counts),
        "names_kept": len(kept),
        "names_in_no_cluster": dict(Counter(noise).most_common()),
        "silhouette": silhouette,
        "clusters": clusters,
        "cost": cost,
    }
    write_json(out / "discovery.json", result)
    with atomic_write(out / "vocabulary.txt") as f:
        f.write(as_vocabulary(clusters))
    picture(points, labels, {k: named[k]["name"] for k in members}, out / "clusters.png")
    return result


def table(result: dict[str, Any]) -> str:
    """The clusters as text, beside the paper's numbers."""
    rows = [
        {"cluster": c["name"], "share": f"{c['share']:.2%}", "closest label": c["closest"]}
        | {"most used names": ", ".join(list(c["members"])[:4])}
        for c in result["clusters"]
    ]
    lines = [markdown(rows)]
    silhouette = "not defined" if result["silhouette"] is None else f"{result['silhouette']:.4f}"
    lines.append(
        f"{result['traces']} traces, {result['names_used']} names, {result['distinct_names']} distinct, "
        f"{result['names_kept']} kept; silhouette {silhouette} (paper: 2,000, 23,878, 2,473; .4861)"
    )
    return "\n".join(lines)


@program
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cfg, _ = cli(Settings, argv, __doc__)
    print(table(discover(cfg)))


if __name__ == "__main__":
    sys.exit(main())
