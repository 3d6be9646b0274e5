"""The verbs of the stages: check what needs no model, run the stage, print what came of it.

Names, numbers, input files and the output's place are refused before the base model is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli import published
from drllm.cli.parser import CommandLine
from drllm.cli.show import show
from drllm.cli.show_paths import show_healed, show_paths
from drllm.cli.show_results import show_results
from drllm.cli.show_search import print_written, show_search
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
from drllm.evaluation.questions import check_output, tasks_of, without_routers
from drllm.listener import duration
from drllm.pipeline.folder import loaded
from drllm.processes import is_first
from drllm.records import static_paths
from drllm.records.codec import sha256
from drllm.records.healed import HEALED_FILE
from drllm.records.manifest import read_manifest, to_lines
from drllm.records.places import check_file, check_folder, only_writer
from drllm.records.search import SearchRecords
from drllm.records.supervision import join_supervision
from drllm.search.questions import SearchQuestion, collect_questions
from drllm.supervision.select import check_settings, supervise, targets, write
from drllm.tasks.base import Task
from drllm.tasks.files import FIELDS
from drllm.tasks.registry import TASKS, get_tasks
from drllm.training.trackers import check_trackers
from drllm.tuning.heal_texts import sources_of
from drllm.tuning.parts import parts_of_tasks

if TYPE_CHECKING:
    from drllm.models.routers.stack import RouterStack

COLUMNS = Flag(
    "columns",
    f"which columns of a file or hub set hold {', '.join(FIELDS)}; grader=exact names the grader",
    value="FIELD=COLUMN,...",
    basic=False,
)


@verb(
    "search",
    example="drllm search --dataset builtin_facts --limit 64 --output-dir data/",
    settings=(ModelConfig, SearchConfig, SuperviseConfig),
    flags=(
        COLUMNS,
        Flag(
            "dry_run",
            "measure a few paths and say what the search will take; writes nothing",
            switch=True,
        ),
    ),
    resumes=True,
)
def search(command: CommandLine, terminal: Terminal) -> None:
    """Try layer paths for each question, then choose its target path."""
    config, targets_config = command.of(SearchConfig), command.of(SuperviseConfig)
    folder = Path(config.output_dir).expanduser()
    questions = collect_questions(None, config)
    check_settings(targets_config, {question.task for question in questions}, config)
    check_folder(folder, "--output-dir")
    _say_splits(get_tasks(config.dataset or ""), terminal)
    if command.values["dry_run"]:
        _say_forecast(questions, command, terminal)
        return
    from drllm.search.run import search_paths

    found = search_paths(command.of(ModelConfig), questions, config, folder, listener=terminal)
    file, supervision = folder / "search.jsonl", folder / "supervision.jsonl"
    if not found.is_new:
        terminal.say(f"{file} is complete already; nothing was searched again")
    terminal.fact("search", file)
    show_search(found, terminal)
    if failed := (read_manifest(file, "search") or {}).get("num_failed"):
        terminal.fact(
            "failed", f"{failed} more questions, set aside in {folder}/search.failed.jsonl"
        )
    with only_writer(folder, "search", "--output-dir"):
        _supervise(found, targets_config, supervision, terminal)


def _say_splits(tasks: Sequence[Task], terminal: Terminal) -> None:
    """Say how the questions of files and of the harness are divided, by their texts."""
    for task in tasks:
        if task.name not in TASKS:
            terminal.say(task.describe_splits())


def _supervise(
    searched: SearchRecords, config: SuperviseConfig, output: Path, terminal: Terminal
) -> None:
    found = targets(searched, config)
    if output.is_file():
        manifest = read_manifest(output, "supervision")
        # A kill between the file and its manifest leaves exactly what would be written now.
        if manifest is None and output.read_bytes() != to_lines(found).encode():
            terminal.note(f"drllm: {output} has no manifest, so it isn't ours; it stays as it is")
            return
        made = manifest or {}
        of_this = sha256(output.with_name("search.jsonl")) in made.get("inputs", {}).values()
        # Targets by a rule that `supervise` was given stay, unless another is asked for here.
        if of_this and config.to_dict() in (made.get("config"), SuperviseConfig().to_dict()):
            terminal.say(f"{output} is made from this search already; it stays as it is")
            return
    if not found:
        terminal.note(
            f"drllm: no question has a target path, so {output.name} was not written; search more "
            f"questions or simulations, or try 'drllm supervise' with another --target"
        )
        return
    write(found, [searched], output, config)
    print_written(output, found.summary, terminal)


def _say_forecast(
    questions: Sequence[SearchQuestion], command: CommandLine, terminal: Terminal
) -> None:
    config = command.of(SearchConfig)
    with loaded(command.of(ModelConfig), terminal) as base, terminal.busy("measuring"):
        from drllm.models.routing.routed_model import RoutedModel
        from drllm.search.forecast import forecast_search

        parts = forecast_search(
            RoutedModel(base.model, tokenizer=base.tokenizer), questions, config
        )
    rows = []
    for part in parts:
        counts = part.task, str(part.questions), str(part.paths), f"{part.executions:.2e}"
        rows.append([*counts, f"{part.seconds / 3600:.3g}", f"{part.size_bytes / 1e6:.3g}"])
    terminal.table("task|questions|paths|executions|hours|MB", rows, numbers_from=1)
    seconds, size = sum(p.seconds for p in parts), sum(p.size_bytes for p in parts)
    workers, runtime = config.num_workers or 1, base.runtime
    shared = f", {duration(seconds / workers)} on {workers} like it" if workers > 1 else ""
    terminal.fact("time", f"{duration(seconds)} on one {runtime['device']}{shared}")
    weights = base.model.num_parameters() * base.model.dtype.itemsize / 1e9
    most = config.state_cache_gb
    shared = "a quarter of what is free" if most is None else f"up to {most:g} GB"
    terminal.fact("memory", f"{weights:.3g} GB weights, {shared} (--state-cache-gb) and passes")
    terminal.fact("disk", f"{size / 1e6:.3g} MB, twice that while the files are joined")
    for part in parts:
        terminal.fact(
            "measured on",
            f"{part.sample_paths} paths of {part.sample_questions} questions of {part.task}: "
            f"{base.name}, {runtime['dtype']} on {runtime['device']}",
        )
    terminal.say(f"a prompt of {parts[0].task}, as the model reads it:\n{parts[0].prompt}")
    terminal.say("nothing was written; leave --dry-run out to search")


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
    """Choose one target path a question from what the search tried."""
    output = command.path("output")
    check_file(output, "--output", "supervision")
    found = supervise(command.paths("search"), command.of(SuperviseConfig), output)
    print_written(output, found.summary, terminal)


@verb(
    "train",
    example="drllm train --supervision data/supervision.jsonl --run-name first",
    settings=(ModelConfig, TrainConfig),
    flags=(
        Flag(
            "supervision",
            "supervision.jsonl files to learn from; default: what the published search command "
            "leaves in data/mcts_paths/, or in data/",
            many=True,
        ),
        *(
            Flag(name, f"learn from the {task} targets in data/{task}/ too", switch=True)
            for name, task in published.ADDED.items()
        ),
        Flag("run_name", "write the routers to checkpoints/NAME", value="NAME"),
        Flag("output", "write the routers to this folder instead", value="DIR", basic=False),
        Flag(
            "features",
            "keep the routers' inputs in this folder and use them again; default: in features/ "
            "in the routers' folder, deleted after training",
            value="DIR",
            basic=False,
        ),
    ),
    resumes=True,
    shares=True,
)
def train_verb(command: CommandLine, terminal: Terminal) -> None:
    """Train the routers on target paths."""
    output, flag = _routers_folder(command)
    config, files = command.of(TrainConfig), published.supervision_files(command)
    config.check_effects()
    check_trackers(config.trackers)
    join_supervision(files)  # a mistake in them is reported before a model is loaded
    check_folder(output, flag)
    features = command.optional_path("features")
    if features is not None:
        check_folder(features, "--features")
    from drllm.training.checkpoint import is_finished
    from drllm.training.stage import train

    folders = list(config.by_seed(output))
    if all(map(is_finished, folders)):
        raise CheckpointError(
            f"{output} holds trained routers already; choose another {flag}, or delete the folder"
        )
    train(command.of(ModelConfig), files, config, output, features=features, listener=terminal)
    for folder in folders if is_first() else ():
        terminal.fact("routers", folder)
        show(folder, terminal)


def _routers_folder(command: CommandLine) -> tuple[Path, str]:
    """Return where the routers are written, and by which flag that was said."""
    name, output = command.values["run_name"], command.values["output"]
    if bool(name) == bool(output):
        what = f"both --run-name {name!r} and --output {output!r} are" if name else "neither is"
        raise ConfigError(
            f"{what} given; give --run-name NAME (writes checkpoints/NAME) or --output DIR"
        )
    if not name:
        return command.path("output"), "--output"
    if Path(name).name != name or name in (".", ".."):
        raise ConfigError(
            f"--run-name is {name!r}; give a plain name without slashes, or a folder as --output"
        )
    return Path("checkpoints") / name, "--run-name"


@verb(
    "tune",
    example="drllm tune --tasks builtin_facts --output-dir tuned/",
    settings=(ModelConfig, TuneConfig),
    flags=(
        COLUMNS,
        Flag("output_dir", "folder for paths.json", default="tuned/", value="DIR"),
    ),
    resumes=True,
    shares=True,
)
def tune_verb(command: CommandLine, terminal: Terminal) -> None:
    """Find one path for a whole task: fewer layers, answers as good."""
    config, output = command.of(TuneConfig), command.path("output_dir")
    check_folder(output, "--output-dir")
    tasks = parts_of_tasks(config)
    for divided in tasks:
        limit = {static_paths.FIT: None}  # drawn already, by --num-fit
        parts = ", ".join(
            f"{len(found[: limit.get(part, config.num_judged)])} to {part}"
            for part, found in divided.examples.items()
        )
        terminal.say(f"questions of {divided.task.name}: {parts}")
    from drllm.tuning.run import tune

    tune(command.of(ModelConfig), None, config, output, listener=terminal)
    if is_first():
        show_paths(output / static_paths.PATHS_FILE, terminal)


@verb(
    "heal",
    example="drllm heal --path tuned/paths.json:skip2 --tasks builtin_facts --output-dir healed/",
    settings=(ModelConfig, HealConfig),
    flags=(
        COLUMNS,
        Flag("output_dir", "folder for the healed path", default="healed/", value="DIR"),
    ),
    model_from="a paths.json names",
    resumes=True,
)
def heal_verb(command: CommandLine, terminal: Terminal) -> None:
    """Train an adapter that makes up for the layers that a path leaves out."""
    config, output = command.of(HealConfig), command.path("output_dir")
    check_folder(output, "--output-dir")
    plan = static_paths.read_path(config.named_path())
    sources_of(config)  # so that a mistake is told before anything is loaded
    from drllm.tuning.heal import heal

    model = model_of(command, path=plan)
    heal(model, config=config, output_dir=output, listener=terminal)
    show_healed(output / HEALED_FILE, terminal)


@verb(
    "evaluate",
    example="drllm evaluate --routers checkpoints/first --paths paths.json --tasks builtin_facts",
    settings=(ModelConfig, EvaluateConfig),
    flags=(
        Flag(
            "routers",
            "routers: a folder or a hub id; further ones are of other seeds, to see the spread",
            many=True,
            value="DIR",
        ),
        COLUMNS,
        Flag("output_dir", "folder for the results", default="eval/", value="DIR"),
    ),
    model_from="the routers or a paths.json name",
    resumes=True,
    shares=True,
)
def evaluate_verb(command: CommandLine, terminal: Terminal) -> None:
    """Compare base, routed model, baselines and static paths on tasks."""
    config, output = command.of(EvaluateConfig), command.path("output_dir")
    places = command.paths("routers")
    config = config if places else without_routers(config)
    tasks = tasks_of(config)
    paths = static_paths.read_path_list(config.paths or "").values()  # before a model is loaded
    check_folder(output, "--output-dir")
    check_output(output)
    _say_splits(tasks, terminal)
    read = [read_routers(place) for place in places]
    folders = [folder for folder, _ in read]
    routers = read[0][1] if read else None
    tuned = None if read else next((path for path in paths if path.record), None)
    with loaded(model_of(command, routers, tuned), terminal) as base:
        from drllm.evaluation.run import evaluate

        evaluate(base, tasks, config, output, routers=folders, listener=terminal)
    if is_first():
        show_results(output, terminal, [task.name for task in tasks])
        terminal.fact("results", output)


def read_routers(place: Path) -> tuple[Path, RouterStack]:
    """Read routers from a folder or the hub; return the local folder and the routers."""
    from drllm.models.routers.checkpoint import load_routers
    from drllm.models.routers.files import find_routers

    folder = find_routers(place)
    return folder, load_routers(folder)


def model_of(
    command: CommandLine,
    routers: RouterStack | None = None,
    path: static_paths.PathFile | None = None,
) -> ModelConfig:
    """Return the settings of the base model: the user's, or that of the routers or `paths.json`."""
    config = command.of(ModelConfig)
    if command.names_model:
        return config
    if path is not None and path.record is not None and (made_for := path.record.model).get("id"):
        revision = config.revision or made_for.get("revision")
        return dataclasses.replace(config, model=made_for["id"], revision=revision)
    if routers is None:
        return config
    if not routers.config.base_model:
        given = command.values["routers"]
        place = given if isinstance(given, str) else given[0]
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
            "folders that 'drllm run' has written; several are compared",
            many=True,
            required=True,
            positional=True,
        ),
        Flag("output", "folder or .html file; default: the one run folder", value="PLACE"),
    ),
)
def report(command: CommandLine, terminal: Terminal) -> None:
    """Write report.html and report.md from the records of a run."""
    from drllm.reporting import stage

    place = command.optional_path("output")
    files = stage.report(*command.paths("run_dir"), output=place, listener=terminal)
    terminal.fact("report", ", ".join(map(str, files)))


