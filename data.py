"""Text on its way to training rows: questions, prompts, parsing, exact match, candidates, token weights, packing.

Everything is measured on the sampled ids. A completion is never rendered through a chat template again and its segments
are never tokenised on their own: the characters of every token come from the token's own bytes (`token_offsets`), and a
token takes the weight of the segment that holds its first character. Left out: few-shot prompts, tools, tokenizers that
are not byte-level BPE.
"""

import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common import verifier
from common.errors import InputError
from common.files import each_row, read_jsonl
from common.rows import are_ids, are_labels, are_weights
from common.template import TAGS, opens_thought
from common.tokens import Span, token_offsets

# ---------- questions, prompts


TASKS = ("short", "truthful", "long")  # what a set of questions asks for; none said: short


def load_questions(path: str | Path, drop_repeated: bool = False) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Questions {id, question, answers: [str], ...} of a JSONL file, and a tally of what was found.

    drop_repeated: keep the first of questions that are equal once normalised. For training (3.1.1 removes duplicates);
    a test set keeps its published size. A question of task "long" (a text is asked for) may have no answers.
    Raises InputError at an id seen before, an empty question or answer list, a task that differs, or no questions.
    """
    ids: set[str] = set()
    tasks: dict[str, str] = {}

    def check(row: dict[str, Any]) -> None:
        _check_id(row["id"], ids)
        if not isinstance(row.get("dataset", ""), str):
            raise InputError("field 'dataset' must be a text; repair it or leave it out")
        task = row.get("task", TASKS[0])
        if task not in TASKS or tasks.setdefault("first", task) != task:
            raise InputError(f"field 'task' is {task!r}; it must be one of {', '.join(TASKS)}, the same in all rows")
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise InputError("field 'question' must be a text that is not empty; fill it in or delete this line")
        if task == "truthful" and not (isinstance(row.get("best_answer"), str) and row["best_answer"].strip()):
            raise InputError("field 'best_answer' must be a text, with which a judge compares; fill it in")
        answers = row["answers"]
        if answers == [] and task == "long":
            return  # judged claim by claim
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise InputError("field 'answers' must be a list of one or more texts; fill it in or delete this line")

    rows = read_jsonl(path, ("id", "question", "answers"), check)
    if not rows:
        raise InputError(f"{path}: holds no question; put one JSON object a line in it")
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(normalise(row["question"]) or row["question"], row)
    kept = list(first.values()) if drop_repeated else rows
    unmatchable = sum(not normalise(a) for row in kept for a in row["answers"])
    repeated = len(rows) - len(first)
    return kept, {"questions": len(kept), "repeated questions": repeated, "golds that never match": unmatchable}


def _check_id(value: Any, seen: set[str]) -> None:
    """Raises InputError unless `value` is a new non-empty text; adds it to `seen`."""
    if not isinstance(value, str) or not value:
        raise InputError(f"field 'id' must be a text that is not empty, not {value!r}; give every row its own")
    if value in seen:
        raise InputError(f"id {value!r} was used on an earlier line; give every row its own")
    seen.add(value)


# ---------- tokens and characters


def count_think_tokens(offsets: Sequence[Span], span: Span) -> int:
    """How many tokens have their first character in `span`."""
    return sum(span[0] <= start < span[1] for start, _ in offsets)


def token_steps(offsets: Sequence[Span], spans: Sequence[Sequence[int]]) -> np.ndarray:
    """(T,) int64: the index of the span that holds each token's FIRST character, -1 outside all spans.

    offsets: T character ranges from `token_offsets`. spans: ascending, disjoint ranges [c0, c1).
    A token such as ".\\n\\nSo" may lie in two segments; the rule gives every token to exactly one.
    """
    edges = np.array(spans, dtype=np.int64).reshape(-1)  # c0 c1 c0 c1 ...: odd insertion points lie inside a span
    assert (np.diff(edges) >= 0).all(), f"spans overlap or run backwards: {spans}"
    position = np.searchsorted(edges, np.array([start for start, _ in offsets], dtype=np.int64), side="right")
    return np.where(position % 2 == 1, position // 2, -1)


def token_weights(offsets: Sequence[Span], spans: Sequence[Sequence[int]], w: Sequence[float]) -> Tensor:
    """(T,) fp32: each token takes the weight of its step (`token_steps`), 1 outside all of them (Eq. 9)."""
    assert len(spans) == len(w), (len(spans), len(w))
    table = np.array([*w, 1.0], dtype=np.float32)  # index -1 is the 1
    return torch.from_numpy(table[token_steps(offsets, spans)])


# ---------- parsing


PLACEHOLDER = "your answer"  # what prompts/factual.txt writes between its answer tags
FENCE = re.compile(r"^[ \t]*```\w*[ \t]*$", re.MULTILINE)  # the first or last line of a fenced block
_THOUGHT = r"<think>((?:(?!</?think>).)*)</think>"
TWICE = re.compile(rf"\s*{_THOUGHT}\s*{_THOUGHT}(?!.*</?think>)", re.DOTALL)
USABLE = ("ok", "twice", "leading", "trailing")  # outcomes whose thought and answer are beyond doubt


@dataclass(frozen=True)
class Parsed:
    """What `parse` found in one completion."""

    outcome: str
    thought: str  # completion[span[0]:span[1]], "" without a thought
    answer: str  # stripped; "" where none can be taken
    span: Span | None  # where the thought is; None without one
    tagged: bool  # the answer stood in <answer>...</answer>; else it is all that follows </think>


def parse_sample(sample: Mapping[str, Any]) -> Parsed:
    """`parse` for a sample record, whose prompt says where the thought starts."""
    opened = sample["mode"] == "on" and opens_thought(sample["prompt"])
    return parse(sample["text"], sample["mode"] == "on", sample["finish"] == "stop", opened)


def parse(completion: str, thinking: bool = True, finished: bool = True, opened: bool = False) -> Parsed:
    """Split a completion into thought and answer. The outcome is the first line of this table that holds:

    outcome      when                                                                   answer
    no_thought   it ended by itself, without any </think>; no thought is taken          ""
    no_close     no </think>, or a <think> after the last one: the thought never ended  ""
    cut          not finished, and no </answer> after the last <answer>                 ""
    placeholder  the answer is the prompt's own "your answer"                           ""
    twice        two thoughts, then one tagged answer: the model's own way, the prompt's  as below
    multiple     a tag comes twice; with thinking off, any think tag at all             as below
    no_open      </think> without <think>: the thought is all that precedes it          as below
    unclosed     <answer> without </answer> or the reverse                              the rest without the tag
    empty        the thought or the answer is blank                                     as below
    leading      text before <think>                                                    as below
    trailing     text after </answer>                                                   as below
    ok           none of these                                                          as below

    The thought runs from the first <think> to the last </think>; answer tags inside it are text. Of two thoughts in a
    row it is the first that is not blank. The answer is the content of the last <answer>...</answer> after it, else all
    that follows it: `tagged` says which. Lines that open or close a fenced block are no part of it. A thought that
    never ended is never read as an answer. thinking=False: the prompt holds a closed empty think block, the completion
    is the answer alone. finished=False: the completion ran into its length limit. opened=True: the prompt ends in
    <think> (`opens_thought`), which counts as the first one: the thought starts where the completion does.
    """
    assert thinking or not opened, "a prompt that opens the thought has thinking on"
    close = completion.rfind(TAGS[1])
    if thinking and close < 0 and finished:
        return Parsed("no_thought", "", "", None, False)
    start = completion.find(TAGS[0]) + len(TAGS[0]) if TAGS[0] in completion and not opened else 0
    if (thinking and close < 0) or completion.rfind(TAGS[0]) > close:
        span = (start, len(completion)) if thinking else None
        return Parsed("no_close", completion[start:] if thinking else "", "", span, False)
    rest = completion[close + len(TAGS[1]) if close >= 0 else 0 :]
    answer, tagged = _answer(rest)
    span = (start, close) if thinking else None
    thought = completion[start:close] if thinking else ""
    one_answer = tagged and rest.count(TAGS[2]) == rest.count(TAGS[3]) == 1
    if not finished and (TAGS[3] not in rest or rest.rfind(TAGS[2]) > rest.rfind(TAGS[3])):
        outcome, answer, tagged = "cut", "", False
    elif normalise(answer) == PLACEHOLDER:
        outcome, answer = "placeholder", ""
    elif thinking and answer and one_answer and (own := _first_of_two(completion, opened)):
        outcome, span, thought = "twice", own, completion[slice(*own)]
    elif max(completion.count(TAGS[0]) + opened, completion.count(TAGS[1]), *map(rest.count, TAGS[2:])) > 1:
        outcome = "multiple"
    elif not thinking and close >= 0:
        outcome = "multiple"
    elif thinking and not opened and TAGS[0] not in completion:
        outcome = "no_open"
    elif not tagged and (TAGS[2] in rest or TAGS[3] in rest):
        outcome = "unclosed"
    elif not answer or (thinking and not thought.strip()):
        outcome = "empty"
    elif thinking and not opened and FENCE.sub("", completion[: start - len(TAGS[0])]).strip():
        outcome = "leading"
    elif tagged and FENCE.sub("", rest[rest.rfind(TAGS[3]) + len(TAGS[3]) :]).strip():
        outcome = "trailing"
    else:
        outcome = "ok"
    return Parsed(outcome, thought, answer, span, tagged)


def _answer(rest: str) -> tuple[str, bool]:
    """The content of the last closed answer element of `rest`, else all of it without tags; which of the two."""
    opened = rest.rfind(TAGS[2], 0, max(rest.rfind(TAGS[3]), 0))
    if opened >= 0:
        begin = opened + len(TAGS[2])
        return FENCE.sub("", rest[begin : rest.find(TAGS[3], begin)]).strip(), True
    return FENCE.sub("", rest.replace(TAGS[2], " ").replace(TAGS[3], " ")).strip(), False


def _first_of_two(completion: str, opened: bool) -> Span | None:
    """Of a completion that begins with two closed thoughts, the first that is not blank; None for any other one."""
    if completion.count(TAGS[1]) != 2:
        return None  # the pattern takes its time over a long thought
    shift = len(TAGS[0]) if opened else 0
    match = TWICE.match(TAGS[0] + completion if opened else completion)
    spans = [match.span(k) for k in (1, 2) if match[k].strip()] if match else []
    return (spans[0][0] - shift, spans[0][1] - shift) if spans else None


def count_outcomes(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{"on": {outcome: completions}, "off": ...} of sample records, the commonest first: what `parse` made of them."""
    counts: dict[str, Counter[str]] = {"on": Counter(), "off": Counter()}
    for sample in samples:
        counts[sample["mode"]][parse_sample(sample).outcome] += 1
    return {mode: dict(of.most_common()) for mode, of in counts.items()}


