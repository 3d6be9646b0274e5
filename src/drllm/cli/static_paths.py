"""The verbs of static paths: `drllm tune` finds them, `heal` repairs one, `export` writes one."""

from __future__ import annotations

from drllm.cli.base_model import check_layers, check_model, choose_model
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS
from drllm.cli.show_paths import show_healed, show_paths
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import HealConfig, ModelConfig, TuneConfig
from drllm.config.heal import NO_REPAIR
from drllm.records.healed import HEALED_FILE
from drllm.records.path_losses import describe_losses
from drllm.records.places import check_folder
from drllm.records.static_paths import (
    FIT,
    PATHS_FILE,
    SELECT,
    TEST,
    PathFile,
    StaticPaths,
    load_path,
)
from drllm.tuning.calibration import read_calibration
from drllm.tuning.data_splits import TaskSplits, split_tasks
from drllm.tuning.heal_texts import read_sources

PART_USES = {FIT: "to find paths", SELECT: "to choose among them", TEST: "to test them"}
"""What the parts of a task's questions are for."""


@verb(
    "tune",
    example="drllm tune --tasks builtin_facts --output-dir tuned/",
    settings=(ModelConfig, TuneConfig),
    flags=(
        COLUMNS,
        Flag(
            "output_dir",
            "folder for paths.json",
            default="tuned/",
            placeholder="DIR",
            alias="output",
        ),
    ),
    resumes=True,
)
def tune_verb(command: CommandLine, terminal: Terminal) -> None:
    """Find one path with fewer layers for a whole task."""
    config = command.get_settings(TuneConfig)
    output = command.path("output_dir")

    check_folder(output, "--output-dir")
    check_model(command)
    with terminal.busy("reading the questions"):
        all_splits = split_tasks(config)
    for splits in all_splits:
        _print_num_questions(splits, config, terminal)
    # Read now, so that a wrong file is refused before the model is loaded.
    texts = []
    if config.repair != NO_REPAIR:
        with terminal.busy("reading the texts"):
            texts = read_calibration(config, all_splits)
    with terminal.busy(LOADING):
        from drllm.tuning.run import tune

    model = command.get_settings(ModelConfig)
    tune(model, all_splits, config, output, texts=texts, listener=terminal)

    show_paths(output / PATHS_FILE, terminal)


def _print_num_questions(splits: TaskSplits, config: TuneConfig, terminal: Terminal) -> None:
    """Print how many questions of a task are used to fit, choose and test a path."""
    counts = []
    for part, examples in splits.examples.items():
        num_questions = len(examples)
        # --num-fit has limited the questions of `fit` already.
        if part != FIT and config.num_judged is not None:
            num_questions = min(num_questions, config.num_judged)
        counts.append(f"{num_questions:,} {PART_USES[part]}")
    line = f"questions of {splits.task.name}: {', '.join(counts)}"
    repeats = splits.task.describe_repeats()
    terminal.say(f"{line}; {repeats}" if repeats else line)


@verb(
    "heal",
    example="drllm heal --path tuned/paths.json:skip2 --tasks builtin_facts --output-dir healed/",
    settings=(ModelConfig, HealConfig),
    flags=(
        COLUMNS,
        Flag(
            "output_dir",
            "folder for the healed path",
            default="healed/",
            placeholder="DIR",
            alias="output",
        ),
    ),
    model_from="the model that the paths.json names",
    resumes=True,
)
def heal_verb(command: CommandLine, terminal: Terminal) -> None:
    """Recover what a shorter path loses: solve weights in closed form, then train LoRA."""
    config = command.get_settings(HealConfig)
    output = command.path("output_dir")

    check_model(command)
    check_folder(output, "--output-dir")
    path = load_path(config.require_path())
    model = choose_model(command, path=path)
    with terminal.busy("reading the questions and texts"):
        texts = read_sources(config)
    check_layers(model, [path])
    _note_losses(path, terminal)
    with terminal.busy(LOADING):
        from drllm.tuning.heal import heal

    heal(model, path, texts=texts, config=config, output_dir=output, listener=terminal)

    show_healed(output / HEALED_FILE, terminal)


def _note_losses(path: PathFile, terminal: Terminal) -> None:
    """Note what a path of a `paths.json` loses on test questions, as `tune` measured it."""
    if path.named is None:
        return
    assert isinstance(path.record, StaticPaths)
    sentences = list(describe_losses(path.record, path.named))
    if sentences:
        terminal.note("\n  ".join(["measured by tune:", *sentences]))
