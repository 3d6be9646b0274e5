"""Which questions a search asks, and how each is asked; the batches they are searched in.

Examples are loaded and prompts built here, once. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from drllm.config import SearchConfig
from drllm.config.fields import flag_of, required_tasks
from drllm.errors import ConfigError, TaskError
from drllm.listener import logger
from drllm.records.splits import hash_of, question_key
from drllm.search.strategies import STRATEGIES
from drllm.tasks.base import Example, Prompt, Row, Task, check_data_dir, choose, questions_in
from drllm.tasks.files import FileTask
from drllm.tasks.graded import SUFFIX, GradedTask
from drllm.tasks.registry import get_task, get_tasks
from drllm.tasks.rewards import check_installed
from drllm.tasks.worked import WorkedTask

Source: TypeAlias = "Path | str | Sequence[Task] | Sequence[Example] | Sequence[Row]"
"""What questions are given as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchQuestion:
    """One question of a search, with every way of asking it.

    Its place is among all questions of the search in their own order, which is that of the records;
    `retests` are the other ways of asking that a path must survive.
    """

    place: int
    task: str
    example: Example
    prompt: Prompt
    retests: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Questions of one task that are searched together; numbers are from 0."""

    number: int
    questions: tuple[SearchQuestion, ...]

    @property
    def task(self) -> str:
        """The name of their task."""
        return self.questions[0].task

    @property
    def key(self) -> str:
        """The key under which what is done of them is kept."""
        return f"batch {self.number}"


def questions_of(source: Source | None, config: SearchConfig) -> list[SearchQuestion]:
    """Return the questions that a search asks, each one once.

    The limit comes before the shard, so that the shards of one limit add up to it, and before
    copies are left out, so that what is drawn of a task doesn't depend on the others. Copies of
    questions of an earlier task are left out with a warning. The source is tasks or their names,
    whose questions of `config.split` are loaded, examples of named tasks, or rows; None for the
    tasks that `config.dataset` names.

    Settings without effect and missing packages are a ConfigError; unknown tasks, no questions in a
    task or in this shard, and rewards that a task can't grade a TaskError.
    """
    config.check_effects()
    for strategy in STRATEGIES:
        for name in STRATEGIES.get(strategy).own_settings if strategy != config.strategy else ():
            if (value := getattr(config, name)) != getattr(SearchConfig(), name):
                raise ConfigError(
                    f"{flag_of(name)} {value:g} has no effect with --strategy "
                    f"{config.strategy}; leave it out, or choose --strategy {strategy}"
                )
    shard = None if config.shard is None else parse_shard(config.shard)
    if source is None or isinstance(source, (str, Path)):
        names = required_tasks(config.dataset, "--dataset") if source is None else str(source)
        source = get_tasks(names)
    found = _examples_of(source, config)
    length = config.max_new_tokens
    if config.reward is not None and SUFFIX in config.reward:
        own = config.reward, length
        found, length = [(GradedTask(task, *own), examples) for task, examples in found], None
    if config.num_fewshot or length is not None:
        found = [_worked(*each, config, length) for each in found]
    rewards = [task.check_reward(config.reward) for task, _ in found]
    for name in rewards:
        check_installed(name)
    if not config.kl and not all(task.has_answers for task, _ in found):
        raise ConfigError(
            "--no-kl leaves nothing to search prompts without answers by; leave it out"
        )
    wanted = [] if config.reward is None else config.reward.split(",")
    for name in wanted:
        if wanted.count(name) > 1:
            raise ConfigError(f"--reward names {name!r} twice; name it once")
    questions: list[SearchQuestion] = []
    seen: set[str] = set()
    copies = 0
    for (task, examples), reward in zip(found, rewards, strict=True):
        asked = choose(examples, config.limit, config.seed)
        keys = [question_key(example.question) for example in asked]
        for example, key in zip(asked, keys, strict=True):
            if shard is not None and not in_shard(example, *shard):
                continue
            if key in seen:
                copies += 1
            else:
                questions.append(ask(task, example, reward, len(questions)))
        seen.update(keys)
    if not questions:
        raise TaskError(f"--shard {config.shard} holds no questions; give fewer shards")
    if copies:
        logger.warning(
            "questions left out, since an earlier task of this search has them too: %d", copies
        )
    return questions


def ask(task: Task, example: Example, reward: str, place: int = 0) -> SearchQuestion:
    """Return a question of a task with every way of asking it."""
    prompt, *others = task.prompts(example, reward)
    return SearchQuestion(
        place=place, task=task.name, example=example, prompt=prompt, retests=tuple(others)
    )


def batches_of(questions: Sequence[SearchQuestion], size: int) -> list[Batch]:
    """Return the questions in batches of one task each, of like length: little is then padding."""

    def length(question: SearchQuestion) -> int:
        return sum(map(len, (question.prompt.text, *question.prompt.continuations)))

    batches: list[Batch] = []
    for task in dict.fromkeys(question.task for question in questions):
        by_length = sorted((q for q in questions if q.task == task), key=length)
        for start in range(0, len(by_length), size):
            batches.append(Batch(len(batches), tuple(by_length[start : start + size])))
    return batches


def parse_shard(text: str) -> tuple[int, int]:
    """Return which part of how many a `--shard` names; a ConfigError for what makes no sense."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if part == parts == 1:
        raise ConfigError("--shard 1/1 is the whole search and has no effect; leave it out")
    if not 1 <= part <= parts:
        raise ConfigError(
            f"--shard is {text!r}; give i/n with i from 1 to n, for example 1/8 for the first of "
            f"eight"
        )
    return part, parts


def in_shard(example: Example, part: int, parts: int) -> bool:
    """Say whether a question belongs to a shard, from 1; its text alone decides, not its id."""
    # Not the hash of `split_of`: that of a split's questions fills a part of the range only.
    return hash_of(f"shard:{question_key(example.question)}") % parts == part - 1


def _worked(
    task: Task, examples: list[Example], config: SearchConfig, length: int | None
) -> tuple[Task, list[Example]]:
    """Return the task with worked examples of another split, and the questions left to ask."""
    num = config.num_fewshot or 0
    if num and any(getattr(task, "shots_of", {}).values()):
        raise ConfigError(f"--num-fewshot has no effect on {task.name}, which has its own")
    pool = [each for each, _ in task.shots(config.split, config.data_dir)] if num else []
    if len(pool) < num:
        raise TaskError(
            f"--num-fewshot is {num}, and {task.name} has {len(pool)} questions to show; give at "
            f"most {len(pool)}"
        )
    shots = choose(pool, num, config.seed)
    return WorkedTask(task, shots, length), [each for each in examples if each not in shots]


def _examples_of(
    source: Sequence[Task] | Sequence[Example] | Sequence[Row], config: SearchConfig
) -> list[tuple[Task, list[Example]]]:
    """Return the examples by task, in the order in which the tasks come first."""
    check_data_dir(config.data_dir)  # examples given from Python don't read it
    tasks = (task for task in source if isinstance(task, Task))
    found = [(task, questions_in(task, config.split, config.data_dir)) for task in tasks]
    given: dict[str, list[Example]] = {}
    for example in source:
        if isinstance(example, Example):
            given.setdefault(example.task, []).append(example)
    found += [(get_task(name), examples) for name, examples in given.items()]
    if rows := [row for row in source if isinstance(row, Mapping)]:
        given_task = FileTask(Path("examples"), (), enumerate(rows, 1))
        found.append((given_task, given_task.all))
    if not found:
        raise TaskError("no question is given; give tasks or examples")
    return found
