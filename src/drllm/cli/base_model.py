"""Chooses the base model of a command: the user's, or the model that routers or paths name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli.command_line import CommandLine
from drllm.config import ModelConfig
from drllm.errors import CheckpointError, ModelError
from drllm.records.static_paths import PathFile

if TYPE_CHECKING:
    from drllm.models.routers.stack import RouterStack

HUB_IDS_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
"""Language models that were on the hub before its ids had owners."""


def check_model_name(command: CommandLine) -> None:
    """Refuse a text that can't be the name of a model, before any question is read.

    The check needs no network. Only loading the model shows whether a hub id exists.
    """
    from drllm.models.base.aliases import ALIASES

    model = command.get_settings(ModelConfig).model
    if model in ALIASES or Path(model).expanduser().exists():
        return
    if model in HUB_IDS_WITHOUT_OWNER or re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return
    advice = f"give a hub id (OWNER/NAME), a local folder, or an alias ({', '.join(ALIASES)})"
    close = difflib.get_close_matches(model, ALIASES, n=1)
    if close:
        advice = f"did you mean {close[0]!r}?"
    raise ModelError(f"there is no model {model!r}; {advice}")


def read_routers(place: Path) -> tuple[Path, RouterStack]:
    """Read routers from a folder or the hub; return the local folder and the routers."""
    from drllm.models.routers.checkpoint import load_routers
    from drllm.models.routers.files import find_routers

    folder = find_routers(place)
    return folder, load_routers(folder)


def choose_model(
    command: CommandLine, routers: RouterStack | None = None, path: PathFile | None = None
) -> ModelConfig:
    """Return the settings of the base model to load.

    If the user named no model, it is the model that the paths.json or the routers name. A command
    with neither loads the default model.

    Args:
        command: The command line.
        routers: The routers that the command runs.
        path: The static path that the command runs.

    Raises:
        CheckpointError: The routers name no base model, and the user didn't either.
    """
    config = command.get_settings(ModelConfig)
    if command.names_model:
        return config
    if path is not None and path.record is not None and path.record.model.get("id"):
        identity = path.record.model
        return _replace_model(config, identity["id"], identity.get("revision"))
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
    """Return the settings for another model; `revision` is used if the user gave none."""
    return dataclasses.replace(config, model=name, revision=config.revision or revision)
