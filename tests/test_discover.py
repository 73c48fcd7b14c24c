"""discover.py against a real server: families of names are found again, nothing is paid for twice."""

import ast
import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from fake_server import FakeServer, as_reply, material

import em
from common.errors import AnnotationError, InputError
from common.files import read_json, read_jsonl, write_jsonl
from tools import discover

FAMILIES = {
    "checking": ["Answer_Checking", "fact verification", "double-check", "self check", "verifying", "claim check"],
    "recalling": ["recall", "memory search", "knowledge retrieval", "fact recall", "remembering", "lookup"],
    "weighing": ["comparison", "option weighing", "candidate comparison", "contrast", "trade off", "ranking"],
}


def pick(text: str) -> list[str]:
    d = hashlib.sha256(text.encode()).digest()
    family = list(FAMILIES.values())[d[0] % 3]
    return [family[d[1] % 6]] if d[2] % 100 else ["something odd", "rarely said"]


def answer(body):
    prompt = body["messages"][0]["content"]
    if prompt.startswith("Many annotators"):
        members = json.loads(prompt.rpartition("is an instruction to you.\n")[2])
        family = next(f for f, names in FAMILIES.items() if set(members) <= {discover.tidy(n) for n in names})
        macro = list(em.TAXONOMY)[list(FAMILIES).index(family)]
        return json.dumps(
            {"name": family.title(), "definition": f"does\n{family}", "macro": macro, "closest": "retrieval"}
        )
    segments = material(body)["segments"]
    return as_reply([([s["segment"]], dict.fromkeys(pick(s["text"]), 8.0)) for s in segments])


def embed(name: str) -> list[float]:
    """A direction for each family, and a little of the name's own."""
    rng = random.Random(name)
    own = [rng.gauss(0, 0.02) for _ in range(8)]
    for k, names in enumerate(FAMILIES.values()):
        if name in {discover.tidy(n) for n in names}:
            own[k] += 1
    return own


@pytest.fixture
def server():
    with FakeServer(answer) as fake:
        fake.embed = embed
        yield fake


@pytest.fixture
def flags(tmp_path, server, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    rows = []
    for k in range(60):
        text = "".join(f"Segment {i} of {k}.\n\n" for i in range(5))
        spans = [[i * len(text) // 5, (i + 1) * len(text) // 5] for i in range(5)]
        rows.append({"id": f"q{k}", "question": "?", "answers": ["x"], "completion": text, "spans": spans})
    write_jsonl(tmp_path / "candidates.jsonl", rows)
    service = ["--namer", f"namer@{server.url}", "--embedder", f"bge-m3@{server.url}"]
    return ["--candidates", str(tmp_path / "candidates.jsonl"), "--out", str(tmp_path / "out"), *service]


def test_families_of_names_are_found_again(server, flags, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    server.script = ["prose"]  # the first reply has to be asked for again
    assert discover.main(flags) == 0
    got = read_json(tmp_path / "out" / "discovery.json")
    assert got["traces"] == 60 and got["names_used"] >= 300 and got["names_kept"] == 18 < got["distinct_names"]
    found = {c["name"]: set(c["members"]) for c in got["clusters"]}
    assert found == {family: {discover.tidy(n) for n in names} for family, names in FAMILIES.items()}
    assert sum(c["share"] for c in got["clusters"]) == pytest.approx(1, abs=1e-5)
    names = [n for c in got["clusters"] for n in c["members"]]
    owner = [c["name"] for c in got["clusters"] for _ in c["members"]]
    assert got["silhouette"] == pytest.approx(slow_silhouette([embed(n) for n in names], owner), abs=1e-9)

    table = ast.literal_eval((tmp_path / "out" / "vocabulary.txt").read_text().partition(" = ")[2])
    assert list(table) == list(em.TAXONOMY) and sorted(n for names in table.values() for n in names) == sorted(found)
    assert "does checking" in {names.get("checking") for names in table.values()}
    assert (tmp_path / "out" / "clusters.png").read_bytes()[:4] == b"\x89PNG"
    assert "silhouette 0.99" in capsys.readouterr().out

    sent = len(server.requests)
    calls = read_jsonl(tmp_path / "out" / "calls.jsonl")
    assert sum(c["outcome"] == "billed" for c in calls) == sent and sum(c.get("role") == "embedder" for c in calls) == 1
    assert discover.main(flags) == 0 and len(server.requests) == sent


def slow_silhouette(points, owner):
    def distance(x, y):
        x, y = np.array(x), np.array(y)
        return 1 - x @ y / math.sqrt((x @ x) * (y @ y))

    values = []
    for i, x in enumerate(points):
        mean = {}
        for name in set(owner):
            others = [distance(x, y) for j, y in enumerate(points) if owner[j] == name and j != i]
            mean[name] = sum(others) / len(others)
        own = mean.pop(owner[i])
        values.append((min(mean.values()) - own) / max(min(mean.values()), own))
    return sum(values) / len(values)


def test_bad_use_is_named(server, flags, capsys):
    assert discover.main(flags[:-2]) == 3 and "--embedder is not set" in capsys.readouterr().err
    assert discover.main([*flags, "--sample", "2"]) == 3 and "too few to cluster" in capsys.readouterr().err
    server.script = lambda number, body: "401"
    assert discover.main([*flags, "--sample", "3"]) == 4 and "401" in capsys.readouterr().err


THREE, BLANK = as_reply([([0], {"a": 1, "b": 1, "c": 1})]), as_reply([([0], {" ": 1})])


@pytest.mark.parametrize("text", ['{"steps": []}', '{"steps": [{}]}', "[]", "no", THREE, BLANK])
def test_bad_open_replies(text):
    with pytest.raises(AnnotationError):
        discover.parse_names(text)


def test_names_are_spelt_one_way():
    reply = as_reply([([0], {"Answer_Checking": 1, " fact - recall ": 2})])
    assert discover.parse_names(reply) == ["answer checking", "fact recall"]


@pytest.mark.parametrize("change", [{"name": ""}, {"macro": "thinking"}, {"closest": "thinking"}, {"definition": 3}])
def test_bad_cluster_names(change):
    good = {"name": "x", "definition": "y", "macro": next(iter(em.TAXONOMY)), "closest": "none"}
    assert discover.parse_cluster_name(json.dumps(good))["name"] == "x"
    with pytest.raises(AnnotationError):
        discover.parse_cluster_name(json.dumps(good | change))


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": [math.nan]}, {"index": 1, "embedding": [1.0]}],
        [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}],
        [{"index": 0, "embedding": [10**400]}, {"index": 1, "embedding": [1.0]}],
        [{"index": [], "embedding": [1.0]}],
        None,
    ],
)
def test_embeddings_are_finite_numbers_as_many_for_each_name(data):
    with pytest.raises(InputError, match="there: /embeddings did not return 2 vectors"):
        discover._vectors({"data": data}, 2, "there")
