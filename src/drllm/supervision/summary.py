"""Count the paths of a search, the paths that survived the re-test, and the targets.

Further functions tell how single edits change the reward, and how often targets skip, execute or
repeat each layer.
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
_COUNTS_OF_PATHS = (
    "saving_before_retest",
    "saving_after_retest",
    "improving_before_retest",
    "improving_after_retest",
)
_COUNTS = ("valid_before_retest", "valid_after_retest", *_COUNTS_OF_PATHS)

CountedRecord: TypeAlias = tuple[SearchRecord, Mapping[str, int]]
"""A search record, and its number of paths under each name of `_COUNTS`."""


def summarise(
    records: Sequence[SearchRecord],
    targets: Sequence[SupervisionRecord],
    rejected: Mapping[str, int],
) -> dict[str, Any]:
    """Count the questions, paths and targets of a search.

    Only the first record of a question counts, even if the question is in several tasks or files.

    Args:
        records: All search records.
        targets: The targets. Targets from a user's own file may belong to other questions.
        rejected: Reason → number of questions without a target.

    Returns:
        The `summary` of docs/formats.md. `questions` equals `targets` plus the sum of `rejected`.
        `rejected` has every reason. Questions and paths are counted before and after the re-test.
    """
    first_records: dict[str, SearchRecord] = {}
    for record in records:
        first_records.setdefault(question_key(record.question), record)
    counted = [(record, _count_paths(record)) for record in first_records.values()]
    num_copies = Counter(record.task for record in records)
    num_copies.subtract(record.task for record in first_records.values())
    task_names = dict.fromkeys([*num_copies, *(target.task for target in targets)])
    decisions = [target.optimal_layer_config for target in targets]
    by_layer = [list(counts) for counts in class_counts(decisions)]
    executions = None
    if targets:
        executions = sum(target.executions for target in targets) / len(targets)
    totals = [0, 0, 0]  # skipped, executed, repeated, over all layers
    for counts in by_layer:
        for decision, number in enumerate(counts):
            totals[decision] += number
    return {
        "questions": len(counted),
        "copies": num_copies.total(),
        "targets": len(targets),
        "rejected": {reason: rejected.get(reason, 0) for reason in REASONS},
        **_count_questions(counted),
        "paths": _add_counts(counted),
        "tasks": {
            task: _summarise_task(task, counted, targets, num_copies[task]) for task in task_names
        },
        "wrong_targets": _count_wrong(records, targets),
        "executions": executions,
        "class_counts": totals,
        "class_counts_by_layer": by_layer,
    }


def _summarise_task(
    task: str,
    counted: Sequence[CountedRecord],
    targets: Sequence[SupervisionRecord],
    num_copies: int,
) -> dict[str, int]:
    """Return the counts of one task's questions."""
    counted_of_task = [(record, counts) for record, counts in counted if record.task == task]
    improving = [target.improving for target in targets if target.task == task]
    return {
        "questions": len(counted_of_task),
        "copies": num_copies,
        **_count_questions(counted_of_task),
        "targets": len(improving),
        "improving_targets": sum(improving),
    }


def _count_questions(counted: Sequence[CountedRecord]) -> dict[str, int]:
    """Count the questions that the full path answers right, and those with each kind of path."""
    totals = {"base_correct": sum(is_valid(record.full) for record, _ in counted)}
    for name in _COUNTS:
        totals[name] = sum(counts[name] > 0 for _, counts in counted)
    return totals


def _add_counts(counted: Sequence[CountedRecord]) -> dict[str, int]:
    """Count the saving and improving paths of all questions."""
    totals: dict[str, int] = {}
    for name in _COUNTS_OF_PATHS:
        totals[name] = sum(counts[name] for _, counts in counted)
    return totals


def _count_paths(record: SearchRecord) -> dict[str, int]:
    """Count a question's paths of each kind, before the re-test and after it."""
    counts: dict[str, int] = {}
    for kind, is_of_kind in KINDS.items():
        paths = [path for path in record.paths if is_of_kind(path, record)]
        counts[f"{kind}_before_retest"] = len(paths)
        counts[f"{kind}_after_retest"] = sum(survived(path) for path in paths)
    return counts


def _count_wrong(records: Sequence[SearchRecord], targets: Sequence[SupervisionRecord]) -> int:
    """Count the targets whose path answered wrong.

    Targets of questions without a right answer or without a record aren't counted.
    """
    is_wrong: dict[tuple[str, str, Decisions], bool] = {}
    for record in records:
        has_answer = record.reward != KL_REWARD
        for path in record.paths:
            key = (record.task, record.id, path.decisions)
            is_wrong[key] = has_answer and not is_valid(path)
    keys = [(target.task, target.id, target.optimal_layer_config) for target in targets]
    return sum(is_wrong.get(key, False) for key in keys)


def class_counts(rows: Iterable[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    """Count how often each layer is skipped, executed, repeated: `[L][3]`, empty without rows."""
    layers = zip(*rows, strict=True)
    return tuple((layer.count(0), layer.count(1), layer.count(2)) for layer in layers)


def edit_effects(
    records: Sequence[SearchRecord], decision: Decision, min_questions: int
) -> list[tuple[int, float]]:
    """Return how skipping or repeating each layer alone changes the mean reward, best first.

    A layer is left out if it was edited alone on fewer than `min_questions` questions.
    """
    changes: dict[int, list[float]] = {}
    for record in records:
        for path in record.paths:
            edited = [layer for layer, value in enumerate(path.decisions) if value != 1]
            if len(edited) == 1 and path.decisions[edited[0]] == decision:
                change = path.reward - record.full.reward
                changes.setdefault(edited[0], []).append(change)
    effects = [
        (layer, fmean(of_layer))
        for layer, of_layer in changes.items()
        if len(of_layer) >= min_questions
    ]
    return sorted(effects, key=lambda effect: (-effect[1], effect[0]))
