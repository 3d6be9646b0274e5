"""Keeps the results of an interrupted run, so that the same command resumes it.

The results of a run lie in their own folder:

    drllm.resume.json       the marker: which run the folder belongs to
    KEY-HASH.json           the result of a finished block
    KEY-HASH.KEY-HASH.json  the result of a step of an unfinished block

Only files that drllm wrote are deleted, links are never followed, and every file is either complete
or missing.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec

from drllm.errors import ConfigError, RecordError
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
    """The marker of a folder: the identity of the run that the results belong to.

    `later` has the values that `ResultStore.expect` added, by name.
    """

    schema_version: int = codec.SCHEMA_VERSION
    drllm_version: str
    identity: dict[str, Any]
    later: dict[str, Any]


class ResultStore:
    """The results of one run's blocks on disk, by key.

    Use it inside `only_writer` of the output folder. The folder is made with the first result, so a
    failed start doesn't block the next run. Workers on the same machine may each keep the steps of
    their own blocks, since a store can be pickled.

    Args:
        folder: The folder of the results; it holds nothing else.
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
        self._stem = ""  # the beginning of the file names of steps; `within` sets it

    def open(self) -> bool:
        """Check the folder; return whether an earlier start left results there.

        Results without a marker are deleted, since nothing says which run they belong to. A worker
        that outlives its run can leave such results.

        Raises:
            ConfigError: The folder belongs to another run.
            RecordError: The folder is a link, or holds files that drllm didn't write.
        """
        marker = _read_marker(self.folder, self.stage)
        if marker is None:
            _refuse_foreign_files(self.folder)
            _delete_ours(self.folder)
            return False
        stored = {"drllm_version": marker.drllm_version, **marker.identity}
        self._refuse_other(stored, {"drllm_version": _VERSION, **self._identity})
        self._later = marker.later
        self._is_marked = True
        return True

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
        """Tell whether a result is there."""
        return self._file(key).is_file()

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return a result, or None if it isn't there or can't be read."""
        return _read_result(self._file(key), kind)

    def put(self, key: str, result: Any) -> bytes:
        """Keep the result of a finished block, and delete the results of its steps.

        Returns the result as it was written.
        """
        if not self._is_marked:
            marker = _Marker(drllm_version=_VERSION, identity=self._identity, later=self._later)
            codec.write_json(self.folder / MARKER_FILE, marker)
            self._is_marked = True
        file = self._file(key)
        encoded = codec.encode(result)
        codec.write_atomically(file, encoded + b"\n")
        for name in _names_in(self.folder):
            if name.startswith(file.stem + ".") and name != file.name:
                codec.delete_file(self.folder / name)
        return encoded

    def get_or_make(self, key: str, kind: type[T], make: Callable[[], Any]) -> T:
        """Return a result; if it isn't there, make and keep it.

        A new result is encoded and decoded, so that it equals what a later start reads.
        """
        result = self.get(key, kind)
        if result is not None:
            return result
        return self.of(kind).put(key, make())

    def of(self, kind: type[T], *, reads_back: bool = True) -> KeptResults[T]:
        """Return the results of one kind, as `run` keeps them; see `KeptResults`."""
        return KeptResults(self, kind, reads_back)

    def within(self, key: str) -> ResultStore:
        """Return a store for the steps of one block.

        The results of the steps are kept until the block's own result is.
        """
        steps = copy.copy(self)
        steps._stem = self._file(key).name.removesuffix("json")
        return steps

    def remove(self) -> None:
        """Delete the results after the stage has written its own files; another run's stay.

        The marker goes last, so that after a kill the remaining files can still be recognised.
        """
        try:
            marker = _read_marker(self.folder, self.stage)
        except RecordError:
            return
        if marker is not None and marker.identity != self._identity:
            return
        codec.clear_half_written(self.folder)
        if marker is not None:
            _delete_ours(self.folder)
        with contextlib.suppress(OSError):  # the folder is missing, or holds other files
            self.folder.rmdir()

    def _file(self, key: str) -> Path:
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


@dataclass(frozen=True)
class KeptResults(Generic[T]):
    """The results of one kind in a store; `run` takes it as `keep`.

    Attributes:
        store: The store.
        kind: The type of the results.
        reads_back: Whether a new result is read from what was written, so that it equals what a
            later run reads. False saves the time for results that are typed records, which are
            equal anyway.
    """

    store: ResultStore
    kind: type[T]
    reads_back: bool = True

    def get(self, key: str) -> T | None:
        """Return a block's result; None if it isn't there or can't be read."""
        return self.store.get(key, self.kind)

    def put(self, key: str, result: Any) -> T:
        """Keep a block's result; return it as a later run would read it."""
        encoded = self.store.put(key, result)
        if not self.reads_back:
            return cast(T, result)
        return codec.decode(encoded, self.kind, key)

    def steps_of(self, key: str) -> ResultStore:
        """Return the store for the steps of an unfinished block."""
        return self.store.within(key)


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


def _read_result(file: Path, kind: type[T]) -> T | None:
    """Read a result; return None if it is missing.

    A result that can't be read counts as missing, and a warning says so.
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
    foreign = sorted(name for name in _names_in(folder) if not _is_ours(name))
    if foreign:
        raise RecordError(
            f"{folder} holds files that drllm didn't write ({', '.join(foreign[:3])}); move them, "
            f"or choose another --output-dir"
        )


def _delete_ours(folder: Path) -> None:
    """Delete the files that drllm wrote; delete the marker last."""
    names = [name for name in _names_in(folder) if _is_ours(name)]
    with _named_errors(folder):
        for name in sorted(names, key=lambda name: name == MARKER_FILE):
            path = folder / name
            if path.is_symlink() or not path.is_dir():  # drllm writes no folder with such a name
                path.unlink(missing_ok=True)


def _names_in(folder: Path) -> list[str]:
    with _named_errors(folder):
        return os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208


def _is_ours(name: str) -> bool:
    """Tell whether a file's name is a name that drllm gives to files in a folder of results."""
    half_written = _HALF_WRITTEN.fullmatch(name)
    if half_written:
        name = half_written[1]
    return _OURS.fullmatch(name) is not None


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the operating system into a RecordError that names the folder."""
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
    if name.endswith("_sha256"):
        return f"other {name.removesuffix('_sha256').replace('_', ' ')}"
    if old is _ABSENT:
        return f"no {name}, now {_shorten(new)}" if name else "settings that it doesn't name"
    return f"{name} {_shorten(old)}, now {_shorten(new)}"


def _to_plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as it is after writing and reading: tuples are lists."""
    return codec.decode(codec.encode(identity), dict[str, Any], "the identity of a run")


def _shorten(value: Any) -> str:
    if value is None or value is _ABSENT:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}…"
