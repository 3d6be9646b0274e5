"""A file that says which layers run, whatever the prompt: decisions, or a path.

Axes: L layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from drllm.errors import PathError, RecordError
from drllm.paths import Decision, check_decisions, check_path, to_path
from drllm.records.codec import decode, read_text

FORMS = '{"decisions": [1, 0, 2, …]}, {"path": [0, 2, 2, …]}, or layer indices on one line'


class _Given(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    decisions: tuple[int, ...] | None = None
    path: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class PathFile:
    """What a file says, before it is known how many layers the model has.

    Attributes:
        file: Where it lies.
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
    text = read_text(file).strip()
    if not text:
        raise RecordError(f"{file} is empty; give a file with {FORMS}")
    kind, values = _from_json(file, text) if text[0] in "{[" else (None, _from_line(file, text))
    if not values:
        raise PathError(
            f"{file}: {kind or 'the line'} is empty; at least one layer must be executed"
        )
    return PathFile(file, kind, values)


def _from_json(file: Path, text: str) -> tuple[str, tuple[int, ...]]:
    try:
        given = decode(text, _Given, str(file))
    except RecordError as error:
        raise RecordError(f"{error}; give {FORMS}") from error
    if (given.decisions is None) == (given.path is None):
        raise RecordError(f"{file} must have one of 'decisions' and 'path'; give {FORMS}")
    if given.decisions is not None:
        return "decisions", given.decisions
    assert given.path is not None
    return "path", given.path


def _from_line(file: Path, text: str) -> tuple[int, ...]:
    if "\n" in text:
        raise RecordError(
            f"{file} has {len(text.splitlines())} lines; give one path a file, on one line, or JSON"
        )
    words = [word for word in re.split(r"[\s,]+", text) if word]
    for place, word in enumerate(words):
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", word):
            shown = word if len(word) <= 40 else f"{word[:37]}…"
            raise PathError(
                f"{file}: {shown!r} at position {place} of the line (counted from 0) is not a "
                f"whole number; give {FORMS}"
            )
    return tuple(map(int, words))
