"""The verbs of the stages, such as `drllm search`, and the verbs `report` and `export`.

Each verb checks its flags and files, runs the stage, and prints the results. Wrong names, numbers,
input files and output folders are refused before the base model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli import published
from drllm.cli.base_model import check_model_name, choose_model, read_routers
from drllm.cli.command_line import CommandLine
from drllm.cli.show import show
from drllm.cli.show_paths import show_healed, show_paths
from drllm.cli.show_results import show_next_steps, show_tasks
from drllm.cli.show_search import print_targets_file, show_search
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import (
    EvaluateConfig,
    HealConfig,
    ModelConfig,
    SearchConfig,
    SuperviseConfig,
    TrainConfig,
    TuneConfig,
)
from drllm.errors import CheckpointError, ConfigError
from drllm.evaluation.questions import check_output, select_tasks, without_routers
from drllm.models.routers.places import check_place
from drllm.pipeline.folder import open_model
from drllm.processes import is_first
from drllm.records import static_paths
from drllm.records.healed import HEALED_FILE
from drllm.records.manifest import read_manifest
from drllm.records.places import check_file, check_folder
from drllm.records.search import SearchRecords
from drllm.records.supervision import read_targets
from drllm.search.questions import SearchQuestion, collect_questions
from drllm.search.targets import SearchTargets, supervise_search
from drllm.supervision.select import (
    check_settings,
    supervise_to_file,
)
from drllm.tasks.base import Task
from drllm.tasks.files import FIELDS
from drllm.tasks.registry import TASKS, get_tasks
from drllm.training.trackers import check_trackers
from drllm.tuning.data_splits import TaskSplits, split_tasks
from drllm.tuning.heal_texts import read_sources
from drllm.work.listener import duration

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel
    from drllm.models.export import Export
    from drllm.models.routers.stack import RouterStack
    from drllm.search.forecast import TaskForecast

LOADING = "loading torch"  # shown while a stage is imported, which takes seconds

COLUMNS = Flag(
    "columns",
    f"columns of a file or hub set that hold {', '.join(FIELDS)}; grader=exact sets the grader",
    placeholder="FIELD=COLUMN,...",
)
SWITCH_FLAGS = [
    Flag(name, f"train on the {task} targets in data/{task}/ too", switch=True)
    for name, task in published.SWITCHES.items()
]


@verb(
    "search",
    example="drllm search --dataset builtin_facts --limit 64 --output-dir data/",
    settings=(ModelConfig, SearchConfig, SuperviseConfig),
    flags=(
        COLUMNS,
        Flag(
            "dry_run",
            "search a few questions and print the time, memory and disk for all; write nothing",
            switch=True,
        ),
    ),
    resumes=True,
)
def search(command: CommandLine, terminal: Terminal) -> None:
    """Try layer paths for each question, then choose its target path."""
    config = command.get_settings(SearchConfig)
    targets_config = command.get_settings(SuperviseConfig)
    folder = Path(config.output_dir).expanduser()
    check_model_name(command)
    with terminal.busy("reading the questions"):
        questions = collect_questions(None, config)  # None: those that the settings name
    check_settings(targets_config, {question.task for question in questions}, config)
    check_folder(folder, "--output-dir")
    _print_splits(get_tasks(config.dataset or ""), terminal)
    if command.values["dry_run"]:
        _print_forecast(questions, command, terminal)
        return
    with terminal.busy(LOADING):
        from drllm.search.run import search_questions
    records = search_questions(
        command.get_settings(ModelConfig), questions, config, folder, listener=terminal
    )
    _print_search(records, folder, terminal)
    _print_targets(supervise_search(records, targets_config), terminal)


def _print_splits(tasks: Sequence[Task], terminal: Terminal) -> None:
    """Print how the questions of files and of the harness' tasks are divided into splits."""
    for task in tasks:
        if task.name not in TASKS:
            terminal.say(task.describe_splits())


