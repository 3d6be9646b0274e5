"""The table that every listing of the command line is printed in.

Owns its looks only. Loads no torch.
"""

from __future__ import annotations

from rich import box
from rich.table import Table


def new_table(*columns: str, title: str | None = None, numbers_from: int = 99) -> Table:
    """Return an empty table; its columns from `numbers_from` on are aligned to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        # Narrow terminals break lines; nothing is cut off.
        table.add_column(
            column, justify="right" if place >= numbers_from else "left", overflow="fold"
        )
    return table
