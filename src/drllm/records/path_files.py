"""A file that says which executions are run, whatever the prompt: decisions, or a path.

Owns the file's three forms and the messages for what can't be one. Leaves what is done with it to
its readers. Axes: L layers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import PathError, RecordError, unknown_name
from drllm.paths import Decision, check_decisions, check_path, to_path

KINDS = ("decisions", "path")
FORMS = '{"decisions": [1, 0, 2, …]}, {"path": [0, 2, 2, …]}, or layer indices on one line'


@dataclass(frozen=True, slots=True)
class PathFile:
    """What a file says, before it is known how many layers the model has.

    Attributes:
        file: Where it stands.
        kind: `decisions` or `path`; None where the file doesn't say which.
        values: Its numbers.
    """

    file: Path
    kind: str | None
    values: tuple[int, ...]

    def path(self, num_layers: int) -> tuple[int, ...]:
        """Return the path for a model of L layers.

        Raises:
            PathError: Values that this model can't run, or that could be decisions and a path.
        """
        kind = self.kind or self._meant(num_layers)
        try:
            if kind == "decisions":
                return to_path(check_decisions(self.values, num_layers))
            return check_path(self.values, num_layers)
        except PathError as error:
            raise PathError(f"{self.file}: {error}") from error

    def _meant(self, num_layers: int) -> str:
        """Return what bare numbers can only be."""
        decisions = len(self.values) == num_layers and any(self.values)
        decisions = decisions and all(value in tuple(Decision) for value in self.values)
        path = all(value in range(num_layers) for value in self.values)
        if decisions and path:
            numbers = f"[{self.values[0]}, …]"
            raise PathError(
                f"{self.file}: {num_layers} numbers from 0 to 2 can be decisions or a path of this "
                f'model; write {{"decisions": {numbers}}} or {{"path": {numbers}}} to say which'
            )
        return "decisions" if decisions else "path"


def read_path_file(file: Path) -> PathFile:
    """Read decisions or a path.

    Args:
        file: A JSON object with `decisions` or `path`, or one line of numbers with spaces or
            commas between them.

    Raises:
        RecordError: No such file, no text, or another form.
        PathError: No numbers, or a value that isn't a whole number.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "doesn't exist"
        raise RecordError(f"{file} {what}; give a file with {FORMS}")
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RecordError(f"{file} is not a UTF-8 text file; give one with {FORMS}") from error
    except OSError as error:
        raise RecordError(f"can't read {file}: {error.strerror}") from error
    if not text:
        raise RecordError(f"{file} is empty; give a file with {FORMS}")
    if text[0] in "{[":
        kind, values = _from_json(file, text)
    else:
        kind, values = None, _from_line(file, text)
    what = kind or "line"
    if not values:
        raise PathError(f"{file}: the {what} is empty; at least one layer must be executed")
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int):
            raise PathError(
                f"{file}: {_short(value)} at position {place} of the {what} (counted from 0) is "
                f"not a whole number; give {FORMS}"
            )
    return PathFile(file, kind, tuple(values))


def _from_json(file: Path, text: str) -> tuple[str, list[Any]]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{file} is not JSON ({error}); give {FORMS}") from error
    if not isinstance(given, dict):
        raise RecordError(f"{file} holds a list and doesn't say of what; give {FORMS}")
    for key in given:
        if key not in KINDS:
            raise RecordError(f"{file}: " + unknown_name("key", key, KINDS))
    if len(given) != 1:
        found = "both 'decisions' and 'path'" if given else "neither 'decisions' nor 'path'"
        raise RecordError(f"{file} has {found}; give one of them")
    [(kind, values)] = given.items()
    if not isinstance(values, list):
        raise RecordError(f"{file}: {kind!r} is {_short(values)}; give a list of whole numbers")
    return kind, values


def _from_line(file: Path, text: str) -> list[Any]:
    if "\n" in text:
        raise RecordError(
            f"{file} has {len(text.splitlines())} lines; give one path a file, on one line, or JSON"
        )
    words = [word for word in re.split(r"[\s,]+", text) if word]
    return [int(word) if re.fullmatch(r"[+-]?[0-9]{1,9}", word) else word for word in words]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
