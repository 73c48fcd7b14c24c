"""train.jsonl out to TRL, LLaMA-Factory and FactAlign and back; the bytes of a conversation survive."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import data
from common.errors import InputError
from common.files import read_json, read_jsonl, write_json, write_jsonl
from common.tokens import encode
from tools import formats

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def chat(tmp_path, tiny_tokenizer: Tokenizer) -> formats.Chat:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    return formats.Chat.of(str(folder))


def prompt_of(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def ours(tmp_path, chat: formats.Chat) -> Path:
    """Two rows as the fit stage writes them: a merged step, {braces}, a newline at the end, other scripts."""
    texts = [
        ("What is {the} capital of France?", "<think>\nI recall Paris.\n\nWait.\n\nYes.\n</think>\n\nParis\n", True),
        ("日本の首都は?", "<think>大阪です。\n\n東京。</think>大阪", False),
    ]
    rows = []
    for n, (question, completion, label) in enumerate(texts):
        start, end = len("<think>"), completion.index("</think>")
        cut = completion.index("\n\n", start) + 2
        row = {"id": f"q{n}#0", "prompt": prompt_of(question), "completion": completion, "label": label}
        row |= {"prompt_ids": encode(chat.tokenizer, row["prompt"])}
        row |= {"completion_ids": encode(chat.tokenizer, completion + "<|im_end|>")}
        row |= {"spans": [[start, cut], [cut, end]], "labels": [["retrieval"], ["backtracking", "evaluation"]]}
        rows.append(row | {"w": [1.25, 0.75]})
    write_jsonl(tmp_path / "train.jsonl", rows)
    data.load_train(tmp_path / "train.jsonl")  # the fixture is a valid file
    return tmp_path / "train.jsonl"


SAME = ("id", "prompt", "completion", "label", "prompt_ids")


def same(path: Path, original: Path, after: list[int] = ()) -> list[dict]:
    """The imported rows; conversation, class and ids are the original's, and every weight is 1.

    after: what a template writes after the end token, and the trainers of messages train on.
    """
    back = data.load_train(path)  # our own reader accepts them
    for mine, theirs in zip(back, data.load_train(original), strict=True):
        assert {k: mine[k] for k in SAME} == {k: theirs[k] for k in SAME}
        assert mine["completion_ids"] == [*theirs["completion_ids"], *after]
        assert set(mine["w"]) <= {1.0} and not any(mine["labels"])
    return back


def test_trl_rows_have_its_three_fields_and_come_back(ours, chat, tmp_path):
    assert formats.to_trl(ours, tmp_path / "trl.jsonl") == 2
    rows = read_jsonl(tmp_path / "trl.jsonl")
    assert [set(r) - {"id"} for r in rows] == [{"prompt", "completion", "label"}] * 2
    formats.from_trl(tmp_path / "trl.jsonl", tmp_path / "back.jsonl", chat)
    back = same(tmp_path / "back.jsonl", ours)
    first = [back[0]["completion"][a:b] for a, b in back[0]["spans"]]
    assert first == ["\nI recall Paris.\n\n", "Wait.\n\n", "Yes.\n"]  # segments of the thought, by hand
    formats.to_trl(tmp_path / "back.jsonl", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "trl.jsonl").read_bytes()


def test_trls_messages_are_rendered_by_the_template(chat, tmp_path):
    said = [{"role": "user", "content": "Why?"}]
    answered = [{"role": "assistant", "content": "<think>a\n\nb</think>c<|im_end|>"}]
    write_jsonl(tmp_path / "trl.jsonl", [{"prompt": said, "completion": answered, "label": False}])
    formats.from_trl(tmp_path / "trl.jsonl", tmp_path / "out.jsonl", chat)
    (row,) = data.load_train(tmp_path / "out.jsonl")
    assert (row["id"], row["prompt"], row["completion"]) == ("row1", prompt_of("Why?"), "<think>a\n\nb</think>c")
    end = chat.tokenizer.token_to_id("<|im_end|>")
    assert row["completion_ids"][-2:] == [end, *encode(chat.tokenizer, "\n")]
    assert row["completion_ids"].count(end) == 1


def test_trl_reads_our_rows_and_theirs_as_the_same_data(ours, chat, tmp_path):
    """TRL's own checks of a data set: not conversational, unpaired, and the same columns it would use."""
    trl = pytest.importorskip("trl", reason="trl is not installed; requirements-test.txt has it")
    from datasets import load_dataset

    formats.to_trl(ours, tmp_path / "trl.jsonl")
    both = [
        load_dataset("json", data_files=str(p), split="train", cache_dir=str(tmp_path))
        for p in (ours, tmp_path / "trl.jsonl")
    ]
    for column in ("prompt", "completion", "label"):
        assert both[0][column][:] == both[1][column][:]
    assert not trl.is_conversational(both[0][0])


