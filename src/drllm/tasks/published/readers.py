"""Readers: functions that make questions from rows of published sets.

A reader returns the question of a row, or None if the row doesn't belong to the task. It raises a
TaskError for a row that can't be used. `task.PublishedTask` adds what a reader doesn't know: the
task's name, an id if the row has none, and the file and the line to the error.

A function `*_columns` returns the columns that the harness' task file reads. `sets.yaml` names
these functions. This module doesn't import torch.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from drllm.errors import TaskError
from drllm.tasks.examples import Example, Row, with_options
from drllm.tasks.prompt_formats import LETTERS
from drllm.tasks.rewards import normalise
from drllm.tasks.rows import EmptyTextError, read_index, read_object, read_text, read_texts
from drllm.work.listener import logger

UNANSWERABLE = "unanswerable"  # the right answer in SQuAD if the passage holds no answer
DART_LEVELS = (1, 2, 3, 4, 5)
"""The levels of MATH; 1 is the easiest. Every level is a task of its own (Dr.LLM, Table 2)."""


@dataclass(frozen=True)
class Columns:
    """Reads a question with options from columns of any name."""

    question: str = "question"  # the column with the question
    # The column with the list of options, or one column for each option.
    choices: str | tuple[str, ...] = "choices"
    answer: str = "answer"  # the column that says which option is right
    # The values of the answer column that stand for the options, in the options' order; empty if
    # the value is an index from 0.
    answers: tuple[Any, ...] = ()

    def __call__(self, row: Row) -> Example:
        """Return the question."""
        question = read_text(row, self.question)
        if isinstance(self.choices, str):
            choices = read_texts(row, self.choices, minimum=2)
        else:
            choices = tuple(read_text(row, column) for column in self.choices)
        value = row.get(self.answer)
        if not self.answers:
            return with_options(question, choices, read_index(value, len(choices), self.answer))
        if value not in self.answers:
            expected = " or ".join(map(repr, self.answers))
            raise TaskError(f"{self.answer!r} is {value!r}; expected {expected}")
        return with_options(question, choices, self.answers.index(value))


def labelled(row: Row) -> Example:
    """Read a row of ARC or CommonsenseQA: `id`, `question`, `choices` and `answerKey`.

    `choices` has two lists, `text` and `label`, with at least 2 entries. Labels are letters or
    numbers, and the answer key is one of the labels.
    """
    options = read_object(row, "choices", "text", "label")
    choices = read_texts(options, "text", minimum=2)
    labels = read_texts(options, "label", minimum=2)
    if len(choices) != len(labels) or len(set(labels)) != len(labels):
        raise TaskError(f"{len(choices)} options have the labels {', '.join(labels)}")
    if len(choices) > len(LETTERS):
        raise TaskError(f"'choices' has {len(choices)} options; at most {len(LETTERS)} are usable")
    key = read_text(row, "answerKey")
    if key not in labels:
        raise TaskError(f"'answerKey' is {key!r}; expected one of {', '.join(labels)}")
    question = read_text(row, "question")
    return with_options(question, choices, labels.index(key), read_text(row, "id"))


def hellaswag(row: Row) -> Example:
    """Read a raw row (`activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`) or a clean row.

    A clean row has `query`, `choices` and `label`, and its texts stay as they are.
    """
    if "query" in row:
        query = read_text(row, "query")
        choices = read_texts(row, "choices", minimum=2)
    else:
        for key in ("ctx_a", "ctx_b"):  # the second is empty in many rows
            if not isinstance(row.get(key), str):
                raise TaskError(f"{key!r} is {row.get(key)!r}; expected text")
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        query = clean(f"{read_text(row, 'activity_label')}: {context}")
        choices = tuple(clean(ending) for ending in read_texts(row, "endings", minimum=2))
    label = row.get("label")
    if re.fullmatch("[0-9]", str(label)):
        label = int(str(label))
    gold = read_index(label, len(choices), "label")
    if not all(choices):
        raise EmptyTextError("cleaning leaves nothing of an ending")
    return with_options(query, choices, gold)


def clean(text: str) -> str:
    """Remove the mark-up of the web pages that HellaSwag's texts come from.

    Source: lm-evaluation-harness' task does the same with the raw rows; a test compares the two.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def mmlu(row: Row) -> Example:
    """Read `subject`, `question`, `choices` and `answer` (index from 0).

    As in lm-evaluation-harness, the context is a line on the subject, and white space around the
    question is removed.
    """
    example = Columns()(row)
    subject = read_text(row, "subject").replace("_", " ")
    context = f"The following are questions (with answers) about {subject}."
    return replace(example, question=example.question.strip(), context=context)


