"""How routers agree with their labels, as people read it, beside decisions that ignore questions.

Owns the tables and sentences of `layers.json`. Leaves reading it to `reporting.agreement` and the
verdict to `supervision.baselines`. Loads no torch.
"""

from __future__ import annotations

from pathlib import Path

from drllm.cli.terminal import Terminal, new_table
from drllm.metrics import by_layer, ratios, shown, verdict
from drllm.reporting.agreement import read_agreement
from drllm.reporting.numbers import plain


def show_agreement(path: Path, terminal: Terminal) -> None:
    """Print how the saved routers stand beside the baselines, on each part, and who is better.

    Args:
        path: `layers.json`.
        terminal: Where to.

    Raises:
        RecordError: The file can't be trusted.
    """
    agreement = read_agreement(path)
    for part, systems in agreement.parts.items():
        title = f"after epoch {agreement.epoch}, on {agreement.title(part)}"
        table = new_table("metric", *map(shown, systems), title=title, numbers_from=1)
        scores = [ratios(counts) for counts in systems.values()]
        for name in scores[0]:
            table.add_row(name, *(plain(each[name], 3) for each in scores))
        terminal.show(table)
    terminal.say(by_layer(agreement.parts[agreement.judged]))
    terminal.say(verdict(agreement.parts))
