"""Write an evaluation's tasks as a folder that lm-evaluation-harness reads.

    FOLDER/NAME.yaml                  a task, or a group of the task's parts
    FOLDER/rows/NAME-USE-HASH.jsonl   its questions (`asked`) or worked examples (`shown`)
    FOLDER/cache/                     the cache of `datasets`

The name of a rows file has a hash of its content, so that `datasets` can't use old rows from its
cache. This module imports neither torch nor the harness.
"""

import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeAlias

import yaml

from drllm.errors import ConfigError, TaskError, nearest_name
from drllm.evaluation.lm_eval.graders import make_entry
from drllm.records.codec import write_atomically
from drllm.records.splits import question_key
from drllm.tasks.base import Function, Harness, Task, name_for_harness
from drllm.tasks.examples import Example, QuestionRow, choose
from drllm.tasks.published.task import PublishedTask
from drllm.tasks.registry import get_tasks, is_task_name, task_names

Line: TypeAlias = tuple[str, dict[str, Any]]
"""The part of the task that a question belongs to, and its row in a rows file."""

ASKED = "asked"
SHOWN = "shown"
"""The uses of a rows file: questions, and worked examples."""
ROWS = "rows"
CACHE = "cache"
"""Folders below a task folder."""
MAX_LISTED = 5  # most ids in a note on questions that aren't asked; the results list all
SEED = 0  # seed for drawing the questions of `--limit` on the harness' command line


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """A task, described for the harness and for the results."""

    name: str
    harness_name: str  # its name for the harness' `--tasks`
    # The harness' tasks that hold its questions (the task itself, or the parts of a group), with
    # the number of their questions.
    leaves: Mapping[str, int]
    metric: str  # the metric that is reported
    filter: str  # the harness' filter of answers for this metric, mostly `none`
    kind: Literal["choices", "generated"]
    # The questions of all leaves.
    examples: tuple[Example, ...] = field(repr=False)
    num_fewshot: int
    notes: tuple[str, ...]  # sentences for readers of the results
    # Questions that aren't asked: id → reason.
    not_asked: dict[str, str] = field(default_factory=dict)
    # For the harness' own tasks: leaf → the places of its questions that are asked.
    places: Mapping[str, list[int]] = field(default_factory=dict)

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


@dataclass
class FolderFiles:
    """The files of a task folder, before they are written.

    Attributes:
        tasks: Name of a task file → its content, with paths of rows files relative to the folder.
        rows: Path of a rows file relative to the folder → its text.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A hash of the files that doesn't depend on the folder: 16 hexadecimal digits."""
        return _digest(json.dumps(self.tasks, sort_keys=True))

    def add_leaf(
        self, leaf: str, file: str, rows: Mapping[str, Sequence[Any]], settings: dict[str, Any]
    ) -> None:
        """Add a task that holds questions.

        Args:
            leaf: The task's name.
            file: The harness' own task file that the task includes; empty if it includes none.
            rows: The rows of the questions (`ASKED`) and of the worked examples (`SHOWN`).
            settings: Further entries of the task file.
        """
        row_paths = {}
        for use in (ASKED, SHOWN):
            if rows[use]:
                row_paths[use] = self._add_rows(f"{leaf}-{use}", rows[use])
        content: dict[str, Any] = {}
        if file:
            content["include"] = f"{importlib.resources.files('lm_eval')}/tasks/{file}"
        self.tasks[f"{leaf}.yaml"] = {
            **content,
            "task": leaf,
            "tag": None,  # otherwise the harness' own tags would select only these tasks
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": row_paths, "cache_dir": CACHE},
            "training_split": None,
            "validation_split": None,
            "test_split": ASKED,
            "fewshot_split": SHOWN if rows[SHOWN] else None,
            # These have `num_fewshot`, even if it is 0, so that a command line can't change it.
            # Otherwise the harness would show questions that are asked.
            **settings,
        }

    def add_group(self, name: str, leaves: Sequence[str], metric: str) -> None:
        """Add a group of tasks; its metric is the mean over all their questions."""
        self.tasks[f"{name}.yaml"] = {
            "group": name,
            "task": list(leaves),
            "aggregate_metric_list": [{"metric": metric, "weight_by_size": True}],
            "metadata": {"version": 1},
        }

    def _add_rows(self, name: str, rows: Sequence[Any]) -> str:
        """Add a rows file; return its path relative to the folder."""
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        path = f"{ROWS}/{name}-{_digest(text)}.jsonl"
        self.rows[path] = text
        return path

    def write(self, folder: Path) -> None:
        """Write the files into a folder; other files, and rows files that are equal, stay."""
        folder = folder.resolve()
        for name, text in self.rows.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != text.encode():
                write_atomically(path, text)
        for name, content in self.tasks.items():
            absolute = _make_absolute(content, folder)
            text = yaml.dump(
                absolute, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
            )
            write_atomically(folder / name, text)