BLANK_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")


def split_segments(text: str, start: int, end: int) -> list[Span]:
    r"""Segments of the thought text[start:end]: cut after every run of blank lines (3.1.1).

    The delimiter belongs to the segment before it. A blank piece is no segment: it goes to the one before it, at the
    beginning to the one after it. So the segments cover the thought exactly; a blank thought has none.

    >>> split_segments("<think>Hm.\n\nParis!\n</think>", 7, 20)
    [(7, 12), (12, 20)]
    """
    # PAPER: splits on "\n\n".
    # HERE:  a line of spaces or tabs is blank too, and a line may end in "\r\n".
    # WHY:   models write both; it is the same cut to a reader, and the same one where there is neither.
    cuts = [match.end() for match in BLANK_LINES.finditer(text, start, end)]
    segments: list[Span] = []
    begin = start
    for cut in cuts + [end]:
        if text[begin:cut].strip():
            segments.append((begin, cut))
        elif segments:
            segments[-1] = (segments[-1][0], cut)
        else:
            continue
        begin = cut
    return segments


# ---------- exact match

PUNCTUATION = str.maketrans("", "", string.punctuation)
FOLDS = {"-": "‐‑‒–—―−", "'": "‘’‚‛′`´", '"': "“”„‟″«»", " degrees ": "°º"}  # what `fold` writes: for which signs
FOLD = str.maketrans({sign: plain for plain, signs in FOLDS.items() for sign in signs})


