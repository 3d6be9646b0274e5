"""Cards of models and data sets: metadata for the hub, then a body from a template."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CardData, ModelCard

CARD_FILE = "README.md"


def render_card(template: Path, metadata: CardData, **values: Any) -> str:
    """Render the text of a card: metadata for the hub, then the body.

    Args:
        template: The body, a Jinja template of Markdown. Its filter `line` writes a value
            without line breaks and backticks, which would end a code span. Its filter `number`
            writes a number in four digits.
        metadata: What the hub reads: library, base model, tags. It is written as front matter.
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
    """Write a value without line breaks and backticks."""
    return " ".join(str(value).split()).replace("`", "'")


def _write_number(value: float | None) -> str:
    """Write a number in four digits; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.4g}"
