"""Reads and writes JSON and JSON lines, for all files that stages exchange.

Values are typed: msgspec structs, or plain `dict` and `list`. Files are written atomically. A file
that can't be trusted is refused with a `RecordError` that names the file, the line and the field.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import psutil

from drllm.errors import RecordError

T = TypeVar("T")

SCHEMA_VERSION = 2
"""The schema version that we write, and the newest version that we read."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some programs write it at the beginning of a file

_ENCODER = msgspec.json.Encoder()
_decoder = functools.lru_cache(maxsize=256)(msgspec.json.Decoder)  # a decoder for each type
_NOT_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")
"""The first bytes of NaN and infinity in MessagePack: floats whose exponent bits are all set."""
_MESSAGE_PARTS = (
    (re.compile(r"Object missing required field (`.*?`)", re.DOTALL), r"the field \1 is missing"),
    (re.compile(r"Object contains unknown field (`.*?`)", re.DOTALL), r"unknown field \1"),
    (re.compile(r"^Expected"), "expected"),
    (re.compile(r" - at (`key` in )?`\$\.?(.*)`$", re.DOTALL), r" (at \1`\2`)"),
    (re.compile(r" \(at ``\)$"), ""),
)
"""Parts of msgspec's messages, and what we write instead: "field `a` is missing (at `b[0]`)"."""
_FILE_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
_READ_SIZE = 1 << 20  # bytes


class Version(msgspec.Struct):
    """The fields at the beginning of our files that name their schema and their versions."""

    schema: str = ""
    schema_version: int = 0
    drllm_version: str = "of another version"


def decode(data: bytes | str, kind: type[T], where: str) -> T:
    """Read one JSON value, and check its type; the `__post_init__` of a struct runs too.

    Args:
        data: The JSON text.
        kind: The type of the value: a struct, or `dict[str, Any]`.
        where: The file and, in a JSON lines file, the line; error messages begin with it.

    Raises:
        RecordError: The text isn't JSON, has another type, or is of a newer version.
    """
    try:
        raw = data.encode() if isinstance(data, str) else data
        return _decode_bytes(raw, kind)
    except msgspec.ValidationError as error:
        raise RecordError(f"{where}: {describe_invalid(error)}") from error
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{where}: not UTF-8 text ({error.reason})") from error
    except msgspec.DecodeError as error:
        raise RecordError(f"{where}: {_describe_malformed(data, str(error))}") from error
    except RecursionError as error:
        raise RecordError(f"{where}: nested too deep to be read") from error
    except ValueError as error:  # from `_refuse_…`, or a number has thousands of digits
        raise RecordError(f"{where}: {error}") from error


def _decode_bytes(raw: bytes, kind: type[T]) -> T:
    """Decode JSON; raise ValueError for a newer version or a duplicate key."""
    if b'"schema_version"' in raw:
        _refuse_newer(raw)
    value: T = _decoder(kind).decode(raw)  # type: ignore[arg-type]
    # A file of drllm encodes to the same bytes again. Only other files need the slow check.
    if _ENCODER.encode(value) != raw.rstrip():
        json.loads(raw, object_pairs_hook=_refuse_duplicates)
    return value


def encode(value: Any) -> bytes:
    """Encode one value as JSON without a newline; raise RecordError for NaN and infinity."""
    try:
        data = _ENCODER.encode(value)
    except UnicodeEncodeError as error:
        raise RecordError(f"text that isn't UTF-8 can't be written: {error.object!r}") from error
    # msgspec writes null for None, but also for NaN and infinity.
    if b"null" in data and _may_hold_infinity(value):
        infinity = next(_find_infinities(msgspec.to_builtins(value), ""), None)
        if infinity is not None:
            place, number = infinity
            raise RecordError(f"`{place}` is {number}, which JSON can't hold")
    return data


def read_json(path: Path | str, kind: type[T]) -> T:
    """Read a file of one JSON value.

    Raises RecordError if the file is missing, or if `decode` refuses its content.
    """
    with _open_file(Path(path)) as file:
        return decode(file.read(), kind, str(path))


def read_json_lines(path: Path | str, kind: type[T]) -> Iterator[tuple[int, T]]:
    """Yield the number and the value of each line; the first line has number 1.

    Blank lines are left out. Editors and users write them; a manifest's hash tells if the file was
    changed.
    """
    is_empty = True
    with _open_file(Path(path)) as file:
        for number, line in number_lines(file):
            is_empty = False
            yield number, decode(line, kind, f"{path}, line {number}")
    if is_empty:
        raise RecordError(f"{path} is empty; run the stage that writes it again")


def number_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line that isn't blank; the first has number 1.

    A byte order mark at the beginning of the file is left out.
    """
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            yield number, content


def read_text(path: Path | str) -> str:
    """Read a whole UTF-8 file without its byte order mark; raise RecordError if that fails."""
    try:
        with _open_file(Path(path)) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not a UTF-8 text file ({error.reason})") from error


def write_json(path: Path, value: Any) -> None:
    """Write one value as an indented JSON file, atomically."""
    write_atomically(path, msgspec.json.format(encode(value), indent=2) + b"\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see either the old content or the new one, never a part.

    A missing folder is created. Raises RecordError if the file can't be written.
    """
    refuse_special_file(path, "write")
    clear_half_written(path.parent)
    # tempfile.mkstemp isn't used, since only the owner could read the file.
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_and_replace(temporary, path, content)
    except OSError as error:
        raise RecordError(f"can't write {path}: {error.strerror}; choose another folder") from error
    except UnicodeEncodeError as error:
        raise RecordError(f"can't write {path}: its text isn't UTF-8 ({error.reason})") from error


