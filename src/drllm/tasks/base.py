"""Tasks: sets of questions, with their prompts for a search and for an evaluation.

`Task` is the interface of all tasks. This module doesn't import torch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drllm.config import SPLITS
from drllm.errors import TaskError, unknown_name
from drllm.tasks.examples import KL_REWARD, Example, Prompt, QuestionRow, Row
from drllm.tasks.prompt_formats import PromptFormat


class NoSplitError(TaskError):
    """A task doesn't have a split, or the data folder lacks the split's file."""


class Function(str):
    """The name of a function, `module.name`, for a task file of the harness (`!function NAME`)."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """How lm-evaluation-harness ("the harness") evaluates a task."""

    # The columns that the harness' task file reads. Either names of columns of the row; or a
    # mapping column → field of `Example`; or a function that makes the columns from a question and
    # its row.
    columns: tuple[str, ...] | Mapping[str, str] | Callable[[Example, Row], dict[str, Any]]
    # The task file in the harness' folder `tasks`, with `{part}` if each part of the set has its
    # own file; empty if there is no file.
    file: str = ""
    # Changes to the settings in the task file; without a file, all settings of the task.
    settings: Mapping[str, Any] = field(default_factory=dict)
    generated: bool = False  # whether answers are generated; else options are scored
    metric: str = "acc"  # the harness' metric that we report
    filter: str = "none"  # the harness' filter of generated texts, applied before the metric
    shots: int = 0  # default number of worked examples before a question
    # Maximum tokens of an answer; 0 if options are scored, or if each question has its own maximum.
    max_new_tokens: int = 0
    # Whether prompts are put into the chat template unless the settings say otherwise.
    chat: bool = False
    part_of: str = ""  # the column that names a row's part of the set; empty for sets of one part
    notes: tuple[str, ...] = ()  # sentences for readers of the results

    def make_row(self, example: Example, row: Row) -> dict[str, Any]:
        """Return the columns of one question. Raises TaskError if the row lacks a column."""
        if callable(self.columns):
            return self.columns(example, row)
        if isinstance(self.columns, Mapping):
            return {column: getattr(example, name) for column, name in self.columns.items()}
        for name in self.columns:
            if name not in row:
                raise TaskError(f"{name!r} is missing")
        return {name: row[name] for name in self.columns}


def name_for_harness(name: str) -> str:
    """Replace the characters of a name that have a special meaning for the harness by `_`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


