"""The verbs of static paths: `drllm tune` finds them, `heal` repairs one, `export` writes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drllm.cli.base_model import check_layers, check_model, choose_model
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS
from drllm.cli.show_paths import show_healed, show_paths
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import ExportConfig, HealConfig, ModelConfig, TuneConfig
from drllm.config.heal import NO_REPAIR
from drllm.pipeline.model import open_model
from drllm.records.healed import HEALED_FILE
from drllm.records.path_losses import check_losses, describe_file_losses, describe_losses
from drllm.records.places import check_folder, check_new_folder
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

if TYPE_CHECKING:
    from drllm.models.export import Export

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


@verb(
    "export",
    example="drllm export --model smollm2-135m --path plan.json --output-dir exported/",
    settings=(ModelConfig, ExportConfig),
    flags=(
        Flag(
            "path",
            'file such as {"path": [0, 1, 3]}, paths.json:NAME, or without:13,14',
            required=True,
            placeholder="FILE",
        ),
        Flag("output_dir", "folder to write", required=True, placeholder="DIR", alias="output"),
        Flag(
            "force",
            "export also a path that is shown to lose more than --max-drop or --max-loss-increase",
            switch=True,
        ),
    ),
    model_from="the model that the paths.json names",
)
def export(command: CommandLine, terminal: Terminal) -> None:
    """Write a static path as an ordinary checkpoint."""
    config = command.get_settings(ExportConfig)
    output = command.path("output_dir")

    check_model(command)
    path = load_path(str(command.path("path")))
    model = choose_model(command, path=path)
    check_layers(model, [path])
    check_folder(output, "--output-dir")
    check_new_folder(output)
    if not command.values["force"]:
        check_losses(path, config.max_drop, config.max_loss_increase)
    with terminal.busy(LOADING):
        from drllm.models.export import export_path
    if path.note:
        terminal.note(path.note)

    with (
        open_model(model, terminal) as base,
        terminal.busy("writing and checking"),
    ):
        exported = export_path(base, path, output)

    _print_export(exported, base.num_layers, terminal)
    _print_losses(path, terminal)


def _print_losses(path: PathFile, terminal: Terminal) -> None:
    """Print what is known of the losses of an exported path."""
    sentences = describe_file_losses(path)
    if path.record is None:
        sentences = [f"nothing; 'drllm evaluate --paths {path.file}' compares it with all layers"]
    for sentence in sentences:
        terminal.say(f"measured    {sentence}", indent=12)


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
    precision = "bit for bit"
    if exported.is_merged:
        precision = "up to rounding, since the adapter is merged"
    terminal.say(f"checked     loaded again, its logits equal the path's {precision}")
