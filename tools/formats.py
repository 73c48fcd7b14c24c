"""train.jsonl from and to the files of other trainers: TRL, LLaMA-Factory, FactAlign.

  python -m tools.formats to-trl train.jsonl trl.jsonl                       prompt, completion, label and no more
  python -m tools.formats from-trl trl.jsonl train.jsonl --model DIR         rendered texts, or lists of messages
  python -m tools.formats to-llamafactory train.jsonl FOLDER --model DIR  FOLDER/mralign.json, dataset_info.json
  python -m tools.formats from-llamafactory FOLDER train.jsonl --model DIR   --name: the entry of dataset_info.json
  python -m tools.formats to-factalign train.jsonl fkto.jsonl --model DIR  sentence_label: does a step help its class
  python -m tools.formats from-factalign fkto.jsonl train.jsonl --model DIR

TRL needs no conversion: it trains plain KTO on train.jsonl as it is, to-trl only makes it smaller. --model: folder of
the checkpoint whose tokenizer and chat template belong to the rows. What comes from elsewhere has no step labels and
no weights: every step gets w = 1, which is plain KTO; FactAlign's sentence labels are kept and go back out unchanged.
Left out: several turns, system turns, tools, images, pairs of chosen and rejected.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import data
from common.endings import program
from common.errors import InputError
from common.files import read_json, read_jsonl, write_json, write_jsonl
from common.template import TAGS, ChatTemplate
from common.tokens import encode, load_tokenizer

Row = dict[str, Any]
# What LLaMA-Factory takes from an entry of dataset_info.json that does not say otherwise.
LF_COLUMNS = {"messages": "conversations", "kto_tag": "kto_tag"}
LF_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}


@dataclass(frozen=True)
class Chat:
    """The tokenizer and chat template of one checkpoint."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def of(cls, model: str) -> "Chat":
        """From a checkpoint's folder. Raises InputError when it is not one."""
        if not model:
            raise InputError("--model is needed here: the folder of the checkpoint the rows belong to")
        return cls(load_tokenizer(model), ChatTemplate(model))

    def user_turn(self, prompt: str) -> str:
        """What the user said in a rendered prompt. Raises InputError when this template did not render it."""
        before, _, after = self.template.prompt("\x00", True).partition("\x00")
        if not (prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before + after)):
            raise InputError(f"prompt {prompt[:60]!r} is not one user turn of this chat template; give its own --model")
        return prompt[len(before) : len(prompt) - len(after)]

    def row(self, name: str, prompt: str, completion: str, label: bool, spans: list[list[int]] | None = None) -> Row:
        """One train.jsonl row with w = 1. spans: of its steps; None: the segments of its thought."""
        end = self.template.special.get("eos_token", "")
        if end and completion.rstrip("\n").endswith(end):  # as templates close a turn: the end token and a line end
            completion = completion.rstrip("\n").removesuffix(end)
        if not prompt.strip() or not completion:
            raise InputError(f"an empty {'completion' if prompt.strip() else 'prompt'}; drop the row")
        for what, text in (("prompt", prompt), ("completion", completion)):
            if self.tokenizer.normalizer and self.tokenizer.normalizer.normalize_str(text) != text:
                raise InputError(f"the {what} is not in the tokenizer's normal form (NFC); normalise the file first")
        if end and end in completion:
            raise InputError(f"the end token {end} stands inside the completion; one exchange a row is supported")
        if spans is None:
            thought = data.parse(completion).span if TAGS[1] in completion else None
            spans = [list(s) for s in data.split_segments(completion, *thought)] if thought else []
        prompt_ids, completion_ids = (encode(self.tokenizer, text) for text in (prompt, completion + end))
        row = {"id": name, "prompt": prompt, "completion": completion, "label": label, "prompt_ids": prompt_ids}
        return row | {
            "completion_ids": completion_ids,
            "spans": spans,
            "labels": [[] for _ in spans],
            "w": [1.0] * len(spans),
        }


def _text(value: Any, what: str, role: str, render: Callable[[list[Row]], str] | None = None) -> str:
    """A text, or one message of `role` as a text: rendered, or its content. Raises InputError at anything else."""
    if isinstance(value, str):
        return value
    good = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    if not good or value[0].get("role") != role or not isinstance(value[0].get("content"), str):
        raise InputError(
            f"field {what!r} must be a text or one message of role {role!r}; other turns are not supported"
        )
    return render(value[0]["content"]) if render else value[0]["content"]


# What changes the ids that TRL trains on and is not done here: of a row, and of a message.
ROW_FIELDS = ("tools", "images", "image", "videos", "audios", "chat_template_kwargs", "chosen", "rejected")
TURN_FIELDS = ("reasoning_content", "thinking", "reasoning", "tool_calls", "function_call", "tool_call_id", "images")


