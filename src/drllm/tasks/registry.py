"""Looks up tasks by name: our own tasks and their groups, question files, and the harness' tasks.

"The harness" is lm-evaluation-harness.
"""

import functools
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from drllm.errors import TaskError, unknown_name
from drllm.registry import Registry
from drllm.tasks.base import Task
from drllm.tasks.files import (
    is_source,
    load_source,
    name_source,
    refuse_other_formats,
    refuse_wrong_file_name,
)
from drllm.tasks.harness import LmEvalTask, name_harness_task

TASKS: Registry[Task] = Registry(
    "task", ["drllm.tasks.published.*", "drllm.tasks.builtin"], error=TaskError
)
"""All tasks of our own, by name. A look-up imports all modules in `tasks/published`."""

_lm_eval_task = functools.lru_cache(maxsize=8)(LmEvalTask)

TaskOrClass = TypeVar("TaskOrClass", Task, type[Task])


def register(task: TaskOrClass) -> TaskOrClass:
    """Register a task under its name. If this decorates a class, register an instance."""
    instance = task() if isinstance(task, type) else task
    TASKS.register(instance.name)(instance)
    return task


def groups() -> dict[str, tuple[str, ...]]:
    """Return the groups: the name of a group → the names of the tasks that it stands for."""
    members: dict[str, tuple[str, ...]] = {}
    for name in TASKS:
        group = TASKS.get(name).group
        if group:
            members[group] = (*members.get(group, ()), name)
    return members


def task_names() -> list[str]:
    """Return the names of all tasks and groups, sorted."""
    return sorted({*TASKS, *groups()})


def is_task_name(name: str) -> bool:
    """Tell whether a name stands for a task, a group, an alias, a question file or a hub set."""
    return is_source(name) or _resolve_alias(name) in task_names()


def get_task(name: str, *, trust_code: bool = False) -> Task:
    """Return a task by name: a task of ours, a question file, a hub set, or a task of the harness.

    The harness' tasks are available if lm-evaluation-harness is installed. A `.yaml` file is a task
    file of the harness.

    Args:
        name: The name, or the file.
        trust_code: Whether a task file may run code: Python that it names, or a template, since the
            harness renders templates without a sandbox.

    Raises:
        TaskError: The name is unknown (the message suggests the nearest name) or stands for a
            group; a file is missing or has another format; or a task file isn't trusted.
    """
    refuse_other_formats(name)
    own_name = _resolve_alias(name)
    if own_name in TASKS:
        return TASKS.get(own_name)
    members = groups().get(name)
    if members:
        raise TaskError(f"{name!r} stands for {', '.join(members)}; name one of them")
    refuse_wrong_file_name(name)
    if is_source(name):
        return load_source(name, tuple(task_names()))
    if find_spec("lm_eval") is None:
        raise TaskError(unknown_name("task", name, task_names()) + ", or a .jsonl file")
    if name.endswith(".yaml") and Path(name).is_file() and not trust_code:
        raise TaskError(
            f"{name}: a task file of lm-evaluation-harness can run code on this machine, by "
            f"!function, a metric or a template; read it and its folder, then give "
            f"--trust-task-code (in Python: get_task(..., trust_code=True))"
        )
    return _lm_eval_task(name, tuple(task_names()))


def get_tasks(names: str, *, trust_code: bool = False) -> list[Task]:
    """Return the tasks of a comma list, in order. The tasks of a group replace its name.

    Args:
        names: The names, as for `get_task`.
        trust_code: As for `get_task`.
    """
    counts: Counter[str] = Counter()
    for part in names.split(","):
        name = _resolve_alias(part.strip())
        if name:
            members = groups().get(name, (name,))
            counts.update(members)
    if not counts:
        raise TaskError(f"no task is named in {names!r}. Valid: {', '.join(task_names())}")
    for name, count in counts.items():
        if count > 1:
            raise TaskError(f"task {name!r} is named twice in {names!r}; name it once")
    tasks = [get_task(name, trust_code=trust_code) for name in counts]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise TaskError(f"two tasks in {names!r} have the name {name!r}; rename a file")
    return tasks


def find_place(names: str, task: str) -> str:
    """Return how a comma list names a task: as a file, as a hub set, or by its name.

    Args:
        names: The names, as for `get_tasks`. The files aren't read.
        task: The name of the task, which for a file is the file's stem.
    """
    for part in names.split(","):
        place = part.strip()
        if is_source(place) and name_source(place, task_names()) == task:
            return place
        if place.endswith(".yaml") and name_harness_task(place) == task:
            return place
    return task


def describe_tasks() -> list[tuple[str, str, str]]:
    """Return the name, rewards (the default first) and description of all tasks and groups."""
    descriptions: list[tuple[str, str, str]] = []
    for name in TASKS:
        task = TASKS.get(name)
        descriptions.append((task.name, ", ".join(task.rewards), task.description))
    for group, members in groups().items():
        rewards = ", ".join(TASKS.get(members[0]).rewards)
        descriptions.append((group, rewards, f"stands for {', '.join(members)}"))
    return sorted(descriptions)


def _resolve_alias(name: str) -> str:
    """Return the name of the task that an alias stands for; return another name unchanged."""
    for task_name in TASKS:
        if name in TASKS.get(task_name).aliases:
            return task_name
    return name
