"""What a report consists of, before it is HTML or Markdown: plain values with plain text.

Texts are never markup: the templates escape all of them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from drllm.reporting.drawing import Draw
from drllm.reporting.numbers import NONE


class Listing(msgspec.Struct, frozen=True):
    """Lines in order; `codes` says what to type at each, and numbers them."""

    lines: Sequence[str]
    codes: Sequence[str] = ()


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
    def made(
        cls,
        caption: str,
        names: str,
        rows: Sequence[Sequence[str]],
        words: str = "",
        bold: str = "",
    ) -> "Table":
        """Make a table of rows, with the columns' names between bars; `words` are names too.

        Columns that say the same of several rows are said once instead, and those that say nothing
        are left out.
        """
        header, wordy = names.split("|"), words.split("|")
        columns = [set(column) for column in zip(*rows, strict=True)] or [set[str]()] * len(header)
        alike = [len(column) == 1 and len(rows) > 1 for column in columns]
        told = [column != {NONE} for column in columns]
        kept = [i for i in range(len(header)) if not i or (told[i] and not alike[i])]
        same = [f"{header[i]} {rows[0][i]}" for i in range(1, len(header)) if alike[i] and told[i]]
        return cls(
            caption=caption,
            header=[header[i] for i in kept],
            rows=[[row[i] for i in kept] for row in rows],
            words=[place for place, i in enumerate(kept) if not i or header[i] in wordy],
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


Block: TypeAlias = str | Listing | Verdicts | Tiles | Table | Figure  # a text is a paragraph


class Section(msgspec.Struct, frozen=True):
    """A heading with its blocks, then what a template of that name makes of the values.

    `level` is 2, 3 or 4. A folded one is shown on request.
    """

    title: str
    blocks: Sequence[Block] = ()
    level: int = 2
    folded: bool = False
    template: str = ""
    values: Mapping[str, Any] = {}


class Document(msgspec.Struct, frozen=True):
    """A whole report: title, what it is about, what it says first, and its sections."""

    title: str
    about: str
    first: Sequence[Block]
    sections: Sequence[Section]

    def figures(self) -> dict[Figure, str]:
        """Return the drawings in their order, each with a name of its own that files can have."""
        found: dict[Figure, str] = {}
        for figure in (block for section in self.sections for block in section.blocks):
            if isinstance(figure, Figure):
                words = re.sub(r"[^a-z0-9]+", "-", figure.name.lower()).strip("-")
                found[figure] = f"{len(found) + 1:02d}-{words}"
        return found


def lowered(sections: Iterable[Section]) -> list[Section]:
    """Return sections one level down."""
    return [msgspec.structs.replace(each, level=each.level + 1) for each in sections]
