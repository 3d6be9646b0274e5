"""JSON and JSON lines: one reader and one writer for every file between the stages.

Values are typed (msgspec structs, or plain `dict` and `list`), files are written atomically, and
what can't be trusted is refused with one `RecordError` that names file, line and place.
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

SCHEMA_VERSION = 2  # the newest form of our files that this version reads, and the one it writes


_ENCODER = msgspec.json.Encoder()
_decoder = functools.lru_cache(maxsize=256)(msgspec.json.Decoder)
_SUSPECT = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")
"""How NaN and infinity begin in MessagePack: a float whose exponent bits are all set."""


class Version(msgspec.Struct):
    """What any file of ours says of its form."""

    schema: str = ""
    schema_version: int = 0
    drllm_version: str = "of another version"


def decode(data: bytes | str, kind: type[T], where: str) -> T:
    """Read one JSON value: a struct (its `__post_init__` is run), or `dict[str, Any]`.

    What can't be read is a RecordError that begins with `where`: the file, and the line if need be.
    """
    try:
        raw = data.encode() if isinstance(data, str) else data
        if b'"schema_version"' in raw:
            _refuse_newer(raw)
        value: T = _decoder(kind).decode(raw)  # type: ignore[arg-type]
        # Our own files are byte for byte what we would write; only others need the slow look.
        if _ENCODER.encode(value) != raw.rstrip():
            json.loads(raw, object_pairs_hook=_refuse_duplicates)
    except msgspec.ValidationError as error:
        raise RecordError(f"{where}: {worded(error)}") from error
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{where}: not UTF-8 text ({error.reason})") from error
    except msgspec.DecodeError as error:
        raise RecordError(f"{where}: {_malformed(data, str(error))}") from error
    except RecursionError as error:
        raise RecordError(f"{where}: nested too deep to be read") from error
    except ValueError as error:  # of _refuse_…, or a whole number of thousands of digits
        raise RecordError(f"{where}: {error}") from error
    return value


def encode(value: Any) -> bytes:
    """Write one value as JSON, without a newline; refuse numbers that aren't finite."""
    try:
        data = _ENCODER.encode(value)
    except UnicodeEncodeError as error:
        raise RecordError(f"text that isn't UTF-8 can't be written: {error.object!r}") from error
    # msgspec writes null for None, and for NaN and infinity.
    if b"null" in data and _may_not_be_finite(value):
        for place, number in _not_finite(msgspec.to_builtins(value), ""):
            raise RecordError(f"`{place}` is {number}, which JSON can't hold")
    return data


def read_json(path: Path | str, kind: type[T]) -> T:
    """Read a file of one JSON value; a RecordError for what isn't there, or `decode` refuses."""
    with _opened(Path(path)) as file:
        return decode(file.read(), kind, str(path))


def read_json_lines(path: Path | str, kind: type[T]) -> Iterator[tuple[int, T]]:
    """Yield `(line number from 1, value)` of a file."""
    number = 0
    with _opened(Path(path)) as file:
        for number, line in enumerate(file, start=1):
            yield number, decode(line, kind, f"{path}, line {number}")
    if not number:
        raise RecordError(f"{path} is empty; run the stage that writes it again")


def read_text(path: Path | str) -> str:
    """Read a whole UTF-8 file, without a byte order mark; see `read_json` for what is refused."""
    try:
        with _opened(Path(path)) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not a UTF-8 text file ({error.reason})") from error


