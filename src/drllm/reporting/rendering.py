"""A report as one HTML page with styles and drawings inside it, or as Markdown.

Every text is escaped. Markup, colours and layout are in `templates/`. Figures of the Markdown are
pictures in a folder next to the file; what is folded in the page is open there.
"""

import html
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from drllm.cost import share_saved
from drllm.errors import printable
from drllm.reporting import numbers
from drllm.reporting.blocks import Document, Listing, Section, Table
from drllm.reporting.drawing import NARROW, WIDE, svg

TEMPLATES = Path(__file__).parent / "templates"


def to_html(document: Document) -> str:
    """Return the whole page."""
    names = document.figures()

    def drawn(figure: Any, width: float) -> str:
        name = names[figure] if width == NARROW else f"{names[figure]}-wide"
        return svg(figure.draw, name, width).removeprefix("<svg")

    return _render("report.html.j2", document, autoescape=True, drawn=drawn)


def to_markdown(document: Document, folder: str) -> str:
    """Return the whole report, whose figures lie in a folder: `FOLDER/NAME.png`, by their names."""
    names = document.figures()
    text = _render(
        "report.md.j2",
        document,
        autoescape=False,
        place=lambda figure: quote(f"{folder}/{names[figure]}.png"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache  # it keeps what it compiled
def _environment(autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"md": escape, "line": line, "fenced": fenced}
    return environment


def _render(template: str, document: Document, *, autoescape: bool, **values: Any) -> str:
    environment = _environment(autoescape)
    values |= {"kind_of": lambda block: type(block).__name__, "share_saved": share_saved}
    values |= {"narrow": NARROW, "wide": WIDE, "table": Table.made, "listing": Listing}
    values |= {name: value for name, value in vars(numbers).items() if name[0] != "_"}

    def part(section: Section, **macros: Any) -> str:
        own = environment.get_template(section.template)
        text = own.render(**values, **section.values, **macros)
        return Markup(text) if autoescape else text  # escaped by then

    return printable(
        environment.get_template(template).render(document=document, part=part, **values)
    )


def escape(text: str) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    written = html.escape(" ".join(text.split()), quote=False)
    written = re.sub(r"([\\`*\[\]|~])", r"\\\1", written)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", written)


def line(text: str) -> str:
    """Escape a text that starts a line, where some characters begin a heading or a list."""
    return re.sub(r"^(\d*)([#+\-=.)])(?=\s|[#=]|$)", r"\1\\\2", escape(text))


def fenced(text: str) -> str:
    """Write a text as a block of code, whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
