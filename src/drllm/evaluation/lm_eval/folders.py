"""Task folders: an evaluation's tasks as files that lm-evaluation-harness reads, ours or stock.

    FOLDER/NAME.yaml              one task, or the parts of one as a group
    FOLDER/rows/NAME-USE-HASH.jsonl   its questions (`asked`) or worked examples (`shown`)
    FOLDER/cache/                 what `datasets` makes of the rows

A rows file is named by its content: with other rows it is another file, so that neither `datasets`
nor anybody else can take old rows for new ones; and files that stay are not touched. Loads no
torch, and not the harness itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from drllm.errors import ConfigError, TaskError
from drllm.evaluation.lm_eval.registry import entry_of
from drllm.records import question_key, write_atomically
from drllm.tasks.base import Example, Function, QuestionRow, Row, Task, choose

ASKED, SHOWN = "asked", "shown"
ROWS, CACHE = "rows", "cache"
"""Places below a task folder: what is asked and shown, and what `datasets` makes of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """A task of a task folder.

    Attributes:
        name: Our name of the task.
        harness_name: What to give to the harness' `--tasks`.
        leaves: Names of the harness' tasks that hold the questions: itself, or a group's parts.
        metric: The metric that counts.
        filter: The harness' filter that it is taken from; `none` for most.
        kind: Options are scored, or answers are generated.
        num_questions: How many are asked, over all parts.
        num_fewshot: Worked examples before each question.
        chance: Accuracy of guessing, the mean over the questions; None for generated answers.
        notes: What a reader of results must know.
    """

    name: str
    harness_name: str
    leaves: tuple[str, ...]
    metric: str
    filter: str
    kind: Literal["choices", "generated"]
    num_questions: int
    num_fewshot: int
    chance: float | None
    notes: tuple[str, ...]

    @property
    def metric_key(self) -> str:
        """The key of the metric in the harness' results."""
        return f"{self.metric},{self.filter}"


