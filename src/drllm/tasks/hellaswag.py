"""HellaSwag: how a text goes on, four endings. Loads no torch.

Rows come raw, as on the hub, or with cleaned texts; both give the same question. The published
test file has no labels, so the validation file is the test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.multiple_choice import MultipleChoiceTask
from drllm.tasks.published import PublishedTask
from drllm.tasks.rows import text_of, texts_of


class HellaSwag(PublishedTask, MultipleChoiceTask):
    """HellaSwag (Zellers et al. 2019), the endings' texts scored."""

    name = "hellaswag"
    description = "how a text about everyday life goes on, four endings (HellaSwag)"
    rewards = ("loglikelihood",)
    template = "{question}"
    other_templates = (
        "Text: {question}",
        "How does this text go on?\n\n{question}",
        "Complete the text.\n\n{question}",
    )
    repository = "Rowan/hellaswag"
    files: ClassVar = {"train": "train", "validation": "validation"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example | None:
        """Read a raw row (`activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`) or a clean one.

        A clean row has `query`, `choices` and `label`; its texts are taken as they stand.

        Returns:
            The question; None where cleaning leaves nothing of an ending.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        if "query" in row:
            query, choices = text_of(row, "query"), texts_of(row, "choices", minimum=2)
        else:
            context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
            query = cleaned(f"{text_of(row, 'activity_label')}: {context}")
            choices = tuple(cleaned(ending) for ending in texts_of(row, "endings", minimum=2))
        gold = str(row.get("label"))
        if not re.fullmatch("[0-9]", gold) or int(gold) >= len(choices):
            raise TaskError(
                f"'label' is {row.get('label')!r}; expected an index from 0 to {len(choices) - 1}"
            )
        if not all(choices):
            return None
        return Example(
            id=row_id,
            task=self.name,
            question=query,
            choices=choices,
            gold=int(gold),
            answer=choices[int(gold)],
        )


def cleaned(text: str) -> str:
    """Return a text of the raw set without the marks of the pages that it was taken from.

    Source: what lm-evaluation-harness' task does with the raw rows; compared in a test.

    Example:
        >>> cleaned(" How to rest [title] Sit down [step] Now  close your eyes.")
        'How to rest. Sit down Now close your eyes.'
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _text(row: Mapping[str, Any], key: str) -> str:
    """Return a text that may be empty, as the second half of a context is in many rows."""
    if not isinstance(row.get(key), str):
        raise TaskError(f"{key!r} is {row.get(key)!r}; expected text")
    return str(row[key])


HELLASWAG = HellaSwag()
