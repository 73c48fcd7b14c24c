"""Long answers, claim by claim: extract what can be checked, look for evidence, verify, F1@K (VeriScore; A.2).

  answer -> sentences -> claims of each (a judge reads it with its neighbours) -> distinct claims of the answer
         -> search results for each claim -> supported or not (a judge) -> P = S / |C|, R = min(S / K, 1), F1@K

K is the median number of claims over all answers compared on a set, so F1@K changes when another setting is added: it
is stored and printed with every figure, and can be fixed. Without a search engine only claims are counted. Rows carry
the fields of VeriScore's own files (question, response, model, prompt_source, claim_list, all_claims,
claim_snippets_dict, claim_verification_result), so its files can be scored here and ours there.

Left out: fine-tuned extractors and verifiers, the three-way label.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import data
import eval as evaluation
from llm import retrieve
from llm.client import in_threads
from llm.judge import Judge

BEFORE, AFTER = 3, 1  # neighbouring sentences shown with the one whose claims are wanted
SUPPORTED, UNSUPPORTED = "supported", "unsupported"
# A sentence ends at . ! ? before white space and a capital, a digit or a quote, or at a line end; not after an initial
# or one of these.
_ABBREVIATED = re.compile(
    r"^\d{1,2}\.$|(?:^|[\s(.])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|approx|No|Vol|e\.g|i\.e|cf|ca|c)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of an answer, blank ones left out; list marks and headings stay with their line."""
    out = []
    for line in text.splitlines():
        start = 0
        for match in re.finditer(r"[.!?][\"'”’)]*(?=\s+[\"'“‘(]?[A-Z0-9])", line):
            if not _ABBREVIATED.search(line[start : match.end()]):
                out.append(line[start : match.end()])
                start = match.end()
        out.append(line[start:])
    return [s.strip() for s in out if re.search(r"\w", s)]


def extract(
    samples: Sequence[Mapping[str, Any]], judge: Judge, model: str, threads: int, stop: threading.Event
) -> list[dict[str, Any]]:
    """A row for every sample: its answer, the claims of each sentence, the distinct claims of all, how many errors.

    A completion without an answer has no claims. abstained: nothing in the answer can be checked.
    """
    answers = [data.parse_sample(sample).answer for sample in samples]
    parts = [sentences(answer) for answer in answers]
    jobs = [(row, k) for row, of in enumerate(parts) for k in range(len(of))]

    def work(job: tuple[int, int]) -> tuple[list[str] | None, list[str]]:
        row, k = job
        near = parts[row][max(0, k - BEFORE) : k + AFTER + 1]
        fields = {"question": samples[row]["question"], "context": " ".join(near), "sentence": parts[row][k]}
        verdict = judge.ask("claims", **fields)
        return verdict.value, list(verdict.replies)

    found = dict(in_threads(work, jobs, threads, stop))
    rows = []
    for number, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        each = [found[number, k] for k in range(len(parts[number]))]
        claims = list(dict.fromkeys(claim for value, _ in each for claim in value or []))
        row = {"id": sample["id"], "draw": sample["draw"], "question": sample["question"], "response": answer}
        row |= {"model": model, "prompt_source": "LongFact", "claim_list": [value or [] for value, _ in each]}
        row |= {"all_claims": claims, "abstained": not claims, "errors": sum(value is None for value, _ in each)}
        rows.append(row | {"replies": [replies for _, replies in each]})
    return rows


def verify(
    rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, list[retrieve.Result]],
    judge: Judge,
    threads: int,
    stop: threading.Event,
) -> list[dict[str, Any]]:
    """The rows with evidence and a verdict for every claim. results: claim -> search results."""
    jobs = [(k, claim) for k, row in enumerate(rows) for claim in row["all_claims"]]

    def work(job: tuple[int, str]) -> tuple[bool | None, list[str]]:
        evidence = retrieve.as_text(results[job[1]])
        verdict = judge.ask("support", claim=job[1], evidence=evidence)
        return verdict.value, list(verdict.replies)

    found = dict(in_threads(work, jobs, threads, stop))
    out = []
    for k, row in enumerate(rows):
        verdicts = []
        for claim in row["all_claims"]:
            value, replies = found[k, claim]
            label = "error" if value is None else SUPPORTED if value else UNSUPPORTED
            entry = {"claim": claim, "search_results": retrieve.as_text(results[claim])}
            verdicts.append(entry | {"verification_result": label, "replies": replies})
        snippets = {claim: results[claim] for claim in row["all_claims"]}
        errors = row["errors"] + sum(v["verification_result"] == "error" for v in verdicts)
        out.append({**row, "claim_snippets_dict": snippets, "claim_verification_result": verdicts, "errors": errors})
    return out


def median_claims(rows: Sequence[Mapping[str, Any]]) -> int:
    """K: the upper median of the number of claims over the answers that have any; at least 1."""
    # PAPER: "the median number of extracted facts".
    # HERE:  the upper median, over answers with at least one claim, of all settings compared on the set.
    # WHY:   it is what VeriScore's own program does; an answer that abstains says nothing about how long answers are.
    counts = sorted(len(row["all_claims"]) for row in rows if row["all_claims"])
    return counts[len(counts) // 2] if counts else 1


def f1_at_k(supported: int, claims: int, k: int) -> float:
    """F1@K of one answer (A.2)."""
    assert 0 <= supported <= claims and k > 0, (supported, claims, k)
    if supported == 0:
        return 0.0
    precision, recall = supported / claims, min(supported / k, 1.0)
    return 2 * precision * recall / (precision + recall)


def score(row: Mapping[str, Any], k: int) -> float | None:
    """F1@K of a row; None when its claims were not verified. A grader error is a claim that is not supported."""
    if "claim_verification_result" not in row:
        return None
    verdicts = row["claim_verification_result"]
    return f1_at_k(sum(v["verification_result"] == SUPPORTED for v in verdicts), len(row["all_claims"]), k)


def summary(rows: Sequence[Mapping[str, Any]], k: int) -> dict[str, Any]:
    """{answers, k, claims, claims_median, f1, low, high, precision, errors, abstained}; f1 None without evidence.

    claims: mean number a answer. f1 and its 95 % interval (normal, over questions) count an answer without claims as 0.
    """
    counts = [len(row["all_claims"]) for row in rows]
    values = [score(row, k) for row in rows]
    out = {"answers": len(rows), "k": k, "claims": float(np.mean(counts)), "claims_median": float(np.median(counts))}
    out |= {"errors": sum(row["errors"] for row in rows), "abstained": sum(count == 0 for count in counts)}
    out |= {"f1": None, "low": None, "high": None, "precision": None}
    if all(value is not None for value in values):
        by_question: dict[str, list[float]] = {}
        for row, value in zip(rows, values, strict=True):
            by_question.setdefault(row.get("id", row["question"]), []).append(value)
        means = [float(np.mean(of)) for of in by_question.values()]
        mean = float(np.mean(values))
        half = evaluation.Z95 * float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else None
        verdicts = [v["verification_result"] for row in rows for v in row["claim_verification_result"]]
        out["f1"] = mean
        out["low"], out["high"] = (None, None) if half is None else (max(0.0, mean - half), min(1.0, mean + half))
        out["precision"] = verdicts.count(SUPPORTED) / len(verdicts) if verdicts else None
    return out
