"""Questions that need no data: `builtin_facts` and `builtin_arithmetic`, the same on every machine.

They stand in `data/`, written for this project, each with its split. Loads no torch.
"""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec

from drllm.records import read_json_lines
from drllm.tasks.base import Example, Task, check_split, with_options
from drllm.tasks.forms import BOXED, OPTIONS
from drllm.tasks.registry import register

DATA = Path(__file__).parent / "data"


class Fact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question on a fact; wrong options are other answers of the same kind.

    The id is kind, subject and which of subject and answer is asked for. A fact has one split,
    whichever way round it is asked, and the right option stands equally often in each place.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    split: str


class Problem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A problem in the schema of DART-Math, with its split.

    The answer is a whole number; levels go from 1 (one step) to 5 (discounts, linear equations,
    remainders of powers). Problems of one kind with the same numbers are in one split, in whatever
    words.
    """

    query: str
    gt_ans: str
    level: int
    split: str


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Return the questions on facts of all splits; each split mixes the kinds."""
    return tuple(each for _, each in read_json_lines(DATA / "facts.jsonl", Fact))


@functools.cache
def problems() -> tuple[Problem, ...]:
    """Return the problems of all levels and splits, mixed."""
    return tuple(each for _, each in read_json_lines(DATA / "arithmetic.jsonl", Problem))


@register
class BuiltinFacts(Task):
    """Four-way questions on general knowledge."""

    name = "builtin_facts"
    description = "general knowledge, four options, made from tables of our own (needs no data)"
    form = OPTIONS

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in the file's order."""
        check_split(split)
        return [
            with_options(each.question, each.choices, each.answer, each.id, self.name)
            for each in facts()
            if each.split == split
        ]


@register
class BuiltinArithmetic(Task):
    """Short problems in five levels, made by rule; a test works each of them out."""

    name = "builtin_arithmetic"
    description = "arithmetic in five levels, answers in a box, made by rule (needs no data)"
    form = BOXED

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the problems of one split, in the file's order."""
        check_split(split)
        return [
            Example(id=f"arithmetic-{n}", task=self.name, question=each.query, answer=each.gt_ans)
            for n, each in enumerate(problems())
            if each.split == split
        ]
