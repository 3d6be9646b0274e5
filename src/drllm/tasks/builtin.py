"""Tasks that need no data folder and no hub: `builtin_facts` and `builtin_arithmetic`.

The questions were written for this project. They are in `data/`, and each question names its split.
This module doesn't import torch.
"""

import functools
from pathlib import Path

from drllm.tasks.base import Task, check_split
from drllm.tasks.examples import Example, Row, with_options
from drllm.tasks.prompt_formats import BOXED, OPTIONS
from drllm.tasks.registry import register
from drllm.tasks.row_files import read_rows

DATA = Path(__file__).parent / "data"


@functools.cache
def load_rows(name: str) -> tuple[Row, ...]:
    """Return all rows of a file in `data/`, of every split."""
    return tuple(row for _, row in read_rows(DATA / name))


@register
class BuiltinFacts(Task):
    """Questions on general knowledge with four options.

    The wrong options are right answers to other questions of the same kind. Each fact has two
    questions, one for its subject and one for its answer. Both are in the same split, and the
    question's id says which of the two it is. The right option is equally often in each place.
    """

    name = "builtin_facts"
    description = "general knowledge, four options, made from tables of our own (needs no data)"
    prompt_format = OPTIONS

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in the file's order."""
        check_split(split)
        rows = [row for row in load_rows("facts.jsonl") if row["split"] == split]
        return [
            with_options(
                row["question"], tuple(row["choices"]), row["answer"], row["id"], self.name
            )
            for row in rows
        ]


@register
class BuiltinArithmetic(Task):
    """Short arithmetic problems that rules have made; a test solves every problem.

    The rows have the fields of DART-Math. Levels go from 1 (one step) to 5 (discounts, linear
    equations, remainders of powers). Problems of one kind with the same numbers are in the same
    split, even if their words differ.
    """

    name = "builtin_arithmetic"
    description = "arithmetic in five levels, answers in a box, made by rule (needs no data)"
    prompt_format = BOXED

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the problems of one split, in the file's order."""
        check_split(split)
        examples: list[Example] = []
        for number, row in enumerate(load_rows("arithmetic.jsonl")):
            if row["split"] == split:
                example = Example(
                    id=f"arithmetic-{number}",
                    task=self.name,
                    question=row["query"],
                    answer=row["gt_ans"],
                )
                examples.append(example)
        return examples


BUILTIN_TASKS = (BuiltinFacts.name, BuiltinArithmetic.name)
"""The names of the tasks that come with drllm."""
