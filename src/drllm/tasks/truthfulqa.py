"""TruthfulQA: questions that many people answer wrongly, one true option. Loads no torch.

Only evaluated; its one file is halved into `select` and `test`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.published import EvaluatedTask
from drllm.tasks.rows import text_of, texts_of


class TruthfulQa(EvaluatedTask):
    """TruthfulQA (Lin et al. 2022) in the form with one true option (MC1)."""

    name = "truthfulqa"
    description = "one true option among tempting false ones (TruthfulQA; evaluation only)"
    repository = "truthfulqa/truthful_qa"
    config = "multiple_choice"
    files: ClassVar = {"validation": "single"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row with `question` and `mc1_targets` (`choices`, `labels`: one 1, else 0).

        The true option becomes the first, where the harness looks for it.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        targets = row.get("mc1_targets")
        if not isinstance(targets, Mapping):
            raise TaskError(
                f"'mc1_targets' is {targets!r}; expected an object with 'choices' and 'labels'"
            )
        choices = texts_of(targets, "choices", minimum=2)
        labels = targets.get("labels")
        if not isinstance(labels, list) or sorted(labels) != [0] * (len(choices) - 1) + [1]:
            raise TaskError(
                f"'labels' is {labels!r}; expected {len(choices)} of them, a single 1 and else 0"
            )
        true = choices[labels.index(1)]
        others = (choice for choice, label in zip(choices, labels, strict=True) if not label)
        return Example(
            id=row_id,
            task=self.name,
            question=text_of(row, "question"),
            choices=(true, *others),
            gold=0,
            answer=true,
        )


TRUTHFULQA = TruthfulQa()
