"""What a search has found, counted; and the record of a question that was set aside.

Owns the numbers that progress and the last summary show, and a line of `search.failed.jsonl`.
Leaves trying questions again to `attempts`. Loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drllm.errors import RecordError
from drllm.records import SearchRecord
from drllm.supervision import is_improving, survived


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedQuestion:
    """A question that failed every time; one line of `search.failed.jsonl`.

    Attributes:
        id: Unique within the task.
        task: The task's name.
        question: The question's text.
        error: Of the last attempt.
        attempts: How often it was tried.
    """

    id: str
    task: str
    question: str
    error: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Counts over questions that are done; two of them can be added.

    Attributes:
        questions: Searched or set aside.
        failed: Set aside.
        paths: Tried.
        valid: Questions with a path, the full one included, that survived the re-test.
        improving: Questions with such a path where the full path fails.
    """

    questions: int = 0
    failed: int = 0
    paths: int = 0
    valid: int = 0
    improving: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Return the counts over both sets of questions."""
        return Tally(
            **{
                declared.name: getattr(self, declared.name) + getattr(other, declared.name)
                for declared in dataclasses.fields(self)
            }
        )


def tally(records: Sequence[SearchRecord], failed: Sequence[FailedQuestion]) -> Tally:
    """Count what a block's search has found."""
    kept = [[path for path in record.paths if survived(path)] for record in records]
    return Tally(
        questions=len(records) + len(failed),
        failed=len(failed),
        paths=sum(len(record.paths) for record in records),
        valid=sum(bool(paths) for paths in kept),
        improving=sum(
            any(is_improving(path, record) for path in paths)
            for record, paths in zip(records, kept, strict=True)
        ),
    )


def failed_question(row: Mapping[str, Any]) -> FailedQuestion:
    """Read one parsed line of `search.failed.jsonl`.

    Raises:
        RecordError: What is missing or wrong, without file and line.
    """
    for declared in dataclasses.fields(FailedQuestion):
        kind = int if declared.name == "attempts" else str
        if not isinstance(row.get(declared.name), kind):
            raise RecordError(f"{declared.name!r} is missing or not {kind.__name__}")
    return FailedQuestion(**{d.name: row[d.name] for d in dataclasses.fields(FailedQuestion)})
