"""Collect the questions of a search with their prompts, and divide them into shards and batches.

A shard is the part of the questions that one machine searches. A batch is a group of questions that
are searched together. This module doesn't import torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from drllm.config import SearchConfig
from drllm.config.constants import PYTHON_FUNCTION
from drllm.config.fields import require_tasks, to_flag
from drllm.errors import ConfigError, TaskError
from drllm.records.codec import hash_values
from drllm.records.splits import hash_text, question_key
from drllm.search.strategies import STRATEGIES
from drllm.tasks.base import Task, check_data_dir, load_questions
from drllm.tasks.examples import Example, Prompt, Row, choose
from drllm.tasks.files import FileTask
from drllm.tasks.graded import GradedTask
from drllm.tasks.registry import get_task, get_tasks
from drllm.tasks.rewards import check_installed
from drllm.tasks.worked import WorkedTask
from drllm.work.listener import logger

MAX_QUESTION = 60  # maximum characters of a question in a message

QuestionSource: TypeAlias = "Path | str | Sequence[Task] | Sequence[Example] | Sequence[Row]"
"""Where the questions of a search come from.

A string holds names of tasks, separated by commas; a name may be a file. A path is a file. A list
holds tasks, examples of registered tasks, or rows with the fields of a `.jsonl` file.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchQuestion:
    """One question of a search, with all its prompts.

    Attributes:
        place: Position among all questions of the search, from 0. Search records are in this order.
        task: The task's name.
        example: The question and its answer.
        prompt: The prompt that the search uses.
        retests: Other prompts for the question; the re-test runs right paths on them.
    """

    place: int
    task: str
    example: Example
    prompt: Prompt
    retests: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Questions of one task that are searched together."""

    number: int  # of the batch in the search, from 0
    questions: tuple[SearchQuestion, ...]

    @property
    def task(self) -> str:
        """The name of the questions' task."""
        return self.questions[0].task

    @property
    def num_characters(self) -> int:
        """Characters of all prompts and continuations, as a measure of the work."""
        return sum(_count_characters(question) for question in self.questions)

    @property
    def key(self) -> str:
        """The batch's name among the kept results: its number, and a hash of its questions."""
        questions = [(question.place, question.example.id) for question in self.questions]
        return f"batch {self.number} {hash_values([(self.task, questions)])[:16]}"


class TaskExamples(NamedTuple):
    """A task, and the examples that a search may draw from the task."""

    task: Task
    examples: list[Example]


class Shard(NamedTuple):
    """One part of a search that is divided among machines."""

    part: int  # number of this part, from 1
    num_parts: int


def collect_questions(source: QuestionSource | None, config: SearchConfig) -> list[SearchQuestion]:
    """Return the questions of a search, each question once.

    Three steps choose the questions of a task. First `config.limit` questions are drawn. Then the
    shard is taken, so all shards together have `config.limit` questions. Last, questions that an
    earlier task has too are left out, with a warning. So other tasks never change which questions
    are drawn from a task.

    Args:
        source: Where the questions come from. Of a task, the questions in `config.split` are
            loaded; examples and rows are all used. None stands for the tasks of `config.dataset`.
            A question without an id gets one from its text.
        config: The settings.

    Raises:
        ConfigError: A setting has no effect, or a package is missing.
        TaskError: A task is unknown, a task or a shard has no questions, or a reward doesn't fit a
            task. Or two questions of a task have the same id, or the list holds something else.
    """
    shard = _check_settings(config)
    if source is None:
        source = select_tasks(config)
    elif isinstance(source, (str, Path)):
        source = get_tasks(str(source), trust_code=config.trust_task_code)
    groups = _load_examples(source, config)
    groups = _apply_prompt_settings(groups, config)
    rewards = _choose_rewards([group.task for group in groups], config)
    questions = _draw_questions(groups, rewards, config, shard)
    if not questions:
        raise TaskError(f"--shard {config.shard} holds no questions; give fewer shards")
    return questions


def select_tasks(config: SearchConfig) -> list[Task]:
    """Return the tasks that the settings name, after checking the settings.

    Raises:
        ConfigError: A setting has no effect, or no task is named.
        TaskError: A task is unknown, or its file can't be read.
    """
    _check_settings(config)
    return get_tasks(require_tasks(config.dataset), trust_code=config.trust_task_code)


