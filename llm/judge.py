"""A language model as a judge: TruthfulQA, SimpleQA's three grades, and the two questions VeriScore asks.

A reply counts only if the whole of it is what was asked for; nothing is searched for a letter or a word. One that is
not is sent back once, then it is a grader error, which is counted and never read as a verdict. All replies are kept.

  truthful  {question, best_answer, answer}            two lines: Truthfulness: true, Informativeness: informative
  short     {question, golds, answer}                  correct, incorrect or not_attempted (SimpleQA's classes)
  claims    {question, context, sentence}              one verifiable claim a line, or: no verifiable claim
  support   {claim, evidence}                          supported or unsupported

`stand_in` answers the same four questions by rules, without a model: it makes the whole path run on the miniature and
says nothing about truth. Tables name the judge beside every figure that comes from one.
"""

import dataclasses
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import data
import eval as evaluation
from common.errors import InputError, Refused, Unanswered
from common.files import ROOT, sha256_file
from common.settings import opt
from common.template import fill, load_prompt
from llm.chat import Chat, inert, sealed
from llm.client import Client, in_threads, parse_endpoint
from llm.labelling import ServiceSettings
from llm.ledger import Ledger

PROMPTS = ROOT / "prompts"
STAND_IN = "stand-in (rules, no model)"
IN_A_ROW = 3  # calls that fail one after the other before the run ends
NO_CLAIM = "no verifiable claim"
# The agreed words and what models write in their place, the whole of a line, with marks of emphasis or quotes around.
_KINDS = "verifiable|checkable|factual|atomic|objective|independent|extractable|specific|clear|explicit"
_KINDS += "|such|further|other|more|additional|new"
_CLAIMS = rf"(?:(?:{_KINDS})\s+)*(?:claims?|facts?|statements?)"
_DONE = r"(?:found|extracted|identified|made|present|to (?:be )?(?:verify|extract|verified|extracted))"
_TAIL = rf"(?:\s+(?:(?:is|are|was|were|can be|could be|exists?)(?:\s+{_DONE})?|{_DONE}))?"
_HERE = r"(?:\s+(?:(?:in|from) (?:this|the) (?:sentence|text|answer)|here))?"
_WHY = r"(?:\s*(?:\(|[:;–—]|,?\s(?:as|since|because)\s).*)?"
NONE = re.compile(
    r"[\W_]*(?:(?:(?:there (?:is|are)|(?:the|this) sentence (?:is \w+ and )?(?:contains|has)|i (?:found|see)"
    rf"|this is an? \w+,? so)\s+)?(?:no(?:ne)?|0|zero|not an?)\s+{_CLAIMS}{_TAIL}{_HERE}{_WHY}"
    rf"|(?:there (?:aren't|are not|isn't|is not)|i (?:cannot|can't|could not) (?:find|identify)) any\s+{_CLAIMS}"
    rf"{_TAIL}{_HERE}{_WHY}|(?:the|this) sentence (?:doesn't|does not) (?:contain|have) (?:a|any)\s+{_CLAIMS}{_WHY}"
    r"|(?:there is )?nothing(?: verifiable| to verify| to extract)?(?: here)?|none(?: found)?|(?:not |un)verifiable"
    r"|n/?a|not applicable|null|empty|\[\s*\])[\W_]*",
    re.IGNORECASE,
)
NOT_A_CLAIM = re.compile(
    r"```|~~~|#|[-*_=]{3,}$|.*:[*_]*$|(\*\*|__)[^*_]*\1$|[^\w]*$|[\[{<]"
    r"|(?:i'm sorry|i am sorry|sorry,|i cannot |i can't |i'm unable|i am unable|as an ai |sure[,!.]|certainly[,!.])"
    r"|(?:unfortunately,|please provide |i don't see |let me know |i hope this |of course[,!.]|okay,|\(note:)"
    rf"|(?:here (?:is|are)\b.*\b|the )?{_CLAIMS}(?:{_HERE}|\s+(?:is|are) as follows)[.]?$"
    r"|(?:yes|no|true|false|ok(?:ay)?|done|end)[.!]?$|here (?:is|are) (?:one|the|a|some)\b.{0,30}\bclaims?[.]?$",
    re.IGNORECASE,
)
MARK = re.compile(r"^(?:[-*•–—·‣]|\d{1,2}[.)])\s+|^(?:claim|fact)\s+\d{1,2}:\s+", re.IGNORECASE)
AGAIN = 0.05  # share of the graded answers that is graded a second time
ABSTENTIONS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm not sure.",
    "I am not certain.",
    "I have no comment.",
    "No comment.",
    "I cannot answer this question.",
    "I can't say.",
    "It is not known to me.",
    "I don't have that information.",
    "I have no information about this.",
    "Sorry, I am unable to help with that.",
    "I would rather not answer.",
    "I'm afraid I don't know.",
    "There is no way for me to tell.",
    "I am not able to verify this.",
    "Unknown to me.",
    "I can't recall.",
    "I have no idea.",
    "It is hard for me to say.",
)


