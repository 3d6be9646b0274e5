"""Read the arguments of `--model drllm`, and find the routers and the base model that they name.

"The harness" is lm-evaluation-harness. Its `--model_args` are the parameters of `model.RoutedLM`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from drllm.config import DepthConfig
from drllm.config.fields import replace_settings
from drllm.errors import CheckpointError, ConfigError, unknown_name
from drllm.model.load import BaseModel
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routers.files import find_routers
from drllm.models.routers.places import CONFIG_FILE
from drllm.models.routers.stack import RouterStack

HFLM_ARGUMENTS = (
    "add_bos_token",
    "prefix_token_id",
    "truncation",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""Model arguments that are passed on to the harness' own class."""
PUBLISHED_STATIC_ROUTING = "is_static_routing"  # `static_routing` in the code of the Dr.LLM paper
DEPTH_ARGUMENTS = (*(field.name for field in fields(DepthConfig)), PUBLISHED_STATIC_ROUTING)
"""Model arguments that choose the depth."""
LOADING_ARGUMENTS = ("dtype", "revision", "trust_remote_code", "attn_implementation")
"""Model arguments for loading the base model."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The routers, if there are any, and the base model to load."""

    routers: RouterStack | None
    base: str  # alias, hub id or folder
    revision: str | None = None  # the base model's revision, if the routers name one


def refuse_unknown_arguments(arguments: Mapping[str, Any], parameters: Sequence[str]) -> None:
    """Refuse model arguments that neither drllm nor the harness' class knows.

    Args:
        arguments: The model arguments that aren't parameters of `RoutedLM`.
        parameters: The parameters of `RoutedLM`, for the suggestion in the message.
    """
    names = (*DEPTH_ARGUMENTS, *LOADING_ARGUMENTS, *HFLM_ARGUMENTS)
    for name in arguments:
        if name not in names:
            raise ConfigError(unknown_name("model argument", name, (*names, *parameters)))


def check_batch_size(batch_size: int | str | None) -> int | str:
    """Return a batch size that the harness can read; 1 for None."""
    if batch_size is None:
        return 1
    # `auto:N` is a form of `auto` that the harness has.
    if not re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", str(batch_size)):
        raise ConfigError(f"--batch_size is '{batch_size}'; give auto or a number from 1")
    return batch_size


def select_arguments(arguments: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments with certain names."""
    return {name: arguments[name] for name in names if name in arguments}


def read_depth(arguments: Mapping[str, Any]) -> DepthConfig:
    """Return the depth settings among model arguments; refuse settings that don't fit together."""
    settings = select_arguments(arguments, DEPTH_ARGUMENTS)
    if settings.pop(PUBLISHED_STATIC_ROUTING, False):
        settings["static_routing"] = True
    depth = replace_settings(DepthConfig, None, settings)
    depth.check_combination()
    return depth


def check_windows(
    num_windows: int | None, routers: RouterStack | None, pretrained: str | BaseModel
) -> None:
    """Refuse a number of windows that isn't the routers' number."""
    if num_windows is None:
        return
    if routers is None:
        raise ConfigError(
            f"num_windows={num_windows} needs routers, and pretrained={pretrained} isn't a "
            f"folder of routers{_note_missing_folder(pretrained)}; give their folder, or leave "
            f"num_windows out"
        )
    trained_number = routers.config.num_windows
    if num_windows != trained_number:
        raise CheckpointError(
            f"num_windows is {num_windows}, but these routers were trained with {trained_number}; "
            f"give num_windows={trained_number}, or leave it out"
        )


def resolve_source(
    pretrained: str | BaseModel, routers: str | RouterStack | None, base: str | None
) -> ModelSource:
    """Load the routers, and find the name of their base model; see `RoutedLM`."""
    if isinstance(pretrained, str) and (Path(pretrained) / CONFIG_FILE).is_file():
        return _resolve_router_folder(pretrained, routers, base)
    if isinstance(routers, str):
        routers = load_routers(find_routers(Path(routers)))
    if isinstance(pretrained, BaseModel):
        return ModelSource(routers, pretrained.name)
    if base is not None:
        raise ConfigError(
            f"base={base} has no effect: pretrained={pretrained} isn't a folder of routers"
            f"{_note_missing_folder(pretrained)}; give the base as pretrained and the routers as "
            f"routers="
        )
    return ModelSource(routers, pretrained)


def _resolve_router_folder(
    folder: str, routers: str | RouterStack | None, base: str | None
) -> ModelSource:
    """Load the routers of a folder; the base model is `base`, or else the model that they name."""
    if routers is not None:
        raise ConfigError(
            f"pretrained={folder} is a folder of routers, and routers={routers} is given too; "
            f"give the base model as pretrained, or leave routers out"
        )
    stack = load_routers(folder)
    if base is not None:
        return ModelSource(stack, base)
    config = stack.config
    if not config.base_model:
        raise CheckpointError(
            f"the routers in {folder} don't name their base model; give it as base=MODEL"
        )
    return ModelSource(stack, config.base_model, config.base_revision)


def _note_missing_folder(pretrained: str | BaseModel) -> str:
    """Return a remark if a name looks like a folder that doesn't exist; else return ""."""
    if isinstance(pretrained, BaseModel):
        return ""
    folder = Path(pretrained)
    if folder.exists() or len(folder.parts) == 1:
        return ""
    return " (there is no such folder)"
