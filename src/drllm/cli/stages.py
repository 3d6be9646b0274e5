"""The verbs of the stages: check the flags and files, run the stage, and print its results.

Wrong names, numbers, input files and output folders are refused before the base model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drllm.cli import published
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
from drllm.errors import CheckpointError, ConfigError, ModelError
from drllm.evaluation.questions import check_output, select_tasks, without_routers
from drllm.listener import duration
from drllm.models.routers.places import check_place
from drllm.pipeline.folder import open_model
from drllm.processes import is_first
from drllm.records import static_paths
from drllm.records.codec import sha256
from drllm.records.healed import HEALED_FILE
from drllm.records.manifest import read_manifest, to_lines
from drllm.records.places import check_file, check_folder, only_writer
from drllm.records.search import SearchRecords
from drllm.records.supervision import join_supervision
from drllm.search.questions import SearchQuestion, collect_questions
from drllm.supervision.select import check_settings, pick_targets, supervise, write_supervision
from drllm.tasks.base import Task
from drllm.tasks.files import FIELDS
from drllm.tasks.registry import TASKS, get_tasks
from drllm.training.trackers import check_trackers
from drllm.tuning.data_splits import TaskSplits, split_tasks
from drllm.tuning.heal_texts import read_sources

if TYPE_CHECKING:
    from drllm.models.routers.stack import RouterStack

HUB_IDS_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
"""Language models that were on the hub before its ids had owners."""

LOADING = "loading torch"  # shown while a stage is imported, which takes seconds

COLUMNS = Flag(
    "columns",
    f"columns of a file or hub set that hold {', '.join(FIELDS)}; grader=exact sets the grader",
    placeholder="FIELD=COLUMN,...",
)


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
        questions = collect_questions(None, config)
    check_settings(targets_config, {question.task for question in questions}, config)
    check_folder(folder, "--output-dir")
    _print_splits(get_tasks(config.dataset or ""), terminal)
    if command.values["dry_run"]:
        _print_forecast(questions, command, terminal)
        return
    with terminal.busy(LOADING):
        from drllm.search.run import search_paths
    records = search_paths(
        command.get_settings(ModelConfig), questions, config, folder, listener=terminal
    )
    _print_search(records, folder, terminal)
    with only_writer(folder, "search", "--output-dir"):
        _supervise(records, targets_config, folder / "supervision.jsonl", terminal)


def check_model_name(command: CommandLine) -> None:
    """Refuse a text that can't be the name of a model, before any question is read.

    The check needs no network. Only loading the model shows whether a hub id exists.
    """
    from drllm.models.base.smollm2 import ALIAS

    model = command.get_settings(ModelConfig).model
    if model == ALIAS or Path(model).expanduser().exists():
        return
    if model in HUB_IDS_WITHOUT_OWNER or re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return
    advice = f"give a hub id (OWNER/NAME), a local folder, or the alias {ALIAS!r}"
    if difflib.get_close_matches(model, [ALIAS], n=1):
        advice = f"did you mean {ALIAS!r}?"
    raise ModelError(f"there is no model {model!r}; {advice}")


def _print_splits(tasks: Sequence[Task], terminal: Terminal) -> None:
    """Print how the questions of files and of the harness are divided into splits."""
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


def _supervise(
    records: SearchRecords, config: SuperviseConfig, output: Path, terminal: Terminal
) -> None:
    """Choose targets and write them, unless an existing file must be kept."""
    supervision = pick_targets(records, config)
    if output.is_file():
        manifest = read_manifest(output, "supervision")
        # A run that was killed before it wrote the manifest left exactly these lines.
        if manifest is None and output.read_bytes() != to_lines(supervision).encode():
            terminal.note(f"drllm: {output} has no manifest, so it isn't ours; it stays as it is")
            return
        if manifest is not None and _is_up_to_date(manifest, output, config):
            terminal.say(f"{output} was made from this search already")
            return
    if not supervision:
        terminal.note(
            f"drllm: no question has a target path, so {output.name} was not written; search more "
            f"questions or simulations, or try 'drllm supervise' with another --target"
        )
        return
    write_supervision(supervision, [records], output, config)
    print_targets_file(output, supervision.summary, terminal)


def _is_up_to_date(manifest: Mapping[str, Any], output: Path, config: SuperviseConfig) -> bool:
    """Tell whether targets were made from the search beside them, by the rule of this command.

    Targets that `drllm supervise` made by another rule stay if this command names no rule.
    """
    search_digest = sha256(output.with_name("search.jsonl"))
    if search_digest not in manifest.get("inputs", {}).values():
        return False
    settings = config.to_dict()
    return settings in (manifest.get("config"), SuperviseConfig().to_dict())


def _print_forecast(
    questions: Sequence[SearchQuestion], command: CommandLine, terminal: Terminal
) -> None:
    """Search a few questions, and print the time, memory and disk that all of them need."""
    config = command.get_settings(SearchConfig)
    with (
        open_model(command.get_settings(ModelConfig), terminal) as base,
        terminal.busy("measuring"),
    ):
        from drllm.models.routing.routed_model import RoutedModel
        from drllm.search.forecast import forecast_search

        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        parts = forecast_search(routed, questions, config)
    rows = []
    for part in parts:
        cells = [part.task, str(part.questions), str(part.paths), f"{part.executions:.2e}"]
        cells += [f"{part.seconds / 3600:.3g}", f"{part.size_bytes / 1e6:.3g}"]
        rows.append(cells)
    terminal.table("task|questions|paths|executions|hours|MB", rows, numbers_from=1)

    device = base.runtime["device"]
    seconds = sum(part.seconds for part in parts)
    time = f"{duration(seconds)} on one {device}"
    num_workers = config.num_workers or 1
    if num_workers > 1:
        time += f", {duration(seconds / num_workers)} on {num_workers} like it"
    terminal.fact("time", time)

    weights = base.model.num_parameters() * base.model.dtype.itemsize / 1e9
    shared = "a quarter of what is free"
    if config.state_cache_gb is not None:
        shared = f"up to {config.state_cache_gb:g} GB"
    terminal.fact("memory", f"{weights:.3g} GB weights, {shared} (--state-cache-gb) and passes")
    size = sum(part.size_bytes for part in parts)
    terminal.fact("disk", f"{size / 1e6:.3g} MB, twice that while the files are joined")
    for part in parts:
        terminal.fact(
            "measured on",
            f"{part.sample_paths} paths of {part.sample_questions} questions of {part.task}: "
            f"{base.name}, {base.runtime['dtype']} on {device}",
        )
    terminal.say(f"a prompt of {parts[0].task}, as the model reads it:\n{parts[0].prompt}")
    terminal.say("nothing was written; to search, leave --dry-run out")


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
    supervision = supervise(command.paths("search"), command.get_settings(SuperviseConfig), output)
    print_targets_file(output, supervision.summary, terminal)


@verb(
    "train",
    example="drllm train --supervision data/supervision.jsonl --run-name first",
    settings=(ModelConfig, TrainConfig),
    flags=(
        Flag(
            "supervision",
            "supervision.jsonl files to train on; default: the one in data/mcts_paths/ or data/",
            many=True,
        ),
        *(
            Flag(name, f"train on the {task} targets in data/{task}/ too", switch=True)
            for name, task in published.SWITCHES.items()
        ),
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
    shares=True,
)
def train_verb(command: CommandLine, terminal: Terminal) -> None:
    """Train the routers on target paths."""
    output, flag = _routers_folder(command)
    config = command.get_settings(TrainConfig)
    files = published.find_supervision_files(command)
    config.check_effects()
    check_trackers(config.trackers)
    check_model_name(command)
    join_supervision(files)  # a mistake in them is reported before a model is loaded
    check_folder(output, flag)
    features = command.optional_path("features")
    if features is not None:
        check_folder(features, "--features")
    with terminal.busy(LOADING):
        from drllm.training.checkpoint import is_finished
        from drllm.training.stage import train
    folders = list(config.by_seed(output))
    if all(is_finished(folder) for folder in folders):
        raise CheckpointError(
            f"{output} holds trained routers already; choose another {flag}, or delete the folder"
        )
    train(
        command.get_settings(ModelConfig),
        files,
        config,
        output,
        features=features,
        listener=terminal,
    )
    if not is_first():
        return
    for folder in folders:
        terminal.fact("routers", folder)
        show(folder, terminal)


def _routers_folder(command: CommandLine) -> tuple[Path, str]:
    """Return the folder that the routers are written to, and the flag that names the folder."""
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
    shares=True,
)
def tune_verb(command: CommandLine, terminal: Terminal) -> None:
    """Find one path with fewer layers for a whole task."""
    config = command.get_settings(TuneConfig)
    output = command.path("output_dir")
    check_folder(output, "--output-dir")
    check_model_name(command)
    with terminal.busy("reading the questions"):
        splits = split_tasks(config)
    for parts in splits:
        _print_parts(parts, config, terminal)
    with terminal.busy(LOADING):
        from drllm.tuning.run import tune
    tune(command.get_settings(ModelConfig), None, config, output, listener=terminal)
    if is_first():
        show_paths(output / static_paths.PATHS_FILE, terminal)


def _print_parts(parts: TaskSplits, config: TuneConfig, terminal: Terminal) -> None:
    """Print how many questions of a task are used to fit, choose and test a path."""
    counts = []
    for part, examples in parts.examples.items():
        num = len(examples)
        if part != static_paths.FIT and config.num_judged is not None:
            num = min(num, config.num_judged)  # --num-fit has limited the other part already
        counts.append(f"{num} to {part}")
    terminal.say(f"questions of {parts.task.name}: {', '.join(counts)}")


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
    plan = static_paths.read_path(config.require_path())
    read_sources(config)  # a mistake in them is reported before a model is loaded
    with terminal.busy(LOADING):
        from drllm.tuning.heal import heal
    model = choose_model(command, path=plan)
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
    paths = static_paths.read_path_list(  # before a model is loaded
        config.paths or "", needs_names=config.max_drop is not None
    ).values()
    check_folder(output, "--output-dir")
    check_output(output)
    _print_splits(tasks, terminal)
    folders: list[Path] = []
    routers: RouterStack | None = None
    with terminal.busy("reading the routers"):
        for place in places:
            folder, stack = read_routers(place)
            folders.append(folder)
            if routers is None:
                routers = stack
    tuned = None
    if routers is None:
        tuned = next((path for path in paths if path.record), None)
    with open_model(choose_model(command, routers, tuned), terminal) as base:
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


def read_routers(place: Path) -> tuple[Path, RouterStack]:
    """Read routers from a folder or the hub; return the local folder and the routers."""
    from drllm.models.routers.checkpoint import load_routers
    from drllm.models.routers.files import find_routers

    folder = find_routers(place)
    return folder, load_routers(folder)


def choose_model(
    command: CommandLine,
    routers: RouterStack | None = None,
    path: static_paths.PathFile | None = None,
) -> ModelConfig:
    """Return the settings of the base model.

    The model is the one that the user named. Without a name it is the model of the paths.json or of
    the routers.
    """
    config = command.get_settings(ModelConfig)
    if command.names_model:
        return config
    if path is not None and path.record is not None and path.record.model.get("id"):
        made_for = path.record.model
        revision = config.revision or made_for.get("revision")
        return dataclasses.replace(config, model=made_for["id"], revision=revision)
    if routers is None:
        return config
    if not routers.config.base_model:
        value = command.values["routers"]
        place = value if isinstance(value, str) else value[0]
        raise CheckpointError(
            f"the routers in {place} don't name their base model; give it as --model"
        )
    revision = config.revision or routers.config.base_revision
    return dataclasses.replace(config, model=routers.config.base_model, revision=revision)


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
    files = stage.report(*folders, output=place, listener=terminal)
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
    plan = static_paths.read_path(str(command.path("path")))
    check_folder(output, "--output-dir")
    with terminal.busy(LOADING):
        from drllm.models.export import check_output, export_path
    check_output(output)
    with (
        open_model(choose_model(command, path=plan), terminal) as base,
        terminal.busy("writing and checking"),
    ):
        exported = export_path(base, plan, output)
    terminal.say(f"export      {exported.folder}")
    terminal.say(f"path        {' '.join(map(str, exported.path))}")
    terminal.say(f"layers      {len(exported.path)}, the base model has {base.num_layers}")
    size = f"{exported.num_bytes / 1e6:.1f} MB in {exported.dtype}"
    if exported.num_repeated_bytes:
        size += (
            f"; {exported.num_repeated_bytes / 1e6:.1f} MB of it are layers that are executed "
            f"again, since a checkpoint can't say that two layers are the same"
        )
    terminal.say(f"size        {size}")
    how = "to rounding, the adapter merged" if exported.is_healed else "bit by bit"
    terminal.say(f"checked     loaded again, its logits equal the path's {how}")
