"""Count what a search and its supervision gave: questions, paths and targets.

`summarise` makes the summary in the manifest of `supervision.jsonl`. `class_counts` counts the
decisions of targets by layer. `edit_effects` tells how single edits change the reward.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from drllm.paths import Decision, Decisions
from drllm.records.search import SearchRecord, TriedPath
from drllm.records.splits import question_key
from drllm.records.supervision import SupervisionRecord
from drllm.supervision.rules import REASONS, is_improving, is_saving, is_valid, survived
from drllm.tasks.examples import KL_REWARD

KINDS: dict[str, Callable[[TriedPath, SearchRecord], bool]] = {
    "valid": lambda path, _: is_valid(path),
    "saving": is_saving,
    "improving": is_improving,
}
"""Kinds of paths: the name of a kind, and a function that tells whether a path is of this kind."""
_BETTER_COUNTS = (
    "saving_before_retest",
    "saving_after_retest",
    "improving_before_retest",
    "improving_after_retest",
)
"""Names of the counts of paths that are better than the full path."""
_COUNTS = ("valid_before_retest", "valid_after_retest", *_BETTER_COUNTS)
"""Names of all counts of paths: each kind before the re-test, and after it."""

CountedRecord: TypeAlias = tuple[SearchRecord, Mapping[str, int]]
"""A search record, and its number of paths under each name in `_COUNTS`."""


def summarise(
    records: Sequence[SearchRecord],
    targets: Sequence[SupervisionRecord],
    rejected: Mapping[str, int],
) -> dict[str, Any]:
    """Count the questions, paths and targets of a search.

    A question may be in several tasks or files. Only its first record counts; the others are
    copies.

    Args:
        records: All search records.
        targets: The targets. They may come from a user's own file, and belong to other questions.
        rejected: Reason → number of questions without a target for this reason.

    Returns:
        The `summary` that docs/formats.md describes.
    """
    first_records: dict[str, SearchRecord] = {}
    for record in records:
        first_records.setdefault(question_key(record.question), record)
    counted_records = [(record, _count_paths(record)) for record in first_records.values()]
    num_copies = Counter(record.task for record in records)
    num_copies.subtract(record.task for record in first_records.values())
    task_names = dict.fromkeys([*num_copies, *(target.task for target in targets)])
    tasks: dict[str, dict[str, int]] = {}
    for task in task_names:
        tasks[task] = _summarise_task(task, counted_records, targets, num_copies[task])
    counts_by_layer = class_counts([target.optimal_layer_config for target in targets])
    total_counts = [0, 0, 0]  # skipped, executed, repeated
    for layer_counts in counts_by_layer:
        for decision, number in enumerate(layer_counts):
            total_counts[decision] += number
    mean_executions = None
    if targets:
        mean_executions = sum(target.executions for target in targets) / len(targets)
    return {
        "questions": len(counted_records),
        "copies": num_copies.total(),
        "targets": len(targets),
        "rejected": {reason: rejected.get(reason, 0) for reason in REASONS},
        **_count_questions(counted_records),
        "paths": _count_better_paths(counted_records),
        "tasks": tasks,
        "wrong_targets": _count_wrong(records, targets),
        "executions": mean_executions,
        "class_counts": total_counts,
        "class_counts_by_layer": [list(layer_counts) for layer_counts in counts_by_layer],
    }


def _summarise_task(
    task: str,
    counted_records: Sequence[CountedRecord],
    targets: Sequence[SupervisionRecord],
    num_copies: int,
) -> dict[str, int]:
    """Return the counts of one task."""
    task_records = [counted for counted in counted_records if counted[0].task == task]
    task_targets = [target for target in targets if target.task == task]
    return {
        "questions": len(task_records),
        "copies": num_copies,
        **_count_questions(task_records),
        "targets": len(task_targets),
        "improving_targets": sum(target.improving for target in task_targets),
    }


def _count_questions(counted_records: Sequence[CountedRecord]) -> dict[str, int]:
    """Count the questions that the full path answers right, and the questions with each kind."""
    totals = {"base_correct": sum(is_valid(record.full) for record, _ in counted_records)}
    for name in _COUNTS:
        totals[name] = sum(counts[name] > 0 for _, counts in counted_records)
    return totals


def _count_better_paths(counted_records: Sequence[CountedRecord]) -> dict[str, int]:
    """Count the saving and improving paths of all questions."""
    totals: dict[str, int] = {}
    for name in _BETTER_COUNTS:
        totals[name] = sum(counts[name] for _, counts in counted_records)
    return totals


def _count_paths(record: SearchRecord) -> dict[str, int]:
    """Count a question's paths of each kind: all of them, and those that survived the re-test."""
    counts: dict[str, int] = {}
    for kind, is_of_kind in KINDS.items():
        paths = [path for path in record.paths if is_of_kind(path, record)]
        counts[f"{kind}_before_retest"] = len(paths)
        counts[f"{kind}_after_retest"] = sum(survived(path) for path in paths)
    return counts


def _count_wrong(records: Sequence[SearchRecord], targets: Sequence[SupervisionRecord]) -> int:
    """Count the targets whose path answered wrong.

    Targets aren't counted if their question has no right answer or no search record. Of the records
    of a question the first counts, which its target comes from.
    """
    is_wrong: dict[tuple[str, str, Decisions], bool] = {}  # by task, id and path
    for record in records:
        has_answer = record.reward != KL_REWARD
        for path in record.paths:
            key = (record.task, record.id, path.decisions)
            is_wrong.setdefault(key, has_answer and not is_valid(path))
    keys = [(target.task, target.id, target.optimal_layer_config) for target in targets]
    return sum(is_wrong.get(key, False) for key in keys)


def class_counts(rows: Iterable[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    """Count how often each layer is skipped, executed and repeated.

    Args:
        rows: `[N][L]` decisions.

    Returns:
        `[L][3]`; empty if there are no rows.
    """
    decisions_by_layer = zip(*rows, strict=True)
    return tuple(
        (decisions.count(0), decisions.count(1), decisions.count(2))
        for decisions in decisions_by_layer
    )


def edit_effects(
    records: Sequence[SearchRecord], decision: Decision, min_questions: int
) -> list[tuple[int, float]]:
    """Return how much the reward changes if a single layer is skipped, or a single one repeated.

    Args:
        records: The search records.
        decision: `SKIP` or `REPEAT`.
        min_questions: A layer is left out if its single edit was tried on fewer questions.

    Returns:
        Pairs of a layer and the mean change of the reward from the full path's, the largest first.
    """
    changes_by_layer: dict[int, list[float]] = {}
    for record in records:
        for path in record.paths:
            edited_layers = [layer for layer, value in enumerate(path.decisions) if value != 1]
            if len(edited_layers) != 1:
                continue
            [layer] = edited_layers
            if path.decisions[layer] == decision:
                change = path.reward - record.full.reward
                changes_by_layer.setdefault(layer, []).append(change)
    effects: list[tuple[int, float]] = []
    for layer, changes in changes_by_layer.items():
        if len(changes) >= min_questions:
            effects.append((layer, fmean(changes)))
    return sorted(effects, key=lambda effect: (-effect[1], effect[0]))
