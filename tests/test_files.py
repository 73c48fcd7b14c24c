"""files.py: what is written comes back, what is broken is named, and no failure leaves half a file."""

import builtins
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from common import files
from common.errors import InputError
from common.files import Journal

OLD, NEW = "old content\n", "new content, longer than the old one\n" * 50


class Failure:
    """Counts the disk operations of files.py and makes the k-th one fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, number: int) -> None:
        self.count, self.fail_at, self.number = 0, fail_at, number
        real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace

        def counted_open(path, *args, **kwargs):
            self.step("open")
            f = real_open(path, *args, **kwargs)
            return FailingFile(f, self) if str(path).endswith(".tmp") else f

        monkeypatch.setattr(builtins, "open", counted_open)
        monkeypatch.setattr(os, "fsync", lambda handle: (self.step("fsync"), real_fsync(handle))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (self.step("replace"), real_replace(a, b))[1])

    def step(self, what: str) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(self.number, f"{what}: {os.strerror(self.number)}")


class FailingFile:
    """A file whose write puts half of the text on the disk before it fails, as a full disk does."""

    def __init__(self, f, failure: Failure) -> None:
        self.f, self.failure = f, failure

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.f.__exit__(*error)

    def write(self, text):
        try:
            self.failure.step("write")
        except OSError:
            self.f.write(text[: len(text) // 2])
            self.f.flush()
            raise
        return self.f.write(text)

    def flush(self):
        self.failure.step("flush")
        self.f.flush()

    def fileno(self):
        return self.f.fileno()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, number, existing):
    path = tmp_path / "rows.jsonl"
    fail_at, failures = 0, 0
    while True:
        fail_at += 1
        path.unlink(missing_ok=True)
        if existing:
            path.write_text(OLD)
        with monkeypatch.context() as patch:
            failure = Failure(patch, fail_at, number)
            try:
                with files.atomic_write(path) as f:
                    f.write(NEW[:100])
                    f.write(NEW[100:])
                failed = False
            except OSError as error:
                failed, failures = True, failures + 1
                assert error.errno == number
        left = path.read_text() if path.exists() else None
        assert left in ((OLD, NEW) if existing else (None, NEW)), fail_at
        assert os.listdir(tmp_path) == ([path.name] if left is not None else []), fail_at  # no debris
        if not failed:
            assert left == NEW and failure.count < fail_at
            break
    assert failures == 7  # open, write, write, flush, fsync, replace, fsync of the folder


def test_an_exception_in_the_body_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        files.write_jsonl(path, [{"a": "x" * 100_000}, {"a": "\ud83d"}])
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


CHILD = """
import sys; sys.path.insert(0, {root!r})
from common import files
k = 0
print("go", flush=True)
while True:
    files.write_jsonl({path!r}, [{{"k": k, "pad": "x" * 2000}}] * 200)
    k += 1
