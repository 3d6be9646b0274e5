"""What a report consists of, before it is HTML or Markdown: plain values with plain text.

Texts are never markup: both templates escape all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

import msgspec

from drllm.reporting.drawing import Draw
from drllm.reporting.numbers import NONE

T = TypeVar("T")


class Text(msgspec.Struct, frozen=True):
    """A paragraph."""

    text: str


class Listing(msgspec.Struct, frozen=True):
    """Lines that belong together, in order."""

    lines: Sequence[str]


class Verdicts(msgspec.Struct, frozen=True):
    """What the report says first: the task's name, empty where there is one, and one line."""

    lines: Sequence[tuple[str, str]]


class Tile(msgspec.Struct, frozen=True):
    """One number that counts, with what it means in small print; `shown` is a verdict's label."""

    title: str
    value: str
    note: str
    shown: str = ""


class Tiles(msgspec.Struct, frozen=True):
    """Tiles side by side."""

    tiles: Sequence[Tile]


class Step(msgspec.Struct, frozen=True):
    """Something to do next, with what to type."""

    text: str
    code: str = ""


class Steps(msgspec.Struct, frozen=True):
    """What to do next, in order."""

    steps: Sequence[Step]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of texts; the first cell of each row names the row.

    The columns `words` hold words (left-aligned), the others numbers. The row that `bold` names
    stands out. `same` says what would be the same in every row.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    bold: str = ""
    same: str = ""

    @classmethod
    def of(
        cls,
        caption: str,
        items: Iterable[T],
        columns: Mapping[str, Callable[[T], str]],
        words: Sequence[str] = (),
        bold: str = "",
    ) -> Table:
        """Make a row of each item; each column has a name and says what its cells hold.

        Columns that say the same of several items are said once instead, and those that say
        nothing are left out. Besides the first, the named columns hold words.
        """
        names = list(columns)
        rows = [[cell(item) for cell in columns.values()] for item in items]
        values = {name: {row[place] for row in rows} for place, name in enumerate(names)}
        kept = [
            place
            for place, name in enumerate(names)
            if place == 0 or (len(values[name]) > 1 if len(rows) > 1 else values[name] != {NONE})
        ]
        same = [
            f"{name} {rows[0][place]}"
            for place, name in enumerate(names)
            if len(rows) > 1 and place not in kept and values[name] != {NONE}
        ]
        return cls(
            caption=caption,
            header=[names[place] for place in kept],
            rows=[[row[place] for place in kept] for row in rows],
            words=[n for n, place in enumerate(kept) if not n or names[place] in words],
            bold=bold,
            same="; ".join(same),
        )


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A drawing, with words for a file's name, and for a reader who can't see it (`alt`).

    A large one takes the page's width, and is drawn again for a phone's.
    """

    draw: Draw
    name: str
    alt: str
    caption: str
    is_large: bool = False


class Code(msgspec.Struct, frozen=True):
    """A text to be shown as it is, such as a settings file."""

    title: str
    text: str


Block: TypeAlias = Text | Listing | Verdicts | Tiles | Steps | Table | Figure | Code


class Section(msgspec.Struct, frozen=True):
    """A heading with its blocks; `level` 2, 3 or 4. A folded one is shown on request."""

    title: str
    blocks: Sequence[Block]
    level: int = 2
    folded: bool = False


class Document(msgspec.Struct, frozen=True):
    """A whole report: title, what it is about, what it says first, and its sections."""

    title: str
    about: str
    first: Sequence[Block]
    sections: Sequence[Section]

    def figures(self) -> dict[Figure, str]:
        """Return the drawings in their order, each with a name of its own that files can have."""
        found: dict[Figure, str] = {}
        for figure in self._figures():
            words = re.sub(r"[^a-z0-9]+", "-", figure.name.lower()).strip("-")
            found[figure] = f"{len(found) + 1:02d}-{words}"
        return found

    def _figures(self) -> Iterator[Figure]:
        for blocks in (self.first, *(section.blocks for section in self.sections)):
            yield from (block for block in blocks if isinstance(block, Figure))


def lowered(sections: Iterable[Section]) -> list[Section]:
    """Return sections one level down."""
    return [msgspec.structs.replace(each, level=each.level + 1) for each in sections]
