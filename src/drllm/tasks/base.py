"""What a task is: its questions, how a search and an evaluation ask them.

A task never sees a model or a tokenizer: it hands out texts. Loads no torch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from drllm.config import SPLITS
from drllm.errors import TaskError, unknown_name

if TYPE_CHECKING:
    from drllm.tasks.forms import Form

Question = TypeVar("Question")  # an example, alone or with what belongs to it

Row: TypeAlias = Mapping[str, Any]
"""One object of a task's file, in the schema of the hub or of a data folder."""

QuestionRow: TypeAlias = tuple["Example", Row]  # a question, and the row that it was read from

FILE_NAMES = (".jsonl", ".jsonl.gz")  # how the name of a file of questions ends

OPTIONS_REWARD = "loglikelihood"
"""The reward of every task that has options, and the one that an evaluation uses."""
KL_REWARD = "kl"  # the reward of prompts without answers: how near a path stays to the full one

Messages: TypeAlias = tuple[tuple[str, str], ...]
"""A conversation that ends with the user: role and content of each message."""


class NoSplitError(TaskError):
    """A set doesn't have a split, or the data folder lacks the file that it is in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question with its answer.

    Attributes:
        id: Unique within the task.
        task: The task's name.
        question: The question's text alone, without instructions or options.
        choices: The options' texts; empty where the answer can only be generated.
        gold: Index of the right option; None without options.
        answer: The right answer's text.
        other_answers: Further texts that are as right, for answers that are generated.
        solution: How the answer is found, ending in it; empty for most.
        context: What stands before the question: the passage that it asks about, or a line on its
            subject. Empty for most; a question is recognised by its own text alone.
        messages: The conversation, where that is what is asked; `question` then has its text.
    """

    id: str = ""
    task: str = ""
    question: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    answer: str
    other_answers: tuple[str, ...] = ()
    solution: str = ""
    context: str = ""
    messages: Messages = field(default=(), repr=False)