def _write_and_replace(temporary: Path, path: Path, content: str | bytes) -> None:
    """Write a temporary file and rename it; delete the temporary file if anything fails."""
    try:
        with temporary.open("xb") as file:
            raw = content.encode() if isinstance(content, str) else content
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def delete_file(path: Path) -> None:
    """Delete a file if it exists.

    Raises RecordError if the file can't be deleted.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(
            f"can't delete {path}: {error.strerror}; see whether you may write to its folder"
        ) from error


def clear_half_written(folder: Path) -> None:
    """Delete temporary files that killed processes of this machine left in a folder."""
    pattern = re.compile(rf"\..+\.{_host()}-(\d+)-\w{{8}}")
    with contextlib.suppress(OSError):  # a leftover file does no harm
        # os.listdir is fast: a folder may hold thousands of results, and each write calls this.
        for name in os.listdir(folder):  # noqa: PTH208
            if not name.startswith("."):  # quicker than the pattern
                continue
            match = pattern.fullmatch(name)
            if match is not None and not psutil.pid_exists(int(match[1])):
                (folder / name).unlink(missing_ok=True)


def refuse_special_file(path: Path, verb: str) -> None:
    """Raise RecordError if a path is a folder, a FIFO or another special file; see `file_exists`.

    A file that doesn't exist is fine.
    """
    file_exists(path, verb)


def file_exists(path: Path, verb: str) -> bool:
    """Tell whether a regular file exists.

    Raises RecordError if the path is something else, such as a folder or a link to a missing file.
    `verb` says in the message what is to be done with the file: "read" or "write".
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return False
        raise RecordError(f"can't {verb} {path}: it is a link to a missing file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise RecordError(f"can't {verb} {path}: {_describe_error(error)}") from error
    if stat.S_ISREG(mode):
        return True
    kind = _FILE_KINDS.get(stat.S_IFMT(mode), "device")
    raise RecordError(f"can't {verb} {path}: it is a {kind}; give the name of a file")


def describe_invalid(error: msgspec.ValidationError) -> str:
    """Return msgspec's message in our words: what is wrong, then the field in brackets."""
    message = str(error)
    for pattern, replacement in _MESSAGE_PARTS:
        message = pattern.sub(replacement, message)
    return message


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with _open_file(path) as file:
        for block in iter(functools.partial(file.read, _READ_SIZE), b""):
            digest.update(block)
    return digest.hexdigest()


def hash_values(values: Iterable[object]) -> str:
    """Return the SHA-256 of the joined `repr` of all values, as hex digits."""
    return hashlib.sha256("".join(map(repr, values)).encode()).hexdigest()


@functools.cache
def _host() -> str:
    """Return 8 hex digits that name this machine; process ids are valid on one machine only."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes; raise RecordError if the file can't be read."""
    if not file_exists(path, "read"):
        raise RecordError(f"{path} doesn't exist; give a file that a stage has written")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise RecordError(f"can't read {path}: {_describe_error(error)}") from error


def _describe_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _describe_malformed(data: bytes | str, message: str) -> str:
    """Say why a text isn't JSON, given msgspec's message.

    Python's parser accepts NaN, infinity and half a surrogate pair, which aren't JSON. A text that
    it accepts has one of these faults.
    """
    constants: list[str] = []

    def read_constant(name: str) -> float:
        constants.append(name)
        return math.nan

    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=read_constant)
        if constants:
            place, _ = next(_find_infinities(value, ""), ("", math.nan))
            where = f" (at `{place}`)" if place else ""
            return f"{constants[0]} isn't a number in JSON; expected a finite number{where}"
        return r"half a surrogate pair (\ud800 to \udfff), which isn't text"
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason})"
    except (ValueError, RecursionError):  # msgspec's message describes other faults
        pass
    if not data:
        return "nothing, expected JSON"
    if message == "Input data was truncated":
        return "cut off in the middle; make the file again"
    return f"not JSON ({message.removeprefix('JSON is malformed: ')})"


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its pairs; raise ValueError if a key is there twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice; keep one of them")
    return values


def _refuse_newer(data: bytes) -> None:
    """Raise a ValueError for a file of a newer schema version."""
    try:
        version = msgspec.json.decode(data, type=Version)
    except (msgspec.MsgspecError, RecursionError):
        return
    if version.schema_version > SCHEMA_VERSION:
        raise ValueError(
            f"written by drllm {version.drllm_version} (schema version {version.schema_version}); "
            f"this drllm reads versions up to {SCHEMA_VERSION}; install a newer drllm"
        )


def _may_hold_infinity(value: Any) -> bool:
    """Check quickly for NaN and infinity. True may be a false alarm; False is certain."""
    try:
        return _NOT_FINITE.search(msgspec.msgpack.encode(value)) is not None
    except OverflowError:  # a whole number beyond 64 bits
        return True


def _find_infinities(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Yield each NaN and infinity in a value of plain types, with its place: `("a.b[0]", nan)`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _find_infinities(item, f"{place}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _find_infinities(item, f"{place}[{index}]")
