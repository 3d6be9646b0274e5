"""Questions from a `.jsonl` file of the user's own.

Rows are `question`, `choices`, `answer`, or `question`, `answer`, `grader`, or `prompt` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from drllm.errors import TaskError, unknown_name
from drllm.records.splits import question_key, split_of
from drllm.tasks.base import Example, Row, Task, check_split, with_options
from drllm.tasks.forms import BOXED, LETTER_TOKENS, LETTERS, OPTIONS, Form
from drllm.tasks.rewards import REWARDS, normalise
from drllm.tasks.rows import index_of, read_rows, text_of, texts_of

FORMS = {
    "letter": Form(
        rewards=("letter",),
        templates=(
            "{question}\n\nAnswer with the letter of the right option only.",
            "Choose the right option and reply with its letter alone.\n\n{question}",
            "{question}\n\nWhich letter is right? Letter:",
        ),
        max_new_tokens=LETTER_TOKENS,
    ),
    "exact": Form(
        rewards=("exact",),
        templates=(
            "{question}\n\nGive the answer only, with no explanation.",
            "Answer the question in as few words as possible.\n\n{question}",
            "Question: {question}\nReply with the answer alone.",
        ),
    ),
    "boxed": replace(BOXED, max_new_tokens=None),
}
"""Grader → how its questions are asked; a reward that isn't here asks as `exact` does."""


CHOICES, PROMPT = "'choices'", "a prompt alone"


def task_of_file(path: Path, taken: tuple[str, ...] = ()) -> FileTask:
    """Return the task of a file, which is read once unless it changes; see `FileTask`."""
    if not path.is_file():
        return FileTask(path)  # which says what is there instead
    state = path.stat()
    return _kept(path, taken, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _kept(path: Path, taken: tuple[str, ...], _mtime_ns: int, _size: int) -> FileTask:
    return FileTask(path, taken)


class FileTask(Task):
    """The questions of one file; which rewards fit depends on the rows.

    Every question belongs to one of the four splits by its text, so that one file serves search,
    training and evaluation, and no question is trained on and reported on.

    Args:
        path: A `.jsonl` or `.jsonl.gz` file. Rows are `question`, `choices` and `answer` (the
            right option's index from 0, its text, or its letter), or `question`, `answer` and
            `grader` (a reward that grades text), the same for all, or `prompt` (or `question`)
            without an answer.
        taken: Names of other tasks; a file of such a name is called `NAME_file`.
        rows: The rows, where they aren't in the file.
    """

    def __init__(
        self, path: Path, taken: Collection[str] = (), rows: Sequence[Row] | None = None
    ) -> None:
        self.path = path
        stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
        self.name = f"{stem}_file" if stem in taken else stem
        self.description = f"the questions of {path}"
        self.all, grader = self._read(read_rows(path) if rows is None else enumerate(rows, 1))
        last = max(LETTERS.find(example.answer) for example in self.all)
        letters = LETTERS[: max(5, last + 1)]  # the options stand in the questions' texts
        form, rewards = FORMS.get(grader or "", FORMS["exact"]), (grader,) if grader else ()
        self.form = OPTIONS if grader is None else replace(form, rewards=rewards, letters=letters)

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in the file's order.

        They are half of the questions for `search`, 10 % for `fit`, 15 % for `select` and 25 %
        for `test`; the last may have several of one text with other choices.
        """
        check_split(split)
        found: dict[str, Example] = {}
        for example in self.all:
            if split_of(example.question, "own") == split:
                key = example.id if split == "test" else question_key(example.question)
                found.setdefault(key, example)
        return list(found.values())

    def _read(self, rows: Iterable[tuple[int, Row]]) -> tuple[list[Example], str | None]:
        """Return the questions and their grader: None with options, empty without answers."""
        examples: list[Example] = []
        found: dict[tuple[str, tuple[str, ...]], tuple[int, Example]] = {}
        first_kind = ""
        for line, row in rows:
            try:
                kind = _kind(row)
                first_kind = first_kind or kind
                if kind != first_kind:
                    raise TaskError(
                        f"a row with {kind}, but the first has {first_kind}; "
                        f"put them into files of their own"
                    )
                example = replace(_example(row), id=f"line-{line}", task=self.name)
                key = question_key(example.question), example.choices
                first, earlier = found.setdefault(key, (line, example))
                if earlier.answer != example.answer:
                    raise TaskError(
                        f"the question stands on line {first} with another answer; keep one of them"
                    )
            except TaskError as error:
                raise TaskError(f"{self.path}, line {line}: {error}") from error
            if first == line:
                examples.append(example)
        return examples, None if first_kind == CHOICES else str(row.get("grader", ""))


def _kind(row: Row) -> str:
    """Say which kind of row this is, in the words of a message."""
    if "choices" in row and "grader" in row:
        raise TaskError(
            "a row with 'choices' takes no 'grader'; leave it out and choose by --reward"
        )
    if "choices" in row:
        return CHOICES
    if "grader" not in row:
        if "answer" not in row and not {"prompt", "question"}.isdisjoint(row):
            return PROMPT
        raise TaskError(
            f"'choices' or 'grader' is missing (the line has: {', '.join(row) or 'nothing'}); "
            f"give question, choices, answer, or question, answer, grader, or prompt alone"
        )
    grader = row["grader"]
    graders = [name for name in REWARDS if not REWARDS.get(name).scores_options]
    if grader not in graders:
        raise TaskError(unknown_name("grader", str(grader), graders))
    return f"grader {grader!r}"


def _example(row: Row) -> Example:
    if {"choices", "grader"}.isdisjoint(row):
        text = text_of(row, "prompt" if "prompt" in row else "question")
        return Example(question=text, answer="")
    question = text_of(row, "question")
    if "choices" not in row:
        return Example(question=question, answer=_graded_answer(row))
    choices = texts_of(row, "choices", minimum=2)
    for choice in choices:
        if choices.count(choice) > 1:
            raise TaskError(f"'choices' holds {choice!r} twice; every choice must be another")
    if len(choices) > len(LETTERS):
        raise TaskError(f"'choices' has {len(choices)} entries; give at most {len(LETTERS)}")
    return with_options(question, choices, _gold(row, choices))


def _gold(row: Row, choices: tuple[str, ...]) -> int:
    """Return the index of the right option, which may be given as index, text or letter."""
    last = len(choices) - 1
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return index_of(answer, len(choices), "answer")
    text = text_of(row, "answer")
    ways = (*choices, *LETTERS[: len(choices)])  # a choice's text comes before a letter
    if text not in ways:
        raise TaskError(
            f"'answer' {text!r} is not among the choices; give a choice's text, its index (0 to "
            f"{last}) or its letter (A to {LETTERS[last]})"
        )
    return ways.index(text) % len(choices)


def _graded_answer(row: Row) -> str:
    value, grader = row.get("answer"), row["grader"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        answer = str(value)
    else:
        answer = text_of(row, "answer").strip()
    if grader == "letter" and (len(answer) != 1 or answer not in LETTERS):
        raise TaskError(f"'answer' is {answer!r}; the grader 'letter' expects one of A to Z")
    if grader == "exact" and (not normalise(answer) or len(answer.splitlines()) > 1):
        raise TaskError(f"'answer' is {answer!r}; the grader 'exact' expects one line of words")
    return answer
