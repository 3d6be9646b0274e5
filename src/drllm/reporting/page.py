"""The page of a report: its Markdown as HTML, rendered by markdown-it-py, with drawings.

`templates/` has the frame of the page, which folds sections, and the style, which makes tiles of
the table of key figures, and cards of a table's rows in a narrow window.
"""

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token

from drllm.errors import printable
from drllm.reporting.document import Block, Document, Figure
from drllm.reporting.drawing import NARROW, WIDE, draw_svg
from drllm.reporting.markdown import TILE_HEADER, Markdown
from drllm.reporting.numbers import NONE

LONG_WORD = 40  # letters; longer words, such as hashes, may be broken anywhere


def to_html(document: Document) -> str:
    """Write the whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    render = partial(_render_blocks, names=document.name_figures())
    template = environment.get_template("report.html.j2")
    return printable(template.render(document=document, render=render))


def _render_blocks(blocks: Iterable[Block], names: Mapping[Figure, str]) -> str:
    parts: list[str] = []
    for block in blocks:
        if isinstance(block, Figure):
            parts.append(_render_figure(block, names[block]))
        else:
            parts.append(_render_markdown(block))
    return "".join(parts)


def _render_figure(figure: Figure, name: str) -> str:
    """Render a figure; a large one is drawn for phones and for desks, and the page shows one."""
    # A screen reader reads the label instead of the single texts inside the drawing.
    label = f'role="img" aria-label="{html.escape(figure.alt)}"'
    narrow = draw_svg(figure.draw, name, NARROW).removeprefix("<svg")
    caption = f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>\n"
    if not figure.is_large:
        return f"<figure><svg {label}{narrow}{caption}"
    wide = draw_svg(figure.draw, f"{name}-wide", WIDE).removeprefix("<svg")
    drawings = f'<svg class="phone" {label}{narrow}<svg class="desk" {label}{wide}'
    return f'<figure class="large">{drawings}{caption}'


def _render_markdown(text: Markdown) -> str:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    _mark_tables(tokens)
    _keep_words_whole(tokens)
    rendered: str = parser.renderer.render(tokens, parser.options, {})
    return rendered


def _mark_tables(tokens: Sequence[Token]) -> None:
    """Mark the table of key figures, and give each cell what the style needs to know of it."""
    names: list[str] = []
    column = 0
    for token, content in itertools.pairwise(tokens):
        if token.type == "table_open":
            table = token
            names = []
        elif token.type == "th_open":
            token.attrSet("scope", "col")
            names.append(_read_text(content))
            if tuple(names) == TILE_HEADER:
                table.attrSet("class", "tiles")
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            if column == 0:
                token.tag = "th"
                token.attrSet("scope", "row")
            else:
                token.attrSet("data-label", names[column])
            _mark_cell(token, _read_text(content))
        elif token.type == "td_close":
            if column == 0:
                token.tag = "th"
            column += 1


def _mark_cell(cell: Token, text: str) -> None:
    """Mark a cell with a missing value, a long word or a verdict."""
    if text == NONE:
        cell.attrSet("data-none", "")
    if any(len(word) > LONG_WORD for word in text.split()):
        cell.attrSet("data-long", "")
    if text in ("better", "worse"):
        cell.attrSet("class", text)


def _read_text(content: Token) -> str:
    return "".join(child.content for child in content.children or [])


def _keep_words_whole(tokens: Iterable[Token]) -> None:
    """Let lines of a command end only between words, and not within a flag such as `--data-dir`."""
    for token in tokens:
        for child in token.children or []:
            if child.type == "code_inline":
                words = html.escape(child.content).split()
                spans = [f"<span>{word}</span>" for word in words]
                child.type = "html_inline"
                child.content = f"<code>{' '.join(spans)}</code>"
