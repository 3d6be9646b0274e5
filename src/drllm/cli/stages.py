"""Each verb's work: check what can be checked without a model, load it, run the stage, say so.

Owns the order of things: names, numbers, input files and the output's place are refused before
the base model is loaded, and nothing is written before all of them are right. Leaves the stages
themselves to their packages, which meet only here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli import checks, published
from drllm.cli.show_results import show_results
from drllm.cli.show_supervision import say_written
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, Request, verb
from drllm.config import EvaluateConfig, ModelConfig, SuperviseConfig, TrainConfig
from drllm.errors import CheckpointError, ConfigError
from drllm.records import join_supervision
from drllm.records.places import check_file, check_folder
from drllm.supervision import supervise as run_supervise

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel
    from drllm.models.routers.stack import RouterStack
    from drllm.models.routing.routed_model import RoutedModel

CHECKPOINTS = Path("checkpoints")


# --- the verbs ---------------------------------------------------------------------------------


@verb(
    "supervise",
    help="choose one target path a question from what the search tried",
    example="drllm supervise --search data/search.jsonl --output data/supervision.jsonl",
    settings=(SuperviseConfig,),
    flags=(
        Flag("search", "search.jsonl files to read", many=True, required=True),
        Flag("output", "supervision.jsonl to write", required=True),
    ),
)
def supervise(request: Request, terminal: Terminal) -> None:
    """Choose target paths from search records."""
    output = request.path("output")
    check_file(output, "--output", "supervision")
    found = run_supervise(request.paths("search"), request.of(SuperviseConfig), output)
    say_written(output, found.summary, terminal)


@verb(
    "train",
    help="train the routers on target paths",
    example="drllm train --supervision data/supervision.jsonl --run-name first",
    settings=(ModelConfig, TrainConfig),
    flags=(
        Flag(
            "supervision",
            "supervision.jsonl files to learn from; default: what the published search command "
            "leaves in data/mcts_paths/, or in data/",
            many=True,
        ),
        Flag("with_squad", "learn from the squad_v2 targets in data/squad_v2/ too", switch=True),
        Flag(
            "with_commonsense",
            "learn from the commonsense_qa targets in data/commonsense_qa/ too",
            switch=True,
        ),
        Flag("run_name", "write the routers to checkpoints/NAME"),
        Flag("output", "write the routers to this folder instead"),
        Flag(
            "features",
            "keep the routers' inputs in this folder and use them again; default: in features/ "
            "in the routers' folder, deleted after training",
        ),
    ),
    resumes=True,
)
def train(request: Request, terminal: Terminal) -> None:
    """Train routers on target paths."""
    from drllm.cli import show

    output = _routers_folder(request)
    config = request.of(TrainConfig)
    config.check_effects()
    checks.check_trackers(config)
    supervision = published.supervision_files(request)
    records = join_supervision(supervision)
    if config.soft_targets:
        from drllm.training.targets import soft_targets

        soft_targets(records)  # that there are any is known before the model is loaded
    flag = "--output" if request.values["output"] else "--run-name"
    check_folder(output, flag)
    features_dir = request.path("features") if request.values["features"] else None
    if features_dir is not None:
        check_folder(features_dir, "--features")
    if all(_is_finished(folder) for folder in config.by_seed(output)):
        raise CheckpointError(
            f"{output} holds trained routers already; choose another {flag}, or delete the folder"
        )
    with loaded(request.of(ModelConfig), terminal) as base:
        run_train_stage(base, supervision, output, config, terminal, features_dir=features_dir)
    for folder in config.by_seed(output):
        terminal.say(f"routers        {folder}")
        show.show(folder, terminal)


def _routers_folder(request: Request) -> Path:
    name, output = request.values["run_name"], request.values["output"]
    if bool(name) == bool(output):
        what = f"both --run-name {name!r} and --output {output!r} are" if name else "neither is"
        raise ConfigError(
            f"{what} given; give --run-name NAME (writes checkpoints/NAME) or --output DIR"
        )
    if not name:
        return request.path("output")
    if Path(name).name != name or name in (".", ".."):
        raise ConfigError(
            f"--run-name is {name!r}; give a plain name without slashes, or a folder as --output"
        )
    return CHECKPOINTS / str(name)


def _is_finished(folder: Path) -> bool:
    from drllm.training.checkpoint import is_finished

    return is_finished(folder)


@verb(
    "evaluate",
    help="compare base, routed model and baselines on tasks",
    example="drllm evaluate --routers checkpoints/first --tasks builtin_facts",
    settings=(ModelConfig, EvaluateConfig),
    flags=(
        Flag(
            "routers",
            "routers: a folder or a hub id; further ones are of other seeds, to see the spread",
            many=True,
            required=True,
        ),
        Flag("output_dir", "folder for the results", default="eval/"),
    ),
    model_from_routers=True,
    resumes=True,
)
def evaluate(request: Request, terminal: Terminal) -> None:
    """Evaluate base, routed model and baselines, and print the table."""
    from drllm.evaluation import questions, run

    config = request.of(EvaluateConfig)
    output = request.path("output_dir")
    tasks = questions.tasks_of(config)
    check_folder(output, "--output-dir")
    questions.check_output(output)
    folders = [find_routers(place) for place in request.paths("routers")]
    checks.check_named_once(folders, "--routers")
    first, *_ = [read_routers(folder) for folder in folders]
    model = model_of(request, first)
    with loaded(model, terminal) as base:
        run.evaluate(base, tasks, config, output, routers=folders, listener=terminal)
    show_results(output, terminal, [task.name for task in tasks])
    terminal.say(f"results        {output}")


def model_of(request: Request, routers: RouterStack | None) -> ModelConfig:
    """Return the settings of the base model: the user's, or the one that the routers name."""
    config = request.of(ModelConfig)
    if request.model_given or routers is None:
        return config
    if not routers.config.base_model:
        given = request.values["routers"]
        place = given if isinstance(given, str) else given[0]
        raise CheckpointError(
            f"the routers in {place} don't name their base model; give it as --model"
        )
    revision = config.revision or routers.config.base_revision
    return dataclasses.replace(config, model=routers.config.base_model, revision=revision)


