"""train.jsonl from and to the files of other trainers: TRL, LLaMA-Factory, FactAlign.

  python -m tools.formats to-trl train.jsonl trl.jsonl                       prompt, completion, label and no more
  python -m tools.formats from-trl trl.jsonl train.jsonl --model DIR         unpaired or paired, texts or messages
  python -m tools.formats to-llamafactory train.jsonl FOLDER --model DIR  FOLDER/mralign.json, dataset_info.json
  python -m tools.formats from-llamafactory FOLDER train.jsonl --model DIR   --name: the entry of dataset_info.json
  python -m tools.formats to-factalign train.jsonl fkto.jsonl --model DIR  sentence_label: does a step help its class
  python -m tools.formats from-factalign fkto.jsonl train.jsonl --model DIR

TRL needs no conversion: it trains plain KTO on train.jsonl as it is, to-trl only makes it smaller. --model: folder of
the checkpoint whose tokenizer and chat template belong to the rows. A row becomes the ids that TRL makes of it, or is
refused: tools/trl_rows.py says which. What comes from elsewhere has no step labels and no weights: every step gets
w = 1, which is plain KTO; FactAlign's sentence labels are kept and go back out unchanged. Left out, of LLaMA-Factory
and FactAlign: several turns, system turns, tools, images, pairs of chosen and rejected.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import data
from common.endings import program
from common.errors import InputError
from common.files import each_row, read_json, write_json, write_jsonl
from common.rows import is_texts
from tools.trl_rows import Chat, Exchange, Row, as_label, exchanges

# What LLaMA-Factory takes from an entry of dataset_info.json that does not say otherwise.
LF_COLUMNS = {"messages": "conversations", "kto_tag": "kto_tag"}
# Of an entry: LLaMA-Factory reads the data set from there, whatever file_name says, or only some rows of it.
LF_ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "num_samples", "ranking")
LF_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}


def _name(row: Row, n: int) -> str:
    """The id of a row, row1 and so on without one. Raises InputError at an id that is neither a text nor a number."""
    name = row.get("id")
    if name is None:
        return f"row{n}"
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise InputError(f"field 'id' must be a text or a whole number, not {name!r}")
    return str(name)


def _imported(path: Path, rows: Iterable[Row], convert: Callable[[int, Row], Iterable[Row]]) -> Iterator[Row]:
    """`convert` on every row. Raises InputError "file: row n: reason" where it does, or when there is no row."""
    seen: dict[str, int] = {}
    for n, row in enumerate(rows, 1):
        try:
            for made in convert(n, row):
                name = made["id"]
                if seen.setdefault(name, n) != n:
                    raise InputError(f"id {name!r} is that of row {seen[name]} too; give each row its own or none")
                yield made
        except InputError as error:
            raise InputError(f"{path}: row {n}: {error}") from None
    if not seen:
        raise InputError(f"{path}: holds no row")


def to_trl(source: Path, target: Path, chat: None = None) -> int:
    """TRL's unpaired preference rows. Returns how many."""
    fields = ("id", "prompt", "completion", "label")
    return write_jsonl(target, ({k: r[k] for k in fields} for r in data.each_train(source)))


def from_trl(source: Path, target: Path, chat: Chat) -> int:
    """TRL's preference rows, paired or not, texts or messages: see tools/trl_rows.py."""

    def convert(n: int, r: Row) -> Iterator[Row]:
        for exchange in exchanges(r):
            yield chat.row(_name(r, n), exchange)

    return write_jsonl(target, _imported(source, each_row(source), convert))


