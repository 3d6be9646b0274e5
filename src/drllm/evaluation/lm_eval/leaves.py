"""Describe drllm's tasks to lm-evaluation-harness ("the harness").

A *leaf* is a task of the harness that holds questions. A task of drllm becomes one leaf. If its set
has several parts, it becomes a *group* with a leaf for each part.

The harness gets the leaves as task objects (`objects`) or from a task folder (`folders`). This
module imports neither torch nor the harness.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeAlias

from drllm.errors import ConfigError, TaskError
from drllm.evaluation.lm_eval.graders import make_entry
from drllm.records.splits import question_key
from drllm.tasks.base import Harness, Task, name_for_harness
from drllm.tasks.examples import Example, QuestionRow, choose

PartRow: TypeAlias = tuple[str, dict[str, Any]]
"""The row of a question for the harness, after the name of the part of the set that it is in. The
name is empty if the set has one part."""

QUESTIONS = "asked"
WORKED_EXAMPLES = "shown"
"""The uses of rows. The harness knows them as splits, and the files of a task folder name them."""
MAX_LISTED = 5  # most ids in a note on questions that aren't asked; the results list all


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """A task as the harness evaluates it, described for the harness and for the results.

    Attributes:
        name: The name in drllm.
        harness_name: The name for the harness' `--tasks`.
        leaves: Name of a leaf → the number of its questions.
        metric: The harness' metric that is reported.
        filter: The harness' filter of answers for this metric, mostly `none`.
        kind: Whether options are scored or answers are generated.
        examples: The questions of all leaves.
        num_fewshot: The number of worked examples before each question; the largest, if the leaves
            differ.
        notes: Sentences for readers of the results.
        not_asked: Id of a question that isn't asked → reason.
        num_available: The number of questions in the split; None if that isn't known.
        places: Name of a leaf → the places of its questions that are asked. It is set for the
            harness' own tasks only. The leaves of drllm's tasks have no other questions.
        is_group: Whether `harness_name` is a group of the harness, with the leaves as its tasks.
        chat: Whether prompts are put into the chat template unless the settings say otherwise.
    """

    name: str
    harness_name: str
    leaves: Mapping[str, int]
    metric: str
    filter: str
    kind: Literal["choices", "generated"]
    examples: tuple[Example, ...] = field(repr=False)
    num_fewshot: int
    notes: tuple[str, ...]
    not_asked: dict[str, str] = field(default_factory=dict)
    num_available: int | None = None
    places: Mapping[str, list[int]] = field(default_factory=dict)
    is_group: bool = False
    chat: bool = False

    @property
    def num_questions(self) -> int:
        """The number of questions in all leaves."""
        return len(self.examples)

    @property
    def chance(self) -> float:
        """The expected accuracy of guessing; 0 for generated answers."""
        if self.kind == "generated":
            return 0.0
        return fmean(1 / len(example.choices) for example in self.examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A task of the harness that holds questions of one of drllm's tasks.

    Attributes:
        name: The name.
        file: The harness' task file that the leaf builds on, relative to the harness' folder
            `tasks`; empty if there is none.
        rows: Use of rows (`QUESTIONS` or `WORKED_EXAMPLES`) → the rows.
        settings: Settings of a task file that replace those of `file`, with `num_fewshot`. It is
            set even if it is 0, so that a command line can't change it. Otherwise the harness would
            take worked examples from the questions that are asked.
    """

    name: str
    file: str
    rows: Mapping[str, Sequence[dict[str, Any]]] = field(repr=False)
    settings: Mapping[str, Any]

    def make_settings(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings of a task file that replace those of `file`.

        Args:
            source: The settings that say where the harness finds the rows.
        """
        return {
            "task": self.name,
            "tag": None,  # otherwise the harness' own tags would select only these tasks
            **source,
            "training_split": None,
            "validation_split": None,
            "test_split": QUESTIONS,
            "fewshot_split": WORKED_EXAMPLES if self.rows[WORKED_EXAMPLES] else None,
            **self.settings,
        }


def describe_task(
    task: Task,
    *,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | str | None,
    num_fewshot: int | None = None,
) -> tuple[HarnessTask, list[Leaf]]:
    """Describe a task of drllm to the harness, and draw its questions.

    The same arguments and questions give exactly the same result.

    Args:
        task: The task.
        split: The split of its questions.
        limit: Maximum number of questions, drawn with the seed; None takes all.
        seed: Seed of the drawing.
        data_dir: The folder of published data sets; None reads them from the hub.
        num_fewshot: Worked examples before each question; None takes the task's own number.

    Returns:
        The description, and the leaves with the rows of the questions.

    Raises:
        ConfigError: `num_fewshot` is negative.
        TaskError: The task has no questions or too few worked examples, or a file can't be read.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {num_fewshot}; expected 0 or more worked examples")
    entry = make_entry(task)
    num_shots = num_fewshot
    if num_shots is None:
        num_shots = entry.shots
    questions = _draw_questions(task, split, limit, seed, data_dir, num_shots)
    leaves = _make_leaves(task, entry, questions, num_shots)
    harness_task = HarnessTask(
        name=task.name,
        harness_name=name_for_harness(task.name),
        leaves={leaf.name: len(leaf.rows[QUESTIONS]) for leaf in leaves},
        metric=entry.metric,
        filter=entry.filter,
        kind="generated" if entry.generated else "choices",
        examples=tuple(example for example, _ in questions.to_ask),
        num_fewshot=num_shots,
        notes=(*entry.notes, *_describe_omissions(questions.not_asked)),
        not_asked=questions.not_asked,
        num_available=questions.num_available,
        is_group=bool(entry.part_of),
        chat=entry.chat,
    )
    return harness_task, leaves


@dataclass(frozen=True, slots=True)
class _Questions:
    """The questions of a task: those to ask, worked examples, and the reasons not to ask others.

    `num_available` is the number of questions in the split.
    """

    to_ask: list[QuestionRow]
    worked_examples: list[QuestionRow]
    not_asked: dict[str, str]  # id → reason
    num_available: int


def _draw_questions(
    task: Task,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | str | None,
    num_shots: int,
) -> _Questions:
    """Draw the questions to ask; questions that are worked examples are left out."""
    rows = task.rows(split, data_dir)
    questions = choose(rows, limit, seed)
    worked_examples: list[QuestionRow] = []
    if num_shots:
        try:
            worked_examples = task.shots(split, data_dir)
        except TaskError as error:
            raise TaskError(
                f"{error}; num_fewshot is {num_shots}, and 0 needs no worked examples"
            ) from error
    example_keys = {question_key(example.question) for example, _ in worked_examples}
    not_asked = dict(task.skipped(split, data_dir))
    to_ask = []
    for example, row in questions:
        if question_key(example.question) in example_keys:
            not_asked[example.id] = "a worked example is the same question"
        else:
            to_ask.append((example, row))
    if not to_ask:
        raise TaskError(
            f"task {task.name!r} has no questions in split {split!r}; give another split, or "
            f"more questions"
        )
    return _Questions(to_ask, worked_examples, not_asked, len(rows))


def _describe_omissions(not_asked: Mapping[str, str]) -> list[str]:
    """Return a note for each reason why questions aren't asked."""
    ids_by_reason: dict[str, list[str]] = {}
    for question_id, reason in not_asked.items():
        ids_by_reason.setdefault(reason, []).append(question_id)
    notes = []
    for reason, ids in ids_by_reason.items():
        listing = ", ".join(ids[:MAX_LISTED])
        if len(ids) > MAX_LISTED:
            listing += ", …"
        notes.append(f"not asked: {len(ids)} ({listing}), since {reason}")
    return notes


def _make_leaves(task: Task, entry: Harness, questions: _Questions, num_shots: int) -> list[Leaf]:
    """Make the leaves of a task: one, or one for each part of its set."""
    question_rows = _make_rows(task, entry, questions.to_ask)
    example_rows = _make_rows(task, entry, questions.worked_examples)
    settings = {"num_fewshot": num_shots, **entry.settings}
    if entry.generated and not entry.file:
        settings["generation_kwargs"] = _make_generation_settings(entry, question_rows)
    name = name_for_harness(task.name)
    leaves = []
    for part in sorted({part for part, _ in question_rows}):
        rows = {
            QUESTIONS: _select_part(question_rows, part),
            WORKED_EXAMPLES: _select_part(example_rows, part),
        }
        _check_shots(task, part, num_shots, len(rows[WORKED_EXAMPLES]))
        leaf_name = f"{name}_{part}" if part else name
        file = entry.file.format(part=part)
        leaves.append(Leaf(name=leaf_name, file=file, rows=rows, settings=settings))
    return leaves


def _make_rows(task: Task, entry: Harness, questions: Sequence[QuestionRow]) -> list[PartRow]:
    """Make the rows of questions for the harness, with the parts that they are in."""
    rows = []
    for example, row in questions:
        try:
            columns = entry.make_row(example, row)
        except TaskError as error:
            raise TaskError(
                f"task {task.name!r}, question {example.id!r}: {error}; the harness' prompt needs "
                f"it"
            ) from error
        part = str(row[entry.part_of]) if entry.part_of else ""
        rows.append((part, {"drllm_id": example.id, **columns}))
    return rows


def _select_part(rows: Sequence[PartRow], part: str) -> list[dict[str, Any]]:
    return [row for row_part, row in rows if row_part == part]


def _check_shots(task: Task, part: str, num_shots: int, num_available: int) -> None:
    """Refuse to show more worked examples than a part of a task has."""
    if num_shots <= num_available:
        return
    name = f"task {task.name!r}"
    if part:
        name += f" ({part})"
    raise TaskError(
        f"{name} has {num_available} worked examples to show, and num_fewshot is {num_shots}; "
        f"give at most {num_available}"
    )


def _make_generation_settings(entry: Harness, rows: Sequence[PartRow]) -> dict[str, Any]:
    """Return the options with which answers are generated, and their maximum length."""
    max_tokens = entry.max_new_tokens
    if max_tokens == 0:  # the rows say how long their answers may be
        max_tokens = max(row["max_new_tokens"] for _, row in rows)
    return {**entry.settings["generation_kwargs"], "max_gen_toks": max_tokens}
