"""A sweep over settings as people read it."""

from __future__ import annotations

from pathlib import Path

from drllm.cli.terminal import Terminal, new_table
from drllm.reporting.numbers import NONE, plain, signed
from drllm.reporting.sweeps import read_sweep_file


def show_sweep(path: Path, terminal: Terminal) -> None:
    """Print the settings of a sweep side by side, and which one was chosen.

    Raises:
        RecordError: A file that can't be trusted.
    """
    sweep = read_sweep_file(path)
    split = sweep.chosen_on
    table = new_table(
        "setting",
        "depth",
        "seeds",
        "layers\nrun",
        "accuracy less\nbase's, points",
        "gold log-p.\nless base's",
        "text loss\nless base's",
        title=f"settings on {split}, means over seeds",
        numbers_from=2,
    )
    several = len({place.task for each in sweep.settings for place in each.places}) > 1
    for each in sweep.settings:
        if not each.places:
            table.add_row(each.name, "none reached", *[NONE] * 5, end_section=True)
        for place in each.places:
            found = place.against_base
            table.add_row(
                each.name if place is each.places[0] else "",
                f"{place.task}, {place.depth}" if several else place.depth,
                str(place.num_seeds),
                plain(place.executions, 2),
                signed(100 * found.accuracy.mean, 1),
                signed(found.gold_logprob.mean, 3) if found.gold_logprob else NONE,
                signed(found.text_loss.mean, 3) if found.text_loss else NONE,
                end_section=place is each.places[-1],
            )
    terminal.show(table)
    if sweep.chosen is None:
        terminal.say("No setting's routers can be brought to any of the depths: none is chosen.")
        return
    terminal.say(
        f"Chosen on {split}: {sweep.chosen}, which keeps most of the gold answers' log-probability "
        f"(of accuracy where answers are generated) over all depths; other questions test it once."
    )
