"""GSM8K: grade-school word problems, the number asked for at once. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.math import BoxedTask
from drllm.tasks.published import PublishedTask
from drllm.tasks.rows import text_of

MARK = "#### "
"""Stands before the final number of a worked solution."""


class Gsm8k(PublishedTask, BoxedTask):
    """GSM8K (Cobbe et al. 2021), without room for a chain of thought."""

    name = "gsm8k"
    description = "grade-school word problems, the number alone in a box (GSM8K)"
    repository = "openai/gsm8k"
    config = "main"
    files: ClassVar = {"train": "train", "test": "validation"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row with `question` and `answer`: a solution that ends in `#### ` and a number.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        _, mark, number = text_of(row, "answer").rpartition(MARK)
        answer = number.strip().replace(",", "")
        if not mark or not answer:
            raise TaskError(f"'answer' doesn't end in {MARK!r} and a number")
        question = text_of(row, "question")
        return Example(id=row_id, task=self.name, question=question, answer=answer)


GSM8K = Gsm8k()
