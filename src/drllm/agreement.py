"""How far routers agree with the target paths, beside baselines that ignore the question.

The module works with counts. Unlike ratios, counts can be summed over batches, layers and
processes. There are three baselines. The first executes every layer. The second always decides for
a layer's most common training label. The third draws a layer's decision as often as it was a
training label. Its counts are expected values, and nothing is really drawn. This module doesn't
import torch.

Axes: L layers, C = 3 decisions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from msgspec.structs import replace

from drllm.paths import Decision
from drllm.statistics.verdicts import judge_counts

NAMES = ("skip", "execute", "repeat")
DECISIONS = range(len(NAMES))
ROUTERS = "routers"
ALWAYS_EXECUTE = "always_execute"
LABEL_FREQUENCY = "label_frequency"
LAYER_MAJORITY = "layer_majority"
TRAIN = "train"
VALIDATION = "validation"

Confusion: TypeAlias = tuple[tuple[float, ...], ...]
"""`[C][C]`: how often each label (row) met each decision (column)."""
LabelCounts: TypeAlias = Sequence[Sequence[float]]
"""`[L][C]`: how often each decision is the label of each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Counts over a set of targets; expected values if decisions are drawn.

    Attributes:
        confusion: `[L]` confusions, one per layer; empty if nothing was counted.
        executions: Cost of the decisions over all targets, in layer equivalents.
        examples: Number of targets.
        loss: Sum of the targets' losses, each a mean over layers; None for decisions that aren't
            made from probabilities.
    """

    confusion: tuple[Confusion, ...] = ()
    executions: float = 0
    examples: int = 0
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
    return tuple(_add_confusions(*pair) for pair in layers)


def _add_confusions(first: Confusion, second: Confusion) -> Confusion:
    rows = []
    for row, other_row in zip(first, second, strict=True):
        cells = zip(row, other_row, strict=True)
        rows.append(tuple(cell + other_cell for cell, other_cell in cells))
    return tuple(rows)


def compute_metrics(counts: Counts) -> dict[str, float | None]:
    """Compute metrics from counts of at least one target, named as on a line of `metrics.jsonl`.

    Returns:
        `routers_loss` (mean over targets and layers; None without losses), `accuracy` (share of
        the labels that were hit), `macro_f1` (mean of the defined F1), `f1_*` (None if the class is
        neither a label nor a decision), `acc_skip` and `acc_repeat` (share of the class's labels
        that were hit; None if it has no labels), and `avg_layers` (mean executions).

    Source: Dr.LLM names macro-F1, F1 by class and accuracy by class. Leaving undefined F1 out of
        the mean is ours.
    """
    confusion = counts.confusion[0]
    for layer in counts.confusion[1:]:
        confusion = _add_confusions(confusion, layer)
    hits = [confusion[decision][decision] for decision in DECISIONS]
    num_labels = _count_labels(confusion)
    num_decisions = [sum(column) for column in zip(*confusion, strict=True)]

    f1 = [_ratio(2 * hits[i], num_labels[i] + num_decisions[i]) for i in DECISIONS]
    defined_f1 = [value for value in f1 if value is not None]
    loss = None if counts.loss is None else counts.loss / counts.examples
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
    return part / whole if whole else None


def count_baselines(labels: LabelCounts, trained_labels: LabelCounts) -> dict[str, Counts]:
    """Count how each baseline decides on some targets. Return the counts by baseline.

    Args:
        labels: `[L][C]` label counts of the targets to decide on.
        trained_labels: `[L][C]` label counts of the training targets, which give the majorities
            and the frequencies.
    """
    always_execute = [_make_constant(Decision.EXECUTE) for _ in labels]
    frequencies = [_compute_frequencies(layer) for layer in trained_labels]
    majorities = [_make_constant(_find_majority(layer)) for layer in trained_labels]
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


def add_baselines(routers: Counts, trained_labels: LabelCounts) -> dict[str, Counts]:
    """Return the counts of routers and of the baselines on the same targets, by name."""
    return {ROUTERS: routers, **count_baselines(routers.labels, trained_labels)}


def _make_constant(decision: int) -> list[float]:
    """Return probabilities under which one decision is always made."""
    return [float(option == decision) for option in DECISIONS]


def count_expected(labels: LabelCounts, probabilities: Sequence[Sequence[float]]) -> Counts:
    """Return the expected counts of decisions that are drawn without looking at the question.

    Each layer is drawn independently. As everywhere, decisions that skip every layer cost 1.

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
    mean = sum(_expect_executions(layer) for layer in probabilities)
    chance_to_skip_all = math.prod(layer[Decision.SKIP] for layer in probabilities)
    num_examples = sum(labels[0])
    return Counts(
        confusion=tuple(confusion),
        executions=num_examples * (mean + chance_to_skip_all),
        examples=int(num_examples),
        loss=None,
    )


