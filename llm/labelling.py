"""From candidates to annotations.jsonl, with the annotator the user chose, and what that costs.

  cues        phrases (annotate.py): offline, for the miniature
  committee   language models (committee.py): everything they answer and cost goes to annotation/calls.jsonl under the
              run's folder, both annotators' own labels to annotation/votes.jsonl, how far they agree to
              annotation/agreement.json and, as a table, to stdout
  self        the model that is aligned labels its own thoughts, with --annotator-model a second one too
              (pipeline/labels.py)
  FILE        a finished annotations.jsonl of someone else, with its manifest: no server and no key

annotations.jsonl is the result; annotations.manifest.json beside it says which candidates it belongs to, who labelled
them, with which prompts and at what cost, and holds the checksum. `price_table` says before anything is sent what the
committee would cost.
"""

import contextlib
import dataclasses
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import annotate
from common.errors import InputError
from common.files import ROOT, atomic_write, find, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from common.settings import opt
from common.table import markdown
from llm import agreement, committee
from llm.chat import Chat
from llm.client import Client, Endpoint, Limits, parse_endpoint
from llm.ledger import Ledger, Price, load_prices, sha256_json

PROMPTS = ROOT / "prompts"
REPLY_TOKENS = 55  # of a step in a reply, measured on the example in the prompt; reasoning models think on top


@dataclass(frozen=True)
class ServiceSettings:
    """How servers are used, and what may be spent."""

    annotate_concurrency: int = opt(16, "requests in flight at once", "servers (docs/annotating.md)", low=1)
    rpm: int = opt(0, "requests a minute to one endpoint; 0: no limit", low=0)
    tpm: int = opt(0, "tokens a minute to one endpoint; 0: no limit", low=0)
    request_timeout: float = opt(300.0, "longest silence of a server, seconds", above=0)
    budget_usd: float = opt(0.0, "most that annotating this run may ever cost, US dollars; 0: no limit", low=0)
    budget_tokens: int = opt(0, "most tokens that annotating this run may ever take; 0: no limit", low=0)
    prices: str = opt("prices.json", "dated price list")

    def clients(self, named: dict[str, Endpoint], stop: threading.Event) -> dict[str, Client]:
        """role -> client; roles with the same endpoint share one, and with it its limits."""
        limits = Limits(read=self.request_timeout, exchange=2 * self.request_timeout)
        shared = {e: Client(e, self.annotate_concurrency, self.rpm, self.tpm, limits, stop) for e in named.values()}
        return {role: shared[endpoint] for role, endpoint in named.items()}

    def price_list(self, named: dict[str, Endpoint]) -> tuple[str, dict[str, Price | None]]:
        """(date, role -> price). A server that wants no key costs nothing. Raises InputError if a budget needs one."""
        date, known = load_prices(self.prices)
        prices: dict[str, Price | None] = {}
        for role, endpoint in named.items():
            prices[role] = known.get(endpoint.model) if endpoint.key_env else None
            if endpoint.key_env and prices[role] is None and self.budget_usd:
                need = f"no price for {endpoint.model}, which --budget-usd needs"
                raise InputError(f"{self.prices}: {need}; add it, or use --budget-tokens")
        return date, prices


@dataclass(frozen=True)
class LabelSettings(ServiceSettings):
    """Who labels, and how."""

    annotator: str = opt(
        "",
        "who labels the steps: self (the model that is aligned), committee (models behind servers: the paper's way), a "
        "finished annotations.jsonl with its manifest, or cues (phrases: the miniature only); no default",
        "labels (3.1.2)",
    )
    annotator_model: str = opt("", "self: a second model, a folder or a Hub id; where the two differ self decides")
    cues: str = opt("mini/cues.json", "cue phrases of the offline annotator")
    annotator_noise: float = opt(0.0, "cues: share of labels replaced at random", low=0, high=1)
    annotator_a: str = opt("", "MODEL@BASE_URL#KEY_VARIABLE; its confidences count where both agree (paper: GPT-4o)")
    annotator_b: str = opt("", "the other annotator (paper: DeepSeek-chat); none: a alone decides")
    adjudicator: str = opt("", "decides where a and b differ (paper: GPT-5); may be the same server as theirs")
    annotate_temperature: float = opt(0.0, "sampling temperature of all three", low=0)
    annotate_max_tokens: int = opt(4096, "longest reply, tokens, with the model's reasoning", low=1)


SHAPING = ("annotator", "annotator_noise", "annotator_model", "annotator_a", "annotator_b", "adjudicator")
SHAPING += ("annotate_temperature", "annotate_max_tokens")  # the settings that the labels depend on, with the seed