def normalise(text: str, fold: bool = False) -> str:
    """The open-domain QA normal form (ORQA): NFD, lower case, no ASCII punctuation, no a/an/the, single spaces.

    fold: before that, accents go, and Unicode dashes, quotes and degree signs become plain ones.

    >>> normalise("The  Beatles' (1968)")
    'beatles 1968'
    >>> normalise("Beyoncé’s 1914–1918", fold=True)
    'beyonces 19141918'
    """
    text = unicodedata.normalize("NFD", text)
    if fold:
        text = "".join(c for c in text if unicodedata.category(c) != "Mn").translate(FOLD)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def contains_gold(text: str, golds: Iterable[str], fold: bool = False) -> bool:
    """Is a gold inside `text`, both normalised? A gold that normalises to nothing ("A+", "---") never matches."""
    text = normalise(text, fold)
    return any(g and g in text for g in (normalise(gold, fold) for gold in golds))


def contains_gold_words(text: str, golds: Iterable[str], fold: bool = False) -> bool:
    """`contains_gold` in whole words, so that "era" is not found in "several"."""
    text = normalise(text, fold)
    wanted = [g for g in (normalise(gold, fold) for gold in golds) if g]
    return any(re.search(rf"(?<!\w){re.escape(g)}(?!\w)", text) for g in wanted)


