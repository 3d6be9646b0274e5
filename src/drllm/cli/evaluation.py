"""The verbs `drllm evaluate` and `drllm report`: compare systems on tasks, and write the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli.base_model import check_model_name, choose_model, read_routers
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS, print_splits
from drllm.cli.show_results import show_next_steps, show_tasks
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import EvaluateConfig, ModelConfig
from drllm.evaluation.questions import check_output, select_tasks, without_routers
from drllm.models.routers.places import check_place
from drllm.records.places import check_folder
from drllm.records.static_paths import PathFile, read_path_list

if TYPE_CHECKING:
    from drllm.models.routers.stack import RouterStack


@verb(
    "evaluate",
    example="drllm evaluate --routers checkpoints/first --paths paths.json --tasks builtin_facts",
    settings=(ModelConfig, EvaluateConfig),
    flags=(
        Flag(
            "routers",
            "routers: a folder or a hub id; further folders are routers of other seeds",
            many=True,
            placeholder="DIR",
        ),
        COLUMNS,
        Flag("output_dir", "folder for the results", default="eval/", placeholder="DIR"),
    ),
    model_from="the model that the routers or the paths.json name",
    resumes=True,
)
def evaluate_verb(command: CommandLine, terminal: Terminal) -> int:
    """Compare the base model, routers, baselines and static paths on tasks."""
    check_model_name(command)
    config = command.get_settings(EvaluateConfig)
    output = command.path("output_dir")
    places = command.paths("routers")
    if not places:
        config = without_routers(config)
    for place in places:
        check_place(place)
    with terminal.busy("reading the questions"):
        tasks = select_tasks(config)
    paths = _read_paths(config)
    check_folder(output, "--output-dir")
    check_output(output)
    print_splits(tasks, terminal)
    with terminal.busy("reading the routers"):
        folders, first_routers = _read_all_routers(places)
    path_with_model = None
    if first_routers is None:
        path_with_model = next((path for path in paths if path.record), None)
    model = choose_model(command, first_routers, path_with_model)
    with terminal.busy(LOADING):
        from drllm.evaluation.stage import evaluate
    results = evaluate(model, tasks, config, output, routers=folders, listener=terminal)
    show_tasks(output, terminal, [task.name for task in tasks])
    terminal.fact("results", output)
    drop_test = results[0].drop_test
    if drop_test is None:
        return 0
    terminal.say(drop_test.sentence())
    return 0 if drop_test.chosen else 1


def _read_paths(config: EvaluateConfig) -> list[PathFile]:
    """Read the static paths of `--paths`; with `--max-drop`, they must be named one by one."""
    needs_names = config.max_drop is not None
    paths = read_path_list(config.paths or "", needs_names=needs_names)
    return list(paths.values())


def _read_all_routers(places: Sequence[Path]) -> tuple[list[Path], RouterStack | None]:
    """Read the routers of every seed, so that a mistake is found before a model is loaded.

    Returns their local folders, and the first seed's routers; None if there are no routers.
    """
    folders: list[Path] = []
    first_routers: RouterStack | None = None
    for place in places:
        folder, routers = read_routers(place)
        folders.append(folder)
        if first_routers is None:
            first_routers = routers
    return folders, first_routers


@verb(
    "report",
    example="drllm report runs/demo",
    flags=(
        Flag(
            "run_dir",
            "folders written by 'drllm run'; several are compared",
            many=True,
            required=True,
            positional=True,
        ),
        Flag(
            "output_dir",
            "folder or .html file to write; default: the run folder",
            placeholder="PLACE",
            alias="output",
        ),
    ),
)
def report(command: CommandLine, terminal: Terminal) -> None:
    """Write report.html and report.md about a run."""
    from drllm.reporting import stage

    place = command.optional_path("output_dir")
    folders = command.paths("run_dir")
    files = stage.report(*folders, output_dir=place, listener=terminal)
    terminal.fact("report", ", ".join(map(str, files)))
    if len(folders) == 1:
        show_next_steps(folders[0], terminal)