def _print_search(records: SearchRecords, folder: Path, terminal: Terminal) -> None:
    """Print the results of a search, and how many questions failed."""
    file = folder / "search.jsonl"
    if not records.is_new:
        terminal.say(f"{file} is complete already; nothing was searched again")
    terminal.fact("search", file)
    show_search(records, terminal)
    manifest = read_manifest(file, "search") or {}
    num_failed = manifest.get("num_failed")
    if num_failed:
        terminal.fact(
            "failed", f"{num_failed} more questions, set aside in {folder}/search.failed.jsonl"
        )


def _print_targets(targets: SearchTargets, terminal: Terminal) -> None:
    """Print the targets of a search, or why none were written."""
    if targets.supervision is not None:
        print_targets_file(targets.file, targets.supervision.summary, terminal)
    elif targets.is_up_to_date:
        terminal.say(targets.reason)
    else:
        terminal.note(f"drllm: {targets.reason}")


def _print_forecast(
    questions: Sequence[SearchQuestion], command: CommandLine, terminal: Terminal
) -> None:
    """Search a few questions, and print the time, memory and disk that all questions need."""
    config = command.get_settings(SearchConfig)
    with (
        open_model(command.get_settings(ModelConfig), terminal) as base,
        terminal.busy("measuring"),
    ):
        from drllm.models.routing.routed_model import RoutedModel
        from drllm.search.forecast import forecast_search

        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        forecasts = forecast_search(routed, questions, config)
    rows = []
    for forecast in forecasts:
        num_questions = str(forecast.questions)
        num_paths = str(forecast.paths)
        executions = f"{forecast.executions:.2e}"
        hours = f"{forecast.seconds / 3600:.3g}"
        megabytes = f"{forecast.size_bytes / 1e6:.3g}"
        rows.append([forecast.task, num_questions, num_paths, executions, hours, megabytes])
    terminal.table("task|questions|paths|executions|hours|MB", rows, numbers_from=1)
    _print_totals(forecasts, base, config, terminal)
    for forecast in forecasts:
        terminal.fact(
            "measured on",
            f"{forecast.sample_paths} paths of {forecast.sample_questions} questions of "
            f"{forecast.task}: {base.name}, {base.runtime['dtype']} on {base.runtime['device']}",
        )
    first = forecasts[0]
    terminal.say(f"a prompt of {first.task}, as the model reads it:\n{first.prompt}")
    terminal.say("nothing was written; to search, leave --dry-run out")


def _print_totals(
    forecasts: Sequence[TaskForecast], base: BaseModel, config: SearchConfig, terminal: Terminal
) -> None:
    """Print the time, memory and disk that the search of all tasks needs."""
    seconds = sum(forecast.seconds for forecast in forecasts)
    time = f"{duration(seconds)} on one {base.runtime['device']}"
    num_workers = config.num_workers or 1
    if num_workers > 1:
        time += f", {duration(seconds / num_workers)} on {num_workers} like it"
    terminal.fact("time", time)

    weights_gb = base.model.num_parameters() * base.model.dtype.itemsize / 1e9
    cache = "a quarter of what is free"
    if config.state_cache_gb is not None:
        cache = f"up to {config.state_cache_gb:g} GB"
    terminal.fact("memory", f"{weights_gb:.3g} GB weights, {cache} (--state-cache-gb) and passes")

    megabytes = sum(forecast.size_bytes for forecast in forecasts) / 1e6
    terminal.fact("disk", f"{megabytes:.3g} MB, twice that while the files are joined")


@verb(
    "supervise",
    example="drllm supervise --search data/search.jsonl --output data/supervision.jsonl",
    settings=(SuperviseConfig,),
    flags=(
        Flag("search", "search.jsonl files to read", many=True, required=True),
        Flag("output", "supervision.jsonl to write", required=True),
    ),
)
def supervise_verb(command: CommandLine, terminal: Terminal) -> None:
    """Choose one target path for each searched question."""
    output = command.path("output")
    check_file(output, "--output", "supervision")
    config = command.get_settings(SuperviseConfig)
    supervision = supervise_to_file(command.paths("search"), config, output)
    print_targets_file(output, supervision.summary, terminal)


