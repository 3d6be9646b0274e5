"""Which of the tasks that are given to the harness are ours, and where their folder stands.

Owns telling our names from the harness' own, refusing those that could mean either, and the place
of the folder. Leaves what is in the folder to `folders`, and the words to the command line. Loads
no torch, and the harness only to look up names of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import ConfigError, TaskError, unknown_name
from drllm.evaluation.lm_eval.folders import HarnessTask, task_folder
from drllm.evaluation.lm_eval.task_files import FolderFiles
from drllm.tasks.base import GROUPS, PUBLISHED_NAMES, TASKS, Task, get_tasks
from drllm.tasks.published import PublishedTask

SEED = 0
"""Of drawing `--limit` questions."""


@dataclass(frozen=True)
class OwnTasks:
    """Our tasks among those of a command line.

    Attributes:
        tasks: Ours, in order.
        files: The files of their folder.
        names: All tasks for the harness' `--tasks`, in the order given.
    """

    tasks: list[HarnessTask]
    files: FolderFiles
    names: list[str]


def is_ours(name: str) -> bool:
    """Return whether a name is a task or group of ours, or a file of questions.

    Example:
        >>> is_ours("arc"), is_ours("mine.jsonl"), is_ours("lambada_openai")
        (True, True, False)
    """
    return name in {**TASKS, **GROUPS, **PUBLISHED_NAMES} or name.endswith((".jsonl", ".jsonl.gz"))


def own_tasks(
    names: Sequence[str],
    *,
    split: str,
    limit: float | None,
    data_dir: str | None,
    num_fewshot: int | None,
    max_length: int | None,
    include_path: str | None,
    num_processes: int,
) -> OwnTasks:
    """Return the tasks of a command line of which some are ours.

    Args:
        names: What stands in `--tasks`.
        split: See `folders.task_folder`, as for `num_fewshot` and `max_length`.
        limit: The harness' `--limit`: most questions a task of ours, drawn with `SEED`.
        data_dir: Folder of task data; None asks the hub.
        num_fewshot: Worked examples before each question; None leaves it to each task.
        max_length: Most tokens that the model reads and writes in all, where that is known.
        include_path: A folder with tasks of the user's own.
        num_processes: Processes that share the questions of a task.

    Raises:
        ConfigError: None of the names is ours, a `data_dir` that none of them reads, or a limit
            that isn't a whole number.
        TaskError: A name that is unknown or could mean two tasks, or see `folders.task_folder`.
    """
    ours = [name for name in names if is_ours(name)]
    others = [name for name in names if not is_ours(name)]
    if not ours:
        _check_unknown(others)
        raise ConfigError(
            f"--data_dir and --split have no effect: {', '.join(others) or 'no task'} is none of "
            f"drllm's tasks ('drllm ls tasks' lists them); leave them out"
        )
    tasks = get_tasks(",".join(ours))
    if data_dir is not None and not any(isinstance(task, PublishedTask) for task in tasks):
        raise ConfigError(
            f"--data_dir {data_dir} has no effect: {', '.join(ours)} brings its own questions; "
            f"leave it out, and give --split"
        )
    found, files = task_folder(
        tasks,
        split=split,
        limit=_whole(limit),
        seed=SEED,
        data_dir=None if data_dir is None else Path(data_dir),
        num_fewshot=num_fewshot,
        max_length=max_length,
    )
    _check_enough(files, num_processes)
    if others or include_path is not None:
        taken = {*files.num_questions, *(task.harness_name for task in found)}
        _check_others(others, taken, include_path)
    return OwnTasks(found, files, _in_order(names, tasks, found))


@contextmanager
def placed(files: FolderFiles, below: Path | None) -> Iterator[Path]:
    """Write a task folder, and remove it behind the block unless it was given a place.

    Args:
        files: What is in it.
        below: Where to keep it, in a folder named by its content; None keeps nothing.

    Yields:
        The folder.

    Raises:
        RecordError: A place that can't be written.
    """
    if below is not None:
        files.write(below / files.key)
        yield below / files.key
        return
    with tempfile.TemporaryDirectory(prefix="drllm-tasks-") as folder:
        files.write(Path(folder))
        yield Path(folder)


def _whole(limit: float | None) -> int | None:
    if limit is not None and (limit < 1 or limit != int(limit)):
        raise ConfigError(
            f"--limit is {limit:g}; with --data_dir or --split it is a number of questions a task: "
            f"give a whole number from 1"
        )
    return None if limit is None else int(limit)


def _check_enough(files: FolderFiles, num_processes: int) -> None:
    """Refuse what ends the harness: a process without a question of some task."""
    for name, number in files.num_questions.items():
        if number < num_processes:
            raise TaskError(
                f"task {name!r} has {number} questions for {num_processes} processes, and the "
                f"harness wants one for each; give a higher --limit, or start fewer processes"
            )


def _in_order(
    names: Sequence[str], tasks: Sequence[Task], found: Sequence[HarnessTask]
) -> list[str]:
    """Return the names for the harness: ours as they are called in the folder."""
    called = {task.name: each.harness_name for task, each in zip(tasks, found, strict=True)}
    ordered: list[str] = []
    for name in names:
        if is_ours(name):
            ordered += [called[task.name] for task in get_tasks(name)]
        else:
            ordered.append(name)
    return ordered


# --- the harness' own tasks beside ours ----------------------------------------------------------


def _manager(include_path: str | None) -> Any:
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager(include_path=include_path)


def _check_unknown(names: Sequence[str]) -> None:
    """Refuse a name that is nobody's, where it resembles one of ours."""
    for name in names:
        said = unknown_name("task", name, {**TASKS, **GROUPS})
        if "did you mean" in said and name not in _manager(None).all_tasks:
            raise TaskError(f"{said}, or a .jsonl file; 'drllm lm-eval ls tasks' lists the others")


