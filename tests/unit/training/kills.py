"""Work that is killed at random moments and gone on with; for scripts in processes of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from small import files_of

import drllm

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


def assert_kills_change_nothing(script: str, folder: Path, kills: int, num_files: int) -> None:
    """Run a script that kills; all work it has gone on with must end as the unbroken one did."""
    environment = {**os.environ, "PYTHONPATH": str(Path(drllm.__file__).parents[1])}
    words = [sys.executable, Path(__file__).with_name(script), folder, str(kills)]
    subprocess.run(words, env=environment, check=True, timeout=300)
    found = {each.name: files_of(each) for each in folder.iterdir()}
    unbroken = found.pop("unbroken")
    assert (len(unbroken), len(found)) == (num_files, kills)
    for moment, files in found.items():
        assert files == unbroken, f"killed at {moment}"
