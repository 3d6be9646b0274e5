"""Reads the rows of question files: JSON lines, JSON lists, CSV, TSV and Parquet.

Every file but Parquet may be gzipped. This module doesn't import torch.
"""

import csv
import difflib
import functools
import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from drllm.errors import RecordError, TaskError, shorten
from drllm.extras import need
from drllm.records.codec import BYTE_ORDER_MARK, decode, file_exists, number_lines

NumberedRows: TypeAlias = Iterator[tuple[int, dict[str, Any]]]

EXAMPLE_ROW = '{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}'  # shown in messages
REMEDY = f"give a file of JSON lines, one object a line, for example {EXAMPLE_ROW}"


def read_rows(path: Path) -> NumberedRows:
    """Yield the rows of a file with their numbers, from 1; `describe_place` names a number.

    A file whose name has no ending of `READERS` is read as JSON lines.

    Raises:
        ConfigError: The file is in Parquet, and pyarrow isn't installed.
        TaskError: The file can't be read, or has no rows.
    """
    read = READERS.get(_find_ending(path), _read_json_lines)
    has_rows = False
    try:
        if not file_exists(path, "read"):
            raise TaskError(f"{path} doesn't exist; {_suggest_file(path)}")
        for number, row in read(path):
            has_rows = True
            yield number, row
    except RecordError as error:
        message = str(error).removesuffix("; make the file again")  # drllm didn't make it
        raise TaskError(f"{message}; {REMEDY}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (EOFError, zlib.error, OSError) as error:
        cause = " ".join(str(error).split())  # pyarrow's errors have several lines
        raise TaskError(f"{path} can't be read ({cause}); fetch or write it again") from error
    if not has_rows:
        raise TaskError(f"{path} is empty; give a file with one question a line")


def _suggest_file(path: Path) -> str:
    """Return what to give in place of a file that doesn't exist: the file of the nearest name."""
    names = []
    if path.parent.is_dir():
        names = [file.name for file in path.parent.iterdir() if _find_ending(file) in READERS]
    closest_names = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    if closest_names:
        return f"did you mean {path.with_name(closest_names[0])}?"
    return f"give a file of questions ({', '.join(READERS)})"


def describe_place(path: Path, number: int) -> str:
    """Name a row in a message: the file, and the line or the number of the row."""
    word = "row" if _find_ending(path) in (".json", ".parquet") else "line"
    return f"{path}, {word} {number}"


def is_table_of_texts(path: Path) -> bool:
    """Tell whether every value in a file is a text, also lists and numbers, as in CSV."""
    return _find_ending(path) in (".csv", ".tsv")


def _find_ending(path: Path) -> str:
    """Return the ending of a file's name in lower case, without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file, which may be gzipped."""
    opener: Callable[..., IO[Any]] = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, mode, **options)


def _read_json_lines(path: Path) -> NumberedRows:
    """Read one object a line; blank lines are left out."""
    is_first_row = True
    with _open(path, "rb") as file:
        for number, line in number_lines(file):
            if is_first_row and line.lstrip().startswith(b"["):
                raise TaskError(
                    f"{path} is one JSON list and not JSON lines; rename it to "
                    f"{path.name.partition('.')[0]}.json, which is read as a list"
                )
            is_first_row = False
            yield number, decode(line, dict[str, Any], f"{path}, line {number}")


def _read_json(path: Path) -> NumberedRows:
    """Read a list of objects, or one object a line."""
    with _open(path, "rb") as file:
        data: bytes = file.read().removeprefix(BYTE_ORDER_MARK)
    if data.lstrip().startswith(b"["):
        yield from enumerate(decode(data, list[dict[str, Any]], str(path)), start=1)
        return
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield number, decode(line, dict[str, Any], f"{path}, row {number}")


def _read_table(path: Path, delimiter: str) -> NumberedRows:
    """Read CSV or TSV; all values are texts. A row has the number of its last line."""
    with _open(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _check_header(path, reader.fieldnames or (), delimiter)
            for row in reader:
                _check_cells(row, f"{path}, line {reader.line_num}", reader.fieldnames or ())
                yield reader.line_num, row
        except csv.Error as error:
            raise TaskError(f"{path}, line {reader.line_num + 1}: {error}; {REMEDY}") from error


def _check_header(path: Path, names: Sequence[str], delimiter: str) -> None:
    """Refuse a header that names a column twice, or whose columns are separated otherwise."""
    for name, count in Counter(names).items():
        if count > 1:
            column = shorten(repr(name))
            raise TaskError(f"{path}: the header names the column {column} twice; rename one")
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        expected = "tabs" if delimiter == "\t" else "commas (or tabs, in a .tsv file)"
        raise TaskError(
            f"{path} has one column, {shorten(repr(names[0]))}; separate columns by {expected}"
        )


def _check_cells(row: dict[Any, Any], place: str, names: Sequence[str]) -> None:
    """Refuse a row with more or fewer cells than the header, as csv's reader marks them."""
    problem = ""
    if None in row:
        problem = "more"
    elif None in row.values():
        problem = "fewer"
    if problem:
        raise TaskError(
            f"{place}: the row has {problem} cells than the header, which has {len(names)}; put "
            f"texts that hold commas or line ends in double quotes"
        )


def _read_parquet(path: Path) -> NumberedRows:
    """Read a Parquet file; a column without a value is left out of the row."""
    need("eval", f"reading {path}", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}
    except pyarrow.ArrowException as error:
        cause = str(error).splitlines()[0].rstrip(".")
        raise TaskError(f"{path} is not a Parquet file ({cause}); {REMEDY}") from error


READERS: dict[str, Callable[[Path], NumberedRows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": functools.partial(_read_table, delimiter=","),
    ".tsv": functools.partial(_read_table, delimiter="\t"),
    ".parquet": _read_parquet,
}
"""The reader of each kind of file, by the ending of the file's name."""
