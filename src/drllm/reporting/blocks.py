"""What a report consists of, before it is HTML or Markdown: plain values with plain text.

Texts are never markup: both renderers escape all of them. Axes: L layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec

from drllm.paths import Decisions
from drllm.reporting.drawing import Draw

T = TypeVar("T")


class Text(msgspec.Struct, frozen=True):
    """A paragraph; `strong` for the sentence that the section is about."""

    text: str
    strong: bool = False


class Listing(msgspec.Struct, frozen=True):
    """Lines that belong together, in order."""

    lines: Sequence[str]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of texts; the first cell of each row names the row.

    The columns `texts` hold words (left-aligned), the others numbers; of the words, `routes` hold
    routes as `paths.sketch` draws them. Where the medium can, a `folded` one is shown on request.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[int] = (0,)
    routes: Sequence[int] = ()
    folded: bool = False

    @classmethod
    def of(
        cls,
        caption: str,
        items: Iterable[T],
        columns: Mapping[str, Callable[[T], str]],
        **options: Any,
    ) -> Table:
        """Make a row of each item; each column has a name and says what its cells hold."""
        rows = [row_of(columns, item) for item in items]
        return cls(caption=caption, header=tuple(columns), rows=rows, **options)


def row_of(columns: Mapping[str, Callable[..., str]], *about: Any) -> list[str]:
    """Return what each column's cell says of something."""
    return [cell(*about) for cell in columns.values()]


class HeatMap(msgspec.Struct, frozen=True, kw_only=True):
    """Shares by layer, coloured on a scale of its own for each row: a name with `[L]` in [0, 1].

    `decision` says whose shares all rows are; None where each row is named after its own.
    """

    caption: str
    rows: Sequence[tuple[str, Sequence[float]]]
    decision: str | None = None


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A drawing, with words for a file's name, and for a reader who can't see it (`alt`)."""

    draw: Draw
    name: str
    alt: str
    caption: str


class Route(msgspec.Struct, frozen=True):
    """A route, drawn layer by layer."""

    decisions: Decisions


class Code(msgspec.Struct, frozen=True):
    """A text to be shown as it is, such as a settings file."""

    title: str
    text: str


class PathKey(msgspec.Struct, frozen=True):
    """What the marks in drawn routes mean."""


class Columns(msgspec.Struct, frozen=True):
    """Groups of blocks that stand side by side where there is room, else below each other.

    With a title they are shown on request only, where the medium can.
    """

    groups: Sequence[Sequence[Block]]
    folded: str | None = None


Block: TypeAlias = Text | Listing | Table | HeatMap | Figure | Route | Code | PathKey | Columns


class Section(msgspec.Struct, frozen=True):
    """A heading with its blocks; `level` 2, 3 or 4."""

    title: str
    blocks: Sequence[Block]
    level: int = 2


class Document(msgspec.Struct, frozen=True):
    """A whole report."""

    title: str
    sections: Sequence[Section]

    def figures(self) -> dict[Figure, str]:
        """Return the drawings in their order, each with a name of its own that files can have."""
        found: dict[Figure, str] = {}
        for figure in (each for section in self.sections for each in _figures(section.blocks)):
            words = re.sub(r"[^a-z0-9]+", "-", figure.name.lower()).strip("-")
            found[figure] = f"{len(found) + 1:02d}-{words}"
        return found


def _figures(blocks: Iterable[Block]) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figure):
            yield block
        elif isinstance(block, Columns):
            yield from _figures(inner for group in block.groups for inner in group)
