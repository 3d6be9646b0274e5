"""Work that is killed at random moments and gone on with; for scripts in processes of their own."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch

At: TypeAlias = Callable[[int], None]
"""Called with a count at each moment at which a kill may come."""


def kill_at(moment: int) -> At:
    """Return what kills its own process at a moment."""

    def at(count: int) -> None:
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def kill_and_go_on(work: Callable[[Path, At], None], folder: Path, kills: int) -> None:
    """Do some work unbroken, then so many times killed at another moment and gone on with.

    Since it forks, this needs a process of its own: each child, on one thread, kills itself at its
    moment. The folder gets `unbroken/`, and one folder for each kill, named after its moment.
    """
    torch.set_num_threads(1)
    moments: list[int] = []
    work(folder / "unbroken", moments.append)
    for moment in random.Random(0).sample(moments, kills):
        child = os.fork()
        if child == 0:
            work(folder / str(moment), kill_at(moment))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended before its moment"
        work(folder / str(moment), lambda count: None)
