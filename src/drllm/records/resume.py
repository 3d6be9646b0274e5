"""Keeps the finished chunks of an interrupted run, so that the same command resumes it.

The chunks of a run lie in their own folder:

    drllm.resume.json       the marker: which run the folder belongs to
    KEY-HASH.json           a finished chunk
    KEY-HASH.KEY-HASH.json  a part of an unfinished chunk

Only files that drllm wrote are deleted, links are never followed, and every file is either complete
or missing.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from drllm.errors import ConfigError, RecordError
from drllm.processes import count, from_first, is_first, share
from drllm.records import codec

logger = logging.getLogger(__name__)

T = TypeVar("T")

MARKER_FILE = "drllm.resume.json"

# The names of files that this module writes.
_OURS = re.compile(r"(?:[a-z0-9-]*[0-9a-f]{12}\.)+json(?:\.broken)?|" + re.escape(MARKER_FILE))
# The names of temporary files that a killed `codec.write_atomically` leaves.
_HALF_WRITTEN = re.compile(r"\.(.+)\.[0-9a-f]{8}-\d+-[0-9a-f]{8}")
# Groups of values in an identity. Messages name the values alone: "limit", not "settings limit".
_SECTIONS = ("settings", "config")
_ABSENT: Any = object()  # stands for a value that an identity doesn't have
_VERSION = importlib.metadata.version("drllm")
MAX_SHOWN = 60  # maximum characters of a value in a message


class _Marker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The marker of a folder: the identity of the run that the chunks belong to.

    `later` has the values that `Chunks.expect` added, by name.
    """

    schema_version: int = codec.SCHEMA_VERSION
    drllm_version: str = _VERSION
    identity: dict[str, Any]
    later: dict[str, Any]


