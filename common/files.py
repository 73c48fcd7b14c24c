"""Files that are never half-written: atomic writes, JSON, JSONL with line numbers, checksums.

Everything the pipeline leaves on disk goes through `atomic_write`: the text lands in a temporary file beside its
destination, is flushed to the disk and then renamed, so a reader sees the old file or the new one and nothing between.
What comes back is checked as it is read, and a bad byte is reported with its file and line. Left out on purpose:
compression, locking, remote file systems.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
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
    text = dict(encoding="utf-8", newline="\n") if mode == "w" else {}
    try:
        with open(temporary, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` the same file as `source`, a copy on another disk. Nothing in the project edits a file in place."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with atomic_write(target, "wb") as f, open(source, "rb") as whole:
            shutil.copyfileobj(whole, f)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(path: str | Path) -> bytes:
    """A file's content. Raises InputError naming the file when it is missing or cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path or run the stage that writes it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def read_text(path: str | Path) -> str:
    """A file's UTF-8 text. Raises InputError naming the file when it is missing or is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse(text: bytes) -> Any:
    """One JSON value of strict UTF-8. Raises ValueError or RecursionError when it could not be written back."""
    decoded = text.decode("utf-8")
    value = json.loads(decoded, parse_constant=_not_json)
    if "\\u" in decoded:  # an escape may spell half a surrogate pair, which no UTF-8 file and no tokenizer can hold
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path: str | Path) -> Any:
    """One JSON document in UTF-8. Raises InputError naming the file when it is missing or malformed."""
    try:
        return _parse(read_bytes(path).removeprefix(b"\xef\xbb\xbf"))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore or rewrite the file") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity raise ValueError: they are not JSON."""
    with atomic_write(path) as f:
        json.dump(value, f, indent=1, ensure_ascii=False, allow_nan=False)
        f.write("\n")


def read_jsonl(
    path: str | Path, required: tuple[str, ...] = (), check: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """All rows of a JSONL file: one JSON object a line, each with the `required` fields and accepted by `check`.

    Lines end at "\\n" only (a row may hold U+2028), bytes must be UTF-8, a byte order mark and empty lines are ignored.
    check: raises InputError("reason; remedy") about a row it refuses; the place is put in front here.
    Raises InputError "file:line: reason; remedy" at the first bad line, and when the file is missing.
    """
    rows = []
    for number, line in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a JSON row ({error}); repair or delete this line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a row must be a JSON object, not {type(row).__name__}; repair it")
        missing = [name for name in required if name not in row]
        if missing:
            raise InputError(f"{path}:{number}: field {missing[0]!r} is missing; each row needs {', '.join(required)}")
        try:
            if check:
                check(row)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        rows.append(row)
    return rows


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
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


class Journal:
    """An append-only JSONL file of finished pieces of work: what was added before a kill is there after it.

    `rows` are those an earlier journal of the same key left, without a torn last line; another key starts the file
    anew. A row is handed to the operating system at once; only a crash of the machine itself can lose it.
    """

    def __init__(self, path: str | Path, key: str) -> None:
        self.rows: list[dict[str, Any]] = []
        whole = b""
        if Path(path).exists():
            raw = Path(path).read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
        first, *lines = whole.split(b"\n")[:-1] or [b"null"]
        if json.loads(first) == {"key": key}:
            self.rows = [json.loads(line) for line in lines]
        else:
            whole = b""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "r+b" if whole else "wb", buffering=0)
        self.file.truncate(len(whole))
        self.file.seek(len(whole))
        if not whole:
            self.add({"key": key}, keep=False)

    def add(self, row: dict[str, Any], keep: bool = True) -> None:
        """Append one row."""
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if keep:
            self.rows.append(row)

    def close(self) -> None:
        """Give the file back; it stays on disk."""
        self.file.close()
