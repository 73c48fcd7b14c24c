"""The data sets: published files in, our questions out, and nothing that is not what was recorded."""

import hashlib
import http.server
import json
import re
import subprocess
import threading
import types
from pathlib import Path

import pytest
from conftest import shared_data

import data
import mralign
from common import benchmarks
from common.errors import InputError
from common.files import read_json, read_jsonl, write_json, write_jsonl
from report import tables
from tools import fetch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"nq_open": "nq_open", "sciq": "sciq", "simpleqa": "simpleqa", "truthfulqa": "truthfulqa"}
FOLDERS["longfact"] = "longfact_objects"


def convert(name: str, out: Path) -> list[dict]:
    manifest = fetch.write(name, "test", out, str(shared_data() / FOLDERS[name]), out.parent)
    rows = read_jsonl(out, ("id", "dataset", "question", "answers", "task"))
    assert len(rows) == manifest["questions"] == benchmarks.SOURCES[name].splits["test"].rows and manifest["complete"]
    assert (
        len({r["id"] for r in rows}) == len(rows) and manifest["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    )
    return rows


@pytest.mark.parametrize("name", FOLDERS)
def test_real_files_are_the_recorded_ones_and_load_as_questions(name, tmp_path):
    out = tmp_path / "q.jsonl"
    rows = convert(name, out)
    assert read_json(out.with_suffix(".manifest.json"))["as_recorded"] is (name != "sciq")  # that copy is JSON lines
    kept, tally = data.load_questions(out)
    assert kept == rows and tally["questions"] == len(rows)


def test_facts_about_the_real_sets(tmp_path):
    nq = convert("nq_open", tmp_path / "nq.jsonl")
    assert sum(len(r["answers"]) > 1 for r in nq) / len(nq) == pytest.approx(0.425, abs=5e-4)
    assert max(len(r["answers"]) for r in nq) == 23
    simple = convert("simpleqa", tmp_path / "s.jsonl")
    assert simple[0]["answers"] == ["Michio Sugeno"] and simple[0]["topic"] == "Science and technology"
    assert all(a == a.strip() for r in simple for a in r["answers"])
    truthful = convert("truthfulqa", tmp_path / "t.jsonl")
    assert truthful[0]["best_answer"] == "The watermelon seeds pass through your digestive system"
    assert "Nothing happens" in truthful[0]["answers"] and {r["task"] for r in truthful} == {"truthful"}
    sciq = convert("sciq", tmp_path / "sciq.jsonl")
    assert [r["question"] for r in sciq if r["needs_options"]] == [
        "Which is a more reliable trait or measure to identify minerals?",
        "Which is one of the most frequently studied cartilaginous fish?",
        "Asteroids are not geologically active. which is the only way they can change?",
    ]


def test_longfact_draw_does_not_depend_on_the_order_of_the_files(tmp_path):
    rows = convert("longfact", tmp_path / "l.jsonl")
    assert len({r["question"] for r in rows}) == 250 and all(r["answers"] == [] for r in rows)
    source = benchmarks.SOURCES["longfact"].splits["test"]
    contents = fetch.local(source, shared_data() / "longfact_objects")
    assert fetch.questions("longfact", "test", contents[::-1])[0] == rows
    prompts = [json.loads(line)["prompt"] for _, c in contents for line in c.decode().splitlines()]
    assert len(prompts) == 1140
    assert all(r["question"].removesuffix(benchmarks.LONGFACT_TAIL) in prompts for r in rows)


@pytest.mark.parametrize(
    ("stem", "needs"),
    [
        ("Which of the following is a metal?", True),
        ("What is true of the following elements?", True),
        ("Which of these is a metal?", True),
        ("The eyes of all vertebrates possess a single one of these structures?", True),
        ("Are they mammals, birds or all of the above?", True),
        ("Which is heavier, lead or gold?", False),
        ("Meiosis is part of gametogenesis, which is the production of what?", False),
        ("What is the height above sea level called?", False),
    ],
)
def test_stems_that_need_options(stem, needs):
    assert bool(benchmarks.NEEDS_OPTIONS.search(stem)) is needs


def test_a_git_checksum_is_gits():
    content = b"what is up, doc?"  # the example of the Git book
    assert fetch.digest(content, "git:") == "git:bd9dbf5aae1a3862dd1526723246b20206e5fc37"


# ---------- fetching, from a real server on this machine


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    handler = type(
        "Quiet",
        (http.server.SimpleHTTPRequestHandler,),
        {
            "log_message": lambda *a: None,
            "__init__": lambda self, *a: http.server.SimpleHTTPRequestHandler.__init__(self, *a, directory=str(folder)),
        },
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def serve(monkeypatch, site, content: bytes, checksum: str) -> None:
    folder, url = site
    (folder / "dev.jsonl").write_bytes(content)
    file = benchmarks.File(f"{url}/dev.jsonl", checksum, ("NQ-open.dev.jsonl",))
    splits = {"test": benchmarks.Split((file,), 2), "train": benchmarks.SOURCES["nq_open"].splits["train"]}
    source = benchmarks.Source("NQ-Open", "CC BY-SA 3.0", "r1", splits, benchmarks.nq_open)
    monkeypatch.setitem(benchmarks.SOURCES, "nq_open", source)


TWO = b'{"question": "who?", "answer": ["A", " "]}\n{"question": "when?", "answer": [""]}\n'


def test_a_file_is_fetched_once_checked_and_converted(site, tmp_path, monkeypatch, capsys):
    serve(monkeypatch, site, TWO, "sha256:" + hashlib.sha256(TWO).hexdigest())
    out = tmp_path / "q.jsonl"
    command = ["nq_open", "--out", str(out), "--cache", str(tmp_path / "raw")]
    assert fetch.main(command) == 0
    expected = {"id": "nq_open-test/0", "dataset": "nq_open", "question": "who?", "answers": ["A"], "task": "short"}
    assert read_jsonl(out) == [expected]
    manifest = read_json(tmp_path / "q.manifest.json")
    assert (manifest["questions"], manifest["dropped"], manifest["as_recorded"]) == (1, 1, True)
    (site[0] / "dev.jsonl").unlink()
    assert fetch.main(command) == 0  # from the cache
    assert "1 questions, licence CC BY-SA 3.0" in capsys.readouterr().out


def test_a_changed_file_is_refused_and_not_kept(site, tmp_path, monkeypatch, capsys):
    serve(monkeypatch, site, TWO, "sha256:" + "0" * 64)
    assert fetch.main(["nq_open", "--out", str(tmp_path / "q.jsonl"), "--cache", str(tmp_path / "raw")]) == 3
    assert "another checksum than recorded" in capsys.readouterr().err
    assert not list((tmp_path / "raw").iterdir()) and not (tmp_path / "q.jsonl").exists()


def test_what_cannot_be_had_is_said_in_one_line(site, tmp_path, monkeypatch, capsys):
    serve(monkeypatch, site, TWO, "sha256:x")
    (site[0] / "dev.jsonl").unlink()
    cases = [
        (["nq_open"], "status 404"),
        (["nq_open", "--split", "valid"], "has no split 'valid'; it has test, train"),
        (["simpleqa", "--from", str(tmp_path)], "none of simple_qa_test_set.csv is there"),
    ]
    (tmp_path / "TruthfulQA.csv").write_text("Question,Answer\nx,y\n")
    cases.append((["truthfulqa", "--from", str(tmp_path)], "not the published format of truthfulqa"))
    for flags, words in cases:
        assert fetch.main([*flags, "--out", str(tmp_path / "q.jsonl"), "--cache", str(tmp_path / "raw")]) == 3
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and "Traceback" not in err, err


def test_sciq_from_the_hub_without_a_network_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the library reads variables when imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fetch.main(["sciq", "--out", str(tmp_path / "q"), "--cache", str(tmp_path / "raw")]) == 3
    said = "hf download --repo-type dataset allenai/sciq data/test-00000-of-00001.parquet"
    assert said in capsys.readouterr().err


def test_sciq_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    rows = [{"question": "What is wet?", "correct_answer": "water ", "distractor1": "sand", "support": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    fetch.write("sciq", "test", tmp_path / "q.jsonl", str(tmp_path), tmp_path)
    (row,) = read_jsonl(tmp_path / "q.jsonl")
    assert (row["answers"], row["needs_options"], row["task"]) == (["water"], False, "short")


def test_a_local_file_with_an_odd_row_is_refused(tmp_path):
    (tmp_path / "NQ-open.dev.jsonl").write_text('{"question": "who?"}\n')
    with pytest.raises(InputError, match="NQ-open.dev.jsonl: not the published format of nq_open"):
        fetch.write("nq_open", "test", tmp_path / "q.jsonl", str(tmp_path), tmp_path)


# ---------- mathematics


def maths(folder: Path, name: str, split: str, file: str, rows: list[dict] | list[str]) -> tuple[list[dict], dict]:
    """Rows as published in, our problems and the manifest out."""
    folder.mkdir()
    text = json.dumps(rows) if file.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows)
    (folder / file).write_text(text)
    manifest = fetch.write(name, split, folder / "out.jsonl", str(folder), folder)
    assert manifest["as_recorded"] is False and manifest["complete"] is False  # not the published ones
    return read_jsonl(folder / "out.jsonl", ("id", "dataset", "problem", "answer")), manifest


def test_mathematics_files_become_problems(tmp_path):
    amc = [{"id": 7, "problem": " How far? ", "answer": 27.0, "url": "u"}, {"problem": "p", "answer": 0.5}]
    rows, manifest = maths(tmp_path / "a", "amc23", "test", "test.jsonl", amc)
    assert rows == [
        {"id": "amc23-test/0", "dataset": "amc23", "problem": "How far?", "answer": "27"},
        {"id": "amc23-test/1", "dataset": "amc23", "problem": "p", "answer": "0.5"},
    ]
    assert (manifest["questions"], manifest["dropped"], manifest["licence"]) == (2, 0, "MIT; MAA problems")
    rows, _ = maths(tmp_path / "b", "aime24", "test", "aime24.jsonl", [{"problem": "p", "answer": "023"}])
    assert rows[0]["answer"] == "023"
    math = {"problem": "p", "solution": "s", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 2}
    (row,), _ = maths(tmp_path / "c", "math500", "test", "test.jsonl", [math])
    assert (row["answer"], row["subject"], row["level"]) == ("\\frac{1}{2}", "Algebra", 2) and "solution" not in row
    boxes = {"problem": "p", "solution": "first \\boxed{2}, so $\\boxed{4.5e33} \\mathrm{erg}$", "type": "Astronomy"}
    (row,), _ = maths(tmp_path / "d", "minerva", "test", "test.jsonl", [boxes])
    assert (row["answer"], row["subject"]) == ("4.5e33", "Astronomy")
    olympiad = {"question": "q", "final_answer": ["$2,-1,-18$"], "subfield": "Algebra", "solution": ["s"]}
    (row,), _ = maths(tmp_path / "e", "olympiadbench", "test", "test.jsonl", [olympiad])
    assert (row["problem"], row["answer"], row["subject"]) == ("q", "$2,-1,-18$", "Algebra")


def test_problems_without_a_usable_answer_are_dropped_and_counted(tmp_path):
    answers = ["4", "", None, "\\frac{1}{2", "\\text{ cm}", ["7"], 8]
    rows = [{"problem": f"p{n}", "answer": a} for n, a in enumerate(answers)] + [{"problem": " ", "answer": "1"}]
    kept, manifest = maths(tmp_path / "a", "deepscaler", "train", "deepscaler.json", rows)
    assert [(r["id"], r["answer"]) for r in kept] == [
        ("deepscaler-train/0", "4"),
        ("deepscaler-train/5", "7"),
        ("deepscaler-train/6", "8"),
    ]
    assert (manifest["questions"], manifest["dropped"]) == (3, 5)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("aime24", {"problem": "p"}),
        ("amc23", {"problem": "p", "answer": {"a": 1}}),
        ("math500", {"problem": "p", "answer": ["1", "2"]}),
        ("minerva", {"problem": "p", "solution": None, "type": "t"}),
        ("olympiadbench", {"question": "q", "final_answer": ["1", "2"], "subfield": "Algebra"}),
        ("aime25", {"prompt": []}),
    ],
)
def test_another_format_of_a_mathematics_set_is_refused(name, row, tmp_path):
    with pytest.raises(InputError, match=f"not the published format of {name}"):
        maths(tmp_path / "a", name, "test", f"{name}.jsonl", [row])


def test_aime25_as_the_authors_keep_it_and_as_plain_rows(tmp_path):
    target = {"question": "Find it.", "target": "336^\\circ"}
    row = {"prompt": [{"content": "Find it.", "role": "user"}], "reward_model": {"ground_truth": target}}
    expected = {"id": "aime25-test/0", "dataset": "aime25", "problem": "Find it.", "answer": "336^\\circ"}
    assert maths(tmp_path / "a", "aime25", "test", "aime25.jsonl", [row])[0] == [expected]
    plain = {"problem": "Find it.", "answer": "336^\\circ"}
    assert maths(tmp_path / "b", "aime25", "test", "aime25.jsonl", [plain])[0] == [expected]
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "test.parquet")
    fetch.write("aime25", "test", tmp_path / "q.jsonl", str(tmp_path), tmp_path)
    assert read_jsonl(tmp_path / "q.jsonl") == [expected]


def test_a_mathematics_set_is_fetched_by_its_git_blob(site, tmp_path, monkeypatch, capsys):
    folder, url = site
    content = b'{"problem": "what is up, doc?", "answer": "4"}\n'
    (folder / "test.jsonl").write_bytes(content)
    blob = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
    checksum = "git:" + blob.stdout.decode().strip()
    splits = {"test": benchmarks._maths("aime24", f"{url}/test.jsonl", checksum, 1)}
    source = benchmarks.Source("AIME", "MIT", "r1", splits, benchmarks.problems, task="maths")
    monkeypatch.setitem(benchmarks.SOURCES, "aime24", source)
    out = tmp_path / "q.jsonl"
    assert fetch.main(["aime24", "--out", str(out), "--cache", str(tmp_path / "raw")]) == 0
    assert read_jsonl(out) == [
        {"id": "aime24-test/0", "dataset": "aime24", "problem": "what is up, doc?", "answer": "4"}
    ]
    assert (tmp_path / "raw" / "aime24.jsonl").read_bytes() == content
    assert read_json(out.with_suffix(".manifest.json"))["complete"] is True


def test_sources_name_one_commit_a_checksum_and_a_file_of_their_own():
    seen = []
    for source in benchmarks.SOURCES.values():
        for split in source.splits.values():
            assert split.checksum or len(split.files) == 1
            for file in split.files:
                assert split.checksum or re.fullmatch("sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", file.checksum)
                assert "github" not in file.url or source.revision in file.url
            seen.append(split.files[0].names[0])
    assert len(set(seen)) == len(seen)  # one cache folder holds them all


def test_one_entry_is_all_a_new_benchmark_takes(site, tmp_path, monkeypatch, capsys):
    """An entry is fetched and listed, has columns with the paper's figures, and is kept from training."""
    folder, url = site
    content = b'{"question": "who?", "answer": ["A"]}\n'
    (folder / "new.jsonl").write_bytes(content)
    file = benchmarks.File(f"{url}/new.jsonl", "sha256:" + hashlib.sha256(content).hexdigest(), ("new.jsonl",))
    source = benchmarks.Source(
        "New-QA", "CC0", "r1", {"test": benchmarks.Split((file,), 1)}, benchmarks.nq_open, short="new", may_train=False,
        paper="thinkon 12.50/3.40 - - - -",
    )  # fmt: skip
    monkeypatch.setitem(benchmarks.SOURCES, "new_qa", source)
    config, out = tmp_path / "c.json", tmp_path / "new_qa-test.jsonl"
    write_json(config, {"questions": "", "eval_sets": f"new={out}"})
    assert fetch.main(["--for", str(config), "--cache", str(tmp_path / "raw")]) == 0
    (row,) = read_jsonl(out)
    assert (row["id"], row["dataset"], row["task"]) == ("new_qa-test/0", "new_qa", "short")
    listed = [[c.strip() for c in line.strip("|").split("|")] for line in fetch.listing().splitlines()]
    assert ["new_qa", "test", "1", "CC0", "r1"] in listed
    assert tables.main(["--backbone", "Qwen3-8B"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if "New-QA, Acc / Mis: ours" in line).split(" | ")
    thinkon = next(line for line in lines if re.match(r"\| ThinkOn +\|", line)).split(" | ")
    assert thinkon[[c.strip(" |") for c in head].index("New-QA, paper")].strip(" |") == "12.50 / 3.40"
    assert not benchmarks.may_train(row["dataset"]) and benchmarks.may_train("nq_open") and benchmarks.may_train(None)
    assert benchmarks.name_of("new") == "new_qa" and benchmarks.name_of("mine") == "mine"
    questions = [{"id": "1", "dataset": "new_qa", "question": "who?", "answers": ["A"]}]
    write_jsonl(tmp_path / "q.jsonl", questions)
    run = types.SimpleNamespace(
        cfg=types.SimpleNamespace(questions=str(tmp_path / "q.jsonl")),
        ranks=types.SimpleNamespace(log=lambda text: None),
    )
    with pytest.raises(InputError, match="new_qa is for evaluation only"):
        mralign.draw_samples(run)


def test_questions_can_be_left_out(tmp_path):
    (tmp_path / "NQ-open.train.jsonl").write_bytes(TWO.replace(b'[""]', b'["B"]'))
    write_jsonl(tmp_path / "dev.jsonl", [{"question": "When"}])
    manifest = fetch.write(
        "nq_open", "train", tmp_path / "q.jsonl", str(tmp_path), tmp_path, str(tmp_path / "dev.jsonl")
    )
    assert [r["question"] for r in read_jsonl(tmp_path / "q.jsonl")] == ["who?"] and manifest["excluded"] == 1
    assert "79,168" in manifest["note"]


def test_a_config_gets_the_files_it_names(tmp_path, monkeypatch):
    """Fetching is replaced by two rows a set; what is written where is real."""
    monkeypatch.chdir(tmp_path)
    rows = lambda name: [{"id": f"{name}/{k}", "dataset": name} for k in range(2)]  # noqa: E731
    monkeypatch.setattr(fetch, "write", lambda name, split, out, folder, cache: write_jsonl(out, rows(name)))
    config = {"questions": "data/nq_open+sciq-train.jsonl", "eval_sets": "a=data/sciq-test.jsonl,b=own.jsonl"}
    write_json("c.json", config)
    assert fetch.main(["--for", "c.json"]) == 3  # own.jsonl is nobody's name
    write_jsonl("own.jsonl", [{}])
    assert fetch.main(["--for", "c.json"]) == 0
    assert read_jsonl("data/nq_open+sciq-train.jsonl") == rows("nq_open") + rows("sciq")
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        "nq_open+sciq-train.jsonl", "nq_open-train.jsonl", "sciq-test.jsonl", "sciq-train.jsonl"
    ]  # fmt: skip
    assert fetch.missing("c.json") == []


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))


APART = ("masa-mini", "ablations", "mini-ablations")  # makes its own problems; other shapes of file


@pytest.mark.parametrize("config", [p for p in CONFIGS if p.stem not in APART], ids=lambda p: p.stem)
def test_every_shipped_config_names_files_that_exist_or_can_be_fetched(config, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    named = set(re.findall(r"[\w/+.-]+\.jsonl", config.read_text()))
    found = {str(path) for path, _, _ in fetch.missing(str(config))}
    assert found == {name for name in named if not Path(name).exists()}
