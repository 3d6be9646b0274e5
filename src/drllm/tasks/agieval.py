"""AGIEval: questions of admission and licensing exams, four or five options. Loads no torch.

Only evaluated, in the English parts that have options; all of them together are halved into
`select` and `test`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example
from drllm.tasks.published import EvaluatedTask
from drllm.tasks.rows import text_of, texts_of

PARTS = (
    "aqua-rat",
    "gaokao-english",
    "logiqa-en",
    "lsat-ar",
    "lsat-lr",
    "lsat-rc",
    "sat-en-without-passage",
    "sat-en",
    "sat-math",
)
"""Each is a repository of its own on the hub."""


class AgiEval(EvaluatedTask):
    """The English multiple-choice parts of AGIEval (Zhong et al. 2023), as one set.

    Accuracy over all of them is what lm-evaluation-harness reports for a group of them, where
    each part counts by its size.
    """

    name = "agieval"
    description = "exam questions, the English parts with options (AGIEval; evaluation only)"
    repository = "hails/agieval-*"
    files: ClassVar = {"test": "single"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row of the hub, or one with `question`, `choices` and `answer` (index from 0).

        The hub's rows have `query` (the whole prompt), `choices` and `gold` (a list of indices,
        most with one).

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        hub = "query" in row
        choices = texts_of(row, "choices", minimum=2)
        golds = golds_of(row)
        if not golds or not all(
            isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices)
            for gold in golds
        ):
            key = "gold" if hub else "answer"
            raise TaskError(
                f"{key!r} is {row.get(key)!r}; expected an index from 0 to {len(choices) - 1}"
            )
        return Example(
            id=row_id,
            task=self.name,
            question=text_of(row, "query" if hub else "question"),
            choices=choices,
            gold=golds[0],
            answer=choices[golds[0]],
        )

    def _hub_rows(self, file: str) -> Iterable[Mapping[str, Any]]:
        for part in PARTS:
            yield from self._fetch(self.repository.replace("*", part), file)


def golds_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the indices of a row's right options, unchecked; none where they aren't given."""
    golds = row.get("gold", row.get("answer"))
    return golds if isinstance(golds, list) else [] if golds is None else [golds]


AGIEVAL = AgiEval()
