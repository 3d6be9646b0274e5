"""The verb `drllm train`: trains routers on target paths."""

from __future__ import annotations

from pathlib import Path

from drllm.cli import published
from drllm.cli.base_model import check_model
from drllm.cli.command_line import CommandLine
from drllm.cli.show import show
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import ModelConfig, TrainConfig
from drllm.errors import CheckpointError, ConfigError
from drllm.records.places import check_folder
from drllm.training import is_finished
from drllm.training.inputs import collect_targets

SWITCH_FLAGS = [
    Flag(name, f"train on the {task} targets in data/{task}/ too", switch=True)
    for name, task in published.SWITCHES.items()
]


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
    config = command.get_settings(TrainConfig)
    output, output_flag = _read_routers_folder(command)
    folders = list(config.by_seed(output))
    features = command.optional_path("features")
    files = published.find_supervision_files(command)

    check_model(command)
    targets = collect_targets(files, config)
    check_folder(output, output_flag)
    if features is not None:
        check_folder(features, "--features")
    if all(is_finished(folder) for folder in folders):
        raise CheckpointError(
            f"{output} holds trained routers already; choose another {output_flag}, or delete the "
            f"folder"
        )
    with terminal.busy(LOADING):
        from drllm.training.stage import train_on_targets

    train_on_targets(
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
