"""Tokenise the targets of a training, and set aside those that the base model can't read.

If many targets would be set aside, they must belong to another model. Then all are refused.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drllm.errors import RecordError
from drllm.model.prompts import context_length, encode
from drllm.records.supervision import RejectedQuestion, SupervisionRecord

# Why a target is set aside.
TOO_LONG = "longer than the base model's context"
NO_TOKENS = "prompt without tokens"
OVERFLOWS = "hidden states that are NaN or infinite"

REJECTED_FILE = "rejected.jsonl"
"""File in the output folder that lists the targets that were set aside."""
MAXIMUM_SET_ASIDE = 0.1
"""Maximum share of the targets that may be set aside. Of a few targets one may be set
aside, unless it is the only one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTargets:
    """The targets to train on, with the tokens of their prompts."""

    records: Sequence[SupervisionRecord]
    prompts: Sequence[Sequence[int]]  # the tokens of each record's prompt
    rejected: Sequence[RejectedQuestion]  # the targets that are set aside, not in `records`

    @property
    def decisions(self) -> list[tuple[int, ...]]:
        """The target paths of the records, as decisions."""
        return [record.optimal_layer_config for record in self.records]


def encode_targets(
    model: Any, tokenizer: Any, num_layers: int, records: Sequence[SupervisionRecord]
) -> EncodedTargets:
    """Tokenise the targets' prompts, and set aside those that the model can't read.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        num_layers: Its number of layers.
        records: The targets.

    Raises:
        RecordError: There are no targets, a target has another number of layers than the model, or
            too many targets would be set aside.
    """
    if not records:
        raise RecordError("there are no targets to train on; search more questions")
    context = context_length(model)
    usable: list[SupervisionRecord] = []
    prompts: list[list[int]] = []
    rejected: list[RejectedQuestion] = []
    for record in records:
        _check_depth(record, num_layers)
        tokens = encode(tokenizer, record.prompt)
        if not tokens:
            rejected.append(RejectedQuestion.of(record, NO_TOKENS))
        elif context is not None and len(tokens) > context:
            rejected.append(RejectedQuestion.of(record, TOO_LONG))
        else:
            usable.append(record)
            prompts.append(tokens)
    if are_too_many(len(rejected), len(records)):
        reasons = describe_reasons(rejected)
        if context is not None:
            reasons += f"; its context holds {context} tokens"
        raise RecordError(
            f"{len(rejected)} of {len(records)} targets can't be used with this base model "
            f"({reasons}); the first is question {rejected[0].id!r}; give targets that were "
            f"searched with this model"
        )
    return EncodedTargets(records=usable, prompts=prompts, rejected=rejected)


def _check_depth(record: SupervisionRecord, num_layers: int) -> None:
    """Raise RecordError if a target has another number of layers than the base model."""
    depth = len(record.optimal_layer_config)
    if depth != num_layers:
        raise RecordError(
            f"question {record.id!r}: its target has {depth} layers, the base model has "
            f"{num_layers}; give targets that were searched with this model"
        )


def are_too_many(num_rejected: int, total: int) -> bool:
    """Tell whether too many targets would be set aside; see `MAXIMUM_SET_ASIDE`.

    Args:
        num_rejected: Number of targets that would be set aside.
        total: Number of all targets.

    Example:
        >>> are_too_many(1, 2), are_too_many(1, 1), are_too_many(40, 400), are_too_many(41, 400)
        (False, True, False, True)
    """
    return num_rejected == total or num_rejected > max(1, MAXIMUM_SET_ASIDE * total)


def describe_reasons(rejected: Sequence[RejectedQuestion]) -> str:
    """Say how many targets were set aside for each reason, such as "prompt without tokens: 2"."""
    counts = Counter(question.reason for question in rejected)
    return ", ".join(f"{reason}: {number}" for reason, number in counts.items())