def _check_settings(config: SearchConfig) -> Shard | None:
    """Refuse settings without effect; return the shard, or None for the whole search."""
    config.check_effects()
    _check_strategy_settings(config)
    if config.shard is None:
        return None
    return parse_shard(config.shard)


def _draw_questions(
    groups: Sequence[TaskExamples],
    rewards: Sequence[str],
    config: SearchConfig,
    shard: Shard | None,
) -> list[SearchQuestion]:
    """Choose the questions of each task in the three steps of `collect_questions`."""
    questions: list[SearchQuestion] = []
    earlier_keys: set[str] = set()  # keys of the questions of earlier tasks
    first_questions: dict[tuple[str, str], str] = {}  # (task, id) → the question with this id
    num_copies = 0
    for group, reward in zip(groups, rewards, strict=True):
        examples = choose(group.examples, config.limit, config.seed)
        for example in examples:
            if shard is not None and not is_in_shard(example, shard):
                continue
            if question_key(example.question) in earlier_keys:
                num_copies += 1
                continue
            if not example.id:
                example = replace(example, id=_make_id(example))
            _refuse_same_id(group.task, example, first_questions)
            first_questions[group.task.name, example.id] = example.question
            question = build_question(group.task, example, reward, place=len(questions))
            questions.append(question)
        earlier_keys.update(question_key(example.question) for example in examples)
    if num_copies > 0:
        logger.warning(
            "questions left out, since an earlier task of this search has them too: %d", num_copies
        )
    return questions


def _make_id(example: Example) -> str:
    """Return a hash of the question as its id; targets without an id get theirs in this way too."""
    return hashlib.sha256(example.question.encode()).hexdigest()[:16]


def _refuse_same_id(
    task: Task, example: Example, first_questions: Mapping[tuple[str, str], str]
) -> None:
    """Refuse a question with the id of an earlier one, since their records can't be told apart."""
    first = first_questions.get((task.name, example.id))
    if first is not None:
        raise TaskError(
            f"two questions of task {task.name!r} have the id {example.id!r}, "
            f"{first[:MAX_QUESTION]!r} and {example.question[:MAX_QUESTION]!r}; give each an id of "
            f"its own, or leave one out"
        )


def build_question(task: Task, example: Example, reward: str, place: int = 0) -> SearchQuestion:
    """Return a question of a task with all its prompts."""
    prompt, *retests = task.prompts(example, reward)
    return SearchQuestion(
        place=place, task=task.name, example=example, prompt=prompt, retests=tuple(retests)
    )


