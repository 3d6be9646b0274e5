"""`drllm tune`, and how a `paths.json` is printed."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from drllm.cli.parser import Flag, Request, verb
from drllm.cli.terminal import Terminal
from drllm.config import ModelConfig, TuneConfig
from drllm.records.places import check_folder
from drllm.records.static_paths import PATHS_FILE, Measured, NamedPath, StaticPaths, read_paths
from drllm.reporting.numbers import NONE, difference, percent, plain, signed
from drllm.tuning.parts import FIT, SELECT, TEST, parts_of_tasks

PARTS = (FIT, SELECT, TEST)


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
        parts = ", ".join(f"{len(found)} to {part}" for part, found in divided.examples.items())
        terminal.say(f"questions of {divided.task.name}: {parts}")
    from drllm.tuning.run import tune

    tune(request.of(ModelConfig), None, config, output, listener=terminal)
    show_paths(output / PATHS_FILE, terminal)


def show_paths(file: Path, terminal: Terminal) -> None:
    """Print the paths of a `paths.json`, task by task, and what is certified."""
    found = read_paths(file)
    for task in found.tasks:
        columns = "path|layers|objective: fit|select|test|accuracy|difference from full (95 %)|loss"
        rows = list(_rows(found, task))
        terminal.table(columns, rows, f"{task}, objective {found.objective[task]}", 1)
    for path in found.paths[1:]:
        worse = " (one that saves more does better on select)" if path.dominated else ""
        terminal.fact(path.name, path.path.edits(found.num_layers) + worse)
    for sentence in found.choice.sentences() if found.choice else ():
        terminal.say(sentence)
    terminal.fact("paths", file)


def _rows(found: StaticPaths, task: str) -> Iterator[Sequence[str]]:
    for path in found.paths:
        by_part = [_measured(path, task, part) for part in PARTS]
        tested = by_part[-1]
        against = tested.against_full if tested else None
        yield (
            path.name,
            plain(path.executions, 2).removesuffix(".00"),
            *[NONE if m is None else _objective(m) for m in by_part],
            percent(tested.accuracy if tested else None),
            difference(against.accuracy if against else None),
            plain(tested.text_loss if tested else None, 3),
        )


def _objective(measured: Measured) -> str:
    """Write an objective: the full path's value, what another has more or less."""
    if measured.change is None:
        return plain(measured.objective, 3)
    mean, low, high = measured.change
    return f"{signed(mean, 3)} ({signed(low, 2)} to {signed(high, 2)})"


def _measured(path: NamedPath, task: str, part: str) -> Measured | None:
    ours = (each for each in path.measured if (each.task, each.part) == (task, part))
    return next(ours, None)