@verb(
    "train",
    example="drllm train --supervision data/supervision.jsonl --run-name first",
    settings=(ModelConfig, TrainConfig),
    flags=(
        Flag(
            "supervision",
            "supervision.jsonl files to train on; default: the file in data/mcts_paths/ or data/",
            many=True,
        ),
        *SWITCH_FLAGS,
        Flag("run_name", "write the routers to checkpoints/NAME", placeholder="NAME"),
        Flag(
            "output_dir",
            "write the routers to this folder instead",
            placeholder="DIR",
            alias="output",
        ),
        Flag(
            "features",
            "folder that keeps the routers' inputs for further trainings; default: features/ in "
            "the routers' folder, deleted after training",
            placeholder="DIR",
            basic=False,
        ),
    ),
    resumes=True,
)
def train_verb(command: CommandLine, terminal: Terminal) -> None:
    """Train the routers on target paths."""
    output, output_flag = _read_routers_folder(command)
    config = command.get_settings(TrainConfig)
    files = published.find_supervision_files(command)
    config.check_effects()
    check_trackers(config.trackers)
    check_model_name(command)
    targets = read_targets(files)
    check_folder(output, output_flag)
    features = command.optional_path("features")
    if features is not None:
        check_folder(features, "--features")
    with terminal.busy(LOADING):
        from drllm.training.checkpoint import is_finished
        from drllm.training.stage import train
    folders = list(config.by_seed(output))
    if all(is_finished(folder) for folder in folders):
        raise CheckpointError(
            f"{output} holds trained routers already; choose another {output_flag}, or delete the "
            f"folder"
        )
    train(
        command.get_settings(ModelConfig),
        targets,
        config,
        output,
        features=features,
        listener=terminal,
    )
    for folder in folders:
        terminal.fact("routers", folder)
        show(folder, terminal)


def _read_routers_folder(command: CommandLine) -> tuple[Path, str]:
    """Return the folder that the routers are written to, and the flag that names the folder.

    Raises ConfigError if no flag or both flags name a folder.
    """
    name = command.values["run_name"]
    output = command.values["output_dir"]
    remedy = "give --output-dir DIR, or --run-name NAME (writes checkpoints/NAME)"
    if name and output:
        raise ConfigError(
            f"both --run-name {name!r} and --output-dir {output!r} name a folder; {remedy}"
        )
    if output:
        return command.path("output_dir"), "--output-dir"
    if not name:
        raise ConfigError(f"no folder for the routers is given; {remedy}")
    if Path(name).name != name or name in (".", ".."):
        raise ConfigError(
            f"--run-name is {name!r}; give a plain name without slashes, or a folder as "
            f"--output-dir"
        )
    return Path("checkpoints") / name, "--run-name"


@verb(
    "tune",
    example="drllm tune --tasks builtin_facts --output-dir tuned/",
    settings=(ModelConfig, TuneConfig),
    flags=(
        COLUMNS,
        Flag("output_dir", "folder for paths.json", default="tuned/", placeholder="DIR"),
    ),
    resumes=True,
)
def tune_verb(command: CommandLine, terminal: Terminal) -> None:
    """Find one path with fewer layers for a whole task."""
    config = command.get_settings(TuneConfig)
    output = command.path("output_dir")
    check_folder(output, "--output-dir")
    check_model_name(command)
    with terminal.busy("reading the questions"):
        all_splits = split_tasks(config)
    for splits in all_splits:
        _print_num_questions(splits, config, terminal)
    with terminal.busy(LOADING):
        from drllm.tuning.run import tune
    tune(command.get_settings(ModelConfig), None, config, output, listener=terminal)
    show_paths(output / static_paths.PATHS_FILE, terminal)


def _print_num_questions(splits: TaskSplits, config: TuneConfig, terminal: Terminal) -> None:
    """Print how many questions of a task are used to fit, choose and test a path."""
    counts = []
    for part, examples in splits.examples.items():
        num_questions = len(examples)
        # --num-fit has limited the questions of `fit` already.
        if part != static_paths.FIT and config.num_judged is not None:
            num_questions = min(num_questions, config.num_judged)
        counts.append(f"{num_questions} to {part}")
    terminal.say(f"questions of {splits.task.name}: {', '.join(counts)}")


