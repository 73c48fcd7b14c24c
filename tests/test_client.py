"""client.py against a real server on loopback: attempts, waiting and outcome of every way to misbehave."""

import threading
import traceback
from types import SimpleNamespace

import pytest
from fake_server import BEHAVIOURS, FakeServer

from common.errors import CallsStopped, InputError, Refused, ServiceError, Unanswered
from llm import client
from llm.client import Client, Endpoint, Limits, in_threads, parse_endpoint

CANARY = "sk-canary-7f3a9b2c"
QUICK = Limits(backoff=0.01, backoff_cap=0.02, retry_after_cap=0.3, connect=1, read=0.3, exchange=0.6, body=1_000_000)
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("CANARY_KEY", CANARY)


def quick(server, **more):
    return Client(Endpoint("m", server.url, "CANARY_KEY"), **({"limits": QUICK} | more))


def ask(c, **more):
    return c.post("/chat/completions", BODY, **more)["choices"][0]["message"]["content"]


# ------------------------------------------------------------------------------------------------ one call

PASSING = [
    "429", "429 after 1", "429 after date", "429 after huge", "429 after nonsense", "408", "409", "500", "502", "503",
    "504", "503 page", "error in 200", "reset", "hang", "drip body", "drip header", "cut body", "not json", "list",
    "empty body", "deep json", "huge", "gzip bomb",
]  # fmt: skip


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that clients make, in seconds; they take no time."""
    made = []
    monkeypatch.setattr(Client, "_pause", lambda self, seconds: made.append(seconds))
    return made


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(server, name, pauses):
    server.script = [name]
    assert ask(quick(server)) == "hello"
    assert len(server.requests) == 2
    first, between, second = pauses  # before each request, for its turn; after the failed one
    assert max(first, second) <= 0
    if name in ("429 after 1", "429 after date", "429 after huge"):
        assert between == QUICK.retry_after_cap  # they ask for 1 s or more
    else:
        assert 0 <= between <= QUICK.backoff


@pytest.mark.parametrize("name", ["429", "500", "reset", "not json"])
def test_six_attempts_and_no_more(server, name):
    server.script = lambda number, body: name
    with pytest.raises(Unanswered, match="no usable answer in 6 attempts, the last: "):
        ask(quick(server))
    assert len(server.requests) == 6


FINAL = {
    "400": "status 400; the server cannot take",
    "401": r"bad key Bearer \[key\]; check the key in CANARY_KEY",
    "402": "add credit",
    "403": "may not use this model",
    "404": "ends in /v1",
    "413": "status 413",
    "422": "status 422",
    "quota": "429 You exceeded your current quota; add credit",
    "context": "maximum context length is 4096",
    "redirect": "307 redirect to 'http://localhost:.*/elsewhere'",
}


@pytest.mark.parametrize("name", FINAL)
def test_what_cannot_pass_ends_at_once(server, name):
    server.script = [name]
    with pytest.raises(Refused, match=FINAL[name]) as error:
        ask(quick(server))
    assert len(server.requests) == 1
    text = str(error.value)
    assert text.startswith(f"m@{server.url}: ") and "\n" not in text and "\x1b" not in text and CANARY not in text


def test_gzip_is_understood(server):
    server.script = ["gzip"]
    assert ask(quick(server)) == "hello" and len(server.requests) == 1


def test_a_server_that_is_not_there():
    with FakeServer() as fake:
        pass
    account = Counting()
    with pytest.raises(Unanswered, match="6 attempts, the last: connecting failed"):
        ask(quick(fake), account=account)
    assert account.reserved == 6 and account.released == [False] * 6


def test_backoff_is_random_doubles_and_is_capped(server, monkeypatch):
    highs = []
    monkeypatch.setattr(client.random, "uniform", lambda low, high: highs.append((low, high)) or 0.0)
    server.script = lambda number, body: "500"
    with pytest.raises(Unanswered):
        ask(quick(server, limits=Limits(backoff=1, backoff_cap=5)))
    assert highs == [(0, 1), (0, 2), (0, 4), (0, 5), (0, 5), (0, 5)]


def test_no_attempt_starts_after_the_total_time(server):
    server.script = lambda number, body: "429 after 1"
    with pytest.raises(Unanswered, match="in 2 attempts"):
        ask(quick(server, limits=Limits(backoff=0.01, total=1.5)))
    assert len(server.requests) == 2


class Counting:
    def __init__(self):
        self.reserved, self.released = 0, []

    def reserve(self):
        self.reserved += 1

    def release(self, maybe_billed):
        self.released.append(maybe_billed)


@pytest.mark.parametrize(
    ("name", "maybe"),
    [("429", False), ("500", False), ("hang", True), ("reset", True), ("not json", True), ("drip header", True)],
)
def test_an_account_hears_of_every_attempt(server, name, maybe):
    server.script = [name, name]
    account = Counting()
    ask(quick(server), account=account)
    assert account.reserved == 3 and account.released == [maybe, maybe]


# ------------------------------------------------------------------------------------------------ keys and addresses


def test_endpoints_by_hand():
    assert parse_endpoint("a/b:7b@v2@http://localhost:8000/v1/") == Endpoint("a/b:7b@v2", "http://localhost:8000/v1")
    assert parse_endpoint("m@https://x.org/v1#K") == Endpoint("m", "https://x.org/v1", "K")
    assert parse_endpoint("m@http://[::1]:80/v1#K").key_env == "K"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt-4o", "must look like MODEL@BASE_URL#KEY_VARIABLE"),
        (f"m@ftp://x#{CANARY}", "must look like"),
        (f"m@https://user:{CANARY}@x.org/v1", "plain https://host/path"),
        (f"m@https://x.org/v1?key={CANARY}", "must look like"),
        (f"m@https://x.org/v1#{CANARY}", "must look like"),  # a key instead of a name
        ("m@http://192.168.1.5:8000/v1#K", "unencrypted"),
    ],
)
def test_bad_endpoints_are_refused_without_repeating_them(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_endpoint(text)
    assert CANARY not in str(error.value)


def test_the_key_goes_into_the_header_and_nowhere_else(server, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing listens there
    ask(quick(server))
    ask(Client(Endpoint("m", server.url), limits=QUICK))
    assert [r["headers"].get("Authorization") for r in server.requests] == [f"Bearer {CANARY}", None]
    assert all(CANARY not in str(r["body"]) + r["path"] for r in server.requests)


@pytest.mark.parametrize(("value", "message"), [("", "is not set"), (f"{CANARY}\n", "export the key alone")])
def test_a_key_that_cannot_be_sent(server, monkeypatch, value, message):
    monkeypatch.setenv("CANARY_KEY", value)
    with pytest.raises(InputError, match=f"CANARY_KEY .*{message}") as error:
        quick(server)
    assert CANARY not in str(error.value)


def test_a_key_that_is_echoed_is_cut_out(server):
    server.script = ["echo key"]
    reply = quick(server).post("/chat/completions", BODY)
    assert "Bearer [key]" in reply["choices"][0]["message"]["content"] and CANARY not in str(reply)


@pytest.mark.parametrize("name", [*PASSING, *FINAL])
def test_no_traceback_shows_the_key(server, name):
    server.script = lambda number, body: name
    with pytest.raises(ServiceError) as error:
        ask(quick(server, limits=Limits(attempts=1, read=0.1, exchange=0.15, body=100_000)))
    assert CANARY not in "".join(traceback.format_exception(error.value)) + repr(error.value)


# ------------------------------------------------------------------------------------------------ many calls


def test_in_flight_is_bounded_and_halved_by_a_429(server):
    server.seconds = 0.1
    c = quick(server, concurrency=4)
    stop = threading.Event()
    assert len(list(in_threads(lambda i: ask(c), range(24), 12, stop))) == 24
    assert 2 <= server.most_active <= 4 and not stop.is_set()
    gate = client.Gate(16)
    places = [gate.enter(stop) for _ in range(16)]
    for place in places[:3]:
        gate.leave(place, 429)
    assert gate.limit == 8  # the three were in flight together
    for place in places[3:]:
        gate.leave(place, 200)
    assert gate.limit == 9  # eight good replies; five of the next nine
    gate.leave(gate.enter(stop), 429)
    assert gate.limit == 4
    for _ in range(300):
        gate.leave(gate.enter(stop), 200)
    assert gate.limit == 16 and gate.active == 0


def test_requests_and_tokens_a_minute(server, monkeypatch, pauses):
    now = [100.0]
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = client.Pace(120)  # one in half a second
    assert [pace.wait(1), pace.wait(3), pace.wait(1)] == [0, 0.5, 2.0]
    now[0] = 110.0  # idle time is not saved up for a burst
    assert [pace.wait(1), pace.wait(1)] == [0, 0.5]
    assert [client.Pace(0).wait(1e9) for _ in range(2)] == [0, 0]
    c = quick(server, rpm=600, tpm=60_000)  # one request in 0.1 s, a thousand tokens a second
    for tokens in (10, 400, 10):
        ask(c, tokens=tokens)
    assert pauses == pytest.approx([0, 0.1, 0.41])  # the third waits for the tokens of the first two


def test_a_final_error_ends_all_calls_soon(server):
    server.script = lambda number, body: "401" if number == 5 else "429 after huge"
    c = quick(server, limits=Limits())  # whose pauses are up to two minutes long
    with pytest.raises(Refused, match="401"):
        list(in_threads(lambda i: ask(c), range(100), 16, c.stop))
    assert len(server.requests) <= 16


def test_finished_work_survives_a_final_error_and_calls_under_way_may_finish(server):
    server.seconds = 0.3
    server.script = lambda number, body: "403" if number == 3 else "ok"
    c, saved = quick(server, limits=Limits()), []
    with pytest.raises(Refused):
        for _ in in_threads(lambda i: saved.append(ask(c)), range(100), 4, c.stop):
            pass
    assert len(saved) == 3  # they were in flight when the 403 came

    with pytest.raises(CallsStopped):
        ask(c)


def test_a_hanging_call_does_not_hold_up_the_end(server):
    server.script = lambda number, body: "403" if number == 3 else "hang"
    c = quick(server, limits=Limits())
    with pytest.raises(Refused):
        list(in_threads(lambda i: ask(c), range(8), 4, c.stop, grace=0.5))
    assert server.active == 3  # the others hang on


def test_in_threads_passes_on_results_and_the_first_error():
    stop = threading.Event()
    assert dict(in_threads(lambda x: x * x, [1, 2, 3], 2, stop)) == {1: 1, 2: 4, 3: 9}
    assert list(in_threads(len, [], 2, stop)) == [] and not stop.is_set()
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda x: 1 // x, [1, 0, 1], 2, stop))
    assert stop.is_set()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "a.localhost",
        "127.1",
        "127.0.0.1.",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
    ]
    + ["0.0.0.0", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]"],
)
def test_this_machine_however_it_is_written(host):
    assert parse_endpoint(f"m@http://{host}:8000/v1#KEY").key_env == "KEY"


@pytest.mark.parametrize(
    "host",
    ["localhost.example.org", "127.0.0.1.example.org", "128.1", "10.0.0.1", "0x80.1", "[::2]", "[::ffff:10.0.0.1]"]
    + ["notlocalhost", "127.0.0.1\\@example.org", "[::1"],
)
def test_a_key_is_not_sent_unencrypted_to_another_machine(host):
    with pytest.raises(InputError):
        parse_endpoint(f"m@http://{host}:8000/v1#KEY")


@pytest.mark.parametrize(
    "echoed",
    [
        "sk-a/b+7",
        "sk-a\\/b+7",
        "\\u0073k-a\\u002Fb+7",
        "sk-a\\\\u002fb+7",
        "sk-a%2Fb%2b7",
        "\\u0073\\u006b\\u002d\\u0061/b+7",
        "sk-a%252Fb%252B7",
        "sk-a&#x2F;b&plus;7",
        "sk-a&amp;#47;b&#043;7",
        "sk-a\\x2fb\\053" + "7",
        "sk-a\\U0000002fb\\u{2B}7",
    ],
)
def test_a_key_is_cut_out_however_it_is_escaped(echoed):
    assert client._without("sk-a/b+7", f'{{"error": "key {echoed}!"}}') == '{"error": "key [key]!"}'


def test_a_reply_of_backslashes_is_searched_in_linear_time():
    text = "\\" * 200_000  # a search that starts over at each of them would take minutes
    assert client._without("sk-a/b+7", text + "\n" + r"sk-a\/b+7") == text + "\n[key]"


@pytest.mark.parametrize("asked", ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "soon", "nan", "-5", "1 2", ""])
def test_a_pause_that_makes_no_sense_is_none(asked):
    assert client._retry_after({"retry-after": asked}) == 0.0


def test_a_redirect_to_no_text_and_a_reply_with_a_mark_in_front(monkeypatch):
    replies = [b"HTTP/1.1 301 X\r\nLocation: \xff\x00\r\nContent-Length: 0\r\n\r\n"]
    replies.append(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n\xef\xbb\xbf{"a": 1}')

    def raw(handler):
        handler.wfile.write(replies.pop(0))
        handler.close_connection = True

    with FakeServer() as fake:
        monkeypatch.setitem(BEHAVIOURS, "raw", raw)
        fake.script = lambda number, body: "raw"
        asking = Client(parse_endpoint(f"m@{fake.url}"), limits=Limits(attempts=2, backoff=0.0))
        assert asking.post("/x", {}) == {"a": 1}
