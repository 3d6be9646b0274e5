"""Write drllm's tasks as a task folder that lm-evaluation-harness ("the harness") reads.

    FOLDER/NAME.yaml                  a leaf or a group
    FOLDER/rows/NAME-USE-HASH.jsonl   the questions (`asked`) or worked examples (`shown`) of a leaf
    FOLDER/cache/                     the cache of `datasets`

A *leaf* is a task of the harness that holds questions. A task of drllm becomes one leaf. If its set
has several parts, it becomes a *group* with a leaf for each part. The name of a rows file has a
hash of its content, so that `datasets` can't use old rows from its cache.

This module imports neither torch nor the harness.
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

PartRow: TypeAlias = tuple[str, dict[str, Any]]
"""The row of a question in a rows file, after the name of the part of the set that it is in. The
name is empty if the set has one part."""

QUESTIONS = "asked"
WORKED_EXAMPLES = "shown"
"""The uses of a rows file, as they are written in its name."""
ROWS = "rows"  # folder of the rows files below a task folder
CACHE = "cache"  # folder for the cache of `datasets` below a task folder
MAX_LISTED = 5  # most ids in a note on questions that aren't asked; the results list all
SEED = 0  # seed for drawing the questions of `--limit` on the harness' command line


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
        places: Name of a leaf → the places of its questions that are asked. It is set for the
            harness' own tasks only. The leaves of a task folder have no other questions.
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
        tasks: Name of a task file → its content. Paths in it are relative to the folder.
        rows: Path of a rows file, relative to the folder → its text.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A hash of the content of all files, 16 hexadecimal digits; the same in every folder."""
        # The task files have the names of the rows files, which have hashes of the rows.
        return _digest(json.dumps(self.tasks, sort_keys=True))

    def add_leaf(
        self, leaf: str, file: str, rows: Mapping[str, Sequence[Any]], settings: dict[str, Any]
    ) -> None:
        """Add a leaf.

        Args:
            leaf: The leaf's name.
            file: The task file of the harness that the leaf includes; empty if it includes none.
            rows: The rows by use, `QUESTIONS` or `WORKED_EXAMPLES`.
            settings: Further entries of the task file, with `num_fewshot`. It is set even if it is
                0, so that a command line can't change it. Otherwise the harness would take worked
                examples from the questions that are asked.
        """
        row_paths = {}
        for use in (QUESTIONS, WORKED_EXAMPLES):
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
            "test_split": QUESTIONS,
            "fewshot_split": WORKED_EXAMPLES if rows[WORKED_EXAMPLES] else None,
            **settings,
        }

    def add_group(self, name: str, leaves: Sequence[str], metric: str) -> None:
        """Add a group of leaves. Its metric is the mean over all questions of the leaves."""
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
        """Write the files into a folder. Other files stay, and a rows file that didn't change."""
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
    """Return the content of a task file with absolute paths of its rows and its cache."""
    dataset = content.get("dataset_kwargs")
    if dataset is None:  # a group
        return content
    row_paths = {use: str(folder / path) for use, path in dataset["data_files"].items()}
    absolute_paths = {"data_files": row_paths, "cache_dir": str(folder / CACHE)}
    return {**content, "dataset_kwargs": absolute_paths}


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
        data_dir: The folder of published data sets; None reads them from the hub.
        num_fewshot: Worked examples before each question; None takes each task's own number.

    Raises:
        ConfigError: `num_fewshot` is negative.
        TaskError: Two tasks have the same name for the harness, a task has no questions or too few
            worked examples, or a file can't be read.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {num_fewshot}; expected 0 or more worked examples")
    names = [name_for_harness(task.name) for task in tasks]
    files = FolderFiles()
    harness_tasks = []
    for task, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise TaskError(
                f"task {task.name!r} is given twice, or two tasks are called {name!r} in the "
                f"harness; give one of them"
            )
        entry = make_entry(task)
        num_shots = num_fewshot
        if num_shots is None:
            num_shots = entry.shots
        questions = _draw_questions(task, split, limit, seed, data_dir, num_shots)
        leaves = _add_task(files, task, name, entry, questions, num_shots)
        harness_tasks.append(
            HarnessTask(
                name=task.name,
                harness_name=name,
                leaves=leaves,
                metric=entry.metric,
                filter=entry.filter,
                kind="generated" if entry.generated else "choices",
                examples=tuple(example for example, _ in questions.to_ask),
                num_fewshot=num_shots,
                notes=(*entry.notes, *_describe_omissions(questions.not_asked)),
                not_asked=questions.not_asked,
            )
        )
    return harness_tasks, files


