"""One JSON object from a file, read field by field with messages that name the place.

Owns the checks of single values. Leaves what the fields mean to `run` and `results`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from drllm.errors import RecordError
from drllm.records import SCHEMA_VERSION


class Fields:
    """A JSON object with the place it came from, read one checked field at a time."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise RecordError(f"{where}: not a JSON object")
        self.values: dict[str, Any] = values
        self.where = where

    def _take(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        if key not in self.values:
            raise RecordError(
                f"{self.where}: {key!r} is missing "
                f"(there is: {', '.join(sorted(self.values)) or 'nothing'})"
            )
        value = self.values[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise RecordError(f"{self.where}: {key!r} is {value!r}; expected {expected}")
        return value

    def text(self, key: str) -> str:
        """Return a required string."""
        return str(self._take(key, (str,), "a text"))

    def whole(self, key: str) -> int:
        """Return a required whole number of at least 0."""
        value = int(self._take(key, (int,), "a whole number"))
        if value < 0:
            raise RecordError(f"{self.where}: {key!r} is {value}; expected at least 0")
        return value

    def number(self, key: str) -> float:
        """Return a required finite number."""
        value = float(self._take(key, (int, float), "a number"))
        if not math.isfinite(value):
            raise RecordError(f"{self.where}: {key!r} is {value}; expected a finite number")
        return value

    def items(self, key: str) -> list[Any]:
        """Return a required list."""
        return list(self._take(key, (list,), "a list"))

    def optional_number(self, key: str) -> float | None:
        """Return a number, or None where the key is absent or null."""
        return None if self.values.get(key) is None else self.number(key)

    def optional_whole(self, key: str) -> int | None:
        """Return a whole number, or None where the key is absent or null."""
        return None if self.values.get(key) is None else self.whole(key)

    def optional_text(self, key: str) -> str | None:
        """Return a text, or None where the key is absent or null."""
        return None if self.values.get(key) is None else self.text(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts; empty where the key is absent or null."""
        values = [] if self.values.get(key) is None else self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise RecordError(f"{self.where}: {key!r} is {values!r}; expected texts")
        return tuple(values)

    def numbers(self, key: str) -> dict[str, float]:
        """Return an object of numbers by name; empty where the key is absent or null."""
        inner = self.optional_object(key)
        return {} if inner is None else {name: inner.number(name) for name in inner.values}

    def interval(self, key: str) -> tuple[float, float]:
        """Return the two ends of an interval, the lower one first."""
        ends = self.items(key)
        both = len(ends) == 2 and all(
            isinstance(end, (int, float)) and math.isfinite(end) for end in ends
        )
        if not both or ends[0] > ends[1]:
            raise RecordError(
                f"{self.where}: {key!r} is {ends!r}; expected two numbers, the lower one first"
            )
        return float(ends[0]), float(ends[1])

    def optional_object(self, key: str) -> Fields | None:
        """Return what an object holds, or None where the key is absent or null."""
        if self.values.get(key) is None:
            return None
        return Fields(self.values[key], f"{self.where}, {key!r}")

    def objects(self, key: str) -> list[Fields]:
        """Return a list of objects; empty where the key is absent or null."""
        rows = [] if self.values.get(key) is None else self.items(key)
        return [
            Fields(row, f"{self.where}, {key!r}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]


def read_of_schema(path: Path, schema: str) -> Fields:
    """Read a file of ours: one JSON object that says its schema.

    Args:
        path: The file.
        schema: What it has to be.

    Raises:
        RecordError: It isn't JSON, of another schema, or of a newer drllm.
    """
    fields = read_object(path)
    if fields.values.get("schema") != schema:
        raise RecordError(
            f"{path} says {fields.values.get('schema')!r}; expected {schema!r}. Is it the right "
            f"file?"
        )
    if fields.whole("schema_version") > SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema version {fields.whole('schema_version')}, this drllm reads up to "
            f"{SCHEMA_VERSION}; install a newer drllm"
        )
    return fields


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        RecordError: It isn't UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not a UTF-8 text file; make it again") from error


def read_object(path: Path) -> Fields:
    """Read a file that holds one JSON object.

    Raises:
        RecordError: It isn't JSON, or not an object.
    """
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); make the file again"
        ) from error
    return Fields(values, str(path))
