"""The parts of a report before they become HTML or Markdown: plain values with plain text.

Texts hold no markup. The templates escape all texts.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import msgspec

from drllm.reporting.drawing import Draw
from drllm.reporting.numbers import NONE


class Listing(msgspec.Struct, frozen=True):
    """A list of lines. If there are `codes`, it has numbers, and each line has a command."""

    lines: Sequence[str]
    codes: Sequence[str] = ()


class Verdicts(msgspec.Struct, frozen=True):
    """The findings at the top of a report, as pairs of a task and a line.

    The task is empty in a report on a single task.
    """

    lines: Sequence[tuple[str, str]]


class Tile(msgspec.Struct, frozen=True):
    """One key figure with a note in small print.

    `label` is the key figure's verdict in one or two words, e.g. "better"; empty without a verdict.
    """

    title: str
    value: str
    note: str
    label: str = ""


class Tiles(msgspec.Struct, frozen=True):
    """Tiles side by side."""

    tiles: Sequence[Tile]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of texts; the first cell of each row is the row's name.

    Attributes:
        caption: What the table shows.
        header: The names of the columns.
        rows: The cells of each row.
        word_columns: The indices of the columns that hold words, which are left-aligned. All other
            columns hold numbers, which are right-aligned.
        bold: The name of the row that stands out; empty if none does.
        same: The columns that were left out because every row has the same value there, with this
            value; empty if there are none.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    word_columns: Sequence[int] = (0,)
    bold: str = ""
    same: str = ""

    @classmethod
    def from_rows(
        cls,
        caption: str,
        header: str,
        rows: Sequence[Sequence[str]],
        word_columns: str = "",
        bold: str = "",
    ) -> "Table":
        """Make a table without empty columns.

        If several rows all have the same value in a column, the column is left out and listed in
        `same`.

        Args:
            caption: What the table shows.
            header: The columns' names, with `|` between them.
            rows: The cells of each row; the first cell is the row's name.
            word_columns: Names of the columns that hold words, with `|` between them.
            bold: Name of the row that stands out.
        """
        names = header.split("|")
        shown_columns = [0]
        same: list[str] = []
        for column in range(1, len(names)):
            values = {row[column] for row in rows}
            if values == {NONE}:
                continue
            if len(values) == 1 and len(rows) > 1:
                same.append(f"{names[column]} {rows[0][column]}")
            else:
                shown_columns.append(column)
        shown_names = [names[column] for column in shown_columns]
        shown_rows: list[list[str]] = []
        for row in rows:
            cells = [row[column] for column in shown_columns]
            shown_rows.append(cells)
        word_names = {names[0], *word_columns.split("|")}
        return cls(
            caption=caption,
            header=shown_names,
            rows=shown_rows,
            word_columns=[index for index, name in enumerate(shown_names) if name in word_names],
            bold=bold,
            same="; ".join(same),
        )


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A drawing with its name, its caption, and a text for readers who can't see it (`alt`).

    A large figure takes the page's width, and is drawn a second time for phones.
    """

    draw: Draw
    name: str
    alt: str
    caption: str
    is_large: bool = False


class Code(msgspec.Struct, frozen=True):
    """A text that is shown unchanged, below its title."""

    title: str
    text: str


Block: TypeAlias = str | Listing | Verdicts | Tiles | Table | Figure | Code
"""Any part of a section; a text is a paragraph."""


class Section(msgspec.Struct, frozen=True):
    """A heading with its blocks.

    `level` is 2, 3 or 4. A folded section shows only its title until it is opened.
    """

    title: str
    blocks: Sequence[Block] = ()
    level: int = 2
    folded: bool = False


class Document(msgspec.Struct, frozen=True):
    """A whole report.

    Attributes:
        title: The title.
        about: A line below the title, with the date and the questions; it may be empty.
        first: The blocks at the top, before the sections.
        sections: The sections in order.
    """

    title: str
    about: str
    first: Sequence[Block]
    sections: Sequence[Section]

    def figures(self) -> dict[Figure, str]:
        """Return the figures in order, each with a unique file name."""
        names: dict[Figure, str] = {}
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Figure):
                    slug = re.sub(r"[^a-z0-9]+", "-", block.name.lower()).strip("-")
                    names[block] = f"{len(names) + 1:02d}-{slug}"
        return names


def lower_sections(sections: Iterable[Section]) -> list[Section]:
    """Move the headings of sections one level down."""
    return [msgspec.structs.replace(section, level=section.level + 1) for section in sections]
