"""Which of the tasks that are given to the harness are ours.

A name that could mean either is refused. Loads no torch, and the harness only to look up its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import ConfigError, TaskError, unknown_name
from drllm.evaluation.lm_eval.folders import FolderFiles, HarnessTask, task_folder
from drllm.tasks.published.task import PublishedTask
from drllm.tasks.registry import get_tasks, groups, is_task_name, task_names

SEED = 0
"""Of drawing `--limit` questions."""


@dataclass(frozen=True)
class OwnTasks:
    """Our tasks among those of a command line, and all `names` for the harness' `--tasks`."""

    tasks: list[HarnessTask]
    files: FolderFiles
    names: list[str]


def own_tasks(
    names: Sequence[str],
    *,
    limit: float | None,
    data_dir: str | None,
    include_path: str | None,
    num_processes: int,
    **more: Any,
) -> OwnTasks:
    """Return the tasks of a command line of which some are ours.

    Args:
        names: What stands in `--tasks`.
        limit: The harness' `--limit`: maximum questions a task of ours, drawn with `SEED`.
        data_dir: As `task_folder`'s.
        include_path: A folder with tasks of the user's own.
        num_processes: Processes that share the questions of a task.
        more: As `task_folder`'s: split, num_fewshot, max_length.

    Raises:
        ConfigError: None of the names is ours, a `data_dir` that none of them reads, or a limit
            that isn't a whole number.
        TaskError: A name that is unknown or could mean two tasks, or see `folders.task_folder`.
    """
    ours = [name for name in names if is_task_name(name)]
    others = [name for name in names if not is_task_name(name)]
    if not ours:
        said = unlisted("task of drllm's", others[0], task_names())
        raise ConfigError(
            f"--data_dir and --split have no effect on the harness' own tasks: {said}; "
            f"'drllm ls tasks' lists them; leave both flags out, or name one"
        )
    tasks = get_tasks(",".join(ours))
    if data_dir is not None and not any(isinstance(task, PublishedTask) for task in tasks):
        raise ConfigError(
            f"--data_dir {data_dir} has no effect: {', '.join(ours)} brings its own questions; "
            f"leave it out, and give --split"
        )
    if limit is not None and (limit < 1 or limit != int(limit)):
        raise ConfigError(
            f"--limit is {limit:g}; with --data_dir or --split it is a number of questions a task: "
            f"give a whole number from 1"
        )
    found, files = task_folder(
        tasks,
        limit=None if limit is None else int(limit),
        seed=SEED,
        data_dir=data_dir,
        **more,
    )
    for name, number in files.num_questions.items():
        if number < num_processes:  # which would end the harness
            raise TaskError(
                f"task {name!r} has {number} questions for {num_processes} processes, and the "
                f"harness wants one for each; give a higher --limit, or start fewer processes"
            )
    if others or include_path is not None:
        taken = {*files.num_questions, *(task.harness_name for task in found)}
        _check_others(others, taken, include_path)
    called = (task.harness_name for task in found)
    ordered = []
    for name in names:
        members = groups().get(name, (name,)) if name in ours else ()
        ordered += [next(called) for _ in members] or [name]
    return OwnTasks(found, files, ordered)


# --- the harness' own tasks next to ours ----------------------------------------------------------


def unlisted(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown, with the nearest: the harness has thousands, too many to list."""
    return unknown_name(kind, name, known).split(" Valid: ")[0].rstrip(".")


def _check_others(others: Sequence[str], taken: set[str], include_path: str | None) -> None:
    """Refuse names next to ours that are unknown, or that hold a task of the same name as ours."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=include_path)
    index = manager.task_index
    for name in others:
        if name.endswith(".yaml") or Path(name).is_dir():
            raise TaskError(
                f"{name} is given together with drllm's tasks; give its folder as --include_path "
                f"and the task by its name"
            )
        held = _held(manager.match_tasks([name]), index)
        if not held:
            said = unlisted("task", name, {*task_names(), *index})
            raise TaskError(f"{said}; 'drllm ls tasks' and 'drllm lm-eval ls tasks' list all")
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


def _held(names: Any, index: Any) -> set[str]:
    """Return names of the harness and all that they stand for.

    `names` are what may stand in a group's `task`: a name, a task that is changed, a group in it,
    or a list of these.
    """
    found: set[str] = set()
    pending = [names]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            pending.append(each.get("task", []))
        elif not isinstance(each, str):
            pending += each
        elif each not in found:
            found.add(each)
            if each in index and index[each].kind.name == "TAG":
                pending += index[each].tags
            elif each in index and index[each].kind.name == "GROUP":
                pending.append(index[each].cfg["task"])
    return found
