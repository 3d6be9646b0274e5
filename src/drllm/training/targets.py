"""Which targets a base model can be trained on, as it reads them.

Owns tokenising the prompts, and setting targets aside that this model can't run: what is wrong
with a line alone is an error when its file is read (`records`), but whether a prompt fits shows
only with the model. A few of thousands are left out, counted and told; many are the sign of
another model's file, and refused. Leaves pooling to `features`.

Axes: N targets, T tokens, L layers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drllm.errors import RecordError
from drllm.models.base.prompts import context_length, encode
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import RejectedQuestion, SupervisionRecord, to_lines, write_atomically

TOO_LONG = "longer than the base model's context"
NO_TOKENS = "prompt without tokens"
OVERFLOWS = "hidden states that are NaN or infinite"
REJECTED_FILE = "rejected.jsonl"
MOST_SET_ASIDE = 0.1
"""Share of the targets that may be set aside; one of them always may."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets:
    """Targets that the base model can run.

    Attributes:
        records: `[N]`, in the order of the file.
        prompts: `[N]`: the tokens of each, `[T]`, at least one.
        labels: `[N, L]` int64: the target paths' decisions.
        rejected: Targets that were set aside, in the order of the file.
        total: How many there were with these.
    """

    records: tuple[SupervisionRecord, ...]
    prompts: tuple[list[int], ...]
    labels: Tensor
    rejected: tuple[RejectedQuestion, ...]
    total: int

    def hashes(self) -> dict[str, Any]:
        """Return their number and hashes, what the features are of: `N`, tokens and decisions."""
        prompts, decisions = hashlib.sha256(), hashlib.sha256()
        for tokens, record in zip(self.prompts, self.records, strict=True):
            prompts.update(repr(tokens).encode())
            decisions.update(repr(record.optimal_layer_config).encode())
        return {
            "number": len(self.records),
            "prompts_sha256": prompts.hexdigest(),
            "decisions_sha256": decisions.hexdigest(),
        }


def targets_for(
    routed: RoutedModel, tokenizer: Any, records: Sequence[SupervisionRecord]
) -> Targets:
    """Tokenise the targets, and set aside those whose prompts the model can't read.

    Args:
        routed: The base model.
        tokenizer: Its tokenizer.
        records: The targets.

    Raises:
        RecordError: No targets; one for another number of layers, which shows that the file is
            another model's; too many that would have to be set aside.
    """
    if not records:
        raise RecordError("there are no targets to train on; search more questions")
    context = context_length(routed.model)
    kept, prompts, rejected = [], [], []
    for record in records:
        if len(record.optimal_layer_config) != routed.num_layers:
            raise RecordError(
                f"question {record.id!r}: its target has {len(record.optimal_layer_config)} "
                f"layers, the base model has {routed.num_layers}; give targets that were searched "
                f"with this model"
            )
        tokens = encode(tokenizer, record.prompt)
        if not tokens:
            rejected.append(set_aside(record, NO_TOKENS))
        elif context is not None and len(tokens) > context:
            rejected.append(set_aside(record, TOO_LONG))
        else:
            kept.append(record)
            prompts.append(tokens)
    if are_too_many(len(rejected), len(records)):
        raise RecordError(
            f"{len(rejected)} of {len(records)} targets can't be used with this base model "
            f"({reasons_of(rejected)}; its context holds {context} tokens), the first is question "
            f"{rejected[0].id!r}; give targets that were searched with this model"
        )
    return Targets(
        records=tuple(kept),
        prompts=tuple(prompts),
        labels=torch.tensor([record.optimal_layer_config for record in kept]),
        rejected=tuple(rejected),
        total=len(records),
    )


def set_aside(record: SupervisionRecord, reason: str) -> RejectedQuestion:
    """Return what is told of a target that is left out."""
    return RejectedQuestion(id=record.id, task=record.task, question=record.question, reason=reason)


def are_too_many(rejected: int, total: int) -> bool:
    """Tell whether so many targets of all can't be used that something else is wrong.

    Example:
        >>> are_too_many(1, 2), are_too_many(1, 1), are_too_many(40, 400), are_too_many(41, 400)
        (False, True, False, True)
    """
    return rejected == total or rejected > max(1, MOST_SET_ASIDE * total)


def write_rejected(folder: Path, rejected: Sequence[RejectedQuestion]) -> Path | None:
    """Write `rejected.jsonl` beside the routers; where nothing was set aside, remove it.

    Returns:
        The file; None where there is none.

    Raises:
        RecordError: A folder that can't be written.
    """
    path = folder / REJECTED_FILE
    if not rejected:
        path.unlink(missing_ok=True)
        return None
    write_atomically(path, to_lines(rejected))
    return path


def reasons_of(rejected: Sequence[RejectedQuestion]) -> str:
    """Count targets that were set aside by reason, in words."""
    counts = Counter(question.reason for question in rejected)
    return ", ".join(f"{n} {reason}" for reason, n in counts.items())
