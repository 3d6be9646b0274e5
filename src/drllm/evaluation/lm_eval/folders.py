"""Task folders: an evaluation's tasks as files that lm-evaluation-harness reads, ours or stock.

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
"""Places below a task folder: what is asked and shown, and what `datasets` makes of it."""
NAMED = 5  # rows that aren't asked whose ids a note lists; the results hold all
SEED = 0  # of drawing the questions of `--limit` on the harness' command line


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """A task of a task folder; `harness_name` is what to give to the harness' `--tasks`."""

    name: str
    harness_name: str
    # The harness' tasks that hold the questions, itself or a group's parts, by name: how many
    # questions each holds.
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

    By name: the content of each task file, where rows are given below the folder; and the text of
    each rows file, by its name below the folder.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells these files from others, wherever they are: 16 hexadecimal digits."""
        return _digest(json.dumps(self.tasks, sort_keys=True))

    def _add(
        self, leaf: str, file: str, rows: Mapping[str, Sequence[Any]], settings: dict[str, Any]
    ) -> None:
        """Add a task that holds questions; `file` is the harness' own that it changes, if any."""
        places = {}
        for use in filter(rows.get, (ASKED, SHOWN)):
            text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows[use])
            places[use] = f"{ROWS}/{leaf}-{use}-{_digest(text)}.jsonl"
            self.rows[places[use]] = text
        self.tasks[f"{leaf}.yaml"] = {
            **({"include": f"{importlib.resources.files('lm_eval')}/tasks/{file}"} if file else {}),
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

    def write(self, folder: Path) -> None:
        """Write the files below a folder, which may hold others; rows that are there stay."""
        folder = folder.resolve()
        for name, text in self.rows.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != text.encode():
                write_atomically(path, text)
        for name, content in self.tasks.items():
            if places := content.get("dataset_kwargs"):  # which become absolute
                rows = {use: str(folder / place) for use, place in places["data_files"].items()}
                placed = {"data_files": rows, "cache_dir": str(folder / CACHE)}
                content = {**content, "dataset_kwargs": placed}
            how: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 100}
            write_atomically(folder / name, yaml.dump(content, Dumper=_Dumper, **how))


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

    The same arguments and questions give the same files to the last byte. At most `limit` questions
    a task are drawn with the seed, None asks all. `num_fewshot` worked examples stand before each;
    None leaves it to each task.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {num_fewshot}; expected 0 or more worked examples")
    names = [name_for_harness(task.name) for task in tasks]
    files, found = FolderFiles(), []
    for task, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise TaskError(f"task {task.name!r} is given twice, or its name is; give it once")
        entry = entry_of(task)
        shots = entry.shots if num_fewshot is None else num_fewshot
        asked = choose(task.rows(split, data_dir), limit, seed)
        try:
            shown = task.shots(split, data_dir) if shots else []
        except TaskError as error:
            needless = f"num_fewshot is {shots}, and 0 needs no worked examples"
            raise TaskError(f"{error}; {needless}") from error
        keys = {question_key(example.question) for example, _ in shown}
        same = [one[0].id for one in asked if question_key(one[0].question) in keys]
        left = [one for one in asked if one[0].id not in same]
        if not left:
            raise TaskError(
                f"task {task.name!r} has no questions in split {split!r}; give another split, or "
                f"more questions"
            )
        skipped = task.skipped(split, data_dir)
        not_asked = skipped | dict.fromkeys(same, "a worked example is the same question")
        notes = list(entry.notes)
        for why in dict.fromkeys(not_asked.values()):
            rows = [row for row, reason in not_asked.items() if reason == why]
            more = ", …" if len(rows) > NAMED else ""
            notes.append(f"not asked: {len(rows)} ({', '.join(rows[:NAMED])}{more}), since {why}")
        lines = {ASKED: _lines(task, entry, left), SHOWN: _lines(task, entry, shown)}
        settings = dict(entry.settings)
        if entry.generated:
            settings |= _lengths(entry, lines)
        leaves = {}
        for part in sorted({part for part, _ in lines[ASKED]}):
            own = {use: [row for at, row in each if at == part] for use, each in lines.items()}
            if shots > (most := len(own[SHOWN])):
                raise TaskError(
                    f"task {task.name!r}{f' ({part})' if part else ''} has {most} worked examples "
                    f"to show, and num_fewshot is {shots}; give at most {most}"
                )
            leaf, file = f"{name}_{part}" if part else name, entry.file.format(part=part)
            leaves[leaf] = len(own[ASKED])
            files._add(leaf, file, own, {"num_fewshot": shots, **settings})
        if entry.part_of:
            files.tasks[f"{name}.yaml"] = {
                "group": name,
                "task": [*leaves],
                "aggregate_metric_list": [{"metric": entry.metric, "weight_by_size": True}],
                "metadata": {"version": 1},
            }
        found.append(
            HarnessTask(
                name=task.name,
                harness_name=name,
                leaves=leaves,
                metric=entry.metric,
                filter=entry.filter,
                kind="generated" if entry.generated else "choices",
                examples=tuple(example for example, _ in left),
                num_fewshot=shots,
                notes=tuple(notes),
                not_asked=not_asked,
            )
        )
    return found, files


def _lines(task: Task, entry: Harness, questions: Sequence[QuestionRow]) -> list[Line]:
    found = []
    for example, row in questions:
        try:
            columns = entry.row_of(example, row)
        except TaskError as error:
            where = f"task {task.name!r}, question {example.id!r}"
            raise TaskError(f"{where}: {error}; the harness' prompt needs it") from error
        part = str(row[entry.part_of]) if entry.part_of else ""
        found.append((part, {"drllm_id": example.id, **columns}))
    return found


def _lengths(entry: Harness, lines: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """Return how long generated answers may be, where no task file says so itself."""
    if entry.file:
        return {}
    longest = entry.max_new_tokens or max(row["max_new_tokens"] for _, row in lines[ASKED])
    kwargs = {**entry.settings["generation_kwargs"], "max_gen_toks": longest}
    return {"generation_kwargs": kwargs}


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
    if others := [name for name in names if not is_task_name(name)]:
        said = nearest_name("task of drllm's", others[0], task_names())
        raise ConfigError(
            f"--data_dir and --split have no effect on the harness' own tasks: {said}; "
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
    found, files = task_folder(
        tasks, limit=None if limit is None else int(limit), seed=SEED, data_dir=data_dir, **more
    )
    for name, number in (leaf for task in found for leaf in task.leaves.items()):
        if number < num_processes:  # which would end the harness
            raise TaskError(
                f"task {name!r} has {number} questions for {num_processes} processes, and the "
                f"harness wants one for each; give a higher --limit, or start fewer processes"
            )
    return found, files
