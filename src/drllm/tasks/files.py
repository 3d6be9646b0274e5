"""Tasks from a file of the user's own, or from any data set on the hub.

`FileTask` says what is in the rows. If the columns have other names than the fields there, the
task's name lists them after a `?`: `FILE.jsonl?question=query&answer=target`.
"""

import ast
import functools
import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from drllm.config import SPLITS
from drllm.errors import ConfigError, TaskError, shorten, unknown_name
from drllm.records.splits import find_split, question_key
from drllm.tasks.base import Task, check_split
from drllm.tasks.examples import FILE_ENDINGS, KL_REWARD, Example, Messages, Row, with_options
from drllm.tasks.prompt_formats import BOXED, LETTER_TOKENS, LETTERS, OPTIONS, PromptFormat
from drllm.tasks.rewards import REWARDS, normalise
from drllm.tasks.row_files import (
    EXAMPLE_ROW,
    READERS,
    describe_place,
    is_table_of_texts,
    read_rows,
)
from drllm.tasks.rows import (
    HUB_ROWS,
    HUB_SET,
    MissingFieldError,
    name_columns,
    read_hub_set,
    read_index,
    read_messages,
    read_text,
    read_texts,
)
from drllm.work.listener import logger

GRADER_FORMATS = {
    "letter": PromptFormat(
        rewards=("letter",),
        templates=(
            "{question}\n\nAnswer with the letter of the right option only.",
            "Choose the right option and reply with its letter alone.\n\n{question}",
            "{question}\n\nWhich letter is right? Letter:",
        ),
        max_new_tokens=LETTER_TOKENS,
    ),
    "exact": PromptFormat(
        rewards=("exact",),
        templates=(
            "{question}\n\nGive the answer only, with no explanation.",
            "Answer the question in as few words as possible.\n\n{question}",
            "Question: {question}\nReply with the answer alone.",
        ),
    ),
    "boxed": replace(BOXED, max_new_tokens=None),
}
"""Grader → its prompts. Other graders use the prompts of `exact`."""
PROMPTS_ALONE = PromptFormat(rewards=(KL_REWARD,), templates=("{question}",), max_new_tokens=1)

FIELDS = ("question", "choices", "answer", "grader", "prompt", "messages")
# Kinds of rows, as messages name them. The kind of a row with a grader is "grader 'NAME'".
WITH_CHOICES = "'choices'"
WITHOUT_ANSWER = "a prompt alone"

MAX_INDEX_DIGITS = 9  # of an index in a table or a column; Python refuses to read 5,000 digits
_NUMBERS_AS_TEXTS = json.JSONDecoder(parse_int=str, parse_float=str)
"""Reads a list in a cell of a table, where options that are numbers are texts too."""

OTHER_FORMATS = {
    ".arrow": "an Arrow file",
    ".doc": "a Word file",
    ".docx": "a Word file",
    ".ndjson": "a file of JSON lines of another name",
    ".txt": "a text file",
    ".xls": "an Excel file",
    ".xlsx": "an Excel file",
}
"""The formats of question files that can't be read, for a helpful message: ending → format."""


def is_source(name: str) -> bool:
    """Tell whether a name stands for a question file or a data set on the hub."""
    source = name.partition("?")[0]
    if is_file_name(source):
        return True
    if _other_format(source) is not None:
        return False
    return HUB_SET.fullmatch(source) is not None and not Path(source).exists()


def is_file_name(name: str) -> bool:
    """Tell whether a name ends as the name of a question file does."""
    return name.lower().endswith(FILE_ENDINGS)


def refuse_other_formats(name: str) -> None:
    """Raise a TaskError for a file in a format that can't be read, such as an Excel file."""
    source = name.partition("?")[0]
    kind = _other_format(source)
    stem = Path(source).name.partition(".")[0]
    if kind is not None:
        raise TaskError(
            f"{source} is {kind}, which can't be read; write its rows into {stem}.csv or "
            f"{stem}.jsonl, one a line, for example {EXAMPLE_ROW}"
        )


def refuse_wrong_file_name(name: str) -> None:
    """Raise a TaskError for a file whose name lacks its ending, or has another one."""
    source = name.partition("?")[0]
    if source.endswith(".yaml") or is_file_name(source):
        return
    if Path(source).is_file():
        raise TaskError(
            f"the name of the file {source} doesn't say what it holds; let it end in one of "
            f"{', '.join(READERS)}"
        )
    for ending in READERS:
        if Path(source + ending).is_file():
            raise TaskError(f"unknown task {source!r}; did you mean '{source}{ending}'?")


