"""One writer at a time in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from drllm.errors import RecordError


@contextlib.contextmanager
def only_writer(folder: Path, stage: str, flag: str) -> Iterator[None]:
    """Be the only run of a stage that writes to a folder, made if need be, while the block runs.

    Where another is writing, it is refused, naming the `flag` by which another folder is chosen.
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
        raise RecordError(
            f"can't write {path}: {error.strerror}; choose a folder that you may write to"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
            path.unlink(missing_ok=True)  # while it is held: whoever waited sees that it is gone
        lock.release()