def _check_fields(row: Any) -> None:
    """Refuse what would be lost without a word. Raises InputError naming the field."""
    if not isinstance(row, dict):
        raise InputError("is not an object")
    turns = [t for v in row.values() if isinstance(v, list) for t in v if isinstance(t, dict)]
    used = [f for f in ROW_FIELDS if row.get(f)] + [f for f in TURN_FIELDS if any(t.get(f) for t in turns)]
    if used:
        raise InputError(f"field {used[0]!r} changes what is trained on and is not supported; render the row yourself")


def _name(row: Row, n: int) -> str:
    """The id of a row, row1 and so on without one. Raises InputError at an id that is neither a text nor a number."""
    name = row.get("id")
    if name is None:
        return f"row{n}"
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise InputError(f"field 'id' must be a text or a whole number, not {name!r}")
    return str(name)


def _label(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"field {what!r} must be true or false, not {value!r}")
    return value


def _imported(path: Path, rows: Iterable[Row], convert: Callable[[int, Row], Row]) -> list[Row]:
    """`convert` on every row. Raises InputError "file: row n: reason" where it does, or when there is no row."""
    out: list[Row] = []
    seen: dict[str, int] = {}
    for n, row in enumerate(rows, 1):
        try:
            _check_fields(row)
            out.append(convert(n, row))
            name = out[-1]["id"]
            if seen.setdefault(name, n) != n:
                raise InputError(f"id {name!r} is that of row {seen[name]} too; give each row its own or none")
        except InputError as error:
            raise InputError(f"{path}: row {n}: {error}") from None
    if not out:
        raise InputError(f"{path}: holds no row")
    return out


def to_trl(source: Path, target: Path, chat: None = None) -> int:
    """TRL's unpaired preference rows. Returns how many."""
    fields = ("id", "prompt", "completion", "label")
    return write_jsonl(target, ({k: r[k] for k in fields} for r in data.load_train(source)))


def from_trl(source: Path, target: Path, chat: Chat) -> int:
    """Rows of TRL's unpaired preference format: texts, or one message each, which the chat template renders."""

    def convert(n: int, r: Row) -> Row:
        asked = _text(r["prompt"], "prompt", "user")
        completion = _text(r["completion"], "completion", "assistant")
        if isinstance(r["prompt"], str) != isinstance(r["completion"], str):
            raise InputError("fields 'prompt' and 'completion' must both be texts or both be messages")
        prompt = r["prompt"]
        if not isinstance(prompt, str):  # as TRL: the completion is what the template puts after the prompt
            if not asked.strip():
                raise InputError("an empty prompt; drop the row")
            said = [{"role": "user", "content": asked}]
            completion = completion.removesuffix(chat.template.special.get("eos_token", ""))  # it writes its own
            prompt = chat.template.render(said, add_generation_prompt=True)
            whole = chat.template.render([*said, {"role": "assistant", "content": completion}])
            if not whole.startswith(prompt):
                raise InputError(
                    "the chat template does not repeat the prompt before the answer; render the row yourself"
                )
            completion = whole[len(prompt) :]
        return chat.row(_name(r, n), prompt, completion, _label(r["label"], "label"))

    rows = read_jsonl(source, ("prompt", "completion", "label"))
    return write_jsonl(target, _imported(source, rows, convert))