@dataclass
class FolderFiles:
    """The files of a task folder, before there is one.

    Attributes:
        tasks: Name of each task file → its content, where rows are given below the folder.
        rows: Name below the folder → text of each rows file; it is named by its content.
        num_questions: Name of each task that holds questions → how many.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    num_questions: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells these files from others, wherever they are: 16 hexadecimal digits."""
        text = json.dumps(self.tasks, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write the files below a folder, which may hold others; rows that are there stay.

        Places in them become absolute.
        """
        folder = folder.resolve()
        for name, text in self.rows.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != text.encode():
                write_atomically(path, text)
        for name, content in self.tasks.items():
            placed = _placed(content, folder)
            text = yaml.dump(placed, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
            write_atomically(folder / name, text)


def _placed(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a task file's content with its places below the folder made absolute."""
    if "dataset_kwargs" not in content:
        return content
    places = content["dataset_kwargs"]
    rows = {use: str(folder / name) for use, name in places["data_files"].items()}
    cache = str(folder / places["cache_dir"])
    return {**content, "dataset_kwargs": {"data_files": rows, "cache_dir": cache}}


def task_folder(
    tasks: Sequence[Task],
    *,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
) -> tuple[list[HarnessTask], FolderFiles]:
    """Return tasks as lm-evaluation-harness knows them, and their files; nothing is written yet.

    The same arguments and questions give the same files to the last byte.

    Args:
        tasks: What is evaluated.
        split: Which questions are asked.
        limit: Maximum questions a task, drawn with the seed; None asks all.
        seed: Of the drawing.
        data_dir: Folder of task data; None asks the hub.
        num_fewshot: Worked examples before each question, never from the split that is asked;
            None leaves it to each task (5 for GSM8K, else none).
        max_length: Maximum tokens that the model reads and writes in all; None doesn't cap answers.

    Returns:
        One entry a task, in order, and the files of all.

    Raises:
        ConfigError: A negative number of examples.
        TaskError: A task named twice, questions that can't be had, none in the split, fewer
            worked examples than asked for, or a task that can't have any.

    Example:
        >>> from drllm.tasks.registry import get_tasks
        >>> [task], files = task_folder(get_tasks("builtin_facts"),
        ...                             split="test", limit=10, seed=0, data_dir=None)
        >>> task.harness_name, task.metric_key, task.num_questions, task.chance, list(files.tasks)
        ('builtin_facts', 'acc,none', 10, 0.25, ['builtin_facts.yaml'])
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {num_fewshot}; expected 0 or more worked examples")
    names = [_harness_name(task) for task in tasks]
    for task, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise TaskError(
                f"task {task.name!r} is evaluated twice, or another has the same name; name it once"
            )
    files = FolderFiles()
    found = []
    for task in tasks:
        makes = _TaskFiles(task, files, num_fewshot)
        asked = choose(task.rows(split, data_dir), limit, seed)
        found.append(makes.add(asked, makes.shots(split, data_dir), split, max_length))
    return found, files


class _TaskFiles:
    """The files of one task, as part of a folder's."""

    def __init__(self, task: Task, files: FolderFiles, num_fewshot: int | None) -> None:
        self.task = task
        self.name = _harness_name(task)
        self.files = files
        self.entry = entry_of(task)
        self.num_fewshot = self.entry.shots if num_fewshot is None else num_fewshot
        if self.num_fewshot and self.entry.only_zero_shot:
            raise TaskError(
                f"task {task.name!r} takes no num_fewshot ({self.entry.only_zero_shot}); "
                f"leave it out, or evaluate the task by itself"
            )

    def shots(self, split: str, data_dir: Path | None) -> list[QuestionRow]:
        """Return the questions that worked examples are drawn from."""
        if not self.num_fewshot:
            return []
        try:
            return self.task.shots(split, data_dir)
        except TaskError as error:
            raise TaskError(
                f"{error}; num_fewshot is {self.num_fewshot}, and 0 needs no worked examples"
            ) from error

    def add(
        self,
        asked: Sequence[QuestionRow],
        shown: Sequence[QuestionRow],
        split: str,
        max_length: int | None,
    ) -> HarnessTask:
        """Add the task's files, and return how the harness knows it."""
        notes = list(self.entry.notes)
        keys = {question_key(example.question) for example, _ in shown}
        left = [one for one in asked if question_key(one[0].question) not in keys]
        if len(left) < len(asked):
            notes.append(
                f"{len(asked) - len(left)} left out, since a worked example is the same question"
            )
        if not left:
            raise TaskError(
                f"task {self.task.name!r} has no questions in split {split!r}; give another "
                f"split, or more questions"
            )
        settings = self._settings(left, shown, max_length, notes)
        column, leaves = self.entry.part_of, []
        for part in sorted({str(row[column]) for _, row in left}) if column else [""]:
            leaf = f"{self.name}_{part}" if part else self.name
            leaves.append(leaf)
            asked_of_it, shown_of_it = (
                [one for one in questions if not part or one[1][column] == part]
                for questions in (left, shown)
            )
            self._add_leaf(leaf, part, asked_of_it, shown_of_it, settings)
        if column:
            self.files.tasks[f"{self.name}.yaml"] = {
                "group": self.name,
                "task": leaves,
                "aggregate_metric_list": [{"metric": self.entry.metric, "weight_by_size": True}],
                "metadata": {"version": 1},
            }
        generated = self.entry.generated
        return HarnessTask(
            name=self.task.name,
            harness_name=self.name,
            leaves=tuple(leaves),
            metric=self.entry.metric,
            filter=self.entry.filter,
            kind="generated" if generated else "choices",
            num_questions=len(left),
            num_fewshot=self.num_fewshot,
            chance=None if generated else fmean(1 / len(example.choices) for example, _ in left),
            notes=tuple(notes),
        )

    def _settings(
        self,
        asked: Sequence[QuestionRow],
        shown: Sequence[QuestionRow],
        max_length: int | None,
        notes: list[str],
    ) -> dict[str, Any]:
        """Return what the task files change, apart from where the rows are."""
        settings = dict(self.entry.settings)
        if not self.entry.generated:
            return settings
        rows = [self._columns(*one) for one in asked]
        wanted = self.entry.max_new_tokens or max(row["max_new_tokens"] for row in rows)
        given = wanted
        if max_length is not None:
            # No token is shorter than a byte, so that no prompt is cut; but half is for answers.
            examples = [_bytes(self._columns(*one)) for one in shown]
            longest = max(map(_bytes, rows)) + self.num_fewshot * max(examples, default=0)
            given = min(wanted, room_for_answer(longest, max_length))
        if given < wanted:
            notes.append(
                f"answers have at most {given} new tokens, since the model holds {max_length} in "
                f"all; the task asks for {wanted}"
            )
        if given < wanted or not self.entry.file:
            kwargs = settings.get("generation_kwargs") or generation_kwargs(self.entry.file)
            settings["generation_kwargs"] = {**kwargs, "max_gen_toks": given}
        return settings

    def _columns(self, example: Example, row: Row) -> dict[str, Any]:
        try:
            return self.entry.row_of(example, row)
        except TaskError as error:
            raise TaskError(
                f"task {self.task.name!r}, question {example.id!r}: {error}; the harness' prompt "
                f"needs it"
            ) from error

    def _add_leaf(
        self,
        leaf: str,
        part: str,
        asked: Sequence[QuestionRow],
        shown: Sequence[QuestionRow],
        settings: Mapping[str, Any],
    ) -> None:
        if self.num_fewshot > len(shown):
            raise TaskError(
                f"task {self.task.name!r}{f' ({part})' if part else ''} has {len(shown)} worked "
                f"examples to show, and num_fewshot is {self.num_fewshot}; "
                f"give at most {len(shown)}"
            )
        rows = {ASKED: self._add_rows(leaf, ASKED, asked)}
        if shown:
            rows[SHOWN] = self._add_rows(leaf, SHOWN, shown)
        self.files.num_questions[leaf] = len(asked)
        file = self.entry.file.format(part=part)
        self.files.tasks[f"{leaf}.yaml"] = {
            **({"include": str(harness_file(file))} if file else {}),
            "task": leaf,
            "tag": None,  # else the harness' own tags would mean these tasks alone
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": rows, "cache_dir": CACHE},
            "training_split": None,
            "validation_split": None,
            "test_split": ASKED,
            "fewshot_split": SHOWN if shown else None,
            # Written even where it is 0, which a command line then can't change: the harness
            # would show questions that are asked.
            "num_fewshot": self.num_fewshot,
            **settings,
        }

    def _add_rows(self, leaf: str, use: str, questions: Sequence[QuestionRow]) -> str:
        columns = [
            {"drllm_id": example.id, **self._columns(example, row)} for example, row in questions
        ]
        text = "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in columns)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = f"{ROWS}/{leaf}-{use}-{digest}.jsonl"
        self.files.rows[name] = text
        return name


def room_for_answer(prompt: int, max_length: int) -> int:
    """Return how many tokens an answer may have: what its prompt leaves, half of all at least.

    Example:
        >>> room_for_answer(100, 1024), room_for_answer(1000, 1024)
        (924, 512)
    """
    return max(max_length // 2, max_length - prompt)


def _harness_name(task: Task) -> str:
    """Return a task's name without what the harness' command line takes for something else."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", task.name)


def _bytes(row: Mapping[str, Any]) -> int:
    return len(json.dumps(row, ensure_ascii=False).encode())


# --- task files -----------------------------------------------------------------------------------


def harness_file(name: str) -> Path:
    """Return where the installed harness has a task file, by its name below `tasks`."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None, "lm_eval is a dependency"
    assert spec.origin is not None
    path = Path(spec.origin).parent / "tasks" / name
    if not path.is_file():
        raise TaskError(
            f"the installed lm_eval has no task file {name}; install lm-eval 0.4.13 or newer"
        )
    return path


def generation_kwargs(name: str) -> dict[str, Any]:
    """Return how a task file of the harness has answers generated."""
    text = harness_file(name).read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.load(text, Loader=_Plain)["generation_kwargs"]
    return settings


class _Plain(yaml.SafeLoader):
    """Reads a task file of the harness with the names of functions as texts."""


_Plain.add_constructor("!function", lambda _loader, node: node.value)


class _Dumper(yaml.SafeDumper):
    """Writes a task file, functions as the harness names them."""


_Dumper.add_representer(
    Function, lambda dumper, name: dumper.represent_scalar("!function", str(name))
)
