"""Files: never half-written, and read however people saved them. Text, JSON, JSONL, CSV, checksums, journals.

Everything the pipeline leaves on disk goes through `atomic_write`: the text lands in a temporary file beside its
destination, is flushed to the disk and then renamed, so a reader sees the old file or the new one and nothing between.
What comes back is checked as it is read, and a bad byte is reported with its file and line. What people bring goes
through the same readers (`utf8`): byte order marks, UTF-16, CRLF and CR do not reach anything. Work in progress is a
`Journal`. Left out on purpose: compression, remote file systems, Latin-1 and other encodings that cannot be told apart.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from common.errors import InputError

ROOT = Path(__file__).resolve().parents[1]  # the project's folder: prompts/, configs/, docs/ are in it


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on a clean exit it is synced and renamed to `path`, else removed.

    mode: "w" (UTF-8 text, "\\n" line ends) or "wb". Raises OSError when the disk does.
    """
    assert mode in ("w", "wb"), mode
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text: dict[str, Any] = dict(encoding="utf-8", newline="\n") if mode == "w" else {}
    try:
        with open(temporary, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


LINKED = 64 * 2**20  # bytes from which a file is linked


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` a copy of `source`; a large file (weights, samples) is the same file where one disk holds both.

    Nothing in the project edits a file in place, but people edit labels: in a copy they change no other run.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if os.stat(source).st_size >= LINKED:
        with contextlib.suppress(OSError):  # on another disk it is copied after all
            os.link(source, target)
            return
    with atomic_write(target, "wb") as f, open(source, "rb") as whole:
        shutil.copyfileobj(whole, f)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[IO[bytes]]:
    """A file open for reading. Raises InputError naming it when it is missing or cannot be read."""
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise InputError(f"{path}: a pipe, which can be read once only; save it to a file and give that")
        with open(path, "rb") as f:
            yield f
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path or run the stage that writes it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def read_bytes(path: str | Path) -> bytes:
    """A file's content. Raises InputError naming the file when it is missing or cannot be read."""
    with _reading(path) as f:
        return f.read()


MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
}
MARKS |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # after the longer ones, which begin like it


def utf8(raw: bytes, name: str | Path) -> bytes:
    """The bytes of a text file as UTF-8 without a byte order mark, whatever editor wrote them; line ends as they are.

    UTF-16 and UTF-32 are known by their marks, which Notepad and PowerShell write. name: what the file is called.
    Raises InputError at a text cut inside a character, and at UTF-16 without a mark. UTF-8 itself is checked later,
    where the line is known.
    """
    mark = next((mark for mark in MARKS if raw.startswith(mark)), b"")
    if MARKS.get(mark, "utf-8") != "utf-8":
        try:
            return raw.decode(MARKS[mark]).encode("utf-8")
        except UnicodeError as error:
            raise InputError(f"{name}: damaged {MARKS[mark].upper()} text ({error}); save it as UTF-8") from None
    if raw[:1000].count(0) > len(raw[:1000]) // 4:
        raise InputError(f"{name}: every other byte is NUL, as in UTF-16 without a byte order mark; save it as UTF-8")
    return raw.removeprefix(mark)


def as_text(raw: bytes, name: str | Path) -> str:
    """`raw` as text, see `utf8`. Raises InputError with the line of a byte that is not UTF-8, and of a NUL."""
    raw = utf8(raw, name)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{name}:{line}: not UTF-8 text ({error}); save the file as UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{name}:{line}: a NUL character, which is no text; delete it or restore the file")
    return text


def read_text(path: str | Path) -> str:
    """A text file's content with "\\n" as line ends, however it was saved: see `utf8`; CRLF and CR become "\\n".

    Raises InputError naming the file, and the line where there is one, when it is missing or is no text.
    """
    return as_text(read_bytes(path), path).replace("\r\n", "\n").replace("\r", "\n")


def csv_rows(raw: bytes, name: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line. raw: its bytes, see `utf8`; name: what it is called.

    Line ends inside quotes stay as they are. Raises InputError at a row with more or fewer fields than the header.
    """
    reader = csv.DictReader(io.StringIO(as_text(raw, name), newline=""), strict=True)
    rows = []
    try:
        header = list(reader.fieldnames or [])
        if again := [column for k, column in enumerate(header) if column in header[:k]]:
            raise InputError(f"{name}:1: the column {again[0]!r} stands twice; rename one of them")
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{name}:{reader.line_num}: not as many fields as the header has; repair this row")
            rows.append(row)
    except csv.Error as error:
        raise InputError(f"{name}:{reader.line_num}: not CSV ({error}); repair this row") from None
    return rows


def find(path: str | Path) -> Path:
    """The place of an input file: as given or, a relative path that is not there, beside the project.

    So `prompts/factual.txt` and `mini/cues.json` work from every working directory. Raises InputError with both places.
    """
    path = Path(path)
    if path.is_absolute() or path.exists():
        return path
    if not (ROOT / path).exists():
        beside = "" if Path.cwd() == ROOT else f" nor in {ROOT}"
        raise InputError(f"{path}: no such file in {Path.cwd()}{beside}; check the path")
    return ROOT / path


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    """A number with a point or an exponent. Raises ValueError at one like 1e999, which would be read as infinity."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is larger than any number that can be held")
    return number


class _Twice(ValueError):
    """A key stands twice in one object. JSON readers take either value, so neither is what was meant for sure."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Twice
    return value


PART = re.compile(r'("(?:[^"\\]|\\.)*")\s*(:)?|[{}]')  # a string, and whether it is a key; an object's ends


def _twice(text: str) -> tuple[str, int]:
    """(key, line of its second place) of the first key that stands twice in an object of a JSON text."""
    objects: list[set[str]] = []
    for part in PART.finditer(text):
        if part[0] == "{":
            objects.append(set())
        elif part[0] == "}":
            objects.pop()
        elif part[2]:
            key = json.loads(part[1])
            if key in objects[-1]:
                ends = "\n" if "\n" in text else "\r"
                return key, text.count(ends, 0, part.start()) + 1
            objects[-1].add(key)
    raise AssertionError(text)


LONGEST = 4000  # digits of a whole number; Python itself reads 4,300


class _Numbers(dict[str, int]):
    """The numbers of up to six digits that were read so far: a token id is one object, however often it stands there.

    Python makes a new one of 28 bytes each time; a list of ids is four times larger by it.
    """

    def __missing__(self, digits: str) -> int:
        if len(digits) > LONGEST:
            raise ValueError(f"a number of {len(digits):,} digits, more than {LONGEST:,}")
        number = int(digits)
        if len(digits) < 7:
            self[digits] = number
        return number


DECODER = json.JSONDecoder(  # json.loads would make one per row
    parse_constant=_not_json, parse_int=_Numbers().__getitem__, parse_float=_finite, object_pairs_hook=_unique
)


def _parse(text: bytes) -> Any:
    """One JSON value of strict UTF-8. Raises ValueError or RecursionError when it could not be written back."""
    decoded = text.decode("utf-8")
    value = DECODER.decode(decoded)
    if "\\u" in decoded:  # an escape may spell half a surrogate pair, which no UTF-8 file and no tokenizer can hold
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path: str | Path) -> Any:
    """One JSON document, see `utf8`. Raises InputError naming the file when it is missing or malformed.

    A key that stands twice in one object is refused with its line, here and in rows.
    """
    raw = utf8(read_bytes(path), path)
    try:
        return _parse(raw)
    except _Twice:
        key, line = _twice(raw.decode())
        raise InputError(f"{path}:{line}: the key {key!r} stands twice in one object; delete one of the two") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore or rewrite the file") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity raise ValueError: they are not JSON."""
    with atomic_write(path) as f:
        json.dump(value, f, indent=1, ensure_ascii=False, allow_nan=False)
        f.write("\n")


ADD_IDS = (  # what to run on a data set without ids
    'python3 -c \'import json, sys; [print(json.dumps({"id": f"q{n}"} | json.loads(row))) '
    "for n, row in enumerate(sys.stdin, 1)]' < IN > OUT"
)


def read_jsonl(
    path: str | Path, required: tuple[str, ...] = (), check: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """All rows of a JSONL file: one JSON object a line, each with the `required` fields and accepted by `check`.

    Lines end at LF or CRLF, or at CR in a file without LF (a row may hold U+2028); empty lines are ignored; see `utf8`.
    check: raises InputError("reason; remedy") about a row it refuses; the place is put in front here.
    Raises InputError "file:line: reason; remedy" at the first bad line, and when the file is missing.
    """
    return list(each_row(path, required, check))


def each_row(
    path: str | Path, required: tuple[str, ...] = (), check: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows that `read_jsonl` returns, one by one: half a million samples are more than memory should hold."""
    first = True
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except _Twice:
            key = _twice(line.decode())[0]
            raise InputError(f"{path}:{number}: the key {key!r} stands twice in one object; delete one") from None
        except (ValueError, RecursionError) as error:
            if first and line.lstrip().startswith(b"["):
                raise InputError(f"{path}:{number}: a JSON array; write one object a line: jq -c .[] A > B") from None
            raise InputError(f"{path}:{number}: not a JSON row ({error}); repair or delete this line") from None
        if isinstance(row, list) and first:
            raise InputError(f"{path}:{number}: a JSON array; write one object a line: jq -c .[] A > B")
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a row must be a JSON object, not {type(row).__name__}; repair it")
        missing = [name for name in required if name not in row]
        if missing:
            how = f"; to number the rows: {ADD_IDS}" if missing[0] == "id" else ""
            needs = f"each row needs {', '.join(required)}{how}"
            raise InputError(f"{path}:{number}: field {missing[0]!r} is missing; {needs}")
        try:
            if check:
                check(row)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        first = False
        yield row


def _lines(path: str | Path) -> Iterator[bytes]:
    """The lines of a text file as UTF-8, without their ends; see `utf8`."""
    with _reading(path) as f:
        head = f.read(1000)
        f.seek(0)
        if head.startswith(tuple(MARKS)) or b"\0" in head:
            raw = utf8(f.read(), path)
            yield from raw.split(b"\n" if b"\n" in raw else b"\r")
            return
        for line in f:
            if b"\r" in line and not line.endswith(b"\n") and f.tell() == len(line):  # a whole file without LF
                yield from line.split(b"\r")
            else:
                yield line.removesuffix(b"\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, atomically. Returns the number of rows."""
    count = 0
    with atomic_write(path) as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises InputError when there is no such file."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path or run the stage that writes it") from None


# What closes every line of a journal, {body, "check": "0123abcd"}: CRC-32 of the line's JSON without it, in hex.
CHECK = re.compile(rb', "check": "([0-9a-f]{8})"\}')


def _sealed(row: dict[str, Any]) -> bytes:
    """One line of a journal. ASCII only, so that half a surrogate pair, as a server may send, can be kept."""
    body = json.dumps(row).encode()
    return b'%b, "check": "%08x"}\n' % (body[:-1], zlib.crc32(body))


def write_sealed(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically, each with a last field "check" at which `journal_rows` looks."""
    with atomic_write(path, "wb") as f:
        f.writelines(map(_sealed, rows))


def _opened(line: bytes, old: bool) -> dict[str, Any]:
    """The row of one line. old: it may lack a checksum. Raises ValueError or RecursionError at a damaged one."""
    at = line.rfind(b', "check": "')
    end = CHECK.fullmatch(line, at) if at >= 0 else None
    if end:
        line = line[:at] + b"}"
        if zlib.crc32(line) != int(end[1], 16):
            raise ValueError("the checksum does not fit")
    elif not old:
        raise ValueError("no checksum")
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return row


def journal_rows(
    lines: Iterable[bytes], name: str | Path, use: Callable[[dict[str, Any]], Any] | None = None, keep: bool = True
) -> list[dict[str, Any]]:
    """The sound rows of a journal's lines. Damaged ones are left out from now on and named on stderr.

    A journal that begins without checksums was written before there were any, and is believed up to its first one.
    use: told every sound row in order; a row at which it raises ValueError, KeyError, TypeError, AttributeError
    or OverflowError
    counts as damaged too. keep: False where what `use` was told is enough; the result is empty then.
    """
    rows, bad, old, sound = [], [], True, 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break  # torn: its program was killed while writing
        try:
            row = _opened(line.removesuffix(b"\n"), old)
            old = old and b', "check": "' not in line
            if use:
                use(row)
            sound += 1
            if keep:
                rows.append(row)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError):
            bad.append(number)
    if bad:
        told = ", ".join(map(str, bad[:10])) + (" ..." if len(bad) > 10 else "")
        print(f"{name}: {len(bad)} damaged of {len(bad) + sound} rows left out, lines {told}", file=sys.stderr)
    return rows


def _whole(f: IO[bytes]) -> int:
    """Bytes up to the last line end: what follows is the row of a program that was killed while writing."""
    end = f.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - (1 << 16))
        f.seek(start)
        found = f.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _is_key(line: bytes) -> bool:
    """Whether a journal's first line is whole, so that the journal is known to be of another key."""
    with contextlib.suppress(ValueError, RecursionError):
        return "key" in _opened(line.removesuffix(b"\n"), old=False)
    return False


class Journal:
    """An append-only JSONL file of finished pieces of work: what was added before a kill is there after it.

    Every row carries a checksum. `rows` are the sound ones of an earlier journal of the same key, see `journal_rows`;
    another key starts the file anew, no key takes every file. Where the row with the key is damaged, the file is kept
    as damaged-NAME first. sync: a row is on the disk when `add` returns; otherwise it is with the operating system, and
    only a crash of the machine can lose it. `add` is safe from many threads.
    use, keep: see `journal_rows`; `use` is not told the key.
    Raises InputError while another program has the file.
    """

    def __init__(
        self,
        path: str | Path,
        key: str = "",
        sync: bool = False,
        use: Callable[[dict[str, Any]], Any] | None = None,
        keep: bool = True,
    ) -> None:
        self.sync, self.lock = sync, threading.Lock()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab+", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise InputError(f"{path}: another program is writing this file; wait for it or end it") from None
        with open(path, "rb") as f:
            whole = _whole(f)
            f.seek(0)
            first = f.readline() if whole else b""
        if key and first != _sealed({"key": key}):
            if first and not _is_key(first):
                kept = Path(path).with_name(f"damaged-{Path(path).name}")
                shutil.copyfile(path, kept)
                told = f"{path}: the row that says whose work it holds is damaged; kept as {kept}, begun anew"
                print(told, file=sys.stderr)
            whole = 0
        self.file.truncate(whole)
        used = use and (lambda row: None if key and row == {"key": key} else use(row))
        with open(path, "rb") as f:
            self.rows = journal_rows(f, path, used, keep)
        if key and not whole:
            self.add({"key": key})
        elif key:
            del self.rows[:1]

    def add(self, row: dict[str, Any]) -> None:
        """Append one row, in one write: a kill tears at most this line. Raises OSError; no part of it is left then."""
        line = _sealed(row)
        with self.lock:
            before = self.file.seek(0, os.SEEK_END)
            if self.file.write(line) != len(line):
                self.file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
            if self.sync:
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """Give the file back; it stays on disk."""
        self.file.close()