"""


def test_a_killed_writer_leaves_whole_files(tmp_path):
    path, delays = tmp_path / "rows.jsonl", random.Random(0)
    for _ in range(12):
        code = CHILD.format(root=str(ROOT), path=str(path))
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"go\n"
        time.sleep(0.01 + delays.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if path.exists():
            rows = files.read_jsonl(path, ("k", "pad"))
            assert len(rows) == 200 and len({row["k"] for row in rows}) == 1
    assert path.exists()


TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), max_size=5))
def test_what_is_written_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("x") / "deep" / "rows.jsonl"
    assert files.write_jsonl(path, rows) == len(rows)
    assert files.read_jsonl(path) == rows
    assert path.read_bytes().count(b"\n") == len(rows)
    files.write_json(path, rows)
    assert files.read_json(path) == rows


def test_odd_but_valid_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "one\u2028two\x85"}\r\n\n{"a":\r"\\ud83d\\ude00"}'.encode())
    assert files.read_jsonl(path, ("a",)) == [{"a": "one\u2028two\x85"}, {"a": "😀"}]
    path.write_bytes(b"")
    assert files.read_jsonl(path) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not a JSON row"),
        (b'{"a": 1} {"a": 2}', "not a JSON row"),
        (b'{"a": "\xff"}', "not a JSON row"),
        (b'{"a": "\x00"}', "not a JSON row"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": "\\ud83d"}', "surrogates not allowed"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON row"),
        (b'{"a": ' + b"[" * 200_000 + b"}", "not a JSON row"),
        (b"[1]", "a row must be a JSON object, not list"),
        (b"null", "a row must be a JSON object, not NoneType"),
        (b'{"b": 1}', "field 'a' is missing"),
        (b'{"a": 7}', "seven is unlucky; take another"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    def check(row):
        if row["a"] == 7:
            raise InputError("seven is unlucky; take another")

    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(InputError) as caught:
        files.read_jsonl(path, ("a",), check)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and reason in message and "\n" not in message


def test_a_file_torn_at_any_byte_is_read_or_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"id": k, "text": "é😀\n" * k} for k in range(4)]
    files.write_jsonl(path, rows)
    whole, lengths = path.read_bytes(), []
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        try:
            got = files.read_jsonl(path)
        except InputError as error:
            assert str(error).startswith(f"{path}:{complete + 1}: ")
        else:
            assert got == rows[: len(got)] and len(got) - complete in (0, 1)
            lengths.append(len(got))
    assert set(lengths) == {0, 1, 2, 3, 4}


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    path, chance = tmp_path / "a.jsonl", random.Random(1)
    files.write_jsonl(path, [{"id": "x", "answers": ["\u00e9", 1.5, None]}] * 2)
    whole = path.read_bytes()
    for _ in range(400):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            broken[chance.randrange(len(whole))] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            files.read_jsonl(path, ("id", "answers"))
        except InputError as error:
            assert "\n" not in str(error)


def test_missing_and_unreadable_files_are_named(tmp_path):
    for read in (files.read_json, files.read_jsonl, files.sha256_file, files.read_bytes):
        with pytest.raises(InputError, match="no such file; check the path"):
            read(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        files.read_json(tmp_path)
    (tmp_path / "a.json").write_text("{'a': 1}")
    with pytest.raises(InputError, match="a.json: not valid JSON"):
        files.read_json(tmp_path / "a.json")


def test_checksum(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_json_is_readable_text(tmp_path):
    files.write_json(tmp_path / "a.json", {"name": "é"})
    assert (tmp_path / "a.json").read_bytes() == '{\n "name": "é"\n}\n'.encode()
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "é"}


def test_a_journal_keeps_what_was_added_before_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    script = (
        "import os, sys; from common.files import Journal\n"
        f"j = Journal({str(path)!r}, 'k')\n"
        "for i in range(5): j.add({'i': i, 'text': 'ö\\u2028'})\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -9
    with open(path, "ab") as f:
        f.write(b'{"i": 5, "te')  # torn
    journal = Journal(path, "k")
    assert journal.rows == [{"i": i, "text": "ö\u2028"} for i in range(5)]
    journal.add({"i": 6})
    with pytest.raises(InputError, match="another program is writing this file"):
        Journal(path, "k")
    journal.close()
    assert reopened(path, "k")[-2:] == [{"i": 4, "text": "ö\u2028"}, {"i": 6}]
    assert reopened(path, "another run") == [] == reopened(path, "another run")
    assert reopened(path, "k") == []  # started anew by the other key
    path.write_bytes(b'{"key": "k"')  # killed in its first line
    assert reopened(path, "k") == []


def reopened(path: Path, key: str) -> list[dict]:
    journal = Journal(path, key)
    journal.close()
    return journal.rows


def test_a_damaged_row_of_a_journal_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, rows = tmp_path / "journal.jsonl", [{"i": i, "ids": [1, 2, 3]} for i in range(4)]
    journal = Journal(path, "k")
    for row in rows:
        journal.add(row)
    journal.close()
    whole = path.read_bytes()
    assert reopened(path, "k") == rows and capsys.readouterr().err == ""
    lines = whole.splitlines()
    body, check = lines[2].rsplit(b', "check": "', 1)  # i == 1: the checksum is CRC-32 of the row without it
    assert check == b'%08x"}' % zlib.crc32(body + b"}")
    path.write_bytes(whole.replace(b'"i": 1, "ids": [1, 2, 3]', b'"i": 1, "ids": [1, 2, 7]'))  # still JSON
    assert reopened(path, "k") == [rows[0], *rows[2:]]
    assert capsys.readouterr().err == f"{path}: 1 damaged of 5 rows left out, lines 3\n"
    path.write_bytes(b"\n".join([*lines[:3], b"\xff\x00", json.dumps(rows[1]).encode(), *lines[3:]]) + b"\n")
    assert reopened(path, "k") == rows  # garbage and a row without a checksum after rows with one
    path.write_bytes(whole.replace(b'{"key": "k"', b'{"key": "j"'))
    assert reopened(path, "k") == [] and "whose work it holds is damaged; kept as" in capsys.readouterr().err


def test_a_journal_tells_its_rows_without_keeping_them(tmp_path: Path) -> None:
    path, rows = tmp_path / "journal.jsonl", [{"i": i, "text": "x" * 70_000} for i in range(4)]
    journal = Journal(path, "k")
    for row in rows:
        journal.add(row)
    journal.close()
    size = path.stat().st_size
    with open(path, "ab") as f:
        f.write(b'{"i": 4, "text": "' + b"y" * 70_000)  # torn, and longer than what is looked at in one go
    told: list[dict] = []
    journal = Journal(path, "k", use=told.append, keep=False)
    journal.close()
    assert told == rows and journal.rows == [] and path.stat().st_size == size


def test_rows_come_one_by_one(tmp_path: Path) -> None:
    """What stands before a bad line is there before the line is read; every form of line ends gives the same rows."""
    path, rows = tmp_path / "a.jsonl", [{"i": i} for i in range(3)]
    path.write_text('{"i": 0}\n\n{"i": 1}\nbad\n')
    found = files.each_row(path)
    assert [next(found), next(found)] == rows[:2]
    with pytest.raises(InputError, match=f"{path}:4: not a JSON row"):
        next(found)
    text = "\n".join(json.dumps(row) for row in rows)
    for end in ("\n", "\r\n", "\r"):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            for last in (end, ""):
                path.write_bytes((text.replace("\n", end) + last).encode(encoding))
                assert list(files.each_row(path, ("i",))) == rows, (end, encoding, last)


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j", "k")
    journal.add({"i": 0})
    real = journal.file

    class Full:
        name = "j"

        def write(self, line: bytes) -> int:
            return real.write(line[:7])

        def __getattr__(self, name: str):
            return getattr(real, name)

    journal.file = Full()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        journal.add({"i": 1})
    journal.file = real
    journal.add({"i": 2})
    journal.close()
    assert reopened(tmp_path / "j", "k") == [{"i": 0}, {"i": 2}]


# -- what editors write: Notepad, PowerShell, Excel, TextEdit, vim, the classic Mac

TEXT = "Answer shortly: é 日本 😀\n\nQuestion: {question}\n"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-sig", "utf-16-be-sig", "utf-32"]
LINE_ENDS = {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}


def saved(text: str, encoding: str, end: str) -> bytes:
    text = text.replace("\n", end)
    if encoding.startswith("utf-16-"):
        return ("\ufeff" + text).encode(encoding.removesuffix("-sig"))
    return text.encode(encoding)


@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=LINE_ENDS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_reader_gives_the_same_however_a_file_was_saved(tmp_path: Path, encoding: str, end: str) -> None:
    path, rows = tmp_path / "a", [{"id": "1", "text": "é 日本 😀 a\u2028b"}, {"id": "2", "text": "z"}]
    path.write_bytes(saved(TEXT, encoding, end))
    assert files.read_text(path) == TEXT
    path.write_bytes(saved("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding, end))
    assert files.read_jsonl(path, ("id", "text")) == rows
    path.write_bytes(saved(json.dumps(rows, ensure_ascii=False, indent=1), encoding, end))
    assert files.read_json(path) == rows
    csv = 'id,text\n1,"é 日本 😀 a\u2028b"\n2,z\n'
    assert files.csv_rows(saved(csv, encoding, end), "a.csv") == rows


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("Frage: größer\n".encode("cp1252"), ":1: not UTF-8 text"),
        (b"one\ntwo\nthr\xe9e\n", ":3: not UTF-8 text"),
        (b"one\ntwo\0\n", ":2: a NUL character"),
        ("one".encode("utf-16-le"), ": every other byte is NUL, as in UTF-16 without"),
        (b"\xff\xfeo\0n", ": damaged UTF-16 text"),
        (b"\xff\xfe\0\0o\0\0", ": damaged UTF-32 text"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        files.read_text(path)
    assert str(caught.value).startswith(f"{path}{reason}") and "\n" not in str(caught.value)
    if ":1" not in reason and ":2" not in reason and ":3" not in reason:
        with pytest.raises(InputError, match="UTF"):
            files.read_jsonl(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1\n", "a.csv:2: not as many fields"),
        ("a,b\n1,2,3\n", "a.csv:2: not as many"),
        ('a\n"1', "a.csv:1: not CSV"),
    ],
)
def test_odd_csv_is_named(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        files.csv_rows(text.encode(), "a.csv")
    assert files.csv_rows(b'a,b\n"1\r\n2",3\n', "a.csv") == [{"a": "1\r\n2", "b": "3"}]


def test_a_data_set_without_ids_is_told_how_to_get_them(tmp_path: Path) -> None:
    """And the command does what it says."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    files.write_jsonl(source, [{"question": "who?"}, {"question": "é"}])
    with pytest.raises(InputError, match="field 'id' is missing") as caught:
        files.read_jsonl(source, ("id", "question"))
    command = str(caught.value).partition("to number the rows: ")[2]
    command = command.replace("< IN > OUT", f"< '{source}' > '{target}'")
    subprocess.run(command, shell=True, check=True)
    assert files.read_jsonl(target, ("id",)) == [{"id": "q1", "question": "who?"}, {"id": "q2", "question": "é"}]
    source.write_text('[{"id": "1"}]')
    with pytest.raises(InputError, match="in.jsonl:1: a JSON array; write one object a line"):
        files.read_jsonl(source)
    source.write_text("[\n{}\n]")
    with pytest.raises(InputError, match="in.jsonl:1: a JSON array; write one object a line"):
        files.read_jsonl(source)


