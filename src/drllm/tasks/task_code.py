"""Finds out whether a task file of lm-evaluation-harness can run code, without running any.

The harness imports the Python that `!function` names, loads data sets by a script of Python, and
renders Jinja templates without a sandbox, from which names with two underscores lead to all of
Python. A file may include others, and the file of a group names files of its folder.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from drllm.errors import TaskError

FLAG = "--trust-task-code"
_CODE = {
    "!function": re.compile(r"!function\b"),
    "a Python script": re.compile(r"^\s*dataset_path\s*:.*\.py\b", re.MULTILINE),
    "trust_remote_code": re.compile(r"\btrust_remote_code\b"),
    "names such as __class__": re.compile(r"__\w+__"),
}
"""What a file has that can run code, in words and as a pattern."""
_INCLUDE = re.compile(r"^include\s*:\s*['\"]?([^'\"\s#]+)", re.MULTILINE)


def refuse_code(file: Path) -> None:
    """Raise a TaskError if a task file, or one that belongs to it, can run code.

    A file that doesn't exist isn't refused here.
    """
    for path in _list_files(file):
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in _CODE.items():
            if pattern.search(text):
                raise TaskError(
                    f"{file} can run code on this machine, since {path} has {what}; read its "
                    f"folder, then give {FLAG} (in Python: get_task(..., trust_code=True))"
                )


def _list_files(file: Path) -> Iterator[Path]:
    """Yield a task file, all task files in its folder, and what they include."""
    if not file.is_file():
        return
    waiting = [file, *sorted(file.parent.rglob("*.y*ml"))]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop(0)
        place = path.resolve()
        if place in seen or not path.is_file():
            continue
        seen.add(place)
        yield path
        text = path.read_text(encoding="utf-8", errors="replace")
        waiting += [path.parent / name for name in _INCLUDE.findall(text)]