@verb(
    "heal",
    example="drllm heal --path tuned/paths.json:skip2 --tasks builtin_facts --output-dir healed/",
    settings=(ModelConfig, HealConfig),
    flags=(
        COLUMNS,
        Flag("output_dir", "folder for the healed path", default="healed/", placeholder="DIR"),
    ),
    model_from="the model that the paths.json names",
    resumes=True,
)
def heal_verb(command: CommandLine, terminal: Terminal) -> None:
    """Train an adapter that recovers what a shorter path loses."""
    check_model_name(command)
    config = command.get_settings(HealConfig)
    output = command.path("output_dir")
    check_folder(output, "--output-dir")
    path = static_paths.load_path(config.require_path())
    read_sources(config)  # finds a mistake in the texts before a model is loaded
    with terminal.busy(LOADING):
        from drllm.tuning.heal import heal
    model = choose_model(command, path=path)
    heal(model, config=config, output_dir=output, listener=terminal)
    show_healed(output / HEALED_FILE, terminal)


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
    shares=True,
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
    _print_splits(tasks, terminal)
    with terminal.busy("reading the routers"):
        folders, first_routers = _read_all_routers(places)
    path_with_model = None
    if first_routers is None:
        path_with_model = next((path for path in paths if path.record), None)
    model = choose_model(command, first_routers, path_with_model)
    with open_model(model, terminal) as base:
        from drllm.evaluation.run import evaluate

        results = evaluate(base, tasks, config, output, routers=folders, listener=terminal)
    if is_first():
        show_tasks(output, terminal, [task.name for task in tasks])
        terminal.fact("results", output)
    drop_test = results[0].drop_test
    if drop_test is None:
        return 0
    terminal.say(drop_test.sentence())
    return 0 if drop_test.chosen else 1


def _read_paths(config: EvaluateConfig) -> list[static_paths.PathFile]:
    """Read the static paths of `--paths`; with `--max-drop`, they must be named one by one."""
    needs_names = config.max_drop is not None
    paths = static_paths.read_path_list(config.paths or "", needs_names=needs_names)
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


@verb(
    "export",
    example="drllm export --model smollm2-135m --path plan.json --output-dir exported/",
    settings=(ModelConfig,),
    flags=(
        Flag(
            "path",
            'file such as {"path": [0, 1, 3]}, or paths.json:NAME',
            required=True,
            placeholder="FILE",
        ),
        Flag("output_dir", "folder to write", required=True, placeholder="DIR", alias="output"),
    ),
    model_from="the model that the paths.json names",
)
def export(command: CommandLine, terminal: Terminal) -> None:
    """Write a static path as an ordinary checkpoint."""
    check_model_name(command)
    output = command.path("output_dir")
    path = static_paths.load_path(str(command.path("path")))
    check_folder(output, "--output-dir")
    with terminal.busy(LOADING):
        from drllm.models.export import check_output, export_path
    check_output(output)
    with (
        open_model(choose_model(command, path=path), terminal) as base,
        terminal.busy("writing and checking"),
    ):
        exported = export_path(base, path, output)
    _print_export(exported, base.num_layers, terminal)


def _print_export(exported: Export, num_layers: int, terminal: Terminal) -> None:
    """Print what was written; `num_layers` is the number of the base model's layers."""
    terminal.say(f"export      {exported.folder}")
    terminal.say(f"path        {' '.join(map(str, exported.path))}")
    terminal.say(f"layers      {len(exported.path)}, the base model has {num_layers}")
    size = f"{exported.num_bytes / 1e6:.1f} MB in {exported.dtype}"
    if exported.num_repeated_bytes:
        size += (
            f"; {exported.num_repeated_bytes / 1e6:.1f} MB of it are layers that are executed "
            f"again, since a checkpoint can't say that two layers are the same"
        )
    terminal.say(f"size        {size}")
    precision = "bit by bit"
    if exported.is_healed:
        precision = "up to rounding, since the adapter is merged"
    terminal.say(f"checked     loaded again, its logits equal the path's {precision}")
