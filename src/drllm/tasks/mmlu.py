"""MMLU: 57 subjects from school to profession, four options. Loads no torch.

Only evaluated: there is no training file of the same questions. The validation file is halved into
`select` and `test`; the published test file is left alone. The five worked examples of a subject
(the published development file) are only shown. An evaluation asks for letters under the name
`mmlu` and scores the options' texts under `mmlu_cloze`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.multiple_choice import MultipleChoiceTask
from drllm.tasks.published import EvaluatedTask, PublishedTask
from drllm.tasks.rows import text_of, texts_of


class MmluQuestions(PublishedTask):
    """The questions of MMLU (Hendrycks et al. 2021), however they are asked."""

    repository = "cais/mmlu"
    config = "all"
    folder = "mmlu"
    files: ClassVar = {"validation": "single"}
    shots_file = "dev"

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row with `subject`, `question`, `choices` (texts) and `answer` (index from 0).

        The line on the subject and the stripped question are those of lm-evaluation-harness.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        choices = texts_of(row, "choices", minimum=2)
        gold = row.get("answer")
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            raise TaskError(f"'answer' is {gold!r}; expected an index from 0 to {len(choices) - 1}")
        subject = text_of(row, "subject").replace("_", " ")
        return Example(
            id=row_id,
            task=self.name,
            question=text_of(row, "question").strip(),
            context=f"The following are questions (with answers) about {subject}.",
            choices=choices,
            gold=gold,
            answer=choices[gold],
        )


class Mmlu(MmluQuestions, MultipleChoiceTask):
    """MMLU, for a search in cloze form unless `letter` is asked for."""

    name = "mmlu"
    description = "57 subjects from school to profession, four options (MMLU; evaluation only)"


class MmluCloze(MmluQuestions, EvaluatedTask):
    """MMLU, evaluated in cloze form."""

    name = "mmlu_cloze"
    description = "MMLU with the options' texts scored, not their letters (evaluation only)"


MMLU = Mmlu()
MMLU_CLOZE = MmluCloze()
