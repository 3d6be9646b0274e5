"""The manifest beside a records file: what made it, from what, and its hash.

Owns what a reader needs to trust and reproduce a file. Loads no torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from drllm.errors import RecordError
from drllm.records.codec import SCHEMA_VERSION, read_json, refuse_odd_file, sha256

LIBRARIES = ("torch", "transformers", "safetensors", "datasets", "math-verify")


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
    """Gather what a reader needs to trust and reproduce a records file.

    Args:
        schema: `search`, `supervision`, …
        model: Identity of the base model (id, revision, class, num_layers, fingerprint).
        config: The resolved settings.
        inputs: Files that were read; their hashes are stored, by name where names differ.
        extra: More keys of the stage's own.
    """
    distinct = len({file.name for file in inputs}) == len(inputs)
    return {
        "schema": f"drllm.{schema}",
        "schema_version": SCHEMA_VERSION,
        "drllm_version": importlib.metadata.version("drllm"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": dict(model),
        "config": dict(config),
        "inputs": {file.name if distinct else str(file): sha256(file) for file in inputs},
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **(extra or {}),
    }


def read_manifest(path: Path, kind: str) -> dict[str, Any] | None:
    """Read the manifest beside a records file.

    Returns:
        The manifest, or None where there is none (a file of the user's own).

    Raises:
        RecordError: A broken manifest, one of another kind of file, or a future version.
    """
    beside = manifest_path(path)
    if not refuse_odd_file(beside, "read"):
        return None
    manifest = read_json(beside, dict[str, Any])
    schema = manifest.get("schema")
    if schema != f"drllm.{kind}":
        raise RecordError(
            f"{beside} says {schema!r}; expected 'drllm.{kind}'. Is it the right file?"
        )
    version = manifest.get("schema_version")
    if not isinstance(version, int) or not isinstance(manifest.get("model"), dict):
        raise RecordError(
            f"{beside} lacks 'schema_version' (a number) or 'model' (an object); "
            f"make {path.name} again"
        )
    if version > SCHEMA_VERSION:
        raise RecordError(
            f"{beside} has schema version {version}, this drllm reads up to {SCHEMA_VERSION}; "
            f"install a newer drllm"
        )
    return manifest