def inputs(cfg: LabelSettings) -> list[Path]:
    """The files that the labels depend on, besides the candidates."""
    if not cfg.annotator:
        return []  # `check` refuses it where labels are wanted
    if cfg.annotator == "cues":
        return [find(cfg.cues)]
    if cfg.annotator in ("committee", "self"):
        return [PROMPTS / name for name in committee.FILES]
    return [Path(cfg.annotator), manifest_path(Path(cfg.annotator))]


def manifest_path(path: Path) -> Path:
    """annotations.jsonl -> annotations.manifest.json"""
    return path.with_suffix(".manifest.json")


def check(cfg: LabelSettings) -> None:
    """Refuse settings that cannot work. Raises InputError."""
    if not cfg.annotator:
        raise InputError(
            "--annotator is not set; real text is labelled by self (the model itself), by a committee, or comes from a "
            "finished annotations.jsonl (docs/annotating.md); cues are for the miniature"
        )
    for path in inputs(cfg):
        if not path.exists():
            names = "self, committee, cues, or the path of an annotations.jsonl with its .manifest.json beside it"
            raise InputError(f"{path}: no such file; --annotator is {cfg.annotator!r}, must be {names}")
    if cfg.annotator_model and cfg.annotator != "self":
        raise InputError("--annotator-model is the second model of --annotator self; leave it out")
    if cfg.annotator == "cues":
        annotate.read_cues(cfg.cues)
    if cfg.annotator == "self":
        committee.Prompts.load(PROMPTS)
    if cfg.annotator != "committee":
        return
    endpoints(cfg)
    cfg.price_list(endpoints(cfg))
    committee.Prompts.load(PROMPTS)


def endpoints(cfg: LabelSettings) -> dict[str, Endpoint]:
    """role -> endpoint: a alone, or a, b and judge. Raises InputError."""
    if not cfg.annotator_a:
        example = "gpt-4o@https://api.openai.com/v1#OPENAI_API_KEY"
        raise InputError(
            f"--annotator committee needs --annotator-a MODEL@BASE_URL#KEY_VARIABLE, for example {example}"
        )
    if bool(cfg.annotator_b) != bool(cfg.adjudicator):
        missing = "--adjudicator" if cfg.annotator_b else "--annotator-b"
        raise InputError(
            f"{missing} is not set: give both it and its partner, or neither to let annotator a decide alone"
        )
    named = {"a": cfg.annotator_a, "b": cfg.annotator_b, "judge": cfg.adjudicator}
    return {role: parse_endpoint(text) for role, text in named.items() if text}


def _chats(cfg: LabelSettings, seed: int, ledger: Ledger, clients: dict[str, Client]) -> dict[str, Chat]:
    """role -> chat. Every role has its own seed, so that one server in two roles gives two opinions."""
    _, prices = cfg.price_list(endpoints(cfg))
    schema = committee.reply_schema()
    return {
        role: Chat(
            role,
            endpoint,
            clients.get(role),
            ledger,
            prices[role],
            schema,
            cfg.annotate_max_tokens,
            cfg.annotate_temperature,
            seed + number,
        )
        for number, (role, endpoint) in enumerate(endpoints(cfg).items())
    }


