"""A report as one HTML page that needs nothing else: styles and drawings are inside it.

The markup is in `page.html.j2`, which escapes every text; colours and layout are in `style.css`.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from drllm.errors import printable
from drllm.metrics import NAMES
from drllm.paths import Decision, Decisions, sketch
from drllm.reporting.blocks import Document
from drllm.reporting.drawing import svg

STRONGEST = 0.6
"""Opacity of the strongest colour of a heat map; beyond that the values on it are hard to read."""


def render(document: Document) -> str:
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
