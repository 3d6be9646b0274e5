"""Where results may be written: what is refused before any work is done and anything is made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from drllm.errors import ConfigError, RecordError
from drllm.records.codec import read_json, refuse_odd_file
from drllm.records.manifest import manifest_path


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that can't be written; nothing is made yet.

    Raises:
        ConfigError: A part of the path is a file, or the folder isn't writable.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        reason = f", since {place} is a file"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = f": no permission in {place}"
    else:
        return
    raise ConfigError(
        f"{flag}: can't write to {folder}{reason}; give a folder that you may write to"
    )


def check_file(file: Path, flag: str, schema: str | None = None) -> None:
    """Refuse a file that can't be written, or that holds something else of ours.

    Args:
        file: The output.
        flag: Its flag, for messages.
        schema: What the output will be (`supervision`), and what it may replace; None for what
            has no manifest.

    Raises:
        ConfigError: A folder, device, FIFO or socket; a folder that can't be written; a manifest,
            or a file that is a record of another kind.
    """
    if file.is_dir():
        raise ConfigError(f"{flag} is {file}, which is a folder; give the name of a file in it")
    check_folder(file.parent, flag)
    try:
        is_there = refuse_odd_file(file, "write")
    except RecordError as error:
        raise ConfigError(f"{flag}: {error}") from error
    held = _schema_of(file) if is_there else None
    if file.name.endswith(".manifest.json") or held not in (None, f"drllm.{schema}"):
        what = f"holds {held!r}" if held else "is the name of a manifest"
        raise ConfigError(f"{flag} is {file}, which {what}; give another file")


def _schema_of(file: Path) -> Any:
    """Return what a file, or its manifest, says that it is; None where it says nothing."""
    place = file if file.suffix == ".json" else manifest_path(file)
    if not place.is_file():
        return None
    try:
        return read_json(place, dict[str, Any]).get("schema")
    except RecordError:  # not ours
        return None
