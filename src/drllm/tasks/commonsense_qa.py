"""CommonsenseQA: everyday knowledge, five options. Loads no torch.

The published test file has no answers, so the validation file is the test. An evaluation asks for
letters under the name `commonsense_qa`, as lm-evaluation-harness does, and scores the options'
texts under `commonsense_qa_cloze`, as a search does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.tasks.base import Example
from drllm.tasks.multiple_choice import MultipleChoiceTask, labelled_example
from drllm.tasks.published import EvaluatedTask, PublishedTask


class CommonsenseQuestions(PublishedTask):
    """The questions of CommonsenseQA (Talmor et al. 2019), however they are asked."""

    repository = "tau/commonsense_qa"
    folder = "commonsense_qa"
    files: ClassVar = {"train": "train", "validation": "validation"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row with `id`, `question`, `choices` (`text`, `label`) and `answerKey`.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        return labelled_example(row, self.name)


class CommonsenseQa(CommonsenseQuestions, MultipleChoiceTask):
    """CommonsenseQA, for a search in cloze form unless `letter` is asked for."""

    name = "commonsense_qa"
    description = "everyday knowledge, five options (CommonsenseQA)"


class CommonsenseQaCloze(CommonsenseQuestions, EvaluatedTask):
    """CommonsenseQA, evaluated in cloze form."""

    name = "commonsense_qa_cloze"
    description = "CommonsenseQA with the options' texts scored, not letters (evaluation only)"


COMMONSENSE_QA = CommonsenseQa()
COMMONSENSE_QA_CLOZE = CommonsenseQaCloze()
