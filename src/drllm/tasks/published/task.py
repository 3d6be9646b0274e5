"""Published tasks: questions from the hub, or from a data folder with the same files.

`sets.yaml` describes each set in one row. This module imports `datasets` only to read the hub, and
never imports torch.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from drllm.errors import TaskError
from drllm.records.splits import BOUNDS, find_split, question_key
from drllm.tasks.base import (
    Function,
    Harness,
    NoSplitError,
    Task,
    check_data_dir,
    check_split,
    choose_shots_split,
)
from drllm.tasks.examples import JSON_LINES, Example, QuestionRow, Row
from drllm.tasks.prompt_formats import BOXED, GAP, OPTIONS, PromptFormat
from drllm.tasks.published import readers
from drllm.tasks.registry import TASKS, register
from drllm.tasks.row_files import read_rows
from drllm.tasks.rows import EmptyTextError, hub_rows
from drllm.work.listener import logger

SETS = Path(__file__).with_name("sets.yaml")
MAX_FILES_KEPT = 8
"""Maximum question files that are kept in memory, since every stage reads the same files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedTask(Task):
    """A task whose questions are published on the hub.

    Attributes:
        name, description, prompt_format, harness, group, aliases: See `Task`.
        repository: The set's repository on the hub.
        config: The set's configuration on the hub; None if there is only one.
        files: The question files: name → origin. On the hub, a file is a split with this name. The
            origin decides into which splits `find_split` divides the file;
            `records.splits.BOUNDS` explains the four origins. Only these files and `shots_file` are
            read.
        read: A function that makes a question from a row; see `readers`.
        shots_file: A file of worked examples, which are never asked as questions.
        folder: The task's folder in a data folder; by default the task's name.
        columns: The columns to read; empty for all columns.
        related: Other tasks whose reported questions mustn't be trained on. A question is reported
            if its file has the origin `validation`.
        thin_out: A function that returns the rows to keep from a long file on the hub. Its second
            argument is the file's name for messages. None keeps all rows.
    """

    name: str
    description: str
    repository: str
    config: str | None = None
    files: Mapping[str, str]
    read: Callable[[Row], Example | None]
    prompt_format: PromptFormat | None = None
    harness: Harness | None = None
    shots_file: str = ""
    folder: str = ""
    columns: tuple[str, ...] = ()
    related: tuple[str, ...] = ()
    thin_out: Callable[[Iterable[Row], str], list[Row]] | None = None
    group: str = ""
    aliases: tuple[str, ...] = ()

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split; see `rows`."""
        return [example for example, _ in self.rows(split, data_dir)]

    def rows(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the questions of one split with their rows, in the file's order.

        Files are `TASK/FILE.jsonl[.gz]` in the data folder, or files on the hub. `Task.examples`
        lists the errors. Some questions are left out:

        - of a file with the origin `train` or `own`, questions that repeat the text of an earlier
          question;
        - of a file with the origin `train`, questions that this task or a related task reports;
        - with a warning, rows with an empty text, such as an empty option.
        """
        file = self._find_split_file(split)
        origin = self.files[file]
        excluded_keys: set[str] = set()
        if origin == "train":
            excluded_keys |= self._find_reported_keys(data_dir)
        questions: list[QuestionRow] = []
        for example, row in self._read_questions(file, data_dir).questions:
            key = question_key(example.question)
            if key not in excluded_keys and find_split(example.question, origin) == split:
                questions.append((example, row))
            if origin in ("train", "own"):  # a later question with the same text is left out
                excluded_keys.add(key)
        return questions

    def skipped(self, split: str, data_dir: Path | str | None = None) -> dict[str, str]:
        """Return the unusable rows; a row's id is the file's name and the row's number."""
        return self._read_questions(self._find_split_file(split), data_dir).skipped

    def _find_split_file(self, split: str) -> str:
        """Return the name of the file that has the questions of a split."""
        check_split(split)
        for file, origin in self.files.items():
            if split in BOUNDS[origin]:
                return file
        raise NoSplitError(
            f"task {self.name!r} is only evaluated and has no questions for {split!r}; "
            f"give --split {' or '.join(self._splits())}"
        )

    def shots(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the questions from which worked examples for a split are drawn.

        These are the questions of `shots_file` or, without this file, of the split that
        `choose_shots_split` names.
        """
        if self.shots_file:
            return list(self._read_questions(self.shots_file, data_dir).questions)
        shots_split = choose_shots_split(check_split(split), self._splits())
        return self.rows(shots_split, data_dir)

    def _splits(self) -> list[str]:
        """Return the splits that have questions in the files."""
        splits: list[str] = []
        for origin in self.files.values():
            splits += BOUNDS[origin]
        return splits

    def _find_reported_keys(self, data_dir: Path | str | None) -> set[str]:
        """Return the keys of all reported questions of this task and of related tasks.

        Files that the data folder lacks are left out.
        """
        tasks: list[Task] = [self]
        tasks += [TASKS.get(name) for name in self.related if name != self.name]
        keys: set[str] = set()
        for task in tasks:
            assert isinstance(task, PublishedTask)
            for file, origin in task.files.items():
                has_file = data_dir is None or task._find_path(file, data_dir) is not None
                if origin == "validation" and has_file:
                    reported = task._read_questions(file, data_dir).questions
                    keys.update(question_key(example.question) for example, _ in reported)
        return keys

    def _read_questions(self, file: str, data_dir: Path | str | None) -> "Questions":
        """Return the questions of a file; see `Task.examples` for the errors."""
        if data_dir is None:
            return _read_file(self, file, None, 0, 0)
        check_data_dir(str(data_dir))
        path = self._find_path(file, data_dir)
        if path is None:
            raise self._missing_file_error(file, data_dir)
        is_part = not path.name.startswith(f"{file}.")  # it is FILE_subsetN.jsonl[.gz]
        if is_part:
            _warn_of_part(path)
        state = path.stat()
        return _read_file(self, file, path, state.st_mtime_ns, state.st_size)

    def _missing_file_error(self, file: str, data_dir: Path | str) -> NoSplitError:
        """Return the error for a missing file; it lists the files that the data folder has."""
        present = ""
        for name in self.files:
            if self._find_path(name, data_dir):
                present += f" (there is {name}: its {self._describe_purpose(name)})"
        return NoSplitError(
            f"task {self.name!r} found no {self._folder(data_dir) / file}.jsonl or .jsonl.gz "
            f"(its {self._describe_purpose(file)}); put the file there, or leave out --data-dir to "
            f"fetch {self.repository} from the hub{present}"
        )

    def _describe_purpose(self, file: str) -> str:
        """Describe what a file is for."""
        if file == self.shots_file:
            return "worked examples, to be shown before its questions"
        return f"questions for {', '.join(BOUNDS[self.files[file]])}"

    def _read_hub_rows(self, file: str) -> Iterable[Row]:
        """Return the rows of a file on the hub that `thin_out` keeps."""
        rows = hub_rows(
            self.repository,
            self.config,
            file,
            what=f"task {self.name!r}",
            instead=f"--data-dir with {self._folder('')}/{file}.jsonl",
            columns=self.columns,
        )
        if self.thin_out is None:
            return rows
        key = self.repository, self.config, file
        if key not in _thinned:
            _thinned[key] = self.thin_out(rows, f"{self.repository} {file}")
        return _thinned[key]

    def _folder(self, data_dir: Path | str) -> Path:
        """Return the folder of the task in a data folder."""
        return Path(data_dir) / (self.folder or self.name)

    def _find_path(self, file: str, data_dir: Path | str) -> Path | None:
        """Return the path of a file in a data folder; None if the folder lacks the file."""
        return find_file(self._folder(data_dir), file)


class Questions(NamedTuple):
    """The questions of a file, and its unusable rows: id → reason."""

    questions: tuple[QuestionRow, ...]
    skipped: dict[str, str]


@functools.lru_cache(maxsize=MAX_FILES_KEPT)
def _read_file(
    task: PublishedTask, file: str, path: Path | None, _mtime_ns: int, _size: int
) -> Questions:
    """Read a file in a data folder or, without a path, on the hub.

    The file's time and size are only part of the cache's key, so that a changed file is read again.
    """
    rows: Iterable[tuple[int, Row]]
    if path is None:
        rows = enumerate(task._read_hub_rows(file), start=1)
        names = [task.repository, task.config, file]
        source = " ".join(name for name in names if name) + ", row"
    else:
        rows = read_rows(path)
        source = f"{path}, line"
    questions: dict[str, QuestionRow] = {}  # by id
    skipped: dict[str, str] = {}
    first_skipped_line = 0
    # `number` counts rows; in a data folder `line` counts blank lines too, for messages.
    for number, (line, row) in enumerate(rows, start=1):
        try:
            example = task.read(row)
        except EmptyTextError as error:
            if not skipped:
                first_skipped_line = line
            skipped[f"{file}-{number}"] = str(error)
            continue
        except TaskError as error:
            raise TaskError(f"{source} {line}: {error}") from error
        if example is None:
            continue
        example_id = example.id
        if not example_id or example_id in questions:  # it is missing or taken
            example_id = f"{file}-{number}"
        questions[example_id] = replace(example, id=example_id, task=task.name), row
    if skipped:
        _warn_of_skipped(f"{source} {first_skipped_line}", skipped, len(questions))
    return Questions(tuple(questions.values()), skipped)


def _warn_of_skipped(first_line: str, skipped: Mapping[str, str], num_questions: int) -> None:
    """Warn of unusable rows. Raises TaskError if no row is usable."""
    reason = next(iter(skipped.values()))
    if num_questions == 0:
        raise TaskError(f"{first_line}: {reason}, and no other row is usable")
    num_rows = len(skipped) + num_questions
    logger.warning(
        "%s: %s; rows like this are skipped: %d of %d", first_line, reason, len(skipped), num_rows
    )


_thinned: dict[tuple[str, str | None, str], list[Row]] = {}
"""The rows that `thin_out` kept: (repository, configuration, file) → rows. Several tasks share a
file."""


def find_file(folder: Path, stem: str) -> Path | None:
    """Find the file in a folder that has the rows of `stem`; None if there is no such file.

    The file is `STEM.jsonl`, else `STEM.jsonl.gz`, else a part of the rows,
    `STEM_subsetN.jsonl[.gz]`. Raises TaskError if there are several parts and no whole file.
    """
    whole = _files_named(folder, stem)
    if whole:
        return whole[0]
    parts = _files_named(folder, f"{stem}_subset[0-9]*")
    if len(parts) > 1:
        raise TaskError(
            f"{folder} has several parts of {stem} ({', '.join(path.name for path in parts)}); "
            f"keep one of them, or give the whole as {stem}.jsonl"
        )
    return parts[0] if parts else None


def _files_named(folder: Path, pattern: str) -> list[Path]:
    """Return the question files in a folder whose names, without the endings, match a pattern."""
    files: list[Path] = []
    for ending in JSON_LINES:
        files += sorted(folder.glob(pattern + ending))
    return files


@functools.cache
def _warn_of_part(path: Path) -> None:
    logger.warning("%s holds only a part of the set; the results are for this part", path)


class Loader(yaml.SafeLoader):
    """A YAML loader that reads `!function` as the name of a function that the harness calls."""


Loader.add_constructor("!function", lambda _, node: Function(node.value))


# Objects that `sets.yaml` may name.
_OBJECTS = {**vars(readers), "options": OPTIONS, "gap": GAP, "boxed": BOXED}
# Fields whose text is the name of such an object.
_OBJECT_FIELDS = ("read", "columns", "thin_out", "prompt_format")
# Fields that may be a mapping, and the class to make from it.
_CLASSES: dict[str, type] = {
    "read": readers.Columns,
    "prompt_format": PromptFormat,
    "harness": Harness,
}


def read_tasks(table: str) -> list[PublishedTask]:
    """Make the tasks of a table in the format of `sets.yaml`."""
    rows = yaml.load(table, Loader=Loader).items()
    return [PublishedTask(name=name, **_make_arguments(row)) for name, row in rows]


def _make_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row of the table, or a mapping in it, into keyword arguments.

    Lists become tuples, names become the objects that they name, and mappings become objects of the
    classes in `_CLASSES`.
    """
    fields = dict(row)
    for key, value in row.items():
        if isinstance(value, list):
            fields[key] = tuple(value)
        elif isinstance(value, str) and key in _OBJECT_FIELDS:
            fields[key] = _OBJECTS[value]
        elif isinstance(value, dict) and key in _CLASSES:
            fields[key] = _CLASSES[key](**_make_arguments(value))
    return fields


for _task in read_tasks(SETS.read_text(encoding="utf-8")):
    register(_task)
