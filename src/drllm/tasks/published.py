"""Questions that others published: from the hub, or from a data folder of the same layout.

Owns the way from a set's name to its rows, which of its files serves which split, leaving out
training questions that are reported somewhere, and refusing to search what is only evaluated. A
task states repository, files and how a row is read; how it is asked comes from `multiple_choice`,
`math` or the task itself. Leaves which question is in which split to `records`, and how an
evaluation asks to lm-evaluation-harness. Loads no torch, and `datasets` only to ask the hub.
"""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.records import question_key, split_of
from drllm.tasks.base import Example, Prompt, Task, check_split, get_task, shots_split
from drllm.tasks.rows import read_rows

SPLITS_OF: dict[str, tuple[str, ...]] = {
    "train": ("search", "fit", "select"),
    "validation": ("test",),
    "single": ("select", "test"),
    "own": SPLITS,
}
"""Origin of a file → the splits that its questions are divided into."""

QuestionRow: TypeAlias = tuple[Example, Mapping[str, Any]]
"""A question, and the row that it was read from."""

logger = logging.getLogger(__name__)


class PublishedTask(Task):
    """A task whose questions are published on the hub.

    A subclass gives the attributes below and `read`, and is also a `MultipleChoiceTask`, a
    `BoxedTask` or anything else that says how a question is asked.

    Attributes:
        repository: The set's repository on the hub.
        config: The set's configuration there; None where there is only one.
        files: Name of a file (a split of the hub's) → its origin: `train`, `validation`, `single`
            or `own`, as `records.split_of` divides them.
        hub_files: A file's name on the hub, where it is another than in a data folder.
        shots_file: A file of worked examples, which are shown before a question and never asked.
        folder: The task's folder below a data folder; its name unless given.
        columns: The only columns that are needed; all unless given.
        related: Tasks whose reported questions mustn't be trained on either.
    """

    repository: str
    config: str | None = None
    files: ClassVar[Mapping[str, str]]
    hub_files: ClassVar[Mapping[str, str]] = {}
    shots_file: str = ""
    folder: str = ""
    columns: tuple[str, ...] = ()
    related: tuple[str, ...] = ()

    @abstractmethod
    def read(self, row: Mapping[str, Any], row_id: str) -> Example | None:
        """Return the question that a row holds.

        Args:
            row: One object of the published file.
            row_id: An id made from file and line, for sets without ids of their own.

        Returns:
            The question; None for a row that is no question of this task.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """

    def examples(self, split: str, data_dir: Path | None = None) -> list[Example]:
        """Return the questions of one split; see `rows`."""
        return [example for example, _ in self.rows(split, data_dir)]

    def rows(self, split: str, data_dir: Path | None = None) -> list[QuestionRow]:
        """Return the questions of one split, each with the row that it was read from.

        They stand in the file's order. Of questions with the same text the first is kept. A
        training question that stands in a file that is reported, of this task or a related one,
        is left out.

        Args:
            split: `search`, `fit`, `select` or `test`.
            data_dir: Folder with `TASK/FILE.jsonl[.gz]`; None asks the hub.

        Raises:
            TaskError: A split that the set doesn't have, a missing folder or file (naming where
                it was looked for), no network, or a line that can't be used (with its number).
        """
        file = self._file_of(check_split(split))
        origin = self.files[file]
        asked = list(self._questions(file, data_dir))
        taken = self._reported(data_dir) if origin == "train" else set()
        questions: list[QuestionRow] = []
        for example, row in asked:
            key = question_key(example.question)
            if key not in taken and split_of(example.question, origin) == split:
                questions.append((example, row))
            taken.add(key)
        return questions

    def shots(self, split: str, data_dir: Path | None = None) -> list[QuestionRow]:
        """Return the questions that may be shown, with their answers, before those of a split.

        They are those of the `shots_file`, else those of another split: `fit`, or the other half
        of a set that is only evaluated.

        Args:
            split: What is asked.
            data_dir: As for `rows`.

        Raises:
            TaskError: As `rows`.

        Source: ours; what is shown is never what is reported.
        """
        if self.shots_file:
            return list(self._questions(self.shots_file, data_dir))
        return self.rows(shots_split(check_split(split), self._splits()), data_dir)

    def _splits(self) -> list[str]:
        return [split for origin in self.files.values() for split in SPLITS_OF[origin]]

    def _file_of(self, split: str) -> str:
        for file, origin in self.files.items():
            if split in SPLITS_OF[origin]:
                return file
        raise TaskError(
            f"task {self.name!r} is only evaluated and has no questions for {split!r}; "
            f"give --split {' or '.join(self._splits())}"
        )

    def _reported(self, data_dir: Path | None) -> set[str]:
        """Return the keys of the questions that are only reported, as far as they are there."""
        keys: set[str] = set()
        for task in (self, *(get_task(name) for name in self.related if name != self.name)):
            assert isinstance(task, PublishedTask)
            for file, origin in task.files.items():
                if origin == "validation" and (data_dir is None or task._find(file, data_dir)):
                    reported = task._questions(file, data_dir)
                    keys.update(question_key(example.question) for example, _ in reported)
        return keys

    def _questions(self, file: str, data_dir: Path | None) -> Iterator[QuestionRow]:
        for number, (where, row) in enumerate(self._rows(file, data_dir), start=1):
            try:
                example = self.read(row, f"{file}-{number}")
            except TaskError as error:
                raise TaskError(f"{where}: {error}") from error
            if example is not None:
                yield example, row

    def _rows(self, file: str, data_dir: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield where a row stands, in words, and the row."""
        if data_dir is None:
            source = " ".join(filter(None, (self.repository, self.config, file)))
            for number, row in enumerate(self._hub_rows(file), start=1):
                yield f"{source}, row {number}", row
            return
        if not data_dir.is_dir():
            raise TaskError(f"--data-dir {data_dir} is not a folder; give the folder of task data")
        path = self._find(file, data_dir)
        if path is None:
            raise TaskError(
                f"task {self.name!r} found no {self._place(data_dir) / file}.jsonl or .jsonl.gz "
                f"(its {self._purpose(file)}); put the file there, or leave out --data-dir to "
                f"fetch {self.repository} from the hub{self._there(data_dir)}"
            )
        if not path.name.startswith(f"{file}."):
            _warn_of_part(path)
        for line, row in read_rows(path):
            yield f"{path}, line {line}", row

    def _purpose(self, file: str) -> str:
        if file == self.shots_file:
            return "worked examples, to be shown before its questions"
        return f"questions for {', '.join(SPLITS_OF[self.files[file]])}"

    def _there(self, data_dir: Path) -> str:
        """Say what a data folder has of this task, in words that end a message."""
        there = [file for file in self.files if self._find(file, data_dir)]
        return "".join(f" (there is {file}: its {self._purpose(file)})" for file in there)

    def _hub_rows(self, file: str) -> Iterable[Mapping[str, Any]]:
        yield from self._fetch(self.repository, file)

    def _fetch(self, repository: str, file: str) -> Iterator[Mapping[str, Any]]:
        import datasets

        try:
            rows = datasets.load_dataset(
                repository, self.config, split=self.hub_files.get(file, file)
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            # Offline, gated and missing sets are OSErrors; a configuration or split that the
            # repository or the cache lacks is a ValueError; files it can't read are the third.
            cause = " ".join(str(error).split()) or type(error).__name__
            raise TaskError(
                f"task {self.name!r} can't fetch {file} of {repository} from the hub "
                f"({cause}); connect or log in (hf auth login), or give --data-dir with "
                f"{self._place(Path())}/{file}.jsonl"
            ) from error
        if self.columns:
            rows = rows.select_columns([name for name in self.columns if name in rows.column_names])
        yield from rows

    def _place(self, data_dir: Path) -> Path:
        return data_dir / (self.folder or self.name)

    def _find(self, file: str, data_dir: Path) -> Path | None:
        return find_file(self._place(data_dir), file)


class EvaluatedTask(PublishedTask):
    """A published task that is only evaluated, as lm-evaluation-harness asks it.

    It has no rewards and no prompt of ours, so a search refuses it by name.
    """

    rewards = ()

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Refuse: only an evaluation asks these questions.

        Raises:
            TaskError: Always.
        """
        raise TaskError(self.only_evaluated())

    def retests(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Refuse, as `prompt` does.

        Raises:
            TaskError: Always.
        """
        raise TaskError(self.only_evaluated())


def find_file(folder: Path, stem: str) -> Path | None:
    """Return the file of a folder that holds the rows of `stem`, or None where there is none.

    Args:
        folder: A task's folder.
        stem: For instance `train`.

    Returns:
        `STEM.jsonl`, else `STEM.jsonl.gz`, else a part of the rows: `STEM_subsetN.jsonl[.gz]`.

    Raises:
        TaskError: Several parts, and no whole.
    """
    for suffix in (".jsonl", ".jsonl.gz"):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    parts = [
        path
        for suffix in (".jsonl", ".jsonl.gz")
        for path in sorted(folder.glob(f"{stem}_subset[0-9]*{suffix}"))
    ]
    if len(parts) > 1:
        raise TaskError(
            f"{folder} has several parts of {stem} ({', '.join(path.name for path in parts)}); "
            f"keep one of them, or give the whole as {stem}.jsonl"
        )
    return parts[0] if parts else None


@functools.cache
def _warn_of_part(path: Path) -> None:
    logger.warning("%s is a part of the set only; what is reported on it is on that part", path)
