"""Problems with checkable answers, the two prompts made of each, and how a meta is written and read.

q_sol asks for a solution. q_meta asks to foresee the solutions; its answer, a meta, looks like this:

    <meta>two products and a sum, I often forget the carry</meta>
    {"math_notion": ["carry"], "pass_rate": 5, "solution_length": 120}

Imports no torch.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import verifier
from common.errors import InputError
from common.files import read_jsonl
from common.template import ChatTemplate, fill, load_prompt
from common.tokens import encode, encode_guarded, guarded, load_stop_ids, load_tokenizer
from masa.settings import Settings

SURROGATE = re.compile("[\ud800-\udfff]")
GRID = 8  # a meta gives its pass rate as so many eighths, whatever G is


@dataclass(frozen=True)
class Problem:
    id: str
    text: str
    answer: str


def load_problems(path: str | Path, any_answer: bool = False) -> tuple[list[Problem], int]:
    """(problems, how many were left out because no answer can be read from their `answer`).

    A row: problem (a text), answer (a text or a number), id (a text; without one: NAME/LINE). any_answer: keep answers
    that the verifier cannot read, for a reward function of one's own. Raises InputError.
    """
    seen: set[str] = set()

    def check(row: dict[str, Any]) -> None:
        if not isinstance(row["problem"], str) or not row["problem"].strip():
            raise InputError(f"field 'problem' must be a text with words, not {row['problem']!r}; repair the row")
        if not isinstance(row["answer"], str | int | float) or isinstance(row["answer"], bool):
            raise InputError(f"field 'answer' must be a text or a number, not {row['answer']!r}; repair the row")
        row.setdefault("id", f"{Path(path).stem}/{len(seen)}")
        if not isinstance(row["id"], str) or row["id"] in seen:
            raise InputError(f"field 'id' is {row['id']!r}; it must be a text that no earlier row has")
        seen.add(row["id"])

    rows = read_jsonl(path, ("problem", "answer"), check)
    problems = [Problem(r["id"], r["problem"], str(r["answer"])) for r in rows]
    usable = [p for p in problems if any_answer or verifier.usable(p.answer)]
    if not usable:
        raise InputError(f"{path}: no problem with a readable answer; rows need problem and answer")
    return usable, len(problems) - len(usable)


class Prompts:
    """Problem texts to token ids, and completions to text. Control tokens that a problem or a hint spells are text."""

    def __init__(self, folder: Path, s: Settings) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.plain, self.with_system = ChatTemplate(folder), ChatTemplate(folder, s.meta_system)
        self.with_system.check(self.tokenizer)
        self.control = self.plain.control_tokens(self.tokenizer)
        self.turns = {k: load_prompt(getattr(s, f"{k}_prompt")) for k in ("solve", "meta", "eval")}
        self.max_new = s.max_new
        # Base checkpoints disagree on which of the two ends a turn, so both do.
        ends = {self.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")} - {None}
        own = load_stop_ids(folder, self.tokenizer)
        self.end, self.stop_ids = min(own), own | ends

    def solve(self, problem: str, hint: Sequence[str] = ()) -> list[int]:
        """Prompt of a solution (q_sol): the problem and its instruction; notions, if given, are appended as a hint."""
        if hint:
            problem += f" The problem could be solved using the following math notions: {', '.join(hint)}."
        text = fill(self.turns["solve"], problem=guarded(problem, self.control))
        return encode_guarded(self.tokenizer, self.plain.prompt(text, thinking=True))

    def meta(self, problem: str) -> list[int]:
        """Prompt of a meta (q_meta): asks to foresee the solutions. It contains the user turn of q_sol in full."""
        places = {"max_new": str(self.max_new)} if "{max_new}" in self.turns["meta"] else {}
        asked = fill(self.turns["solve"], problem=guarded(problem, self.control))
        text = fill(self.turns["meta"], problem=asked, **places)
        return encode_guarded(self.tokenizer, self.with_system.prompt(text, thinking=True))

    def evaluation(self, problem: str) -> list[int]:
        """The prompt of an evaluated solution; the paper's is the bare problem, unlike in training."""
        text = fill(self.turns["eval"], problem=guarded(problem, self.control))
        return encode_guarded(self.tokenizer, self.plain.prompt(text, thinking=True))

    def encode(self, text: str) -> list[int]:
        """Ids of a completion."""
        return encode(self.tokenizer, text)

    def text(self, ids: list[int]) -> str:
        """A completion as text, without its end token."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=False)


@dataclass(frozen=True)
class Prediction:
    """A parsed meta; a part that is missing or of the wrong kind is None and earns nothing."""

    reasoning: str | None  # what stands between <meta> and </meta>
    notions: tuple[str, ...] | None
    p_hat: float | None  # 0, 1/8, ..., 1
    length: int | None  # tokens


def meta_text(reasoning: str, notions: Sequence[str], eighths: int, length: int) -> str:
    """A meta in the form that q_meta asks for."""
    numbers = {"math_notion": list(notions), "pass_rate": eighths, "solution_length": length}
    return f"<meta>{reasoning}</meta>\n{json.dumps(numbers, ensure_ascii=False)}"


def parse_meta(text: str) -> Prediction | None:
    """The prediction in a completion: the last JSON object after </meta> with one of the keys, or None."""
    head, tag, tail = text.rpartition("</meta>")
    tail = tail if tag else text
    keys, decoder = {"math_notion", "pass_rate", "solution_length"}, json.JSONDecoder()
    starts = [m.start() for m in re.finditer(r"\{", tail)][-50:]  # a bound for text made of braces
    for start in reversed(starts):
        try:
            found, _ = decoder.raw_decode(tail, start)
        except (ValueError, RecursionError):
            continue
        if keys & found.keys():
            break
    else:
        return None
    notions, rate, length = (found.get(key) for key in ("math_notion", "pass_rate", "solution_length"))
    # An escape may spell half a surrogate pair, which no prompt can hold.
    listed = isinstance(notions, list) and all(isinstance(n, str) and SURROGATE.search(n) is None for n in notions)
    return Prediction(
        reasoning=head.rpartition("<meta>")[2] if "<meta>" in head else None,
        notions=tuple(notions) if listed else None,
        p_hat=rate / GRID if type(rate) is int and 0 <= rate <= GRID else None,  # a bool is no int
        length=length if type(length) is int and length > 0 else None,
    )