def label(
    rows: list[dict[str, Any]], cfg: LabelSettings, out: Path, seed: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Write annotations.jsonl and its manifest under `out`; returns the tally.

    rows: candidates with id, question, answers, completion, spans. progress is called with 1 for every call done.
    Raises InputError, and ServiceError when a server, a key or the budget ends the run: what was answered is kept.
    """
    about: dict[str, Any] = {"annotator": cfg.annotator}
    if cfg.annotator == "cues":
        annotator = annotate.CueAnnotator(annotate.read_cues(cfg.cues), noise=cfg.annotator_noise, seed=seed)
        records, tally = annotate.annotate(rows, annotator)
    elif cfg.annotator == "committee":
        records, tally, more = _label_with_committee(rows, cfg, out, seed, progress)
        about |= more
    else:
        records, tally, about = _take_over(rows, Path(cfg.annotator))
    write_annotations(rows, records, about, out)
    return tally


def write_annotations(
    rows: list[dict[str, Any]], records: list[dict[str, Any]], about: dict[str, Any], out: Path
) -> None:
    """annotations.jsonl and its manifest under `out`. about: who labelled, how, at what cost."""
    path = out / "annotations.jsonl"
    write_jsonl(path, records)
    manifest = {"sha256": sha256_file(path), "candidates": fingerprints(rows), "made": about}
    manifest["tally"] = annotate.tally_of(records, sum(len(row["spans"]) for row in rows))
    write_json(manifest_path(path), manifest)


def may_leave(out: Path) -> dict[str, Path]:
    """What may come with annotations.jsonl under `out`: the votes of each model and how far they agree."""
    asked = [f"{role}{again}.jsonl" for role in ("a", "b", "judge") for again in ("", "-again")]
    return {name: out / "annotation" / name for name in ("votes.jsonl", "agreement.json", *asked)}


def lend_replies(other: Path, out: Path) -> None:
    """Copy the replies another run has paid for, so that they are not asked for again; our own file stays as it is."""
    paid, own = other / "annotation" / "calls.jsonl", out / "annotation" / "calls.jsonl"
    if paid.exists() and not own.exists():
        with atomic_write(own, "wb") as f:
            f.write(paid.read_bytes())


def fingerprints(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Candidate id -> SHA-256 of what is labelled, its question and its segments."""
    segments = {row["id"]: [row["completion"][c0:c1] for c0, c1 in row["spans"]] for row in rows}
    return {row["id"]: sha256_json([row["question"], segments[row["id"]]]) for row in rows}


def _take_over(rows: list[dict[str, Any]], path: Path) -> tuple[list[dict[str, Any]], dict[str, int], dict[str, Any]]:
    """Records of a finished file for these candidates; it may hold others too, as the rows of one data set of two.

    Raises InputError unless the file is whole and has each candidate as it is here, by id and content.
    """
    manifest = read_json(manifest_path(path))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("made"), dict):
        raise InputError(f"{manifest_path(path)}: not a manifest of annotations; get the two files together again")
    if manifest.get("sha256") != sha256_file(path):
        raise InputError(f"{path}: its checksum is not that of its manifest; get the two files together again")
    labelled = manifest.get("candidates", {})
    if not isinstance(labelled, dict):
        raise InputError(f"{manifest_path(path)}: 'candidates' is no object; get the two files together again")
    for name, fingerprint in fingerprints(rows).items():
        if labelled.get(name) != fingerprint:
            what = "made from another thought" if name in labelled else "not in it"
            raise InputError(f"{path}: candidate {name!r} is {what}; use the candidates.jsonl that came with it")
    spans = {row["id"]: row["spans"] for row in rows}
    records = [record for record in read_jsonl(path, ("id", "steps")) if record["id"] in spans]
    for record in records:
        annotate.validate(record, len(spans[record["id"]]), f"{path}: {record['id']}")
    return records, annotate.tally_of(records, sum(map(len, spans.values()))), manifest["made"]


