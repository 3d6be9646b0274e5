"""How far decisions agree with target paths: counts that add up, and the ratios made of them.

Owns the confusion of each layer and every metric of it, for whoever decided: trained routers or
`baselines`. Counts come first because they can be summed over batches, layers and processes;
ratios can't. Leaves counting what routers say to `training.metrics`. Loads no torch.

Axes: N targets, L layers, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

NAMES = ("skip", "execute", "repeat")
DECISIONS = range(len(NAMES))

Confusion: TypeAlias = tuple[tuple[float, ...], ...]
"""`[C][C]`: how often each label (row) was given each decision (column)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was counted over some targets; expected values where decisions are drawn.

    Attributes:
        confusion: `[L]` confusions, one a layer; empty where nothing was counted.
        executions: What the decisions cost over all targets, in layer equivalents.
        examples: How many targets.
        loss: Sum over the targets of their losses (each a mean over layers); None for decisions
            that aren't made from probabilities.
    """

    confusion: tuple[Confusion, ...] = ()
    executions: float = 0
    examples: int = 0
    loss: float | None = 0.0

    def __add__(self, other: Counts) -> Counts:
        """Return the counts over both sets of targets.

        Raises:
            ValueError: Counts of models with different numbers of layers.
        """
        ours, theirs = self.confusion, other.confusion
        if ours and theirs:
            added = tuple(add(one, two) for one, two in zip(ours, theirs, strict=True))
        else:
            added = ours or theirs
        return Counts(
            confusion=added,
            executions=self.executions + other.executions,
            examples=self.examples + other.examples,
            loss=None if self.loss is None or other.loss is None else self.loss + other.loss,
        )

    @property
    def labels(self) -> list[list[float]]:
        """`[L][C]`: how often each decision is the label of each layer."""
        return [[sum(row) for row in layer] for layer in self.confusion]


def add(one: Confusion, other: Confusion) -> Confusion:
    """Return the confusion over both.

    Example:
        >>> add(((1, 0), (0, 2)), ((0, 1), (1, 0)))
        ((1, 1), (1, 2))
    """
    return tuple(
        tuple(ours + theirs for ours, theirs in zip(row, added, strict=True))
        for row, added in zip(one, other, strict=True)
    )


def total(layers: Sequence[Confusion]) -> Confusion:
    """Return the confusion over all layers."""
    found: Confusion = tuple((0,) * len(DECISIONS) for _ in DECISIONS)
    for layer in layers:
        found = add(found, layer)
    return found


def ratios(counts: Counts) -> dict[str, float | None]:
    """Turn counts into metrics, named as on a line of `metrics.jsonl`.

    Args:
        counts: Of at least one target.

    Returns:
        `routers_loss` (mean over targets and layers; None without losses), those of
        `hit_ratios`, and `avg_layers` (mean executions of the decisions).

    Example:
        >>> ratios(Counts(confusion=(((1, 1, 0), (0, 2, 0), (0, 0, 0)),), executions=3, examples=1))
        ... # doctest: +NORMALIZE_WHITESPACE
        {'routers_loss': 0.0, 'accuracy': 0.75, 'macro_f1': 0.7333333333333334,
         'f1_skip': 0.6666666666666666, 'f1_execute': 0.8, 'f1_repeat': None, 'acc_skip': 0.5,
         'acc_repeat': None, 'avg_layers': 3.0}
    """
    return {
        "routers_loss": None if counts.loss is None else counts.loss / counts.examples,
        **hit_ratios(total(counts.confusion)),
        "avg_layers": counts.executions / counts.examples,
    }


def hit_ratios(confusion: Confusion) -> dict[str, float | None]:
    """Return the metrics of one confusion: a layer's, or that of all layers.

    Args:
        confusion: With at least one label.

    Returns:
        `accuracy` (share of the labels that were hit), `macro_f1` (mean of the F1 that are
        defined), `f1_*` (None where a class is neither a label nor decided), `acc_skip` and
        `acc_repeat` (share of a class' labels that were hit; None where it has none).

    Source: Dr.LLM names macro-F1, F1 by class and accuracy by class; that undefined F1 are left
        out of the mean is ours.
    """
    hits = [confusion[decision][decision] for decision in DECISIONS]
    labelled = [sum(row) for row in confusion]
    decided = [sum(column) for column in zip(*confusion, strict=True)]
    f1 = [
        _ratio(2 * hit, of_label + of_decision)
        for hit, of_label, of_decision in zip(hits, labelled, decided, strict=True)
    ]
    defined = [value for value in f1 if value is not None]
    return {
        "accuracy": sum(hits) / sum(labelled),
        "macro_f1": sum(defined) / len(defined),
        **{f"f1_{name}": value for name, value in zip(NAMES, f1, strict=True)},
        "acc_skip": _ratio(hits[0], labelled[0]),
        "acc_repeat": _ratio(hits[2], labelled[2]),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
