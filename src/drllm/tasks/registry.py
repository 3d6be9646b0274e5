"""All tasks by name: those of the package, groups of them, the user's files, the harness' own."""

import functools
from collections import Counter
from importlib.util import find_spec
from typing import TypeVar

from drllm.errors import TaskError, unknown_name
from drllm.registry import Registry
from drllm.tasks.base import Task
from drllm.tasks.files import is_source, task_of_source
from drllm.tasks.harness import StockTask

TASKS: Registry[Task] = Registry(
    "task", ["drllm.tasks.published.*", "drllm.tasks.builtin"], error=TaskError
)
"""Every task by name. A module of `tasks/published` is found without being named anywhere."""

_stock_task = functools.lru_cache(maxsize=8)(StockTask)

Registered = TypeVar("Registered", Task, type[Task])


def register(task: Registered) -> Registered:
    """Register a task under its name; as a decorator of a class, an instance of it."""
    made = task() if isinstance(task, type) else task
    TASKS.register(made.name)(made)
    return task


def groups() -> dict[str, tuple[str, ...]]:
    """Return the names that stand for several tasks wherever a list of tasks is given."""
    found: dict[str, tuple[str, ...]] = {}
    for name in TASKS:
        if group := TASKS.get(name).group:
            found[group] = (*found.get(group, ()), name)
    return found


def task_names() -> list[str]:
    """Return the names of all tasks and groups, sorted."""
    return sorted({*TASKS, *groups()})


def is_task_name(name: str) -> bool:
    """Say whether a name is that of a task, a group, an alias, or a file of questions."""
    return is_source(name) or _own_name(name) in task_names()


def get_task(name: str) -> Task:
    """Return a task by name, that of a file of questions or of a hub set, or the harness' own.

    The harness' tasks are looked for where lm-evaluation-harness is installed; a `.yaml` file is a
    task file of it.

    Raises:
        TaskError: No such name (with the nearest) or file, or the name of several tasks.
    """
    if is_source(name):
        return task_of_source(name, tuple(task_names()))
    name = _own_name(name)
    if name in TASKS:
        return TASKS.get(name)
    if members := groups().get(name):
        raise TaskError(f"{name!r} stands for {', '.join(members)}; name one of them")
    if find_spec("lm_eval") is None:
        raise TaskError(unknown_name("task", name, task_names()) + ", or a .jsonl file")
    return _stock_task(name, tuple(task_names()))


def get_tasks(names: str) -> list[Task]:
    """Return the tasks of a comma list, in order; a group's name stands for its tasks."""
    given = [_own_name(name.strip()) for name in names.split(",") if name.strip()]
    wanted = Counter(name for one in given for name in groups().get(one, (one,)))
    if not wanted:
        raise TaskError(f"no task is named in {names!r}. Valid: {', '.join(task_names())}")
    for name, count in wanted.items():
        if count > 1:
            raise TaskError(f"task {name!r} is named twice in {names!r}; name it once")
    tasks = [get_task(name) for name in wanted]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise TaskError(f"two tasks of {names!r} are named {name!r}; rename a file")
    return tasks


def describe_tasks() -> list[tuple[str, str, str]]:
    """Return name, rewards (the default first; empty: none) and description of tasks and groups."""
    rows = [(task, task.name, task.description) for task in map(TASKS.get, TASKS)]
    for group, members in groups().items():
        rows.append((TASKS.get(members[0]), group, f"stands for {', '.join(members)}"))
    return sorted((name, ", ".join(task.rewards), what) for task, name, what in rows)


def _own_name(name: str) -> str:
    """Return a task's own name for an alias; other names stay as they are."""
    return next((each for each in TASKS if name in TASKS.get(each).aliases), name)
