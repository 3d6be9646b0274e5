"""Counts: what the search found, what survived, what became a target; what single edits did."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

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


def summarise(
    records: Sequence[SearchRecord], kept: Sequence[SupervisionRecord], rejected: Mapping[str, int]
) -> dict[str, Any]:
    """Count what the search found and what became of it: targets kept, others by reason.

    Of records with the same question the first one counts, whatever their tasks and files. Keys
    are those of `summary` in docs/formats.md: `questions` = `targets` + the sum of `rejected`, in
    which every reason is; questions with at least one valid (the full path, too), saving or
    improving path, by the search alone and among the paths that survived; such paths themselves;
    all counts of questions by task; and the decisions of the targets.
    """
    by_layer = list(map(list, class_counts(record.optimal_layer_config for record in kept)))
    by_question: dict[str, SearchRecord] = {}
    reached: dict[tuple[str, str, Decisions], bool] = {}  # whether a target answers right
    for record in records:
        is_open = record.reward == KL_REWARD  # nothing is right there, and nothing wrong
        for path in record.paths:
            reached[record.task, record.id, path.decisions] = is_open or is_valid(path)
        by_question.setdefault(question_key(record.question), record)
    first = [(record, _path_counts(record)) for record in by_question.values()]
    copies = Counter(record.task for record in records)
    copies.subtract(record.task for record, _ in first)
    tasks = dict.fromkeys([*copies, *(record.task for record in kept)])

    def of_task(task: str) -> dict[str, int]:
        found = [(record, counts) for record, counts in first if record.task == task]
        improving = [record.improving for record in kept if record.task == task]
        return {
            "questions": len(found),
            "copies": copies[task],
            **_questions_by_kind(found),
            "targets": len(improving),
            "improving_targets": sum(improving),
        }

    return {
        "questions": len(first),
        "copies": copies.total(),
        "targets": len(kept),
        "rejected": {reason: rejected.get(reason, 0) for reason in REASONS},
        **_questions_by_kind(first),
        "paths": {
            name: sum(counts[name] for _, counts in first)
            for name in _NAMES
            if not name.startswith("valid")
        },
        "tasks": {task: of_task(task) for task in tasks},
        "wrong_targets": sum(not reached[t.task, t.id, t.optimal_layer_config] for t in kept),
        "executions": sum(record.executions for record in kept) / len(kept) if kept else None,
        "class_counts": [sum(layer[decision] for layer in by_layer) for decision in Decision],
        "class_counts_by_layer": by_layer,
    }


def class_counts(rows: Iterable[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    """Count how often each layer is skipped, executed, repeated: `[L][3]`, empty without rows."""
    columns = zip(*rows, strict=True)
    return tuple((each.count(0), each.count(1), each.count(2)) for each in columns)


_NAMES = tuple(f"{kind}_{when}_retest" for kind in KINDS for when in ("before", "after"))


def _path_counts(record: SearchRecord) -> dict[str, int]:
    """Count a question's paths of each kind, as the search found them and that survived."""
    found = {kind: [p for p in record.paths if is_one(p, record)] for kind, is_one in KINDS.items()}
    counts = [n for paths in found.values() for n in (len(paths), sum(map(survived, paths)))]
    return dict(zip(_NAMES, counts, strict=True))


def _questions_by_kind(found: Sequence[tuple[SearchRecord, Mapping[str, int]]]) -> dict[str, int]:
    return {
        "base_correct": sum(is_valid(record.full) for record, _ in found),
        **{name: sum(counts[name] > 0 for _, counts in found) for name in _NAMES},
    }


def edit_effects(
    records: Sequence[SearchRecord], decision: Decision, min_questions: int
) -> list[tuple[int, float]]:
    """Return how skipping, or repeating, each layer alone changed the mean reward, best first.

    Layers that were tried alone on fewer questions are left out.
    """
    changes: dict[int, list[float]] = {}
    for record in records:
        for path in record.paths:
            edited = [layer for layer, value in enumerate(path.decisions) if value != 1]
            if len(edited) == 1 and path.decisions[edited[0]] == decision:
                changes.setdefault(edited[0], []).append(path.reward - record.full.reward)
    means = [(layer, fmean(each)) for layer, each in changes.items() if len(each) >= min_questions]
    return sorted(means, key=lambda effect: (-effect[1], effect[0]))
