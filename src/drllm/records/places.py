"""Checks where a stage may write before it starts, and lets only one run write to a folder."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from drllm.errors import ConfigError, DrllmError, RecordError
from drllm.records.codec import file_exists, read_json
from drllm.records.manifest import manifest_path

_NAMES = ("run.yaml", "router_config.json", "routers.safetensors", "metrics.jsonl", "report.html")
_ENDINGS = (".manifest.json", ".failed.jsonl", ".rejected.jsonl")
"""Files with these names or endings are never replaced by another stage; see `check_file`."""


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that can't be written, without creating it.

    If the folder doesn't exist, its nearest existing parent is checked. `flag` names the folder in
    the message.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir():
        if os.access(place, os.W_OK | os.X_OK):
            return
        reason = f": no permission in {place}"
    else:
        reason = f", since {place} is a file"
    raise ConfigError(
        f"{flag}: can't write to {folder}{reason}; give a folder that you may write to"
    )


def check_file(file: Path, flag: str, schema: str = "") -> None:
    """Refuse a file that can't be written, or that another stage has written.

    Args:
        file: The file to write.
        flag: The flag that names the file.
        schema: The kind of records that the stage writes ("supervision"). A file of these records
            may be replaced. Empty if the stage writes no records.
    """
    check_folder(file.parent, flag)
    try:
        exists = file_exists(file, "write")
    except RecordError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if exists and _is_of_another_stage(file, schema):
        raise ConfigError(f"{flag} is {file}, which another stage has written; give another file")


def check_new_folder(folder: Path) -> None:
    """Raise ConfigError if the output is a file, or a folder that isn't empty."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give the name of a folder to make")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the folder {folder} isn't empty; give the name of a new folder")


@contextmanager
def create_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder. If the block succeeds, the folder becomes the output folder.

    Raises RecordError if a file or folder can't be written. Then nothing is left.
    """
    place = resolve(output)
    folder = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if place.is_dir():
            place.rmdir()
        folder.rename(place)
    except DrllmError:  # some of its subclasses are OSErrors too
        raise
    except OSError as error:
        raise make_output_error(output, error.strerror or str(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_output_error(output: Path, reason: str) -> RecordError:
    """Return the error of an output that can't be written."""
    return RecordError(
        f"can't write {output}: {reason}; free some space, or give a folder that you may write to"
    )


def resolve(path: Path) -> Path:
    """Return the absolute path of a file or folder, with all links followed.

    Raises RecordError if the links lead in a circle.
    """
    # Unlike Path.resolve, realpath does the same in all versions of Python: it stops at a circle.
    place = Path(os.path.realpath(path))
    if any(part.is_symlink() for part in (place, *place.parents)):
        raise RecordError(
            f"can't follow {path}: its symbolic links lead in a circle; give the place itself"
        )
    return place


def choose_file(place: Path, name: str) -> Path:
    """Return the file to write: the file `place`, or the file `name` in the folder `place`.

    A place that doesn't exist is a folder if its name has no ending.

    Example:
        >>> choose_file(Path("data"), "answers.jsonl").as_posix()
        'data/answers.jsonl'
        >>> choose_file(Path("data/mine.jsonl"), "answers.jsonl").as_posix()
        'data/mine.jsonl'
    """
    is_folder = place.is_dir() or (not place.exists() and not place.suffix)
    return place / name if is_folder else place


def _is_of_another_stage(file: Path, schema: str) -> bool:
    """Tell whether a file is a manifest, or was written by another stage.

    The manifest of a records file says which stage wrote it; a `.json` file says so itself.
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
    """Return the folder that a stage writes to: the output, or a new temporary folder.

    A temporary folder is deleted at the end of the stack.
    """
    if output:
        return Path(output)
    return Path(stack.enter_context(TemporaryDirectory()))


@contextmanager
def only_writer(folder: Path, stage: str, flag: str) -> Iterator[None]:
    """Lock a folder against other runs of a stage while the block runs.

    The folder is created if it doesn't exist; if it is still empty at the end, it is deleted again.
    The lock ends with the process, so a killed run blocks nobody.

    Raises RecordError if another run has the lock, or if the folder can't be written. The message
    has the name of the stage ("search") and the flag that names the folder.
    """
    path = folder / f".{stage}.lock"
    lock = FileLock(path, timeout=0)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if not path.exists():
            # Another run has ended and deleted the file after this one opened it. A lock on a file
            # that is gone keeps nobody out. Newer versions of filelock see this themselves.
            lock.release()
            raise Timeout(str(path))
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
            with suppress(OSError):  # the folder isn't empty: the stage has written something
                folder.rmdir()