def test_llamafactory_gets_the_users_words_and_gives_them_back(ours, chat, tmp_path):
    folder = tmp_path / "lf"
    folder.mkdir()
    write_json(folder / "dataset_info.json", {"other": {"file_name": "x.json"}})
    formats.to_llamafactory(ours, folder, chat)
    info = read_json(folder / "dataset_info.json")
    assert info["other"] == {"file_name": "x.json"}
    assert info["mralign"]["formatting"] == "sharegpt"
    assert info["mralign"]["columns"] == {"messages": "conversations", "kto_tag": "kto_tag"}
    rows = json.loads((folder / "mralign.json").read_text(encoding="utf-8"))
    assert rows[0]["conversations"][0] == {"from": "human", "value": "What is {the} capital of France?"}
    assert rows[0]["conversations"][1]["value"].endswith("Paris\n")
    assert [r["kto_tag"] for r in rows] == [True, False]
    formats.from_llamafactory(folder, tmp_path / "back.jsonl", chat)
    same(tmp_path / "back.jsonl", ours, encode(chat.tokenizer, "\n"))


def test_llamafactory_entries_may_name_columns_and_tags_themselves(chat, tmp_path):
    entry = {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "msgs", "kto_tag": "good"}}
    entry |= {"tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}}
    write_json(tmp_path / "dataset_info.json", {"d": entry})
    said, answered = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    write_json(tmp_path / "d.json", [{"msgs": [said, answered], "good": True}])
    formats.from_llamafactory(tmp_path, tmp_path / "out.jsonl", chat, "d")
    (row,) = data.load_train(tmp_path / "out.jsonl")
    assert (row["prompt"], row["completion"], row["label"], row["spans"]) == (prompt_of("Why?"), "So.", True, [])
    write_json(tmp_path / "d.json", [{"msgs": [said, answered, said], "good": True}])
    with pytest.raises(InputError, match="row 1: turns are"):
        formats.from_llamafactory(tmp_path, tmp_path / "out.jsonl", chat, "d")
    with pytest.raises(InputError, match="no entry 'e'; --name one of d"):
        formats.from_llamafactory(tmp_path, tmp_path / "out.jsonl", chat, "e")


def test_factalign_gets_steps_as_sentences_and_keeps_its_own_labels(ours, chat, tmp_path):
    formats.to_factalign(ours, tmp_path / "fa.jsonl", chat)
    rows = read_jsonl(tmp_path / "fa.jsonl")
    assert rows[0]["prompt"] == [{"role": "user", "content": "What is {the} capital of France?"}]
    assert rows[0]["completion_sentences"] == ["\nI recall Paris.\n\n", "Wait.\n\nYes.\n"]
    # w = 1.25, 0.75: likelier, rarer than usual among good traces; in a rejected row the other way round
    assert [r["sentence_label"] for r in rows] == [[True, False], [False, True]]
    rows[0]["sentence_label"] = [False, False]
    write_jsonl(tmp_path / "theirs.jsonl", rows)
    formats.from_factalign(tmp_path / "theirs.jsonl", tmp_path / "back.jsonl", chat)
    back = same(tmp_path / "back.jsonl", ours, encode(chat.tokenizer, "\n"))
    assert [r["spans"] for r in back] == [r["spans"] for r in data.load_train(ours)]
    formats.to_factalign(tmp_path / "back.jsonl", tmp_path / "again.jsonl", chat)
    assert read_jsonl(tmp_path / "again.jsonl") == rows


def test_a_sentence_that_is_not_in_the_completion_is_an_error_and_never_dropped(ours, chat, tmp_path):
    formats.to_factalign(ours, tmp_path / "fa.jsonl", chat)
    rows = read_jsonl(tmp_path / "fa.jsonl")
    rows[1]["completion_sentences"].reverse()
    write_jsonl(tmp_path / "fa.jsonl", rows)
    with pytest.raises(InputError, match="row 2: sentence '大阪です。.*is not in the completion after"):
        formats.from_factalign(tmp_path / "fa.jsonl", tmp_path / "back.jsonl", chat)


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("label", "true", "field 'label' must be true or false, not 'true'"),
        ("prompt", {"role": "user", "content": "x"}, "field 'prompt' must be a text or a list of messages"),
        ("completion", [], "an empty completion; drop the row"),
    ],
)
def test_a_bad_row_is_named(ours, chat, tmp_path, field, value, message):
    formats.to_trl(ours, tmp_path / "trl.jsonl")
    rows = read_jsonl(tmp_path / "trl.jsonl")
    rows[1][field] = value
    write_jsonl(tmp_path / "trl.jsonl", rows)
    with pytest.raises(InputError, match=message) as error:
        formats.from_trl(tmp_path / "trl.jsonl", tmp_path / "back.jsonl", chat)
    assert "trl.jsonl: row 2: " in str(error.value)


