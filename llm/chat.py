"""One model is asked one thing: a chat request in the words its server understands, paid for once.

`Chat.ask` turns messages into a request body, looks the body up in the ledger, and only if it is not there sends it.
The key is a hash of everything that shapes the reply: address, model, messages, temperature, seed, length limit, reply
format. The first call to a server finds out its dialect: whether it takes a JSON schema, only "some JSON object" or no
format at all, whether the length limit is called max_tokens or max_completion_tokens, and whether temperature and seed
may be set (reasoning models refuse them). The dialect is kept in the ledger, because it is part of every key.

Left out: streaming, tools, images, several choices.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from common.errors import Refused, ServiceError, Unanswered
from llm.client import Client, Endpoint, only_choice
from llm.ledger import Call, Ledger, Price, sha256_json

PATH = "/chat/completions"
FORMATS = ("json_schema", "json_object", "none")
OVERHEAD = 256  # tokens a server's chat template may put around a message


def inert(text: str) -> str:
    r"""A text in which no server's chat template finds a control token: what begins one is a JSON escape.

    Tokens begin with <, or with a bracket before a letter or a mark ([INST], [gMASK], [|user|], [/THINK], ]~b]). What
    may stand behind a bracket of JSON itself stays: a quote, a digit, another bracket, true, false, null.

    >>> inert('<|im_end|> [INST] ["a", [0], [|user|]')
    '\\u003c|im_end|> \\u005bINST] ["a", [0], \\u005b|user|]'
    """
    text = re.sub(r"\[(?=\s?[/|~!]?[A-Za-z|~_])(?!(?:true|false|null)\b)", r"\\u005b", text.replace("<", "\\u003c"))
    return re.sub(r"\](?=[~!])", r"\\u005d", text)


def sealed(value: Any, indent: int | None = None) -> str:
    """A value as JSON whose strings cannot end their place in a prompt, break its line or spell a control token."""
    shown = inert(json.dumps(value, ensure_ascii=False, indent=indent))
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in shown)


@dataclass(frozen=True)
class Dialect:
    """How a server wants to be asked. format: one of FORMATS. length: name of the length limit."""

    format: str = FORMATS[0]
    length: str = "max_tokens"
    temperature: bool = True
    seed: bool = True

    def easier(self, message: str) -> "Dialect | None":
        """The next dialect to try after a refusal with this message; None when there is none left."""
        if "max_tokens" in message and self.length == "max_tokens":
            return dataclasses.replace(self, length="max_completion_tokens")
        for name in ("temperature", "seed"):
            if name in message and getattr(self, name):
                return dataclasses.replace(self, **{name: False})
        later = FORMATS[FORMATS.index(self.format) + 1 :]
        return dataclasses.replace(self, format=later[0]) if later else None


@dataclass(frozen=True)
class Answer:
    """text: what the model wrote, "" for nothing. finish: the server's reason to end. cached: not paid for now."""

    text: str
    finish: str
    cached: bool


class Chat:
    """One model in one role ("a", "b", "judge", ...).

    client: None to build requests without sending any. price: None for a server that costs nothing. schema: JSON schema
    of every reply, None for free text.
    """

    def __init__(
        self,
        role: str,
        endpoint: Endpoint,
        client: Client | None,
        ledger: Ledger,
        price: Price | None,
        schema: dict[str, Any] | None,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self.role, self.client, self.ledger, self.price = role, client, ledger, price
        self.endpoint = endpoint
        self.schema, self.max_tokens, self.temperature, self.seed = schema, max_tokens, temperature, seed
        self.dialect, self.known = Dialect(), False
        self._recall()

    def _recall(self) -> None:
        learnt = self.ledger.dialects.get(str(self.endpoint), {})
        if learnt.keys() == dataclasses.asdict(Dialect()).keys():
            self.dialect, self.known = Dialect(**learnt), True

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request for these messages in the current dialect."""
        d = self.dialect
        body: dict[str, Any] = {"model": self.endpoint.model, "messages": messages, d.length: self.max_tokens}
        if d.temperature:
            body["temperature"] = self.temperature
        if d.seed:
            body["seed"] = self.seed
        if self.schema is not None and d.format == "json_schema":
            named = {"name": "reply", "strict": True, "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        elif self.schema is not None and d.format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def key(self, body: dict[str, Any]) -> str:
        """Under which the reply to this request is kept."""
        return sha256_json([self.endpoint.base_url, PATH, body])

    def bounds(self, messages: list[dict[str, str]]) -> tuple[int, int]:
        """Most tokens (prompt, completion) of a call: a token is at least one byte, of the messages or the schema."""
        schema = len(json.dumps(self.schema).encode()) if self.schema else 0
        return sum(len(m["content"].encode()) + OVERHEAD for m in messages) + schema, self.max_tokens

    def ask(self, messages: list[dict[str, str]]) -> Answer:
        """The model's answer, from the ledger if it is there. Raises ServiceError as client.post does."""
        if not self.known:
            with self.ledger.probing:  # one call finds the dialect, the others wait for it
                self._recall()
                if not self.known:
                    return self._probe(messages)
        return self._ask(messages)

    def _probe(self, messages: list[dict[str, str]]) -> Answer:
        while True:
            try:
                answer = self._ask(messages)
            except (Refused, Unanswered) as error:
                # 500: servers are known to crash on a reply format they cannot do
                easier = self.dialect.easier(str(error)) if error.status in (400, 422, 500) else None
                if easier is None:
                    raise
                self.dialect = easier
                continue
            self.ledger.learn(str(self.endpoint), dataclasses.asdict(self.dialect))
            self.known = True
            return answer

    def _ask(self, messages: list[dict[str, str]]) -> Answer:
        body = self.body(messages)
        key = self.key(body)
        if row := self.ledger.replies.get(key):
            return Answer(row["content"], str(row["finish"]), cached=True)
        facts = {"role": self.role, "endpoint": str(self.endpoint), "key": key, "prompt_sha256": sha256_json(messages)}
        prompt_bound, completion_bound = self.bounds(messages)
        call = Call(self.ledger, facts, self.price, prompt_bound, completion_bound)
        assert self.client is not None, self.role
        # For tokens a minute servers count about a quarter of the bytes, and the length limit whether used or not.
        reply = self.client.post(PATH, body, tokens=prompt_bound // 4 + completion_bound, account=call)
        try:
            text, finish = _content(reply, str(self.endpoint))
        except ServiceError:
            call.release(maybe_billed=True)
            raise
        call.settle(reply.get("usage"), id=str(reply.get("id", "")), content=text, finish=finish)
        return Answer(text, finish, cached=False)


def _joined(content: Any) -> str:
    """A content that is a text, or a list of parts of which those of type text are joined; "" for anything else."""
    if isinstance(content, list):
        parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") in ("text", "output_text")]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _content(reply: dict[str, Any], where: str = "the server") -> tuple[str, str]:
    """(text, finish reason) of a chat completion, ("", ...) when it holds none. Raises ServiceError at several.

    A server that splits thoughts from answers may put the answer on the wrong side: a thought that is alone counts.
    """
    choice = only_choice(reply, where)
    message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
    texts = [_joined(message.get(name)) for name in ("content", "reasoning_content", "reasoning")]
    text = next((t for t in texts if t.strip()), "")
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which no request can hold, becomes "?"
    return text, str(choice.get("finish_reason"))
