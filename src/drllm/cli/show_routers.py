"""How routers agree with their labels, as people read it."""

from __future__ import annotations

from pathlib import Path

from drllm.cli.terminal import Terminal, new_table
from drllm.metrics import by_layer, ratios, shown, verdict
from drllm.records.layers import read_layers
from drllm.reporting.numbers import plain


def show_agreement(path: Path, terminal: Terminal) -> None:
    """Compare the saved routers with decisions that ignore the question, on each part.

    Raises:
        RecordError: The file can't be trusted.
    """
    layers = read_layers(path)
    for part, systems in layers.parts.items():
        title = f"after epoch {layers.epoch}, on {layers.title(part)}"
        table = new_table("metric", *map(shown, systems), title=title, numbers_from=1)
        scores = [ratios(counts) for counts in systems.values()]
        for name in scores[0]:
            table.add_row(name, *(plain(each[name], 3) for each in scores))
        terminal.show(table)
    terminal.say(by_layer(layers.parts[layers.judged]))
    terminal.say(verdict(layers.parts))
