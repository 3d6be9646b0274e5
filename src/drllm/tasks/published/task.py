"""Questions that others published: from the hub, or from a data folder of the same layout.

The sets themselves are rows of `sets.yaml`. Loads no torch, and `datasets` only to ask the hub.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from drllm.errors import TaskError
from drllm.listener import logger
from drllm.records.splits import BOUNDS, question_key, split_of
from drllm.tasks.base import (
    FILE_NAMES,
    Example,
    Function,
    Harness,
    NoSplitError,
    QuestionRow,
    Row,
    Task,
    check_data_dir,
    check_split,
    shots_split,
)
from drllm.tasks.forms import BOXED, GAP, OPTIONS, Form
from drllm.tasks.published import readers
from drllm.tasks.registry import TASKS, register
from drllm.tasks.rows import EmptyTextError, hub_rows, read_rows

SETS = Path(__file__).with_name("sets.yaml")
FILES_KEPT = 8
"""How many files of questions are kept in memory, since every stage asks for them again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedTask(Task):
    """A task whose questions are published on the hub.

    Attributes:
        name, description, form, harness, group, aliases: See `Task`.
        repository: The set's repository on the hub.
        config: The set's configuration there; None where there is only one.
        files: Name of a file (a split of the hub's) → its origin: `train`, `validation`, `single`
            or `own`, as `records.split_of` divides them. Other files are never read.
        read: Makes a question of a row, without its task and, where rows have none, its id; None
            for a row that is no question of this task. Raises TaskError for a row that can't be
            used, without file and line.
        shots_file: A file of worked examples, which are shown before a question and never asked.
        folder: The task's folder below a data folder, where it isn't the name.
        columns: The only columns that are needed; all unless given.
        related: Tasks whose reported questions mustn't be trained on either.
        thin_out: Keeps the rows that are needed of a file on the hub, where that is few of them;
            it is also given the file's name in words.
    """

    name: str
    description: str
    repository: str
    config: str | None = None
    files: Mapping[str, str]
    read: Callable[[Row], Example | None]
    form: Form | None = None
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
        """Return the questions of one split, each with the row that it was read from.

        They stand in the file's order. A file that is only reported is asked as published; of
        others the first question of the same text is kept, and a training question that stands in
        a file that is reported, of this task or a related one, is left out. Files are
        `TASK/FILE.jsonl[.gz]` of the data folder, or the hub's. Rows with an empty text, an option
        say, are skipped, with a warning that names them. What is refused is in `Task.examples`.
        """
        file = self._file(split)
        origin = self.files[file]
        taken = self._reported(data_dir) if origin == "train" else set()
        questions: list[QuestionRow] = []
        for example, row in self._questions(file, data_dir).questions:
            key = question_key(example.question)
            if key not in taken and split_of(example.question, origin) == split:
                questions.append((example, row))
            if origin in ("train", "own"):
                taken.add(key)
        return questions

    def skipped(self, split: str, data_dir: Path | str | None = None) -> dict[str, str]:
        """See `Task.skipped`; an id is the file's name with the row's number."""
        return self._questions(self._file(split), data_dir).skipped

    def _file(self, split: str) -> str:
        check_split(split)
        file = next((name for name in self.files if split in BOUNDS[self.files[name]]), None)
        if file is None:
            raise NoSplitError(
                f"task {self.name!r} is only evaluated and has no questions for {split!r}; "
                f"give --split {' or '.join(self._splits())}"
            )
        return file

    def shots(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """See `Task.shots`; of a set with a `shots_file` its questions."""
        if self.shots_file:
            return list(self._questions(self.shots_file, data_dir).questions)
        return self.rows(shots_split(check_split(split), self._splits()), data_dir)

    def _splits(self) -> list[str]:
        return [split for origin in self.files.values() for split in BOUNDS[origin]]

    def _reported(self, data_dir: Path | str | None) -> set[str]:
        """Return the keys of the questions that are only reported, as far as they are there."""
        keys: set[str] = set()
        for task in (self, *(TASKS.get(name) for name in self.related if name != self.name)):
            assert isinstance(task, PublishedTask)
            for file, origin in task.files.items():
                if origin == "validation" and (data_dir is None or task._find(file, data_dir)):
                    reported = task._questions(file, data_dir).questions
                    keys.update(question_key(example.question) for example, _ in reported)
        return keys

    def _questions(self, file: str, data_dir: Path | str | None) -> "Questions":
        """Return the questions of a file; see `rows` for what is refused."""
        if data_dir is None:
            return _read(self, file, None, 0, 0)
        check_data_dir(str(data_dir))
        path = self._find(file, data_dir)
        if path is None:
            there = [each for each in self.files if self._find(each, data_dir)]
            also = "".join(f" (there is {each}: its {self._purpose(each)})" for each in there)
            raise NoSplitError(
                f"task {self.name!r} found no {self._place(data_dir) / file}.jsonl or .jsonl.gz "
                f"(its {self._purpose(file)}); put the file there, or leave out --data-dir to "
                f"fetch {self.repository} from the hub{also}"
            )
        if not path.name.startswith(f"{file}."):
            _warn_of_part(path)
        state = path.stat()
        return _read(self, file, path, state.st_mtime_ns, state.st_size)

    def _purpose(self, file: str) -> str:
        if file == self.shots_file:
            return "worked examples, to be shown before its questions"
        return f"questions for {', '.join(BOUNDS[self.files[file]])}"

    def _hub_rows(self, file: str) -> Iterable[Row]:
        """Return the rows of a file on the hub, thinned out where the set is."""
        rows = hub_rows(
            self.repository,
            self.config,
            file,
            what=f"task {self.name!r}",
            instead=f"--data-dir with {self._place('')}/{file}.jsonl",
            columns=self.columns,
        )
        if self.thin_out is None:
            return rows
        key = self.repository, self.config, file
        if key not in _thinned:
            _thinned[key] = self.thin_out(rows, f"{self.repository} {file}")
        return _thinned[key]

    def _place(self, data_dir: Path | str) -> Path:
        return Path(data_dir) / (self.folder or self.name)

    def _find(self, file: str, data_dir: Path | str) -> Path | None:
        return find_file(self._place(data_dir), file)


class Questions(NamedTuple):
    """The questions of a file, and the rows that can't be asked: id → why."""

    questions: tuple[QuestionRow, ...]
    skipped: dict[str, str]


@functools.lru_cache(maxsize=FILES_KEPT)
def _read(
    task: PublishedTask, file: str, path: Path | None, _mtime_ns: int, _size: int
) -> Questions:
    """Read a file of the hub (without a path) or of a data folder; a changed file is read anew."""
    if path is None:
        rows: Iterable[tuple[int, Row]] = enumerate(task._hub_rows(file), start=1)
        source = " ".join(filter(None, (task.repository, task.config, file))) + ", row"
    else:
        rows, source = read_rows(path), f"{path}, line"
    questions: dict[str, QuestionRow] = {}
    skipped: dict[str, str] = {}
    first = 0
    for number, (line, row) in enumerate(rows, start=1):
        try:
            example = task.read(row)
        except EmptyTextError as error:
            first = first or line
            skipped[f"{file}-{number}"] = str(error)
            continue
        except TaskError as error:
            raise TaskError(f"{source} {line}: {error}") from error
        if example is not None:
            own_id = example.id if example.id not in questions else ""  # a copy
            row_id = own_id or f"{file}-{number}"
            questions[row_id] = replace(example, id=row_id, task=task.name), row
    if skipped:
        why = next(iter(skipped.values()))
        if not questions:
            raise TaskError(f"{source} {first}: {why}, and no other row can be asked")
        logger.warning(
            "%s %d: %s; such rows are skipped: %d of %d",
            *(source, first, why, len(skipped), len(skipped) + len(questions)),
        )
    return Questions(tuple(questions.values()), skipped)


_thinned: dict[tuple[str, str | None, str], list[Row]] = {}
"""What was kept of files of the hub, which are long, and which several tasks may share."""


def find_file(folder: Path, stem: str) -> Path | None:
    """Return the file of a folder that holds the rows of `stem`, or None where there is none.

    It is `STEM.jsonl`, else `STEM.jsonl.gz`, else a part of the rows: `STEM_subsetN.jsonl[.gz]`;
    several parts without the whole are a TaskError.
    """
    for name in (stem, f"{stem}_subset[0-9]*"):
        found = [path for end in FILE_NAMES for path in sorted(folder.glob(name + end))]
        if len(found) > 1 and name != stem:
            raise TaskError(
                f"{folder} has several parts of {stem} ({', '.join(path.name for path in found)}); "
                f"keep one of them, or give the whole as {stem}.jsonl"
            )
        if found:
            return found[0]
    return None


@functools.cache
def _warn_of_part(path: Path) -> None:
    logger.warning("%s is a part of the set only; what is reported on it is on that part", path)


class Loader(yaml.SafeLoader):
    """Reads functions that the harness is to call as it writes them."""


Loader.add_constructor("!function", lambda _, node: Function(node.value))


_NAMED = {**vars(readers), "options": OPTIONS, "gap": GAP, "boxed": BOXED}
_BY_NAME = ("read", "columns", "thin_out", "form")
_KINDS: dict[str, type] = {"read": readers.Columns, "form": Form, "harness": Harness}


def tasks_in(table: str) -> list[PublishedTask]:
    """Return the tasks that a table in the format of `sets.yaml` describes."""
    rows = yaml.load(table, Loader=Loader).items()
    return [PublishedTask(name=name, **_fields(row)) for name, row in rows]


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(row)
    for key, value in row.items():
        if isinstance(value, list):
            fields[key] = tuple(value)
        elif isinstance(value, str) and key in _BY_NAME:
            fields[key] = _NAMED[value]
        elif isinstance(value, dict) and key in _KINDS:
            fields[key] = _KINDS[key](**_fields(value))
    return fields


for _task in tasks_in(SETS.read_text(encoding="utf-8")):
    register(_task)