def _expect_executions(probabilities: Sequence[float]) -> float:
    """Return the expected executions of one layer."""
    return sum(decision * probabilities[decision] for decision in DECISIONS)


def judge_routers(parts: Mapping[str, Mapping[str, Counts]]) -> str:
    """Say in one sentence whether routers beat constant decisions on held-out targets.

    Accuracy is tested against the better of the two constant baselines. The decisions on one target
    depend on each other, so a target counts as one trial: won and lost labels are divided by the
    number of layers. Macro-F1 has no test; it is compared with the best baseline's macro-F1.

    Args:
        parts: What `add_baselines` returns for `TRAIN` and, if targets were held out, for
            `VALIDATION`.
    """
    if VALIDATION not in parts:
        return (
            "No targets were held out, so nothing says whether the routers beat decisions that "
            "ignore the question."
        )
    systems = parts[VALIDATION]
    metrics = {name: compute_metrics(counts) for name, counts in systems.items()}
    accuracy = {name: values["accuracy"] or 0.0 for name, values in metrics.items()}
    macro_f1 = {name: values["macro_f1"] or 0.0 for name, values in metrics.items()}

    constant = max((ALWAYS_EXECUTE, LAYER_MAJORITY), key=accuracy.__getitem__)
    sentence = _compare_accuracy(systems[ROUTERS], systems[constant], display_name(constant))
    routers_f1 = macro_f1.pop(ROUTERS)
    best = max(macro_f1, key=macro_f1.__getitem__)
    return (
        f"{sentence.removesuffix('.')}; macro-F1 {routers_f1:.3f} against {macro_f1[best]:.3f} "
        f"({display_name(best)})."
    )


def _compare_accuracy(routers: Counts, constant: Counts, constant_name: str) -> str:
    won_labels, lost_labels = _count_won_and_lost(routers, constant)
    num_layers = len(routers.confusion)
    won = won_labels / num_layers
    most_lost = routers.examples - won  # rounding may make the sum of both too large
    lost = min(lost_labels / num_layers, most_lost)
    verdict = judge_counts(won, lost, routers.examples)
    # Won and lost are left out: they are fractions of targets here, which no reader could check.
    verdict = replace(verdict, quantity="label_accuracy", won=None, lost=None)
    return verdict.sentence(ROUTERS, constant_name)


def _count_won_and_lost(routers: Counts, constant: Counts) -> tuple[float, float]:
    """Count the labels hit only by the routers, and the labels hit only by a constant decision."""
    won = 0.0
    lost = 0.0
    for layer, constant_layer in zip(routers.confusion, constant.confusion, strict=True):
        columns = [sum(column) for column in zip(*constant_layer, strict=True)]
        decision = columns.index(max(columns))
        for other_decision in DECISIONS:
            if other_decision != decision:
                won += layer[other_decision][other_decision]
                lost += layer[decision][other_decision]
    return won, lost


def compare_by_layer(systems: Mapping[str, Counts]) -> str:
    """Say in one sentence at how many layers routers hit more labels than the layer's majority."""
    hits = _count_hits(systems[ROUTERS])
    majority_hits = _count_hits(systems[LAYER_MAJORITY])
    pairs = zip(hits, majority_hits, strict=True)
    gains = [layer_hits - layer_majority_hits for layer_hits, layer_majority_hits in pairs]
    more = sum(gain > 0 for gain in gains)
    fewer = sum(gain < 0 for gain in gains)
    return (
        f"The routers hit more labels than the layer's majority at {more} of {len(gains)} layers, "
        f"fewer at {fewer}."
    )


def _count_hits(counts: Counts) -> list[float]:
    """Return how many labels are hit at each layer."""
    return [_count_layer_hits(layer) for layer in counts.confusion]


def _count_layer_hits(layer: Confusion) -> float:
    return sum(layer[decision][decision] for decision in DECISIONS)


def display_name(name: str) -> str:
    """Return the name of a system as people read it."""
    return name.replace("_", " ")