@verb(
    "report",
    help="write report.html and report.md from the records of a run",
    example="drllm report runs/demo",
    flags=(
        Flag(
            "run_dir",
            "folders that 'drllm run' has written; several are compared",
            many=True,
            required=True,
            positional=True,
        ),
        Flag("output", "folder or .html file; default: the one run folder"),
    ),
)
def report(request: Request, terminal: Terminal) -> None:
    """Write the report of one or more run folders."""
    from drllm.reporting import stage

    output = request.values["output"]
    place = request.path("output") if output else None
    files = stage.report(*request.paths("run_dir"), output=place, listener=terminal)
    terminal.say(f"report         {', '.join(map(str, files))}")


# --- the stages, with a loaded model -----------------------------------------------------------


def find_routers(place: Path) -> Path:
    """Return a folder of routers, fetched first where the place is OWNER/NAME on the hub.

    Raises:
        CheckpointError: Routers that the hub doesn't have or doesn't give.
    """
    from drllm.models.routers.hub import find

    return find(place)


def read_routers(folder: Path) -> RouterStack:
    """Read routers, which is quick, before the base model is loaded.

    Raises:
        CheckpointError: Missing or broken.
    """
    from drllm.models.routers.checkpoint import load_routers

    return load_routers(folder)


@contextmanager
def loaded(config: ModelConfig, terminal: Terminal) -> Iterator[BaseModel]:
    """Load the base model, and keep transformers quiet until the block ends."""
    with terminal.busy(f"loading {config.model}"):
        from drllm.models.base.hub import quiet
        from drllm.models.base.load import load

        base = load(config)
    with quiet():
        yield base


@contextmanager
def attached(base: BaseModel, routers: RouterStack | None = None) -> Iterator[RoutedModel]:
    """Route the base model inside the block."""
    from drllm.models.routing.routed_model import RoutedModel

    routed = RoutedModel(base.model, routers, tokenizer=base.tokenizer)
    try:
        yield routed
    finally:
        routed.detach()


def run_train_stage(
    base: BaseModel,
    supervision: Sequence[Path],
    output: Path,
    config: TrainConfig,
    terminal: Terminal,
    *,
    features_dir: Path | None = None,
) -> None:
    """Train routers on the targets of supervision files."""
    from drllm.training.stage import train

    records = join_supervision(supervision)
    checks.check_supervision_model(supervision, base.identity)
    train(
        base,
        records,
        config,
        output,
        features=features_dir,
        rewards=checks.rewards_of(supervision),
        listener=terminal,
    )
