"""What decisions that ignore the question would score, and whether routers beat them.

Owns the three trivial ways of deciding, counted on the same targets by the same counts as routers:
always execute; each layer's commonest label of the targets trained on; and each layer's decision
drawn as often as it was a label there, of which expected counts are computed, nothing is drawn.
Leaves the metrics to `agreement`. Loads no torch.

Axes: L layers, C = 3 decisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from drllm.paths import Decision
from drllm.supervision.agreement import DECISIONS, Counts, ratios

Labels: TypeAlias = Sequence[Sequence[float]]
"""`[L][C]`: how often each decision is the label of each layer."""

ROUTERS = "routers"
ALWAYS_EXECUTE = "always_execute"
LABEL_FREQUENCY = "label_frequency"
LAYER_MAJORITY = "layer_majority"
TRAIN, VALIDATION = "train", "validation"
JUDGED = (("macro_f1", "macro-F1"), ("accuracy", "accuracy"))


def baselines(labels: Labels, trained: Labels) -> dict[str, Counts]:
    """Count how the trivial ways of deciding fare, by name.

    Args:
        labels: Of the targets that are judged; each layer has as many.
        trained: Of the targets trained on, from which majority and frequencies come.
    """
    execute = [int(Decision.EXECUTE)] * len(labels)
    return {
        ALWAYS_EXECUTE: drawn(labels, [_only(decision) for decision in execute]),
        LABEL_FREQUENCY: drawn(labels, [[n / sum(layer) for n in layer] for layer in trained]),
        LAYER_MAJORITY: drawn(labels, [_only(decision) for decision in majority(trained)]),
    }


def majority(labels: Labels) -> list[int]:
    """Return each layer's commonest label, `[L]`; of equally common ones execute, else skip.

    Example:
        >>> majority([[3, 1, 0], [2, 2, 0], [2, 0, 2]])
        [0, 1, 0]
    """
    order = (int(Decision.EXECUTE), int(Decision.SKIP), int(Decision.REPEAT))
    return [max(order, key=lambda decision: layer[decision]) for layer in labels]


def drawn(labels: Labels, shares: Sequence[Sequence[float]]) -> Counts:
    """Return the expected counts of decisions that are drawn without looking at the question.

    Args:
        labels: `[L][C]`, of the targets.
        shares: `[L][C]`: the probability of each decision; layers are drawn one by one.

    Returns:
        Expected counts; decisions that skip every layer cost 1, as everywhere.

    Source: ours.

    Example:
        >>> drawn([[1, 3, 0]], [[0.5, 0.5, 0.0]]).confusion[0][:2]
        ((0.5, 0.5, 0.0), (1.5, 1.5, 0.0))
    """
    examples = sum(labels[0])
    mean = sum(decision * layer[decision] for layer in shares for decision in DECISIONS)
    skips_all = math.prod(layer[int(Decision.SKIP)] for layer in shares)
    return Counts(
        confusion=tuple(
            tuple(tuple(n * share for share in layer) for n in row)
            for row, layer in zip(labels, shares, strict=True)
        ),
        executions=examples * (mean + skips_all),
        examples=int(examples),
        loss=None,
    )


def beside(routers: Counts, trained: Labels) -> dict[str, Counts]:
    """Return the counts of routers and those of the baselines on the same targets, by name."""
    return {ROUTERS: routers, **baselines(routers.labels, trained)}


def verdict(parts: Mapping[str, Mapping[str, Counts]]) -> str:
    """Say in one sentence whether routers beat the best baseline on targets they haven't learnt.

    Args:
        parts: Of `TRAIN`, and of `VALIDATION` where targets were held out: what `beside` returns.
    """
    if VALIDATION not in parts:
        return (
            "No targets were held out, so nothing says whether the routers beat decisions that "
            "ignore the question."
        )
    systems = parts[VALIDATION]
    scores = {name: ratios(counts) for name, counts in systems.items()}
    told, better = [], []
    for key, title in JUDGED:
        values = {name: score[key] or 0.0 for name, score in scores.items()}
        ours = values.pop(ROUTERS)
        best = max(values, key=lambda name: values[name])
        better.append(ours > values[best])
        told.append(f"{title} {ours:.3f} against {values[best]:.3f} ({shown(best)})")
    names = [title for _, title in JUDGED]
    if all(better):
        what = "beat the best baseline in both macro-F1 and accuracy"
    elif any(better):
        won, lost = names[better.index(True)], names[better.index(False)]
        what = f"beat the best baseline in {won}, but not in {lost}"
    else:
        what = "beat the best baseline neither in macro-F1 nor in accuracy"
    return f"On {systems[ROUTERS].examples} held-out targets the routers {what}: {', '.join(told)}."


def by_layer(systems: Mapping[str, Counts]) -> str:
    """Say in one sentence at how many layers routers hit more labels than the layer's majority.

    Args:
        systems: What `beside` returns.
    """
    ours, theirs = (_hits(systems[name]) for name in (ROUTERS, LAYER_MAJORITY))
    gained = [one - other for one, other in zip(ours, theirs, strict=True)]
    more, fewer = sum(gain > 0 for gain in gained), sum(gain < 0 for gain in gained)
    return (
        f"The routers hit more labels than the layer's majority at {more} of {len(gained)} layers, "
        f"fewer at {fewer}."
    )


def shown(name: str) -> str:
    """Return the name of a system as people read it."""
    return name.replace("_", " ")


def _hits(counts: Counts) -> list[float]:
    return [sum(layer[decision][decision] for decision in DECISIONS) for layer in counts.confusion]


def _only(decision: int) -> list[float]:
    return [float(each == decision) for each in DECISIONS]
