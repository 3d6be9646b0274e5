"""A report as one HTML page that needs nothing else: styles and drawings are inside it.

Every text is escaped; colours and layout are in `style.css`, which is copied into the page.
Axes: L layers.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import resources

from drllm.errors import printable
from drllm.paths import Decision, Decisions, sketch
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
from drllm.reporting.drawing import svg

STRONGEST = 0.6
"""Opacity of the strongest colour of a heat map; beyond that the values on it are hard to read."""

KEY = (
    '<ul class="key"><li><span class="execute"></span>layer executed once</li>'
    '<li><span class="skip"></span>skipped</li>'
    '<li><span class="repeat"></span>executed twice</li></ul>'
)
"""What the cells of a drawn route mean."""


def render(document: Document) -> str:
    """Return the whole page."""
    style = resources.files("drllm.reporting").joinpath("style.css").read_text(encoding="utf-8")
    title = html.escape(document.title)
    names = document.figures()
    body = "\n".join(_section(section, names) for section in document.sections)
    return printable(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section, names: Mapping[Figure, str]) -> str:
    blocks = "\n".join(_block(block, names) for block in section.blocks)
    heading = f"<h{section.level}>{html.escape(section.title)}</h{section.level}>"
    return f"<section>\n{heading}\n{blocks}\n</section>"


def _block(block: Block, names: Mapping[Figure, str]) -> str:
    match block:
        case Text(text, strong):
            return f"<p{' class=strong' if strong else ''}>{html.escape(text)}</p>"
        case Listing(lines):
            items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
            return f"<ul>{items}</ul>"
        case Table():
            return _table(block)
        case HeatMap():
            return _heat_map(block)
        case Figure(draw=draw, alt=alt, caption=caption):
            # The label belongs to the drawing; the texts inside it are then not read one by one.
            drawn = svg(draw, names[block]).replace(
                "<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1
            )
            return f"<figure>{drawn}<figcaption>{html.escape(caption)}</figcaption></figure>"
        case Route(decisions):
            return _path(decisions)
        case Code(title, text):
            return (
                f"<details><summary>{html.escape(title)}</summary>"
                f"<pre>{html.escape(text)}</pre></details>"
            )
        case PathKey():
            return KEY
        case Columns(groups):
            columns = "".join(f"<div>{_blocks(group, names)}</div>" for group in groups)
            return f'<div class="columns">{columns}</div>'
        case Folded(title, blocks):
            return (
                f"<details><summary>{html.escape(title)}</summary>{_blocks(blocks, names)}"
                f"</details>"
            )


def _blocks(blocks: Sequence[Block], names: Mapping[Figure, str]) -> str:
    return "".join(_block(block, names) for block in blocks)


def _scroll(label: str, content: str) -> str:
    """Let wide content scroll by itself; reachable by keyboard, hence with a name."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def _table(table: Table) -> str:
    caption = html.escape(table.caption)
    words = [_class(table, column) for column in range(len(table.header))]
    header = "".join(
        f'<th scope="col"{word}>{html.escape(name)}</th>'
        for name, word in zip(table.header, words, strict=True)
    )
    rows = "".join(f"<tr>{_row(table, row, words)}</tr>" for row in table.rows)
    content = _scroll(
        caption, f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
    )
    if table.folded:
        return f"<details><summary>{caption}</summary>{content}</details>"
    return f'<p class="caption">{caption}</p>{content}'


def _class(table: Table, column: int) -> str:
    kinds = (("words", table.texts), ("route", table.routes))
    names = " ".join(name for name, columns in kinds if column in columns)
    return f' class="{names}"' if names else ""


def _row(table: Table, row: Sequence[str], words: Sequence[str]) -> str:
    cells = [
        _strip(cell) if column in table.routes else html.escape(cell)
        for column, cell in enumerate(row)
    ]
    first = f'<th scope="row"{words[0]}>{cells[0]}</th>'
    return first + "".join(
        f"<td{word}>{cell}</td>" for cell, word in zip(cells[1:], words[1:], strict=True)
    )


def _strip(drawn: str) -> str:
    """Draw a route small, one mark a layer."""
    marks = {sketch([value]): value.name.lower() for value in Decision}
    cells = "".join(f'<span class="{marks[mark]}"></span>' for mark in drawn)
    return f'<span class="strip" role="img" aria-label="Route: {html.escape(drawn)}">{cells}</span>'


def _heat_map(heat: HeatMap) -> str:
    layers = range(len(heat.rows[0][1]))
    header = "".join(f'<th scope="col">{layer}</th>' for layer in layers)
    rows = []
    for name, values in heat.rows:
        largest = max(values) or 1.0
        cells = "".join(
            f'<td class="{heat.decision or name}" style="--a:{STRONGEST * value / largest:.3f}" '
            f'title="layer {layer}: {heat.decision or name} {100 * value:.1f} %">'
            f"{_whole_percent(value)}</td>"
            for layer, value in enumerate(values)
        )
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    caption = html.escape(heat.caption)
    table = (
        f'<table class="heat"><thead><tr><th scope="col">layer</th>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return f'<p class="caption">{caption}</p>{_scroll(caption, table)}'


def _whole_percent(share: float) -> str:
    """Write a share in few characters, so that none and hardly any look different."""
    if share == 0:
        return ""
    return "&lt;1" if share < 0.005 else f"{100 * share:.0f}"


def _path(route: Decisions) -> str:
    names = {value.value: value.name.lower() for value in Decision}
    cells = "".join(
        f'<li class="{names[value]}" title="layer {layer}: {names[value]}">{layer}</li>'
        for layer, value in enumerate(route)
    )
    special = [f"{names[value]}s layer {layer}" for layer, value in enumerate(route) if value != 1]
    label = ", ".join(special) or "executes every layer once"
    return f'<ol class="path" role="img" aria-label="Route: {label}">{cells}</ol>'
