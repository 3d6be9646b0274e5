"""Finds the names of lm-evaluation-harness' tasks in its files, without importing the harness.

The harness takes ten seconds to read its thousands of task files. A scan of their texts takes less
than one second, and is enough to refuse a name that can't be right.
"""

import functools
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from drllm.errors import TaskError, nearest_name

_NAME = re.compile(
    rb"^(?:task|group|tag)[ \t]*:[ \t]*['\"]?([\w.-]+)['\"]?[ \t]*\r?$", re.MULTILINE
)
"""A line of a task file that gives a task, a group or a tag its name."""


def refuse_unknown_name(name: str, other_names: Iterable[str]) -> None:
    """Raise a TaskError for a name that is in none of the harness' task files.

    A name that is in a file may still be unknown; the harness itself decides that.

    Args:
        name: The name of a task, a group or a tag.
        other_names: Names that aren't the harness', for the suggestion.
    """
    # Not a part of a longer name, such as `arc_eas` of `arc_easy`.
    word = name.encode(errors="surrogatepass")  # a word of the command line may be no UTF-8 text
    pattern = re.compile(rb"(?<![\w-])" + re.escape(word) + rb"(?![\w-])")
    names = set(other_names)
    for content in _read_task_files():
        if word in content and pattern.search(content):  # the first test is quick
            return
        names.update(match.decode() for match in _NAME.findall(content))
    raise TaskError(explain_unknown_name(name, names))


def explain_unknown_name(name: str, names: Iterable[str]) -> str:
    """Return the message for an unknown name; `names` are all valid ones."""
    message = nearest_name("task", name, names)
    if not message.endswith("?"):
        message += "."
    return (
        f"{message} 'drllm ls tasks' and 'drllm lm-eval ls tasks' list all tasks; for other "
        f"questions, give a .jsonl file, or OWNER/NAME of a data set on the hub"
    )


def _read_task_files() -> Iterator[bytes]:
    """Yield the contents of the harness' task files, with those that they include."""
    for folder in _find_task_folders():
        for path in _list_files(folder):
            yield Path(path).read_bytes()


@functools.cache
def _find_task_folders() -> tuple[Path, ...]:
    """Return the folders of the harness' tasks; there is one if the harness is installed."""
    spec = find_spec("lm_eval")
    if spec is None:
        return ()
    return tuple(Path(place) / "tasks" for place in spec.submodule_search_locations or ())


def _list_files(folder: str | Path) -> Iterator[str]:
    """Yield the paths of all files in a folder and its subfolders that may be task files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _list_files(entry.path)
            elif not entry.name.endswith((".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".csv")):
                yield entry.path