def split_into_batches(questions: Sequence[SearchQuestion], size: int) -> list[Batch]:
    """Split questions into batches of at most `size`.

    The questions of a batch have the same task. They are of similar length, which keeps the padding
    small.
    """
    by_task: dict[str, list[SearchQuestion]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    batches: list[Batch] = []
    for task_questions in by_task.values():
        by_length = sorted(task_questions, key=_count_characters)
        for start in range(0, len(by_length), size):
            batch = Batch(len(batches), tuple(by_length[start : start + size]))
            batches.append(batch)
    return batches


def _count_characters(question: SearchQuestion) -> int:
    """Count the characters of a question's prompt and its continuations; at least 1."""
    texts = [question.prompt.text, *question.prompt.continuations]
    return max(1, sum(len(text) for text in texts))  # progress is a share of them


def parse_shard(text: str) -> Shard:
    """Read the value of `--shard`, such as `1/8`.

    Raises ConfigError if the value isn't valid or names the whole search.
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is not None:
        shard = Shard(int(match[1]), int(match[2]))
        if shard == (1, 1):
            raise ConfigError("--shard 1/1 is the whole search and has no effect; leave it out")
        if 1 <= shard.part <= shard.num_parts:
            return shard
    raise ConfigError(
        f"--shard is {text!r}; give i/n with i from 1 to n, for example 1/8 for the first of eight"
    )


def is_in_shard(example: Example, shard: Shard) -> bool:
    """Tell whether a question belongs to a shard; this depends only on the question's text."""
    # The hash of `find_split` can't be used: within a split its values are close together, so most
    # shards would be empty. The prefix gives another hash.
    number = hash_text(f"shard:{question_key(example.question)}")
    return number % shard.num_parts == shard.part - 1


def _check_strategy_settings(config: SearchConfig) -> None:
    """Refuse a setting that only another strategy reads, unless it has its default value."""
    defaults = SearchConfig()
    for strategy in STRATEGIES:
        if strategy == config.strategy:
            continue
        for name in STRATEGIES.get(strategy).own_settings:
            value = getattr(config, name)
            if value != getattr(defaults, name):
                raise ConfigError(
                    f"{to_flag(name)} {value:g} has no effect with --strategy "
                    f"{config.strategy}; leave it out, or choose --strategy {strategy}"
                )


def _load_examples(
    source: Sequence[Task] | Sequence[Example] | Sequence[Row], config: SearchConfig
) -> list[TaskExamples]:
    """Return the examples by task; the tasks of the list come first, then its examples and rows."""
    check_data_dir(config.data_dir)  # a wrong folder is refused even if no task reads it
    groups: list[TaskExamples] = []
    examples_by_task: dict[str, list[Example]] = {}
    rows: list[Row] = []
    for item in source:
        if isinstance(item, Task):
            examples = load_questions(item, config.split, config.data_dir)
            groups.append(TaskExamples(item, examples))
        elif isinstance(item, Example):
            examples_by_task.setdefault(item.task, []).append(item)
        elif isinstance(item, Mapping):
            rows.append(item)
        else:
            raise TaskError(
                f"the questions hold {str(item)[:MAX_QUESTION]!r} ({type(item).__name__}); give a "
                f"list of tasks, examples or rows, or one string with the names of tasks, "
                f"separated by commas"
            )
    for name, examples in examples_by_task.items():
        groups.append(TaskExamples(get_task(name), examples))
    if rows:
        task = FileTask(Path("examples"), (), enumerate(rows, start=1))
        groups.append(TaskExamples(task, task.all_examples))
    if not groups:
        raise TaskError("there are no questions; give tasks or examples")
    return groups


def _apply_prompt_settings(
    groups: Sequence[TaskExamples], config: SearchConfig
) -> list[TaskExamples]:
    """Apply `--reward FILE.py:FUNCTION`, `--num-fewshot` and `--max-new-tokens` to the tasks.

    A task that a setting changes is wrapped in a task that makes the changed prompts.
    """
    max_new_tokens = config.max_new_tokens
    groups = list(groups)
    if (
        config.reward is not None and PYTHON_FUNCTION in config.reward
    ):  # a function in a user's file
        groups = [
            TaskExamples(GradedTask(group.task, config.reward, max_new_tokens), group.examples)
            for group in groups
        ]
        max_new_tokens = None  # the graded tasks apply it
    if config.num_fewshot or max_new_tokens is not None:
        groups = [_add_worked_examples(group, config, max_new_tokens) for group in groups]
    return groups


def _add_worked_examples(
    group: TaskExamples, config: SearchConfig, max_new_tokens: int | None
) -> TaskExamples:
    """Return the task with `--num-fewshot` worked examples before each question.

    The worked examples are left out of the questions to search. Without `--num-fewshot` the task
    only gets the limit `max_new_tokens`.
    """
    task, examples = group
    if config.num_fewshot is None:
        return TaskExamples(WorkedTask(task, (), max_new_tokens), examples)
    num_shots = config.num_fewshot
    # A task of the harness may come with worked examples.
    if any(getattr(task, "num_shots", {}).values()):
        raise ConfigError(
            f"--num-fewshot has no effect on {task.name}, which has worked examples of its own; "
            f"leave it out"
        )
    pool = [example for example, _ in task.shots(config.split, config.data_dir)]
    if len(pool) < num_shots:
        raise TaskError(
            f"--num-fewshot is {num_shots}, but {task.name} has only {len(pool)} questions for "
            f"worked examples; give at most {len(pool)}"
        )
    shots = choose(pool, num_shots, config.seed)
    remaining = [example for example in examples if example not in shots]
    return TaskExamples(WorkedTask(task, shots, max_new_tokens), remaining)


def _choose_rewards(tasks: Sequence[Task], config: SearchConfig) -> list[str]:
    """Return the name of each task's reward; refuse a `--reward` or `--no-kl` that doesn't fit."""
    rewards = [task.check_reward(config.reward) for task in tasks]
    for reward in rewards:
        check_installed(reward)
    if not config.kl and not all(task.has_answers for task in tasks):
        raise ConfigError("--no-kl leaves no reward for prompts without answers; leave it out")
    if config.reward is not None:
        names = config.reward.split(",")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--reward names {name!r} twice; name it once")
    return rewards
