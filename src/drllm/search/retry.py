"""Questions that can't be searched: tried again alone, set aside at last, and never in the way.

Owns how often a question is tried, which errors are a question's own, and the record of one that
was given up. Any other error is a defect, or a fault of the machine, and ends the search.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from drllm.config import SearchConfig
from drllm.errors import ConfigError, ModelError, RoutingError, TaskError
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import FailedQuestion, SearchRecord, to_lines
from drllm.search.block import OnRound, search_block
from drllm.search.counts import Tally, tally
from drllm.search.questions import Block
from drllm.tasks.base import Example

ATTEMPTS = 3
QUESTION_ERRORS = (
    ConfigError,  # a prompt that the chat template refuses
    ModelError,  # log-probabilities that are not finite, a prompt beyond the model's context
    RoutingError,
    TaskError,
    torch.cuda.OutOfMemoryError,  # a prompt too long for the device
)
"""What a single question can cause."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Searched:
    """A block after its search, ready to be committed.

    Attributes:
        lines: A line of JSON for each question: its record, or why it was set aside.
        tally: What the lines hold, counted.
    """

    lines: str
    tally: Tally


def searched(
    routed: RoutedModel, block: Block, config: SearchConfig, on_round: OnRound | None = None
) -> Searched:
    """Search a block, setting aside the questions that fail every time.

    A block that fails as a whole is searched question by question, which gives the same records:
    a question's tree doesn't depend on its neighbours.

    Args:
        routed: The model, made with its tokenizer.
        block: The questions.
        config: Settings of the search.
        on_round: See `OnRound`; called while the block is searched as a whole.
    """
    records: list[SearchRecord] = []
    failed: list[FailedQuestion] = []
    try:
        records = search_block(routed, block.examples, block.task, config, on_round)
    except QUESTION_ERRORS as error:
        logger.info("a block of %d questions failed: %s", len(block.examples), error)
        for example in block.examples:
            result = _alone(routed, block, example, config)
            if isinstance(result, SearchRecord):
                records.append(result)
            else:
                failed.append(result)
    return Searched(to_lines([*records, *failed]), tally(records, failed))


def _alone(
    routed: RoutedModel, block: Block, example: Example, config: SearchConfig
) -> SearchRecord | FailedQuestion:
    """Search one question of a block that has failed, which was its first attempt."""
    reason = ""
    for _ in range(ATTEMPTS - 1):
        result = _attempt(routed, block, example, config)
        if isinstance(result, SearchRecord):
            return result
        reason = f"{type(result).__name__}: {' '.join(str(result).split())}"
    return _set_aside(block, example, reason, ATTEMPTS)


def _attempt(
    routed: RoutedModel, block: Block, example: Example, config: SearchConfig
) -> SearchRecord | Exception:
    try:
        return search_block(routed, [example], block.task, config)[0]
    except QUESTION_ERRORS as error:
        return error


def _set_aside(block: Block, example: Example, error: str, attempts: int) -> FailedQuestion:
    return FailedQuestion(
        id=example.id,
        task=block.task.name,
        question=example.question,
        error=error,
        attempts=attempts,
    )


def given_up(block: Block, error: str, attempts: int) -> Searched:
    """Return what is committed for a block of which no question can be searched."""
    failed = [_set_aside(block, example, error, attempts) for example in block.examples]
    return Searched(to_lines(failed), tally([], failed))
