"""`drllm tune`, `drllm heal` and `drllm menu`, and how what they write is printed."""

from pathlib import Path

from drllm.cli.parser import Flag, Request, verb
from drllm.cli.terminal import Terminal
from drllm.config import HealConfig, MenuConfig, ModelConfig, TuneConfig
from drllm.records.codec import read_json
from drllm.records.healed import HEALED_FILE, read_healed
from drllm.records.menu import MenuFile
from drllm.records.places import check_folder
from drllm.records.static_paths import (
    FIT,
    MENU_FILE,
    PATHS_FILE,
    read_path,
    read_path_list,
    read_paths,
)
from drllm.reporting import tuned
from drllm.reporting.numbers import plain, signed
from drllm.tuning.heal_texts import sources_of
from drllm.tuning.parts import parts_of_tasks


@verb(
    "tune",
    example="drllm tune --tasks builtin_facts --output-dir tuned/",
    settings=(ModelConfig, TuneConfig),
    flags=(Flag("output_dir", "folder for paths.json", default="tuned/", value="DIR"),),
    resumes=True,
)
def tune_verb(request: Request, terminal: Terminal) -> None:
    """Find one path for a whole task: fewer layers, answers as good."""
    config, output = request.of(TuneConfig), request.path("output_dir")
    check_folder(output, "--output-dir")
    for divided in parts_of_tasks(config):
        limit = {FIT: None}  # drawn already, by --num-fit
        parts = ", ".join(
            f"{len(found[: limit.get(part, config.num_judged)])} to {part}"
            for part, found in divided.examples.items()
        )
        terminal.say(f"questions of {divided.task.name}: {parts}")
    from drllm.tuning.run import tune

    tune(request.of(ModelConfig), None, config, output, listener=terminal)
    show_paths(output / PATHS_FILE, terminal)


@verb(
    "heal",
    example="drllm heal --path tuned/paths.json:skip2 --tasks builtin_facts --output-dir healed/",
    settings=(ModelConfig, HealConfig),
    flags=(Flag("output_dir", "folder for the healed path", default="healed/", value="DIR"),),
    model_from="a paths.json names",
    resumes=True,
)
def heal_verb(request: Request, terminal: Terminal) -> None:
    """Train an adapter that makes up for the layers that a path leaves out."""
    config, output = request.of(HealConfig), request.path("output_dir")
    check_folder(output, "--output-dir")
    plan = read_path(config.named_path())
    sources_of(config)  # so that a mistake is told before anything is loaded
    from drllm.cli.stages import model_of  # which prints with what is here
    from drllm.tuning.heal import heal

    model = model_of(request, path=plan)
    heal(model, config=config, output_dir=output, listener=terminal)
    show_healed(output / HEALED_FILE, terminal)


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


@verb(
    "menu",
    example="drllm menu --paths tuned/paths.json --executions 27 --output-dir menu/",
    settings=(ModelConfig, MenuConfig),
    flags=(Flag("output_dir", "folder for the menu", default="menu/", value="DIR"),),
    model_from="a paths.json names",
    resumes=True,
)
def menu_verb(request: Request, terminal: Terminal) -> None:
    """Make a menu of paths, of which each prompt runs the one that suits its kind."""
    config, output = request.of(MenuConfig), request.path("output_dir")
    check_folder(output, "--output-dir")
    given = read_path_list(config.paths or "").values()
    from drllm.cli.stages import model_of  # which imports what shows a menu
    from drllm.tuning.menu import make_menu

    model = model_of(request, path=next((path for path in given if path.record), None))
    make_menu(model, None, config, output, listener=terminal)
    show_menu(output / MENU_FILE, terminal)


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
        terminal.fact(task, f"{mean} executions; on fit {found.best_for(task)} is best")
    price = f"{found.price:g} nats for all {found.num_layers} layers"
    terminal.fact("menu", f"{file.parent}, read at layer {found.reads_at}, price {price}")