def write_json(path: Path, value: Any) -> None:
    """Write one value as an indented JSON file, atomically."""
    write_atomically(path, msgspec.json.format(encode(value), indent=2) + b"\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, and its folder, so that readers see the old content or all of the new."""
    refuse_odd_file(path, "write")
    clear_half_written(path.parent)
    # Not tempfile.mkstemp: its files, and so ours, could be read by their owner alone.
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RecordError(f"can't write {path}: {error.strerror}; choose another folder") from error
    except UnicodeEncodeError as error:
        raise RecordError(f"can't write {path}: its text isn't UTF-8 ({error.reason})") from error


def clear_half_written(folder: Path) -> None:
    """Delete what processes of this machine that were killed have left of files in a folder."""
    with contextlib.suppress(OSError):  # it is for tidiness only
        # A folder may hold thousands of chunks, and this is done at every write.
        for name in os.listdir(folder):  # noqa: PTH208
            half = name[0] == "." and re.fullmatch(rf"\..+\.{_host()}-(\d+)-\w{{8}}", name)
            if half and not psutil.pid_exists(int(half[1])):
                (folder / name).unlink(missing_ok=True)


def refuse_odd_file(path: Path, doing: str) -> bool:
    """Tell whether a file is there; refuse to read or write a folder, a FIFO and the like."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return False
        raise RecordError(f"can't {doing} {path}: it is a link to a missing file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise RecordError(f"can't {doing} {path}: {_reason(error)}") from error
    if stat.S_ISREG(mode):
        return True
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    what = kinds.get(stat.S_IFMT(mode), "device")
    raise RecordError(f"can't {doing} {path}: it is a {what}; give the name of a file")


def worded(error: msgspec.ValidationError) -> str:
    """Word msgspec's error as ours: what is wrong, then the place in brackets."""
    message = str(error)
    for theirs, ours in (
        (r"Object missing required field (`.*?`)", r"the field \1 is missing"),
        (r"Object contains unknown field (`.*?`)", r"unknown field \1"),
        (r"^Expected", "expected"),
        (r" - at (`key` in )?`\$\.?(.*)`$", r" (at \1`\2`)"),
        (r" \(at ``\)$", ""),
    ):
        message = re.sub(theirs, ours, message, flags=re.DOTALL)
    return message


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with _opened(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(parts: Iterable[object]) -> str:
    """Return the SHA-256 of how values are written, one after the other, as hex digits."""
    return hashlib.sha256("".join(map(repr, parts)).encode()).hexdigest()


@functools.cache
def _host() -> str:
    """Tell machines that share a folder apart, as process ids are each machine's own."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if not refuse_odd_file(path, "read"):
        raise RecordError(f"{path} doesn't exist; give a file that a stage has written")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise RecordError(f"can't read {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _malformed(data: bytes | str, message: str) -> str:
    """Say what keeps a text from being JSON."""
    constants: list[str] = []
    try:
        text = data.decode() if isinstance(data, bytes) else data
        json.loads(text, parse_constant=constants.append)  # takes more than JSON allows
        if constants:
            return f"{constants[0]} is no number of JSON; expected a finite one"
        return r"half a surrogate pair (\ud800 to \udfff), which is no text"
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason})"
    except (ValueError, RecursionError):
        pass
    if message == "Input data was truncated":
        return "cut off in the middle; make the file again" if data else "nothing, expected JSON"
    return f"not JSON ({message.removeprefix('JSON is malformed: ')})"


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice; keep one of them")
    return values


def _refuse_newer(data: bytes) -> None:
    """Refuse, by ValueError, a file of a newer version by its version's name, if it says one."""
    try:
        version = msgspec.json.decode(data, type=Version)
    except (msgspec.MsgspecError, RecursionError):
        return
    if version.schema_version > SCHEMA_VERSION:
        raise ValueError(
            f"written by drllm {version.drllm_version} (schema version {version.schema_version}); "
            f"this one reads up to {SCHEMA_VERSION}; install a newer drllm"
        )


def _may_not_be_finite(value: Any) -> bool:
    """Tell quickly whether a number may be NaN or infinite; it is seldom wrong."""
    try:
        return _SUSPECT.search(msgspec.msgpack.encode(value)) is not None
    except OverflowError:  # a whole number beyond 64 bits
        return True


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _not_finite(each, f"{place}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _not_finite(each, f"{place}[{index}]")
