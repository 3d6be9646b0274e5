"""What the verbs with questions share: the flag `--columns`, and the lines on splits."""

from collections.abc import Sequence

from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag
from drllm.tasks.base import Task
from drllm.tasks.files import FIELDS
from drllm.tasks.registry import TASKS

COLUMNS = Flag(
    "columns",
    f"columns of other names in a file or hub set, such as question=ticket,answer=team; the fields "
    f"are {', '.join(FIELDS)}; grader=exact grades answers by their text",
    placeholder="FIELD=COLUMN,...",
)


def print_splits(tasks: Sequence[Task], terminal: Terminal) -> None:
    """Print how the questions of files and of the harness' tasks are divided into splits."""
    for task in tasks:
        if task.name not in TASKS:
            terminal.say(task.describe_splits())
