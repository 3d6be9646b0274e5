"""A report as Markdown: headings, sentences and tables, every text escaped.

Figures are pictures in a folder next to the file; what is folded in the HTML is open here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from drllm.errors import printable
from drllm.paths import sketch
from drllm.reporting import blocks
from drllm.reporting.blocks import Block, Document, Figure, Table
from drllm.reporting.numbers import percent


def render(document: Document, folder: str) -> str:
    """Return the whole report, whose figures lie in a folder: `FOLDER/NAME.png`, by their names."""
    parts = [f"# {escape(document.title)}"]
    places = {figure: f"{folder}/{name}.png" for figure, name in document.figures().items()}
    for section in document.sections:
        parts.append("#" * section.level + " " + escape(section.title))
        parts += [_block(block, places) for block in section.blocks]
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


def _block(block: Block, places: Mapping[Figure, str]) -> str:
    match block:
        case blocks.Text(text, strong):
            return f"**{escape(text)}**" if strong else _line(text)
        case blocks.Listing(lines):
            return "\n".join(f"- {_line(line)}" for line in lines)
        case Table():
            return _table(block)
        case blocks.HeatMap(caption=caption, rows=rows):
            names, shares = zip(*rows, strict=True)
            cells = [
                [str(layer), *map(percent, values)]
                for layer, values in enumerate(zip(*shares, strict=True))
            ]
            header = ["layer", *names]
            return _table(Table(caption=caption, header=header, rows=cells, texts=()))
        case Figure(alt=alt, caption=caption):
            return f"![{escape(alt)}]({quote(places[block])})\n\n*Figure:* {escape(caption)}"
        case blocks.Route(decisions):
            return f"`{sketch(decisions)}`"
        case blocks.PathKey():
            return "One character a layer: `█` executed once, `·` skipped, `2` executed twice."
        case blocks.Columns(groups, title):
            inside = [_block(inner, places) for group in groups for inner in group]
            return "\n\n".join([_line(title), *inside] if title else inside)
        case blocks.Code(title, text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{_line(title)}\n\n{fence}\n{text.rstrip()}\n{fence}"


def _table(table: Table) -> str:
    columns = range(len(table.header))
    rule = ("---" if column in table.texts else "---:" for column in columns)
    rows = [
        [f"`{row[i]}`" if i in table.routes else escape(row[i]) for i in columns]
        for row in table.rows
    ]
    lines = [_row(map(escape, table.header)), _row(rule), *map(_row, rows)]
    return f"*{escape(table.caption)}*\n\n" + "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
