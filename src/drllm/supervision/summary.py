"""Counts of a supervision: what the search found, what survived, what became a target.

Loads no torch. Axes: L layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from drllm.paths import Decision, Decisions
from drllm.records import SearchRecord, SupervisionRecord, TriedPath, question_key
from drllm.supervision.rules import REASONS, is_improving, is_saving, is_valid, survived

KINDS: dict[str, Callable[[TriedPath, SearchRecord], bool]] = {
    "valid": lambda path, _: is_valid(path),
    "saving": is_saving,
    "improving": is_improving,
}
YIELDS = tuple(f"{kind}_{when}_retest" for kind in KINDS for when in ("before", "after"))


def summarise(
    records: Sequence[SearchRecord],
    kept: Sequence[SupervisionRecord],
    rejected: Mapping[str, int],
) -> dict[str, Any]:
    """Count what the search found and what became of it.

    Args:
        records: What was searched. Of records with the same question the first one counts,
            whatever their tasks and files.
        kept: Their targets.
        rejected: Questions without a target, by reason.

    Returns:
        `questions` = `targets` + the sum of `rejected` (every reason is there, zeros too);
        `copies`, the records that are left out of every other count since an earlier one has the
        same question; `base_correct`, the questions that the full path answers right; `valid_…`,
        `saving_…` and `improving_…`, the questions with at least one such path (the full path is
        valid too where it is right), `…_before_retest` by the search alone and `…_after_retest`
        among the paths that survived; `paths`, how many saving and improving paths there were,
        before and after (every one of them is re-tested, other right paths aren't); `tasks`, all
        counts of questions by task, with `targets` and `improving_targets`; `executions`, the
        targets' mean (None without any); `class_counts`, how often the targets skip, execute and
        repeat, and `class_counts_by_layer`, `[L][3]`.
    """
    rows = [record.optimal_layer_config for record in kept]
    by_layer = class_counts(rows)
    tasks = dict.fromkeys([*(record.task for record in records), *(r.task for r in kept)])
    first = first_records(records)
    copies = Counter(r.task for r in records) - Counter(r.task for r in first)
    return {
        "questions": len(first),
        "copies": copies.total(),
        "targets": len(kept),
        "rejected": {reason: rejected.get(reason, 0) for reason in REASONS},
        **_yields(first),
        "paths": {
            name: n for name, n in _path_counts(first).items() if not name.startswith("valid")
        },
        "tasks": {
            task: _task_counts(
                [record for record in first if record.task == task],
                copies[task],
                [record for record in kept if record.task == task],
            )
            for task in tasks
        },
        "executions": sum(record.executions for record in kept) / len(kept) if kept else None,
        "class_counts": [sum(layer[decision] for layer in by_layer) for decision in Decision],
        "class_counts_by_layer": by_layer,
    }


def first_records(records: Sequence[SearchRecord]) -> list[SearchRecord]:
    """Return the first record of each question, in order."""
    first: dict[str, SearchRecord] = {}
    for record in records:
        first.setdefault(question_key(record.question), record)
    return list(first.values())


def class_counts(rows: Sequence[Decisions]) -> list[list[int]]:
    """Count each layer's decisions.

    Returns:
        `[L][3]`: how often each layer is skipped, executed and repeated; empty without rows.

    Example:
        >>> class_counts([(1, 0), (1, 2)])
        [[0, 2, 0], [1, 0, 1]]
    """
    counted = [Counter(layer) for layer in zip(*rows, strict=True)]
    return [[layer[int(decision)] for decision in Decision] for layer in counted]


def _task_counts(
    records: Sequence[SearchRecord], copies: int, kept: Sequence[SupervisionRecord]
) -> dict[str, int]:
    return {
        "questions": len(records),
        "copies": copies,
        **_yields(records),
        "targets": len(kept),
        "improving_targets": sum(record.improving for record in kept),
    }


def _yields(records: Sequence[SearchRecord]) -> dict[str, int]:
    """Count the questions that have a path of each kind."""
    found = [_path_counts([record]) for record in records]
    return {
        "base_correct": sum(is_valid(record.full) for record in records),
        **{name: sum(counts[name] > 0 for counts in found) for name in YIELDS},
    }


def _path_counts(records: Sequence[SearchRecord]) -> dict[str, int]:
    """Count the paths of each kind, as the search found them and as far as they survived."""
    counts: Counter[str] = Counter()
    for record in records:
        for path in record.paths:
            for kind, is_one in KINDS.items():
                if is_one(path, record):
                    counts[f"{kind}_before_retest"] += 1
                    counts[f"{kind}_after_retest"] += survived(path)
    return {name: counts[name] for name in YIELDS}
