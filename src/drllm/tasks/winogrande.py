"""WinoGrande: which of two names fills a gap in a sentence. Loads no torch.

Only evaluated: an option stands inside the context and what follows the gap is scored, so there
is no single text that a router could read before all options. The validation file is halved into
`select` and `test`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.published import EvaluatedTask
from drllm.tasks.rows import text_of

GAP = "_"


class WinoGrande(EvaluatedTask):
    """WinoGrande (Sakaguchi et al. 2020), the largest of its sets."""

    name = "winogrande"
    description = "which of two names fills the gap in a sentence (WinoGrande; evaluation only)"
    repository = "allenai/winogrande"
    config = "winogrande_xl"
    files: ClassVar = {"validation": "single"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row with `sentence`, `option1`, `option2` and `answer` ("1" or "2").

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        sentence = text_of(row, "sentence")
        if not sentence.partition(GAP)[2].strip():
            raise TaskError(f"'sentence' has no gap ({GAP}) with text behind it")
        choices = (text_of(row, "option1"), text_of(row, "option2"))
        answer = row.get("answer")
        if answer not in ("1", "2"):
            raise TaskError(f"'answer' is {answer!r}; expected '1' or '2'")
        gold = int(answer) - 1
        return Example(
            id=row_id,
            task=self.name,
            question=sentence,
            choices=choices,
            gold=gold,
            answer=choices[gold],
        )


WINOGRANDE = WinoGrande()