def _check_others(others: Sequence[str], taken: set[str], include_path: str | None) -> None:
    """Refuse names beside ours that are unknown, or that hold a task of the same name as ours."""
    manager = _manager(include_path)
    index = manager.task_index
    for name in others:
        if name.endswith(".yaml") or Path(name).is_dir():
            raise TaskError(
                f"{name} stands beside drllm's tasks; give its folder as --include_path and the "
                f"task by its name"
            )
        held = {part for match in manager.match_tasks([name]) for part in _held(match, index)}
        if not held:
            said = unknown_name("task", name, {*TASKS, *GROUPS, *index}).split(" Valid: ")[0]
            raise TaskError(
                f"{said.rstrip('.')}; 'drllm ls tasks' and 'drllm lm-eval ls tasks' list all"
            )
        if both := sorted(held & taken):
            raise TaskError(
                f"{name!r} of the harness holds {both[0]!r}, which is drllm's task in this "
                f"command; evaluate them in two commands"
            )
    for name in sorted(taken):
        place = index[name].yaml_path if name in index else None
        if include_path and place and Path(include_path).resolve() in place.resolve().parents:
            raise TaskError(
                f"task {name!r} is drllm's and stands in --include_path {include_path} too; rename "
                f"that one, or leave --include_path out"
            )


def _held(name: str, index: Any) -> set[str]:
    """Return a name of the harness and all that it stands for."""
    found: set[str] = set()
    pending = [name]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        if name not in index:
            continue
        entry = index[name]
        if entry.kind.name == "TAG":
            pending += entry.tags
        elif entry.kind.name == "GROUP":
            pending += _parts(entry.cfg["task"])
    return found


def _parts(listed: Any) -> Iterator[str]:
    """Yield the names in a group's `task`: a name, a task that is changed, or a group in it."""
    if isinstance(listed, str):
        yield listed
    elif isinstance(listed, dict):
        yield from _parts(listed.get("task", []))
    else:
        for each in listed:
            yield from _parts(each)
