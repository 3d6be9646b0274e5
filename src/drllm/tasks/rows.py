"""Reading question files: JSON lines, plain or gzipped, one object a line.

Owns the way from a path to numbered rows and the messages for what is broken there. Leaves what
a row must hold to the tasks. Loads no torch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drllm.errors import TaskError


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number, object)` for each line of a `.jsonl` or `.jsonl.gz` file.

    Args:
        path: The file; gzipped if its name ends in `.gz`. Blank lines are passed over.

    Raises:
        TaskError: A missing, empty or unreadable file, or a line that isn't a JSON object. The
            message names file and line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "doesn't exist"
        raise TaskError(f"{path} {what}; give a .jsonl or .jsonl.gz file of questions")
    empty = True
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.name.endswith(".gz")
            else path.open(encoding="utf-8")
        ) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                empty = False
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise TaskError(
                        f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); "
                        f"each line must hold one JSON object"
                    ) from error
                if not isinstance(row, dict):
                    raise TaskError(
                        f"{path}, line {number}: {line.strip()[:40]!r} is not a JSON object; "
                        f"each line must hold one"
                    )
                yield number, row
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text; give a .jsonl or .jsonl.gz file") from error
    except (EOFError, zlib.error, OSError) as error:
        raise TaskError(f"{path} can't be read ({error}); fetch or write it again") from error
    if empty:
        raise TaskError(f"{path} is empty; give a file with one question a line")


def text_of(row: Mapping[str, Any], key: str) -> str:
    """Return a text field of a row as it stands.

    Raises:
        TaskError: It is missing, blank or not text; without file and line.
    """
    if key not in row:
        raise TaskError(f"{key!r} is missing (the line has: {', '.join(row) or 'nothing'})")
    value = row[key]
    if not isinstance(value, str):
        raise TaskError(f"{key!r} is {value!r}; expected text")
    if not value.strip():
        raise TaskError(f"{key!r} is empty; expected text")
    return value


def texts_of(row: Mapping[str, Any], key: str, minimum: int) -> tuple[str, ...]:
    """Return a field that lists texts.

    Args:
        row: One object of a file.
        key: The field.
        minimum: Fewest texts that the list may have.

    Raises:
        TaskError: Missing, not a list, too short, or an entry that is blank or not text; without
            file and line.
    """
    if key not in row:
        raise TaskError(f"{key!r} is missing (the line has: {', '.join(row) or 'nothing'})")
    value = row[key]
    if not isinstance(value, list):
        raise TaskError(f"{key!r} is {value!r}; expected a list of texts")
    for entry in value:
        if not isinstance(entry, str) or not entry.strip():
            raise TaskError(f"{key!r} holds {entry!r}; expected texts")
    if len(value) < minimum:
        raise TaskError(f"{key!r} has {len(value)} entries; expected at least {minimum}")
    return tuple(value)
