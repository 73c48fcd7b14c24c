"""Every shape of row that TRL's preference trainers know: TRL's ids, or a reason in one line.

SHAPES holds each with what TRL 1.16 makes of it under TEMPLATE, recorded. The long tests ask TRL itself, with TEMPLATE
and with Qwen3's own tokenizer and template.
"""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import build_tokenizer, shared_data
from tokenizers import Tokenizer, normalizers, processors

import data
from common.errors import InputError
from common.files import read_jsonl, write_json, write_jsonl
from common.tokens import encode
from tools import formats
from tools.trl_rows import Chat, exchanges

# Thinks as Qwen3's does, calls tools, and takes content in parts, which Qwen3's does not.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}"
    "{% endif %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or [] %}{{ p.text }}"
    "{% endfor %}{% endif %}{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + ']' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def said(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": role} | ({} if content is None else {"content": content}) | more


SYSTEM, ASK = said("system", "Be brief."), said("user", "What color?")
BLUE, GREEN = said("assistant", "Blue."), said("assistant", "Green.")
CALLS = [{"type": "function", "function": {"name": "get", "arguments": {"of": "sky"}}}]
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
OFF = {"enable_thinking": False}
# What the template writes: turns, and the start of an answer.
S, U, A = (
    "<|im_start|>system\nBe brief.<|im_end|>\n",
    "<|im_start|>user\nWhat color?<|im_end|>\n",
    "<|im_start|>assistant\n",
)
T, END, NO = f"<|im_start|>system\n{json.dumps(TOOLS)}<|im_end|>\n", "<|im_end|>\n", "<think>\n\n</think>\n\n"


def of(prompt: Any, completion: Any, label: Any = True, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label} | more


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def thinks(content: str, thought: str, name: str = "thinking") -> dict[str, Any]:
    return said("assistant", content, **{name: thought})


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


