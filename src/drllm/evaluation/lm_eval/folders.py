"""Write an evaluation's tasks as a folder that lm-evaluation-harness reads, ours or stock.

    FOLDER/NAME.yaml              one task, or the parts of one as a group
    FOLDER/rows/NAME-USE-HASH.jsonl   its questions (`asked`) or worked examples (`shown`)
    FOLDER/cache/                 what `datasets` makes of the rows

A rows file is named by its content, so that `datasets` can't take old rows for new ones. Loads
neither torch nor the harness.
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
from drllm.evaluation.lm_eval.graders import entry_of
from drllm.records.codec import write_atomically
from drllm.records.splits import question_key
from drllm.tasks.base import Function, Harness, Task, name_for_harness
from drllm.tasks.examples import Example, QuestionRow, choose
from drllm.tasks.published.task import PublishedTask
from drllm.tasks.registry import get_tasks, is_task_name, task_names

Line: TypeAlias = tuple[str, dict[str, Any]]
"""The part of the set that a question belongs to, and its row of a rows file."""

ASKED, SHOWN = "asked", "shown"
ROWS, CACHE = "rows", "cache"
"""Places below a task folder: its rows, and what `datasets` makes of them."""
NAMED = 5  # rows that aren't asked whose ids a note lists; the results hold all
SEED = 0  # of drawing the questions of `--limit` on the harness' command line


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """A task of a task folder; `harness_name` is what to give to the harness' `--tasks`."""

    name: str
    harness_name: str
    # How many questions are in each of the harness' tasks: itself, or a group's parts.
    leaves: Mapping[str, int]
    metric: str  # the metric that counts
    filter: str  # the harness' filter that it is taken from; `none` for most
    kind: Literal["choices", "generated"]
    # The questions that are asked, over all parts.
    examples: tuple[Example, ...] = field(repr=False)
    num_fewshot: int
    notes: tuple[str, ...]  # what a reader of results must know
    # Rows of the set that aren't asked: id → why.
    not_asked: dict[str, str] = field(default_factory=dict)
    # Of the harness' own tasks, which questions of each are asked.
    places: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def num_questions(self) -> int:
        """How many are asked."""
        return len(self.examples)

    @property
    def chance(self) -> float:
        """Accuracy of guessing, the mean over the questions; 0 for generated answers."""
        if self.kind == "generated":
            return 0.0
        return fmean(1 / len(example.choices) for example in self.examples)