def _other_format(source: str) -> str | None:
    """Return the format of a file if it is one of `OTHER_FORMATS`, else None."""
    return OTHER_FORMATS.get(Path(source.removesuffix(".gz")).suffix.lower())


def with_columns(names: str, columns: str) -> str:
    """Return a comma list of tasks with the columns appended to each file and hub set.

    Example:
        >>> with_columns("arc,mine.jsonl", "question=query,answer=target")
        'arc,mine.jsonl?question=query&answer=target'

    Args:
        names: The tasks.
        columns: A comma list of FIELD=COLUMN.

    Raises:
        ConfigError: The list has neither a file nor a hub set.
        TaskError: A file has a format that can't be read.
    """
    query = columns.replace(",", "&")
    has_source = False
    names_with_columns: list[str] = []
    for name in names.split(","):
        name = name.strip()
        refuse_other_formats(name)
        if is_source(name):
            has_source = True
            mark = "&" if "?" in name else "?"
            name = f"{name}{mark}{query}"
        names_with_columns.append(name)
    if not has_source:
        raise ConfigError(
            f"--columns {columns} has no effect on {names or 'no task'}, which is neither a "
            f"file nor a data set of the hub; leave it out"
        )
    return ",".join(names_with_columns)


def load_source(name: str, reserved_names: tuple[str, ...] = ()) -> "FileTask":
    """Load the task of a file or of a hub set; a file that hasn't changed is read only once.

    A hub set is a split of a data set on the hub, by default `train`. Only its first `HUB_ROWS`
    rows are read.

    The name may end with `?` and pairs `FIELD=COLUMN`, with `&` between them. FIELD is one of
    `FIELDS`. COLUMN is a column; or `COLUMN.NAME`, a value inside a column; or `A+B+C`, the list of
    the values of three columns. The pair of the field `grader` has the grader itself instead of a
    column. Without this pair, rows without choices are graded by `exact`.

    Args:
        name: A file, or `OWNER/NAME[:CONFIG[:SPLIT]]`, with or without pairs.
        reserved_names: Names of other tasks; see `FileTask`.
    """
    file = Path(name.partition("?")[0])
    state = None
    if file.is_file():
        stat = file.stat()
        state = (stat.st_mtime_ns, stat.st_size)
    return _read_source(name, reserved_names, state)


@functools.lru_cache(maxsize=8)
def _read_source(
    name: str, reserved_names: tuple[str, ...], _state: tuple[int, int] | None
) -> "FileTask":
    """Read a file or a hub set. A changed file has another `_state`, so it is read again."""
    source, _, query = name.partition("?")
    columns = _parse_columns(source, query)
    if is_file_name(source):
        return FileTask(Path(source), reserved_names, read_rows(Path(source)), columns)
    first_rows = itertools.islice(read_hub_set(source, "task"), HUB_ROWS)
    rows = enumerate(first_rows, start=1)
    return FileTask(Path(source), reserved_names, rows, columns, skips=True)


def _parse_columns(source: str, query: str) -> dict[str, str]:
    """Read `FIELD=COLUMN&FIELD=COLUMN`."""
    columns: dict[str, str] = {}
    for part in query.split("&"):
        if not part:
            continue
        name, _, column = part.partition("=")
        message = ""
        if not column:
            message = f"{name}= is empty"
        elif name not in FIELDS:
            message = unknown_name("field", name, FIELDS)
        elif name in columns:
            message = f"{name} is named twice, as {columns[name]} and as {column}"
        if message:
            raise TaskError(f"columns of {source}: {message}; give FIELD=COLUMN")
        columns[name] = column
    return columns


