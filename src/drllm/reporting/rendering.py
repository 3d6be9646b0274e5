"""A report as Markdown, or as one HTML page with styles and drawings inside it.

Every text is escaped. The page's markup is in `page.html.j2`; colours and layout are in
`style.css`. Figures of the Markdown are pictures in a folder next to the file; what is folded in
the HTML is open there.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

import jinja2

from drllm.errors import printable
from drllm.metrics import NAMES
from drllm.paths import Decision, Decisions, sketch
from drllm.reporting import blocks
from drllm.reporting.blocks import Block, Document, Figure, Table
from drllm.reporting.drawing import svg
from drllm.reporting.numbers import percent

STRONGEST = 0.6
"""Opacity of the strongest colour of a heat map; beyond that the values on it are hard to read."""


def to_html(document: Document) -> str:
    """Return the whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    figures = document.figures()
    page = environment.get_template("page.html.j2").render(
        document=document,
        kind_of=lambda block: type(block).__name__,
        drawn=lambda figure: svg(figure.draw, figures[figure]).removeprefix("<svg"),
        in_words=_in_words,
        names=NAMES,
        marks=dict(zip(sketch(tuple(Decision)), NAMES, strict=True)),
        strongest=STRONGEST,
    )
    return printable(page)


def _in_words(route: Decisions) -> str:
    special = [f"{NAMES[value]}s layer {layer}" for layer, value in enumerate(route) if value != 1]
    return ", ".join(special) or "executes every layer once"


def to_markdown(document: Document, folder: str) -> str:
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
