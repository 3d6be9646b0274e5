"""Router metrics: how far decisions agree with target paths, and the baselines to beat.

Counts come first because they can be summed over batches, layers and processes; ratios can't.
Three baselines ignore the question: always execute; each layer's commonest training label; and
each layer's decision drawn as often as it was a label there (expected counts, nothing is drawn).
Loads no torch.

Axes: L layers, C = 3 decisions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
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
TRAIN, VALIDATION = "train", "validation"

Confusion: TypeAlias = tuple[tuple[float, ...], ...]
"""`[C][C]`: how often each label (row) was given each decision (column)."""
Labels: TypeAlias = Sequence[Sequence[float]]
"""`[L][C]`: how often each decision is the label of each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was counted over some targets; expected values where decisions are drawn."""

    # `[L]` confusions, one a layer; empty where nothing was counted.
    confusion: tuple[Confusion, ...] = ()
    executions: float = 0  # what the decisions cost over all targets, in layer equivalents
    examples: int = 0  # how many targets
    # Sum over the targets of their losses (each a mean over layers); None for decisions that aren't
    # made from probabilities.
    loss: float | None = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        """Return the counts over both sets of targets; both models need as many layers."""
        confusion = self.confusion or other.confusion
        if self.confusion and other.confusion:
            layers = zip(self.confusion, other.confusion, strict=True)
            confusion = tuple(_add(one, two) for one, two in layers)
        return Counts(
            confusion=confusion,
            executions=self.executions + other.executions,
            examples=self.examples + other.examples,
            loss=None if self.loss is None or other.loss is None else self.loss + other.loss,
        )

    @property
    def labels(self) -> list[list[float]]:
        """`[L][C]`: how often each decision is the label of each layer."""
        return [[sum(row) for row in layer] for layer in self.confusion]


def _add(one: Confusion, other: Confusion) -> Confusion:
    return tuple(tuple(map(add, row, added)) for row, added in zip(one, other, strict=True))


def ratios(counts: Counts) -> dict[str, float | None]:
    """Turn counts of at least one target into metrics, named as on a line of `metrics.jsonl`.

    Returns:
        `routers_loss` (mean over targets and layers; None without losses), `accuracy` (share of
        the labels that were hit), `macro_f1` (mean of the F1 that are defined), `f1_*` (None where
        a class is neither a label nor decided), `acc_skip` and `acc_repeat` (share of a class'
        labels that were hit; None where it has none), and `avg_layers` (mean executions).

    Source: Dr.LLM names macro-F1, F1 by class and accuracy by class; that undefined F1 are left
        out of the mean is ours.
    """
    confusion = reduce(_add, counts.confusion)
    hits = [confusion[decision][decision] for decision in DECISIONS]
    labelled = [sum(row) for row in confusion]
    decided = [sum(column) for column in zip(*confusion, strict=True)]
    f1 = [_ratio(2 * hits[i], labelled[i] + decided[i]) for i in DECISIONS]
    defined = [value for value in f1 if value is not None]
    return {
        "routers_loss": None if counts.loss is None else counts.loss / counts.examples,
        "accuracy": sum(hits) / sum(labelled),
        "macro_f1": sum(defined) / len(defined),
        **{f"f1_{name}": value for name, value in zip(NAMES, f1, strict=True)},
        "acc_skip": _ratio(hits[0], labelled[0]),
        "acc_repeat": _ratio(hits[2], labelled[2]),
        "avg_layers": counts.executions / counts.examples,
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def baselines(labels: Labels, trained: Labels) -> dict[str, Counts]:
    """Count how the trivial ways of deciding fare on some targets' labels, by name.

    Majority and frequencies are those of the targets trained on.
    """
    order = (Decision.EXECUTE, Decision.SKIP, Decision.REPEAT)  # of equally common labels
    ways = {
        ALWAYS_EXECUTE: [_only(Decision.EXECUTE) for _ in labels],
        LABEL_FREQUENCY: [[n / sum(layer) for n in layer] for layer in trained],
        LAYER_MAJORITY: [_only(max(order, key=layer.__getitem__)) for layer in trained],
    }
    return {name: expected_counts(labels, shares) for name, shares in ways.items()}


def with_baselines(routers: Counts, trained: Labels) -> dict[str, Counts]:
    """Return the counts of routers and those of the baselines on the same targets, by name."""
    return {ROUTERS: routers, **baselines(routers.labels, trained)}


def _only(decision: int) -> list[float]:
    return [float(each == decision) for each in DECISIONS]


def expected_counts(labels: Labels, shares: Sequence[Sequence[float]]) -> Counts:
    """Return the expected counts of decisions that are drawn without looking at the question.

    Decisions that skip every layer cost 1, as everywhere. The shares, `[L][C]`, are the probability
    of each decision; layers are drawn one by one.
    """
    examples = sum(labels[0])
    mean = sum(decision * layer[decision] for layer in shares for decision in DECISIONS)
    skips_all = math.prod(layer[Decision.SKIP] for layer in shares)
    return Counts(
        confusion=tuple(
            tuple(tuple(n * share for share in layer) for n in row)
            for row, layer in zip(labels, shares, strict=True)
        ),
        executions=examples * (mean + skips_all),
        examples=int(examples),
        loss=None,
    )


def verdict(parts: Mapping[str, Mapping[str, Counts]]) -> str:
    """Say in one sentence whether routers beat constant decisions on targets they haven't learned.

    The parts are what `with_baselines` returns, of `TRAIN` and, if it is there, of `VALIDATION`.
    Accuracy is judged against the better constant decisions by the paired test, for which the
    decisions of one target, which go together, count as one. Macro-F1, which has no test, stands
    beside it, against the best baseline.
    """
    if VALIDATION not in parts:
        return (
            "No targets were held out, so nothing says whether the routers beat decisions that "
            "ignore the question."
        )
    systems = parts[VALIDATION]
    scores = {name: ratios(counts) for name, counts in systems.items()}
    constant = max((ALWAYS_EXECUTE, LAYER_MAJORITY), key=lambda name: scores[name]["accuracy"] or 0)
    found, ours = _won_lost(systems[ROUTERS], systems[constant]), systems[ROUTERS]
    won, lost = (round(n / len(ours.confusion)) for n in found)
    judged = replace(judge_counts(won, lost, ours.examples), quantity="label_accuracy")
    f1 = {name: score["macro_f1"] or 0.0 for name, score in scores.items()}
    routers = f1.pop(ROUTERS)
    best = max(f1, key=f1.__getitem__)
    said = judged.sentence(ROUTERS, shown(constant)).removesuffix(".")
    return f"{said}; macro-F1 {routers:.3f} against {f1[best]:.3f} ({shown(best)})."


def _won_lost(ours: Counts, theirs: Counts) -> tuple[float, float]:
    """Count labels that routers hit and a constant decision a layer misses, and the reverse."""
    won = lost = 0.0
    for one, other in zip(ours.confusion, theirs.confusion, strict=True):
        columns = [sum(column) for column in zip(*other, strict=True)]
        constant = columns.index(max(columns))
        won += sum(one[each][each] for each in DECISIONS if each != constant)
        lost += sum(one[constant][each] for each in DECISIONS if each != constant)
    return won, lost


def by_layer(systems: Mapping[str, Counts]) -> str:
    """Say in one sentence at how many layers routers hit more labels than the layer's majority."""
    ours, theirs = (
        [sum(layer[i][i] for i in DECISIONS) for layer in systems[name].confusion]
        for name in (ROUTERS, LAYER_MAJORITY)
    )
    gained = [one - other for one, other in zip(ours, theirs, strict=True)]
    more, fewer = sum(gain > 0 for gain in gained), sum(gain < 0 for gain in gained)
    return (
        f"The routers hit more labels than the layer's majority at {more} of {len(gained)} layers, "
        f"fewer at {fewer}."
    )


def shown(name: str) -> str:
    """Return the name of a system as people read it."""
    return name.replace("_", " ")