class FileTask(Task):
    """The questions of one file or hub set; the rewards that fit depend on the rows.

    A question's text decides in which of the four splits it is. So one file serves search, training
    and evaluation, and no question is both trained on and reported.

    All rows are of one kind:

    - `question`, `choices` and `answer`; the answer is the right option's index from 0, its text,
      or its letter;
    - `question`, `answer` and `grader`; the grader is a reward that grades text, the same in all
      rows;
    - `prompt` (or `question`) without an answer;
    - `messages`, a conversation. If it ends with an answer, the answer is left out.

    Args:
        path: The file, or the name of the hub set.
        reserved_names: Names of other tasks. If `NAME.jsonl` has one of these names, its task is
            called `NAME_file`.
        rows: The rows with their line numbers.
        columns: Field → column, for fields that have another name in the rows.
        skips: Whether to leave out unusable rows with a warning; otherwise they raise a TaskError.
    """

    def __init__(
        self,
        path: Path,
        reserved_names: Collection[str],
        rows: Iterable[tuple[int, Row]],
        columns: Mapping[str, str] | None = None,
        *,
        skips: bool = False,
    ) -> None:
        self.path = path
        self.name = _task_name(path, reserved_names)
        self.description = f"the questions of {path}"
        reader = QuestionReader(path, self.name, columns or {}, skips)
        reader.read(rows)
        self.all_examples = reader.examples
        self.num_rows = reader.num_rows  # number of usable rows, including repeated rows
        self.prompt_format = _choose_prompt_format(reader)

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in the file's order.

        Half of the questions are for `search`, 10 % for `fit`, 15 % for `select` and 25 % for
        `test`. Only `test` may have several questions of the same text, with different choices.
        """
        check_split(split)
        examples: dict[str, Example] = {}
        for example in self.all_examples:
            if find_split(example.question, "own") == split:
                key = example.id if split == "test" else question_key(example.question)
                examples.setdefault(key, example)
        return list(examples.values())

    def describe_splits(self) -> str:
        """Return one line: how many questions each split has, and how many rows repeat a text.

        The line begins with the file's path instead of the task's name.
        """
        description = f"{self.path}{super().describe_splits().removeprefix(self.name)}"
        repeats = self.describe_repeats()
        return f"{description}; {repeats}" if repeats else description

    def describe_repeats(self) -> str:
        """Say how many rows repeat a text; return "" if none does."""
        num_questions = sum(len(self.examples(split)) for split in SPLITS)
        num_repeated = self.num_rows - num_questions
        if num_repeated == 0:
            return ""
        return f"{num_repeated:,} of {self.num_rows:,} rows repeat a text, left out"


def name_source(name: str, reserved_names: Collection[str]) -> str:
    """Return the name of the task of a file or of a hub set, without reading it.

    Args:
        name: The file or the hub set, as for `load_source`.
        reserved_names: Names of other tasks; see `FileTask`.
    """
    return _task_name(Path(name.partition("?")[0]), reserved_names)


def _task_name(path: Path, reserved_names: Collection[str]) -> str:
    stem = path.name
    for ending in FILE_ENDINGS:
        if stem.lower().endswith(ending):
            stem = stem[: -len(ending)]
            break
    stem = stem.replace(":", "_")
    return f"{stem}_file" if stem in reserved_names else stem


def _choose_prompt_format(reader: "QuestionReader") -> PromptFormat:
    """Return the prompt format for the questions of a file."""
    if reader.kind == WITH_CHOICES:
        return OPTIONS
    if reader.kind == WITHOUT_ANSWER:
        return PROMPTS_ALONE
    # The question's text may list options, with letters as answers: allow at least A to E.
    last = max(LETTERS.find(example.answer) for example in reader.examples)
    letters = LETTERS[: max(5, last + 1)]
    prompt_format = GRADER_FORMATS.get(reader.grader, GRADER_FORMATS["exact"])
    return replace(prompt_format, rewards=(reader.grader,), letters=letters)


@dataclass
class QuestionReader:
    """Makes questions from rows of one kind; rows that repeat a question are left out."""

    path: Path  # the file, or the name of the hub set
    task: str  # the task's name
    columns: Mapping[str, str]  # field → column
    skips: bool  # whether unusable rows are left out; otherwise they raise a TaskError
    examples: list[Example] = field(default_factory=list)
    kind: str = ""  # the kind of the first row; see `_find_kind`
    grader: str = ""  # the grader's name; empty for rows with choices or without an answer
    num_rows: int = 0  # number of usable rows, including repeated rows
    num_skipped: int = 0  # number of rows that were left out
    first_reason: str = ""  # why the first of these rows was left out
    # (key of the question, choices) → line number and question of the first row that has them
    _first: dict[tuple[str, tuple[str, ...]], tuple[int, Example]] = field(default_factory=dict)

    @functools.cached_property
    def has_text_cells(self) -> bool:
        """Whether lists and numbers are texts in the rows, as in CSV."""
        return is_table_of_texts(self.path)

    def read(self, rows: Iterable[tuple[int, Row]]) -> None:
        """Read all rows.

        Raises TaskError if a row is unusable or, with `skips`, if no row is usable.
        """
        for line, row in rows:
            try:
                self._add(line, row)
            except TaskError as error:  # noqa: PERF203
                if not self.skips:
                    place = describe_place(self.path, line)
                    raise TaskError(f"{place}: {error}{self._offer_columns(error)}") from error
                self.num_skipped += 1
                if not self.first_reason:
                    self.first_reason = f"row {line}: {error}"
        if not self.examples:
            raise TaskError(f"{self.path} has no usable row; {self.first_reason}")
        if self.num_skipped:
            message = "%d rows of %s are left out, for example %s"
            logger.warning(message, self.num_skipped, self.path, self.first_reason)

    def _offer_columns(self, error: TaskError) -> str:
        """Return the end of a message: how to name the column of a missing field; maybe empty."""
        if not isinstance(error, MissingFieldError):
            return ""
        unused_columns = [name for name in error.columns if name not in FIELDS]
        if not unused_columns:
            return ""
        column = unused_columns[0] if len(unused_columns) == 1 else "COLUMN"
        return f"; name its column, as in --columns {error.field}={column}"

    def _add(self, line: int, row: Row) -> None:
        """Add the question of a row. Raises TaskError if the row is unusable."""
        if self.columns:
            row = _rename_columns(row, self.columns)
        if self.has_text_cells:
            row = _parse_cells(row)
        kind = _find_kind(row)
        if not self.kind:
            self.kind = kind
        if kind != self.kind:
            raise TaskError(
                f"a row with {kind}, but the first row has {self.kind}; put them into files of "
                f"their own"
            )
        example = replace(_read_example(row), id=f"line-{line}", task=self.task)
        key = question_key(example.question), example.choices
        first_line, first = self._first.setdefault(key, (line, example))
        if first.answer != example.answer:
            raise TaskError(
                f"line {first_line} has the same question with another answer; keep one of the two"
            )
        self.grader = str(row.get("grader", ""))
        self.num_rows += 1
        if first is example:  # else the row repeats a question
            self.examples.append(example)


def _rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the fields of a row. `columns` maps a field to the column that has its value.

    For the field `grader`, `columns` has the grader itself.
    """
    fields = {name: row[name] for name in FIELDS if name in row}
    for name, column in columns.items():
        fields[name] = column if name == "grader" else _column_value(row, column)
    if "answer" in fields and "choices" not in fields and "grader" not in fields:
        fields["grader"] = "exact"
    return fields


