"""One client for every OpenAI-compatible server: OpenAI, DeepSeek, vLLM, SGLang, llama.cpp.

`Client.post` sends one JSON request and returns the server's JSON object, or raises. Between the two: at most six
attempts with random pauses, a pause the server asks for, limits on requests and tokens a minute and on requests in
flight, a clock that also catches a server that sends a byte now and then, and a largest body. `in_threads` runs many
calls at once and ends promptly when one of them fails for good or on Ctrl-C.

A key is named, never given: an endpoint holds the NAME of an environment variable, which is read when a request is
sent. The key's text is cut out of everything a server sends back, so it cannot reach a log, a file or a message.

Left out: streaming replies, HTTP redirects (a redirect is an error that names its target), other authentication than
a bearer token.
"""

import contextlib
import datetime
import email.utils
import functools
import html.entities
import ipaddress
import json
import os
import queue
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3

from common.errors import CallsStopped, InputError, Refused, ServiceError, Unanswered

T = TypeVar("T")
R = TypeVar("R")

QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")  # a 429 that waiting does not cure
REMEDY = {
    400: "the server cannot take this request: compare the model's limits with what the message says",
    401: "check the key",
    402: "add credit, then run the same command again: answered calls are not repeated",
    403: "the key may not use this model: check its permissions",
    404: "check the model's name and the address (it usually ends in /v1)",
}


@dataclass(frozen=True)
class Endpoint:
    """A model at a server. key_env: name of the environment variable that holds the key, "" to send none.

    key_header: the header it goes into; in Authorization it stands after the word Bearer, in any other alone.
    """

    model: str
    base_url: str
    key_env: str = ""
    key_header: str = "Authorization"

    def __str__(self) -> str:
        return f"{self.model}@{self.base_url}"

    def key(self) -> str:
        """The key, "" without one. Raises InputError when the variable is unset or its text cannot be sent."""
        if not self.key_env:
            return ""
        value = os.environ.get(self.key_env, "")
        if not value:
            raise InputError(f"{self}: environment variable {self.key_env} is not set; export it with the key in it")
        if not re.fullmatch(r"[!-~]{4,}", value):  # also keeps a line end out of the header
            raise InputError(f"{self}: {self.key_env} holds blanks or too little; export the key alone")
        return value


def parse_endpoint(text: str) -> Endpoint:
    """An Endpoint from MODEL@BASE_URL or MODEL@BASE_URL#KEY_VARIABLE. Raises InputError.

    >>> parse_endpoint("gpt-4o@https://api.openai.com/v1#OPENAI_API_KEY")
    Endpoint(model='gpt-4o', base_url='https://api.openai.com/v1', key_env='OPENAI_API_KEY')
    """
    match = re.fullmatch(r"(\S.*)@(https?://[^\s#?]+?)/*(?:#([A-Z][A-Z0-9_]*))?", text)
    if not match:
        # Not the text itself: somebody may have put a key there. So a variable's name must look like one.
        raise InputError(
            "an endpoint must look like MODEL@BASE_URL#KEY_VARIABLE, for example "
            "gpt-4o@https://api.openai.com/v1#OPENAI_API_KEY (the variable's name in capitals); without #... for a "
            "server that wants no key"
        )
    endpoint = Endpoint(match[1], match[2], match[3] or "")
    try:
        url = urlsplit(endpoint.base_url)
        _ = url.port
    except ValueError:
        raise InputError("an endpoint's address must be a plain https://host/path; this one does not parse") from None
    if url.username or url.password or not url.hostname:
        raise InputError("an endpoint's address must be a plain https://host/path; put keys into the environment")
    if endpoint.key_env and url.scheme == "http" and not _is_loopback(url.hostname):
        raise InputError(f"{endpoint}: a key would cross the network unencrypted; use https or leave out #KEY_VARIABLE")
    return endpoint


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, however it is written: localhost., 127.1, 0x7f.1, 2130706433, ::ffff:127.0.0.1.

    0.0.0.0 and :: count: a connection to "no address" goes to the machine itself. Nothing is looked up.
    """
    host = host.removesuffix(".")
    with contextlib.suppress(OSError, UnicodeError):
        host = socket.inet_ntoa(
            socket.inet_aton(host)
        )  # short, octal and hexadecimal forms, as name look-ups take them
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")  # RFC 6761


def _without(key: str, text: str) -> str:
    """`text` with [key] in place of the key, also where JSON, HTML or a URL, at any depth, has escaped letters."""
    return re.sub("".join(map(_spellings, key)), "[key]", text)


@functools.cache
def _spellings(letter: str) -> str:
    r"""A pattern of the ways to write a letter: &, \\&, \u0026, \x26, \046, %26, %2526, &amp;, &#38;, &amp;#x26;."""
    number, back = ord(letter), r"\\{1,15}"
    names = [name for name, said in html.entities.html5.items() if said == letter and name.endswith(";")]
    entity = "|".join([rf"#0*{number}", rf"#x0*{number:x}", *(re.escape(name[:-1]) for name in names)])
    escapes = [rf"{back}(?:u\{{?0*|U0*|x){number:02x}\}}?", rf"{back}0?{number:03o}", rf"%(?:25){{0,15}}{number:02x}"]
    escapes.append(rf"&(?:amp;){{0,15}}(?:{entity});")
    return rf"(?:\\{{0,15}}{re.escape(letter)}|(?i:{'|'.join(escapes)}))"