@dataclass(frozen=True, slots=True)
class _Questions:
    """The questions of a task: those to ask, worked examples, and the reasons not to ask others."""

    to_ask: list[QuestionRow]
    worked_examples: list[QuestionRow]
    not_asked: dict[str, str]  # id → reason


def _draw_questions(
    task: Task,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | str | None,
    num_shots: int,
) -> _Questions:
    """Draw the questions to ask; questions that are worked examples are left out."""
    questions = choose(task.rows(split, data_dir), limit, seed)
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
    return _Questions(to_ask, worked_examples, not_asked)


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


def _add_task(
    files: FolderFiles,
    task: Task,
    name: str,
    entry: Harness,
    questions: _Questions,
    num_shots: int,
) -> dict[str, int]:
    """Add the files of a task; return its leaves with the number of their questions."""
    question_rows = _make_rows(task, entry, questions.to_ask)
    example_rows = _make_rows(task, entry, questions.worked_examples)
    settings = {"num_fewshot": num_shots, **entry.settings}
    if entry.generated and not entry.file:
        settings["generation_kwargs"] = _make_generation_settings(entry, question_rows)
    leaves = {}
    for part in sorted({part for part, _ in question_rows}):
        rows = {
            QUESTIONS: _select_part(question_rows, part),
            WORKED_EXAMPLES: _select_part(example_rows, part),
        }
        _check_shots(task, part, num_shots, len(rows[WORKED_EXAMPLES]))
        leaf = f"{name}_{part}" if part else name
        leaves[leaf] = len(rows[QUESTIONS])
        files.add_leaf(leaf, entry.file.format(part=part), rows, settings)
    if entry.part_of:
        files.add_group(name, list(leaves), entry.metric)
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Dumper(yaml.SafeDumper):
    """Writes a task file, with functions in the harness' notation."""


_Dumper.add_representer(
    Function, lambda dumper, name: dumper.represent_scalar("!function", str(name))
)


def make_own_task_folder(
    names: Sequence[str],
    *,
    split: str,
    limit: float | None,
    data_dir: str | None,
    num_fewshot: int | None,
    num_processes: int,
) -> tuple[list[HarnessTask], FolderFiles]:
    """Make the task folder for the tasks that a command of the harness names by `--tasks`.

    Args:
        names: The names of the tasks, which must be drllm's.
        split: The split of their questions.
        limit: The value of `--limit`, a whole number here.
        data_dir: The folder of published data sets; None reads them from the hub.
        num_fewshot: Worked examples before each question; None takes each task's own number.
        num_processes: How many processes share the questions of each task.

    Raises:
        ConfigError: A task is the harness' own, `data_dir` has no effect, or `limit` isn't a whole
            number from 1.
        TaskError: A leaf has fewer questions than there are processes.
    """
    _refuse_harness_tasks(names)
    tasks = get_tasks(",".join(names))
    if data_dir is not None and not any(isinstance(task, PublishedTask) for task in tasks):
        raise ConfigError(
            f"--data_dir {data_dir} has no effect: {', '.join(names)} has its own questions; leave "
            f"it out, and give --split"
        )
    harness_tasks, files = make_task_folder(
        tasks,
        split=split,
        limit=_check_limit(limit),
        seed=SEED,
        data_dir=data_dir,
        num_fewshot=num_fewshot,
    )
    for task in harness_tasks:
        for leaf, num_questions in task.leaves.items():
            if num_questions < num_processes:  # the harness would crash
                raise TaskError(
                    f"task {leaf!r} has {num_questions} questions for {num_processes} processes, "
                    f"and every process needs a question; give a higher --limit, or start fewer "
                    f"processes"
                )
    return harness_tasks, files


def _refuse_harness_tasks(names: Sequence[str]) -> None:
    """Refuse the names of tasks that drllm doesn't have."""
    for name in names:
        if not is_task_name(name):
            message = nearest_name("task of drllm", name, task_names())
            raise ConfigError(
                f"--data_dir and --split have no effect on the harness' own tasks: {message}; "
                f"'drllm ls tasks' lists drllm's tasks; leave both flags out, or name drllm's "
                f"tasks in a command of their own"
            )


def _check_limit(limit: float | None) -> int | None:
    """Return the value of `--limit` as a number of questions; the harness also accepts shares."""
    if limit is None:
        return None
    if limit < 1 or limit != int(limit):
        raise ConfigError(
            f"--limit is {limit:g}; with --data_dir or --split it is the number of questions of "
            f"each task; give a whole number from 1"
        )
    return int(limit)