def _parse_cells(row: Row) -> Row:
    """Return a row of a table of texts with its lists, and with the index of the right option.

    A list is written as in JSON or in Python. The index is a number, unless it is an option's text.
    """
    values = dict(row)
    for name in ("choices", "messages"):
        if name in values:
            values[name] = _parse_list(values[name])
    choices = values.get("choices")
    answer = values.get("answer")
    if isinstance(choices, list) and answer not in choices and _is_index(answer):
        values["answer"] = int(answer)
    return values


def _is_index(cell: Any) -> TypeGuard[str]:
    """Tell whether a cell may be the index of an option: a number of few digits."""
    return isinstance(cell, str) and cell.isdecimal() and len(cell) <= MAX_INDEX_DIGITS


def _parse_list(text: Any) -> Any:
    """Return the list that a cell holds; a cell without a list is returned unchanged."""
    for parse in (_NUMBERS_AS_TEXTS.decode, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    return text


def _column_value(row: Row, column: str) -> Any:
    """Return the value of a column, or a value inside a column: `options.text`, `target.0.at`.

    Columns with `+` between them give the list of their values: `A+B+C+D`.
    """
    if column in row:
        return row[column]
    if "+" in column:
        return [_column_value(row, part) for part in column.split("+")]
    value: Any = row
    for name in column.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and _is_index(name) and int(name) < len(value):
            value = value[int(name)]
        else:
            raise TaskError(
                f"column {shorten(repr(column))} is missing (the line has: {name_columns(row)})"
            )
    return value


def _find_kind(row: Row) -> str:
    """Return the kind of a row, as messages name it."""
    if "choices" in row and "grader" in row:
        raise TaskError(
            "the row has 'choices' and 'grader'; leave out 'grader', and choose by --reward how "
            "options are graded"
        )
    if "choices" in row:
        return WITH_CHOICES
    if "grader" in row:
        graders = [name for name in REWARDS if not REWARDS.get(name).scores_options]
        grader = row["grader"]
        if grader not in graders:
            raise TaskError(unknown_name("grader", str(grader), graders))
        return f"grader {grader!r}"
    has_text = any(name in row for name in ("prompt", "question", "messages"))
    if has_text and "answer" not in row:
        return WITHOUT_ANSWER
    advice = "name columns of other names, as in --columns question=COLUMN,answer=COLUMN"
    if has_text and all(name in FIELDS for name in row):
        advice = "--columns grader=exact grades the answers by their text"
    raise TaskError(
        f"'choices' or 'grader' is missing (the line has: {name_columns(row)}); give "
        f"question, choices and answer; or question, answer and grader; or prompt or messages "
        f"alone; {advice}"
    )


def _read_example(row: Row) -> Example:
    """Return the question of a row of any kind."""
    if "choices" in row:
        return _options_example(row)
    if "grader" in row:
        return Example(question=read_text(row, "question"), answer=_graded_answer(row))
    if "messages" in row:
        messages = _messages_to_answer(row)
        text = "\n".join(f"{role}: {content}" for role, content in messages)
        return Example(question=text, answer="", messages=messages)
    name = "prompt" if "prompt" in row else "question"
    return Example(question=read_text(row, name), answer="")


def _options_example(row: Row) -> Example:
    question = read_text(row, "question")
    choices = read_texts(row, "choices", minimum=2)
    if len(choices) > len(LETTERS):
        raise TaskError(f"'choices' has {len(choices)} entries; give at most {len(LETTERS)}")
    for choice in choices:
        if choices.count(choice) > 1:
            raise TaskError(f"'choices' holds {shorten(repr(choice))} twice; choices must differ")
    return with_options(question, choices, _gold_index(row, choices))


def _messages_to_answer(row: Row) -> Messages:
    """Return a conversation up to the last message of the user."""
    messages = read_messages(row)
    while messages and messages[-1][0] == "assistant":
        messages.pop()
    if not messages or messages[-1][0] != "user":
        raise TaskError("'messages' has no message of the user to answer; give one with role user")
    return tuple(messages)


def _gold_index(row: Row, choices: tuple[str, ...]) -> int:
    """Return the index of the right option. The row gives the index, the text or the letter."""
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return read_index(answer, len(choices), "answer")
    text = read_text(row, "answer")
    if text in choices:  # checked first: a choice's text may be a letter
        return choices.index(text)
    letters = LETTERS[: len(choices)]
    if len(text) == 1 and text in letters:
        return letters.index(text)
    raise TaskError(
        f"'answer' {shorten(repr(text))} is not among the choices; give a choice's text, its index "
        f"(0 to {len(choices) - 1}) or its letter (A to {letters[-1]})"
    )


def _graded_answer(row: Row) -> str:
    """Return the right answer of a row that has a grader."""
    answer = _read_answer(row)
    grader = row["grader"]
    if grader == "letter" and (len(answer) != 1 or answer not in LETTERS):
        raise TaskError(
            f"'answer' is {shorten(repr(answer))}; the grader 'letter' expects one of A to Z"
        )
    if grader == "exact" and (not normalise(answer) or len(answer.splitlines()) > 1):
        raise TaskError(
            f"'answer' is {shorten(repr(answer))}; the grader 'exact' expects one line of words"
        )
    return answer


def _read_answer(row: Row) -> str:
    """Return the answer of a row as a text; the row has a text or a number."""
    value = row.get("answer")
    if isinstance(value, float):
        if not math.isfinite(value):  # an empty cell of a Parquet file is NaN
            raise TaskError(
                f"'answer' is {value}; expected a text or a finite number; give the right answer, "
                f"or leave the row out"
            )
        # Parquet and pandas turn the whole numbers of a column with empty cells into floats.
        return str(int(value) if value.is_integer() else value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return read_text(row, "answer").strip()
