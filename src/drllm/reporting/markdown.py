"""A report as Markdown: headings, sentences and tables.

Owns the rendering and the escaping. Figures stay in the HTML; their captions say so.
Axes: L layers.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from drllm.paths import num_executions, sketch
from drllm.reporting.blocks import (
    Block,
    Code,
    Columns,
    Document,
    Figure,
    HeatMap,
    Listing,
    PathKey,
    Question,
    Section,
    Table,
    Text,
)
from drllm.reporting.numbers import percent


def render(document: Document) -> str:
    """Return the whole report."""
    parts = [f"# {escape(document.title)}"]
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join(parts) + "\n"


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


def _section(section: Section) -> list[str]:
    heading = "#" * section.level + " " + escape(section.title)
    return [heading, *(_block(block) for block in section.blocks)]


def _block(block: Block) -> str:
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
        case Figure(caption=caption):
            return f"*Figure, in the HTML report:* {escape(caption)}"
        case Question():
            return _question(block)
        case PathKey():
            return "One character a layer: `█` executed once, `·` skipped, `2` executed twice."
        case Columns(groups):
            return "\n\n".join(_block(inner) for group in groups for inner in group)
        case Code(title, text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{_line(title)}\n\n{fence}\n{text.rstrip()}\n{fence}"


def _table(table: Table) -> str:
    rule = ["---" if column in table.texts else "---:" for column in range(len(table.header))]
    rows: list[Sequence[str]] = [table.header, *table.rows]
    lines = ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return f"*{escape(table.caption)}*\n\n" + "\n".join(lines)


def _question(example: Question) -> str:
    lines = [f"*{escape(example.kind)}* ({escape(example.id)}): {escape(example.question)}", ""]
    for number, choice in enumerate(example.choices):
        mark = " (right)" if number == example.gold else ""
        lines.append(f"- {_line(choice)}{mark}")
    cost = f"{num_executions(example.route)} of {len(example.route)} executions"
    lines += ["", f"`{sketch(example.route)}` {cost}. {escape(example.verdicts)}"]
    return "\n".join(lines)
