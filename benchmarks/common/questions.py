"""All questions of a set, whatever a search or a test would use them for."""

from __future__ import annotations

from pathlib import Path

from drllm.tasks.base import NoSplitError, Task
from drllm.tasks.examples import Example

SPLITS = ("search", "fit", "select", "test")


def read_all_examples(task: Task, data_dir: Path | str | None) -> list[Example]:
    """Return the questions of all splits that a task has, each text once."""
    examples: dict[str, Example] = {}
    for split in SPLITS:
        try:
            found = task.examples(split, data_dir)
        except NoSplitError:
            continue
        for example in found:
            examples.setdefault(example.question, example)
    return list(examples.values())