class Task(ABC):
    """A set of questions, with their prompts.

    Attributes:
        name: The name that users write.
        description: One line for `drllm ls tasks`.
        prompt_format: Makes the prompts of a search; None if the task is only evaluated.
        harness: How the harness evaluates the task; None if an evaluation uses the prompts of a
            search.
        group: A name that stands for this task and other tasks; empty for most tasks.
        aliases: Other names of the task, accepted wherever the name is accepted.
    """

    name: str
    description: str
    prompt_format: PromptFormat | None = None
    harness: Harness | None = None
    group: str = ""
    aliases: tuple[str, ...] = ()

    @abstractmethod
    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in a fixed order; no question is in two splits.

        Splits to search or train on have each text once. Splits that are only reported are returned
        as published, even if texts are repeated.

        Args:
            split: `search`, `fit`, `select` or `test`.
            data_dir: The data folder with the task's files; None reads them from the hub. Tasks
                with their own questions ignore it.

        Raises:
            NoSplitError: The task doesn't have the split, or the data folder lacks its file.
            TaskError: There is no network, or a line can't be used; the message has its number.
        """

    def rows(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the questions of one split, each with its row; {} for a question without a row."""
        return [(example, {}) for example in self.examples(split, data_dir)]

    def shots(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the questions from which worked examples for a split are drawn.

        These questions belong to another split, so no reported question is shown with its answer.
        """
        return self.rows(choose_shots_split(check_split(split)), data_dir)

    def skipped(self, split: str, data_dir: Path | str | None = None) -> dict[str, str]:
        """Return the unusable rows of a split's file: the row's id → why it is unusable."""
        return {}

    def describe_splits(self) -> str:
        """Return one line that says how many questions each split has."""
        counts = {split: len(self.examples(split)) for split in SPLITS}
        parts = ", ".join(f"{count} in {split}" for split, count in counts.items())
        return f"{self.name} has {sum(counts.values())} questions: {parts}"

    def describe_repeats(self) -> str:
        """Say which rows are left out since they repeat a question; return "" if none is."""
        return ""

    @property
    def has_only_test(self) -> bool:
        """Whether `test` is the only split that an evaluation may use."""
        return False

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards that fit the task, the default first; empty if the task is only evaluated."""
        return () if self.prompt_format is None else self.prompt_format.rewards

    @property
    def has_answers(self) -> bool:
        """Whether the questions have answers; questions without answers are only prompts."""
        return KL_REWARD not in self.rewards

    def check_answers(self) -> None:
        """Refuse a task without answers, which can't be evaluated."""
        if not self.has_answers:
            raise TaskError(
                f"task {self.name!r} has prompts without answers, which can be searched and "
                f"learned from, but not evaluated; give answers, or --reward FILE.py:FUNCTION"
            )

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return the prompt of a question. Raises TaskError if the reward doesn't fit."""
        return self.prompts(example, reward)[0]

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the prompt of a question, then its other prompts for the re-test.

        Source: ours (docs/differences.md, D-05).
        """
        self.check_reward(reward)
        assert self.prompt_format is not None
        return self.prompt_format.prompts(example, reward)

    def check_reward(self, reward: str | None) -> str:
        """Return the reward to use. Raises TaskError if no reward fits.

        Args:
            reward: A name, or a comma list of names; the first name that fits is used. For example,
                `letter,boxed` fits tasks with options and problems. None for the task's default.
        """
        if not self.rewards:
            raise TaskError(
                f"task {self.name!r} is only evaluated and can't be searched or learned from; "
                f"'drllm ls tasks' shows which tasks have rewards"
            )
        if reward is None:
            return self.rewards[0]
        for name in reward.split(","):
            if name in self.rewards:
                return name
        raise TaskError(
            f"reward {reward!r} doesn't fit task {self.name!r}; give {' or '.join(self.rewards)}, "
            f"or leave out --reward for each task's own reward"
        )


def check_data_dir(data_dir: str | None) -> None:
    """Raise a TaskError if the data folder isn't a folder."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise TaskError(
            f"--data-dir {data_dir} is not a folder; give the folder with the tasks' files"
        )


def load_questions(task: Task, split: str, data_dir: str | None) -> list[Example]:
    """Return a task's questions in a split.

    Raises TaskError if there are no questions, or if the data folder isn't a folder.
    """
    check_data_dir(data_dir)
    examples = task.examples(split, data_dir)
    if not examples:
        raise TaskError(
            f"task {task.name!r} has no questions in split {split!r}; give another --split or more "
            f"questions"
        )
    return examples


def check_split(split: str) -> str:
    """Return the name of a split unchanged. Raises TaskError if the split doesn't exist."""
    if split not in SPLITS:
        raise TaskError(unknown_name("split", split, SPLITS))
    return split


def choose_shots_split(split: str, splits: Sequence[str] = SPLITS) -> str:
    """Return the split from which worked examples for the questions of a split are drawn.

    Usually this is `fit`, since nothing is chosen or reported on `fit`. For questions of `fit`
    itself, and for tasks without `fit`, it is the first other split of `splits`.

    Example:
        >>> choose_shots_split("test"), choose_shots_split("fit")
        ('fit', 'search')
        >>> choose_shots_split("test", ("select", "test"))
        'select'
    """
    candidates = [name for name in splits if name != split]
    return "fit" if "fit" in candidates else candidates[0]
