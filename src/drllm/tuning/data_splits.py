"""Divides the questions of a task into three parts, to fit, choose and test a static path.

A *split* of a task is `search`, `fit`, `select` or `test`, as everywhere in drllm. A *part* is
`fit`, `select` or `test` of a tuning. No path is reported on questions that it was fitted or chosen
on, also if they are of another task. This module doesn't import torch.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from drllm.config import SPLITS, TuneConfig
from drllm.config.fields import require_tasks
from drllm.errors import TaskError
from drllm.records.splits import part_by_hash, question_key
from drllm.records.static_paths import FIT, PARTS, SELECT, TEST
from drllm.tasks.base import NoSplitError, Task
from drllm.tasks.examples import OPTIONS_REWARD, Example, choose
from drllm.tasks.registry import get_tasks
from drllm.tasks.rewards import check_installed
from drllm.tuning.objectives import LOSS, choose_objective, choose_reward
from drllm.work.listener import logger

BOUNDS = {FIT: 0.2, SELECT: 0.6, TEST: 1.0}
"""Where each part ends, as a share of all questions, if the parts aren't made from splits."""


@dataclass(frozen=True, slots=True)
class TaskSplits:
    """The questions of one task by part.

    Attributes:
        task: The task.
        examples: Part → its questions.
        is_divided: Whether the task lacks a split, so that all its questions were divided again.
        spare: The questions that are in no part: all of the split `fit`, which trains routers and
            fits baselines, and those of the split `search` beyond the limit.
        all_to_fit: The questions that the part `fit` was drawn from, with those beyond the limit.
    """

    task: Task
    examples: dict[str, list[Example]]
    is_divided: bool
    spare: Sequence[Example] = ()
    all_to_fit: Sequence[Example] = ()

    def digest_values(self) -> tuple[str, dict[str, list[Example]]]:
        """Return the values for the digest by which a tuning recognises its questions.

        They have the form of commit 3820ce17, so that a tuning of that version can be resumed. That
        version had a part `certify` of the spare questions.
        """
        if self.is_divided:
            return self.task.name, self.examples
        examples = {
            FIT: self.examples[FIT],
            SELECT: self.examples[SELECT],
            "certify": list(self.spare),
            TEST: self.examples[TEST],
        }
        return self.task.name, examples

    def is_generated(self, objective: str) -> bool:
        """Tell whether the accuracy of a path is measured by generating and grading answers.

        It isn't if options or worked solutions are scored.
        """
        if objective != LOSS:
            return False
        if any(example.solution for example in self.examples[FIT]):
            return False
        return choose_reward(self.task, objective) != OPTIONS_REWARD


TasksArgument: TypeAlias = "Task | str | Sequence[Task | str] | Sequence[TaskSplits] | None"
"""The argument `tasks` of `tune` and of `split_tasks`, which explains it."""


def split_tasks(config: TuneConfig, tasks: TasksArgument = None) -> list[TaskSplits]:
    """Check that tasks can be tuned on, and return them with their questions by part.

    A question that several tasks have stays in the last of its parts: no task is fitted on
    questions that another one chooses or tests on, or chooses on those that another one tests on.

    Args:
        config: The settings.
        tasks: Tasks, or their names; None takes the tasks of the settings. A result of this
            function is returned as it is.

    Raises:
        ConfigError: A setting has no effect, an objective doesn't fit a task, or a reward isn't
            installed.
        TaskError: A task is unknown, has too few questions, or has none left in a part, since they
            are in later parts of other tasks.
    """
    if isinstance(tasks, Sequence) and not isinstance(tasks, str):
        earlier_result = [task for task in tasks if isinstance(task, TaskSplits)]
        if earlier_result:
            return earlier_result
    config.check_effects()
    if tasks is None:
        tasks = require_tasks(config.tasks)
    all_tasks = _list_tasks(tasks, config)
    for task in all_tasks:
        objective = choose_objective(task, config)
        if task.has_answers:
            check_installed(choose_reward(task, objective))
    all_splits = [
        split_task(task, config.data_dir, config.num_fit, config.seed) for task in all_tasks
    ]
    if len(all_splits) > 1:
        all_splits = _drop_shared_questions(all_splits)
    return all_splits


