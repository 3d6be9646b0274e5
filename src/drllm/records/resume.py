"""Resuming: is this the same run as before, and what of it is done?

An interrupted run leaves its finished chunks in a folder of its own, and resumes from them:

    drllm.resume.json       the marker: which run the folder belongs to
    KEY-HASH.json           a finished chunk
    KEY-HASH.KEY-HASH.json  a part of a chunk that is under way

What drllm didn't write there is never deleted, links are never followed, and every file is there
whole or not at all.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from drllm.errors import ConfigError, RecordError
from drllm.listener import logger
from drllm.processes import count, from_first, is_first, share
from drllm.records import codec

T = TypeVar("T")

MARKER_FILE = "drllm.resume.json"

_OURS = re.compile(r"(?:[a-z0-9-]*[0-9a-f]{12}\.)+json(?:\.broken)?|" + re.escape(MARKER_FILE))
_HALF_WRITTEN = re.compile(r"\.(.+)\.[0-9a-f]{8}-\d+-[0-9a-f]{8}")
_SECTIONS = ("settings", "config")  # parts of an identity whose names say nothing to a user
_ABSENT: Any = object()
_VERSION = importlib.metadata.version("drllm")


class _Marker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema_version: int = codec.SCHEMA_VERSION
    drllm_version: str = _VERSION
    identity: dict[str, Any]
    later: dict[str, Any]


class Chunks:
    """The finished chunks of one run, by key.

    Use it inside `only_writer` of the folder that gets the results. Instances can be pickled:
    processes that the run starts may `put` chunks, each its own. Of several processes of one stage
    the first has the chunks; in all of them the same is asked for.

    The folder is made with the first chunk and not sooner: a start that came to nothing, by a
    setting that is mended then, must not stand in the way of the next one. The identity is what
    must be equal for two runs to be the same one, as plain JSON, the most telling first; of a
    value named `*_sha256` messages say "other *".
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, stage: str) -> None:
        self.folder, self.stage = folder, stage
        self._identity = _plain(identity)
        self._later: dict[str, Any] = {}
        self._is_marked = False
        self._stem = ""

    def open(self) -> bool:
        """Accept what the folder holds; tell whether an earlier start kept something.

        A folder of another run is a ConfigError; a link, or files of others, a RecordError.
        """
        marker = from_first(self._read_marker)
        if marker is not None:
            wanted = {"drllm_version": _VERSION, **self._identity}
            self._refuse_other({"drllm_version": marker.drllm_version, **marker.identity}, wanted)
            self._later, self._is_marked = marker.later, True
        elif is_first() and (foreign := sorted(n for n in self._names() if not _is_ours(n))):
            raise RecordError(
                f"{self.folder} holds files that drllm didn't write ({', '.join(foreign[:3])}); "
                f"move them, or choose another --output-dir"
            )
        return marker is not None

    def expect(self, name: str, identity: Mapping[str, Any]) -> None:
        """Add to the identity what becomes known during the run; refuse another than earlier."""
        wanted = _plain(identity)
        if name in self._later:
            self._refuse_other({name: self._later[name]}, {name: wanted})
        else:
            self._later[name] = wanted
            self._is_marked = False

    def has(self, key: str) -> bool:
        """Tell whether a chunk is there."""
        return from_first(self._file(key).is_file)

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return a chunk, or None where it isn't done or can't be read."""
        return from_first(lambda: self._read(key, kind))

    def _read(self, key: str, kind: type[T]) -> T | None:
        file = self._file(key)
        try:
            if file.is_symlink():
                raise RecordError(f"{file} is a link")
            return codec.read_json(file, kind) if file.exists() else None
        except RecordError as error:
            logger.warning("%s; what it held is done again", error)
            return None

    def put(self, key: str, value: Any) -> None:
        """Keep a finished chunk; its parts go."""
        if not is_first():
            return
        if not self._is_marked:
            marker = _Marker(identity=self._identity, later=self._later)
            codec.write_json(self.folder / MARKER_FILE, marker)
            self._is_marked = True
        file = self._file(key)
        codec.write_atomically(file, codec.encode(value) + b"\n")
        for name in self._names():
            if name.startswith(file.stem + ".") and name != file.name:
                (self.folder / name).unlink(missing_ok=True)

    def once(self, key: str, kind: type[T], make: Callable[[], Any]) -> T:
        """Return a chunk; one that isn't done is made, and kept, first.

        What was made is encoded and decoded, so that it can't differ from what a later start will
        find.
        """
        found = self.get(key, kind)
        if found is None:
            made = make()
            found = self._kept(key, kind, from_first(lambda: made))
        return found

    def each_once(self, makes: Mapping[str, Callable[[], Any]], kind: type[T]) -> Iterator[T]:
        """Yield chunks as `once`, in order; processes share out those that aren't done."""
        found: dict[str, Any] = {key: self.get(key, kind) for key in makes}
        todo = [key for key, value in found.items() if value is None]
        for key in makes:
            if found[key] is None:
                keys, todo = todo[: count()], todo[count() :]
                for each, value in zip(keys, share([makes[each] for each in keys]), strict=True):
                    found[each] = self._kept(each, kind, value)
            yield found[key]

    def _kept(self, key: str, kind: type[T], value: Any) -> T:
        self.put(key, value)
        return codec.decode(codec.encode(value), kind, key)

    def within(self, key: str) -> "Chunks":
        """Return the parts of a chunk: kept like chunks, until the chunk itself is put."""
        parts = copy.copy(self)
        parts._stem = self._file(key).name.removesuffix("json")
        return parts

    def remove(self) -> None:
        """Delete what was kept, as the results are written; another run's chunks stay.

        The marker goes last, so that what a kill leaves can still be told to be ours.
        """
        try:
            marker = self._read_marker() if is_first() else None
        except RecordError:
            return
        if marker is not None and marker.identity != self._identity:
            return
        codec.clear_half_written(self.folder)
        with self._refusing():
            names = filter(_is_ours, self._names() if marker is not None else [])
            for name in sorted(names, key=lambda name: name == MARKER_FILE):
                path = self.folder / name
                if path.is_symlink() or not path.is_dir():
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # missing, or it holds files of others
            self.folder.rmdir()

    def _file(self, key: str) -> Path:
        words = re.sub(r"[^a-z0-9]+", "-", key.lower())[:60].strip("-")
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.folder / f"{self._stem}{words}-{digest}.json"

    def _read_marker(self) -> _Marker | None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise RecordError(
                f"{self.folder} is a link or a file; what a {self.stage} keeps lies in a folder of "
                f"its own: delete it, or choose another --output-dir"
            )
        if not codec.refuse_odd_file(self.folder / MARKER_FILE, "read"):
            return None
        try:
            return codec.read_json(self.folder / MARKER_FILE, _Marker)
        except RecordError as error:
            raise RecordError(f"{error}; delete {self.folder} to begin anew") from error

    def _refuse_other(self, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        refuse_other_run(
            f"what {self.folder} keeps of an interrupted {self.stage}",
            stored,
            wanted,
            f"give the same to resume it, choose another --output-dir, or delete {self.folder}",
        )

    def _names(self) -> list[str]:
        with self._refusing():
            return os.listdir(self.folder) if self.folder.is_dir() else []  # noqa: PTH208

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecordError(f"can't use {self.folder}: {error.strerror}") from error


def refuse_other_run(
    what: str, stored: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str
) -> None:
    """Refuse to resume, or to replace, what ("the search in OUT") another run has made."""
    if found := differences(stored, wanted):
        raise ConfigError(f"{what} was made with {'; '.join(found)}; {remedy}")


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say in what two identities differ, in the order of the wanted one."""
    return list(_differ("", _plain(stored), _plain(wanted)))


def _differ(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**new, **old}:
            inner = name if key in _SECTIONS else f"{name} {key}".strip()
            yield from _differ(inner, old.get(key, _ABSENT), new.get(key, _ABSENT))
    elif old is None and new is _ABSENT:  # a setting that there is no more, left alone
        return
    elif old is _ABSENT and new is not None:  # else a setting that there wasn't, left alone
        yield f"no {name}, now {_short(new)}"
    elif old in (new, _ABSENT):
        return
    elif name.endswith("_sha256"):
        yield f"other {name.removesuffix('_sha256').replace('_', ' ')}"
    else:
        yield f"{name} {_short(old)}, now {_short(new)}"


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    return codec.decode(codec.encode(identity), dict[str, Any], "the identity of a run")


def _short(value: Any) -> str:
    text = "none" if value is None or value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_ours(name: str) -> bool:
    half = _HALF_WRITTEN.fullmatch(name)
    return bool(_OURS.fullmatch(half[1] if half else name))