def to_llamafactory(source: Path, target: Path, chat: Chat, name: str = "mralign") -> int:
    """A ShareGPT file with kto_tag and its entry in dataset_info.json; the folder's other entries stay."""

    def convert(n: int, r: Row) -> Iterator[Row]:
        turns = (("human", chat.user_turn(r["prompt"])), ("gpt", r["completion"]))
        yield {"id": r["id"], "conversations": [{"from": a, "value": b} for a, b in turns], "kto_tag": r["label"]}

    rows = list(_imported(source, data.each_train(source), convert))
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
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or "\0" in entry["file_name"]:
        raise InputError(f"{where} has no file_name; only files of this folder are read, download the data set first")
    if odd := sorted(name for name in LF_ELSEWHERE if entry.get(name)):
        raise InputError(
            f"{where}: {odd[0]!r} makes LLaMA-Factory read other rows; download or cut them, and remove it"
        )
    given, named = entry.get("columns"), entry.get("tags") or {}
    if entry.get("formatting") != "sharegpt" or not isinstance(given, dict) or not given.get("kto_tag"):
        raise InputError(f"{where} is not in the sharegpt format with a kto_tag column")
    if odd := sorted({*given} & {"system", "tools", "images", "videos", "audios", "ranking", "chosen", "rejected"}):
        raise InputError(f"{where}: column {odd[0]!r} is not supported; name messages and kto_tag only")
    columns = LF_COLUMNS | given
    tags = LF_TAGS | named if isinstance(named, dict) else {}
    if not tags or not all(isinstance(v, str) for v in (*columns.values(), *tags.values())):
        raise InputError(f"{where}: columns and tags must be texts")

    def convert(n: int, r: Row) -> Iterator[Row]:
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
        label = as_label(r[columns["kto_tag"]], columns["kto_tag"])
        said = [{"role": "user", "content": question}], [{"role": "assistant", "content": completion}]
        yield chat.row(_name(r, n), Exchange(*said, label, {}))

    path = source / entry["file_name"]
    rows = each_row(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(rows, list | Iterator):
        raise InputError(f"{path}: must hold a JSON array of rows, or one row a line in a .jsonl file")
    return write_jsonl(target, _imported(path, rows, convert))


def to_factalign(source: Path, target: Path, chat: Chat) -> int:
    """FactAlign's rows: messages, the steps as sentences, and for each whether it helps.

    A row that came from FactAlign keeps its labels. In ours a step helps when its transition is likelier than usual in
    good traces: w > 1 in a chosen row, w < 1 in a rejected one. w = 1 takes the row's own class.
    """

    def convert(n: int, r: Row) -> Iterator[Row]:
        said = [{"role": "user", "content": chat.user_turn(r["prompt"])}]
        answered = [{"role": "assistant", "content": r["completion"]}]
        sentences = [r["completion"][a:b] for a, b in r["spans"]]
        helps = [(w > 1) == r["label"] if w != 1 else r["label"] for w in r["w"]]
        row = {"id": r["id"], "prompt": said, "completion": answered, "label": r["label"]}
        yield row | {"completion_sentences": sentences, "sentence_label": r.get("sentence_label", helps)}

    return write_jsonl(target, _imported(source, data.each_train(source), convert))


def from_factalign(source: Path, target: Path, chat: Chat) -> int:
    """FactAlign's rows; every sentence is a step and must be found in the completion, one after the other.

    PAPER (FactAlign): a loss of its own for every sentence.  HERE: its labels are kept beside w = 1.  WHY: a weight
    scales a step's log-ratio within its row, it cannot turn its sign.
    PAPER (its run_kto.py): renders the prompt and the completion apart, so that the header of the assistant's turn is
    trained on.  HERE: as one conversation, as TRL does.  WHY: a completion starts where sampling starts.
    """

    def convert(n: int, r: Row) -> Iterator[Row]:
        sentences, given = (
            r[name] if r[name] is not None else [] for name in ("completion_sentences", "sentence_label")
        )
        if not is_texts(sentences) or not isinstance(given, list):
            raise InputError(
                "fields 'completion_sentences' and 'sentence_label' must be lists, of texts and of classes"
            )
        labels = [as_label(x, "sentence_label") for x in given]
        if len(sentences) != len(labels):
            raise InputError(f"{len(sentences)} sentences and {len(labels)} sentence labels; there must be one each")
        for exchange in exchanges(r):
            yield chat.row(_name(r, n), exchange, sentences) | {"sentence_label": labels}

    fields = ("prompt", "completion", "label", "completion_sentences", "sentence_label")
    return write_jsonl(target, _imported(source, each_row(source, fields), convert))


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
