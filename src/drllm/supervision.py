"""Supervision: which of the paths that a search tried becomes a question's target.

Owns the rules that pick a target, the reasons for which a question has none, and the summary of
both. Leaves trying and re-testing paths to the search, the file format to `records`, and what is
learnt from a target to the training. Loads no torch.

Axes: L layers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.config import SuperviseConfig
from drllm.errors import RecordError
from drllm.paths import Decision
from drllm.records import (
    SearchRecord,
    SupervisionRecord,
    TriedPath,
    new_manifest,
    question_key,
    read_manifest,
    read_search,
    write_records,
)

NO_VALID_PATH = "no valid path"
ONLY_FULL_PATH = "only the full path"
NOT_SURVIVED = "no path survived the re-test"
TWICE = "same question twice"
OVER_QUOTA = "over the quota"
REASONS = (NO_VALID_PATH, ONLY_FULL_PATH, NOT_SURVIVED, TWICE, OVER_QUOTA)
"""Why a searched question has no target."""

_SAME_MODEL = ("fingerprint", "num_layers", "hidden_size", "class")


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """The targets of a set of questions, and what became of the others.

    Attributes:
        records: One per question that has a target, in the order of the questions.
        summary: Counts, as `summarise` describes them.
        rewards: The rewards that the prompts of the targets were made for, by name.
    """

    records: tuple[SupervisionRecord, ...]
    summary: dict[str, Any]
    rewards: tuple[str, ...]


# --- which paths count -------------------------------------------------------------------------


def is_valid(path: TriedPath) -> bool:
    """Say whether a path answered right."""
    return path.reward >= 1


def is_saving(path: TriedPath, record: SearchRecord) -> bool:
    """Say whether a path answered right with fewer executions than the full path."""
    return is_valid(path) and path.executions < record.full.executions


def is_improving(path: TriedPath, record: SearchRecord) -> bool:
    """Say whether a path answered right where the full path failed."""
    return is_valid(path) and not is_valid(record.full)


def survived(path: TriedPath) -> bool:
    """Say whether a path answered right, and again when asked in other ways."""
    return is_valid(path) and path.retest is not None and path.retest.survived


# --- the rules ---------------------------------------------------------------------------------


def choose(record: SearchRecord, target: str) -> TriedPath | str:
    """Pick one question's target path.

    The full path is a candidate like any other where it is right: a question that no shorter path
    answers teaches the routers to execute everything. Not so under `paper`, which keeps only
    paths that improve on the full path or save executions.

    Args:
        record: What the search found.
        target: `shortest` (fewest executions, then largest margin in the re-test, then earliest),
            `largest_margin` (in the re-test; then fewest executions, then earliest), both among
            the paths that survived the re-test; or `paper` (fewest executions, then earliest,
            re-tested or not).

    Returns:
        The path, or the reason why there is none.

    Source: Dr.LLM section 3.1 for `paper`; the others are ours (docs/differences.md, D-05).
    """
    valid = [path for path in record.paths if is_valid(path)]
    if not valid:
        return NO_VALID_PATH
    if target == "paper":
        kept = [p for p in valid if is_improving(p, record) or is_saving(p, record)]
        if not kept:
            return ONLY_FULL_PATH
        return min(kept, key=lambda path: (path.executions, path.simulation))
    kept = [path for path in valid if survived(path)]
    if not kept:
        return NOT_SURVIVED
    if target == "shortest":
        return min(kept, key=lambda p: (p.executions, -_retest_margin(p), p.simulation))
    return min(kept, key=lambda p: (-_retest_margin(p), p.executions, p.simulation))


def _retest_margin(path: TriedPath) -> float:
    """Return the margin in the re-test; a path without one comes last."""
    margin = path.retest.margin if path.retest else None
    return -math.inf if margin is None else margin


def targets(records: Sequence[SearchRecord], config: SuperviseConfig) -> Supervision:
    """Pick a target path for each searched question.

    Questions with the same text, in whatever tasks, are one question; the first one counts.
    With `quota_improving`, targets that don't improve on the full path are dropped, the last ones
    first, until the others have at least that share.

    Args:
        records: Questions in order.
        config: The rule, and the quota if there is one.

    Returns:
        The targets and the summary; no targets at all is a result like any other.
    """
    kept: list[SupervisionRecord] = []
    rejected: Counter[str] = Counter()
    seen: set[str] = set()
    for record in records:
        key = question_key(record.question)
        chosen = TWICE if key in seen else choose(record, config.target)
        seen.add(key)
        if isinstance(chosen, str):
            rejected[chosen] += 1
        else:
            kept.append(_supervision_record(record, chosen))
    if config.quota_improving is not None:
        within = _within_quota(kept, config.quota_improving)
        rejected[OVER_QUOTA] = len(kept) - len(within)
        kept = within
    ids = {(record.task, record.id) for record in kept}
    rewards = {record.reward for record in records if (record.task, record.id) in ids}
    return Supervision(
        records=tuple(kept),
        summary=summarise(records, kept, rejected),
        rewards=tuple(sorted(rewards)),
    )


def _supervision_record(record: SearchRecord, path: TriedPath) -> SupervisionRecord:
    return SupervisionRecord(
        question=record.question,
        optimal_layer_config=path.decisions,
        answer=record.answer,
        prompt=record.prompt,
        id=record.id,
        task=record.task,
        executions=path.executions,
        improving=is_improving(path, record),
        margin=path.margin,
    )


def _within_quota(kept: Sequence[SupervisionRecord], share: float) -> list[SupervisionRecord]:
    """Drop the last targets that don't improve until the improving ones have their share."""
    improving = sum(record.improving for record in kept)
    # i / (i + n) >= share; a rounding error of the quotient never costs a target.
    room = math.floor(improving * (1 - share) / share + 1e-9)
    within: list[SupervisionRecord] = []
    for record in kept:
        if record.improving:
            within.append(record)
        elif room > 0:
            within.append(record)
            room -= 1
    return within


