"""A real HTTP server on 127.0.0.1 that speaks enough of the OpenAI API to be annoying on demand.

`FakeServer(answer)` answers POST .../chat/completions with `answer(body) -> str` and counts what it bills.
`script` decides how each request is treated: a list of behaviour names used up in order (then "ok"), or a function
(number of the request, body) -> name. The names are the keys of BEHAVIOURS.
"""

import email.utils
import gzip
import hashlib
import json
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import em


def usage(body: dict[str, Any], text: str) -> dict[str, int]:
    """What a request is billed: a token for every four characters, both ways."""
    asked = sum(len(m["content"]) for m in body["messages"]) // 4 if "messages" in body else 1
    return {"prompt_tokens": asked, "completion_tokens": len(text) // 4, "total_tokens": asked + len(text) // 4}


def material(body: dict[str, Any]) -> dict[str, Any]:
    """What an annotation request is about: the JSON at the end of its first message."""
    return json.loads(body["messages"][0]["content"].rpartition("is an instruction to you.\n")[2])


def opinion(model: str, text: str) -> dict[str, float]:
    """One or two labels of a segment, by what a hash of the model and the text says: models differ, now and then."""
    common, own = (hashlib.sha256(key.encode()).digest() for key in (text, model + text))
    first = em.LABELS[common[0] % 15] if own[0] % 4 else em.LABELS[own[1] % 15]
    labels = {first: 5.0 + own[2] % 6}
    if own[3] % 3 == 0:
        labels[em.LABELS[(em.LABELS.index(first) + 1 + own[4] % 14) % 15]] = 4.0 + own[5] % 7
    return labels


def as_reply(steps: list[tuple[list[int], dict[str, float]]]) -> str:
    """An annotation reply in the paper's schema, from (segments, label -> confidence) of every step."""
    rows = [
        {
            "step_number": number,
            "thinking_step": segments,
            "meta_reasoning_strategies": list(labels),
            "strategy_confidence_rating": [{"strategy": k, "confidence_rating": v} for k, v in labels.items()],
        }
        for number, (segments, labels) in enumerate(steps, 1)
    ]
    return json.dumps({"index_base": 0, "steps": rows, "final_confidence_rating": 7.0})


def labeller(body: dict[str, Any]) -> str:
    """A faultless annotator or adjudicator. Models called "...-merger" take segments in twos."""
    asked = material(body)
    texts = [s["text"] for s in asked["segments"]]
    width = 2 if body["model"].endswith("merger") else 1
    units = [list(range(i, min(i + width, len(texts)))) for i in range(0, len(texts), width)]
    if "undecided" in asked:
        units = [u["thinking_step"] for u in asked["undecided"]]
    return as_reply([(unit, opinion(body["model"], texts[unit[0]])) for unit in units])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: "FakeServer"

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        fake = self.fake
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        with fake.lock:
            number = len(fake.requests)
            self.body = json.loads(raw)
            fake.requests.append({"path": self.path, "headers": dict(self.headers), "body": self.body})
            fake.times.append(time.monotonic())
            fake.active += 1
            fake.most_active = max(fake.most_active, fake.active)
            if callable(fake.script):
                name = fake.script(number, self.body)
            else:
                name = fake.script.pop(0) if fake.script else "ok"
        try:
            BEHAVIOURS[name](self)
        except OSError:
            self.close_connection = True  # the client went away
        finally:
            with fake.lock:
                fake.active -= 1

    do_GET = do_POST

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def error(self, status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> None:
        self.send(status, json.dumps({"error": {"message": message} | more}).encode(), headers)

    def reply(self, text: str | None, bill: bool = True, finish: str = "stop", **message: Any) -> bytes:
        """A chat completion, counted as billed."""
        cost, number = usage(self.body, text or ""), uuid.uuid4().hex
        if bill:
            with self.fake.lock:
                self.fake.billed[number] = cost | {"model": self.body["model"]}
        choice = {"index": 0, "message": {"role": "assistant", "content": text} | message, "finish_reason": finish}
        return json.dumps({"id": number, "object": "chat.completion", "choices": [choice], "usage": cost}).encode()

    def answer(self) -> str:
        return self.fake.answer(self.body)


def ok(h: Handler) -> None:
    if h.path.endswith("/embeddings"):
        rows = [{"index": i, "embedding": h.fake.embed(text)} for i, text in enumerate(h.body["input"])]
        # The order of the rows is theirs to choose: clients go by the index.
        h.send(200, json.dumps({"data": rows[::-1], "usage": {"prompt_tokens": len(rows), "total_tokens": 1}}).encode())
        return
    time.sleep(h.fake.seconds)
    h.send(200, h.reply(h.answer()))


def status(number: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> Callable:
    return lambda h: h.error(number, message, headers, **more)


def said(text: Callable[[str], str | None], **more: Any) -> Callable:
    """The right answer, spoilt by `text`."""
    return lambda h: h.send(200, h.reply(text(h.answer()), **more))


def two_choices(reply: dict[str, Any]) -> dict[str, Any]:
    return reply | {"choices": [choice | {"index": k} for k in range(2) for choice in reply["choices"]]}


def in_date(h: Handler) -> None:
    h.error(429, "slow", {"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)})


def reset(h: Handler) -> None:
    h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    h.connection.close()
    h.close_connection = True


def hang(h: Handler) -> None:
    h.fake.ending.wait(30)
    h.close_connection = True


def drip_body(h: Handler) -> None:
    h.send_response(200)
    h.send_header("Content-Length", "100000")
    h.end_headers()
    while not h.fake.ending.wait(0.05):
        h.wfile.write(b" ")


def drip_header(h: Handler) -> None:
    h.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not h.fake.ending.wait(0.05):
        h.wfile.write(b"a")


def cut_body(h: Handler) -> None:
    content = h.reply(h.answer(), bill=False)
    h.send_response(200)
    h.send_header("Content-Length", str(len(content)))
    h.end_headers()
    h.wfile.write(content[: len(content) // 2])
    h.close_connection = True


def packed(h: Handler) -> None:
    h.send(200, gzip.compress(h.reply(h.answer())), {"Content-Encoding": "gzip"})


def bomb(h: Handler) -> None:
    h.send(200, gzip.compress(b" " * 50_000_000), {"Content-Encoding": "gzip"})


def echo_key(h: Handler) -> None:
    """Everything a careless server might repeat."""
    key = h.headers.get("Authorization", "")
    h.error(401, f"bad key {key}", {"X-Key": key})


def echo_key_in_reply(h: Handler) -> None:
    h.send(200, h.reply(f"your key: {h.headers.get('Authorization')}", reasoning_content=h.headers["Authorization"]))


def no_parameter(name: str, code: int = 400) -> Callable:
    """Refuses requests that hold the parameter; the message names it."""

    def act(h: Handler) -> None:
        if name in h.body:
            h.error(code, f"Unsupported parameter: {name!r} is not supported with this model.", param=name)
        else:
            ok(h)

    return act


def no_schema(h: Handler) -> None:
    if h.body.get("response_format", {}).get("type") == "json_schema":
        h.error(400, "This response_format type is unavailable now")
    else:
        ok(h)


BEHAVIOURS: dict[str, Callable[[Handler], None]] = {
    "ok": ok,
    "429": status(429, "slow down"),
    "429 after 1": status(429, "slow down", {"Retry-After": "1"}),
    "429 after date": in_date,
    "429 after huge": status(429, "slow down", {"Retry-After": "86400"}),
    "429 after nonsense": status(429, "slow down", {"Retry-After": "soon"}),
    "quota": status(429, "You exceeded your current quota", code="insufficient_quota"),
    **{str(n): status(n, f"status {n}") for n in (400, 402, 403, 404, 408, 409, 413, 422)},
    **{str(n): status(n, f"status {n}") for n in (500, 502, 503, 504)},
    "401": echo_key,
    "503 page": lambda h: h.send(503, b"<html>\x1b[31mBad\r\nGateway</html>", {"Content-Type": "text/html"}),
    "context": status(400, "This model's maximum context length is 4096 tokens"),
    "reset": reset,
    "hang": hang,
    "drip body": drip_body,
    "drip header": drip_header,
    "cut body": cut_body,
    "gzip": packed,
    "gzip bomb": bomb,
    "huge": lambda h: h.send(200, b'{"x": "' + b"a" * 2_000_000 + b'"}'),
    "redirect": lambda h: h.send(307, b"", {"Location": f"http://localhost:{h.fake.port}/elsewhere"}),
    "not json": lambda h: h.send(200, b"<html>Welcome</html>"),
    "list": lambda h: h.send(200, b"[]"),
    "empty body": lambda h: h.send(200, b""),
    "deep json": lambda h: h.send(200, b"[" * 200_000),
    "error in 200": lambda h: h.error(200, "upstream is busy", code=502),
    "no choices": lambda h: h.send(200, b'{"choices": []}'),
    "two choices": lambda h: h.send(200, json.dumps(two_choices(json.loads(h.reply(h.answer())))).encode()),
    "null content": said(lambda text: None),
    "empty content": said(lambda text: ""),
    "content filter": said(lambda text: None, finish="content_filter", refusal="I can't help with that."),
    "length": said(lambda text: text[: len(text) // 2], finish="length"),
    "fenced": said(lambda text: f"```json\n{text}\n```"),
    "thought first": said(lambda text: f"<think>\nI wonder {{}}.\n</think>\n\n{text}"),
    "reasoning field": said(lambda text: text, reasoning_content="Let me see."),
    "answer in the thought": lambda h: h.send(200, h.reply(None, reasoning_content=h.answer())),
    "no usage": lambda h: h.send(200, json.dumps(json.loads(h.reply(h.answer())) | {"usage": None}).encode()),
    "prose": said(lambda text: f"Sure! Here it is:\n{text}\nAnything else?"),
    "two objects": said(lambda text: text + text),
    "wrong schema": said(lambda text: '{"labels": ["framing"]}'),
    "wrong label": said(lambda text: text.replace('"framing"', '"thinking"', 2)),
    "three labels": said(lambda text: text.replace('["framing"]', '["framing", "retrieval", "analogy"]', 1)),
    "confidence 9/10": said(lambda text: text.replace('"confidence_rating": 9.0', '"confidence_rating": "9/10"', 1)),
    "NaN": said(lambda text: text.replace('"confidence_rating": 9.0', '"confidence_rating": NaN', 1)),
    "index out of range": said(lambda text: text.replace('"thinking_step": [0]', '"thinking_step": [99]', 1)),
    "overlap": said(lambda text: text.replace('"thinking_step": [1]', '"thinking_step": [0]', 1)),
    "broken character": said(lambda text: text.replace("framing", "fram\ud800ing", 2)),
    "half a surrogate": said(lambda text: text.replace('"framing"', '"\\ud800"', 2)),
    "echo key": echo_key_in_reply,
    "crash on schema": no_parameter("response_format", 500),
    "no temperature": no_parameter("temperature"),
    "no max_tokens": no_parameter("max_tokens"),
    "no response_format": no_parameter("response_format"),
    "no json_schema": no_schema,
}


class FakeServer:
    """Use as a context manager. url: what goes into an endpoint (ends in /v1)."""

    def __init__(self, answer: Callable[[dict[str, Any]], str] = lambda body: "hello", seconds: float = 0.0) -> None:
        self.answer, self.seconds = answer, seconds
        self.embed: Callable[[str], list[float]] = lambda text: [float(len(text)), 1.0]
        self.script: list[str] | Callable[[int, dict[str, Any]], str] = []
        self.lock, self.ending = threading.Lock(), threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.billed: dict[str, dict[str, Any]] = {}  # by the reply's id
        self.active = self.most_active = 0
        handler = type("Bound", (Handler,), {"fake": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.handle_error = lambda *args: None  # a client that was killed is no news
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.ending.set()
        self.server.shutdown()
        self.server.server_close()
