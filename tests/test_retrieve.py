"""Search results: a cache that replays without a key, a real server on this machine, and the stand-in's ranking."""

import json

import pytest
from fake_server import FakeServer

from common.errors import InputError, Refused, ServiceError
from common.files import read_jsonl, write_jsonl
from llm import retrieve
from llm.client import Limits

FAST = Limits(attempts=3, backoff=0.01, read=2.0)


class Google:
    """A server that answers searches; the fake's chat replies are not used."""

    def __init__(self):
        self.server = FakeServer()
        handler = self.server.server.RequestHandlerClass
        handler.do_POST = self.handle_with(handler)

    @staticmethod
    def handle_with(handler):
        def do_post(h):
            body = json.loads(h.rfile.read(int(h.headers["Content-Length"])))
            h.body = body
            fake = h.fake
            with fake.lock:
                fake.requests.append({"path": h.path, "headers": dict(h.headers), "body": body})
            name = fake.script.pop(0) if fake.script else "ok"
            if name == "403":
                h.error(403, "Unauthorized.")
            elif name == "busy":
                h.error(503, "busy")
            else:
                rows = [
                    {"title": f"T{k}", "snippet": f"{body['q']} {k}", "link": f"l{k}", "position": k} for k in range(9)
                ]
                rows[1].pop("snippet")  # a result without a text
                h.send(200, json.dumps({"organic": rows, "credits": 1}).encode())

        return do_post

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *args):
        self.server.__exit__(*args)


def serper(google, path):
    return retrieve.Serper("SERPER_KEY", retrieve.Cache(path), google.server.url.removesuffix("/v1"), FAST)


def test_results_are_kept_and_replayed_without_a_key(tmp_path, monkeypatch):
    path = tmp_path / "search.jsonl"
    monkeypatch.setenv("SERPER_KEY", "canary-0815")
    with Google() as google:
        google.server.script = ["busy"]
        got = serper(google, path).search(["who?", "when?", "who?"], 3)
        sent = google.server.requests
        assert len(sent) == 3 and {r["path"] for r in sent} == {"/search"}  # one was tried again
        assert {r["headers"]["X-API-KEY"] for r in sent} == {"canary-0815"}
        assert not any("Authorization" in r["headers"] for r in sent) and sent[0]["body"]["num"] == 3
        assert [r["snippet"] for r in got["who?"]] == ["who? 0", "who? 2", "who? 3"]
        monkeypatch.delenv("SERPER_KEY")
        assert serper(google, path).search(["when?", "who?"], 3) == got and len(google.server.requests) == 3
        with pytest.raises(InputError, match="1 of 2 searches are not in it; export SERPER_KEY"):
            serper(google, path).search(["who?", "why?"], 3)
        with pytest.raises(InputError, match="1 of 1"):
            serper(google, path).search(["who?"], 5)  # another number of results is another search
    assert "canary" not in path.read_text()
    rows = read_jsonl(path)  # an address of one's own is another engine
    assert all(r["engine"].startswith("serper@http://127.0.0.1:") and r["fetched"] for r in rows) and rows


def test_a_bad_key_ends_the_run_and_never_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_KEY", "canary-0815")
    with Google() as google:
        google.server.script = ["403"]
        with pytest.raises(Refused) as caught:
            serper(google, tmp_path / "c").search(["who?"], 3)
    assert "canary" not in str(caught.value) and caught.value.status == 403


def test_a_torn_cache_loses_its_last_line_only(tmp_path, capsys):
    path = tmp_path / "search.jsonl"
    cache = retrieve.Cache(path)
    results = [{"title": "a", "snippet": "b\u2028c", "link": "d"}]
    cache.add("serper", "q1", 5, results)
    cache.add("serper", "q2", 5, [])
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        path.write_bytes(whole[:cut])
        assert retrieve.Cache(path).known == {("serper", "q1", 5): results}
    odd = b'{"query": "q", "num": 5, "engine": "serper", "results": [{"title": "a"}]}\n'
    path.write_bytes(odd + whole)
    assert retrieve.Cache(path).known == cache.known  # the odd row is fetched again, the sound ones are not
    assert "1 damaged of 3 rows left out, lines 1" in capsys.readouterr().err


@pytest.mark.parametrize(("mark", "end"), [(b"", b"\r\n"), (b"\xef\xbb\xbf", b"\n")])
def test_a_cache_that_came_through_another_system_is_whole(tmp_path, mark, end, capsys):
    path = tmp_path / "search.jsonl"
    cache = retrieve.Cache(path)
    for k in range(3):
        cache.add("serper", f"q{k}", 5, [])
    path.write_bytes(mark + path.read_bytes().replace(b"\n", end))
    assert retrieve.Cache(path).known == cache.known and len(cache.known) == 3
    assert capsys.readouterr().err == ""


def test_documents_hold_texts(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"title": None, "snippet": "a", "link": "b"}])
    with pytest.raises(InputError, match="d.jsonl:1: field 'title' must be a text, not None"):
        retrieve.Documents(tmp_path / "d.jsonl")


def test_odd_replies():
    assert retrieve.organic({}, 5) == []
    rows = [{"title": None, "snippet": "s", "link": 3}, {"title": "t", "snippet": None}, {"snippet": ["s"]}]
    assert retrieve.organic({"organic": rows}, 5) == [{"title": "", "snippet": "s", "link": ""}]
    with pytest.raises(ServiceError, match="without a list"):
        retrieve.organic({"organic": "none"}, 5)


def test_documents_are_ranked_by_rare_shared_words(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [
        "The capital of Peru is Lima.",
        "The capital of Chad is N'Djamena.",
        "Lima beans are green.",
        "Nothing here",
    ]
    write_jsonl(path, [{"title": "", "snippet": t, "link": str(k)} for k, t in enumerate(texts)])
    engine = retrieve.engine(str(path), tmp_path / "unused")
    found = engine.search(["What is the capital of Peru?", "xyzzy"], 2)
    assert [r["link"] for r in found["What is the capital of Peru?"]] == ["0", "1"] and found["xyzzy"] == []
    assert retrieve.as_text([]) == "(nothing was found)"
    assert retrieve.as_text([{"title": "A\nB", "snippet": "c  d", "link": ""}]) == "[1] A B: c d"
    with pytest.raises(InputError, match="neither serper"):
        retrieve.engine("absent.jsonl", tmp_path / "c")
    assert retrieve.engine("serper#MY_KEY", tmp_path / "c").endpoint.key_env == "MY_KEY"
