"""GPQA Diamond: graduate-level science, four options. Loads no torch.

Only evaluated; its one file is halved into `select` and `test`. The set is gated on the hub: its
owners ask for a log-in, and that no question is shown in public.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.records import question_key
from drllm.tasks.base import Example
from drllm.tasks.published import EvaluatedTask
from drllm.tasks.rows import text_of, texts_of

RIGHT = "Correct Answer"
WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


class GpqaDiamond(EvaluatedTask):
    """GPQA Diamond (Rein et al. 2023).

    The options stand in an order that is drawn from the question's text, the same in every run
    and for rows of the hub and of a data folder.
    """

    name = "gpqa_diamond"
    description = "graduate-level science, four options (GPQA Diamond; evaluation only)"
    repository = "Idavidrein/gpqa"
    config = "gpqa_diamond"
    files: ClassVar = {"test": "single"}
    hub_files: ClassVar = {"test": "train"}
    columns = ("Question", RIGHT, *WRONG)

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row of the hub, or one with `question`, `choices` and `answer` (index from 0).

        The hub's rows have `Question`, `Correct Answer` and `Incorrect Answer 1` to `3`.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        if "choices" in row:
            question, texts = text_of(row, "question"), texts_of(row, "choices", minimum=2)
            gold = row.get("answer")
            if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(texts):
                raise TaskError(
                    f"'answer' is {gold!r}; expected an index from 0 to {len(texts) - 1}"
                )
        else:
            question = text_of(row, "Question")
            texts, gold = tuple(text_of(row, key) for key in (RIGHT, *WRONG)), 0
        options = [cleaned(text) for text in texts]
        if len(options) != 4:
            raise TaskError(f"'choices' has {len(options)} entries; expected 4")
        right = options[gold]
        order = sorted(options)
        Random(question_key(question)).shuffle(order)
        return Example(
            id=row_id,
            task=self.name,
            question=question,
            choices=tuple(order),
            gold=order.index(right),
            answer=right,
        )


def cleaned(text: str) -> str:
    """Return an option as lm-evaluation-harness shows it (compared in a test)."""
    return text.strip().replace(" [title]", ". ").replace("  ", " ")


GPQA_DIAMOND = GpqaDiamond()
