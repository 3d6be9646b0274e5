"""Write drllm's tasks as a task folder that lm-evaluation-harness ("the harness") reads.

    FOLDER/NAME.yaml                  a leaf or a group
    FOLDER/rows/NAME-USE-HASH.jsonl   the questions (`asked`) or worked examples (`shown`) of a leaf
    FOLDER/cache/                     the cache of `datasets`

`leaves` says what leaves and groups are. The name of a rows file has a hash of its content, so that
`datasets` can't use old rows from its cache.

This module imports neither torch nor the harness.
"""

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from drllm.errors import ConfigError, TaskError, nearest_name
from drllm.evaluation.lm_eval.leaves import (
    QUESTIONS,
    WORKED_EXAMPLES,
    HarnessTask,
    Leaf,
    describe_task,
)
from drllm.records.codec import write_atomically
from drllm.tasks.base import Function, Task, name_for_harness
from drllm.tasks.published.task import PublishedTask
from drllm.tasks.registry import get_tasks, is_task_name, task_names

ROWS = "rows"  # folder of the rows files below a task folder
CACHE = "cache"  # folder for the cache of `datasets` below a task folder
SEED = 0  # seed for drawing the questions of `--limit` on the harness' command line


@dataclass
class FolderFiles:
    """The files of a task folder, before they are written.

    Attributes:
        tasks: Name of a task file → its content. Paths in it are relative to the folder.
        rows: Path of a rows file, relative to the folder → its text.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A hash of the content of all files, 16 hexadecimal digits; the same in every folder."""
        # The task files have the names of the rows files, which have hashes of the rows.
        return _digest(json.dumps(self.tasks, sort_keys=True))

    def add_leaf(self, leaf: Leaf) -> None:
        """Add the task file of a leaf, and the files of its rows."""
        row_paths = {}
        for use in (QUESTIONS, WORKED_EXAMPLES):
            if leaf.rows[use]:
                row_paths[use] = self._add_rows(f"{leaf.name}-{use}", leaf.rows[use])
        content: dict[str, Any] = {}
        if leaf.file:
            content["include"] = f"{importlib.resources.files('lm_eval')}/tasks/{leaf.file}"
        source = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": row_paths, "cache_dir": CACHE},
        }
        self.tasks[f"{leaf.name}.yaml"] = {**content, **leaf.make_settings(source)}

    def add_group(self, group: HarnessTask) -> None:
        """Add the task file of a group. Its metric is the mean over all questions of its leaves."""
        self.tasks[f"{group.harness_name}.yaml"] = {
            "group": group.harness_name,
            "task": list(group.leaves),
            "aggregate_metric_list": [{"metric": group.metric, "weight_by_size": True}],
            "metadata": {"version": 1},
        }

    def _add_rows(self, name: str, rows: Sequence[Any]) -> str:
        """Add a rows file; return its path relative to the folder."""
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        path = f"{ROWS}/{name}-{_digest(text)}.jsonl"
        self.rows[path] = text
        return path

    def write(self, folder: Path) -> None:
        """Write the files into a folder. Other files stay, and a rows file that didn't change."""
        folder = folder.resolve()
        for name, text in self.rows.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != text.encode():
                write_atomically(path, text)
        for name, content in self.tasks.items():
            absolute = _make_absolute(content, folder)
            text = yaml.dump(
                absolute, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
            )
            write_atomically(folder / name, text)


