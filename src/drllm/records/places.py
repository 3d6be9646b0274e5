"""Checks where results may be written, before anything is made, and lets only one run write."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from drllm.errors import ConfigError, RecordError
from drllm.processes import is_first
from drllm.records.codec import read_json, refuse_odd_file
from drllm.records.manifest import manifest_path

_NAMES = ("run.yaml", "router_config.json", "routers.safetensors", "metrics.jsonl", "report.html")
_ENDINGS = (".manifest.json", ".failed.jsonl", ".rejected.jsonl")


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that can't be written; nothing is made yet."""
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
        flag: The flag that names it.
        schema: The kind of record that may be replaced ("supervision").
    """
    check_folder(file.parent, flag)
    try:
        exists = refuse_odd_file(file, "write")
    except RecordError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if exists and _is_of_another_stage(file, schema):
        raise ConfigError(f"{flag} is {file}, which another stage has written; give another file")


def _is_of_another_stage(file: Path, schema: str) -> bool:
    """Return whether a file is a manifest, part of a run or of routers, or a record of drllm.

    Records of the schema, by their manifest, don't count.
    """
    if file.name in _NAMES or file.name.endswith(_ENDINGS):
        return True
    manifest = file if file.suffix == ".json" else manifest_path(file)
    try:
        found = str(read_json(manifest, dict[str, Any]).get("schema"))
    except RecordError:  # not written by drllm
        return False
    return found.startswith("drllm.") and found != f"drllm.{schema}"


def stage_folder(output: Path | str | None, stack: ExitStack) -> Path:
    """Return the folder that a stage writes to; a temporary one without an output.

    Where several processes run one stage, the others than the first have temporary folders.
    """
    if output and is_first():
        return Path(output)
    return Path(stack.enter_context(TemporaryDirectory()))


@contextmanager
def only_writer(folder: Path, stage: str, flag: str) -> Iterator[None]:
    """Let no other run of a stage write to a folder while the block runs; create the folder.

    The lock ends with the process, however that ends, so a killed run blocks nobody. A new folder
    to which nothing was written is deleted.
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
