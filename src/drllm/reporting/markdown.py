"""Writes the parts of a report as Markdown. Whatever a text holds, it is shown and not obeyed."""

import re
from collections.abc import Iterable, Sequence
from typing import NewType

import msgspec

from drllm.records.markdown import escape
from drllm.reporting.numbers import NONE

Markdown = NewType("Markdown", str)
"""A text with markup. mypy refuses a plain text in its place, so that none stays unescaped."""

TILE_HEADER = ("key figure", "value", "verdict", "note")
"""The columns of key figures; the page shows a table with this header as tiles."""


class Tile(msgspec.Struct, frozen=True):
    """One key figure with a note.

    `label` is the key figure's verdict in one or two words, e.g. "better"; empty without a verdict.
    """

    title: str
    value: str
    note: str
    label: str = ""


def write_paragraph(text: str) -> Markdown:
    """Write a paragraph."""
    return Markdown(_escape_line(text))


def write_list(lines: Iterable[str]) -> Markdown:
    """Write a list of lines."""
    return Markdown("\n".join(f"- {_escape_line(line)}" for line in lines))


def write_steps(steps: Iterable[tuple[str, str]]) -> Markdown:
    """Write a list with numbers, of sentences that have a command each."""
    lines: list[str] = []
    for number, (sentence, command) in enumerate(steps, start=1):
        lines.append(f"{number}. {_escape_line(sentence)} {_write_command(command)}")
    return Markdown("\n".join(lines))


def _write_command(command: str) -> str:
    line = command.replace("\n", " ")
    if "`" in line:
        line = f" {line} "  # Markdown removes these spaces
    fence = _make_fence(line, shortest=1)
    return f"{fence}{line}{fence}"


def write_verdicts(verdicts: Iterable[tuple[str, str]]) -> Markdown:
    """Write findings as a quotation; they are pairs of a task, which may be empty, and a text."""
    paragraphs: list[str] = []
    for task, text in verdicts:
        name = f"**{escape(task)}:** " if task else ""
        paragraphs.append(f"> {name}{_escape_line(text)}")
    return Markdown("\n>\n".join(paragraphs))


def write_code(title: str, text: str) -> Markdown:
    """Write a text that is shown unchanged, below its title."""
    fence = _make_fence(text, shortest=3)
    return Markdown(f"{_escape_line(title)}\n\n{fence}\n{text.rstrip()}\n{fence}")


def write_tiles(tiles: Iterable[Tile]) -> Markdown:
    """Write key figures as a table with the header `TILE_HEADER`."""
    rows: list[Sequence[str]] = []
    for tile in tiles:
        value = f"**{escape(tile.value)}**"
        rows.append([escape(tile.title), value, escape(tile.label or NONE), escape(tile.note)])
    return Markdown(_join_rows([TILE_HEADER, ["---"] * len(TILE_HEADER), *rows]))


def write_table(
    caption: str,
    header: str,
    rows: Sequence[Sequence[str]],
    word_columns: str = "",
    bold: str = "",
) -> Markdown:
    """Write a table without empty columns, below its caption.

    If several rows all have the same value in a column, the caption says so instead of the column.
    If they have the same values in all columns, the caption is all there is.

    Args:
        caption: What the table shows.
        header: The columns' names, with `|` between them.
        rows: The cells of each row; the first cell is the row's name.
        word_columns: Names of the columns that hold words, with `|` between them. They and the
            first column are left-aligned. All other columns hold numbers and are right-aligned.
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
    if same:
        caption = f"{caption} The same in every row: {'; '.join(same)}."
    if same and len(shown_columns) == 1:
        return write_caption(caption)
    word_names = {names[0], *word_columns.split("|")}
    header_cells = [escape(names[column]) for column in shown_columns]
    alignment = ["---" if names[column] in word_names else "---:" for column in shown_columns]
    lines = [header_cells, alignment]
    for row in rows:
        mark = "**" if bold and row[0] == bold else ""
        lines.append([f"{mark}{escape(row[column])}{mark}" for column in shown_columns])
    return Markdown(f"{write_caption(caption)}\n\n{_join_rows(lines)}")


def write_caption(text: str) -> Markdown:
    """Write the caption of a table or a figure."""
    return Markdown(f"*{escape(text)}*")


def _escape_line(text: str) -> str:
    """Escape a text at the start of a line, where some characters begin a heading or a list."""
    return re.sub(r"^(\d*)([#+\-=.)])(?=\s|[#=-]|$)", r"\1\\\2", escape(text))


def _make_fence(text: str, shortest: int) -> str:
    """Return backticks to put around a text; they are more than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)


def _join_rows(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