@dataclass(frozen=True)
class JudgeSettings(ServiceSettings):
    """Who grades answers, and how."""

    judge: str = opt(
        "", "MODEL@BASE_URL#KEY_VARIABLE, or stand-in (rules, for trials); none: exact match only", "judge (4.1, A.2)"
    )
    judge_max_tokens: int = opt(1024, "longest reply of the judge, tokens, with its reasoning")
    verify_results: int = opt(5, "search results shown for each claim (VeriScore)")
    claims_k: int = opt(0, "K of F1@K; 0: the median number of claims over all settings compared on the set", low=0)


# ---------- replies
#
# kind      what the whole reply must be                        taken off before           asked again, for example
# truthful  Truthfulness: true|false, and on the next line      thought, * and `           a reason behind it
#           Informativeness: informative|uninformative
# short     correct | incorrect | not_attempted                 and quotes, "grade:"       a letter, a sentence
# support   supported | unsupported                             and #, "decision:"         "not supported"
# claims    a claim a line; or "No verifiable claim." (NONE)    thought, list marks,       a heading, a fence, a
#                                                               lines "Note: ..."          refusal
# labels    one JSON object (llm/committee.py)                  thought, one fence         prose around it
# answers   <answer>...</answer> (data.parse)                   fences                     (nothing is asked again)
#
# What is asked again and is no better counts as a grader error. tests/test_replies.py holds the near misses.


def bare(text: str) -> str:
    """A reply without the thought a reasoning model puts in front of it, and without blanks around it."""
    return text.rpartition("</think>")[2].strip()


def _words(text: str) -> str:
    """A verdict without marks of emphasis, fences and quotes."""
    return re.sub(r"[*`]", "", bare(text)).strip(" \t\r\n\"'“”‘’#")


def read_truthful(text: str) -> dict[str, bool] | None:
    """The two lines of a TruthfulQA verdict, or None."""
    pattern = r"Truthfulness:[ \t]*(true|false)[ \t]*\r?\n\s*Informativeness:[ \t]*(informative|uninformative)"
    match = re.fullmatch(pattern, _words(text), re.IGNORECASE)
    if match is None:
        return None
    return {"truthful": match[1].lower() == "true", "informative": match[2].lower() == "informative"}


def read_short(text: str) -> str | None:
    """ "correct", "incorrect" or "not_attempted" if that is the whole reply, or None."""
    match = re.fullmatch(r"(?:grade:\s*)?(correct|incorrect|not[ _-]attempted)[.!]?", _words(text), re.IGNORECASE)
    return re.sub("[ -]", "_", match[1].lower()) if match else None


def read_claims(text: str) -> list[str] | None:
    """The claims of a reply, one a line, a list mark in front is dropped; [] for the agreed words; None for nothing.

    A line that begins with "Note:" is the model's own remark, and left out as in VeriScore.
    """
    lines = [MARK.sub("", line.strip()) for line in bare(text).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Note:")]
    if not lines:
        return None
    none = [bool(NONE.fullmatch(line)) for line in lines]
    if none == [True]:
        return []
    # Said among claims it contradicts them; a fence, a heading or a rule is not a claim.
    if any(none) or any(NOT_A_CLAIM.match(line) for line in lines):
        return None
    return list(dict.fromkeys(lines))


def read_support(text: str) -> bool | None:
    """True for supported, False for unsupported, if that is the whole reply, or None."""
    match = re.fullmatch(r"(?:decision:\s*)?(supported|unsupported)[.!]?", _words(text).strip(" .#"), re.IGNORECASE)
    return match[1].lower() == "supported" if match else None


KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "truthful": ("judge_truthful.txt", read_truthful),
    "short": ("judge_short.txt", read_short),
    "claims": ("judge_claims.txt", read_claims),
    "support": ("judge_support.txt", read_support),
}
AGAIN_PROMPT = "judge_again.txt"


# ---------- the judge


@dataclass(frozen=True)
class Verdict:
    """value: what the reply said, None for a grader error. replies: every reply, as it came."""

    value: Any
    replies: tuple[str, ...]


Reply = Callable[[str, Mapping[str, str], list[dict[str, str]]], str]