def test_relative_input_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any working directory: what lies there goes first, then what ships with the project."""
    monkeypatch.chdir(tmp_path)
    assert files.find("prompts/plain.txt") == files.ROOT / "prompts/plain.txt"
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/plain.txt").write_text("own")
    assert files.find("prompts/plain.txt").read_text() == "own"
    with pytest.raises(InputError) as caught:
        files.find("prompts/none.txt")
    assert str(tmp_path) in str(caught.value) and str(files.ROOT) in str(caught.value)
    assert files.find("/no/such") == Path("/no/such")  # whoever reads it names it


def test_line_ends_of_the_repository_are_pinned() -> None:
    """A clone on Windows gets the bytes that the checksums and golden files were made of."""
    assert "* text=auto eol=lf\n" in (ROOT / ".gitattributes").read_text()
    for path in [*(ROOT / "prompts").glob("*.txt"), *(ROOT / "mini").rglob("*.jsonl")]:
        assert b"\r" not in path.read_bytes(), path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, end):
    """Which of the two counts is every reader's own choice; equal keys of two objects, and in texts, are none."""
    fine = ['{"a": {"id": 1}, "b": {"id": 2},', ' "c": "\\"id\\": {\\"id\\": }", "d": ["id", "id"],', ' "id": 3}']
    path = tmp_path / "prices.json"
    path.write_bytes(end.join(fine).encode())
    assert files.read_json(path) == {"a": {"id": 1}, "b": {"id": 2}, "c": '"id": {"id": }', "d": ["id", "id"], "id": 3}
    path.write_bytes(end.join([*fine[:2], ' "e": [{"x": 1, "y": {}, "\\u0078"', ": 2}]}"]).encode("utf-8-sig"))
    with pytest.raises(InputError, match=r"prices.json:3: the key 'x' stands twice in one object; delete one"):
        files.read_json(path)
    rows = tmp_path / "train.jsonl"
    rows.write_bytes(end.join(['{"id": "q1", "w": [1]}', '{"id": "q2", "w": [1], "w": [2]}', ""]).encode())
    with pytest.raises(InputError, match=r"train.jsonl:2: the key 'w' stands twice in one object; delete one"):
        files.read_jsonl(rows)
    with pytest.raises(InputError, match=r"a.csv:1: the column 'question' stands twice; rename one"):
        files.csv_rows(end.join(["id,question,question", "1,a,b", ""]).encode(), "a.csv")


