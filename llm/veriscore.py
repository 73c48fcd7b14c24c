"""Long answers, claim by claim: extract what can be checked, look for evidence, verify, F1@K (VeriScore; A.2).

  answer -> sentences -> claims of each (a judge reads it with its neighbours) -> distinct claims of the answer
         -> search results for each claim -> supported or not (a judge) -> P = S / |C|, R = min(S / K, 1), F1@K

K is the median number of claims over all answers compared on a set, so F1@K changes when another setting is added: it
is stored and printed with every figure, and can be fixed. Without a search engine only claims are counted.

Rows carry the fields of VeriScore's own files (question, response, model, prompt_source, abstained, claim_list,
all_claims, claim_search_results, claim_verification_result), so its programs go on with ours and `load` takes theirs:

  python -m llm.veriscore FILE [FILE ...]     F1@K of verified rows, theirs or ours; K for each prompt_source, as there

Left out: fine-tuned extractors and verifiers. Of the three-way label only "supported" counts, as there.
"""

import argparse
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import data
import eval as evaluation
from common.endings import program
from common.errors import InputError
from common.files import read_jsonl
from common.table import markdown
from llm import retrieve
from llm.client import in_threads
from llm.judge import Judge

BEFORE, AFTER = 3, 1  # neighbouring sentences shown with the one whose claims are wanted
SUPPORTED, UNSUPPORTED = "supported", "unsupported"
NONE_THERE = "No verifiable claim."  # what VeriScore's programs write for no claim
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
        found_for = {claim: results[claim] for claim in row["all_claims"]}
        errors = row["errors"] + sum(v["verification_result"] == "error" for v in verdicts)
        out.append({**row, "claim_search_results": found_for, "claim_verification_result": verdicts, "errors": errors})
    return out


def load(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a VeriScore file, of its claims, its evidence or its verdicts, or of ours, as `summary` takes them.

    A row that abstained has no claims there; [None] stands for a sentence without any, "No verifiable claim." for an
    answer without any. claim_snippets_dict is the evidence's name in its README. Raises InputError naming the line.
    """
    return [row | _normal(row) for row in read_jsonl(path, ("response", "model"), _normal)]


def _normal(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that differ between VeriScore's programs, in one form. Raises InputError."""
    abstained, listed = row.get("abstained", False), row.get("claim_list", [])
    for name in ("question", "response", "model", "prompt_source"):
        if not isinstance(row.get(name, ""), str):
            raise InputError(f"field {name!r} must be a text, not {row[name]!r}; repair this row")
    if "id" in row and (isinstance(row["id"], bool) or not isinstance(row["id"], str | int)):
        raise InputError(f"field 'id' must be a text, not {row['id']!r}; repair this row or leave it out")
    if type(row.get("errors", 0)) is not int or row.get("errors", 0) < 0:
        raise InputError(f"field 'errors' must be a whole number, not {row['errors']!r}; repair this row")
    if not isinstance(abstained, bool):
        raise InputError(f"field 'abstained' must be true or false, not {abstained!r}; repair this row")
    if not isinstance(listed, list) or not all(isinstance(of, list) for of in listed):
        raise InputError("field 'claim_list' must hold a list of claims for each sentence; repair this row")
    each = [[claim for claim in of if claim is not None and claim != NONE_THERE] for of in listed]
    claims = row.get("all_claims")
    if claims is None and not abstained and "claim_list" not in row:
        raise InputError("neither 'all_claims' nor 'claim_list' is there; run VeriScore's extract_claims first")
    if claims is None:
        claims = list(dict.fromkeys(claim for of in each for claim in of))
    if not isinstance(claims, list) or not all(isinstance(claim, str) for claim in [*claims, *sum(each, [])]):
        raise InputError("field 'all_claims' must be a list of texts; repair this row")
    out = {"claim_list": each, "all_claims": [c for c in claims if c != NONE_THERE], "abstained": abstained}
    results = row.get("claim_search_results", row.get("claim_snippets_dict")) or {}  # [] where there are no claims
    if not isinstance(results, dict):
        raise InputError("field 'claim_search_results' must be an object of claims; repair this row")
    out |= {"claim_search_results": results, "question": row.get("question", "")}
    verdicts = row.get("claim_verification_result", [] if not out["all_claims"] else None)
    if verdicts is None:
        if "claim_verification_result" in row:
            raise InputError("field 'claim_verification_result' is null; repair this row or leave the field out")
        return out | {"errors": row.get("errors", 0)}
    if not isinstance(verdicts, list) or not all(isinstance(v, dict) and "verification_result" in v for v in verdicts):
        raise InputError("field 'claim_verification_result' must be a list of verdicts; repair this row")
    if odd := [v for v in (v["verification_result"] for v in verdicts) if v is not None and not isinstance(v, str)]:
        raise InputError(f"a verification_result must be a text or null, not {odd[0]!r}; repair this row")
    if len(verdicts) > len(out["all_claims"]):
        raise InputError(f"{len(verdicts)} verdicts on {len(out['all_claims'])} claims; repair this row")
    unread = sum(v["verification_result"] is None for v in verdicts)
    return out | {"claim_verification_result": verdicts, "errors": row.get("errors", unread)}


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


def scores(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{prompt_source, model, answers, K, claims, F1@K} for each prompt_source and model; K is of the prompt_source."""
    out = []
    for source in dict.fromkeys(row.get("prompt_source", "") for row in rows):
        of = [row for row in rows if row.get("prompt_source", "") == source]
        k = median_claims(of)
        for model in dict.fromkeys(row["model"] for row in of):
            found = summary([row for row in of if row["model"] == model], k)
            f1 = None if found["f1"] is None else f"{found['f1']:.3f}"
            row = {"prompt_source": source, "model": model, "answers": found["answers"], "K": k}
            out.append(row | {"claims": f"{found['claims']:.1f}", "F1@K": f1})
    return out


@program
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    print(markdown(scores([row for path in parser.parse_args(argv).files for row in load(path)])))


if __name__ == "__main__":
    sys.exit(main())