@dataclass
class FolderFiles:
    """The files of a task folder, before there is one.

    Attributes:
        tasks: Each task file's content by its name; places of rows are given below the folder.
        rows: Each rows file's text by its name below the folder.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells these files from others, wherever they are: 16 hexadecimal digits."""
        return _digest(json.dumps(self.tasks, sort_keys=True))

    def add_leaf(
        self, leaf: str, file: str, rows: Mapping[str, Sequence[Any]], settings: dict[str, Any]
    ) -> None:
        """Add a task that holds questions; `file` is the harness' own that it changes, if any."""
        places = {}
        for use in (ASKED, SHOWN):
            if rows[use]:
                places[use] = self._add_rows(f"{leaf}-{use}", rows[use])
        content: dict[str, Any] = {}
        if file:
            content["include"] = f"{importlib.resources.files('lm_eval')}/tasks/{file}"
        self.tasks[f"{leaf}.yaml"] = {
            **content,
            "task": leaf,
            "tag": None,  # else the harness' own tags would mean these tasks alone
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": places, "cache_dir": CACHE},
            "training_split": None,
            "validation_split": None,
            "test_split": ASKED,
            "fewshot_split": SHOWN if rows[SHOWN] else None,
            # `num_fewshot` is among them even where it is 0, which a command line then can't
            # change: the harness would show questions that are asked.
            **settings,
        }

    def add_group(self, name: str, leaves: Sequence[str], metric: str) -> None:
        """Add a task that is the mean over others, each question counting alike."""
        self.tasks[f"{name}.yaml"] = {
            "group": name,
            "task": list(leaves),
            "aggregate_metric_list": [{"metric": metric, "weight_by_size": True}],
            "metadata": {"version": 1},
        }

    def _add_rows(self, name: str, rows: Sequence[Any]) -> str:
        """Add a rows file; return its place below the folder."""
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        place = f"{ROWS}/{name}-{_digest(text)}.jsonl"
        self.rows[place] = text
        return place

    def write(self, folder: Path) -> None:
        """Write the files below a folder, which may hold others; rows that are there stay."""
        folder = folder.resolve()
        for name, text in self.rows.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != text.encode():
                write_atomically(path, text)
        for name, content in self.tasks.items():
            placed = _place_rows(content, folder)
            text = yaml.dump(placed, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
            write_atomically(folder / name, text)


def _place_rows(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a task file's content with the places of its rows made absolute."""
    dataset = content.get("dataset_kwargs")
    if dataset is None:  # a group
        return content
    rows = {use: str(folder / place) for use, place in dataset["data_files"].items()}
    placed = {"data_files": rows, "cache_dir": str(folder / CACHE)}
    return {**content, "dataset_kwargs": placed}


def task_folder(
    tasks: Sequence[Task],
    *,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | str | None,
    num_fewshot: int | None = None,
) -> tuple[list[HarnessTask], FolderFiles]:
    """Return tasks as lm-evaluation-harness knows them, and their files; nothing is written yet.

    The same arguments and questions give the same files to the last byte.

    Args:
        tasks: The tasks.
        split: Where their questions are from.
        limit: Maximum questions a task, drawn with the seed; None is all.
        seed: Seed of the drawing.
        data_dir: Where published sets are.
        num_fewshot: Worked examples before each question; None leaves it to each task.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {num_fewshot}; expected 0 or more worked examples")
    names = [name_for_harness(task.name) for task in tasks]
    files = FolderFiles()
    harness_tasks = []
    for task, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise TaskError(f"task {task.name!r} is given twice, or its name is; give it once")
        entry = entry_of(task)
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
    not_asked: dict[str, str]  # id → why


def _draw_questions(
    task: Task,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | str | None,
    shots: int,
) -> _Questions:
    """Draw the questions to ask, without those that are worked examples."""
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
        ids = [row for row, why in not_asked.items() if why == reason]
        listed = ", ".join(ids[:NAMED])
        if len(ids) > NAMED:
            listed += ", …"
        notes.append(f"not asked: {len(ids)} ({listed}), since {reason}")
    return notes


def _add_task(
    files: FolderFiles, task: Task, name: str, entry: Harness, questions: _Questions, shots: int
) -> dict[str, int]:
    """Add the files of a task; return its parts, by the harness' name: how many questions each."""
    asked = _lines(task, entry, questions.asked)
    shown = _lines(task, entry, questions.shown)
    settings = {"num_fewshot": shots, **entry.settings}
    if entry.generated and not entry.file:
        settings["generation_kwargs"] = _generation_settings(entry, asked)
    leaves = {}
    for part in sorted({part for part, _ in asked}):
        rows = {
            ASKED: [row for at, row in asked if at == part],
            SHOWN: [row for at, row in shown if at == part],
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


def _lines(task: Task, entry: Harness, questions: Sequence[QuestionRow]) -> list[Line]:
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
    """Return how answers are generated, their maximum length with it."""
    longest = entry.max_new_tokens or max(row["max_new_tokens"] for _, row in asked)
    return {**entry.settings["generation_kwargs"], "max_gen_toks": longest}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Dumper(yaml.SafeDumper):
    """Writes a task file, functions as the harness names them."""


_Dumper.add_representer(Function, lambda to, name: to.represent_scalar("!function", str(name)))


def own_tasks(
    names: Sequence[str],
    *,
    limit: float | None,
    data_dir: str | None,
    num_processes: int,
    **more: Any,
) -> tuple[list[HarnessTask], FolderFiles]:
    """Return the tasks of a command line, in its `--tasks`, all of which are ours.

    Processes share a task's questions. `data_dir` and `more` (split, num_fewshot) are
    as `task_folder`'s.
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
    harness_tasks, files = task_folder(
        tasks, limit=max_questions, seed=SEED, data_dir=data_dir, **more
    )
    for task in harness_tasks:
        for name, number in task.leaves.items():
            if number < num_processes:  # which would end the harness
                raise TaskError(
                    f"task {name!r} has {number} questions for {num_processes} processes, and the "
                    f"harness wants one for each; give a higher --limit, or start fewer processes"
                )
    return harness_tasks, files