@verb(
    "export",
    example="drllm export --model smollm2-135m --path plan.json --output exported/",
    settings=(ModelConfig,),
    flags=(
        Flag(
            "path", 'such as {"path": [0, 1, 3]}, or paths.json:NAME', required=True, value="FILE"
        ),
        Flag("output", "folder to make", required=True, value="DIR"),
    ),
    model_from="a paths.json names",
)
def export(command: CommandLine, terminal: Terminal) -> None:
    """Write a fixed path as an ordinary checkpoint, layers in path order."""
    from drllm.models.export import check_output, export_path

    output = command.path("output")
    plan = static_paths.read_path(str(command.path("path")))
    check_folder(output, "--output")
    check_output(output)
    with (
        loaded(model_of(command, path=plan), terminal) as base,
        terminal.busy("writing and checking"),
    ):
        made = export_path(base, plan, output)
    terminal.say(f"export      {made.folder}")
    terminal.say(f"path        {' '.join(map(str, made.path))}")
    terminal.say(f"layers      {len(made.path)}, the base model has {base.num_layers}")
    size = f"{made.num_bytes / 1e6:.1f} MB in {made.dtype}"
    if made.num_repeated_bytes:
        size += (
            f"; {made.num_repeated_bytes / 1e6:.1f} MB of it are layers that are executed again, "
            f"since a checkpoint can't say that two layers are the same"
        )
    terminal.say(f"size        {size}")
    how = "to rounding, the adapter merged" if made.is_healed else "bit by bit"
    terminal.say(f"checked     loaded again, its logits equal the path's {how}")