def _label_with_committee(
    rows: list[dict[str, Any]], cfg: LabelSettings, out: Path, seed: int, progress: Callable[[int], None]
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(records, tally, what the manifest says about the making)."""
    stop = threading.Event()
    clients = cfg.clients(endpoints(cfg), stop)
    folder = out / "annotation"
    with Ledger(folder / "calls.jsonl", cfg.budget_usd, cfg.budget_tokens, stop) as ledger:
        before = len(ledger.replies)
        chats = _chats(cfg, seed, ledger, clients)
        panel = committee.Committee(chats["a"], chats.get("b"), chats.get("judge"), committee.Prompts.load(PROMPTS))
        panel.add(rows)
        panel.prepare(cfg.annotate_concurrency, stop, progress)
        committee.check_usable(panel.outcomes)
        cost = {"usd": round(ledger.usd, 6), "tokens": ledger.tokens}
        new_calls = len(ledger.replies) - before
        dialects = {role: dataclasses.asdict(chat.dialect) for role, chat in chats.items()}
    records, tally = annotate.annotate(rows, panel)
    _write_agreement(list(panel.traces.values()), folder)
    about = {role: str(endpoint) for role, endpoint in endpoints(cfg).items()} | {"annotator": "committee"}
    about |= {"prompts": {name: sha256_file(PROMPTS / name) for name in committee.FILES}, "dialects": dialects}
    about |= {"temperature": cfg.annotate_temperature, "seed": seed, "cost": cost}
    return records, tally | dict(sorted(panel.outcomes.items())) | cost | {"new_calls": new_calls}, about


def _write_agreement(traces: list[committee.Trace], folder: Path) -> None:
    """votes.jsonl, and with two annotators agreement.json and its table, without traces that one could not label."""
    write_jsonl(
        folder / "votes.jsonl",
        (
            {"id": t.id} | {role: s and [step.as_json() for step in s] for role, s in sorted(t.votes.items())}
            for t in traces
        ),
    )
    both = [t for t in traces if t.votes.get("a") is not None and t.votes.get("b") is not None]
    if not both:
        return
    votes = {"a": [t.votes["a"] for t in both], "b": [t.votes["b"] for t in both], "final": [t.steps for t in both]}
    result = agreement.report(votes)
    write_json(folder / "agreement.json", result)
    print(agreement.table(result))


# ---------- before anything is sent


@dataclass(frozen=True)
class Estimate:
    """What one role would still have to be asked, in tokens, and its price at an endpoint.

    usd, worst: estimated and at worst; None where the server wants no key ("free") or the price list lacks its model.
    """

    role: str
    endpoint: Endpoint
    calls: int
    answered: int
    prompt: int
    reply: int
    usd: float | None
    worst: float | None

    @property
    def money(self) -> tuple[str, str]:
        """Both prices as text."""
        if self.usd is None or self.worst is None:
            return ("no price", "no price") if self.endpoint.key_env else ("free", "free")
        return f"{self.usd:.4f}", f"{self.worst:.4f}"


def estimate(rows: list[dict[str, Any]], cfg: LabelSettings, out: Path, seed: int) -> tuple[list[Estimate], str]:
    """(what each role of the committee would take, what was spent before); nothing is sent and nothing written.

    Estimated: four bytes of prompt are a token, a reply takes REPLY_TOKENS for every segment, every trace goes to the
    adjudicator, and no reply has to be asked for again. At worst: every byte is a token, and every reply is as long as
    --annotate-max-tokens allows (what the budget sets aside for a call).
    """
    prompts, paid = committee.Prompts.load(PROMPTS), out / "annotation" / "calls.jsonl"
    found = []
    with contextlib.ExitStack() as stack:
        if not paid.exists():  # a ledger opens its file, and a dry run leaves none
            paid = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "calls.jsonl"
        ledger = stack.enter_context(Ledger(paid))
        chats = _chats(cfg, seed, ledger, {})
        panel = committee.Committee(chats["a"], chats.get("b"), chats.get("judge"), prompts)
        panel.add(rows)
        for role, chat in chats.items():
            answered = prompt = reply = 0
            usd = worst = 0.0
            for trace in panel.traces.values():
                messages = _guess(prompts, trace, role)
                if chat.key(chat.body(messages)) in ledger.replies:
                    answered += 1
                    continue
                size, length = _size(messages, trace)
                prompt, reply = prompt + size, reply + length
                if chat.price:
                    usd += chat.price.usd(size, length)
                    worst += chat.price.usd(*chat.bounds(messages))
            money = (usd, worst) if chat.price else (None, None)
            calls = len(panel.traces) - answered
            found.append(Estimate(role, chat.endpoint, calls, answered, prompt, reply, *money))
        return found, ledger.left()


def price_table(rows: list[dict[str, Any]], cfg: LabelSettings, out: Path, seed: int) -> str:
    """What the committee would cost, as text: calls, tokens and price per role, as `estimate` says."""
    date, _ = cfg.price_list(endpoints(cfg))
    roles, spent = estimate(rows, cfg, out, seed)
    table = []
    for of in roles:
        calls = {"role": of.role, "model": of.endpoint.model, "calls": f"{of.calls:,}", "answered": f"{of.answered:,}"}
        tokens = {"prompt tokens": f"{of.prompt:,}", "reply tokens": f"{of.reply:,}"}
        table.append(calls | tokens | dict(zip(("USD", "at worst"), of.money, strict=True)))
    total, worst = (sum(x or 0.0 for x in of) for of in zip(*((r.usd, r.worst) for r in roles), strict=True))
    lines = [markdown([*table, {"role": "sum", "USD": f"{total:.4f}", "at worst": f"{worst:.4f}"}], missing="")]
    lines.append(f"prices of {date} ({cfg.prices}): check them; already spent: {spent}; nothing was sent")
    return "\n".join(lines)


def sizes(rows: list[dict[str, Any]], role: str) -> list[tuple[int, int]]:
    """(prompt, reply) tokens of every thought that `role` is asked about, estimated as in `estimate`."""
    prompts = committee.Prompts.load(PROMPTS)
    panel = committee.Committee(None, None, None, prompts)
    panel.add(rows)
    return [_size(_guess(prompts, trace, role), trace) for trace in panel.traces.values()]


def _size(messages: list[dict[str, str]], trace: committee.Trace) -> tuple[int, int]:
    return sum(len(m["content"].encode()) for m in messages) // 4, REPLY_TOKENS * len(trace.segments)


def _guess(prompts: committee.Prompts, trace: committee.Trace, role: str) -> list[dict[str, str]]:
    """A role's prompt; the adjudicator's if every segment is open and each annotator proposes one label for it."""
    if role != "judge":
        return prompts.first(trace)
    step = [annotate.Step(unit, ("retrieval",), (8.0,), "") for unit in trace.each_segment()]
    guessed = dataclasses.replace(trace, votes={"a": step, "b": step})
    return prompts.second_opinion(guessed, trace.each_segment())
