"""Reads and writes records files, and the manifest beside each file.

A manifest says how the records were made, and holds the hash of the records file.
"""

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from drllm.errors import RecordError, shorten
from drllm.records import codec
from drllm.statistics.ranges import Count

LIBRARIES = ("torch", "transformers", "safetensors", "datasets", "math-verify")
RUNTIME = ("dtype", "device", "attn_implementation")
"""The settings of `ModelConfig` that say how a base model ran."""

T = TypeVar("T", bound=Any)

NumLayers: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
"""A number of layers in a file. A damaged file mustn't let a reader count to 10^30."""
Executions: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
"""A number of executions in a file, which figures draw on an axis."""


class _Manifest(msgspec.Struct):
    """The types of a manifest's keys, to check them; a manifest may have further keys."""

    schema: str
    schema_version: Count
    model: dict[str, Any]
    config: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    libraries: dict[str, str] = {}
    drllm_version: str = ""
    created: str = ""
    num_records: Count = 0
    sha256: str = ""
    plan: dict[str, Any] = {}
    num_failed: Count = 0
    summary: dict[str, Any] | None = None
    rewards: list[str] = []
    files: dict[str, Any] = {}
    runtime: dict[str, Any] = {}
    machine: str | None = None

    def __post_init__(self) -> None:
        check_runtime(self.runtime)
        check_runtime(self.plan.get("runtime"))


def check_runtime(runtime: object) -> None:
    """Raise ValueError if a value that says how a model ran isn't a text; it may be missing."""
    if not isinstance(runtime, dict):
        return  # not recorded
    for name in RUNTIME:
        value = runtime.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name!r} of 'runtime' is {shorten(repr(value))}; expected a text")


def manifest_path(path: Path) -> Path:
    """Return the path of a records file's manifest: `search.jsonl` → `search.manifest.json`."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".manifest.json")


def new_manifest(
    schema: str,
    *,
    model: Mapping[str, Any],
    config: Mapping[str, Any],
    inputs: Sequence[Path] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make a manifest from what a reader needs to trust and reproduce a file.

    Args:
        schema: The kind of file (`search`, …).
        model: The model's identity: id, revision, class, num_layers and fingerprint.
        config: The settings.
        inputs: Files that the stage read. Their hashes are stored by name, or by path if two files
            have the same name.
        extra: Further keys of the manifest.
    """
    has_distinct_names = len({file.name for file in inputs}) == len(inputs)
    hashes: dict[str, str] = {}
    for file in inputs:
        hashes[file.name if has_distinct_names else str(file)] = codec.sha256(file)
    libraries = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    return {
        "schema": f"drllm.{schema}",
        "schema_version": codec.SCHEMA_VERSION,
        "drllm_version": importlib.metadata.version("drllm"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": dict(model),
        "config": dict(config),
        "inputs": hashes,
        "libraries": libraries,
        **(extra or {}),
    }


def read_manifest(path: Path, schema: str) -> dict[str, Any] | None:
    """Read the manifest of a records file; return None if there is none.

    Files that users write themselves need no manifest.

    Args:
        path: The records file.
        schema: The kind of records that the file should hold (`search`, …).

    Raises:
        RecordError: The manifest can't be read, or names another schema.
    """
    file = manifest_path(path)
    if not codec.file_exists(file, "read"):
        return None
    manifest = codec.read_json(file, dict[str, Any])
    if manifest.get("schema") != f"drllm.{schema}":
        raise RecordError(
            f"{file} has the schema {manifest.get('schema')!r}; expected 'drllm.{schema}'; give "
            f"another file"
        )
    try:
        msgspec.convert(manifest, _Manifest)
    except msgspec.ValidationError as error:
        raise RecordError(
            f"{file}: {codec.describe_invalid(error)}; make {path.name} again"
        ) from error
    return manifest


def read_records(path: Path, kind: type[T], schema: str) -> list[T]:
    """Read and check a whole records file; as `read_numbered_records`, without the numbers."""
    return [record for _, record in read_numbered_records(path, kind, schema)]


def read_numbered_records(path: Path, kind: type[T], schema: str) -> list[tuple[int, T]]:
    """Read and check a whole records file; return each record with the number of its line.

    Args:
        path: The file.
        kind: The class of the records.
        schema: The schema that the manifest must name, if there is a manifest.

    Raises:
        RecordError: A line can't be read, a question is there twice, or the file isn't the file
            that its manifest was written for.
    """
    manifest = read_manifest(path, schema)
    records: list[tuple[int, T]] = []
    lines: dict[tuple[str, str], int] = {}  # (task, id) → first line with this question
    for line, record in codec.read_json_lines(path, kind):
        first_line = lines.setdefault((record.task, record.id), line)
        if first_line != line:
            raise RecordError(
                f"{path}, line {line}: question {record.id!r} of task {record.task!r} is in line "
                f"{first_line} already; keep one of the two lines"
            )
        records.append((line, record))
    if manifest is not None and manifest.get("sha256") != codec.sha256(path):
        raise RecordError(
            f"{path} was changed or cut off after it was written (its manifest has another hash); "
            f"make it again, or delete {manifest_path(path).name} to use {path.name} as a file of "
            f"your own"
        )
    if manifest is not None and manifest.get("num_records", len(records)) != len(records):
        raise RecordError(
            f"{manifest_path(path)} counts {manifest['num_records']} records, but {path.name} has "
            f"{len(records)}; make {path.name} again"
        )
    return records


def to_lines(records: Iterable[Any]) -> str:
    """Return records as the text of a JSON lines file."""
    return b"".join(codec.encode(record) + b"\n" for record in records).decode()


def write_or_remove(path: Path, records: Sequence[Any]) -> None:
    """Write records as a JSON lines file without a manifest; without records, remove the file."""
    if records:
        codec.write_atomically(path, to_lines(records))
    elif path.is_file():
        codec.delete_file(path)


def write_records(path: Path, records: Iterable[Any], manifest: Mapping[str, Any]) -> None:
    """Write a records file and its manifest.

    The number of records and the hash of the file are added to the manifest. An old manifest is
    deleted first, so that a kill never leaves it beside a new file. The hash is of what is written
    here, so that the manifest doesn't fit the file of another process that writes there too.
    """
    content = to_lines(records).encode()
    manifest_file = manifest_path(path)
    codec.refuse_special_file(path, "write")
    if codec.file_exists(manifest_file, "write"):
        codec.delete_file(manifest_file)
    codec.write_atomically(path, content)
    digest = hashlib.sha256(content).hexdigest()
    counts = {"num_records": content.count(b"\n"), "sha256": digest}
    codec.write_json(manifest_file, {**manifest, **counts})