def _make_absolute(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the content of a task file with absolute paths of its rows and its cache."""
    dataset = content.get("dataset_kwargs")
    if dataset is None:  # a group
        return content
    row_paths = {use: str(folder / path) for use, path in dataset["data_files"].items()}
    absolute_paths = {"data_files": row_paths, "cache_dir": str(folder / CACHE)}
    return {**content, "dataset_kwargs": absolute_paths}


def make_task_folder(
    tasks: Sequence[Task],
    *,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | str | None,
    num_fewshot: int | None = None,
) -> tuple[list[HarnessTask], FolderFiles]:
    """Describe tasks to the harness, and make their files without writing them.

    The same arguments and questions give exactly the same files.

    Args:
        tasks: The tasks.
        split: The split of their questions.
        limit: Maximum number of questions of each task, drawn with the seed; None takes all.
        seed: Seed of the drawing.
        data_dir: The folder of published data sets; None reads them from the hub.
        num_fewshot: Worked examples before each question; None takes each task's own number.

    Raises:
        ConfigError: `num_fewshot` is negative.
        TaskError: Two tasks have the same name for the harness, a task has no questions or too few
            worked examples, or a file can't be read.
    """
    names = [name_for_harness(task.name) for task in tasks]
    files = FolderFiles()
    harness_tasks = []
    for task, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise TaskError(
                f"task {task.name!r} is given twice, or two tasks are called {name!r} in the "
                f"harness; give one of them"
            )
        harness_task, leaves = describe_task(
            task, split=split, limit=limit, seed=seed, data_dir=data_dir, num_fewshot=num_fewshot
        )
        for leaf in leaves:
            files.add_leaf(leaf)
        if harness_task.is_group:
            files.add_group(harness_task)
        harness_tasks.append(harness_task)
    return harness_tasks, files


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Dumper(yaml.SafeDumper):
    """Writes a task file, with functions in the harness' notation."""


_Dumper.add_representer(
    Function, lambda dumper, name: dumper.represent_scalar("!function", str(name))
)


def make_own_task_folder(
    names: Sequence[str],
    *,
    split: str,
    limit: float | None,
    data_dir: str | None,
    num_fewshot: int | None,
    num_processes: int,
) -> tuple[list[HarnessTask], FolderFiles]:
    """Make the task folder for the tasks that a command of the harness names by `--tasks`.

    Args:
        names: The names of the tasks, which must be drllm's.
        split: The split of their questions.
        limit: The value of `--limit`, a whole number here.
        data_dir: The folder of published data sets; None reads them from the hub.
        num_fewshot: Worked examples before each question; None takes each task's own number.
        num_processes: How many processes share the questions of each task.

    Raises:
        ConfigError: A task is the harness' own, `data_dir` has no effect, or `limit` isn't a whole
            number from 1.
        TaskError: A leaf has fewer questions than there are processes.
    """
    _refuse_harness_tasks(names)
    tasks = get_tasks(",".join(names))
    if data_dir is not None and not any(isinstance(task, PublishedTask) for task in tasks):
        raise ConfigError(
            f"--data_dir {data_dir} has no effect: {', '.join(names)} has its own questions; leave "
            f"it out, and give --split"
        )
    harness_tasks, files = make_task_folder(
        tasks,
        split=split,
        limit=_check_limit(limit),
        seed=SEED,
        data_dir=data_dir,
        num_fewshot=num_fewshot,
    )
    for task in harness_tasks:
        for leaf, num_questions in task.leaves.items():
            if num_questions < num_processes:  # the harness would crash
                raise TaskError(
                    f"task {leaf!r} has {num_questions} questions for {num_processes} processes, "
                    f"and every process needs a question; give a higher --limit, or start fewer "
                    f"processes"
                )
    return harness_tasks, files


def _refuse_harness_tasks(names: Sequence[str]) -> None:
    """Refuse the names of tasks that drllm doesn't have."""
    for name in names:
        if not is_task_name(name):
            message = nearest_name("task of drllm", name, task_names())
            raise ConfigError(
                f"--data_dir and --split have no effect on the harness' own tasks: {message}; "
                f"'drllm ls tasks' lists drllm's tasks; leave both flags out, or name drllm's "
                f"tasks in a command of their own"
            )


def _check_limit(limit: float | None) -> int | None:
    """Return the value of `--limit` as a number of questions; the harness also accepts shares."""
    if limit is None:
        return None
    if limit < 1 or limit != int(limit):
        raise ConfigError(
            f"--limit is {limit:g}; with --data_dir or --split it is the number of questions of "
            f"each task; give a whole number from 1"
        )
    return int(limit)
