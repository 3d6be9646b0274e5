"""Which questions a search asks, and in which blocks: limit, shard, like lengths together.

Owns the partition into shards and into blocks, the units that are searched together and committed
at once. Leaves where questions come from to the tasks. Loads no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.records import question_key
from drllm.tasks.base import Example, Prompt, Task, choose


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


def blocks_of(tasks: Sequence[Task], config: SearchConfig) -> list[Block]:
    """Return the questions that a search asks, in blocks.

    The limit comes before the shard, so that the shards of one limit add up to it.

    Args:
        tasks: Where the questions come from.
        config: Settings of the search.

    Raises:
        ConfigError: A shard that makes no sense.
        TaskError: No questions in a task, or none in this shard.
    """
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    shard = None if config.shard is None else parse_shard(config.shard)
    blocks: list[Block] = []
    before = 0
    for task in tasks:
        examples = choose(task.examples(config.split, data_dir), config.limit, config.seed)
        if not examples:
            raise TaskError(f"task {task.name!r} has no questions in split {config.split!r}")
        if shard is not None:
            examples = [example for example in examples if in_shard(example, *shard)]
        # Questions of like length make a block: little of the batch is then padding.
        reward = task.check_reward(config.reward)
        by_length = sorted(
            range(len(examples)), key=lambda place: _length(task.prompt(examples[place], reward))
        )
        for start in range(0, len(examples), config.block_size):
            part = by_length[start : start + config.block_size]
            asked = tuple(examples[place] for place in part)
            blocks.append(Block(len(blocks), task, asked, tuple(before + place for place in part)))
        before += len(examples)
    if not blocks:
        raise TaskError(f"--shard {config.shard} holds no questions; give fewer shards")
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
