"""How far routers agree with the target paths, beside baselines that ignore the question.

A target path gives every layer a label, which is the path's decision there. A decision that equals
the label hits it. The module works with counts: unlike ratios, they can be summed over batches,
layers and processes.

There are three baselines:

    always_execute    executes every layer
    layer_majority    always makes the decision that is the layer's most common training label
    label_frequency   draws decisions with the frequencies of the layer's training labels; its
                      counts are expected values, so nothing is really drawn

This module doesn't import torch.

Axes: L layers, C = 3 decisions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from drllm.paths import Decision
from drllm.statistics.ranges import Amount, Count
from drllm.statistics.verdicts import judge_counts

DECISION_NAMES = ("skip", "execute", "repeat")
DECISIONS = range(len(DECISION_NAMES))
ROUTERS = "routers"
ALWAYS_EXECUTE = "always_execute"
LABEL_FREQUENCY = "label_frequency"
LAYER_MAJORITY = "layer_majority"
TRAIN = "train"
VALIDATION = "validation"

Confusion: TypeAlias = tuple[tuple[float, ...], ...]
"""`[C][C]` for one layer: how often each decision (column) was made for each label (row)."""
LabelCounts: TypeAlias = Sequence[Sequence[float]]
"""`[L][C]`: how often each decision is the label of each layer."""


class Counts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counts over a set of targets; expected values if decisions are drawn.

    Attributes:
        confusion: The confusion of each layer, `[L]`; empty if nothing was counted.
        executions: Executions of the decisions, summed over all targets.
        examples: Number of targets.
        loss: Sum of the targets' losses. A target's loss is the mean over its layers. None for
            baselines, which have no loss.
    """

    confusion: tuple[Confusion, ...] = ()
    executions: Amount = 0
    examples: Count = 0
    loss: float | None = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        """Return the counts over both sets of targets, for models of the same depth."""
        return Counts(
            confusion=_add_layers(self.confusion, other.confusion),
            executions=self.executions + other.executions,
            examples=self.examples + other.examples,
            loss=_add_losses(self.loss, other.loss),
        )

    @property
    def labels(self) -> list[list[float]]:
        """`[L][C]`: how often each decision is the label of each layer."""
        return [_count_labels(layer) for layer in self.confusion]


def _count_labels(confusion: Confusion) -> list[float]:
    return [sum(row) for row in confusion]


