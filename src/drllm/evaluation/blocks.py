"""A system's questions in blocks: asked together, and kept together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

from drllm.evaluation.lm_eval.scoring import Answer
from drllm.paths import Decisions

Answers: TypeAlias = list[list[Answer | str]]
"""For each question, the answers to its requests."""
Block: TypeAlias = Sequence[int]
"""Places of the questions that are asked together."""

LEAST_SCORED = 64
"""Questions of a block whose options are scored: seconds of work, which hide the file's writing."""
LEAST_GENERATED = 1
"""Questions of a block that answers are generated to: a batch takes long enough by itself."""


class Answered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What some questions were answered under all draws of a system; `seconds` is the first's time.

    `routes` has every question's decisions; it is empty where a path can't be expressed.
    """

    answers: list[Answers]
    routes: list[list[Decisions]]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if len({*map(len, self.answers), *map(len, self.routes)}) != 1:
            raise ValueError("not as many questions in every draw")


def blocks_of(lengths: Sequence[int], least: int, batch_size: int) -> list[Block]:
    """Return the questions of a task in blocks, the longest first.

    Questions of like length make a block, so that batches inside of it are padded no more than if
    all questions were batched together; a block's size is a multiple of the batch's. The same
    lengths always give the same blocks.

    Args:
        lengths: Of each question, in tokens.
        least: Questions of a block, at least; the last one has what is left.
        batch_size: Questions a batch.

    Source: ours.

    Example:
        >>> blocks_of([5, 9, 7], least=1, batch_size=2)
        [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    size = batch_size * math.ceil(least / batch_size)
    return [order[start : start + size] for start in range(0, len(order), size)]


def joined(blocks: Sequence[Block], answered: Sequence[Answered]) -> Answered:
    """Return the answers of all blocks as those of all questions, in the questions' order."""
    places = [place for block in blocks for place in block]
    order = sorted(range(len(places)), key=places.__getitem__)

    def in_order(parts: Sequence[Sequence[list[Any]]]) -> list[list[Any]]:
        draws = [list(itertools.chain.from_iterable(draw)) for draw in zip(*parts, strict=True)]
        return [[draw[position] for position in order] for draw in draws]

    return Answered(
        answers=in_order([each.answers for each in answered]),
        routes=in_order([each.routes for each in answered]),
        seconds=sum(each.seconds for each in answered),
    )
