"""Task folders: an evaluation's tasks as files that lm-evaluation-harness reads, ours or stock.

Owns which questions are asked and which are shown before them, the rows that hold them, and the
limits on both. Leaves how a task is asked to `table`, the form of a task file to `task_files`,
where questions come from to `tasks`, and running them to the harness. Loads no torch.

    FOLDER/NAME.yaml              one task, or the parts of one as a group
    FOLDER/rows/NAME-USE-HASH.jsonl   its questions (`asked`) or worked examples (`shown`)
    FOLDER/cache/                 what `datasets` makes of the rows

A rows file is named by its content: with other rows it is another file, so that neither `datasets`
nor anybody else can take old rows for new ones; and files that stay are not touched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from drllm.errors import ConfigError, TaskError
from drllm.evaluation.lm_eval.registry import Row, entry_of
from drllm.evaluation.lm_eval.task_files import (
    CACHE,
    ROWS,
    FolderFiles,
    generation_kwargs,
    harness_file,
)
from drllm.records import question_key
from drllm.tasks.base import Example, Task, choose, shots_split
from drllm.tasks.published import PublishedTask

ASKED, SHOWN = "asked", "shown"


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


def write_task_folder(
    tasks: Sequence[Task],
    folder: Path,
    *,
    split: str,
    limit: int | None,
    seed: int,
    data_dir: Path | None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
) -> list[HarnessTask]:
    """Write tasks as a folder that lm-evaluation-harness reads by `--include_path`.

    The same arguments and questions give the same files to the last byte. Paths in them are
    absolute. Files of other names that are in the folder stay.

    Args:
        tasks: What is evaluated.
        folder: Where to; made if need be.
        split: See `task_folder`, as for all others.
        limit: Most questions a task, drawn with the seed.
        seed: Of the drawing.
        data_dir: Folder of task data.
        num_fewshot: Worked examples before each question.
        max_length: Most tokens that the model reads and writes in all.

    Returns:
        One entry a task, in order.

    Raises:
        ConfigError: See `task_folder`.
        TaskError: See `task_folder`.
        RecordError: A folder that can't be written.

    Example:
        >>> import tempfile
        >>> from drllm.tasks.base import get_tasks
        >>> folder = Path(tempfile.mkdtemp())
        >>> [task] = write_task_folder(get_tasks("builtin_facts"), folder,
        ...                            split="test", limit=10, seed=0, data_dir=None)
        >>> task.harness_name, task.metric_key, task.num_questions, task.chance
        ('builtin_facts', 'acc,none', 10, 0.25)
    """
    found, files = task_folder(
        tasks,
        split=split,
        limit=limit,
        seed=seed,
        data_dir=data_dir,
        num_fewshot=num_fewshot,
        max_length=max_length,
    )
    files.write(folder)
    return found


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

    Args:
        tasks: What is evaluated.
        split: Which questions are asked.
        limit: Most questions a task, drawn with the seed; None asks all.
        seed: Of the drawing.
        data_dir: Folder of task data; None asks the hub.
        num_fewshot: Worked examples before each question, never from the split that is asked;
            None leaves it to each task (5 for GSM8K, else none).
        max_length: Most tokens that the model reads and writes in all; None doesn't cap answers.

    Raises:
        ConfigError: A negative number of examples.
        TaskError: A task named twice, questions that can't be had, none in the split, fewer
            worked examples than asked for, or a task that can't have any.
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
    found = [
        _TaskFiles(task, files, num_fewshot).make(split, limit, seed, data_dir, max_length)
        for task in tasks
    ]
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

    def make(
        self,
        split: str,
        limit: int | None,
        seed: int,
        data_dir: Path | None,
        max_length: int | None,
    ) -> HarnessTask:
        asked = choose(_questions(self.task, split, data_dir), limit, seed)
        shown = self._shots(split, data_dir) if self.num_fewshot else []
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
        leaves = []
        for part in self._parts(left):
            leaf = f"{self.name}_{part}" if part else self.name
            leaves.append(leaf)
            self._make_leaf(leaf, part, self._of(part, left), self._of(part, shown), settings)
        if self.entry.part_of:
            group = {
                "group": self.name,
                "task": leaves,
                "aggregate_metric_list": [{"metric": self.entry.metric, "weight_by_size": True}],
                "metadata": {"version": 1},
            }
            self.files.tasks[f"{self.name}.yaml"] = group
        options = [len(example.choices) for example, _ in left]
        return HarnessTask(
            name=self.task.name,
            harness_name=self.name,
            leaves=tuple(leaves),
            metric=self.entry.metric,
            filter=self.entry.filter,
            kind="generated" if self.entry.generated else "choices",
            num_questions=len(left),
            num_fewshot=self.num_fewshot,
            chance=None if self.entry.generated else fmean(1 / n for n in options),
            notes=tuple(notes),
        )

    def _shots(self, split: str, data_dir: Path | None) -> list[tuple[Example, Row]]:
        try:
            if isinstance(self.task, PublishedTask):
                return self.task.shots(split, data_dir)
            return _questions(self.task, shots_split(split), data_dir)
        except TaskError as error:
            raise TaskError(
                f"{error}; num_fewshot is {self.num_fewshot}, and 0 needs no worked examples"
            ) from error

    def _parts(self, asked: Iterable[tuple[Example, Row]]) -> list[str]:
        if not self.entry.part_of:
            return [""]
        return sorted({str(row[self.entry.part_of]) for _, row in asked})

    def _of(
        self, part: str, questions: Sequence[tuple[Example, Row]]
    ) -> Sequence[tuple[Example, Row]]:
        if not part:
            return questions
        return [one for one in questions if one[1][self.entry.part_of] == part]

    def _settings(
        self,
        asked: Sequence[tuple[Example, Row]],
        shown: Sequence[tuple[Example, Row]],
        max_length: int | None,
        notes: list[str],
    ) -> dict[str, Any]:
        """Return what the task files change, apart from where the rows are."""
        settings = dict(self.entry.settings)
        if not self.entry.generated:
            return settings
        rows = [self._columns(*one) for one in asked]
        wanted = self.entry.max_new_tokens or max(row["max_new_tokens"] for row in rows)
        most = wanted
        if max_length is not None:
            # No token is shorter than a byte, so that no prompt is cut; but half is for answers.
            texts = [_bytes(self._columns(*one)) for one in shown]
            longest = max(map(_bytes, rows)) + self.num_fewshot * max(texts, default=0)
            most = min(wanted, room_for_answer(longest, max_length))
        if most < wanted:
            notes.append(
                f"answers have at most {most} new tokens, since the model holds {max_length} in "
                f"all; the task asks for {wanted}"
            )
        if most < wanted or not self.entry.file:
            given = settings.get("generation_kwargs") or generation_kwargs(self.entry.file)
            settings["generation_kwargs"] = {**given, "max_gen_toks": most}
        return settings

    def _columns(self, example: Example, row: Row) -> dict[str, Any]:
        try:
            return self.entry.columns(example, row)
        except TaskError as error:
            raise TaskError(
                f"task {self.task.name!r}, question {example.id!r}: {error}; the harness' prompt "
                f"needs it"
            ) from error

    def _make_leaf(
        self,
        leaf: str,
        part: str,
        asked: Sequence[tuple[Example, Row]],
        shown: Sequence[tuple[Example, Row]],
        settings: Mapping[str, Any],
    ) -> None:
        if self.num_fewshot > len(shown):
            raise TaskError(
                f"task {self.task.name!r}{f' ({part})' if part else ''} has {len(shown)} worked "
                f"examples to show, and num_fewshot is {self.num_fewshot}; "
                f"give at most {len(shown)}"
            )
        rows = {ASKED: self._make_rows(leaf, ASKED, asked)}
        if shown:
            rows[SHOWN] = self._make_rows(leaf, SHOWN, shown)
        self.files.num_questions[leaf] = len(asked)
        content: dict[str, Any] = {}
        if self.entry.file:
            content["include"] = str(harness_file(self.entry.file.format(part=part)))
        content |= {
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
        self.files.tasks[f"{leaf}.yaml"] = content

    def _make_rows(self, leaf: str, use: str, questions: Sequence[tuple[Example, Row]]) -> str:
        lines = []
        for example, row in questions:
            columns = {"drllm_id": example.id, **self._columns(example, row)}
            lines.append(json.dumps(columns, ensure_ascii=False))
        text = "".join(f"{line}\n" for line in lines)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = f"{ROWS}/{leaf}-{use}-{digest}.jsonl"
        self.files.rows[name] = text
        return name


def room_for_answer(prompt: int, max_length: int) -> int:
    """Return how many tokens an answer may have: all behind its prompt, half of all at least.

    Example:
        >>> room_for_answer(100, 1024), room_for_answer(1000, 1024)
        (924, 512)
    """
    return max(max_length // 2, max_length - prompt)


def _questions(task: Task, split: str, data_dir: Path | None) -> list[tuple[Example, Row]]:
    if isinstance(task, PublishedTask):
        return task.rows(split, data_dir)
    return [(example, {}) for example in task.examples(split, data_dir)]


def _harness_name(task: Task) -> str:
    """Return a task's name without what the harness' command line takes for something else."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", task.name)


def _bytes(row: Mapping[str, Any]) -> int:
    return len(json.dumps(row, ensure_ascii=False).encode())
