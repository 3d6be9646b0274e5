"""All questions' targets: the rule for each, copies counted once, quotas over the rest.

Owns the order of these steps and the check of the settings. Leaves one question's choice to
`rules`, quotas to `quotas`, the counting to `summary`. Loads no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from drllm.config import SuperviseConfig
from drllm.errors import ConfigError, unknown_name
from drllm.records import (
    SearchRecord,
    SupervisionRecord,
    TriedPath,
    WeightedPath,
    question_key,
)
from drllm.supervision.quotas import over_quota, read_quotas
from drllm.supervision.rules import (
    MIN_SAVING,
    OVER_QUOTA,
    TARGETS,
    TWICE,
    choose,
    is_improving,
    weigh,
)
from drllm.supervision.summary import summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """The targets of a set of questions, and what became of the others.

    Attributes:
        records: One per question that has a target, in the order of the questions.
        reasons: One per question: why it has no target, None where it has one.
        summary: Counts, as `summarise` describes them.
        rewards: The rewards that the prompts of the targets were made for, by name.
    """

    records: tuple[SupervisionRecord, ...]
    reasons: tuple[str | None, ...]
    summary: dict[str, Any]
    rewards: tuple[str, ...]


def check_settings(config: SuperviseConfig, tasks: Collection[str]) -> dict[str, int]:
    """Refuse settings that can't be followed, before anything is searched or read for them.

    Args:
        config: The rule and the quotas.
        tasks: Names of the tasks whose questions there are.

    Returns:
        Most targets by task.

    Raises:
        ConfigError: Quotas that can't be read or name another task; a least saving with a rule
            that has no use for it.
    """
    if config.min_saving is not None and not TARGETS.get(config.target).uses_min_saving:
        raise ConfigError(
            f"--min-saving {config.min_saving:g} has no effect with --target {config.target}; "
            f"leave it out, or choose --target least_kl"
        )
    quotas = read_quotas(config.quotas)
    for task in quotas:
        if task not in tasks:
            raise ConfigError("--quotas: " + unknown_name("task", task, tasks))
    return quotas


def targets(records: Sequence[SearchRecord], config: SuperviseConfig) -> Supervision:
    """Pick a target path for each searched question.

    Questions with the same text, in whatever tasks, are one question; the first one counts, with
    or without a target. Quotas are filled in the order of the questions.

    Args:
        records: Questions in order.
        config: The rule, and the quotas if there are any.

    Returns:
        The targets and the summary; no targets at all is a result like any other.

    Raises:
        ConfigError: As for `check_settings`, and weights by a KL that a path lacks.
    """
    quotas = check_settings(config, {record.task for record in records})
    min_saving = MIN_SAVING if config.min_saving is None else config.min_saving
    chosen: list[TriedPath | str] = []
    seen: set[str] = set()
    for record in records:
        key = question_key(record.question)
        chosen.append(
            TWICE if key in seen else choose(record, config.target, min_saving=min_saving)
        )
        seen.add(key)
    places = [place for place, path in enumerate(chosen) if isinstance(path, TriedPath)]
    candidates = [
        _supervision_record(records[place], path, _valid_paths(records[place], config, min_saving))
        for place, path in enumerate(chosen)
        if isinstance(path, TriedPath)
    ]
    dropped = over_quota(candidates, quotas, config.quota_improving)
    for place in dropped:
        chosen[places[place]] = OVER_QUOTA
    kept = [record for place, record in enumerate(candidates) if place not in dropped]
    reasons = tuple(path if isinstance(path, str) else None for path in chosen)
    return Supervision(
        records=tuple(kept),
        reasons=reasons,
        summary=summarise(records, kept, Counter(reason for reason in reasons if reason)),
        rewards=tuple(
            sorted({r.reward for r, reason in zip(records, reasons, strict=True) if not reason})
        ),
    )


def _valid_paths(
    record: SearchRecord, config: SuperviseConfig, min_saving: float
) -> tuple[WeightedPath, ...]:
    """Return all paths that the rule might have picked, weighted, where they are asked for."""
    if config.path_weights == "none":
        return ()
    paths = TARGETS.get(config.target)().candidates(record, min_saving)
    assert not isinstance(paths, str)  # the question has a target
    return tuple(
        WeightedPath(decisions=path.decisions, weight=weight)
        for path, weight in zip(paths, weigh(paths, config.path_weights), strict=True)
    )


def _supervision_record(
    record: SearchRecord, path: TriedPath, valid_paths: tuple[WeightedPath, ...]
) -> SupervisionRecord:
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
        valid_paths=valid_paths or UNSET,
    )
