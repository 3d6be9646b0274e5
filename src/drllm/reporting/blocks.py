"""What a report consists of, before it is HTML or Markdown: plain values with plain text.

Texts are never markup: both renderers escape all of them. Axes: L layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from drllm.paths import Decisions
from drllm.reporting.drawing import Draw

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `strong` for the sentence that the section is about."""

    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """Lines that belong together, in order."""

    lines: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
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
        rows = [[cell(item) for cell in columns.values()] for item in items]
        return cls(caption=caption, header=tuple(columns), rows=rows, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Shares by layer, coloured on a scale of its own for each row: a name with `[L]` in [0, 1].

    `decision` says whose shares all rows are; None where each row is named after its own.
    """

    caption: str
    rows: Sequence[tuple[str, Sequence[float]]]
    decision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing, with words for a file's name, and for a reader who can't see it (`alt`)."""

    draw: Draw
    name: str
    alt: str
    caption: str


@dataclass(frozen=True, slots=True)
class Route:
    """A route, drawn layer by layer."""

    decisions: Decisions


@dataclass(frozen=True, slots=True)
class Code:
    """A text to be shown as it is, such as a settings file."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class PathKey:
    """What the marks in drawn routes mean."""


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks that are shown on request only, where the medium can."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Columns:
    """Groups of blocks that stand side by side where there is room, else below each other."""

    groups: Sequence[Sequence[Block]]


Block: TypeAlias = (
    Text | Listing | Table | HeatMap | Figure | Route | Code | PathKey | Columns | Folded
)


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its blocks; `level` 2, 3 or 4."""

    title: str
    blocks: Sequence[Block]
    level: int = 2


@dataclass(frozen=True, slots=True)
class Document:
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
        elif isinstance(block, Folded):
            yield from _figures(block.blocks)
