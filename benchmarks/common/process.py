"""Benchmarks that run other programs, each as a process with a limit of time and a log."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DONE = "done"
"""How a program ended that came to its end without an error."""


def run_python(arguments: Sequence[str], log: Path, seconds: float) -> str:
    """Run Python within some seconds, with its output in a log, and say how it ended.

    Returns:
        `DONE`, `out of time`, or `failed` with the place of the log.
    """
    command = [sys.executable, *arguments]
    with log.open("w", encoding="utf-8") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "out of time"
    return DONE if done.returncode == 0 else f"failed, see {log}"