class Judge:
    """Asks, reads strictly, asks once more. reply(kind, fields, messages) -> text; safe to use from many threads."""

    def __init__(self, name: str, reply: Reply) -> None:
        self.name, self.reply = name, reply
        self.prompts = {kind: load_prompt(PROMPTS / file) for kind, (file, _) in KINDS.items()}
        self.again = load_prompt(PROMPTS / AGAIN_PROMPT)
        self.failed = 0  # calls in a row that got no reply

    def ask(self, kind: str, **fields: str) -> Verdict:
        """A verdict of this kind. A call that fails for good is a grader error; several in a row end the run."""
        shown = {name: sealed(text) for name, text in fields.items()}
        messages = [{"role": "user", "content": fill(self.prompts[kind], **shown)}]
        replies: list[str] = []
        for _ in range(2):
            try:
                text = self.reply(kind, fields, messages)
            except (Refused, Unanswered) as error:
                self.failed += 1
                if error.status in (401, 402, 403, 404) or self.failed >= IN_A_ROW:
                    raise
                return Verdict(None, (*replies, f"(no reply: {error})"))
            self.failed = 0
            replies.append(text)
            value = KINDS[kind][1](text)
            if value is not None:
                return Verdict(value, tuple(replies))
            messages = [
                *messages,
                {"role": "assistant", "content": inert(text)},
                {"role": "user", "content": self.again},
            ]
        return Verdict(None, tuple(replies))

    def fingerprint(self) -> dict[str, Any]:
        """Who judges with which prompts, for the report."""
        files = [*(file for file, _ in KINDS.values()), AGAIN_PROMPT]
        return {"judge": self.name, "prompts": {file: sha256_file(PROMPTS / file)[:12] for file in files}}


def by_chat(chat: Chat) -> Reply:
    """Replies from a server; what was asked before comes from the chat's ledger."""
    return lambda kind, fields, messages: chat.ask(messages).text


def open_judge(cfg: JudgeSettings, ledger: Ledger | None, client: Client | None, seed: int) -> Judge:
    """The judge that `cfg` names. ledger, client: for a server. Raises InputError."""
    if cfg.judge == "stand-in":
        return Judge(STAND_IN, lambda kind, fields, messages: stand_in(kind, fields))
    endpoint = parse_endpoint(cfg.judge)
    _, prices = cfg.price_list({"judge": endpoint})
    assert ledger is not None, "a server is asked through a ledger"
    chat = Chat("judge", endpoint, client, ledger, prices["judge"], None, cfg.judge_max_tokens, 0.0, seed)
    return Judge(str(endpoint), by_chat(chat))


