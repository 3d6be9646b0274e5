"""The parts of a report, before they are HTML or Markdown: plain values with plain text.

Texts are never markup: the templates escape all of them.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import msgspec

from drllm.reporting.drawing import Draw
from drllm.reporting.numbers import NONE


class Listing(msgspec.Struct, frozen=True):
    """Lines in order; with `codes`, the commands that go with them, they are numbered."""

    lines: Sequence[str]
    codes: Sequence[str] = ()


class Verdicts(msgspec.Struct, frozen=True):
    """The findings that a report begins with: of each its task, empty if it has one, and a line."""

    lines: Sequence[tuple[str, str]]


class Tile(msgspec.Struct, frozen=True):
    """One key figure with its meaning in small print; `shown` is the verdict's label."""

    title: str
    value: str
    note: str
    shown: str = ""


class Tiles(msgspec.Struct, frozen=True):
    """Tiles side by side."""

    tiles: Sequence[Tile]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of texts; the first cell of each row names the row.

    The columns `words` hold words (left-aligned), the others numbers. The row that `bold` names
    stands out. `same` has what would be the same in every row.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    bold: str = ""
    same: str = ""

    @classmethod
    def from_rows(
        cls,
        caption: str,
        header: str,
        rows: Sequence[Sequence[str]],
        words: str = "",
        bold: str = "",
    ) -> "Table":
        """Make a table, leaving out columns that say nothing.

        A column with one value in all of several rows is said once, in `same`.

        Args:
            caption: What the table shows.
            header: The columns' names, with `|` between them.
            rows: Their cells; the first names the row.
            words: Names of the columns that hold words, with `|` between them.
            bold: The row that stands out.
        """
        names = header.split("|")
        shown = [0]
        same: list[str] = []
        for column in range(1, len(names)):
            values = {row[column] for row in rows}
            if values == {NONE}:
                continue
            if len(values) == 1 and len(rows) > 1:
                same.append(f"{names[column]} {rows[0][column]}")
            else:
                shown.append(column)
        wordy = {names[0], *words.split("|")}
        return cls(
            caption=caption,
            header=[names[column] for column in shown],
            rows=[[row[column] for column in shown] for row in rows],
            words=[place for place, column in enumerate(shown) if names[column] in wordy],
            bold=bold,
            same="; ".join(same),
        )


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A drawing with its file's name, its caption, and a text for readers who can't see it (`alt`).

    A large one takes the page's width, and is drawn again for a phone's.
    """

    draw: Draw
    name: str
    alt: str
    caption: str
    is_large: bool = False


class Code(msgspec.Struct, frozen=True):
    """A text that stands as it is, below its title."""

    title: str
    text: str


Block: TypeAlias = str | Listing | Verdicts | Tiles | Table | Figure | Code
"""Any part of a section; a text is a paragraph."""


class Section(msgspec.Struct, frozen=True):
    """A heading with its blocks. `level` is 2, 3 or 4; a folded section is shown on request."""

    title: str
    blocks: Sequence[Block] = ()
    level: int = 2
    folded: bool = False


class Document(msgspec.Struct, frozen=True):
    """A whole report: its title, a line about it, its first blocks, and its sections."""

    title: str
    about: str
    first: Sequence[Block]
    sections: Sequence[Section]

    def figures(self) -> dict[Figure, str]:
        """Return the drawings in their order, each with a name of its own for its file."""
        names: dict[Figure, str] = {}
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Figure):
                    words = re.sub(r"[^a-z0-9]+", "-", block.name.lower()).strip("-")
                    names[block] = f"{len(names) + 1:02d}-{words}"
        return names


def lower_sections(sections: Iterable[Section]) -> list[Section]:
    """Return sections one level down."""
    return [msgspec.structs.replace(section, level=section.level + 1) for section in sections]
