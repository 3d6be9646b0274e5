"""The texts whose next-token loss a certified choice is held to: how many, and worked answers.

Owns how few texts bound nothing, and which task's worked answers are read beside the questions' own
texts. Depths are chosen on one split of that task and tested on another, as for the tasks that are
evaluated; a question belongs to one split by its text, so no worked answer serves both. Leaves
reading texts to `systems`, and the bound to `rises`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, TaskError
from drllm.evaluation.lm_eval.registry import entry_of
from drllm.evaluation.sources import chosen_on
from drllm.tasks.base import Task, get_task

FEWEST_TEXTS = 30
"""On fewer, the bound is exceeded too often where some texts lose far more than the rest: with one
in ten of them, of 20 texts in 17 % of the cases instead of 5, of 30 in 8 %."""


def worked_task(config: EvaluateConfig, tasks: Sequence[Task]) -> Task | None:
    """Return the task whose right answers are read as texts, once it is sure that it can be.

    Args:
        config: Names the task and, in `splits`, its split.
        tasks: What is evaluated.

    Returns:
        The task; None where none is named.

    Raises:
        ConfigError: A task with options, or one that is evaluated by itself, whose own texts are
            its worked answers.
        TaskError: An unknown task, a split that it hasn't got, or too few questions in one.
    """
    if config.worked_answers is None:
        return None
    task = get_task(config.worked_answers)
    if not entry_of(task).generated:
        raise ConfigError(
            f"--worked-answers {config.worked_answers}: its answers are options, not texts; give a "
            f"task whose answers are generated, for example gsm8k"
        )
    if [each.name for each in tasks] == [task.name]:
        raise ConfigError(
            f"--worked-answers {config.worked_answers} has no effect: {task.name} alone is "
            f"evaluated, and its own texts are its worked answers; leave it out"
        )
    for split in (chosen_on(task, config), config.split_of(task.name)):
        _check_split(task, split, config)
    return task


def _check_split(task: Task, split: str, config: EvaluateConfig) -> None:
    folder = None if config.data_dir is None else Path(config.data_dir)
    other = ""
    if split == "test":
        other = f"; --splits {task.name}=select has depths chosen on fit and tested on select"
    try:
        found = len(task.examples(split, folder))
    except TaskError as error:
        raise TaskError(f"--worked-answers {config.worked_answers}: {error}{other}") from error
    if found < FEWEST_TEXTS:
        raise TaskError(
            f"--worked-answers {config.worked_answers}: split {split!r} has {found} questions, "
            f"and a bound needs {FEWEST_TEXTS}; give a task that has more{other}"
        )
