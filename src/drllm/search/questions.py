"""Collect the questions of a search with their prompts, and split them into batches.

This module doesn't import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from drllm.config import SearchConfig
from drllm.config.fields import require_tasks, to_flag
from drllm.errors import ConfigError, TaskError
from drllm.listener import logger
from drllm.records.splits import hash_text, question_key
from drllm.search.strategies import STRATEGIES
from drllm.tasks.base import Task, check_data_dir, load_questions
from drllm.tasks.examples import Example, Prompt, Row, choose
from drllm.tasks.files import FileTask
from drllm.tasks.graded import SUFFIX, GradedTask
from drllm.tasks.registry import get_task, get_tasks
from drllm.tasks.rewards import check_installed
from drllm.tasks.worked import WorkedTask

QuestionSource: TypeAlias = "Path | str | Sequence[Task] | Sequence[Example] | Sequence[Row]"
"""Where questions come from: names of tasks, a file, tasks, examples of named tasks, or rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchQuestion:
    """One question of a search, with all its prompts.

    Attributes:
        place: Position among all questions of the search, from 0; the records are in this order.
        task: The task's name.
        example: The question and its answer.
        prompt: The prompt that the search uses.
        retests: Other prompts for the question, which a target path must answer right too.
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
        return sum(map(_num_characters, self.questions))

    @property
    def key(self) -> str:
        """The name of the batch's results on disk."""
        return f"batch {self.number}"


class TaskExamples(NamedTuple):
    """A task, and the examples that a search may draw from the task."""

    task: Task
    examples: list[Example]


class Shard(NamedTuple):
    """One part of a search that is divided among machines."""

    part: int  # from 1
    num_parts: int


def collect_questions(source: QuestionSource | None, config: SearchConfig) -> list[SearchQuestion]:
    """Return the questions of a search, each question once.

    The order of the steps matters. The limit is applied first and the shard is taken second, so the
    shards of a search add up to its limit. A question that an earlier task has too is left out
    last, with a warning. So the questions drawn from a task don't depend on other tasks.

    Args:
        source: Tasks or their names, to load the questions in `config.split`; examples of named
            tasks; or rows. None stands for the tasks that `config.dataset` names.
        config: The settings.

    Raises:
        ConfigError: A setting has no effect, or a package is missing.
        TaskError: A task is unknown, a task or a shard has no questions, or a reward doesn't fit a
            task.
    """
    config.check_effects()
    _check_strategy_settings(config)
    shard = None if config.shard is None else parse_shard(config.shard)
    if source is None:
        source = require_tasks(config.dataset, "--dataset")
    if isinstance(source, (str, Path)):
        source = get_tasks(str(source))
    groups = _load_examples(source, config)
    groups = _apply_prompt_settings(groups, config)
    rewards = _choose_rewards([group.task for group in groups], config)
    questions = _draw_questions(groups, rewards, config, shard)
    if not questions:
        raise TaskError(f"--shard {config.shard} holds no questions; give fewer shards")
    return questions


def _draw_questions(
    groups: Sequence[TaskExamples],
    rewards: Sequence[str],
    config: SearchConfig,
    shard: Shard | None,
) -> list[SearchQuestion]:
    """Draw the questions of each task; leave out other shards and copies, and warn of copies."""
    questions: list[SearchQuestion] = []
    earlier_keys: set[str] = set()  # keys of the questions of earlier tasks
    num_copies = 0
    for group, reward in zip(groups, rewards, strict=True):
        examples = choose(group.examples, config.limit, config.seed)
        for example in examples:
            if shard is not None and not in_shard(example, shard):
                continue
            if question_key(example.question) in earlier_keys:
                num_copies += 1
                continue
            question = build_question(group.task, example, reward, place=len(questions))
            questions.append(question)
        earlier_keys.update(question_key(example.question) for example in examples)
    if num_copies > 0:
        logger.warning(
            "questions left out, since an earlier task of this search has them too: %d", num_copies
        )
    return questions


