"""Checks where a stage may write before it starts, and lets only one run write to a folder."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from drllm.errors import ConfigError, RecordError
from drllm.processes import is_first
from drllm.records.codec import read_json, refuse_special_file
from drllm.records.manifest import manifest_path

_NAMES = ("run.yaml", "router_config.json", "routers.safetensors", "metrics.jsonl", "report.html")
_ENDINGS = (".manifest.json", ".failed.jsonl", ".rejected.jsonl")
"""Names and endings of files that `check_file` never lets a stage replace."""


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that can't be written, without making it."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not is_first() or (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        return
    reason = f": no permission in {place}" if place.is_dir() else f", since {place} is a file"
    raise ConfigError(
        f"{flag}: can't write to {folder}{reason}; give a folder that you may write to"
    )


def check_file(file: Path, flag: str, schema: str = "") -> None:
    """Refuse a file that can't be written, or that another stage has written.

    Args:
        file: The file to write.
        flag: The flag that names the file.
        schema: Records of this kind ("supervision") may be replaced.
    """
    check_folder(file.parent, flag)
    try:
        exists = refuse_special_file(file, "write")
    except RecordError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if exists and _is_of_another_stage(file, schema):
        raise ConfigError(f"{flag} is {file}, which another stage has written; give another file")


def _is_of_another_stage(file: Path, schema: str) -> bool:
    """Tell whether a file is a manifest, or was written by another stage.

    A records file whose manifest names the schema may be replaced.
    """
    if file.name in _NAMES or file.name.endswith(_ENDINGS):
        return True
    manifest = file if file.suffix == ".json" else manifest_path(file)
    try:
        stored_schema = str(read_json(manifest, dict[str, Any]).get("schema"))
    except RecordError:  # not written by drllm
        return False
    return stored_schema.startswith("drllm.") and stored_schema != f"drllm.{schema}"


def stage_folder(output: Path | str | None, stack: ExitStack) -> Path:
    """Return the folder that a stage writes to; without an output, make a temporary folder.

    If several processes run the stage, all but the first get temporary folders.
    """
    if output and is_first():
        return Path(output)
    return Path(stack.enter_context(TemporaryDirectory()))


@contextmanager
def only_writer(folder: Path, stage: str, flag: str) -> Iterator[None]:
    """Lock a folder against other runs of a stage while the block runs; create the folder.

    The lock ends with the process, so a killed run blocks nobody. A new folder that is still empty
    at the end is deleted.
    """
    path = folder / f".{stage}.lock"
    lock = FileLock(path, timeout=0)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RecordError(
            f"another {stage} is writing to {folder}; wait until it ends, or choose another {flag}"
        ) from None
    except OSError as error:
        raise RecordError(f"can't write {path}: {error.strerror}; choose another folder") from error
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows keeps a file that is open
            path.unlink(missing_ok=True)  # before the release, so that no other run takes this file
        lock.release()
        if is_new:
            with suppress(OSError):  # it isn't empty: the stage wrote something
                folder.rmdir()
