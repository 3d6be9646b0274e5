"""What `--model_args` of our model in lm-evaluation-harness may hold, and the routers they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drllm.errors import CheckpointError, ConfigError, unknown_name
from drllm.models.base.load import BaseModel
from drllm.models.routers import hub
from drllm.models.routers.checkpoint import CONFIG_FILE, load_routers
from drllm.models.routers.stack import RouterStack

NOT_TAKEN = {
    "parallelize": "load the model on one device a process, and start several with torchrun",
    "peft": "merge the adapter into the base model, or route a PEFT model from Python",
    "delta": "apply the delta and save the model",
    "autogptq": "give a model that transformers loads by itself",
    "gptqmodel": "give a model that transformers loads by itself",
    "gguf_file": "give a folder of safetensors",
    "mixed_precision_dtype": "give dtype=bfloat16",
    "softmax_dtype": "log-probabilities are always computed in float32",
    "backend": "only decoder-only models are routed",
}
"""Arguments of the harness' own class that would have no effect here, and what to do instead."""

PASSED_ON = (
    "add_bos_token",
    "prefix_token_id",
    "truncation",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""Arguments of the harness' own class that keep their meaning."""


def check_names(others: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse arguments beyond those `known` that there aren't, or that would have no effect."""
    for name, value in others.items():
        if name in NOT_TAKEN:
            raise ConfigError(f"{name}={value} has no effect with drllm; {NOT_TAKEN[name]}")
        if name not in PASSED_ON:
            raise ConfigError(unknown_name("model argument", name, {*known, *PASSED_ON}))


def routers_and_base(
    pretrained: str | BaseModel, routers: str | RouterStack | None, base: str | None
) -> tuple[RouterStack | None, str, str | None]:
    """Return the routers, the base model's name, and its revision where the routers name one.

    Args:
        pretrained: A base model, or a folder of routers, which names its base.
        routers: With a base model: its routers.
        base: With a folder of routers: the base model in place of the one that it names.

    Raises:
        ConfigError: Two places for one of them.
        CheckpointError: Routers that are broken, or don't name their base.
    """
    stack = routers if isinstance(routers, RouterStack) else None
    is_folder = isinstance(pretrained, str) and (Path(pretrained) / CONFIG_FILE).is_file()
    if isinstance(routers, str) and not is_folder:
        stack = load_routers(hub.find(Path(routers)))
    if isinstance(pretrained, BaseModel):
        return stack, pretrained.name, None
    if not is_folder:
        if base is not None:
            raise ConfigError(
                f"base={base} has no effect: pretrained={pretrained} is no folder of routers"
                f"{_not_there(pretrained)}; give the base as pretrained and the routers as routers="
            )
        return stack, pretrained, None
    if routers is not None:
        raise ConfigError(
            f"pretrained={pretrained} is a folder of routers, and routers={routers} is given too; "
            f"give the base model as pretrained, or leave routers out"
        )
    stack = load_routers(pretrained)
    config = stack.config
    if base is None and not config.base_model:
        raise CheckpointError(
            f"the routers in {pretrained} don't name their base model; give it as base=MODEL"
        )
    return stack, base or config.base_model, None if base else config.base_revision


def check_windows(pretrained: str | BaseModel, stack: RouterStack | None, num_windows: int) -> None:
    """Refuse a number of windows that isn't the routers' own, or that there are no routers for."""
    if stack is None:
        raise ConfigError(
            f"num_windows={num_windows} needs routers, and pretrained={pretrained} is no folder of "
            f"routers{_not_there(pretrained)}; give their folder, or leave num_windows out"
        )
    if (own := stack.config.num_windows) != num_windows:
        raise CheckpointError(
            f"num_windows is {num_windows}, but these routers were trained with {own}; give "
            f"num_windows={own}, or leave it out"
        )


def _not_there(pretrained: str | BaseModel) -> str:
    """Say that there is no such folder, where a name looks like one: not for an alias."""
    folder = Path(pretrained) if isinstance(pretrained, str) else Path()
    return "" if folder.exists() or len(folder.parts) == 1 else " (there is no such folder)"
