"""What a task is: where its questions come from, how they are asked, and how answers are graded.

Owns the contract between question sets and everything that asks them, and the table of names.
A task never sees a model or a tokenizer: it hands out texts and grades texts. Loads no torch.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from drllm.config import SPLITS
from drllm.errors import TaskError, unknown_name

Question = TypeVar("Question")
"""An example, alone or with what belongs to it."""

OPTIONS_REWARD = "loglikelihood"
"""The reward of every task that has options, and the one that an evaluation uses."""


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
        context: What stands before the question: the passage that it asks about, or a line on its
            subject. Empty for most; a question is recognised by its own text alone.
    """

    id: str
    task: str
    question: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    answer: str
    other_answers: tuple[str, ...] = ()
    context: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One way of asking an example, complete: what the model reads and what counts as right.

    Attributes:
        text: What the model reads; the routers see this and nothing else.
        reward: `loglikelihood` (score `continuations`), or how a generated answer is graded:
            `letter`, `boxed` or `exact`.
        answer: What a generated answer is graded against (for `letter`, the letter).
        other_answers: For `exact`, further answers that are as right.
        continuations: For `loglikelihood`, the texts that follow `text` directly, each with its
            leading space; else empty.
        gold: Index of the right continuation; None for generated answers.
        chat: Send `text` as the user's turn of the tokenizer's chat template, where it has one.
        max_new_tokens: Most tokens that a generated answer may have.
        normalised: Score continuations by log-probability per character (as `acc_norm` of
            lm-evaluation-harness does), not by their sum. Only re-tests ask for it.
        letters: For `letter`, the letters that name an option.
    """

    text: str
    reward: str
    answer: str
    other_answers: tuple[str, ...] = ()
    continuations: tuple[str, ...] = ()
    gold: int | None = None
    chat: bool = False
    max_new_tokens: int = 16
    normalised: bool = False
    letters: str = "ABCDE"


class Task(ABC):
    """A set of questions and the ways of asking them.

    Attributes:
        name: As users write it.
        description: One line for `drllm ls tasks`.
        rewards: The rewards that fit, the default first; none where the task is only evaluated.
    """

    name: str
    description: str
    rewards: tuple[str, ...]

    @abstractmethod
    def examples(self, split: str, data_dir: Path | None = None) -> list[Example]:
        """Return the questions of one split (`search`, `fit`, `select`, `test`), in fixed order.

        Args:
            split: Which questions; no question is in two splits.
            data_dir: Folder with the task's files; None uses the hub, or nothing at all for
                tasks that bring their own questions.

        Raises:
            TaskError: No such file, no network, or a line that can't be used (with its number).
        """

    @abstractmethod
    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return how the question is asked."""

    @abstractmethod
    def retests(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the other ways of asking the same question that a lucky path must survive.

        Source: ours (docs/differences.md, D-05).
        """

    def check_reward(self, reward: str | None) -> str:
        """Return the reward to use, or refuse what the task can't grade.

        Args:
            reward: A name, or several with commas between, of which the first that fits is taken
                (`letter,boxed` for tasks with options and problems); None for the task's own.

        Raises:
            TaskError: Naming the rewards that fit, or saying that the task is only evaluated.
        """
        if not self.rewards:
            raise TaskError(self.only_evaluated())
        if reward is None:
            return self.rewards[0]
        fitting = [name for name in reward.split(",") if name in self.rewards]
        if not fitting:
            raise TaskError(
                f"reward {reward!r} doesn't fit task {self.name!r}; "
                f"it takes {', '.join(self.rewards)} (without --reward each task has its own)"
            )
        return fitting[0]

    def only_evaluated(self) -> str:
        """Word the message for a task that has no rewards."""
        return (
            f"task {self.name!r} is only evaluated and can't be searched; "
            f"'drllm ls tasks' shows which tasks have rewards"
        )


def check_split(split: str) -> str:
    """Return the split's name, or refuse one that doesn't exist.

    Raises:
        TaskError: Naming the nearest and all splits.
    """
    if split not in SPLITS:
        raise TaskError(unknown_name("split", split, SPLITS))
    return split


def shots_split(split: str, splits: Sequence[str] = SPLITS) -> str:
    """Return the split whose questions may be shown, with answers, before those of another.

    Args:
        split: What is asked.
        splits: Those that the task has.

    Returns:
        `fit`, on which nothing is chosen or reported; where it is asked itself or the task has
        none, the first of the others.

    Example:
        >>> shots_split("test"), shots_split("fit"), shots_split("test", ("select", "test"))
        ('fit', 'search', 'select')
    """
    return next(name for name in ("fit", *splits) if name in splits and name != split)


TASKS: dict[str, str] = {
    "agieval": "drllm.tasks.agieval:AGIEVAL",
    "aime24": "drllm.tasks.aime24:AIME24",
    "arc_easy": "drllm.tasks.arc:ARC_EASY",
    "arc_challenge": "drllm.tasks.arc:ARC_CHALLENGE",
    "commonsense_qa": "drllm.tasks.commonsense_qa:COMMONSENSE_QA",
    "commonsense_qa_cloze": "drllm.tasks.commonsense_qa:COMMONSENSE_QA_CLOZE",
    "dart-1": "drllm.tasks.dart:DART_1",
    "dart-2": "drllm.tasks.dart:DART_2",
    "dart-3": "drllm.tasks.dart:DART_3",
    "dart-4": "drllm.tasks.dart:DART_4",
    "dart-5": "drllm.tasks.dart:DART_5",
    "gpqa_diamond": "drllm.tasks.gpqa_diamond:GPQA_DIAMOND",
    "gsm8k": "drllm.tasks.gsm8k:GSM8K",
    "hellaswag": "drllm.tasks.hellaswag:HELLASWAG",
    "mmlu": "drllm.tasks.mmlu:MMLU",
    "mmlu_cloze": "drllm.tasks.mmlu:MMLU_CLOZE",
    "piqa": "drllm.tasks.piqa:PIQA",
    "squad_v2": "drllm.tasks.squad_v2:SQUAD_V2",
    "truthfulqa": "drllm.tasks.truthfulqa:TRUTHFULQA",
    "winogrande": "drllm.tasks.winogrande:WINOGRANDE",
    "builtin_facts": "drllm.tasks.builtin_facts:BUILTIN_FACTS",
    "builtin_arithmetic": "drllm.tasks.math:BUILTIN_ARITHMETIC",
}
"""Name → `module:attribute`, resolved on use. A task is added here and in one file of its own."""

GROUPS: dict[str, tuple[str, ...]] = {
    "arc": ("arc_easy", "arc_challenge"),
    "dart": ("dart-1", "dart-2", "dart-3", "dart-4", "dart-5"),
}
"""Names that stand for several tasks wherever a list of tasks is given."""

PUBLISHED_NAMES: dict[str, str] = {"squadv2": "squad_v2"}
"""Other names under which a task is known, accepted wherever ours are."""


def get_task(name: str) -> Task:
    """Return a task by name, or the task that a `.jsonl` file of the user's own describes.

    Raises:
        TaskError: No such name (with the nearest) or file, or the name of several tasks.

    Example:
        >>> get_task("builtin_facts").name
        'builtin_facts'
    """
    if name.endswith((".jsonl", ".jsonl.gz")):
        from drllm.tasks.files import FileTask

        return FileTask(Path(name))
    name = PUBLISHED_NAMES.get(name, name)
    if name in GROUPS:
        raise TaskError(f"{name!r} stands for {', '.join(GROUPS[name])}; name one of them")
    if name not in TASKS:
        raise TaskError(unknown_name("task", name, {**TASKS, **GROUPS}) + ", or a .jsonl file")
    module, attribute = TASKS[name].split(":")
    task: Task = getattr(importlib.import_module(module), attribute)
    return task


def get_tasks(names: str) -> list[Task]:
    """Return the tasks of a comma list, in order; a group's name stands for its tasks.

    Raises:
        TaskError: An unknown name, an empty list, a task named twice (alone and by its group
            too), or two files of the same name.

    Example:
        >>> [task.name for task in get_tasks("gsm8k,arc")]
        ['gsm8k', 'arc_easy', 'arc_challenge']
    """
    named = [name.strip() for name in names.split(",") if name.strip()]
    given = [PUBLISHED_NAMES.get(name, name) for name in named]
    if not given:
        valid = ", ".join(sorted({**TASKS, **GROUPS}))
        raise TaskError(f"no task is named in {names!r}. Valid: {valid}")
    wanted = [name for one in given for name in GROUPS.get(one, (one,))]
    for name in wanted:
        if wanted.count(name) > 1:
            raise TaskError(f"task {name!r} is named twice in {names!r}; name it once")
    tasks = [get_task(name) for name in wanted]
    for task in tasks:
        if [other.name for other in tasks].count(task.name) > 1:
            raise TaskError(f"two tasks of {names!r} are named {task.name!r}; rename a file")
    return tasks


def describe_tasks() -> list[tuple[str, str, str]]:
    """Return name, rewards (the default first) and description of every task and group, by name.

    Rewards are empty where a task is only evaluated.

    Example:
        >>> next(row for row in describe_tasks() if row[0] == "arc")
        ('arc', 'loglikelihood, letter', 'stands for arc_easy, arc_challenge')
    """
    described = []
    for name in sorted({**TASKS, **GROUPS}):
        first = get_task(GROUPS[name][0] if name in GROUPS else name)
        what = f"stands for {', '.join(GROUPS[name])}" if name in GROUPS else first.description
        described.append((name, ", ".join(first.rewards), what))
    return described


def choose(examples: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """Return at most `limit` examples, drawn with the seed, in their own order.

    Which places are drawn depends on how many there are, not on what they hold.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    kept = sorted(Random(seed).sample(range(len(examples)), limit))
    return [examples[place] for place in kept]
