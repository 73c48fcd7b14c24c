"""What a run is refused for before its processes join and a model is loaded: stages, weights, questions, lengths.

pipeline/config.py looks at settings alone, pipeline/room.py at the GPU. Here the tokenizer and the questions are read:
once, by the first process, since a long file takes a second or two. The dry run says the same about lengths, from the
same function.
"""

import socket
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import data
from common import hub
from common.errors import InputError, ServiceError
from common.files import ROOT
from common.template import load_prompt
from common.tokens import encode
from llm import labelling
from llm.client import parse_endpoint
from pipeline import room
from pipeline.config import MEASURED, RunConfig
from pipeline.run import Question, Run, too_long

MERGES = 16  # tokens that a question may add by breaking merges of the text around it; generous


@dataclass(frozen=True)
class Prompt:
    """The longest of some prompts: its tokens, and a name for it in a sentence."""

    tokens: int
    what: str


def longest_prompt(run: Run, files: Mapping[str, Sequence[Question]], limit: int) -> Prompt:
    """The longest prompt of all questions, over both modes. files: path -> its questions.

    Questions are counted only where the limit could matter: a token of a byte-level tokenizer has at least one byte, so
    the bytes of the longest question bound what it adds. With room for that the result is this bound.
    """

    def tokens(question: str) -> int:
        return max(len(encode(run.tokenizer, run.prompt(run.turn(question), mode))) for mode in ("on", "off"))

    found = Prompt(0, "")
    for path, questions in files.items():
        size = max(len(run.text(q["question"]).encode()) for q in questions)
        bound = tokens("?") + size + MERGES
        if bound + limit <= run.room:
            found = max(found, Prompt(bound, f"any prompt of {path}"), key=lambda p: p.tokens)
            continue

        def length(q: Question) -> int:
            return tokens(q["question"])

        longest = max(questions, key=length)
        here = Prompt(length(longest), f"the prompt of question {longest['id']} of {path}")
        found = max(found, here, key=lambda p: p.tokens)
    return found


def miniature(cfg: RunConfig) -> str:
    """What to know about a model of mini/ that is used with another prompt than it was made for, "" elsewhere."""
    ours = Path(cfg.model).resolve().parent == ROOT / "mini"
    if not ours or load_prompt(cfg.prompt) == load_prompt(ROOT / "prompts" / "plain.txt"):
        return ""
    return f"{cfg.model} knows the prompt and the lengths of configs/mini.json alone: add --config configs/mini.json"


def check_lengths(run: Run, wanted: Sequence[str], files: Mapping[str, Sequence[Question]]) -> None:
    """Raise InputError if a prompt leaves no room for the longest completion of a wanted stage (none: of all).

    files: path -> questions, of at least the files that those stages draw for.
    """
    cfg = run.cfg
    limits = {
        "sample": ("--draw-max-new", cfg.draw_max_new, [cfg.questions]),
        "eval": ("--max-new", cfg.max_new, run.eval_sets.values()),
    }
    for stage, (flag, limit, paths) in limits.items():
        if not wanted or stage in wanted:
            prompt = longest_prompt(run, {path: files[path] for path in paths}, limit)
            if told := too_long(flag, limit, prompt.tokens, prompt.what, run.room):
                raise InputError("; ".join(part for part in (told, miniature(cfg)) if part))


def check_listens(url: str) -> None:
    """Raise ServiceError if the machine of a URL refuses connections to its port.

    Later a client is patient, since servers are restarted; at the start nobody should wait for one that is not there.
    What cannot be known at once, behind a proxy or a slow network, is left to the client.
    """
    at = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((at.hostname, at.port or {"http": 80}.get(at.scheme, 443)), timeout=3).close()
    except ConnectionRefusedError:
        raise ServiceError(f"{url}: no server listens there; start it, then run the same command again") from None
    except OSError:
        pass


def check_servers(run: Run, wanted: Sequence[str]) -> None:
    """Look for the servers of the stage that comes first or that is named, unless its results or replies are there."""
    cfg, out = run.cfg, Path(run.cfg.out)
    drawn = {"sample": [out / "samples.jsonl"]}
    drawn |= {"eval": [run.samples(name, variant) for name in run.eval_sets for variant in run.variants]}
    first = [name for name in drawn if name in wanted] if wanted else ["sample"]
    if cfg.backend == "openai" and not all(path.exists() for name in first for path in drawn[name]):
        check_listens(cfg.base_url)
    if "annotate" in wanted and cfg.annotator == "committee" and not (out / "annotation/calls.jsonl").exists():
        for endpoint in labelling.endpoints(cfg).values():
            check_listens(endpoint.base_url)
    if "judge" in wanted and cfg.judge not in ("", "stand-in") and not (out / "judge/calls.jsonl").exists():
        check_listens(parse_endpoint(cfg.judge).base_url)


def check(run: Run, known: Sequence[str], wanted: Sequence[str], redo: Sequence[str]) -> None:
    """Raise InputError at the first thing that would stop the run later. known: the names of all stages."""

    def due(*names: str) -> bool:
        return not wanted or any(name in wanted for name in names)

    if unknown := [name for name in (*wanted, *redo) if name not in known]:
        raise InputError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(known)}")
    if run.ranks.rank:
        return  # the first process speaks for all
    check_servers(run, wanted)
    if due("train") or room.stages_that_hold(run.cfg, wanted):
        folder = run.source.folder
        if absent := hub.lacking(folder):
            raise InputError(f"{folder / absent}: no such file; fetch the model again, or give another --model")
    paths = [*[run.cfg.questions] * due("sample", "scores"), *[*run.eval_sets.values()] * due(*MEASURED)]
    check_lengths(run, wanted, {path: data.load_questions(path)[0] for path in paths})