def to_llamafactory(source: Path, target: Path, chat: Chat, name: str = "mralign") -> int:
    """A ShareGPT file with kto_tag and its entry in dataset_info.json; the folder's other entries stay."""

    def convert(n: int, r: Row) -> Row:
        turns = (("human", chat.user_turn(r["prompt"])), ("gpt", r["completion"]))
        return {"id": r["id"], "conversations": [{"from": a, "value": b} for a, b in turns], "kto_tag": r["label"]}

    rows = _imported(source, data.load_train(source), convert)
    write_json(target / f"{name}.json", rows)
    info = target / "dataset_info.json"
    entries = read_json(info) if info.exists() else {}
    entry = {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": LF_COLUMNS, "tags": LF_TAGS}
    write_json(info, entries | {name: entry})
    return len(rows)


def from_llamafactory(source: Path, target: Path, chat: Chat, name: str = "mralign") -> int:
    """The ShareGPT file that entry `name` of the folder's dataset_info.json describes, one exchange a row."""
    entries = read_json(source / "dataset_info.json")
    if not isinstance(entries, dict):
        raise InputError(f"{source}/dataset_info.json: is not an object of entries")
    if name not in entries:
        raise InputError(f"{source}/dataset_info.json: no entry {name!r}; --name one of {', '.join(entries)}")
    entry = entries[name]
    where = f"{source}/dataset_info.json: {name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise InputError(f"{where} has no file_name; only files of this folder are read, download the data set first")
    given, named = entry.get("columns"), entry.get("tags") or {}
    if entry.get("formatting") != "sharegpt" or not isinstance(given, dict) or not given.get("kto_tag"):
        raise InputError(f"{where} is not in the sharegpt format with a kto_tag column")
    if odd := sorted({*given} & {"system", "tools", "images", "videos", "audios", "ranking", "chosen", "rejected"}):
        raise InputError(f"{where}: column {odd[0]!r} is not supported; name messages and kto_tag only")
    columns = LF_COLUMNS | given
    tags = LF_TAGS | named if isinstance(named, dict) else {}
    if not tags or not all(isinstance(v, str) for v in (*columns.values(), *tags.values())):
        raise InputError(f"{where}: columns and tags must be texts")

    def convert(n: int, r: Row) -> Row:
        if not isinstance(r, dict) or not {columns["messages"], columns["kto_tag"]} <= r.keys():
            raise InputError(f"fields {columns['messages']!r} and {columns['kto_tag']!r} must be there")
        turns = r[columns["messages"]]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise InputError(f"field {columns['messages']!r} must be a list of turns")
        roles = [turn.get(tags["role_tag"]) for turn in turns]
        if roles != [tags["user_tag"], tags["assistant_tag"]]:
            raise InputError(f"turns are {roles}; supported: one of the user and one of the assistant")
        question, completion = (turn.get(tags["content_tag"]) for turn in turns)
        if not (isinstance(question, str) and question.strip() and isinstance(completion, str)):
            raise InputError(f"field {tags['content_tag']!r} of each turn must be a text, the question not empty")
        label = _label(r[columns["kto_tag"]], columns["kto_tag"])
        return chat.row(_name(r, n), chat.template.prompt(question, True), completion, label)

    path = source / entry["file_name"]
    return write_jsonl(target, _imported(path, read_json(path), convert))


def to_factalign(source: Path, target: Path, chat: Chat) -> int:
    """FactAlign's rows: messages, the steps as sentences, and for each whether it helps.

    A row that came from FactAlign keeps its labels. In ours a step helps when its transition is likelier than usual in
    good traces: w > 1 in a chosen row, w < 1 in a rejected one. w = 1 takes the row's own class.
    """

    def convert(n: int, r: Row) -> Row:
        said = [{"role": "user", "content": chat.user_turn(r["prompt"])}]
        answered = [{"role": "assistant", "content": r["completion"]}]
        sentences = [r["completion"][a:b] for a, b in r["spans"]]
        helps = [(w > 1) == r["label"] if w != 1 else r["label"] for w in r["w"]]
        row = {"id": r["id"], "prompt": said, "completion": answered, "label": r["label"]}
        return row | {"completion_sentences": sentences, "sentence_label": r.get("sentence_label", helps)}

    return write_jsonl(target, _imported(source, data.load_train(source), convert))


def from_factalign(source: Path, target: Path, chat: Chat) -> int:
    """FactAlign's rows; every sentence is a step and must be found in the completion, one after the other.

    PAPER (FactAlign): a loss of its own for every sentence.  HERE: its labels are kept beside w = 1.  WHY: a weight
    scales a step's log-ratio within its row, it cannot turn its sign.
    """

    def convert(n: int, r: Row) -> Row:
        prompt = _text(r["prompt"], "prompt", "user", lambda text: chat.template.prompt(text, True))
        completion = _text(r["completion"], "completion", "assistant")
        labels = [_label(x, "sentence_label") for x in r["sentence_label"] or []]
        sentences, spans, position = r["completion_sentences"] or [], [], 0
        if len(sentences) != len(labels):
            raise InputError(f"{len(sentences)} sentences and {len(labels)} sentence labels; there must be one each")
        for sentence in sentences:
            start = completion.find(sentence, position)
            if start < 0 or not sentence:
                raise InputError(f"sentence {sentence[:60]!r} is not in the completion after the one before it")
            position = start + len(sentence)
            spans.append([start, position])
        row = chat.row(_name(r, n), prompt, completion, _label(r["label"], "label"), spans)
        return row | {"sentence_label": labels}

    fields = ("prompt", "completion", "label", "completion_sentences", "sentence_label")
    return write_jsonl(target, _imported(source, read_jsonl(source, fields), convert))


WAYS = {f.__name__.replace("_", "-"): f for f in (to_trl, from_trl, to_llamafactory, from_llamafactory)}
WAYS |= {f.__name__.replace("_", "-"): f for f in (to_factalign, from_factalign)}


@program
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--model", default="", metavar="DIR", help="folder with tokenizer and chat template")
    parser.add_argument("--name", default="mralign", help="LLaMA-Factory: the entry of dataset_info.json [mralign]")
    given = parser.parse_args(argv)
    chat = None if given.way == "to-trl" else Chat.of(given.model)
    more = {"name": given.name} if given.way.endswith("llamafactory") else {}
    count = WAYS[given.way](given.source, given.target, chat, **more)
    print(f"{given.target}: {count:,} rows")


if __name__ == "__main__":
    sys.exit(main())
