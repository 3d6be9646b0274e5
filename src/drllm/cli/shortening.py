"""The verbs of shortened models: `gaps` chooses layers, `learn` and `export` write checkpoints."""

from __future__ import annotations

from pathlib import Path

from drllm.cli.base_model import check_model
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import GapsConfig, LearnConfig, ModelConfig
from drllm.errors import ConfigError
from drllm.extras import is_installed
from drllm.model.places import read_num_layers
from drllm.records.gaps import PATHS_FILE, parse_layers, read_gaps, write_layers
from drllm.records.places import check_folder, check_new_folder
from drllm.tasks.parts import read_questions

FIGURE_FILE = "gaps.png"
SKIP = Flag(
    "skip",
    "layers to leave out, counted from 0, such as 2-9,12-18; or a file of 'drllm gaps' and how "
    "many layers stay, such as paths.json:15",
    required=True,
    placeholder="LAYERS",
)
OUTPUT = Flag("output_dir", "folder to write", required=True, placeholder="DIR", alias="output")


@verb(
    "gaps",
    example="drllm gaps --model smollm2-135m --tasks questions.jsonl --output-dir gaps/",
    settings=(ModelConfig, GapsConfig),
    flags=(
        COLUMNS,
        Flag(
            "output_dir",
            "folder for paths.json",
            default="gaps/",
            placeholder="DIR",
            alias="output",
        ),
    ),
)
def gaps_verb(command: CommandLine, terminal: Terminal) -> None:
    """Choose the layers that a model can do without."""
    config = command.get_settings(GapsConfig)
    output = command.path("output_dir")
    check_folder(output, "--output-dir")
    check_model(command)
    num_layers = read_num_layers(command.get_settings(ModelConfig))
    if num_layers is not None:
        config.list_numbers(num_layers)
    questions = read_questions(config)
    with terminal.busy(LOADING):
        from drllm.prune.choose import choose_paths

    choose_paths(command.get_settings(ModelConfig), questions, config, output, listener=terminal)
    show_gaps(output / PATHS_FILE, terminal)
    if is_installed("matplotlib"):
        from drllm.reporting.gap_figure import draw_gaps

        draw_gaps(read_gaps(output / PATHS_FILE), output / FIGURE_FILE)
        terminal.fact("figure", output / FIGURE_FILE)


def show_gaps(file: Path, terminal: Terminal) -> None:
    """Print a `paths.json`: for each number of layers the set to leave out, and what it loses."""
    record = read_gaps(file)
    rows = []
    for path in record.paths:
        refit = "–" if path.refit is None else f"{path.refit:+.3f}"
        rows.append(
            [
                f"{record.num_layers - len(path.skip)}",
                write_layers(path.skip),
                f"{path.plain:+.3f}",
                refit,
            ]
        )
    title = f"next-token loss over the full model's {record.full_loss:.3f}, nats a token"
    terminal.table("layers|left out|plain|after a refit", rows, title=title)
    kept = record.num_layers - len(record.paths[-1].skip)
    terminal.command(
        f"drllm learn --model {record.model['id']} --skip {file}:{kept} --tasks TASKS "
        f"--output-dir smaller/"
    )


@verb(
    "learn",
    example="drllm learn --skip gaps/paths.json:20 --tasks questions.jsonl --output-dir smaller/",
    settings=(ModelConfig, LearnConfig),
    flags=(COLUMNS, SKIP, OUTPUT),
    resumes=True,
)
def learn_verb(command: CommandLine, terminal: Terminal) -> None:
    """Leave layers out, refit the model, and teach it right answers."""
    config = command.get_settings(LearnConfig)
    output = command.path("output_dir")
    work = output.with_name(f"{output.name}.work")
    skip = _read_skip(command)
    check_new_folder(output)
    check_folder(output, "--output-dir")
    questions = read_questions(config)
    with terminal.busy(LOADING):
        from drllm.model.submodel import shorten
        from drllm.models.routed_model import unrouted
        from drllm.prune.export import export
        from drllm.prune.learn import learn

    with unrouted(command.get_settings(ModelConfig), None, terminal) as base:
        model = shorten(base.model, skip)
        report = learn(model, questions, teacher=base, config=config, work=work, listener=terminal)
        with terminal.busy("writing and checking"):
            num_bytes = export(model, base, output, report=report)
    rows = []
    for repair in report["repairs"]:
        result = "" if repair["kept"] else "undone"
        before = f"{repair['before']:.3f}"
        after = f"{repair['after']:.3f}"
        rows.append([repair["name"], before, after, result])
    terminal.table("repair|check loss before|after|result", rows)
    _print_checkpoint(output, num_bytes, base.num_layers - len(skip), base.num_layers, terminal)


@verb(
    "export",
    example="drllm export --model smollm2-135m --skip 13,14 --output-dir exported/",
    settings=(ModelConfig,),
    flags=(SKIP, OUTPUT),
)
def export_verb(command: CommandLine, terminal: Terminal) -> None:
    """Write a model without some layers as an ordinary checkpoint."""
    output = command.path("output_dir")
    skip = _read_skip(command)
    check_folder(output, "--output-dir")
    check_new_folder(output)
    with terminal.busy(LOADING):
        from drllm.model.submodel import shorten
        from drllm.models.routed_model import unrouted
        from drllm.prune.export import export

    with unrouted(command.get_settings(ModelConfig), None, terminal) as base:
        base.refuse_bypass("export writes an ordinary checkpoint")
        with terminal.busy("writing and checking"):
            num_bytes = export(shorten(base.model, skip), base, output)
    _print_checkpoint(output, num_bytes, base.num_layers - len(skip), base.num_layers, terminal)


def _read_skip(command: CommandLine) -> list[int]:
    """Read the layers to leave out, and refuse those that the model lacks before it is loaded."""
    check_model(command)
    skip = parse_layers(str(command.values["skip"]))
    num_layers = read_num_layers(command.get_settings(ModelConfig))
    if num_layers is not None and not 0 < len(skip) < num_layers:
        raise ConfigError(
            f"--skip leaves out {len(skip)} of {num_layers} layers; leave out 1 to {num_layers - 1}"
        )
    if num_layers is not None and max(skip) >= num_layers:
        raise ConfigError(
            f"--skip names layer {max(skip)}, and the model has the layers 0 to {num_layers - 1}"
        )
    return skip


def _print_checkpoint(
    output: Path, num_bytes: int, kept: int, num_layers: int, terminal: Terminal
) -> None:
    """Print what was written."""
    terminal.fact("checkpoint", f"{output}, loads with transformers alone")
    terminal.fact("layers", f"{kept} of {num_layers}, {num_bytes / 1e6:.1f} MB")
    terminal.fact("checked", "loaded again, its weights and logits are equal bit for bit")
