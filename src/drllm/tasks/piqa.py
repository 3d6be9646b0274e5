"""PIQA: how to do everyday things, two options. Loads no torch.

The published test file has no labels, so the validation file is the test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.multiple_choice import MultipleChoiceTask
from drllm.tasks.published import PublishedTask
from drllm.tasks.rows import text_of


class Piqa(PublishedTask, MultipleChoiceTask):
    """PIQA (Bisk et al. 2020)."""

    name = "piqa"
    description = "how to do everyday things, two options (PIQA)"
    repository = "baber/piqa"
    files: ClassVar = {"train": "train", "validation": "validation"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row with `goal`, `sol1`, `sol2` and `label` (0 or 1).

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        choices = (text_of(row, "sol1"), text_of(row, "sol2"))
        label = row.get("label")
        if label not in (0, 1) or isinstance(label, bool):
            raise TaskError(f"'label' is {label!r}; expected 0 or 1")
        return Example(
            id=row_id,
            task=self.name,
            question=text_of(row, "goal"),
            choices=choices,
            gold=label,
            answer=choices[label],
        )


PIQA = Piqa()