def build_question(task: Task, example: Example, reward: str, place: int = 0) -> SearchQuestion:
    """Return a question of a task with all its prompts."""
    prompt, *retests = task.prompts(example, reward)
    return SearchQuestion(
        place=place, task=task.name, example=example, prompt=prompt, retests=tuple(retests)
    )


def split_into_batches(questions: Sequence[SearchQuestion], size: int) -> list[Batch]:
    """Split questions into batches; a batch has one task and similar lengths, so little padding."""
    by_task: dict[str, list[SearchQuestion]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    batches: list[Batch] = []
    for questions_of_task in by_task.values():
        by_length = sorted(questions_of_task, key=_num_characters)
        for start in range(0, len(by_length), size):
            batch = Batch(len(batches), tuple(by_length[start : start + size]))
            batches.append(batch)
    return batches


def _num_characters(question: SearchQuestion) -> int:
    """Count the characters of a question's prompt and its continuations."""
    texts = [question.prompt.text, *question.prompt.continuations]
    return sum(len(text) for text in texts)


def parse_shard(text: str) -> Shard:
    """Read the value of `--shard`, such as `1/8`. Raises ConfigError if the value isn't valid."""
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


def in_shard(example: Example, shard: Shard) -> bool:
    """Tell whether a question belongs to a shard; this depends on its text, not on its id."""
    # Another hash than `find_split`'s, which covers only a part of its range within one split.
    number = hash_text(f"shard:{question_key(example.question)}")
    return number % shard.num_parts == shard.part - 1


def _check_strategy_settings(config: SearchConfig) -> None:
    """Refuse a changed setting that only another strategy reads."""
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
    """Return the examples by task: whole tasks first, then single examples, then rows."""
    check_data_dir(config.data_dir)  # refused even if no task reads it
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
    for name, examples in examples_by_task.items():
        groups.append(TaskExamples(get_task(name), examples))
    if rows:
        task = FileTask(Path("examples"), (), enumerate(rows, start=1))
        groups.append(TaskExamples(task, task.all))
    if not groups:
        raise TaskError("there are no questions; give tasks or examples")
    return groups


def _apply_prompt_settings(
    groups: Sequence[TaskExamples], config: SearchConfig
) -> list[TaskExamples]:
    """Wrap the tasks for `--reward FILE.py:…`, `--num-fewshot` and `--max-new-tokens`."""
    max_new_tokens = config.max_new_tokens
    groups = list(groups)
    if config.reward is not None and SUFFIX in config.reward:
        groups = [
            TaskExamples(GradedTask(group.task, config.reward, max_new_tokens), group.examples)
            for group in groups
        ]
        max_new_tokens = None
    if config.num_fewshot or max_new_tokens is not None:
        groups = [_add_worked_examples(group, config, max_new_tokens) for group in groups]
    return groups


def _add_worked_examples(
    group: TaskExamples, config: SearchConfig, max_new_tokens: int | None
) -> TaskExamples:
    """Return the task with worked examples before each question; the search leaves these out."""
    task, examples = group
    num_shots = config.num_fewshot or 0
    if num_shots == 0:
        return TaskExamples(WorkedTask(task, (), max_new_tokens), examples)
    if any(getattr(task, "shots_of", {}).values()):
        raise ConfigError(f"--num-fewshot has no effect on {task.name}, which has its own")
    pool = [example for example, _ in task.shots(config.split, config.data_dir)]
    if len(pool) < num_shots:
        raise TaskError(
            f"--num-fewshot is {num_shots}, and {task.name} has {len(pool)} questions to show; "
            f"give at most {len(pool)}"
        )
    shots = choose(pool, num_shots, config.seed)
    remaining = [example for example in examples if example not in shots]
    return TaskExamples(WorkedTask(task, shots, max_new_tokens), remaining)


def _choose_rewards(tasks: Sequence[Task], config: SearchConfig) -> list[str]:
    """Return the reward of each task; refuse a reward that doesn't fit or lacks its packages."""
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
