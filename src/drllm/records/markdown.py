"""Shows any text in Markdown unchanged: nothing in it becomes markup."""

import html
import re

NBSP = "\u00a0"  # a space at which a line doesn't break


def escape(text: str) -> str:
    """Escape a text so that Markdown shows it unchanged, on one line."""
    line = re.sub(rf"[^\S{NBSP}]+", " ", text).strip()
    escaped = html.escape(line, quote=False)
    escaped = re.sub(r"([\\`*\[\]|~])", r"\\\1", escaped)
    # Between two letters or digits, `_` has no meaning.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", escaped)
