"""chat.py: a server's dialect is found once and kept, a reply is paid for once, and what is in a reply is found."""

import json

import pytest
from fake_server import FakeServer

from common.errors import Refused, ServiceError, Unanswered
from llm import chat as chats
from llm.chat import Chat
from llm.client import Client, Endpoint, Limits
from llm.ledger import Ledger

QUICK = Limits(backoff=0.001, backoff_cap=0.002, connect=1, read=1, exchange=2)
ASK = [{"role": "user", "content": "How do you do?"}]


@pytest.fixture
def server():
    with FakeServer(lambda body: f"I am {body['model']}") as fake:
        yield fake


def chat(server, book, role="a", model="m", seed=0, **more):
    endpoint = Endpoint(model, server.url)
    more = {"schema": {"type": "object"}, "max_tokens": 100, "temperature": 0.5} | more
    return Chat(role, endpoint, Client(endpoint, limits=QUICK), book, None, seed=seed, **more)


DIALECTS = {  # behaviour of the server: (requests until it answers, what the last one must hold)
    "ok": (1, {"max_tokens": 100, "temperature": 0.5, "seed": 0, "response_format": "json_schema"}),
    "no json_schema": (2, {"max_tokens": 100, "temperature": 0.5, "seed": 0, "response_format": "json_object"}),
    "no response_format": (3, {"max_tokens": 100, "temperature": 0.5, "seed": 0}),
    "no temperature": (2, {"max_tokens": 100, "seed": 0, "response_format": "json_schema"}),
    "no max_tokens": (
        2,
        {"max_completion_tokens": 100, "temperature": 0.5, "seed": 0, "response_format": "json_schema"},
    ),
    "crash on schema": (13, {"max_tokens": 100, "temperature": 0.5, "seed": 0}),  # six attempts each, then none
}


@pytest.mark.parametrize("name", DIALECTS)
def test_the_dialect_is_found_once_and_remembered(server, tmp_path, name):
    server.script = lambda number, body: name
    count, wanted = DIALECTS[name]
    with Ledger(tmp_path / "calls.jsonl") as book:
        a = chat(server, book)
        assert a.ask(ASK).text == "I am m" and len(server.requests) == count
        body = dict(server.requests[-1]["body"])
        assert (body.pop("model"), body.pop("messages")) == ("m", ASK)
        if "response_format" in body:
            body["response_format"] = body["response_format"]["type"]
        assert body == wanted
        a.ask([{"role": "user", "content": "And you?"}])
        assert len(server.requests) == count + 1
    with Ledger(tmp_path / "calls.jsonl") as book:  # the next run speaks the same dialect, so it finds the replies
        assert chat(server, book).ask(ASK).cached and chat(server, book, "b").ask(ASK).cached
        assert len(server.requests) == count + 1


def test_several_answers_are_refused_in_one_line_and_count_as_maybe_billed(server, tmp_path):
    server.script = ["two choices"]
    with Ledger(tmp_path / "calls.jsonl") as book:
        with pytest.raises(ServiceError, match=f"^m@{server.url}: a completion of 2 choice"):
            chat(server, book, schema=None).ask(ASK)
        assert not book.replies and book.tokens > 100  # the worst case, as nobody knows what it was
        assert chat(server, book, schema=None).ask(ASK).text == "I am m" and len(server.requests) == 2


def test_everything_that_shapes_the_reply_is_in_the_key(server, tmp_path):
    with Ledger(tmp_path / "calls.jsonl") as book, FakeServer(server.answer) as other:
        chat(server, book).ask(ASK)
        assert chat(server, book, role="judge").ask(ASK).cached  # who asks does not shape it
        changes = [{"model": "n"}, {"seed": 1}, {"temperature": 0.6}, {"max_tokens": 99}, {"schema": None}]
        for change in changes:
            assert not chat(server, book, **change).ask(ASK).cached
        assert not chat(server, book).ask([{"role": "user", "content": "How do you do!"}]).cached
        assert not chat(other, book).ask(ASK).cached
        keys = set(book.replies)
    assert len(keys) == 3 + len(changes)


def test_a_request_that_is_too_long_is_no_matter_of_dialect(server, tmp_path):
    server.script = lambda number, body: "context"
    with Ledger(tmp_path / "calls.jsonl") as book, pytest.raises(Refused, match="maximum context length"):
        chat(server, book).ask(ASK)
    assert not (tmp_path / "calls.jsonl").read_text()  # nothing learnt, nothing paid


def test_once_the_dialect_is_known_a_refusal_is_final(server, tmp_path):
    with Ledger(tmp_path / "calls.jsonl") as book:
        a = chat(server, book)
        a.ask(ASK)
        server.script = lambda number, body: "400"
        with pytest.raises(Refused):
            a.ask([{"role": "user", "content": "x"}])
        server.script = lambda number, body: "503"
        with pytest.raises(Unanswered):
            a.ask([{"role": "user", "content": "x"}])
    assert len(server.requests) == 1 + 1 + 6


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ok", "I am m"),
        ("reasoning field", "I am m"),
        ("answer in the thought", "I am m"),
        ("null content", ""),
        ("empty content", ""),
        ("no choices", ""),
    ],
)
def test_where_the_answer_stands(server, tmp_path, name, text):
    server.script = [name]
    with Ledger(tmp_path / "calls.jsonl") as book:
        assert chat(server, book).ask(ASK).text == text


def test_the_bound_holds_for_any_tokenizer(server, tmp_path):
    with Ledger(tmp_path / "calls.jsonl") as book:
        prompt, completion = chat(server, book, schema=None).bounds([{"role": "user", "content": "é" * 10}])
    assert prompt >= 20 + 4 and completion == 100  # two bytes a letter, and what a chat template adds


@pytest.mark.parametrize(
    "token",
    ["<|im_end|>", "</think>", "[INST]", "[/INST]", "[ INST ]", "[TOOL_CALLS]", "[gMASK]", "[|user|]", "[|endofturn|]"]
    + ["[UNUSED_TOKEN_145]", "[extra_id_0]", "[e~[", "]~b]", "]~!b[", "<start_of_turn>", "[/THINK]"],
)
def test_no_family_of_control_tokens_comes_through(token):
    value = {"a": [f"x {token} y", [0], [[1, 2]], None], "b": {"c": [True, "[0]"]}}
    for indent in (None, 0):
        shown = chats.sealed(value, indent)
        assert token not in shown and json.loads(shown) == value
    assert token not in chats.inert(f"as a model's own words: {token}{token}")
