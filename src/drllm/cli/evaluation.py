"""The verbs `drllm evaluate` and `drllm report`: compare systems on tasks, and write the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli.base_model import check_layers, check_model, choose_model, read_routers
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS, print_splits
from drllm.cli.show_results import show_headlines, show_next_steps, show_summary
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import EvaluateConfig, ModelConfig
from drllm.evaluation.questions import check_output
from drllm.evaluation.request import read_request
from drllm.extras import need
from drllm.models.routers.places import check_place
from drllm.records.places import check_folder
from drllm.records.static_paths import NamedPath
from drllm.reporting.run import read_run

if TYPE_CHECKING:
    from drllm.evaluation.inputs import LoadedRouters


@verb(
    "evaluate",
    example="drllm evaluate --routers checkpoints/first --paths without:13 --tasks builtin_facts",
    settings=(ModelConfig, EvaluateConfig),
    flags=(
        Flag(
            "routers",
            "routers: a folder or a hub id; further folders are routers of other seeds",
            many=True,
            placeholder="DIR",
        ),
        COLUMNS,
        Flag(
            "output_dir",
            "folder for the results",
            default="eval/",
            placeholder="DIR",
            alias="output",
        ),
    ),
    model_from="the model that the routers name",
    resumes=True,
)
def evaluate_verb(command: CommandLine, terminal: Terminal) -> int:
    """Compare the base model, routers, baselines and static paths on tasks."""
    config = command.get_settings(EvaluateConfig)
    output = command.path("output_dir")
    places = command.paths("routers")

    check_model(command)
    for place in places:
        check_place(place)
    with terminal.busy("reading the questions"):
        request = read_request(config, has_routers=bool(places))
    check_folder(output, "--output-dir")
    check_output(output)
    print_splits(request.tasks, terminal)
    with terminal.busy("reading the routers"):
        routers = _load_routers(places)
    model = choose_model(command, routers[0].stack if routers else None)
    named = [path for path in request.paths.values() if isinstance(path, NamedPath)]
    check_layers(model, named)
    with terminal.busy(LOADING):
        from drllm.evaluation.stage import evaluate_request

    results = evaluate_request(request, model, routers, output, listener=terminal)

    show_summary(results, output, terminal)
    terminal.fact("results", output)
    show_next_steps(read_run(output), terminal)
    drop_test = results[0].drop_test
    if drop_test is None or drop_test.chosen:
        return 0
    return 1


def _load_routers(places: Sequence[Path]) -> list[LoadedRouters]:
    """Load the routers of every seed from their folders or the hub."""
    if not places:
        return []
    from drllm.evaluation.inputs import LoadedRouters

    loaded: list[LoadedRouters] = []
    for place in places:
        folder, stack = read_routers(place)
        loaded.append(LoadedRouters(stack, folder))
    return loaded


@verb(
    "report",
    example="drllm report runs/demo",
    flags=(
        Flag(
            "run_dir",
            "folders of a run or an evaluation; several are compared",
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
    from drllm.reporting.stage import choose_page, write_report

    need("report", "a report")
    folders = command.paths("run_dir")
    page = choose_page(folders, command.optional_path("output_dir"))
    with terminal.busy("drawing the report"):
        runs = [read_run(folder) for folder in folders]
        files = write_report(runs, page)
    terminal.fact("report", ", ".join(map(str, files)))
    if len(runs) == 1:
        show_headlines(runs[0], terminal)
        show_next_steps(runs[0], terminal)