@dataclass(frozen=True)
class Limits:
    """Bounds on one `post`, in seconds where not said otherwise."""

    attempts: int = 6
    backoff: float = 1.0  # the pause before attempt n + 1 is uniform in [0, backoff * 2^(n - 1)]
    backoff_cap: float = 60.0
    retry_after_cap: float = 120.0  # longest pause a server may ask for
    connect: float = 10.0
    read: float = 300.0  # longest silence
    exchange: float = 600.0  # longest single attempt, however the bytes trickle
    total: float = 1800.0  # no attempt starts later than this
    body: int = 16 * 2**20  # bytes of a reply, decompressed


class Account(Protocol):
    """Told about every attempt of a call: what may be spent is put aside before it, given back if it cost nothing."""

    def reserve(self) -> None:
        """Called before an attempt; raises to forbid it."""
        ...

    def release(self, maybe_billed: bool) -> None:
        """Called after an attempt without a usable reply. maybe_billed: the server may have done the work."""
        ...


class Gate:
    """At most `limit` requests in flight; a 429 halves the limit, as many good replies as the limit add one again."""

    def __init__(self, most: int) -> None:
        self.most = self.limit = most
        self.active = self.good = self.halvings = 0
        self.changed = threading.Condition()

    def enter(self, stop: threading.Event) -> int:
        """Wait for a place. Returns how often the limit had been halved by then, for `leave`."""
        with self.changed:
            while self.active >= self.limit and not stop.is_set():
                self.changed.wait(0.2)
            self.active += 1
            return self.halvings

    def leave(self, halvings: int, status: int) -> None:
        """Give the place back. Requests that were in flight together halve the limit once, not once each."""
        with self.changed:
            self.active -= 1
            if status == 429 and halvings == self.halvings:
                self.limit, self.good, self.halvings = max(1, self.limit // 2), 0, self.halvings + 1
            elif status == 200:
                self.good += 1
                if self.good >= self.limit:
                    self.limit, self.good = min(self.most, self.limit + 1), 0
            self.changed.notify_all()


class Pace:
    """Spreads amounts evenly: at most `per_minute` in a minute, no bursts. 0: no limit."""

    def __init__(self, per_minute: float) -> None:
        self.seconds_each = 60 / per_minute if per_minute else 0.0
        self.free_at = 0.0
        self.lock = threading.Lock()

    def wait(self, amount: float) -> float:
        """Book `amount`; returns how many seconds from now its turn comes."""
        with self.lock:
            start = max(self.free_at, time.monotonic())
            self.free_at = start + amount * self.seconds_each
            return start - time.monotonic()


@dataclass
class _Reply:
    """What came back. status 0: no complete reply, and `text` says why. sent: the server may have seen the request."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    sent: bool = True


class _Bearer(requests.auth.AuthBase):
    """Sets our own header; also keeps requests from sending what a ~/.netrc says about the host."""

    def __init__(self, key: str, header: str) -> None:
        self.key, self.header = key, header

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key:
            request.headers[self.header] = f"Bearer {self.key}" if self.header == "Authorization" else self.key
        return request


class Client:
    """Sends requests to one endpoint. Safe to use from many threads.

    concurrency: most requests in flight. rpm, tpm: requests and tokens a minute, 0 for no limit. stop: set it to end
    all waiting at once. Raises InputError when the endpoint's key variable is not set.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        concurrency: int = 16,
        rpm: float = 0,
        tpm: float = 0,
        limits: Limits | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        endpoint.key()
        self.endpoint, self.limits = endpoint, limits or Limits()
        self.gate, self.requests, self.tokens = Gate(concurrency), Pace(rpm), Pace(tpm)
        self.stop = stop or threading.Event()
        self.session = requests.Session()
        self.session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=concurrency))
        self.session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=concurrency))
        self.session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # A proxy from the environment is for the world outside, not for a server on this machine.
        self.session.trust_env = not _is_loopback(urlsplit(endpoint.base_url).hostname or "")

    def post(
        self, path: str, body: dict[str, Any], tokens: int = 0, account: Account | None = None, words: bool = False
    ) -> dict[str, Any]:
        """The JSON object the server answers to `body` at base_url + path ("/chat/completions").

        tokens: what the call counts for under the tokens-a-minute limit. account: see Account. words: the server says
        in words that it is done, any 200 will do; returns {}.
        408, 409, 429, 5xx, broken connections, timeouts and 200s whose body is not a JSON object are tried again.
        Raises Refused at once for every other status and for a 429 that means no credit, Unanswered after the last
        attempt, CallsStopped when `stop` is set meanwhile, and what account.reserve raises.
        """
        started = time.monotonic()
        for attempt in range(1, self.limits.attempts + 1):
            self._pause(max(self.requests.wait(1), self.tokens.wait(tokens)))
            if account:
                account.reserve()
            reply = self._attempt(path, body, account)
            value = _json_object(reply.text) if reply.status == 200 else None
            if words and reply.status == 200 and not (value or {}).get("error"):
                return {}
            if value is not None and (not value.get("error") or "choices" in value):
                return value
            if account:
                # A 200 was worked for, whatever became of it; so may be what broke after the request was sent.
                account.release(maybe_billed=reply.sent and reply.status in (0, 200))
            problem = self._problem(reply)
            self._raise_if_final(reply, problem)
            pause = random.uniform(0, min(self.limits.backoff_cap, self.limits.backoff * 2 ** (attempt - 1)))
            pause = max(pause, min(_retry_after(reply.headers), self.limits.retry_after_cap))
            if attempt == self.limits.attempts or time.monotonic() + pause > started + self.limits.total:
                why = f"no usable answer in {attempt} attempt{'s' * (attempt > 1)}, the last: {problem}"
                remedy = "check the server, then run the same command again"
                raise Unanswered(f"{self.endpoint}: {why}; {remedy}", reply.status)
            self._pause(pause)
        raise AssertionError(self.limits.attempts)

    def _raise_if_final(self, reply: _Reply, problem: str) -> None:
        """Raise Refused when another attempt would end the same way."""
        quota = _is_quota(reply)
        if not quota and (reply.status in (0, 200, 408, 409, 429) or reply.status >= 500):
            return
        remedy = REMEDY[402] if quota else REMEDY.get(reply.status, REMEDY[400])
        if reply.status == 401:
            env = self.endpoint.key_env
            remedy = f"check the key in {env}" if env else "name its key: add #KEY_VARIABLE to the endpoint"
        raise Refused(f"{self.endpoint}: {problem}; {remedy}", reply.status)

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise CallsStopped(f"{self.endpoint}: stopped")

    def _attempt(self, path: str, body: dict[str, Any], account: Account | None) -> _Reply:
        """One request, when there is room for it, without the key in what comes back."""
        status, place = 0, self.gate.enter(self.stop)
        try:
            if self.stop.is_set():
                if account:
                    account.release(maybe_billed=False)
                raise CallsStopped(f"{self.endpoint}: stopped")
            reply = self._within(path, body)
            status = reply.status
        finally:
            self.gate.leave(place, status)
        if key := self.endpoint.key():
            reply.text = _without(key, reply.text)
            reply.headers = {name: _without(key, value) for name, value in reply.headers.items()}
        return reply

    def _within(self, path: str, body: dict[str, Any]) -> _Reply:
        """`_exchange` in a thread of its own, left behind when it takes too long.

        A timeout of the socket bounds each silence, not their sum: only a second thread can watch the clock while
        this one hangs in a name look-up, in half a header or in a body of one byte a minute.
        """
        box: queue.SimpleQueue[_Reply | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def work() -> None:
            try:
                box.put(self._exchange(path, body, abandoned))
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
                box.put(_broken(error))  # UnicodeError: a redirect to bytes that are no text
            except BaseException as error:
                box.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            result = box.get(timeout=self.limits.exchange)
        except queue.Empty:
            abandoned.set()
            return _Reply(text=f"no complete reply within {self.limits.exchange:g} s")
        if isinstance(result, BaseException):
            raise result
        return result

    def _exchange(self, path: str, body: dict[str, Any], abandoned: threading.Event) -> _Reply:
        with self.session.post(
            self.endpoint.base_url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"},
            auth=_Bearer(self.endpoint.key(), self.endpoint.key_header),
            timeout=(self.limits.connect, self.limits.read),
            stream=True,
            allow_redirects=False,
        ) as reply:
            raw = bytearray()
            while not abandoned.is_set() and (part := reply.raw.read1(65536, decode_content=True)):
                raw += part
                if len(raw) > self.limits.body:
                    return _Reply(text=f"a reply of more than {self.limits.body:,} bytes")
            headers = {name.lower(): value for name, value in reply.headers.items()}
            return _Reply(reply.status_code, headers, raw.decode("utf-8-sig", "replace"))

    def _problem(self, reply: _Reply) -> str:
        """What went wrong, in one line of at most 300 characters or so."""
        if reply.status == 0:
            return reply.text
        if 300 <= reply.status < 400:
            target = reply.headers.get("location", "?")
            return f"{reply.status} redirect to {target[:200]!r}: give that address if you trust it"
        if reply.status == 200:
            return f"the reply is not what the API promises: {_one_line(reply.text)!r}"
        return f"{reply.status} {_one_line(_error_text(reply.text)) or 'without a message'}"


def _broken(error: Exception) -> _Reply:
    """An exception of the network in our words: its own may quote what was sent."""
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, urllib3.exceptions.MaxRetryError) else None
    if isinstance(error, requests.exceptions.SSLError):
        return _Reply(text="the server's certificate was not accepted or the encrypted connection broke")
    if isinstance(reason, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError):
        what = "timed out" if isinstance(error, requests.Timeout) else "failed"
        return _Reply(text=f"connecting {what}; is the server running at this address?", sent=False)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return _Reply(text="the server was silent for too long")
    return _Reply(text=f"the connection broke ({type(error).__name__})")


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())[:200]


