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


def kill(work: Callable[[Path, At], None], folder: Path, moment: int) -> None:
    """Do some work in a child on one thread, which kills itself at a moment."""
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        work(folder, kill_at(moment))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended before its moment"


def kill_and_go_on(work: Callable[[Path, At], None], folder: Path, kills: str) -> None:
    """Do some work unbroken, then so many times killed at another moment and gone on with.

    Since it forks, this needs a process of its own. The folder gets `unbroken/`, and one folder for
    each kill (`all`: at every moment), named after its moment.
    """
    torch.set_num_threads(1)
    moments: list[int] = []
    work(folder / "unbroken", moments.append)
    number = len(moments) if kills == "all" else int(kills)
    for moment in random.Random(0).sample(moments, number):
        kill(work, folder / str(moment), moment)
        work(folder / str(moment), lambda count: None)


def run_script(script: str, *arguments: object) -> None:
    """Run a script that lies here in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(drllm.__file__).parents[1])}
    words = [sys.executable, Path(__file__).with_name(script), *map(str, arguments)]
    subprocess.run(words, env=environment, check=True, timeout=300)


def kills_that_changed_nothing(folder: Path, num_files: int, name: str = "*") -> int:
    """Count kills; the files of a name must have ended as those of the unbroken work did."""
    found = {each.name: files_of(each, name) for each in folder.iterdir()}
    unbroken = found.pop("unbroken")
    assert len(unbroken) == num_files
    for moment, files in found.items():
        assert files == unbroken, f"killed at {moment}"
    return len(found)
