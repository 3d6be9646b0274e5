"""A records file and its manifest: what made it, from what, and its hash."""

import contextlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from drllm.errors import RecordError
from drllm.records import codec

LIBRARIES = ("torch", "transformers", "safetensors", "datasets", "math-verify")

T = TypeVar("T", bound=Any)


class _Manifest(msgspec.Struct):
    """What must be of which type; stages add keys of their own."""

    schema: str
    schema_version: int
    model: dict[str, Any]
    config: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    libraries: dict[str, str] = {}
    drllm_version: str = ""
    created: str = ""
    num_records: int = 0
    sha256: str = ""
    plan: dict[str, Any] = {}
    num_failed: int = 0
    summary: dict[str, Any] | None = None
    rewards: list[str] = []
    files: dict[str, Any] = {}


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a records file lies: `search.jsonl` → `search.manifest.json`."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".manifest.json")


def new_manifest(
    schema: str,
    *,
    model: Mapping[str, Any],
    config: Mapping[str, Any],
    inputs: Sequence[Path] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Gather what a reader needs to trust and reproduce a records file (`search`, …).

    The model's identity has id, revision, class, num_layers and fingerprint; the hashes of the
    inputs are stored, by name where names differ; `extra` are more keys of the stage's own.
    """
    distinct = len({file.name for file in inputs}) == len(inputs)
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
        "inputs": {file.name if distinct else str(file): codec.sha256(file) for file in inputs},
        "libraries": libraries,
        **(extra or {}),
    }


def read_manifest(path: Path, kind: str) -> dict[str, Any] | None:
    """Read the manifest of a records file; None where there is none (a file of the user's own)."""
    file = manifest_path(path)
    if not codec.refuse_odd_file(file, "read"):
        return None
    manifest = codec.read_json(file, dict[str, Any])
    if manifest.get("schema") != f"drllm.{kind}":
        raise RecordError(
            f"{file} says {manifest.get('schema')!r}; expected 'drllm.{kind}'. Is it the right "
            f"file?"
        )
    try:
        msgspec.convert(manifest, _Manifest)
    except msgspec.ValidationError as error:
        raise RecordError(
            f"{file}: {codec.describe_invalid(error)}; make {path.name} again"
        ) from error
    return manifest


def read_records(path: Path, kind: type[T], schema: str) -> list[T]:
    """Read and check a whole records file, of the schema (`search`, …) that its manifest says."""
    manifest = read_manifest(path, schema)
    records: list[T] = []
    seen: dict[tuple[str, str], int] = {}
    for line, record in codec.read_json_lines(path, kind):
        earlier = seen.setdefault((record.task, record.id), line)
        if earlier != line:
            raise RecordError(
                f"{path}, line {line}: question {record.id!r} of task {record.task!r} is in line "
                f"{earlier} already; keep one of them"
            )
        records.append(record)
    if manifest is not None and manifest.get("sha256") != codec.sha256(path):
        raise RecordError(
            f"{path} was changed or cut off after it was written (its manifest has another hash); "
            f"make it again, or delete {manifest_path(path).name} to use it as a file of your own"
        )
    return records


def to_lines(records: Iterable[Any]) -> str:
    """Write records as the text of a JSON lines file."""
    return b"".join(codec.encode(record) + b"\n" for record in records).decode()


def write_or_remove(path: Path, records: Sequence[Any]) -> None:
    """Write records as a JSON lines file without a manifest; where there are none, remove it."""
    if records:
        codec.write_atomically(path, to_lines(records))
    elif path.is_file():
        path.unlink()


def write_records(path: Path, records: Iterable[Any], manifest: Mapping[str, Any]) -> None:
    """Write a whole records file and its manifest, which gets their number and the file's hash."""
    text = to_lines(records)
    about = manifest_path(path)
    codec.refuse_odd_file(path, "write")
    if codec.refuse_odd_file(about, "write"):
        try:
            about.unlink()  # never a new file with an old manifest
        except OSError as error:
            raise RecordError(f"can't write {about}: {error.strerror}") from error
    codec.write_atomically(path, text)
    codec.write_json(
        about, {**manifest, "num_records": text.count("\n"), "sha256": codec.sha256(path)}
    )
