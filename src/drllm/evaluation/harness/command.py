"""`drllm lm-eval …`: lm-evaluation-harness' own command line, with our model registered.

Owns handing the words over, and one line for what users most often get wrong. All words are the
harness' to read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import datasets
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

import drllm.evaluation.harness.model  # noqa: F401 (registers our model)
from drllm.errors import TaskError, unknown_name

UNREACHED = (ConnectionError, datasets.exceptions.DatasetNotFoundError)
"""What fetching a set from the hub ends with: no network, or no such set for this user."""


def run(words: Sequence[str]) -> None:
    """Carry out a command line of the harness.

    Args:
        words: What stands behind `drllm lm-eval`.

    Raises:
        TaskError: A task that there isn't, or whose questions can't be fetched.
        DrllmError: What our model refuses.
        SystemExit: After the harness' own messages.
    """
    with _command_line(["drllm lm-eval", *words]):
        try:
            cli_evaluate()
        except ValueError as error:
            missing = re.fullmatch(r"Tasks not found: (.*)", str(error))
            if missing is None:
                raise
            name = missing[1].split(", ")[0]
            known = TaskManager().all_tasks
            raise TaskError(_nearest(name, known)) from error
        except UNREACHED as error:
            cause = " ".join(str(error).split())
            raise TaskError(
                f"the questions of a task can't be fetched from the hub ({cause}); connect or log "
                f"in (hf auth login)"
            ) from error


def _nearest(name: str, known: Sequence[str]) -> str:
    """Say which task was meant; the harness has thousands, so not which there are."""
    said = unknown_name("task", name, known).split(" Valid: ")[0].rstrip(".")
    return f"{said}; 'drllm lm-eval ls tasks' lists all, --include_path FOLDER adds your own"


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Let the process' command line be another one inside the block."""
    before = sys.argv
    sys.argv = words
    try:
        yield
    finally:
        sys.argv = before
