"""How a user names a static path: a JSON file, or `without:` and the layers to leave out.

Axes: L layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import msgspec

from drllm.errors import PathError
from drllm.paths import StaticPath
from drllm.records.codec import read_json
from drllm.records.gaps import parse_layers, write_layers

WITHOUT = "without:"
LAYERS = re.compile(r"\s*[0-9]+\s*(-\s*[0-9]+\s*)?")
"""A layer or a range of layers, as one item of a list."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class NamedPath:
    """A path as the user named it, before the number of the model's layers is known.

    Attributes:
        place: What the user gave.
        layers: The layers that the path runs, in order; empty if it is named by other layers.
        skipped: The layers that it leaves out, sorted; empty for a file.
    """

    place: str
    layers: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the path in results: that of its file, or the layers that it leaves out."""
        if self.skipped:
            return f"without {write_layers(self.skipped)}"
        return Path(self.place).stem

    def path(self, num_layers: int) -> StaticPath:
        """Return the path for a model of L layers, or raise a PathError if it can't run it."""
        for layer in self.skipped:
            if layer >= num_layers:
                raise PathError(
                    f"{self.place}: the model has no layer {layer}; give layers from 0 to "
                    f"{num_layers - 1}"
                )
        if len(self.skipped) == num_layers:
            raise PathError(f"{self.place}: all layers are left out; leave at least one")
        if self.skipped:
            return StaticPath(layer for layer in range(num_layers) if layer not in self.skipped)
        try:
            return StaticPath(self.layers).check(num_layers)
        except PathError as error:
            raise PathError(f"{self.place}: {error}") from error


def read_path(place: Path | str) -> NamedPath:
    """Read a path: a file with `{"path": [0, 1, 3]}`, or `without:LAYERS`.

    LAYERS are as for `parse_layers`.

    Raises:
        RecordError: The file can't be read.
        PathError: The layers aren't numbers.

    Example:
        >>> read_path("without:2-4,7").path(9)
        StaticPath(layers=(0, 1, 5, 6, 8))
    """
    text = str(place)
    if text.startswith(WITHOUT):
        skipped = parse_layers(text.removeprefix(WITHOUT))
        return NamedPath(text, skipped=tuple(sorted({*skipped})))
    word, colon, layers = text.partition(":")
    if colon and get_close_matches(f"{word}:", [WITHOUT]) and not Path(text).exists():
        raise PathError(f"there is no file {text}; did you mean '{WITHOUT}{layers}'?")
    return NamedPath(text, layers=read_json(Path(text), _File).path)


def read_path_list(places: str | Sequence[str]) -> dict[str, NamedPath]:
    """Read paths by name.

    Args:
        places: Places as for `read_path`: a list, or a text in which commas separate them.

    Raises:
        RecordError: As for `read_path`.
        PathError: As for `read_path`; or two paths have the same name.
    """
    if isinstance(places, str):
        places = split_path_list(places)
    paths: dict[str, NamedPath] = {}
    for place in places:
        path = read_path(place)
        if path.name in paths:
            raise PathError(f"two paths are called {path.name!r}; give each its own name, once")
        paths[path.name] = path
    return paths


def split_path_list(places: str) -> list[str]:
    """Split a list of paths at its commas, except at those between layers to leave out.

    Example:
        >>> split_path_list("first.json,without:13,14,last.json")
        ['first.json', 'without:13,14', 'last.json']
    """
    parts: list[str] = []
    for part in map(str.strip, places.split(",")):
        if parts and parts[-1].startswith(WITHOUT) and LAYERS.fullmatch(part):
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
    return parts
