"""Model cards: the hub's metadata above a body that a template fills in."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

CARD_FILE = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""The form of a hub id, OWNER/NAME. Only such a name is given to the hub as a base model."""


def render_card(template: Path, metadata: ModelCardData, **values: Any) -> str:
    """Return the text of a model card.

    Args:
        template: The body, a Jinja template of Markdown. It has two filters: `line` writes a value
            as text that ends neither its line nor its code span, `number` a number in four digits.
        metadata: What the hub reads: library, base model, tags. It becomes the front matter.
        values: The template's variables.
    """
    body = _load_template(template).render(**values)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    return str(card)


@cache
def _load_template(path: Path) -> jinja2.Template:
    """Return a template of Markdown, with the filters `line` and `number`."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["line"] = _write_line
    environment.filters["number"] = _write_number
    return environment.from_string(path.read_text(encoding="utf-8"))


def _write_line(value: object) -> str:
    return " ".join(str(value).split()).replace("`", "'")


def _write_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