def equals_gold(text: str, golds: Iterable[str], fold: bool = False) -> bool:
    """Is `text` a gold, both normalised? A gold that normalises to nothing never matches."""
    text = normalise(text, fold)
    return bool(text) and any(text == normalise(gold, fold) for gold in golds)


def verified(text: str, golds: Iterable[str], fold: bool = False) -> bool:
    """Has `text`, or what its last \\boxed holds, the value of a gold? For mathematics (common/verifier.py)."""
    return any(verifier.equal(text, gold) for gold in golds)


MATCHERS = {"equal": equals_gold, "contains": contains_gold, "words": contains_gold_words, "verifier": verified}


def exact_match(
    thought: str, answer: str, golds: Sequence[str], matcher: str = "equal", fold: bool = False
) -> tuple[bool, bool]:
    """(EM_t, EM_a) of A.2: a gold is a substring of the thought; the answer is a gold. Any alias counts.

    PAPER: A.2's formula asks that the answer equals the gold, its text that the gold appears in the answer.
    HERE:  matcher "equal" is the formula and the headline, "contains" the text, "words" the text in whole words;
           "verifier" compares values, for problems whose answer a program decides, which the paper has none of.
    WHY:   containment takes "asexual" for sexual, both take "not Mark Twain" for Mark Twain; equality fails a sentence.
    """
    return contains_gold(thought, golds, fold), MATCHERS[matcher](answer, golds, fold)


# ---------- candidates

SAMPLE_FIELDS = ("id", "mode", "draw", "question", "answers", "prompt", "prompt_ids", "ids", "text", "finish")


