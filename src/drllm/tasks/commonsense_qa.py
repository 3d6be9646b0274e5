"""CommonsenseQA: everyday knowledge, five options. Loads no torch.

The published test file has no answers, so the validation file is the test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.tasks.base import Example
from drllm.tasks.multiple_choice import MultipleChoiceTask, labelled_example
from drllm.tasks.published import PublishedTask


class CommonsenseQa(PublishedTask, MultipleChoiceTask):
    """CommonsenseQA (Talmor et al. 2019), in cloze form unless `letter` is asked for."""

    name = "commonsense_qa"
    description = "everyday knowledge, five options (CommonsenseQA)"
    repository = "tau/commonsense_qa"
    files: ClassVar = {"train": "train", "validation": "validation"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row with `id`, `question`, `choices` (`text`, `label`) and `answerKey`.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        return labelled_example(row, self.name)


COMMONSENSE_QA = CommonsenseQa()