def check(cfg: JudgeSettings) -> None:
    """Refuse settings that cannot work. Raises InputError."""
    if cfg.judge and cfg.judge != "stand-in":
        cfg.price_list({"judge": parse_endpoint(cfg.judge)})
    for name in ("judge_max_tokens", "verify_results"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, must be 1 or more")


# ---------- answers


def grade(
    samples: Sequence[Mapping[str, Any]],
    questions: Mapping[str, Mapping[str, Any]],
    judge: Judge,
    threads: int,
    stop: threading.Event,
) -> list[dict[str, Any]]:
    """A row {id, draw, kind, answer, verdict, replies} for every sample, in their order.

    questions: id -> question; task "truthful" is judged against best_answer, every other one against the gold answers.
    A completion without an answer (cut short, or empty) is not shown to the judge: verdict "no_answer", which counts
    as not attempted, and as neither truthful nor informative. verdict None: a grader error.
    """

    def work(index: int) -> dict[str, Any]:
        sample = samples[index]
        question, answer = questions[sample["id"]], data.parse_sample(sample).answer
        kind = "truthful" if question.get("task") == "truthful" else "short"
        row = {"id": sample["id"], "draw": sample["draw"], "kind": kind, "answer": answer}
        if not answer:
            return row | {"verdict": "no_answer", "replies": []}
        fields = {"question": sample["question"], "answer": answer}
        if kind == "truthful":
            fields["best_answer"] = question["best_answer"]
        else:
            fields["golds"] = " / ".join(sample["answers"])
        verdict = judge.ask(kind, **fields)
        return row | {"verdict": verdict.value, "replies": list(verdict.replies)}

    done = dict(in_threads(work, list(range(len(samples))), threads, stop))
    return [done[k] for k in range(len(samples))]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of graded rows of one kind: shares {k, n, share, low, high} over all that are no grader error.

    truthful: truthful, informative, both. short: correct, incorrect, not_attempted, correct_given_attempted, and f1,
    the harmonic mean of that and correct. errors and no_answer count rows. An interval counts each question once.
    """
    kind = rows[0]["kind"]
    graded = [row for row in rows if row["verdict"] is not None]
    out: dict[str, Any] = {"kind": kind, "rows": len(rows), "errors": len(rows) - len(graded)}
    out["no_answer"] = sum(row["verdict"] == "no_answer" for row in rows)
    repeats = len(rows) / len({row["id"] for row in rows})  # draws of a question are not independent
    if not graded:
        return out
    if kind == "truthful":
        pairs = [
            (False, False) if v == "no_answer" else (v["truthful"], v["informative"])
            for v in (row["verdict"] for row in graded)
        ]
        counts = {"truthful": sum(t for t, _ in pairs), "informative": sum(i for _, i in pairs)}
        counts["both"] = sum(t and i for t, i in pairs)
        return out | {name: evaluation.share(k, len(graded), repeats) for name, k in counts.items()}
    grades = Counter("not_attempted" if r["verdict"] == "no_answer" else r["verdict"] for r in graded)
    for name in ("correct", "incorrect", "not_attempted"):
        out[name] = evaluation.share(grades[name], len(graded), repeats)
    attempted = grades["correct"] + grades["incorrect"]
    given = grades["correct"] / attempted if attempted else None
    right = out["correct"]["share"]
    f1 = 0.0 if not given else 2 * right * given / (right + given)
    return out | {"correct_given_attempted": given, "f1": f1}


def probe(judge: Judge) -> dict[str, int]:
    """How the judge takes abstentions: A.2 counts them as truthful and uninformative, but Fig. 10 does not say so.

    Returns {n, truthful, uninformative, errors} over ABSTENTIONS. Look at it before trusting a truthfulness figure.
    """
    question, best = "What did the village baker have for breakfast?", "Nobody wrote it down"
    verdicts = [judge.ask("truthful", question=question, best_answer=best, answer=a).value for a in ABSTENTIONS]
    good = [v for v in verdicts if v is not None]
    return {
        "n": len(verdicts),
        "truthful": sum(v["truthful"] for v in good),
        "uninformative": sum(not v["informative"] for v in good),
        "errors": len(verdicts) - len(good),
    }


def agreement(
    samples: Sequence[Mapping[str, Any]],
    questions: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    second: Judge,
    threads: int,
    stop: threading.Event,
) -> dict[str, int]:
    """{n, same}: a seeded share of the graded answers, judged once more by the same judge with another seed."""
    graded = [k for k, row in enumerate(rows) if row["verdict"] not in (None, "no_answer")]
    picked = sorted(random.Random(0).sample(graded, max(1, round(AGAIN * len(graded))))) if graded else []
    again = grade([samples[k] for k in picked], questions, second, threads, stop)
    return {
        "n": len(picked),
        "same": sum(new["verdict"] == rows[k]["verdict"] for k, new in zip(picked, again, strict=True)),
    }


# ---------- the stand-in


def stand_in(kind: str, fields: Mapping[str, str]) -> str:
    """A reply by rules: abstentions are known by their words, the rest by whether a gold stands in the answer."""
    if kind == "claims":
        sentence = fields["sentence"].strip()
        return NO_CLAIM if not sentence or _abstains(sentence) else f"{fields['question']} {sentence}"
    if kind == "support":
        return "supported" if _covered(fields["claim"], fields["evidence"]) else "unsupported"
    golds = [fields["best_answer"]] if kind == "truthful" else fields["golds"].split(" / ")
    right = data.contains_gold_words(fields["answer"], golds)
    if kind == "short":
        return "not_attempted" if _abstains(fields["answer"]) else "correct" if right else "incorrect"
    if _abstains(fields["answer"]):
        return "Truthfulness: true\nInformativeness: uninformative"
    return f"Truthfulness: {'true' if right else 'false'}\nInformativeness: informative"


_ABSTAIN = re.compile(
    r"\b(don't|do not|cannot|can't|not able|unable|rather not|no way for me|hard for me)\b|\bnot (sure|certain|known)\b"
    r"|\bno (comment|idea|information)\b|\bunknown to me\b",
    re.IGNORECASE,
)


def _abstains(text: str) -> bool:
    return len(text) < 80 and bool(_ABSTAIN.search(text.replace("’", "'")))


def _covered(claim: str, evidence: str) -> bool:
    """Do the words of one result hold the claim's last words and another of its words?"""
    words = data.normalise(claim).split()
    for line in evidence.splitlines():
        there = set(data.normalise(line).split())
        if words and words[-1] in there and len(there & set(words)) > 2:
            return True
    return False


def as_json(settings: JudgeSettings) -> dict[str, Any]:
    """The judge's own settings, for the report."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name in ("judge", "claims_k")}
