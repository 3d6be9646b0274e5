"""The arithmetic of a report: shares, effects of single edits, the choice of examples.

Owns every number that a report derives itself; what a stage has already counted is taken from its
files. Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from drllm.paths import Decision, Decisions, num_executions
from drllm.records import SearchRecord, TriedPath
from drllm.reporting.results import Evaluation
from drllm.reporting.samples import BASE, ROUTED, Sample
from drllm.supervision import is_valid
from drllm.supervision.summary import class_counts


def shares(rows: Sequence[Decisions], decision: Decision) -> list[float]:
    """Return each layer's share of rows that take a decision.

    Example:
        >>> shares([(1, 0), (1, 2)], Decision.SKIP)
        [0.0, 0.5]
    """
    return [layer[int(decision)] / len(rows) for layer in class_counts(rows)]


# --- the search --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EditEffect:
    """What one edit of the full path did, over the questions on which it alone was tried.

    Attributes:
        layer: The edited layer.
        questions: On how many it was tried.
        right: Share of them that it answers right.
        base_right: Share of them that the full path answers right.
        reward: Mean reward minus the full path's on the same questions.
        margin: The same for the margin, in nats; None where no margin is defined.
        kl: Mean KL, in nats a token; None where none was computed.
    """

    layer: int
    questions: int
    right: float
    base_right: float
    reward: float
    margin: float | None
    kl: float | None


def edit_effects(records: Sequence[SearchRecord], decision: Decision) -> list[EditEffect]:
    """Return what skipping, or repeating, one layer and nothing else did.

    Args:
        records: Search records of one model.
        decision: `SKIP` or `REPEAT`, what the one layer does.

    Returns:
        One effect per layer on which the edit was tried, in order of layer.
    """
    tried: dict[int, list[tuple[TriedPath, TriedPath]]] = {}
    for record in records:
        for path in record.paths:
            layer = _only_edit(path.decisions, decision)
            if layer is not None:
                tried.setdefault(layer, []).append((record.full, path))
    return [_effect(layer, pairs) for layer, pairs in sorted(tried.items())]


def _effect(layer: int, pairs: Sequence[tuple[TriedPath, TriedPath]]) -> EditEffect:
    margins = [
        path.margin - full.margin
        for full, path in pairs
        if path.margin is not None and full.margin is not None
    ]
    kls = [path.kl for _, path in pairs if path.kl is not None]
    return EditEffect(
        layer=layer,
        questions=len(pairs),
        right=fmean(is_valid(path) for _, path in pairs),
        base_right=fmean(is_valid(full) for full, _ in pairs),
        reward=fmean(path.reward - full.reward for full, path in pairs),
        margin=fmean(margins) if margins else None,
        kl=fmean(kls) if kls else None,
    )


def _only_edit(decisions: Decisions, decision: Decision) -> int | None:
    edited = [layer for layer, value in enumerate(decisions) if value != Decision.EXECUTE]
    return edited[0] if len(edited) == 1 and decisions[edited[0]] == decision else None


# --- examples ----------------------------------------------------------------------------------


def choose_examples(evaluation: Evaluation) -> list[tuple[str, Sample]]:
    """Pick three questions by a fixed rule, so that nobody picks the pretty ones.

    Returns:
        The first question that routing won, the first that it lost, and the unchanged one of
        fewest executions; then the first others, until there are three. Each with its kind.
    """
    able = [sample for sample in evaluation.samples if has_route(sample)]
    chosen: list[tuple[str, Sample]] = []

    def add(kind: str, candidates: Sequence[Sample]) -> None:
        taken = [sample for _, sample in chosen]
        left = [sample for sample in candidates if sample not in taken]
        if left and len(chosen) < 3:
            chosen.append((kind, left[0]))

    add("First question won", [sample for sample in able if change(sample) > 0])
    add("First question lost", [sample for sample in able if change(sample) < 0])
    unchanged = [sample for sample in able if change(sample) == 0]
    add("Unchanged, fewest executions", sorted(unchanged, key=_cost))
    while len(chosen) < min(3, len(able)):
        add("First of the others", able)
    return chosen


def has_route(sample: Sample) -> bool:
    """Say whether base's outcome, the routed model's and its route are all known."""
    routed = sample.outcomes.get(ROUTED)
    return BASE in sample.outcomes and routed is not None and routed.decisions is not None


def route(sample: Sample) -> Decisions:
    """Return the routed model's decisions on a question for which `has_route` holds."""
    decisions = sample.outcomes[ROUTED].decisions
    assert decisions is not None
    return decisions


def change(sample: Sample) -> float:
    """Return what routing makes of a question: above 0 it is won, below 0 lost."""
    return sample.outcomes[ROUTED].correct - sample.outcomes[BASE].correct


def _cost(sample: Sample) -> int:
    return num_executions(route(sample))


def mean_length(rows: Sequence[Decisions]) -> float | None:
    """Return the mean executions of decision vectors; None without any."""
    return sum(map(num_executions, rows)) / len(rows) if rows else None


def last_values(epochs: Mapping[int, Mapping[str, float | None]]) -> Mapping[str, float | None]:
    """Return the metrics of the last epoch; empty without any."""
    return epochs[max(epochs)] if epochs else {}
