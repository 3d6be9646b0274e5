"""A report: sections of Markdown and figures, in order."""

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias
from urllib.parse import quote

import msgspec

from drllm.errors import printable
from drllm.records.markdown import NBSP, escape
from drllm.reporting.drawing import Draw
from drllm.reporting.markdown import Markdown, write_caption, write_paragraph


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A drawing with its name, its caption, and a text for readers who can't see it (`alt`).

    A large figure takes the page's width, and is drawn a second time for phones.
    """

    draw: Draw
    name: str
    alt: str
    caption: str
    is_large: bool = False


Block: TypeAlias = Markdown | Figure
"""Any part of a section."""


class Section(msgspec.Struct, frozen=True):
    """A heading with its blocks.

    `level` is 2, 3 or 4. On the page, a folded section shows only its title until it is opened.
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
        first: The blocks at the top, before the sections; there are no figures.
        sections: The sections in order.
    """

    title: str
    about: str
    first: Sequence[Markdown]
    sections: Sequence[Section]

    def name_figures(self) -> dict[Figure, str]:
        """Return the figures in order, each with a unique name for its file."""
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


def to_markdown(document: Document, folder: str) -> str:
    """Write the whole report as Markdown; its figures are the files `FOLDER/NAME.png`."""
    names = document.name_figures()
    parts = [f"# {escape(document.title)}", write_paragraph(document.about), *document.first]
    for section in document.sections:
        parts.append(f"{'#' * section.level} {escape(section.title)}")
        for block in section.blocks:
            if isinstance(block, Figure):
                parts.append(_write_figure(block, f"{folder}/{names[block]}.png"))
            else:
                parts.append(block)
    text = "\n\n".join(part for part in parts if part)
    return printable(text.replace(NBSP, " ")) + "\n"


def _write_figure(figure: Figure, file: str) -> str:
    picture = f"![{escape(figure.alt)}]({quote(file)})"
    return f"{picture}\n\n{write_caption(figure.caption)}"
