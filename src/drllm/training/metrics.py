"""How well routers hit their labels: counts that add up, and the ratios made of them.

Owns the numbers that a line of `metrics.jsonl` holds. Counts come first because they can be summed
over batches; ratios can't.

Axes: B rows, L layers, C = 3 decisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drllm.models.routers import NUM_DECISIONS

NAMES = ("skip", "execute", "repeat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was counted over some examples.

    Attributes:
        confusion: `[C][C]`: layers by label (row) and by the decision of largest logit (column).
        executions: What those decisions cost over all examples, in layer equivalents.
        examples: How many examples.
        loss: Sum over the examples of their losses (each a mean over layers).
    """

    confusion: tuple[tuple[int, ...], ...] = ((0,) * NUM_DECISIONS,) * NUM_DECISIONS
    executions: int = 0
    examples: int = 0
    loss: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        """Return the counts over both sets of examples."""
        return Counts(
            confusion=tuple(
                tuple(ours + theirs for ours, theirs in zip(row, added, strict=True))
                for row, added in zip(self.confusion, other.confusion, strict=True)
            ),
            executions=self.executions + other.executions,
            examples=self.examples + other.examples,
            loss=self.loss + other.loss,
        )


def count(logits: Tensor, labels: Tensor, loss: float) -> Counts:
    """Count a batch.

    Args:
        logits: `[B, L, C]`.
        labels: `[B, L]` of 0, 1, 2.
        loss: Mean loss of the batch.

    Returns:
        The counts; decisions that would skip every layer cost 1, for one is always executed.
    """
    decided = logits.argmax(dim=-1)  # [B, L]
    cells = torch.bincount(
        (labels * NUM_DECISIONS + decided).flatten(), minlength=NUM_DECISIONS**2
    ).tolist()
    return Counts(
        confusion=tuple(
            tuple(cells[label * NUM_DECISIONS : (label + 1) * NUM_DECISIONS])
            for label in range(NUM_DECISIONS)
        ),
        executions=int(decided.sum(dim=1).clamp(min=1).sum()),
        examples=len(labels),
        loss=loss * len(labels),
    )


def ratios(counts: Counts) -> dict[str, float | None]:
    """Turn counts into the metrics of a line of `metrics.jsonl`.

    Args:
        counts: Of at least one example.

    Returns:
        `routers_loss` (mean over examples and layers), `macro_f1` (mean of the F1 that are
        defined), `f1_*` (None where a class is neither a label nor decided), `acc_skip` and
        `acc_repeat` (share of a class' labels that were hit; None where it has none), `avg_layers`
        (mean executions of the decisions, each read off its own teacher-forced input).

    Example:
        >>> ratios(Counts(confusion=((1, 1, 0), (0, 2, 0), (0, 0, 0)), executions=3, examples=1))
        ... # doctest: +NORMALIZE_WHITESPACE
        {'routers_loss': 0.0, 'macro_f1': 0.7333333333333334, 'f1_skip': 0.6666666666666666,
         'f1_execute': 0.8, 'f1_repeat': None, 'acc_skip': 0.5, 'acc_repeat': None,
         'avg_layers': 3.0}
    """
    hits = [counts.confusion[label][label] for label in range(NUM_DECISIONS)]
    labelled = [sum(row) for row in counts.confusion]
    decided = [sum(column) for column in zip(*counts.confusion, strict=True)]
    f1 = [
        _ratio(2 * hit, of_label + of_decision)
        for hit, of_label, of_decision in zip(hits, labelled, decided, strict=True)
    ]
    defined = [value for value in f1 if value is not None]
    return {
        "routers_loss": counts.loss / counts.examples,
        "macro_f1": sum(defined) / len(defined),
        **{f"f1_{name}": value for name, value in zip(NAMES, f1, strict=True)},
        "acc_skip": _ratio(hits[0], labelled[0]),
        "acc_repeat": _ratio(hits[2], labelled[2]),
        "avg_layers": counts.executions / counts.examples,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