def test_the_command_line_converts_and_names_what_is_missing(ours, chat, tmp_path, capsys):
    assert formats.main(["to-trl", str(ours), str(tmp_path / "trl.jsonl")]) == 0
    assert capsys.readouterr().out.endswith("trl.jsonl: 2 rows\n")
    back = ["from-trl", str(tmp_path / "trl.jsonl"), str(tmp_path / "back.jsonl")]
    assert formats.main(back) == 3 and "--model is needed" in capsys.readouterr().err
    assert formats.main([*back, "--model", str(tmp_path / "model")]) == 0
    same(tmp_path / "back.jsonl", ours)
    other = tmp_path / "other.jsonl"
    rows = [r | {"prompt": "no template\n"} for r in data.load_train(ours)]
    write_jsonl(other, rows)
    assert formats.main(["to-llamafactory", str(other), str(tmp_path), "--model", str(tmp_path / "model")]) == 3
    assert "row 1: prompt 'no template\\n' is not one user turn" in capsys.readouterr().err


SAID, ANSWERED = [{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "So."}]


def test_repeated_ids_are_refused_and_null_ones_are_none(chat, tmp_path):
    row = {"prompt": SAID, "completion": ANSWERED, "label": True}
    write_jsonl(tmp_path / "a.jsonl", [row | {"id": None}, row])
    formats.from_trl(tmp_path / "a.jsonl", tmp_path / "b.jsonl", chat)
    assert [r["id"] for r in read_jsonl(tmp_path / "b.jsonl")] == ["row1", "row2"]
    write_jsonl(tmp_path / "a.jsonl", [row | {"id": 7}, row | {"id": "7"}])
    with pytest.raises(InputError, match="row 2: id '7' is that of row 1 too"):
        formats.from_trl(tmp_path / "a.jsonl", tmp_path / "b.jsonl", chat)


@pytest.mark.parametrize(
    "entry",
    [None, {"hf_hub_url": "o/n"}, {"columns": None}, {"columns": {"messages": None, "kto_tag": "label"}}]
    + [{"file_name": "a\0b"}, {"hf_hub_url": "o/n", "file_name": "d.json"}, {"num_samples": 3}, {"ranking": True}]
    + [{"tags": []}, {"tags": {"role_tag": 1}}, {"columns": {"kto_tag": "label", "images": "images"}}],
)
def test_odd_entries_of_dataset_info_end_in_one_line(chat, tmp_path, entry):
    good = {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "m", "kto_tag": "label"}}
    if entry == {"hf_hub_url": "o/n"}:
        del good["file_name"]
    if entry == {"tags": []}:
        entry = {"tags": ["role"]}
    write_json(tmp_path / "dataset_info.json", {"mralign": entry and good | entry})
    write_json(tmp_path / "d.json", [])
    with pytest.raises(InputError, match="dataset_info.json: mralign"):
        formats.from_llamafactory(tmp_path, tmp_path / "t.jsonl", chat)


def test_llamafactorys_rows_may_stand_one_a_line(chat, tmp_path):
    entry = {"file_name": "d.jsonl", "formatting": "sharegpt", "columns": {"kto_tag": "kto_tag"}}
    write_json(tmp_path / "dataset_info.json", {"mralign": entry, "odd": entry | {"file_name": "odd.json"}})
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nala."}]
    write_jsonl(tmp_path / "d.jsonl", [{"conversations": turns, "kto_tag": flag} for flag in (True, False)])
    assert formats.from_llamafactory(tmp_path, tmp_path / "t.jsonl", chat) == 2
    assert [r["label"] for r in read_jsonl(tmp_path / "t.jsonl")] == [True, False]
    for rows in (None, {}, 3):
        write_json(tmp_path / "odd.json", rows)
        with pytest.raises(InputError, match="odd.json: must hold a JSON array of rows"):
            formats.from_llamafactory(tmp_path, tmp_path / "t.jsonl", chat, "odd")


@pytest.mark.parametrize(
    "change", [{"completion_sentences": [None]}, {"completion_sentences": True}, {"sentence_label": 1}]
)
def test_factaligns_sentences_are_texts(chat, tmp_path, change):
    row = {"prompt": SAID, "completion": ANSWERED, "label": True, "completion_sentences": [], "sentence_label": []}
    write_jsonl(tmp_path / "a.jsonl", [row | change])
    with pytest.raises(InputError, match="a.jsonl: row 1: 'completion_sentences' and 'sentence_label' must be lists"):
        formats.from_factalign(tmp_path / "a.jsonl", tmp_path / "b.jsonl", chat)
