"""`drllm tune`, and how a `paths.json` is printed."""

from pathlib import Path

from drllm.cli.parser import Flag, Request, verb
from drllm.cli.terminal import Terminal
from drllm.config import ModelConfig, TuneConfig
from drllm.records.places import check_folder
from drllm.records.static_paths import FIT, PATHS_FILE, read_paths
from drllm.reporting import tuned
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
