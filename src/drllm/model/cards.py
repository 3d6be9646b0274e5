"""Cards of models and data sets: metadata for the hub, then a body from a template."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CardData, ModelCard, ModelCardData

from drllm.errors import printable
from drllm.model.aliases import ALIASES
from drllm.records.markdown import escape

CARD_FILE = "README.md"


def name_base_model(metadata: ModelCardData, name: str, relation: str, *, is_on_hub: bool) -> None:
    """Say in a card's metadata which model of the hub something was made from.

    The licence is known, and named, where drllm itself has given the model its name.

    Args:
        metadata: The metadata.
        name: The name of the base model: a hub id, a folder, or an alias.
        relation: What was made from it, by the hub's name: `adapter` or `merge`. Without this, the
            hub would list it as a fine-tune of the base model.
        is_on_hub: Whether the name is a hub id.
    """
    if name in ALIASES:
        metadata.base_model = ALIASES[name].hub_id
        metadata.license = ALIASES[name].licence
    elif is_on_hub:
        metadata.base_model = name
    else:
        return
    metadata["base_model_relation"] = relation


def describe_alias(name: str) -> str:
    """Say which weights a name that drllm gave stands for; empty for another name."""
    if name not in ALIASES:
        return ""
    packaged = ALIASES[name]
    return (
        f"`{name}` is drllm's name for `{packaged.hub_id}`, here with the weights of a GGUF file "
        f"in {packaged.quantisation}."
    )


def render_card(template: Path, metadata: CardData, **values: Any) -> str:
    """Render the text of a card: metadata for the hub, then the body.

    Args:
        template: The body, a Jinja template of Markdown. Its filter `line` writes a value among
            other text, and `code` writes it inside a code span or block; nothing in the value
            becomes markup. Its filter `number` writes a number in four digits.
        metadata: What the hub reads: library, base model, tags. It is written as front matter.
        values: The template's variables.
    """
    body = _load_template(template).render(**values)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    return str(card)


@cache
def _load_template(path: Path) -> jinja2.Template:
    """Return a template of Markdown, with the filters `line`, `code` and `number`."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["line"] = _write_line
    environment.filters["code"] = _write_code
    environment.filters["number"] = _write_number
    return environment.from_string(path.read_text(encoding="utf-8"))


def _write_line(value: object) -> str:
    """Write a value among other text of Markdown, where nothing in it becomes markup."""
    return escape(printable(str(value)))


def _write_code(value: object) -> str:
    """Write a value inside a code span or block: on one line, without backticks."""
    return printable(" ".join(str(value).split())).replace("`", "'")


def _write_number(value: float | None) -> str:
    """Write a number in four digits; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.4g}"
