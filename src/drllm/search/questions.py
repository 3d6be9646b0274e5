"""Which questions a search asks, and in which blocks: limit, shard, like lengths together.

Owns which questions are asked, each one once, and the partition into shards and into blocks, the
units that are searched together and committed at once. Leaves where questions come from to the
tasks. Loads no torch.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.records import question_key
from drllm.tasks.base import Example, Prompt, Task, choose

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a search asks of one task.

    Attributes:
        task: The task.
        examples: Its questions in their own order; none where the shard or earlier tasks have all.
        copies: Questions that are left out, since an earlier task of the search has them too.
    """

    task: Task
    examples: tuple[Example, ...]
    copies: int


@dataclass(frozen=True, slots=True)
class Block:
    """Questions that are searched together and committed at once.

    Attributes:
        number: From 0.
        task: The task of all of them.
        examples: At least one.
        places: For each of them, its place among all questions of the search in their own order,
            which is that of the records; empty where only the search of the block matters.
    """

    number: int
    task: Task
    examples: tuple[Example, ...]
    places: tuple[int, ...] = ()


def asked_of(tasks: Sequence[Task], config: SearchConfig) -> list[Asked]:
    """Return the questions that a search asks, each one once.

    The limit comes before the shard, so that the shards of one limit add up to it, and before
    copies are left out, so that what is drawn of a task doesn't depend on the others.

    Args:
        tasks: Where the questions come from.
        config: Settings of the search.

    Raises:
        ConfigError: A shard that makes no sense.
        TaskError: No questions in a task, or none in this shard.
    """
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    shard = None if config.shard is None else parse_shard(config.shard)
    asked: list[Asked] = []
    seen: set[str] = set()
    for task in tasks:
        examples = choose(task.examples(config.split, data_dir), config.limit, config.seed)
        if not examples:
            raise TaskError(f"task {task.name!r} has no questions in split {config.split!r}")
        if shard is not None:
            examples = [example for example in examples if in_shard(example, *shard)]
        keys = [question_key(example.question) for example in examples]
        kept = [e for e, key in zip(examples, keys, strict=True) if key not in seen]
        seen.update(keys)
        asked.append(Asked(task, tuple(kept), len(examples) - len(kept)))
    if not any(one.examples for one in asked):
        raise TaskError(f"--shard {config.shard} holds no questions; give fewer shards")
    return asked


def blocks_of(tasks: Sequence[Task], config: SearchConfig) -> list[Block]:
    """Return the questions that a search asks, in blocks; copies are left out with a warning.

    Args:
        tasks: Where the questions come from.
        config: Settings of the search.

    Raises:
        ConfigError: A shard that makes no sense.
        TaskError: No questions in a task, or none in this shard.
    """
    blocks: list[Block] = []
    before = 0
    asked = asked_of(tasks, config)
    if copies := sum(one.copies for one in asked):
        logger.warning(
            "questions left out, since an earlier task of this search has them too: %d", copies
        )
    for one in asked:
        task, examples = one.task, one.examples
        # Questions of like length make a block: little of the batch is then padding.
        reward = task.check_reward(config.reward)
        by_length = sorted(
            range(len(examples)), key=lambda place: _length(task.prompt(examples[place], reward))
        )
        for start in range(0, len(examples), config.block_size):
            part = by_length[start : start + config.block_size]
            of_block = tuple(examples[place] for place in part)
            places = tuple(before + place for place in part)
            blocks.append(Block(len(blocks), task, of_block, places))
        before += len(examples)
    return blocks


def num_questions(blocks: Sequence[Block]) -> int:
    """Return how many questions the blocks hold."""
    return sum(len(block.examples) for block in blocks)


def parse_shard(text: str) -> tuple[int, int]:
    """Return which part of how many a `--shard` names.

    Raises:
        ConfigError: Not of the form i/n, a part that doesn't exist, or one part of one.

    Example:
        >>> parse_shard("2/8")
        (2, 8)
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None:
        raise ConfigError(f"--shard is {text!r}; give i/n, for example 1/8 for the first of eight")
    part, parts = int(match[1]), int(match[2])
    if parts == 1 and part == 1:
        raise ConfigError("--shard 1/1 is the whole search and has no effect; leave it out")
    if not 1 <= part <= parts:
        raise ConfigError(
            f"--shard is {text!r}; of {parts} parts the first is 1/{parts}, the last "
            f"{parts}/{parts}"
            if parts
            else f"--shard is {text!r}; give at least two parts, for example 1/2"
        )
    return part, parts


def in_shard(example: Example, part: int, parts: int) -> bool:
    """Say whether a question belongs to a shard; its text alone decides.

    Copies of a question land in the same shard, whatever their ids.

    Args:
        example: The question.
        part: Number of the shard, from 1.
        parts: Shards in all.

    Source: ours.
    """
    # Not the hash of `split_of`: that of a split's questions fills a part of the range only.
    digest = hashlib.sha256(f"shard:{question_key(example.question)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % parts == part - 1


def _length(prompt: Prompt) -> int:
    return len(prompt.text) + sum(len(text) for text in prompt.continuations)