def _json_object(text: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None
    return None


def _error(text: str) -> Any:
    return (_json_object(text) or {}).get("error")


def only_choice(reply: dict[str, Any], where: str) -> dict[str, Any]:
    """The one choice of a completion, {} where it holds none. where: the endpoint.

    Raises ServiceError at several and at one that is not number 0: one was asked for, so they answer somebody else.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return {}
    index = choices[0].get("index")
    if len(choices) > 1 or not (index is None or type(index) is int and index == 0):
        raise ServiceError(
            f"{where}: a completion of {len(choices)} choice(s), the first with index {index!r}; one with index 0 was "
            "asked for, so whose answer is it? look there"
        )
    return choices[0]


def _error_text(text: str) -> str:
    """The message inside {"error": {"message": ...}}, or the body as it is."""
    error = _error(text)
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error["message"]
    return error if isinstance(error, str) else text


def _is_quota(reply: _Reply) -> bool:
    error = _error(reply.text) if reply.status else None
    return reply.status == 402 or isinstance(error, dict) and bool({*QUOTA} & {*map(str, error.values())})


def _retry_after(headers: dict[str, str]) -> float:
    """Seconds that Retry-After asks for, as a number or a date; 0 without one or with one that makes no sense."""
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))  # 0.0 for nan
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
    return 0.0


def in_threads(
    work: Callable[[T], R], items: Sequence[T], threads: int, stop: threading.Event, grace: float = 3.0
) -> Iterator[tuple[T, R]]:
    """Yield (item, work(item)) in the order they finish, `threads` at a time.

    When a call raises, when the caller breaks off or on Ctrl-C, `stop` is set, calls under way get `grace` seconds to
    finish, and the first error is raised. What must not be lost, `work` itself saves.
    """
    todo: queue.SimpleQueue[T] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[T, R | None, BaseException | None]] = queue.SimpleQueue()
    for item in items:
        todo.put(item)

    def worker() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop.is_set():
                item = todo.get_nowait()
                try:
                    done.put((item, work(item), None))
                except BaseException as error:
                    done.put((item, None, error))
                    stop.set()  # here and not only below: before any other worker takes the next item

    # Daemons: a thread that hangs in a read must not keep the program from ending.
    workers = [threading.Thread(target=worker, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in workers:
        thread.start()
    finished = False
    try:
        for _ in items:
            item, result, error = done.get()
            if error is not None:
                raise error
            yield item, result  # type: ignore[misc]
        finished = True
    finally:
        if not finished:
            stop.set()
            until = time.monotonic() + grace
            for thread in workers:
                thread.join(max(0.0, until - time.monotonic()))