def _add_losses(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return None
    return first + second


def _add_layers(
    first: tuple[Confusion, ...], second: tuple[Confusion, ...]
) -> tuple[Confusion, ...]:
    if not first:
        return second
    if not second:
        return first
    layers = zip(first, second, strict=True)
    return tuple(_add_confusions(layer, other_layer) for layer, other_layer in layers)


def _add_confusions(first: Confusion, second: Confusion) -> Confusion:
    rows = []
    for row, other_row in zip(first, second, strict=True):
        cells = zip(row, other_row, strict=True)
        rows.append(tuple(cell + other_cell for cell, other_cell in cells))
    return tuple(rows)


def compute_metrics(counts: Counts) -> dict[str, float | None]:
    """Compute metrics from counts of at least one target.

    Returns:
        The metrics, named as on a line of `metrics.jsonl`:

        - `routers_loss`: the mean loss over targets and layers; None without losses.
        - `accuracy`: the share of the labels that were hit.
        - `f1_skip`, `f1_execute`, `f1_repeat`: the F1 of a decision; None if it is undefined, since
          the decision is no label and was never made.
        - `macro_f1`: the mean of the defined F1.
        - `acc_skip`, `acc_repeat`: the share of these labels that were hit; None without labels.
        - `avg_layers`: the mean executions.

    Source: Dr.LLM names macro-F1, F1 by class and accuracy by class. Leaving undefined F1 out of
        the mean is ours.
    """
    confusion = counts.confusion[0]  # summed over all layers
    for layer in counts.confusion[1:]:
        confusion = _add_confusions(confusion, layer)
    hits = [confusion[decision][decision] for decision in DECISIONS]
    num_labels = _count_labels(confusion)
    num_decisions = [sum(column) for column in zip(*confusion, strict=True)]

    f1 = [_ratio(2 * hits[i], num_labels[i] + num_decisions[i]) for i in DECISIONS]
    defined_f1 = [value for value in f1 if value is not None]
    loss = None
    if counts.loss is not None:
        loss = counts.loss / counts.examples
    return {
        "routers_loss": loss,
        "accuracy": sum(hits) / sum(num_labels),
        "macro_f1": sum(defined_f1) / len(defined_f1),
        "f1_skip": f1[Decision.SKIP],
        "f1_execute": f1[Decision.EXECUTE],
        "f1_repeat": f1[Decision.REPEAT],
        "acc_skip": _ratio(hits[Decision.SKIP], num_labels[Decision.SKIP]),
        "acc_repeat": _ratio(hits[Decision.REPEAT], num_labels[Decision.REPEAT]),
        "avg_layers": counts.executions / counts.examples,
    }


def _ratio(part: float, whole: float) -> float | None:
    if not whole:
        return None
    return part / whole


def count_baselines(labels: LabelCounts, training_labels: LabelCounts) -> dict[str, Counts]:
    """Count how each baseline decides on some targets; return the counts by baseline.

    Args:
        labels: `[L][C]` label counts of the targets to decide on.
        training_labels: `[L][C]` label counts of the training targets, from which the baselines
            take the majorities and the frequencies.
    """
    always_execute = [_make_constant(Decision.EXECUTE) for _ in labels]
    frequencies = [_compute_frequencies(layer) for layer in training_labels]
    majorities = [_make_constant(_find_majority(layer)) for layer in training_labels]
    return {
        ALWAYS_EXECUTE: count_expected(labels, always_execute),
        LABEL_FREQUENCY: count_expected(labels, frequencies),
        LAYER_MAJORITY: count_expected(labels, majorities),
    }


def _compute_frequencies(label_counts: Sequence[float]) -> list[float]:
    total = sum(label_counts)
    return [number / total for number in label_counts]


def _find_majority(label_counts: Sequence[float]) -> Decision:
    """Return the most common label. On a tie, prefer execute, then skip."""
    order = (Decision.EXECUTE, Decision.SKIP, Decision.REPEAT)
    return max(order, key=label_counts.__getitem__)


def add_baselines(routers: Counts, training_labels: LabelCounts) -> dict[str, Counts]:
    """Return the counts of routers and of the baselines on the same targets, by name."""
    return {ROUTERS: routers, **count_baselines(routers.labels, training_labels)}


def _make_constant(constant_decision: int) -> list[float]:
    """Return probabilities `[C]` under which the same decision is always made."""
    return [float(decision == constant_decision) for decision in DECISIONS]


def count_expected(labels: LabelCounts, probabilities: Sequence[Sequence[float]]) -> Counts:
    """Return the expected counts of decisions that are drawn without looking at the question.

    The decisions of different layers are drawn independently. If all layers are skipped, a model
    still executes one layer, so this counts as one execution.

    Args:
        labels: `[L][C]` label counts of the targets.
        probabilities: `[L][C]` probability of each decision at each layer.
    """
    confusion = []
    for label_counts, layer in zip(labels, probabilities, strict=True):
        rows: list[tuple[float, ...]] = []
        for count in label_counts:
            row = tuple(count * share for share in layer)
            rows.append(row)
        confusion.append(tuple(rows))
    mean_executions = sum(_expect_executions(layer) for layer in probabilities)
    chance_to_skip_all = math.prod(layer[Decision.SKIP] for layer in probabilities)
    num_examples = sum(labels[0])  # every target has one label at each layer
    return Counts(
        confusion=tuple(confusion),
        executions=num_examples * (mean_executions + chance_to_skip_all),
        examples=int(num_examples),
        loss=None,
    )


def _expect_executions(probabilities: Sequence[float]) -> float:
    """Return the expected executions of one layer."""
    return sum(decision * probabilities[decision] for decision in DECISIONS)


def judge_routers(parts: Mapping[str, Mapping[str, Counts]]) -> str:
    """Say in one sentence whether routers beat constant decisions on held-out targets.

    Accuracy is tested against the better of the two constant baselines, `always_execute` and
    `layer_majority`. Macro-F1 isn't tested; the sentence has the best baseline's macro-F1 beside
    that of the routers.

    Args:
        parts: The result of `add_baselines` for `TRAIN` and, if targets were held out, for
            `VALIDATION`.
    """
    if VALIDATION not in parts:
        return (
            "No targets were held out, so nothing says whether the routers beat decisions that "
            "ignore the question."
        )
    systems = parts[VALIDATION]
    accuracy: dict[str, float] = {}
    macro_f1: dict[str, float] = {}
    for name, counts in systems.items():
        metrics = compute_metrics(counts)
        accuracy[name] = metrics["accuracy"] or 0.0
        macro_f1[name] = metrics["macro_f1"] or 0.0

    constant = max((ALWAYS_EXECUTE, LAYER_MAJORITY), key=accuracy.__getitem__)
    sentence = _compare_accuracy(systems[ROUTERS], systems[constant], display_name(constant))
    routers_f1 = macro_f1.pop(ROUTERS)
    best = max(macro_f1, key=macro_f1.__getitem__)
    return (
        f"{sentence.removesuffix('.')}; macro-F1 {routers_f1:.3f} against {macro_f1[best]:.3f} "
        f"({display_name(best)})."
    )


def _compare_accuracy(routers: Counts, constant: Counts, constant_name: str) -> str:
    """Compare the accuracy of routers with that of a constant baseline, in one sentence.

    The decisions on one target depend on each other, so the test counts a target as one trial. The
    labels won and lost are divided by the number of layers to count them in targets.
    """
    won_labels, lost_labels = _count_won_and_lost(routers, constant)
    num_layers = len(routers.confusion)
    won = won_labels / num_layers
    most_lost = routers.examples - won  # rounding may make the sum of both too large
    lost = min(lost_labels / num_layers, most_lost)
    verdict = judge_counts(won, lost, routers.examples)
    # The sentence leaves out won and lost. They are fractions here, which no reader could check.
    verdict = replace(verdict, quantity="label_accuracy", won=None, lost=None)
    return verdict.sentence(ROUTERS, constant_name)


def _count_won_and_lost(routers: Counts, constant: Counts) -> tuple[float, float]:
    """Count the labels hit only by the routers, and the labels hit only by a constant baseline."""
    won = 0.0
    lost = 0.0
    for layer, constant_layer in zip(routers.confusion, constant.confusion, strict=True):
        columns = [sum(column) for column in zip(*constant_layer, strict=True)]
        constant_decision = columns.index(max(columns))  # all counts are in its column
        for decision in DECISIONS:
            if decision == constant_decision:
                continue
            won += layer[decision][decision]  # the routers hit a label that the baseline misses
            lost += layer[constant_decision][decision]  # the routers miss what the baseline hits
    return won, lost


def compare_by_layer(systems: Mapping[str, Counts]) -> str:
    """Say in one sentence at how many layers routers hit more labels than the layer's majority."""
    routers = systems[ROUTERS].confusion
    majority = systems[LAYER_MAJORITY].confusion
    more = 0
    fewer = 0
    for layer, majority_layer in zip(routers, majority, strict=True):
        gain = _count_hits(layer) - _count_hits(majority_layer)
        more += gain > 0
        fewer += gain < 0
    return (
        f"The routers hit more labels than the layer's majority at {more} of {len(routers)} "
        f"layers, fewer at {fewer}."
    )


def _count_hits(layer: Confusion) -> float:
    """Count the labels that are hit at one layer."""
    return sum(layer[decision][decision] for decision in DECISIONS)


def display_name(name: str) -> str:
    """Return the name of a system as people read it."""
    return name.replace("_", " ")
