"""One search at a time in a folder.

Owns the lock file. The operating system gives the lock back when its process ends, however it
ends, so that a killed search blocks nobody. Loads no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from drllm.errors import RecordError

LOCK_FILE = ".search.lock"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only search that writes to a folder while the block runs.

    Args:
        folder: Where to; made if need be.

    Raises:
        RecordError: Another search is writing there, or the folder can't be written.
    """
    path = folder / LOCK_FILE
    lock = FileLock(path, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RecordError(
            f"another search is writing to {folder}; wait until it ends, or choose another "
            f"--output-dir"
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
