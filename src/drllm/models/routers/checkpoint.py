"""Routers with the base model that they belong to: checked, saved, pushed, loaded.

Owns which base models routers may be attached to, and what a saved checkpoint says of its base.
Leaves the files to `routers` and `folder`, the hub to `hub`, the text for readers
to `card`, opening base models to `loading` and routing to `routed`.

Axes: D hidden, L layers.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from drllm.config import ModelConfig
from drllm.errors import CheckpointError, ConfigError
from drllm.models.base import load as loading
from drllm.models.base.identity import describe
from drllm.models.base.layers import base_of
from drllm.models.routers import hub
from drllm.models.routers.card import FOLDER, MARK, model_card
from drllm.models.routers.folder import CARD_FILE
from drllm.models.routers.stack import RouterConfig, RouterStack


def check_routers(model: Any, routers: RouterStack) -> None:
    """Refuse routers that were made for another model.

    An adapter of PEFT around the model or in it doesn't count, nor does where its weights are.

    Raises:
        CheckpointError: Another class, L, D or fingerprint; the message lists all that differ.
            Another id alone is a warning.
    """
    config = routers.config
    found = describe(model)
    differences = [
        f"{name} {expected}, this model has {value}"
        for name, expected, value in (
            ("base_class", config.base_class, found["class"]),
            ("num_layers", config.num_layers, found["num_layers"]),
            ("hidden_size", config.hidden_size, found["hidden_size"]),
            ("base_fingerprint", config.base_fingerprint, found["fingerprint"]),
        )
        if expected not in ("", value)
    ]
    if differences:
        raise CheckpointError(
            f"these routers were trained for {config.base_model or 'another model'} with "
            f"{', and with '.join(differences)}; load the model they belong to, or train routers "
            f"for this one"
        )
    name = getattr(base_of(model), "name_or_path", "")
    if config.base_model and name and config.base_model != name:
        same = "the weights are the same" if config.base_fingerprint else "they have no fingerprint"
        warnings.warn(
            f"the routers name {config.base_model!r} as their base, the model is {name!r}; {same}",
            stacklevel=3,
        )


def save(routers: RouterStack, model: Any, folder: Path | str) -> None:
    """Save routers with a model card; what their config doesn't say of its base is filled in.

    Args:
        routers: They may have been trained, or made by hand.
        model: The base model that they are attached to.
        folder: Made if need be. Routers that are there are replaced, their card too: all or none.

    Raises:
        CheckpointError: Weights that aren't finite float32 of the right shapes, a folder that
            can't be written, or a README.md in it that isn't a card of routers.
    """
    folder = Path(folder)
    card = folder / CARD_FILE
    if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(
            f"{card} isn't a card of routers and would be replaced by one; save to a folder of "
            f"their own, or move it away"
        )
    config = _described(routers.config, model)
    _with(routers, config).save(folder, card=model_card(config, FOLDER))


def push(routers: RouterStack, model: Any, repo: str, **options: Any) -> str:
    """Push routers with a model card to the hub.

    The name of a base model that only this machine has isn't pushed, and a warning says so: it
    would lead nobody anywhere, and tell how folders are called here.

    Args:
        routers: They may have been trained, or made by hand.
        model: The base model that they are attached to.
        repo: OWNER/NAME.
        options: As for `hub.push`.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: What `save` or the hub refuses.
    """
    config = _described(routers.config, model)
    if config.base_model and _is_local(config.base_model):
        warnings.warn(
            f"{config.base_model!r} is no hub id, so the pushed routers don't name their base "
            f"model; whoever loads them gives it as base=...",
            stacklevel=3,
        )
        config = dataclasses.replace(config, base_model="", base_revision=None)
    with tempfile.TemporaryDirectory(prefix="drllm-routers-") as folder:
        _with(routers, config).save(folder, card=model_card(config, repo))
        return hub.push(Path(folder), repo, **options)


def load(
    place: Path | str,
    base: Any = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[Any, RouterStack, Any]:
    """Load routers, and the base model that they name unless one is given.

    Args:
        place: A folder of routers, or OWNER/NAME on the hub.
        base: The base model, or its id or folder; None takes it from `router_config.json`.
        revision: Of the routers on the hub.
        dtype: Of a base model that is loaded here, as `--dtype`.
        device: Of a base model that is loaded here, as `--device`.

    Returns:
        The base model, the routers, and the tokenizer where the model was loaded here.

    Raises:
        CheckpointError: Routers that are broken or can't be had, or don't name their base.
        ConfigError: A dtype or device for a model that is loaded already; a revision of a folder.
        ModelError: The base model can't be had.
    """
    routers = RouterStack.load(hub.find(place, revision))
    if not (base is None or isinstance(base, (str, Path))):
        for name, value in (("dtype", dtype), ("device", device)):
            if value != "auto":
                raise ConfigError(
                    f"{name}={value!r} has no effect on a base model that is loaded already; "
                    f"leave it out, or give the model's id as base"
                )
        return base, routers, None
    name = str(base or routers.config.base_model)
    if not name:
        raise CheckpointError(
            f"the routers in {place} don't name their base model; give it as base=..."
        )
    base_revision = routers.config.base_revision if base is None else None
    loaded = loading.load(
        ModelConfig(model=name, revision=base_revision, dtype=dtype, device=device)
    )
    return loaded.model, routers, loaded.tokenizer


def _described(config: RouterConfig, model: Any) -> RouterConfig:
    """Fill in what a config doesn't say of its base model."""
    found = describe(model)
    base = base_of(model)
    missing: dict[str, Any] = {
        "base_class": config.base_class or found["class"],
        "base_fingerprint": config.base_fingerprint or found["fingerprint"],
    }
    if not config.base_model:
        missing["base_model"] = getattr(base, "name_or_path", "")
        missing["base_revision"] = getattr(base.config, "_commit_hash", None)
    return dataclasses.replace(config, **missing)


def _with(routers: RouterStack, config: RouterConfig) -> RouterStack:
    """Return the same routers, not copied, under another config."""
    same = copy.copy(routers)
    same.config = config
    return same


def _is_local(name: str) -> bool:
    """Tell whether a base model's name means something on this machine only."""
    if name in loading.ALIASES:
        return False
    return Path(name).expanduser().exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
