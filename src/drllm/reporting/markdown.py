"""A report as Markdown: headings, sentences and tables, every text escaped.

Figures are pictures in a folder next to the file; what is folded in the HTML is open here.
Axes: L layers.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from drllm.errors import printable
from drllm.paths import sketch
from drllm.reporting.blocks import (
    Block,
    Code,
    Columns,
    Document,
    Figure,
    Folded,
    HeatMap,
    Listing,
    PathKey,
    Route,
    Section,
    Table,
    Text,
)
from drllm.reporting.numbers import percent


def render(document: Document, folder: str) -> str:
    """Return the whole report.

    Args:
        document: What it says.
        folder: Of the figures, as seen from the file: `NAME.png` for each of `document.figures()`.
    """
    parts = [f"# {escape(document.title)}"]
    places = {figure: f"{folder}/{name}.png" for figure, name in document.figures().items()}
    for section in document.sections:
        parts += _section(section, places)
    return printable("\n\n".join(parts) + "\n")


def escape(text: str) -> str:
    r"""Write a text so that Markdown shows it as it is, on one line.

    Example:
        >>> escape("a|b <i>arc_easy</i>")
        'a\\|b &lt;i&gt;arc_easy&lt;/i&gt;'
    """
    line = html.escape(" ".join(text.split()), quote=False)
    line = re.sub(r"([\\`*\[\]|~])", r"\\\1", line)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", line)


def _line(text: str) -> str:
    """Escape a text that starts a line, where some characters begin a heading or a list."""
    return re.sub(r"^(\d*)([#+\-=.)])(?=\s|[#=]|$)", r"\1\\\2", escape(text))


def _section(section: Section, places: Mapping[Figure, str]) -> list[str]:
    heading = "#" * section.level + " " + escape(section.title)
    return [heading, *(_block(block, places) for block in section.blocks)]


def _block(block: Block, places: Mapping[Figure, str]) -> str:
    match block:
        case Text(text, strong):
            return f"**{escape(text)}**" if strong else _line(text)
        case Listing(lines):
            return "\n".join(f"- {_line(line)}" for line in lines)
        case Table():
            return _table(block)
        case HeatMap(caption=caption, rows=rows):
            header = ["layer", *(name for name, _ in rows)]
            layers = range(len(rows[0][1]))
            cells = [[str(i), *(percent(shares[i]) for _, shares in rows)] for i in layers]
            return _table(Table(caption=caption, header=header, rows=cells, texts=()))
        case Figure(alt=alt, caption=caption):
            place = quote(places[block])
            return f"![{escape(alt)}]({place})\n\n*Figure:* {escape(caption)}"
        case Route(decisions):
            return f"`{sketch(decisions)}`"
        case PathKey():
            return "One character a layer: `█` executed once, `·` skipped, `2` executed twice."
        case Columns(groups):
            return "\n\n".join(_block(inner, places) for group in groups for inner in group)
        case Folded(title, blocks):
            inside = [_block(inner, places) for inner in blocks]
            return "\n\n".join([_line(title), *inside])
        case Code(title, text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{_line(title)}\n\n{fence}\n{text.rstrip()}\n{fence}"


def _table(table: Table) -> str:
    rule = ["---" if column in table.texts else "---:" for column in range(len(table.header))]
    rows = [[escape(cell) for cell in table.header], *(_cells(table, row) for row in table.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return f"*{escape(table.caption)}*\n\n" + "\n".join(lines)


def _cells(table: Table, row: Sequence[str]) -> list[str]:
    return [
        f"`{cell}`" if column in table.routes else escape(cell) for column, cell in enumerate(row)
    ]