def with_options(
    question: str, choices: tuple[str, ...], gold: int, row_id: str = "", task: str = ""
) -> Example:
    """Return a question with options; its answer is the right one's text."""
    return Example(
        id=row_id, task=task, question=question, choices=choices, gold=gold, answer=choices[gold]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One way of asking an example, complete: what the model reads and what counts as right."""

    text: str  # what the model reads; the routers see this and nothing else
    reward: str  # `loglikelihood` (score `continuations`), or how a generated answer is graded
    answer: str  # what a generated answer is graded against (for `letter`, the letter)
    other_answers: tuple[str, ...] = ()  # for `exact`, further answers that are as right
    # For `loglikelihood`, the texts that follow `text` directly, each with its leading space; else
    # empty.
    continuations: tuple[str, ...] = ()
    gold: int | None = None  # index of the right continuation; None for generated answers
    # Send `text` as the user's turn of the tokenizer's chat template, where it has one.
    chat: bool = False
    max_new_tokens: int = 16  # maximum tokens of a generated answer
    # Score continuations by log-probability per character (as `acc_norm` of lm-evaluation-harness
    # does), not by their sum. Only re-tests ask for it.
    normalised: bool = False
    letters: str = "ABCDE"  # for `letter`, the letters that name an option
    # Of each continuation, the text that it begins with and that is read but not scored: of a gap
    # that is filled, the filling. Empty for none. This and what follows isn't in the repr, by which
    # a search knows its prompts, those of earlier versions too.
    unscored: tuple[str, ...] = field(default=(), repr=False)
    # The question alone, for a function that grades; else empty.
    question: str = field(default="", repr=False)
    # The conversation, which the chat template renders in place of `text`.
    messages: Messages = field(default=(), repr=False)

    @property
    def asked(self) -> str | list[dict[str, str]]:
        """What the model is to read: the text, or the messages of a conversation."""
        return [{"role": role, "content": said} for role, said in self.messages] or self.text


class Function(str):
    """A function that a task file of the harness names by `!function`, as `module.name`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """How lm-evaluation-harness asks a task in an evaluation."""

    # The columns that the task file reads: names that are taken as they stand, the question's field
    # for each, or a function that makes them of a question and its row.
    columns: tuple[str, ...] | Mapping[str, str] | Callable[[Example, Row], dict[str, Any]]
    # The harness' task file below its `tasks`, with `{part}` where there is one for each part of
    # the set; empty where `settings` are all there is.
    file: str = ""
    # Changes to the harness' file or, without one, the whole task.
    settings: Mapping[str, Any] = field(default_factory=dict)
    generated: bool = False  # answers are generated; else options are scored
    metric: str = "acc"  # the metric that counts, of those that the harness reports
    filter: str = "none"  # which of the harness' filters of a generated text it is taken from
    shots: int = 0  # worked examples before a question unless another number is asked for
    max_new_tokens: int = 0  # maximum tokens of an answer; 0 where options are scored
    part_of: str = ""  # the column with the part that a row belongs to; empty for sets of one part
    notes: tuple[str, ...] = ()  # what a reader of results must know

    def row_of(self, example: Example, row: Row) -> dict[str, Any]:
        """Return the columns of one question, or refuse a row that lacks one of them."""
        if callable(self.columns):
            return self.columns(example, row)
        if isinstance(self.columns, Mapping):
            return {name: getattr(example, field) for name, field in self.columns.items()}
        if missing := [name for name in self.columns if name not in row]:
            raise TaskError(f"{missing[0]!r} is missing")
        return {name: row[name] for name in self.columns}


def name_for_harness(name: str) -> str:
    """Return a name without what the harness' command line takes for something else."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


class Task(ABC):
    """A set of questions and the ways of asking them.

    Attributes:
        name: As users write it.
        description: One line for `drllm ls tasks`.
        form: How a search asks; None where the task is only evaluated.
        harness: How an evaluation asks; None: as a search does.
        group: A name that stands for this task and others; empty for most.
        aliases: Other names of the task, accepted wherever its own is.
    """

    name: str
    description: str
    form: Form | None = None
    harness: Harness | None = None
    group: str = ""
    aliases: tuple[str, ...] = ()

    @abstractmethod
    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in fixed order; no question is in two splits.

        What is only reported stands there as published, copies too; what may be searched and
        trained on has each text once.

        Files are those of the data folder, or the hub's without one; a task that brings its own
        questions looks at neither.

        Raises:
            NoSplitError: The set has no such split, or the data folder no such file.
            TaskError: No network, or a line that can't be used (with its number).
        """

    def rows(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the questions of one split, each with its row; empty where there are no rows."""
        return [(example, {}) for example in self.examples(split, data_dir)]

    def shots(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the questions that may be shown, with their answers, before those of a split.

        They are those of another split: what is shown is never what is reported.
        """
        return self.rows(shots_split(check_split(split)), data_dir)

    def skipped(self, split: str, data_dir: Path | str | None = None) -> dict[str, str]:
        """Return the rows that can't be asked of the file with a split's questions: id → why."""
        return {}

    @property
    def reports_test_alone(self) -> bool:
        """Whether an evaluation can ask no other split than `test`."""
        return False

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards that fit, the default first; none where the task is only evaluated."""
        return () if self.form is None else self.form.rewards

    @property
    def has_answers(self) -> bool:
        """Whether its questions have right answers; else they are prompts alone."""
        return KL_REWARD not in self.rewards

    def check_answers(self) -> None:
        """Refuse a task that can't be evaluated, since nothing says which answers are right."""
        if not self.has_answers:
            raise TaskError(
                f"task {self.name!r} has prompts without answers, which can be searched and tuned "
                f"on, but not evaluated; give answers, or --reward FILE.py:FUNCTION"
            )

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return how the question is asked; refuse a reward that doesn't fit."""
        return self.prompts(example, reward)[0]

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return how the question is asked, then other ways, which a lucky path must survive.

        Source: ours (docs/differences.md, D-05).
        """
        self.check_reward(reward)
        assert self.form is not None
        return self.form.prompts(example, reward)

    def check_reward(self, reward: str | None) -> str:
        """Return the reward to use, or refuse what the task can't grade.

        Args:
            reward: A name, or several with commas between, of which the first that fits is taken
                (`letter,boxed` for tasks with options and problems); None for the task's own.
        """
        if not self.rewards:
            raise TaskError(
                f"task {self.name!r} is only evaluated and can't be searched or tuned on; "
                f"'drllm ls tasks' shows which tasks have rewards"
            )
        wanted = self.rewards if reward is None else reward.split(",")
        fitting = next((name for name in wanted if name in self.rewards), None)
        if fitting is None:
            raise TaskError(
                f"reward {reward!r} doesn't fit task {self.name!r}; "
                f"it takes {', '.join(self.rewards)} (without --reward each task has its own)"
            )
        return fitting


def check_data_dir(data_dir: str | None) -> None:
    """Refuse a folder of the tasks' files that isn't one with a TaskError."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise TaskError(
            f"--data-dir {data_dir} is not a folder; give the folder with the tasks' files"
        )


def questions_in(task: Task, split: str, data_dir: str | None) -> list[Example]:
    """Return a task's questions in a split; a TaskError for none, and a folder that isn't one."""
    check_data_dir(data_dir)
    if found := task.examples(split, data_dir):
        return found
    raise TaskError(
        f"task {task.name!r} has no questions in split {split!r}; give another --split or more "
        f"questions"
    )


def check_split(split: str) -> str:
    """Return a split's name, or refuse one that doesn't exist."""
    if split not in SPLITS:
        raise TaskError(unknown_name("split", split, SPLITS))
    return split


def shots_split(split: str, splits: Sequence[str] = SPLITS) -> str:
    """Return the split whose questions may be shown, with answers, before those of another.

    It is `fit`, on which nothing is chosen or reported; where that is asked itself, or the task
    doesn't have it, the first of the others.

    Example:
        >>> shots_split("test"), shots_split("fit"), shots_split("test", ("select", "test"))
        ('fit', 'search', 'select')
    """
    return next(name for name in ("fit", *splits) if name in splits and name != split)


def choose(examples: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """Return at most `limit` examples, drawn with the seed, in their own order.

    Which places are drawn depends on how many there are, not on what they hold.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    kept = sorted(Random(seed).sample(range(len(examples)), limit))
    return [examples[place] for place in kept]