class Chunks:
    """The finished chunks of one run, by key.

    Use an instance inside `only_writer` of the output folder. The folder of the chunks is created
    with the first chunk, so a failed start doesn't block the next run.

    Instances can be pickled. Processes that the run starts may each `put` chunks of their own. If a
    launcher has started several processes for one stage (see `processes`), all of them must make
    the same calls, and only the first process reads and writes.

    Args:
        folder: The folder of the chunks; it holds nothing else.
        identity: The values that must be equal for a start to resume the run, as plain JSON.
            Messages list the values that differ in this order. They don't show hashes: for
            `questions_sha256` they say "other questions".
        stage: The name of the stage, for messages ("search").
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, stage: str) -> None:
        self.folder = folder
        self.stage = stage
        self._identity = _to_plain(identity)
        self._later: dict[str, Any] = {}  # parts of the identity that `expect` added
        self._is_marked = False  # whether the marker on disk is up to date
        self._stem = ""  # the beginning of the file names of parts; `within` sets it

    def open(self) -> bool:
        """Check the folder; return whether an earlier start left chunks there.

        Raises:
            ConfigError: The folder belongs to another run.
            RecordError: The folder is a link, or holds files that drllm didn't write.
        """
        marker = from_first(lambda: _read_marker(self.folder, self.stage))
        if marker is not None:
            stored = {"drllm_version": marker.drllm_version, **marker.identity}
            self._refuse_other(stored, {"drllm_version": _VERSION, **self._identity})
            self._later = marker.later
            self._is_marked = True
        elif is_first():
            _refuse_foreign_files(self.folder)
        return marker is not None

    def expect(self, name: str, identity: Mapping[str, Any]) -> None:
        """Add to the identity values that become known only during the run.

        Raises ConfigError if an earlier start of the run added other values under this name.
        """
        plain = _to_plain(identity)
        if name in self._later:
            self._refuse_other({name: self._later[name]}, {name: plain})
        else:
            self._later[name] = plain
            self._is_marked = False

    def has(self, key: str) -> bool:
        """Tell whether a chunk is finished."""
        return from_first(self._file(key).is_file)

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return a chunk, or None if it isn't finished or can't be read."""
        return from_first(lambda: _read_chunk(self._file(key), kind))

    def put(self, key: str, value: Any) -> None:
        """Keep a finished chunk, and delete its parts."""
        if not is_first():
            return
        if not self._is_marked:
            marker = _Marker(identity=self._identity, later=self._later)
            codec.write_json(self.folder / MARKER_FILE, marker)
            self._is_marked = True
        file = self._file(key)
        codec.write_atomically(file, codec.encode(value) + b"\n")
        for name in _list_names(self.folder):
            is_part = name.startswith(f"{file.stem}.") and name != file.name
            if is_part:
                (self.folder / name).unlink(missing_ok=True)

    def get_or_make(self, key: str, kind: type[T], make: Callable[[], Any]) -> T:
        """Return a chunk; if it isn't finished, make and keep it.

        All processes make the chunk, and use the chunk of the first process.
        """
        chunk = self.get(key, kind)
        if chunk is not None:
            return chunk
        value = make()
        return self._put_and_decode(key, kind, from_first(lambda: value))

    def get_or_make_all(self, makes: Mapping[str, Callable[[], Any]], kind: type[T]) -> Iterator[T]:
        """Yield the chunks of several keys in order; make and keep the missing chunks.

        Several processes share the work: in each round, every process makes one missing chunk.
        """
        chunks: dict[str, T | None] = {key: self.get(key, kind) for key in makes}
        missing = [key for key, chunk in chunks.items() if chunk is None]
        for key in makes:
            if chunks[key] is None:
                next_keys = missing[: count()]  # `key` is the first
                missing = missing[count() :]
                values = share([makes[next_key] for next_key in next_keys])
                for next_key, value in zip(next_keys, values, strict=True):
                    chunks[next_key] = self._put_and_decode(next_key, kind, value)
            chunk = chunks[key]
            assert chunk is not None
            yield chunk

    def within(self, key: str) -> "Chunks":
        """Return a `Chunks` for the parts of one chunk.

        Parts are kept like chunks, until the chunk itself is put.
        """
        parts = copy.copy(self)
        parts._stem = self._file(key).name.removesuffix("json")
        return parts

    def remove(self) -> None:
        """Delete the chunks, once the results are written; chunks of another run stay.

        The marker is deleted last, so that after a kill the remaining files still have it.
        """
        try:
            marker = _read_marker(self.folder, self.stage) if is_first() else None
        except RecordError:
            return
        if marker is not None and marker.identity != self._identity:
            return
        codec.clear_half_written(self.folder)
        if marker is not None:
            _delete_ours(self.folder)
        with contextlib.suppress(OSError):  # the folder is missing, or holds other files
            self.folder.rmdir()

    def _put_and_decode(self, key: str, kind: type[T], value: Any) -> T:
        """Keep a new chunk, and return it as a later start will read it."""
        self.put(key, value)
        return codec.decode(codec.encode(value), kind, key)

    def _file(self, key: str) -> Path:
        """Return the file of a chunk; its name has the words of the key, and the key's hash."""
        words = re.sub(r"[^a-z0-9]+", "-", key.lower())[:60].strip("-")
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.folder / f"{self._stem}{words}-{digest}.json"

    def _refuse_other(self, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
        refuse_other_run(
            f"the interrupted {self.stage} in {self.folder}",
            stored,
            current,
            f"give the same settings to resume it, choose another --output-dir, or delete "
            f"{self.folder}",
        )


def _read_marker(folder: Path, stage: str) -> _Marker | None:
    """Read the marker of a folder; return None if there is none."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RecordError(
            f"{folder} is a link or a file, but the {stage} needs a folder there; delete it, or "
            f"choose another --output-dir"
        )
    if not codec.file_exists(folder / MARKER_FILE, "read"):
        return None
    try:
        return codec.read_json(folder / MARKER_FILE, _Marker)
    except RecordError as error:
        raise RecordError(f"{error}; delete {folder} to start from scratch") from error


def _read_chunk(file: Path, kind: type[T]) -> T | None:
    """Read a chunk; return None if it is missing.

    A chunk that can't be read counts as missing, and a warning says so.
    """
    try:
        if file.is_symlink():
            raise RecordError(f"{file} is a link")
        return codec.read_json(file, kind) if file.exists() else None
    except RecordError as error:
        logger.warning("%s; its work is done again", error)
        return None


def _refuse_foreign_files(folder: Path) -> None:
    """Refuse a folder without a marker if it holds files that drllm didn't write."""
    foreign = sorted(name for name in _list_names(folder) if not _is_ours(name))
    if foreign:
        raise RecordError(
            f"{folder} holds files that drllm didn't write ({', '.join(foreign[:3])}); move them, "
            f"or choose another --output-dir"
        )


def _delete_ours(folder: Path) -> None:
    """Delete the files that drllm wrote; delete the marker last."""
    names = [name for name in _list_names(folder) if _is_ours(name)]
    with _named_errors(folder):
        for name in sorted(names, key=lambda name: name == MARKER_FILE):
            path = folder / name
            if path.is_symlink() or not path.is_dir():  # drllm writes no folder with such a name
                path.unlink(missing_ok=True)


def _list_names(folder: Path) -> list[str]:
    """Return the names in a folder; none if the folder doesn't exist."""
    with _named_errors(folder):
        if not folder.is_dir():
            return []
        return os.listdir(folder)  # noqa: PTH208


def _is_ours(name: str) -> bool:
    """Tell whether a file's name is a name that drllm gives to files in a folder of chunks."""
    half_written = _HALF_WRITTEN.fullmatch(name)
    if half_written:
        name = half_written[1]
    return _OURS.fullmatch(name) is not None


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the operating system inside the block into a RecordError on the folder."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"can't use {folder}: {error.strerror}") from error


def refuse_other_run(
    what: str, stored: Mapping[str, Any], current: Mapping[str, Any], remedy: str
) -> None:
    """Refuse to resume or to replace the work of another run.

    Args:
        what: The work of the other run, as the subject of a sentence ("the search in OUT").
        stored: The identity of the other run.
        current: The identity of this run.
        remedy: What to do, as an imperative.
    """
    changes = differences(stored, current)
    if changes:
        raise ConfigError(f"{what} was made with {'; '.join(changes)}; {remedy}")


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Say in words where two identities differ, in the order of the current identity."""
    return list(_find_changes("", _to_plain(stored), _to_plain(current)))


def _find_changes(name: str, old: Any, new: Any) -> Iterator[str]:
    """Yield a text for each value that differs inside two values of an identity."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**new, **old}:  # the keys of both; the order of `new` counts
            inner_name = name if key in _SECTIONS else f"{name} {key}".strip()
            yield from _find_changes(inner_name, old.get(key, _ABSENT), new.get(key, _ABSENT))
        return
    change = _describe_change(name, old, new)
    if change:
        yield change


def _describe_change(name: str, old: Any, new: Any) -> str:
    """Describe how a value differs; return an empty text if it doesn't.

    The identities may be of different versions. So a setting that is missing counts as None, which
    stands for a setting that isn't used.
    """
    old_setting = None if old is _ABSENT else old
    new_setting = None if new is _ABSENT else new
    if old_setting == new_setting:
        return ""
    if old is _ABSENT:
        return f"no {name}, now {_shorten(new)}"
    if name.endswith("_sha256"):
        return f"other {name.removesuffix('_sha256').replace('_', ' ')}"
    return f"{name} {_shorten(old)}, now {_shorten(new)}"


def _to_plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as it is after writing and reading: tuples are lists."""
    return codec.decode(codec.encode(identity), dict[str, Any], "the identity of a run")


def _shorten(value: Any) -> str:
    if value is None or value is _ABSENT:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}…"
