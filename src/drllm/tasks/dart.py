"""DART-Math: competition problems in five levels, `dart-1` to `dart-5`, together `dart`.

The hub's set is a pool of 1.6 million sampled solutions to at most 7,500 problems of MATH's
training file; here a problem counts once. Its one file serves every stage. Loads no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.math import BoxedTask
from drllm.tasks.published import PublishedTask
from drllm.tasks.rows import text_of

LEVELS = (1, 2, 3, 4, 5)

logger = logging.getLogger(__name__)


class DartTask(PublishedTask, BoxedTask):
    """The problems of one level, the answer alone in a box.

    A few problems of MATH have no level ("Level ?"). The hub's are passed over with a warning that
    counts them; in a data folder, which its owner can mend, such a row is an error.

    Args:
        level: 1 (easiest) to 5, as MATH has it.

    Source: DART-Math (arXiv 2407.13690); the levels as tasks: Dr.LLM, Table 2.
    """

    repository = "hkust-nlp/dart-math-pool-math"
    columns = ("query", "gt_ans", "query_metadata", "level")
    files: ClassVar = {"train": "own"}
    folder = "dart"

    _problems: ClassVar[dict[str, tuple[Mapping[str, Any], ...]]] = {}
    """File → first row of each of its problems; the pool is long, and read once for all levels."""

    def __init__(self, level: int) -> None:
        self.level = level
        self.name = f"dart-{level}"
        self.description = f"competition problems of level {level}, answers in a box (DART-Math)"

    def read(self, row: Mapping[str, Any], row_id: str) -> Example | None:
        """Read a row with `query`, `gt_ans` and `level`, or the level inside `query_metadata`.

        Returns:
            The problem; None where it is of another level.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        level = _level(row)
        if level not in LEVELS:
            raise TaskError(f"'level' is {level!r}; expected a whole number from 1 to 5")
        question, answer = text_of(row, "query"), text_of(row, "gt_ans")
        if level != self.level:
            return None
        return Example(id=row_id, task=self.name, question=question, answer=answer)

    def _hub_rows(self, file: str) -> Iterable[Mapping[str, Any]]:
        if file not in self._problems:
            first: dict[str, Mapping[str, Any]] = {}
            for row in super()._hub_rows(file):
                first.setdefault(str(row.get("query")), row)
            levelled = tuple(row for row in first.values() if _level(row) in LEVELS)
            if not levelled:  # levels are written in another way: the first row is refused
                return first.values()
            if without := len(first) - len(levelled):
                logger.warning(
                    "%s %s: problems without a level from 1 to 5, which are passed over: %d",
                    self.repository,
                    file,
                    without,
                )
            self._problems[file] = levelled
        return self._problems[file]


def _level(row: Mapping[str, Any]) -> Any:
    """Return a row's level as it stands there; None where it has none."""
    metadata = row.get("query_metadata")
    return row.get("level", metadata.get("level") if isinstance(metadata, Mapping) else None)


DART = tuple(DartTask(level) for level in LEVELS)
DART_1, DART_2, DART_3, DART_4, DART_5 = DART