def select_candidates(
    samples: Iterable[dict[str, Any]],
    tokenizer: Tokenizer,
    n_draws: int = 3,
    keep: str = "first",
    segments: tuple[int, int] = (4, 15),
    think_tokens: tuple[int, int] = (450, 1000),
    matcher: str = "equal",
    fold: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """Candidate rows and the tally of 3.1.1: which questions thinking settles, and what became of every one of them.

    z_on, z_off: the answer of a draw is right with thinking on, off. Chosen: (1, 0) in each of the draws 0..n_draws-1;
    rejected: (0, 1) in each of them. Then the trace must be USABLE, end by itself, and have `segments` segments and
    `think_tokens` thinking tokens, both ends included.
    keep: "first": draw 0 alone becomes a row, under the question's id. "all": every draw that is not a repeat does,
    under id#draw. The tally then counts each draw of such a question where it counts the question with "first".
    The tally is {"all": counts, and for each data set its own: counts}, counts = {"questions": drawn, "chosen": kept,
    "rejected": kept, reason: lost, ...}, as in Table 1. Raises InputError at a draw that is missing or there twice, and
    when a class ends up empty.
    """
    # PAPER: does not say which of the N traces becomes y, nor whether (4,15) and (450,1000) hold their ends.
    # HERE:  draw 0; the ends are in.
    # WHY:   one trace a question is what the counts of Table 1 read like; nothing depends on the ends.
    assert keep in ("first", "all"), keep
    rows: list[dict[str, Any]] = []
    tally: dict[str, Counter[str]] = {"all": Counter(questions=0, chosen=0, rejected=0)}
    thoughts: Counter[str] = Counter()  # outcomes with thinking on
    numbers: list[int] = []  # of each row, where its question first came in the samples
    for number, draws in _questions(samples, n_draws):
        dataset = draws["on"][0].get("dataset") or "unnamed"
        counts = [tally["all"], tally.setdefault(dataset, Counter(questions=0, chosen=0, rejected=0))]
        parsed = {mode: [parse_sample(sample) for sample in draws[mode]] for mode in ("on", "off")}
        thoughts.update(p.outcome for p in parsed["on"])
        found: list[str] = ["questions"]
        z_on, z_off = (
            {MATCHERS[matcher](p.answer, s["answers"], fold) for p, s in zip(parsed[mode], draws[mode], strict=True)}
            for mode in ("on", "off")
        )
        if matcher == "verifier" and not any(map(verifier.usable, draws["on"][0]["answers"])):
            found.append("gold has no value")  # nothing would ever be right
        elif len(z_on) + len(z_off) > 2:
            found.append("draws disagree")
        elif z_on == z_off:
            found.append("right in both modes" if z_on == {True} else "wrong in both modes")
        else:
            seen: set[tuple[int, ...]] = set()
            for sample in draws["on"] if keep == "all" else draws["on"][:1]:
                row, reason = _candidate(sample, tokenizer, segments, think_tokens)
                if tuple(sample["ids"]) in seen:
                    row, reason = None, "repeated draw"
                seen.add(tuple(sample["ids"]))
                if row is not None:
                    name = row["id"] if keep == "first" else f"{row['id']}#{sample['draw']}"
                    rows.append(row | {"id": name, "chosen": z_on == {True}})
                    numbers.append(number)
                found.append(reason or ("chosen" if z_on == {True} else "rejected"))
        for count in counts:
            count.update(found)
    order = ("questions", "chosen", "rejected")
    done = {name: {k: of[k] for k in (*order, *sorted(of.keys() - set(order)))} for name, of in tally.items()}
    for name in ("chosen", "rejected"):
        if not done["all"][name]:
            told = ", ".join(f"{k} {v}" for k, v in done["all"].items())
            remedy = _remedy(done["all"], thoughts)
            raise InputError(f"candidates: no {name} row came out of the samples ({told}); {remedy}")
    return [rows[i] for i in sorted(range(len(rows)), key=numbers.__getitem__)], done


def _remedy(tally: Mapping[str, int], thoughts: Counter[str]) -> str:
    """What to do about a class without rows: it follows the commonest cause."""
    n, without = thoughts.total(), thoughts["no_thought"] + thoughts["empty"]
    short = thoughts["no_close"] + thoughts["cut"]
    if n and 2 * without > n:
        return f"{without} of {n} completions with thinking on hold no thought: take a model that reasons"
    if 2 * short > n:
        return f"{short} of {n} completions with thinking on were cut short: raise --draw-max-new"
    causes = {reason: n for reason, n in tally.items() if reason not in ("questions", "chosen", "rejected")}
    main = max(causes, key=lambda reason: causes[reason], default="")
    for words, remedy in (
        ("disagree", "draw at a lower temperature, or fewer draws a question"),
        ("right in both", "the questions are too easy for this model; take harder ones"),
        ("wrong in both", "no answer is a gold: look at some, then try --matcher words, another prompt or model"),
        (" segments", "widen --min-segments and --max-segments"),
        (" tokens", "widen --min-think-tokens and --max-think-tokens"),
        ("trace ", "the model does not write its answers as the prompt asks; try another prompt"),
    ):
        if words in main:
            return f"{remedy}; or draw for more questions"
    return "draw for more questions"


def _questions(
    samples: Iterable[dict[str, Any]], n_draws: int
) -> Iterator[tuple[int, dict[str, list[dict[str, Any]]]]]:
    """(number of the question, mode -> its `n_draws` samples in the draws' order), as soon as a question has them all.

    No more than the questions that lack a draw are in memory, one where the samples stand as the sample stage writes
    them. Raises InputError at a field or a draw that is missing and at one that comes twice.
    """
    numbers: dict[str, int] = {}
    waiting: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for s in samples:
        if missing := [name for name in SAMPLE_FIELDS if name not in s]:
            raise InputError(f"samples: field {missing[0]!r} is missing in a row of id {s.get('id')!r}; sample again")
        if s["mode"] not in ("on", "off"):
            raise InputError(f"samples: {s['id']!r} has mode {s['mode']!r}, must be 'on' or 'off'; sample again")
        name, k = s["id"], s["draw"]
        if name not in numbers:
            numbers[name], waiting[name] = len(numbers), {"on": {}, "off": {}}
        if k not in range(n_draws):
            continue  # more draws than are asked for
        modes = waiting.get(name)
        if modes is None or k in modes[s["mode"]]:
            raise InputError(f"samples: draw {k} of {name!r}, thinking {s['mode']}, comes twice; keep one")
        modes[s["mode"]][k] = s
        if all(len(draws) == n_draws for draws in modes.values()):
            del waiting[name]
            yield numbers[name], {mode: [draws[k] for k in range(n_draws)] for mode, draws in modes.items()}
    for name, modes in waiting.items():
        for mode, draws in modes.items():
            for k in (k for k in range(n_draws) if k not in draws):
                place = f"draw {k} of {name!r}, thinking {mode}"
                raise InputError(f"samples: {place}, is missing; finish sampling or ask for fewer draws than {n_draws}")


def _candidate(
    sample: dict[str, Any], tokenizer: Tokenizer, segments: tuple[int, int], think_tokens: tuple[int, int]
) -> tuple[dict[str, Any] | None, str]:
    """The candidate row of a draw with thinking on, without its class; or None and why there is none."""
    parsed = parse_sample(sample)
    if parsed.outcome not in USABLE or parsed.span is None:
        return None, f"trace is {parsed.outcome}"
    if sample["finish"] != "stop":
        return None, "trace has no end token"
    text, offsets = token_offsets(tokenizer, sample["ids"])
    if not text.startswith(sample["text"]):
        raise InputError(f"samples: the ids of {sample['id']!r} do not spell its text; use the tokenizer it came from")
    spans = split_segments(sample["text"], *parsed.span)
    n_think = count_think_tokens(offsets, parsed.span)
    for count, (low, high), what in ((len(spans), segments, "segments"), (n_think, think_tokens, "thinking tokens")):
        if not low <= count <= high:
            return None, f"fewer than {low} {what}" if count < low else f"more than {high} {what}"
    row = {name: sample[name] for name in ("id", "question", "answers", "prompt", "prompt_ids")}
    row |= {"dataset": sample["dataset"]} if "dataset" in sample else {}
    row |= {"completion_ids": sample["ids"], "completion": sample["text"], "spans": spans, "n_think_tokens": n_think}
    return row, ""


# ---------- training rows, packing

TRAIN_FIELDS = ("id", "prompt", "completion", "label", "prompt_ids", "completion_ids", "spans", "labels", "w")


@dataclass(frozen=True)
class Row:
    """One training row as tensors and ids."""

    id: str
    chosen: bool  # member of D+
    prompt_ids: list[int]
    completion_ids: list[int]
    w: Tensor  # (T,) fp32, one weight per completion token


def load_train(path: str | Path) -> list[dict[str, Any]]:
    """Training records as the fit stage writes them, each field checked. Raises InputError at the first bad line."""
    return list(each_train(path))


def each_train(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records that `load_train` returns, one by one."""
    ids: set[str] = set()

    def check(row: dict[str, Any]) -> None:
        _check_id(row["id"], ids)
        problem = _train_problem(row)
        if problem:
            raise InputError(f"{problem}; run the fit stage again or repair this line")

    yield from each_row(path, TRAIN_FIELDS, check)
    if not ids:
        raise InputError(f"{path}: holds no training row; loosen the candidate filters and run the stages again")


def _train_problem(row: dict[str, Any]) -> str:
    """What is wrong with a training record, "" when nothing is."""
    if not isinstance(row["label"], bool):
        return f"field 'label' must be true or false, not {row['label']!r}"
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            return f"field {name!r} must be a text"
    for name in ("prompt_ids", "completion_ids"):
        if not row[name] or not are_ids(row[name]):
            return f"field {name!r} must be a list of one or more token ids"
    spans, w, labels = row["spans"], row["w"], row["labels"]
    if not (isinstance(spans, list) and isinstance(w, list) and isinstance(labels, list)):
        return "fields 'spans', 'labels' and 'w' must be lists"
    if not len(spans) == len(w) == len(labels):
        return f"{len(spans)} spans, {len(labels)} label sets and {len(w)} weights, there must be one of each a step"
    if not are_weights(w):
        return "field 'w' must hold positive numbers"
    if not are_labels(labels):
        return "field 'labels' must hold a list of labels a step"
    if not all(isinstance(s, list) and len(s) == 2 and all(type(c) is int for c in s) and s[0] < s[1] for s in spans):
        return "field 'spans' must hold pairs [first, last + 1] of character positions"
    edges = [0, *(c for span in spans for c in span), len(row["completion"])]
    if edges != sorted(edges):
        return "field 'spans' must be ascending, apart and inside the completion"
    return ""


def reweighted(rows: list[dict[str, Any]], weights: str, seed: int) -> list[dict[str, Any]]:
    """Training records with the step weights a loss asks for: "own" as they are, "ones", "shuffled" or "mean".

    Raises InputError when the loss asks for weights and all of them are 1, as in rows imported from other trainers.
    """
    if weights == "ones":
        return [row | {"w": [1.0] * len(row["w"])} for row in rows]
    if all(w == 1 for row in rows for w in row["w"]):
        raise InputError("every step weight of these rows is 1, so this would be plain KTO; train --method kto, or fit")
    if weights == "mean":
        return mean_weights(rows)
    return shuffle_weights(rows, seed) if weights == "shuffled" else rows


def shuffle_weights(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The placebo: training records whose step weights are permuted within their class, over all its rows.

    Each class keeps its weights and every row its steps; only which step has which weight is chance.
    """
    order = random.Random(seed)
    pools: dict[bool, list[float]] = {}
    for label in (True, False):
        pools[label] = [x for row in rows if row["label"] is label for x in row["w"]]
        order.shuffle(pools[label])
    return [row | {"w": [pools[row["label"]].pop() for _ in row["w"]]} for row in rows]


def mean_weights(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The other placebo: every step has the mean weight of its class, so a class weighs as much as it did."""
    means = {}
    for label in {row["label"] for row in rows}:
        of_class = [x for row in rows if row["label"] is label for x in row["w"]]
        means[label] = sum(of_class) / max(1, len(of_class))
    return [row | {"w": [means[row["label"]]] * len(row["w"])} for row in rows]


def to_rows(records: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> list[Row]:
    """Training records with the weight of every step laid on its tokens. Raises InputError when ids and text differ."""
    rows = []
    for r in records:
        text, offsets = token_offsets(tokenizer, r["completion_ids"])
        if not text.startswith(r["completion"]):
            raise InputError(f"training row {r['id']!r}: its ids do not spell its text; use the model it came from")
        w = token_weights(offsets, r["spans"], r["w"])
        rows.append(Row(r["id"], r["label"], r["prompt_ids"], r["completion_ids"], w))
    return rows


@dataclass(frozen=True)
class Batch:
    """B rows laid end to end, N tokens in all, M of them completion tokens. No padding."""

    ids: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (B+1,) int64, on the CPU: row b is ids[cu_seqlens[b]:cu_seqlens[b+1]]
    predict: Tensor  # (M,) int64: the positions in (N,) whose hidden states predict the completion tokens
    targets: Tensor  # (M,) int64: those completion tokens
    w: Tensor  # (M,) fp32
    cu_targets: Tensor  # (B+1,) int64, on the CPU: row b has the targets cu_targets[b]:cu_targets[b+1]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its token tensors on `device`; row boundaries stay on the CPU, where they are read."""
        ids, predict, targets, w = (x.to(device) for x in (self.ids, self.predict, self.targets, self.w))
        return Batch(ids, self.cu_seqlens, predict, targets, w, self.cu_targets)


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int], Tensor]]) -> Batch:
    """Rows (prompt_ids, completion_ids, w (T,)) as one Batch, in their order.

    The token at position p is predicted by the hidden state at p - 1, so a prompt needs at least one token.
    """
    assert rows, "no rows to pack"
    ids: list[int] = []
    targets: list[int] = []
    predict, lengths = [], []
    for prompt_ids, completion_ids, w in rows:
        assert len(prompt_ids), "a row has an empty prompt"
        assert len(completion_ids), "a row has an empty completion"
        assert w.shape == (len(completion_ids),), (w.shape, len(completion_ids))
        start = len(ids) + len(prompt_ids)
        predict.append(torch.arange(start - 1, start - 1 + len(completion_ids)))
        ids += [*prompt_ids, *completion_ids]
        targets += completion_ids
        lengths.append((len(prompt_ids) + len(completion_ids), len(completion_ids)))
    cu = torch.cat([torch.zeros(1, 2, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])  # (B+1, 2)
    return Batch(
        ids=torch.tensor(ids),
        cu_seqlens=cu[:, 0].contiguous(),
        predict=torch.cat(predict),
        targets=torch.tensor(targets),
        w=torch.cat([w.float() for _, _, w in rows]),
        cu_targets=cu[:, 1].contiguous(),
    )
