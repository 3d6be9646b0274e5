"""Questions that got no target, and why: `supervision.rejected.jsonl` beside the targets.

Owns a line of the file and where the file lies. Leaves the reasons to `rules` and `selection`,
writing to `files`. Loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import RecordError
from drllm.records import SearchRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedQuestion:
    """A searched question without a target; one line of `supervision.rejected.jsonl`.

    Attributes:
        id: Unique within the task.
        task: The task's name.
        question: The question's text.
        reason: Why it has none, one of `REASONS`; or, of a copy of an earlier record, `TWICE`.
    """

    id: str
    task: str
    question: str
    reason: str


def rejected_path(supervision: Path) -> Path:
    """Return where the questions without a target lie.

    Example:
        >>> rejected_path(Path("data/supervision.jsonl")).name
        'supervision.rejected.jsonl'
    """
    return supervision.with_name(supervision.name.removesuffix(".jsonl") + ".rejected.jsonl")


def rejected_questions(
    records: Sequence[SearchRecord], reasons: Sequence[str | None]
) -> Iterator[RejectedQuestion]:
    """Yield the records without a target, in order.

    Args:
        records: What was searched.
        reasons: One for each: why it has no target, None where it has one.
    """
    for record, reason in zip(records, reasons, strict=True):
        if reason is not None:
            yield RejectedQuestion(
                id=record.id, task=record.task, question=record.question, reason=reason
            )


def rejected_question(row: Mapping[str, Any]) -> RejectedQuestion:
    """Read one parsed line of `supervision.rejected.jsonl`.

    Raises:
        RecordError: What is missing or wrong, without file and line.
    """
    names = [declared.name for declared in dataclasses.fields(RejectedQuestion)]
    for name in names:
        if not isinstance(row.get(name), str):
            raise RecordError(f"{name!r} is missing or not text")
    return RejectedQuestion(**{name: row[name] for name in names})
