"""What a search has found, counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from drllm.records import FailedQuestion, SearchRecord
from drllm.supervision import is_improving, survived


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
