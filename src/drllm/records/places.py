"""Where results may be written: what is refused before any work is done and anything is made."""

from __future__ import annotations

import os
from pathlib import Path

from drllm.errors import ConfigError, RecordError
from drllm.records.manifest import refuse_artefact


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


def check_file(file: Path, flag: str, schema: str = "") -> None:
    """Refuse a file that can't be written; nothing is made yet.

    Args:
        file: The output.
        flag: Its flag, for messages.
        schema: What it may replace (`supervision`).

    Raises:
        ConfigError: It is no ordinary file, or what another stage has written; its folder can't
            be written.
    """
    try:
        refuse_artefact(file, schema)
    except RecordError as error:
        raise ConfigError(f"{flag}: {error}") from error
    check_folder(file.parent, flag)
