"""A task: a set of questions, how a search asks them and how an evaluation does.

Loads no torch.
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
    """A set doesn't have a split, or the data folder lacks the file that it is in."""


class Function(str):
    """A function that a task file of the harness names by `!function`, as `module.name`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """How lm-evaluation-harness asks a task in an evaluation."""

    # The columns that the task file reads: names of the row's own columns, a field of the question
    # for each name, or a function that makes them from a question and its row.
    columns: tuple[str, ...] | Mapping[str, str] | Callable[[Example, Row], dict[str, Any]]
    # The harness' task file below its `tasks`, with `{part}` where there is one for each part of
    # the set; empty where `settings` are all there is.
    file: str = ""
    # Changes to the harness' file or, without one, the whole task.
    settings: Mapping[str, Any] = field(default_factory=dict)
    generated: bool = False  # answers are generated; else options are scored
    metric: str = "acc"  # the metric that counts, of those that the harness reports
    filter: str = "none"  # the harness' filter of a generated text whose metric counts
    shots: int = 0  # worked examples before a question unless another number is asked for
    max_new_tokens: int = 0  # maximum tokens of an answer; 0 where options are scored
    part_of: str = ""  # the column with the part that a row belongs to; empty for sets of one part
    notes: tuple[str, ...] = ()  # what a reader of results must know

    def make_row(self, example: Example, row: Row) -> dict[str, Any]:
        """Return the columns of one question, or refuse a row that lacks one of them."""
        if callable(self.columns):
            return self.columns(example, row)
        if isinstance(self.columns, Mapping):
            return {name: getattr(example, field) for name, field in self.columns.items()}
        for name in self.columns:
            if name not in row:
                raise TaskError(f"{name!r} is missing")
        return {name: row[name] for name in self.columns}


def name_for_harness(name: str) -> str:
    """Return a name without the characters that the harness' command line gives a meaning."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


class Task(ABC):
    """A set of questions and the ways of asking them.

    Attributes:
        name: As users write it.
        description: One line for `drllm ls tasks`.
        prompt_format: How a search asks; None where the task is only evaluated.
        harness: How an evaluation asks; None: as a search does.
        group: A name that stands for this task and others; empty for most.
        aliases: Other names of the task, accepted wherever its own is.
    """

    name: str
    description: str
    prompt_format: PromptFormat | None = None
    harness: Harness | None = None
    group: str = ""
    aliases: tuple[str, ...] = ()

    @abstractmethod
    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in fixed order; no question is in two splits.

        A split that is only reported is as published, copies included; splits to search and train
        on have each text once. Files come from the data folder, or from the hub without one; a task
        that brings its own questions reads neither.

        Raises:
            NoSplitError: The set has no such split, or the data folder no such file.
            TaskError: No network, or a line that can't be used (with its number).
        """

    def rows(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the questions of one split, each with its row; empty where there are no rows."""
        return [(example, {}) for example in self.examples(split, data_dir)]

    def shots(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the questions to draw worked examples from, for the questions of a split.

        They are of another split, so no reported question is shown with its answer.
        """
        return self.rows(choose_shots_split(check_split(split)), data_dir)

    def skipped(self, split: str, data_dir: Path | str | None = None) -> dict[str, str]:
        """Return the rows of a split's file that can't be asked: id → reason."""
        return {}

    def describe_splits(self) -> str:
        """Return one line that says how many questions each split has."""
        counts = {split: len(self.examples(split)) for split in SPLITS}
        parts = ", ".join(f"{count} in {split}" for split, count in counts.items())
        return f"{self.name} has {sum(counts.values())} questions: {parts}"

    @property
    def reports_test_alone(self) -> bool:
        """Whether `test` is the only split that an evaluation may use."""
        return False

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards that fit, the default first; none where the task is only evaluated."""
        return () if self.prompt_format is None else self.prompt_format.rewards

    @property
    def has_answers(self) -> bool:
        """Whether the questions have answers; without, they are prompts alone."""
        return KL_REWARD not in self.rewards

    def check_answers(self) -> None:
        """Refuse a task without answers, which can't be evaluated."""
        if not self.has_answers:
            raise TaskError(
                f"task {self.name!r} has prompts without answers, which can be searched and tuned "
                f"on, but not evaluated; give answers, or --reward FILE.py:FUNCTION"
            )

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return the prompt of a question; refuse a reward that doesn't fit."""
        return self.prompts(example, reward)[0]

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the prompt of a question, then other ways of asking it, for the re-test.

        Source: ours (docs/differences.md, D-05).
        """
        self.check_reward(reward)
        assert self.prompt_format is not None
        return self.prompt_format.prompts(example, reward)

    def check_reward(self, reward: str | None) -> str:
        """Return the reward to use, or refuse what the task can't grade.

        Args:
            reward: A name, or a comma list of which the first that fits is used (`letter,boxed`
                for tasks with options and problems); None for the task's own.
        """
        if not self.rewards:
            raise TaskError(
                f"task {self.name!r} is only evaluated and can't be searched or tuned on; "
                f"'drllm ls tasks' shows which tasks have rewards"
            )
        if reward is None:
            return self.rewards[0]
        for name in reward.split(","):
            if name in self.rewards:
                return name
        raise TaskError(
            f"reward {reward!r} doesn't fit task {self.name!r}; "
            f"it takes {', '.join(self.rewards)} (without --reward each task has its own)"
        )


def check_data_dir(data_dir: str | None) -> None:
    """Raise a TaskError if the folder of the tasks' files isn't a folder."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise TaskError(
            f"--data-dir {data_dir} is not a folder; give the folder with the tasks' files"
        )


def load_questions(task: Task, split: str, data_dir: str | None) -> list[Example]:
    """Return a task's questions in a split; a TaskError if there are none, or no such folder."""
    check_data_dir(data_dir)
    examples = task.examples(split, data_dir)
    if not examples:
        raise TaskError(
            f"task {task.name!r} has no questions in split {split!r}; give another --split or more "
            f"questions"
        )
    return examples


def check_split(split: str) -> str:
    """Return a split's name, or refuse one that doesn't exist."""
    if split not in SPLITS:
        raise TaskError(unknown_name("split", split, SPLITS))
    return split


def choose_shots_split(split: str, splits: Sequence[str] = SPLITS) -> str:
    """Return the split to draw worked examples from, for the questions of a split.

    It is `fit`, on which nothing is chosen or reported; for the questions of `fit` itself, and for
    a task without it, the first other split.

    Example:
        >>> choose_shots_split("test"), choose_shots_split("fit")
        ('fit', 'search')
        >>> choose_shots_split("test", ("select", "test"))
        'select'
    """
    candidates = [name for name in splits if name != split]
    return "fit" if "fit" in candidates else candidates[0]
