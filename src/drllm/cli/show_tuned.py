"""Static paths, a healed one and a menu as people read them. Loads no torch."""

from pathlib import Path

from drllm.cli.terminal import Terminal
from drllm.records.codec import read_json
from drllm.records.healed import read_healed
from drllm.records.menu import MenuFile
from drllm.records.static_paths import read_paths
from drllm.reporting import tuned
from drllm.reporting.numbers import plain, signed


def show_paths(file: Path, terminal: Terminal) -> None:
    """Print the paths of a `paths.json`, task by task, and what is certified."""
    found = read_paths(file)
    for task in found.tasks:
        rows = tuned.rows(found, task)
        terminal.table(tuned.COLUMNS, rows, f"{task}, objective {found.objective[task]}", 1)
        if said := tuned.lost(found, task):
            terminal.say(said)
    if found.division:
        terminal.say(found.division)
    for path in found.paths[1:]:
        terminal.fact(path.name, tuned.in_words(found, path))
    for sentence in found.choice.sentences() if found.choice else ():
        terminal.say(sentence)
    terminal.fact("paths", file)


def show_healed(file: Path, terminal: Terminal) -> None:
    """Print a healed path: its losses by source, and how it was trained."""
    found = read_healed(file)
    terminal.table(tuned.LOSSES, tuned.losses(found), tuned.LOSSES_ARE, 1)
    terminal.say(tuned.healing(found))
    terminal.fact(found.name, found.path.with_adapter("").edits(found.num_layers))
    terminal.fact("adapter", f"rank {found.rank}, from layer {found.first_layer} on")
    terminal.fact("healed path", file.parent)


def show_menu(file: Path, terminal: Terminal) -> None:
    """Print what the paths of a menu are worth to each task, and which it chooses how often."""
    found = read_json(file, MenuFile)
    rows = []
    for name, cost in found.executions.items():
        both = [(found.select[task][name], found.chosen[task][name]) for task in found.tasks]
        told = [f"{signed(change)}, {100 * share:.0f} %" for change, share in both]
        rows.append([name, plain(cost, 0), *told])
    title = "on select: the objective's change from full, and how often the path is chosen"
    terminal.table("|".join(["path", "layers", *found.tasks]), rows, title, 1)
    for task, shares in found.chosen.items():
        mean = plain(sum(share * found.executions[name] for name, share in shares.items()), 2)
        terminal.fact(task, f"{mean} executions; {found.best_for(task)} is best")
    price = f"{found.price:g} nats for all {found.num_layers} layers"
    terminal.fact("menu", f"{file.parent}, read at layer {found.reads_at}, price {price}")
