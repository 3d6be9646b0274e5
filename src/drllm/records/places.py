"""Where results may be written, which is checked before anything is made; one writer at a time."""

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
    """Refuse a file that can't be written, or that is what another stage has written.

    The latter is a manifest, a file of a run or of routers, or a record of another kind, by its
    manifest, than the schema (`supervision`) that may be replaced.
    """
    check_folder(file.parent, flag)
    try:
        if not refuse_odd_file(file, "write"):
            return
    except RecordError as error:
        raise ConfigError(f"{flag}: {error}") from error
    is_ours = file.name in _NAMES or file.name.endswith(_ENDINGS)
    with suppress(RecordError):  # what can't be read isn't ours
        place = file if file.suffix == ".json" else manifest_path(file)
        held = str(read_json(place, dict[str, Any]).get("schema"))
        is_ours |= held.startswith("drllm.") and held != f"drllm.{schema}"
    if is_ours:
        raise ConfigError(f"{flag} is {file}, which another stage has written; give another file")


def stage_folder(given: Path | str | None, stack: ExitStack) -> Path:
    """Return the folder that a stage writes to, a temporary one where nothing is to stay.

    Of several processes of one stage the first one's stays.
    """
    return Path((given if is_first() else None) or stack.enter_context(TemporaryDirectory()))


@contextmanager
def only_writer(folder: Path, stage: str, flag: str) -> Iterator[None]:
    """Be the only run of a stage that writes to a folder, made if need be, while the block runs.

    The lock goes with the process, however that ends, so a killed run blocks nobody.
    """
    path = folder / f".{stage}.lock"
    lock = FileLock(path, timeout=0)
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
            path.unlink(missing_ok=True)  # while it is held: whoever waited sees that it is gone
        lock.release()
