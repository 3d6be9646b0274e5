"""Chooses the base model of a command: the user's, or the model that routers name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli.command_line import CommandLine
from drllm.cli.verbs import VERBS
from drllm.config import ModelConfig
from drllm.errors import CheckpointError
from drllm.model import places
from drllm.records.static_paths import NamedPath

if TYPE_CHECKING:
    from drllm.models.routers.stack import RouterStack


def check_model(command: CommandLine) -> None:
    """Refuse a base model that can't be loaded, before anything else is read.

    A model that routers name is checked by `choose_model`.
    """
    if command.names_model or not VERBS[command.verb].model_from:
        places.check_model(command.get_settings(ModelConfig))


def check_layers(model: ModelConfig, paths: Iterable[NamedPath]) -> None:
    """Refuse paths with layers that a model lacks, before the model is loaded.

    They are checked when the model is loaded if the number of layers isn't known before.

    Raises:
        PathError: The model can't run a path.
    """
    num_layers = places.read_num_layers(model)
    if num_layers is None:
        return
    for path in paths:
        path.path(num_layers)


def read_routers(place: Path) -> tuple[Path, RouterStack]:
    """Read routers from a folder or the hub; return the local folder and the routers."""
    from drllm.models.routers.checkpoint import load_routers
    from drllm.models.routers.files import find_routers

    folder = find_routers(place)
    return folder, load_routers(folder)


def choose_model(command: CommandLine, routers: RouterStack | None = None) -> ModelConfig:
    """Return the settings of the base model to load.

    If the user named no model, it is the model that the routers name. A command without routers
    loads the default model.

    Args:
        command: The command line.
        routers: The routers that the command runs.

    Raises:
        CheckpointError: The routers name no base model, and the user didn't either.
        ModelError: The model that the routers name doesn't exist.
    """
    config = command.get_settings(ModelConfig)
    if command.names_model:
        return config
    if routers is None:
        return config
    if not routers.config.base_model:
        value = command.values["routers"]
        place = value if isinstance(value, str) else value[0]
        raise CheckpointError(
            f"the routers in {place} don't name their base model; give it as --model"
        )
    return _replace_model(config, routers.config.base_model, routers.config.base_revision)


def _replace_model(config: ModelConfig, name: str, revision: str | None) -> ModelConfig:
    """Return the settings for another model; `revision` is used if the user gave none.

    Raises ModelError if there is no such model.
    """
    config = dataclasses.replace(config, model=name, revision=config.revision or revision)
    places.check_model(config)
    return config
