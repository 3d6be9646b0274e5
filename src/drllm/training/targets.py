"""The targets that a base model can be trained on, tokenised.

A target whose prompt this model can't read is set aside and counted; if many are, the file belongs
to another model, and it is refused.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from drllm.errors import RecordError
from drllm.models.base.prompts import context_length, encode
from drllm.records.supervision import RejectedQuestion, SupervisionRecord

TOO_LONG = "longer than the base model's context"
NO_TOKENS = "prompt without tokens"
OVERFLOWS = "hidden states that are NaN or infinite"
REJECTED_FILE = "rejected.jsonl"
MAXIMUM_SET_ASIDE = 0.1  # share of the targets that may be set aside; one of them always may


def targets_for(
    model: Any, tokenizer: Any, num_layers: int, records: Sequence[SupervisionRecord]
) -> tuple[list[SupervisionRecord], list[list[int]], list[RejectedQuestion]]:
    """Return the targets that the model can read, their tokens, and those that are set aside."""
    if not records:
        raise RecordError("there are no targets to train on; search more questions")
    context = context_length(model)
    kept, prompts, rejected = [], [], []
    for record in records:
        if len(record.optimal_layer_config) != num_layers:
            raise RecordError(
                f"question {record.id!r}: its target has {len(record.optimal_layer_config)} "
                f"layers, the base model has {num_layers}; give targets that were searched with "
                f"this model"
            )
        tokens = encode(tokenizer, record.prompt)
        if not tokens:
            rejected.append(RejectedQuestion.of(record, NO_TOKENS))
        elif context is not None and len(tokens) > context:
            rejected.append(RejectedQuestion.of(record, TOO_LONG))
        else:
            kept.append(record)
            prompts.append(tokens)
    if are_too_many(len(rejected), len(records)):
        raise RecordError(
            f"{len(rejected)} of {len(records)} targets can't be used with this base model "
            f"({reasons_of(rejected)}; its context holds {context} tokens), the first is "
            f"question {rejected[0].id!r}; give targets that were searched with this model"
        )
    return kept, prompts, rejected


def are_too_many(rejected: int, total: int) -> bool:
    """Tell whether so many targets of all can't be used that something else must be wrong.

    Example:
        >>> are_too_many(1, 2), are_too_many(1, 1), are_too_many(40, 400), are_too_many(41, 400)
        (False, True, False, True)
    """
    return rejected == total or rejected > max(1, MAXIMUM_SET_ASIDE * total)


def reasons_of(rejected: Sequence[RejectedQuestion]) -> str:
    """Count targets that were set aside by reason, in words."""
    counts = Counter(question.reason for question in rejected)
    return ", ".join(f"{n} {reason}" for reason, n in counts.items())