def _drop_shared_questions(all_splits: Sequence[TaskSplits]) -> list[TaskSplits]:
    """Leave out of each task's parts the questions that a later part of any task has.

    Raises TaskError if a part has no questions left.
    """
    tested = _collect_keys(all_splits, TEST)
    tested_or_chosen = tested | _collect_keys(all_splits, SELECT)
    results = []
    num_left_out = 0
    for splits in all_splits:
        examples = {
            FIT: _drop_questions(splits.examples[FIT], tested_or_chosen),
            SELECT: _drop_questions(splits.examples[SELECT], tested),
            TEST: splits.examples[TEST],
        }
        for part, remaining in examples.items():
            num_left_out += len(splits.examples[part]) - len(remaining)
            if not remaining:
                raise TaskError(
                    f"another task chooses or tests paths on all {len(splits.examples[part])} "
                    f"questions of {splits.task.name!r} in the part {part!r}; tune these tasks "
                    f"one at a time"
                )
        result = dataclasses.replace(
            splits,
            examples=examples,
            spare=_drop_questions(splits.spare, tested_or_chosen),
            all_to_fit=_drop_questions(splits.all_to_fit, tested_or_chosen),
        )
        results.append(result)
    if num_left_out > 0:
        logger.warning(
            "questions left out, since another task chooses or tests paths on them: %d",
            num_left_out,
        )
    return results


def _collect_keys(all_splits: Sequence[TaskSplits], part: str) -> set[str]:
    """Return the keys of the questions that are in a part of any task."""
    return {
        question_key(example.question) for splits in all_splits for example in splits.examples[part]
    }


def _drop_questions(examples: Sequence[Example], keys: Collection[str]) -> list[Example]:
    """Return the examples without those whose questions have one of the keys."""
    return [example for example in examples if question_key(example.question) not in keys]


def _list_tasks(
    tasks: Task | str | Sequence[Task | str | TaskSplits], config: TuneConfig
) -> list[Task]:
    """Return tasks as a list, with names replaced by tasks. A string may hold several names."""
    if isinstance(tasks, (str, Task)):
        tasks = [tasks]
    all_tasks: list[Task] = []
    for task in tasks:
        if isinstance(task, str):
            all_tasks += get_tasks(task, trust_code=config.trust_task_code)
        elif isinstance(task, Task):
            all_tasks.append(task)
    return all_tasks


def split_task(task: Task, data_dir: str | None, num_fit: int, seed: int) -> TaskSplits:
    """Divide the questions of a task into parts.

    Paths are fitted on questions of the split `search`, chosen on `select` and tested on `test`. If
    a task lacks one of the four splits, all of its questions are divided again by their texts: 20 %
    to fit, 40 % to choose and 40 % to test.

    Args:
        task: The task.
        data_dir: The folder of published data sets; None reads them from the hub.
        num_fit: Maximum number of questions to fit on, drawn with the seed.
        seed: Seed of the drawing.

    Raises:
        TaskError: A part would have no questions.
    """
    folder = None if data_dir is None else Path(data_dir)
    splits = _read_splits(task, folder)
    if len(splits) == len(SPLITS):
        return _use_splits(task, splits, num_fit, seed)
    return _divide_again(task, splits, num_fit, seed)


def _read_splits(task: Task, folder: Path | None) -> dict[str, list[Example]]:
    """Return the splits that have questions; raise TaskError if no split has questions."""
    splits: dict[str, list[Example]] = {}
    problems = []
    for split in SPLITS:
        try:
            examples = task.examples(split, folder)
        except NoSplitError as error:
            problems.append(str(error))
            continue
        if examples:
            splits[split] = examples
    if not splits:
        raise TaskError(problems[0] if problems else f"task {task.name!r} has no questions")
    return splits


def _use_splits(
    task: Task, splits: dict[str, list[Example]], num_fit: int, seed: int
) -> TaskSplits:
    """Make the parts from the task's own four splits."""
    to_fit = choose(splits["search"], num_fit, seed)
    keys = {question_key(example.question) for example in to_fit}
    unused = [item for item in splits["search"] if question_key(item.question) not in keys]
    spare = [*splits["fit"], *unused]
    examples = {FIT: to_fit, SELECT: splits["select"], TEST: splits["test"]}
    return TaskSplits(task, examples, is_divided=False, spare=spare, all_to_fit=splits["search"])


def _divide_again(
    task: Task, splits: dict[str, list[Example]], num_fit: int, seed: int
) -> TaskSplits:
    """Make the parts from all questions, by their texts; raise TaskError if a part is empty."""
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    for examples in splits.values():
        for example in examples:
            parts[assign_part(example.question)].append(example)
    all_to_fit = parts[FIT]
    parts[FIT] = choose(all_to_fit, num_fit, seed)
    for part, examples in parts.items():
        if not examples:
            num_questions = sum(map(len, splits.values()))
            raise TaskError(
                f"task {task.name!r} has {num_questions} questions, and none of them falls into "
                f"the part {part!r} of a tuning; give a few hundred, since fewer show little"
            )
    return TaskSplits(task, parts, is_divided=True, all_to_fit=all_to_fit)


def assign_part(question: str) -> str:
    """Return the part that a question is in if its task is divided by the texts of its questions.

    Example:
        >>> assign_part("What is ice?") == assign_part(" what is  ICE?")
        True
    """
    # The prefix gives another hash than in `find_split`. With that hash, the questions of one split
    # would all be in the same part.
    return part_by_hash(f"tune:{question_key(question)}", BOUNDS)