def test_a_token_id_is_one_object_however_often_it_is_read(tmp_path):
    """A row of 800 ids takes 7 kB instead of 36: the numbers of a million rows are the numbers of the vocabulary."""
    value = {"ids": [151643, -3, 0, 999999, 1000000, 12345678901234567890], "x": [1.0, -0.5, 1e3, 151643], "n": 7}
    files.write_jsonl(tmp_path / "a.jsonl", [value, value])
    first, second = files.read_jsonl(tmp_path / "a.jsonl")
    assert first == second == value and [type(x) for x in first["x"]] == [float, float, float, int]
    assert first["ids"][0] is second["ids"][0] is first["x"][3] and first["ids"][3] is second["ids"][3]


@pytest.mark.parametrize(
    ("number", "why"),
    [
        ("1e999", "larger than any number"),
        ("-1e999", "larger than any number"),
        ("9" * 6000, "6,000 digits, more than 4,000"),
    ],
)
def test_a_number_that_cannot_be_held_is_refused_in_our_words(tmp_path, number, why):
    for name, read in (("a.json", files.read_json), ("a.jsonl", files.read_jsonl)):
        (tmp_path / name).write_text(f'{{"x": {number}}}\n')
        with pytest.raises(InputError, match=f"{name}.*{why}") as caught:
            read(tmp_path / name)
        assert "sys." not in str(caught.value)
    (tmp_path / "a.json").write_text('{"x": 1e308, "y": 1e-999}')
    assert files.read_json(tmp_path / "a.json") == {"x": 1e308, "y": 0.0}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe, which can be read once only; save it"):
        files.read_jsonl(tmp_path / "pipe")


def test_every_bit_of_a_journals_first_row_matters_and_nothing_is_lost(tmp_path, capsys):
    path = tmp_path / "j.jsonl"
    journal = files.Journal(path, "key")
    journal.add({"row": 1})
    journal.close()
    whole = path.read_bytes()
    for at in range(whole.index(b"\n")):
        damaged = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        path.write_bytes(damaged)
        again = files.Journal(path, "key")
        again.close()
        assert again.rows == [] and path.read_bytes() == whole[: whole.index(b"\n") + 1]
        assert (tmp_path / "damaged-j.jsonl").read_bytes() == damaged
        assert "damaged-j.jsonl, begun anew" in capsys.readouterr().err
        (tmp_path / "damaged-j.jsonl").unlink()
    path.write_bytes(whole)
    files.Journal(path, "another").close()  # of other settings: begun anew, as before
    assert not (tmp_path / "damaged-j.jsonl").exists()