BOTH = [(U + A, f"{NO}Blue.{END}", True), (U + A, f"{NO}Green.{END}", False)]
HARMONY = [
    (S + U + A, f"<think>\na\n</think>\n\nBlue.{END}", True),
    (S + U + A, f"<think>\nb\n</think>\n\nGreen.{END}", False),
]
EQUAL: dict[str, tuple[dict[str, Any], list[tuple[str, str, bool]]]] = {
    "texts": (of("The sky is", " blue."), [("The sky is", " blue.<|im_end|>", True)]),
    "texts, rejected": (of("The sky is", " green.", False), [("The sky is", " green.<|im_end|>", False)]),
    "texts, a pair": (
        pair("The sky is", " blue.", " green."),
        [("The sky is", " blue.<|im_end|>", True), ("The sky is", " green.<|im_end|>", False)],
    ),
    "texts, a pair with the prompt in both": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        [("The sky is", " blue.<|im_end|>", True), ("The sky is", " green.<|im_end|>", False)],
    ),
    "texts, one begins the other": (
        {"chosen": "The sky is blue", "rejected": "The sky is blue and green"},
        [("The sky is blu", "e<|im_end|>", True), ("The sky is blu", "e and green<|im_end|>", False)],
    ),
    "texts, a blank at the border": (of("The sky ", "is blue."), [("The sky", " is blue.<|im_end|>", True)]),
    "texts, the end token written out": (
        of("The sky is", " blue.<|im_end|>"),
        [("The sky is", " blue.<|im_end|>", True)],
    ),
    "texts, a rendered prompt": (of(U + A, f"{NO}Blue."), [(U + A, f"{NO}Blue.<|im_end|>", True)]),
    "texts, not in normal form": (of("Cafe\u0301?", " e\u0301."), [("Caf\u00e9?", " \u00e9.<|im_end|>", True)]),
    "texts, an accent at the border": (of("An e", "\u0301t"), [("An ", "\u00e9t<|im_end|>", True)]),
    "messages": (of([ASK], [BLUE]), BOTH[:1]),
    "messages, a pair": (pair([ASK], [BLUE], [GREEN]), BOTH),
    "messages, a pair with the prompt in both": ({"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, BOTH),
    "messages, one begins the other": (
        {"chosen": [ASK, BLUE], "rejected": [ASK, BLUE, ASK, GREEN]},
        [(U + A, f"{NO}Blue.{END}", True), (U + A, f"Blue.{END}{U}{A}{NO}Green.{END}", False)],
    ),
    "a system turn": (of([SYSTEM, ASK], [BLUE]), [(S + U + A, f"{NO}Blue.{END}", True)]),
    "a system turn, a pair": (
        pair([SYSTEM, ASK], [BLUE], [GREEN]),
        [(S + U + A, f"{NO}Blue.{END}", True), (S + U + A, f"{NO}Green.{END}", False)],
    ),
    "several turns": (of([ASK, BLUE, ASK], [GREEN]), [(f"{U}{A}Blue.{END}{U}{A}", f"{NO}Green.{END}", True)]),
    "ends with the user": (of([ASK], [BLUE, ASK]), [(U + A, f"Blue.{END}{U}", True)]),
    "a thought as thinking": (of([SYSTEM, ASK], [thinks("Blue.", "a")]), HARMONY[:1]),
    "a thought as thinking, a pair": (pair([SYSTEM, ASK], [thinks("Blue.", "a")], [thinks("Green.", "b")]), HARMONY),
    "a thought as thinking, the prompt in both": (
        {"chosen": [SYSTEM, ASK, thinks("Blue.", "a")], "rejected": [SYSTEM, ASK, thinks("Green.", "b")]},
        HARMONY,
    ),
    "a thought as reasoning_content": (of([SYSTEM, ASK], [thinks("Blue.", "a", "reasoning_content")]), HARMONY[:1]),
    "a thought as reasoning": (of([SYSTEM, ASK], [thinks("Blue.", "a", "reasoning")]), HARMONY[:1]),
    "chat_template_kwargs": (of([ASK], [BLUE], chat_template_kwargs=OFF), [(U + A + NO, f"Blue.{END}", True)]),
    "chat_template_kwargs, a pair": (
        pair([ASK], [BLUE], [GREEN], chat_template_kwargs=OFF),
        [(U + A + NO, f"Blue.{END}", True), (U + A + NO, f"Green.{END}", False)],
    ),
    "chat_template_kwargs, null": (of([ASK], [BLUE], chat_template_kwargs={"enable_thinking": None}), BOTH[:1]),
    "tools": (of([ASK], [BLUE], tools=TOOLS), [(T + U + A, f"{NO}Blue.{END}", True)]),
    "tools as a JSON text": (of([ASK], [BLUE], tools=json.dumps(TOOLS)), [(T + U + A, f"{NO}Blue.{END}", True)]),
    "tools, none of them": (of([ASK], [BLUE], tools=[]), BOTH[:1]),
    "a call and its result": (
        of([ASK], [said("assistant", tool_calls=CALLS), said("tool", "blue", name="get"), BLUE], tools=TOOLS),
        [(T + U + A, f"[get]{END}<|im_start|>tool\nblue{END}{A}{NO}Blue.{END}", True)],
    ),
    "a call, a pair": (
        pair([ASK], [said("assistant", tool_calls=CALLS)], [BLUE], tools=TOOLS),
        [(T + U + A, f"{NO}[get]{END}", True), (T + U + A, f"{NO}Blue.{END}", False)],
    ),
    "a result in the prompt": (
        of([ASK, said("assistant", "", tool_calls=CALLS), said("tool", "blue")], [BLUE]),
        [(f"{U}{A}[get]{END}<|im_start|>tool\nblue{END}{A}", f"{NO}Blue.{END}", True)],
    ),
    "content in text parts": (
        of(
            [said("user", [{"type": "text", "text": "What color?"}])],
            [said("assistant", [{"type": "text", "text": "Blue."}])],
        ),
        BOTH[:1],
    ),
    "messages, not in normal form": (
        of([said("user", "Cafe\u0301?")], [said("assistant", "Cafe\u0301.")]),
        [(f"<|im_start|>user\nCaf\u00e9?{END}{A}", f"{NO}Caf\u00e9.{END}", True)],
    ),
    "columns and keys nobody knows": (of([ASK | {"name": "Ann"}], [BLUE], score=3, source=None), BOTH[:1]),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "a language model's text": ({"text": "The sky is blue."}, "'text' does not say where the completion starts"),
    "a language model's messages": ({"messages": [ASK, BLUE]}, "'messages' does not say where the completion starts"),
    "a prompt alone": ({"prompt": "The sky is"}, "'completion' is missing"),
    "a prompt alone, messages": ({"prompt": [ASK]}, "'completion' is missing"),
    "no label": ({"prompt": "The sky is", "completion": " blue."}, "'label' is missing"),
    "no label, messages": ({"prompt": [ASK], "completion": [BLUE]}, "'label' is missing"),
    "a label of null": (of([ASK], [BLUE], None), "'label' is missing"),
    "a label that is a number": (of([ASK], [BLUE], 1), "'label' must be true or false, not 1"),
    "half a pair": ({"prompt": [ASK], "chosen": [BLUE]}, "'rejected' is missing"),
    "a pair of equals": (pair([ASK], [BLUE], [BLUE]), "are the same"),
    "a pair that has nothing in common": ({"chosen": "Blue.", "rejected": "Green."}, "begin with nothing in common"),
    "another trainer's conversation": ({"conversations": [{"from": "human", "value": "?"}]}, "use from-llamafactory"),
    "a text and messages": (of("What color?", [BLUE]), "must all be texts or all be messages"),
    "a text and messages, a pair": (pair("What color?", [ASK, BLUE], [ASK, GREEN]), "must all be texts or all be"),
    "images": (of([ASK], [BLUE], images=["a.png"]), "'images' needs a model that sees"),
    "a part that is an image": (of([said("user", [{"type": "image"}])], [BLUE]), "a part of type 'image'"),
    "an image in a message": (of([ASK | {"images": ["a.png"]}], [BLUE]), "'images' needs a model that sees"),
    "an answer begun in the prompt": (of([ASK, said("assistant", "It")], [BLUE]), "does not repeat the prompt"),
    "a variable that is none": (of([ASK], [BLUE], chat_template_kwargs={"tokenize": False}), "'tokenize' is not a var"),
    "variables that are none": (of([ASK], [BLUE], chat_template_kwargs=[1]), "must be an object"),
    "tools that are no JSON": (of([ASK], [BLUE], tools="{"), "'tools' is not JSON"),
    "tools that are functions": (of([ASK], [BLUE], tools=["f"]), "'tools' must be a list of JSON schemas"),
    "an empty question": (of([said("user", " ")], [BLUE]), "an empty prompt"),
    "an empty answer": (of([ASK], [said("assistant", "")]), "an empty completion"),
    "no messages": (of([ASK], []), "an empty completion"),
    "a message without a role": (of([{"content": "?"}], [BLUE]), "without a role"),
    "messages that are texts": (of(["?"], ["!"]), "must be a text or a list of messages"),
    "a row that is a list": ([1], "is not an object"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.normalizer = normalizers.NFC()  # as Qwen's
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    return path


@pytest.fixture(scope="module")
def chat(folder) -> Chat:
    return Chat.of(str(folder))


def ours(chat: Chat, row: Any) -> list[dict[str, Any]]:
    return [chat.row("r", exchange) for exchange in exchanges(copy.deepcopy(row))]


@pytest.mark.parametrize("shape", EQUAL)
def test_a_row_is_what_trl_trains_on(chat, shape, tmp_path):
    row, expected = EQUAL[shape]
    made = ours(chat, row)
    decode = lambda ids: chat.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    assert [(decode(r["prompt_ids"]), decode(r["completion_ids"]), r["label"]) for r in made] == expected
    for r, (prompt, completion, _) in zip(made, expected, strict=True):
        assert r["prompt_ids"] + r["completion_ids"] == encode(chat.tokenizer, prompt + completion)
        assert r["prompt"] == prompt and r["completion"] == completion.removesuffix("\n").removesuffix("<|im_end|>")
    write_jsonl(tmp_path / "train.jsonl", made)
    data.to_rows(data.load_train(tmp_path / "train.jsonl"), chat.tokenizer)  # training takes it


@pytest.mark.parametrize("shape", REFUSED)
def test_a_row_is_refused_with_its_reason(chat, shape):
    row, reason = REFUSED[shape]
    with pytest.raises(InputError) as caught:
        ours(chat, row)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_pair_is_two_rows_of_one_fact(chat, tmp_path):
    """Ids that differ only after # ask for the same fact."""
    write_jsonl(tmp_path / "a.jsonl", [pair([ASK], [BLUE], [GREEN], id="q"), pair([ASK], [GREEN], [BLUE])])
    assert formats.from_trl(tmp_path / "a.jsonl", tmp_path / "b.jsonl", chat) == 4
    rows = read_jsonl(tmp_path / "b.jsonl")
    assert [(r["id"], r["label"]) for r in rows] == [
        *(("q#chosen", True), ("q#rejected", False)),
        *(("row2#chosen", True), ("row2#rejected", False)),
    ]


def test_a_refused_row_is_named_and_nothing_is_written(chat, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [of([ASK], [BLUE]), of([ASK], [BLUE], images=["a.png"])])
    with pytest.raises(InputError, match="a.jsonl: row 2: field 'images'"):
        formats.from_trl(tmp_path / "a.jsonl", tmp_path / "b.jsonl", chat)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "row",
    [of(U + A, f"{NO}Blue.<|im_end|>\n"), of([ASK], [said("assistant", "Blue.<|im_end|>")])],
    ids=["a rendered text", "a message"],
)
def test_one_end_token_where_the_row_has_it_already(chat, row):
    """TRL writes a second one after both."""
    (made,) = ours(chat, row)
    assert chat.tokenizer.decode(made["completion_ids"], skip_special_tokens=False) == f"{NO}Blue.<|im_end|>\n"
    assert made["completion"] == f"{NO}Blue."


def test_the_thought_of_a_row_is_cut_into_steps(chat):
    (made,) = ours(chat, of([ASK], [thinks("Blue.", "I recall.\n\nYes.")]))
    assert [made["completion"][a:b] for a, b in made["spans"]] == ["\nI recall.\n\n", "Yes.\n"]
    assert made["w"] == [1.0, 1.0]


def with_start(folder, tmp_path) -> tuple[Tokenizer, Chat]:
    """A tokenizer that puts <|im_start|> in front of every text, as Llama's puts its start token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    write_json(tmp_path / "tokenizer_config.json", config)
    return tokenizer, Chat.of(str(tmp_path))


def test_texts_get_the_start_token_that_the_tokenizer_adds_and_messages_do_not(folder, tmp_path):
    tokenizer, chat = with_start(folder, tmp_path)
    start = tokenizer.token_to_id("<|im_start|>")
    (made,) = ours(chat, of("The sky is", " blue."))
    assert made["prompt_ids"] == [start, *encode(tokenizer, "The sky is")]
    for row in (of(U + A, "Blue."), of([ASK], [BLUE])):
        assert ours(chat, row)[0]["prompt_ids"] == encode(tokenizer, U + A)  # one, which the template wrote


# ---------- TRL itself


def theirs(tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int], bool]]:
    """What KTOTrainer makes of the rows: its own method, without a model around it."""
    from accelerate import PartialState
    from datasets import Dataset
    from trl import KTOTrainer

    PartialState()  # else its warnings raise, and a row it only warns of would look refused
    me = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, per_device_train_batch_size=1)
    made = KTOTrainer._prepare_dataset(me, Dataset.from_list(copy.deepcopy(rows)), tokenizer, args, "train")
    return [(r["prompt_ids"], r["completion_ids"], r["label"]) for r in made]


def same_as_trl(folder: Any, shapes: dict[str, Any], fail: set[str] = frozenset()) -> int:
    """How many shapes give TRL's ids; those in `fail` must be refused by both."""
    pytest.importorskip("trl", reason="trl is not installed; requirements-test.txt has it")
    from transformers import AutoTokenizer

    tokenizer, chat, equal = AutoTokenizer.from_pretrained(folder), Chat.of(str(folder)), 0
    for name, (row, _) in shapes.items():
        if name in fail:
            with pytest.raises(InputError):
                ours(chat, row)
            with pytest.raises(Exception, match="has no attribute"):
                theirs(tokenizer, [row])
            continue
        mine = [(r["prompt_ids"], r["completion_ids"], r["label"]) for r in ours(chat, row)]
        assert mine == theirs(tokenizer, [row]), name
        equal += 1
    return equal


@pytest.mark.long
def test_trl_makes_the_same_ids_of_every_shape(folder):
    assert same_as_trl(folder, EQUAL) == len(EQUAL)


@pytest.mark.long
def test_trl_makes_the_same_ids_with_qwen3s_own_tokenizer_and_template(qwen3_tokenizer):
    no_content = {
        "a call and its result",
        "a call, a pair",
        "content in text parts",
    }  # Qwen3's template asks for a text
    assert same_as_trl(shared_data() / "qwen3_tokenizer", EQUAL, no_content) == len(EQUAL) - 3


@pytest.mark.long
def test_trl_adds_the_start_token_to_texts_only(folder, tmp_path):
    with_start(folder, tmp_path)
    assert same_as_trl(tmp_path, {k: EQUAL[k] for k in ("texts", "texts, a pair", "messages", "several turns")}) == 4


TAKEN_THERE = {  # refused here although TRL goes on: with an image dropped, a prompt cut, or nothing to learn from
    *("images", "a part that is an image", "an image in a message", "an answer begun in the prompt"),
    *("a pair of equals", "a pair that has nothing in common", "an empty question", "an empty answer"),
    *("a label that is a number", "no messages"),
}


@pytest.mark.long
def test_what_else_is_refused_fails_in_trl_too(folder):
    pytest.importorskip("trl", reason="trl is not installed; requirements-test.txt has it")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in REFUSED.keys() - TAKEN_THERE:
        with pytest.raises(Exception):  # noqa: B017 (every kind of exception)
            theirs(tokenizer, [REFUSED[name][0]])
