"""AIME 2024: thirty competition problems whose answers are whole numbers. Loads no torch.

Only evaluated; its one file is halved into `select` and `test`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.published import EvaluatedTask
from drllm.tasks.rows import text_of


class Aime24(EvaluatedTask):
    """The American Invitational Mathematics Examination of 2024, both papers."""

    name = "aime24"
    description = "competition problems with whole-number answers (AIME 2024; evaluation only)"
    repository = "Maxwell-Jia/AIME_2024"
    files: ClassVar = {"test": "single"}
    hub_files: ClassVar = {"test": "train"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row of the hub (`Problem`, `Answer`), or one with `problem` and `answer`.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        hub = "Problem" in row
        key = "Answer" if hub else "answer"
        answer = str(row.get(key)).strip()
        if not answer.isdecimal():
            raise TaskError(f"{key!r} is {row.get(key)!r}; expected a whole number")
        return Example(
            id=row_id,
            task=self.name,
            question=text_of(row, "Problem" if hub else "problem"),
            answer=answer,
        )


AIME24 = Aime24()