def winogrande(row: Row) -> Example:
    """Read `sentence` (with a gap, `_`), `option1`, `option2` and `answer` ("1" or "2")."""
    if not read_text(row, "sentence").partition("_")[2].strip():
        raise TaskError("'sentence' has no gap (_) with text after it")
    return Columns("sentence", ("option1", "option2"), answers=("1", "2"))(row)


def gsm8k(row: Row) -> Example:
    """Read `question` and `answer`: a solution that ends in `#### ` and a number."""
    solution = read_text(row, "answer")
    _, mark, number = solution.rpartition("#### ")
    answer = number.strip().replace(",", "")
    if not mark or not answer:
        raise TaskError("'answer' doesn't end in '#### ' and a number")
    return Example(question=read_text(row, "question"), answer=answer, solution=solution)


def dart(row: Row, level: int) -> Example | None:
    """Read `query`, `gt_ans` and `level`, or the level inside `query_metadata`.

    Returns None for a problem of another level. A few problems of MATH have no level ("Level ?").
    In a data folder such a row is an error, since the folder's owner can correct the row.
    """
    row_level = _level(row)
    if row_level not in DART_LEVELS:
        raise TaskError(f"'level' is {row_level!r}; expected a whole number from 1 to 5")
    question = read_text(row, "query")
    answer = read_text(row, "gt_ans")
    if row_level != level:
        return None
    return Example(question=question, answer=answer)


dart_1 = functools.partial(dart, level=1)
dart_2 = functools.partial(dart, level=2)
dart_3 = functools.partial(dart, level=3)
dart_4 = functools.partial(dart, level=4)
dart_5 = functools.partial(dart, level=5)


def first_of_each_problem(rows: Iterable[Row], source: str) -> list[Row]:
    """Keep the first row of each problem in DART's pool; leave out problems without a level.

    Args:
        rows: The rows of the pool, several for each problem.
        source: The name of the pool, for a warning.
    """
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(str(row.get("query")), row)
    levelled = [row for row in first.values() if _level(row) in DART_LEVELS]
    if not levelled:  # the levels must have a new format, so let the reader refuse the first row
        return list(first.values())
    num_without = len(first) - len(levelled)
    if num_without > 0:
        logger.warning(
            "%s: problems without a level from 1 to 5 are left out: %d", source, num_without
        )
    return levelled


def _level(row: Row) -> Any:
    """Return the level of a row; None if it has none."""
    if "level" in row:
        return row["level"]
    metadata = row.get("query_metadata")
    return metadata.get("level") if isinstance(metadata, Mapping) else None


def squad(row: Row) -> Example:
    """Read `id`, `context`, `question` and `answers`, whose `text` is the list of right answers.

    The list is empty if the passage has no answer. Answers that are only punctuation are left out,
    since they can't be graded.
    """
    texts = read_texts(read_object(row, "answers", "text"), "text", minimum=0) or (UNANSWERABLE,)
    answers: dict[str, str] = {}  # normalised text → text, so that each answer counts once
    for text in texts:
        answers.setdefault(normalise(text), text.strip())
    answers.pop("", None)
    if not answers:
        raise EmptyTextError("the answers are nothing but punctuation")
    answer, *other_answers = answers.values()
    return Example(
        id=read_text(row, "id"),
        question=read_text(row, "question").strip(),
        context=read_text(row, "context").strip(),
        answer=answer,
        other_answers=tuple(other_answers),
    )


def squad_columns(_example: Example, row: Row) -> dict[str, Any]:
    """Return the columns, with all answers in one JSON text.

    The `datasets` library would infer a type from the first list, which may be empty.
    """
    texts = {name: read_text(row, name) for name in ("title", "context", "question")}
    answers = read_texts(row["answers"], "text", minimum=0)
    return {**texts, "grading": json.dumps(answers, ensure_ascii=False)}
