"""A file that says which layers run, whatever the prompt: decisions, or a path.

Axes: L layers.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from drllm.errors import PathError, RecordError
from drllm.paths import check_decisions, check_path, to_path
from drllm.records.codec import decode, read_text

FORMS = '{"decisions": [1, 0, 2, …]}, {"path": [0, 2, 2, …]}, or layer indices on one line'


class _Given(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    decisions: tuple[int, ...] | None = None
    path: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class PathFile:
    """What a file says, before it is known how many layers the model has.

    Its `kind` is `decisions` or `path`, or None where the file doesn't say which.
    """

    file: Path
    kind: str | None
    values: tuple[int, ...]

    def path(self, num_layers: int) -> tuple[int, ...]:
        """Return the path for a model of L layers.

        Values that it can't run, or that could be decisions and a path, are a PathError.
        """
        distinct, kind = set(self.values), self.kind
        if kind is None:
            is_one_a_layer = len(self.values) == num_layers
            kind = "decisions" if is_one_a_layer and {0} != distinct <= {0, 1, 2} else "path"
            if kind == "decisions" and distinct <= set(range(num_layers)):
                numbers = f"[{self.values[0]}, …]"
                raise PathError(
                    f"{self.file}: {num_layers} numbers from 0 to 2 can be decisions or a path of "
                    f'this model; write {{"decisions": {numbers}}} or {{"path": {numbers}}} to say '
                    f"which"
                )
        try:
            if kind == "decisions":
                return to_path(check_decisions(self.values, num_layers))
            return check_path(self.values, num_layers)
        except PathError as error:
            raise PathError(f"{self.file}: {error}") from error


def read_path_file(file: Path) -> PathFile:
    """Read a JSON object with `decisions` or `path`, or a line of numbers with spaces or commas.

    No such file, no text, or another form is a RecordError; no numbers, or a value that isn't a
    whole number, a PathError.
    """
    text = read_text(file).strip()
    if not text or (text[0] not in "{[" and "\n" in text):
        raise RecordError(f"{file} is {'no single line' if text else 'empty'}; give {FORMS}")
    if text[0] in "{[":
        try:
            given = decode(text, _Given, str(file))
        except RecordError as error:
            raise RecordError(f"{error}; give {FORMS}") from error
        if (given.decisions is None) == (given.path is None):
            raise RecordError(f"{file} must have one of 'decisions' and 'path'; give {FORMS}")
        kind = "decisions" if given.path is None else "path"
        found = PathFile(file, kind, given.decisions or given.path or ())
    else:
        words = [word for word in re.split(r"[\s,]+", text) if word]
        for place, word in enumerate(words):
            if not re.fullmatch(r"[+-]?[0-9]{1,9}", word):
                raise PathError(
                    f"{file}: {word[:40]!r} at position {place} of the line (counted from 0) is "
                    f"not a whole number; give {FORMS}"
                )
        found = PathFile(file, None, tuple(map(int, words)))
    if not found.values:
        what = found.kind or "the line"
        raise PathError(f"{file}: {what} is empty; at least one layer must be executed")
    return found