def summarise(
    records: Sequence[SearchRecord],
    kept: Sequence[SupervisionRecord],
    rejected: Mapping[str, int],
) -> dict[str, Any]:
    """Count what the search found and what became of it.

    Args:
        records: Every searched question.
        kept: Their targets.
        rejected: Questions without a target, by reason.

    Returns:
        `questions` = `targets` + the sum of `rejected` (every reason is there, zeros too);
        `base_correct`, the questions that the full path answers right; `valid_…`, `saving_…` and
        `improving_…`, the questions with at least one such path (the full path is valid too where
        it is right), `…_before_retest` by the search alone and `…_after_retest` among the paths
        that survived; `class_counts`, how often the targets skip, execute and repeat.
    """

    def count(test: Callable[[TriedPath, SearchRecord], bool], *, retested: bool) -> int:
        return sum(
            any(test(path, record) and (survived(path) or not retested) for path in record.paths)
            for record in records
        )

    counts = Counter(value for record in kept for value in record.optimal_layer_config)
    tests: dict[str, Callable[[TriedPath, SearchRecord], bool]] = {
        "valid": lambda path, _: is_valid(path),
        "saving": is_saving,
        "improving": is_improving,
    }
    yields = {
        f"{name}_{when}_retest": count(test, retested=when == "after")
        for name, test in tests.items()
        for when in ("before", "after")
    }
    return {
        "questions": len(records),
        "targets": len(kept),
        "rejected": {reason: rejected.get(reason, 0) for reason in REASONS},
        "base_correct": sum(is_valid(record.full) for record in records),
        **yields,
        "class_counts": [counts[decision] for decision in Decision],
    }


# --- whole files -------------------------------------------------------------------------------


def write(search_files: Sequence[Path], output: Path, config: SuperviseConfig) -> dict[str, Any]:
    """Read search files, pick the targets and write them with their manifest.

    Args:
        search_files: `search.jsonl` files of one base model, read in this order.
        output: The `supervision.jsonl` to write; replaced if it is there.
        config: The rule, and the quota if there is one.

    Returns:
        The summary, which the manifest holds too.

    Raises:
        RecordError: No file; a file that can't be trusted; files of different base models or
            numbers of layers; two questions under one id; an output that is one of the inputs;
            no target at all. Nothing is written then.
    """
    if not search_files:
        raise RecordError("no search file is given; name at least one search.jsonl")
    if output.resolve() in {file.resolve() for file in search_files}:
        raise RecordError(f"{output} is both read and written; choose another output file")
    sources = [_read_source(file) for file in search_files]
    for first, other in itertools.combinations(sources, 2):
        _check_same_model(first, other)
    _check_ids(sources)
    supervision = targets([r for source in sources for r in source.records], config)
    if not supervision.records:
        reasons = (f"{n} {reason}" for reason, n in supervision.summary["rejected"].items() if n)
        raise RecordError(
            f"none of the {supervision.summary['questions']} searched questions has a target "
            f"({', '.join(reasons)}); search more questions or simulations, or choose another "
            f"--target"
        )
    manifest = new_manifest(
        "supervision",
        model=max((source.model for source in sources), key=len),  # the one that tells most
        config=config.to_dict(),
        inputs=search_files,
        extra={"summary": supervision.summary, "rewards": list(supervision.rewards)},
    )
    write_records(output, supervision.records, manifest)
    return supervision.summary


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A search file: its questions and the base model they were searched with."""

    file: Path
    records: list[SearchRecord]
    model: dict[str, Any]


def _read_source(file: Path) -> _Source:
    records = read_search(file)
    layers = records[0].num_layers
    for line, record in enumerate(records, start=1):
        if record.num_layers != layers:
            raise RecordError(
                f"{file}, line {line}: the question was searched on {record.num_layers} layers, "
                f"that of line 1 on {layers}; a file holds the paths of one model"
            )
    manifest = read_manifest(file, "search") or {"model": {}}
    model = {"num_layers": layers, **manifest["model"]}
    if model["num_layers"] != layers:
        raise RecordError(
            f"{file} holds paths of {layers} layers, but its manifest names a model of "
            f"{model['num_layers']}; make it again"
        )
    return _Source(file=file, records=records, model=model)


def _check_same_model(first: _Source, other: _Source) -> None:
    """Refuse files of two base models; another id for the same weights is fine."""
    known = [name for name in _SAME_MODEL if name in first.model and name in other.model]
    if "fingerprint" not in known:
        known += [
            name for name in ("id", "revision") if name in first.model and name in other.model
        ]
    for name in known:
        if first.model[name] != other.model[name]:
            raise RecordError(
                f"{first.file} and {other.file} are of different base models "
                f"({name} {first.model[name]!r} and {other.model[name]!r}); "
                f"make one supervision file for each"
            )


def _check_ids(sources: Sequence[_Source]) -> None:
    """Refuse two questions under one id, which readers of the targets could not tell apart."""
    seen: dict[tuple[str, str], tuple[str, Path]] = {}
    for source in sources:
        for record in source.records:
            key = question_key(record.question)
            text, file = seen.setdefault((record.task, record.id), (key, source.file))
            if text != key:
                raise RecordError(
                    f"{file} and {source.file} have different questions with id {record.id!r} of "
                    f"task {record.task!r}; rename the task of one of them"
                )