def _make_absolute(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a task file's content with absolute paths of its rows and cache."""
    dataset = content.get("dataset_kwargs")
    if dataset is None:  # a group
        return content
    row_paths = {use: str(folder / path) for use, path in dataset["data_files"].items()}
    absolute = {"data_files": row_paths, "cache_dir": str(folder / CACHE)}
    return {**content, "dataset_kwargs": absolute}


def make_task_folder(
    tasks: Sequence[Task],
    *,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | str | None,
    num_fewshot: int | None = None,
) -> tuple[list[HarnessTask], FolderFiles]:
    """Describe tasks to lm-evaluation-harness, and make their files without writing them.

    The same arguments and questions give exactly the same files.

    Args:
        tasks: The tasks.
        split: The split of their questions.
        limit: Maximum number of questions of each task, drawn with the seed; None takes all.
        seed: Seed of the drawing.
        data_dir: The folder of published data sets.
        num_fewshot: Worked examples before each question; None takes each task's own number.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {num_fewshot}; expected 0 or more worked examples")
    names = [name_for_harness(task.name) for task in tasks]
    files = FolderFiles()
    harness_tasks = []
    for task, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise TaskError(f"task {task.name!r} is given twice, or its name is; give it once")
        entry = make_entry(task)
        shots = entry.shots if num_fewshot is None else num_fewshot
        questions = _draw_questions(task, split, limit, seed, data_dir, shots)
        leaves = _add_task(files, task, name, entry, questions, shots)
        harness_tasks.append(
            HarnessTask(
                name=task.name,
                harness_name=name,
                leaves=leaves,
                metric=entry.metric,
                filter=entry.filter,
                kind="generated" if entry.generated else "choices",
                examples=tuple(example for example, _ in questions.asked),
                num_fewshot=shots,
                notes=(*entry.notes, *_notes_on(questions.not_asked)),
                not_asked=questions.not_asked,
            )
        )
    return harness_tasks, files


@dataclass(frozen=True, slots=True)
class _Questions:
    """The questions of a task."""

    asked: list[QuestionRow]
    shown: list[QuestionRow]  # worked examples
    not_asked: dict[str, str]  # id → reason


def _draw_questions(
    task: Task,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | str | None,
    shots: int,
) -> _Questions:
    """Draw the questions to ask; questions that are worked examples are left out."""
    drawn = choose(task.rows(split, data_dir), limit, seed)
    shown: list[QuestionRow] = []
    if shots:
        try:
            shown = task.shots(split, data_dir)
        except TaskError as error:
            raise TaskError(
                f"{error}; num_fewshot is {shots}, and 0 needs no worked examples"
            ) from error
    shown_keys = {question_key(example.question) for example, _ in shown}
    not_asked = dict(task.skipped(split, data_dir))
    repeated = set()
    for example, _ in drawn:
        if question_key(example.question) in shown_keys:
            repeated.add(example.id)
            not_asked[example.id] = "a worked example is the same question"
    asked = [question for question in drawn if question[0].id not in repeated]
    if not asked:
        raise TaskError(
            f"task {task.name!r} has no questions in split {split!r}; give another split, or "
            f"more questions"
        )
    return _Questions(asked, shown, not_asked)


def _notes_on(not_asked: Mapping[str, str]) -> list[str]:
    """Return a note for each reason why questions aren't asked."""
    notes = []
    for reason in dict.fromkeys(not_asked.values()):
        ids = [row for row, row_reason in not_asked.items() if row_reason == reason]
        listed = ", ".join(ids[:MAX_LISTED])
        if len(ids) > MAX_LISTED:
            listed += ", …"
        notes.append(f"not asked: {len(ids)} ({listed}), since {reason}")
    return notes


def _add_task(
    files: FolderFiles, task: Task, name: str, entry: Harness, questions: _Questions, shots: int
) -> dict[str, int]:
    """Add the files of a task; return its leaves with the number of their questions."""
    asked = _make_lines(task, entry, questions.asked)
    shown = _make_lines(task, entry, questions.shown)
    settings = {"num_fewshot": shots, **entry.settings}
    if entry.generated and not entry.file:
        settings["generation_kwargs"] = _generation_settings(entry, asked)
    leaves = {}
    for part in sorted({part for part, _ in asked}):
        rows = {
            ASKED: [row for line_part, row in asked if line_part == part],
            SHOWN: [row for line_part, row in shown if line_part == part],
        }
        num_shown = len(rows[SHOWN])
        if shots > num_shown:
            where = f"task {task.name!r}"
            if part:
                where += f" ({part})"
            raise TaskError(
                f"{where} has {num_shown} worked examples to show, and num_fewshot is {shots}; "
                f"give at most {num_shown}"
            )
        leaf = f"{name}_{part}" if part else name
        leaves[leaf] = len(rows[ASKED])
        files.add_leaf(leaf, entry.file.format(part=part), rows, settings)
    if entry.part_of:
        files.add_group(name, list(leaves), entry.metric)
    return leaves


def _make_lines(task: Task, entry: Harness, questions: Sequence[QuestionRow]) -> list[Line]:
    """Make the rows of some questions, each with the part of the task that it belongs to."""
    lines = []
    for example, row in questions:
        try:
            columns = entry.make_row(example, row)
        except TaskError as error:
            raise TaskError(
                f"task {task.name!r}, question {example.id!r}: {error}; the harness' prompt needs "
                f"it"
            ) from error
        part = str(row[entry.part_of]) if entry.part_of else ""
        lines.append((part, {"drllm_id": example.id, **columns}))
    return lines


def _generation_settings(entry: Harness, asked: Sequence[Line]) -> dict[str, Any]:
    """Return the options with which answers are generated, and their maximum length."""
    longest = entry.max_new_tokens or max(row["max_new_tokens"] for _, row in asked)
    return {**entry.settings["generation_kwargs"], "max_gen_toks": longest}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Dumper(yaml.SafeDumper):
    """Writes a task file, with functions in the harness' notation."""


_Dumper.add_representer(Function, lambda to, name: to.represent_scalar("!function", str(name)))


def make_own_task_folder(
    names: Sequence[str],
    *,
    limit: float | None,
    data_dir: str | None,
    num_processes: int,
    **more: Any,
) -> tuple[list[HarnessTask], FolderFiles]:
    """Describe to the harness the tasks of drllm that a harness command names by `--tasks`.

    Args:
        names: The names of the tasks.
        limit: The value of `--limit`.
        data_dir: See `make_task_folder`.
        num_processes: How many processes share the questions of each task.
        more: `split` and `num_fewshot`, see `make_task_folder`.

    Raises:
        ConfigError: A task is the harness' own, or `data_dir` or `limit` makes no sense.
        TaskError: A task has fewer questions than there are processes.
    """
    foreign = [name for name in names if not is_task_name(name)]
    if foreign:
        message = nearest_name("task of drllm's", foreign[0], task_names())
        raise ConfigError(
            f"--data_dir and --split have no effect on the harness' own tasks: {message}; "
            f"'drllm ls tasks' lists them; leave both flags out, or name drllm's tasks in a "
            f"command of their own"
        )
    tasks = get_tasks(",".join(names))
    if data_dir is not None and not any(isinstance(task, PublishedTask) for task in tasks):
        raise ConfigError(
            f"--data_dir {data_dir} has no effect: {', '.join(names)} brings its own questions; "
            f"leave it out, and give --split"
        )
    if limit is not None and (limit < 1 or limit != int(limit)):
        raise ConfigError(
            f"--limit is {limit:g}; with --data_dir or --split it is a number of questions a task: "
            f"give a whole number from 1"
        )
    max_questions = None if limit is None else int(limit)
    harness_tasks, files = make_task_folder(
        tasks, limit=max_questions, seed=SEED, data_dir=data_dir, **more
    )
    for task in harness_tasks:
        for name, number in task.leaves.items():
            if number < num_processes:  # the harness would crash
                raise TaskError(
                    f"task {name!r} has {number} questions for {num_processes} processes, and the "
                    f"harness wants one for each; give a higher --limit, or start fewer processes"
                )
    return harness_tasks, files
