"""Saves routers, loads them, and checks that they belong to a base model.

Axes: D hidden, L layers, H router width.
"""

import dataclasses
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from drllm.errors import CheckpointError, unknown_name
from drllm.model.cards import CARD_FILE
from drllm.model.identity import describe
from drllm.model.layers import unwrap_peft
from drllm.models.routers.card import FOLDER, MARK, write_card
from drllm.models.routers.config import FORMAT_VERSION, RouterConfig, read_config
from drllm.models.routers.files import AUTO_FILE
from drllm.models.routers.places import CONFIG_FILE, WEIGHTS_FILE
from drllm.models.routers.stack import NUM_DECISIONS, RouterStack
from drllm.records.identity import BYPASS, compare_bypass, differ

AUTO_CONTENT = {
    "library_name": "drllm",
    "model_type": "drllm routers, which drllm.RoutedModel.from_pretrained loads",
}
"""The content of `AUTO_FILE`. The Auto classes of transformers can't load routers, and quote the
model type in their error."""
PICKLES = (b"PK\x03\x04", b"\x80")  # the first bytes of files by torch.save and by pickle
BASE_FIELDS = ("base_class", "num_layers", "hidden_size", "base_fingerprint")
"""The fields of a config that must fit the base model."""


def save_routers(
    routers: RouterStack,
    folder: Path | str,
    *,
    config: RouterConfig | None = None,
    place: str = FOLDER,
) -> None:
    """Write config, weights and a model card; the base model is not saved.

    All of these files are replaced, or none. Other files in the folder stay.

    Args:
        routers: The routers.
        folder: Where to write; made if it doesn't exist.
        config: The config to save instead of the routers' own config.
        place: Where the routers will be loaded from, for the card: a folder or a hub id.

    Raises:
        CheckpointError: The weights aren't finite float32 of the right shapes, the folder can't be
            written, or it has a README.md or config.json that doesn't belong to routers.
    """
    folder = Path(folder)
    if config is None:
        config = routers.config
    check_foreign_files(folder)
    tensors = {
        name: weight.detach().cpu().contiguous() for name, weight in routers.state_dict().items()
    }
    problem = _find_weights_problem(tensors, config)
    if problem is not None:
        raise CheckpointError(f"these routers can't be saved: {problem}")
    # Only one note: safetensors writes several notes in an order that varies from run to run.
    notes = {"num_windows": str(config.num_windows)}
    files = {
        WEIGHTS_FILE: to_safetensors(tensors, notes),
        CONFIG_FILE: _encode_config(config),
        CARD_FILE: write_card(config, place).encode(),
        AUTO_FILE: json.dumps(AUTO_CONTENT).encode() + b"\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace_files(folder, files)
    except OSError as error:
        raise CheckpointError(
            f"can't write routers to {folder}: {error.strerror}; "
            f"free some space or choose a folder that you may write to"
        ) from error


def check_foreign_files(folder: Path) -> None:
    """Refuse a folder where a README.md or config.json that isn't ours would be replaced.

    Raises:
        CheckpointError: There is such a file.
    """
    auto_config = folder / AUTO_FILE
    if auto_config.is_file() and b'"drllm"' not in auto_config.read_bytes():
        raise CheckpointError(
            f"{folder} holds a model or something else with a {AUTO_FILE}, which would be "
            f"replaced; save routers to a folder of their own"
        )
    card = folder / CARD_FILE
    if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(
            f"{card} isn't a card of routers and would be replaced; save routers to a folder of "
            f"their own, or move it away"
        )


def _encode_config(config: RouterConfig) -> bytes:
    """Return the content of `router_config.json`."""
    values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    if not config.bypass:
        del values["bypass"]  # so that older versions read the file
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"these routers can't be saved: their config's 'training' isn't JSON ({error})"
        ) from error
    return text.encode() + b"\n"


def _replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, in place of earlier files: all of them, or none.

    All new files are on disk before the first old file is moved, and old files are put back if a
    step fails. The config is moved away first and put in place last. So a process that is killed in
    between leaves a folder that is refused, never a mix of old and new files. The next save that
    succeeds removes the leftovers.
    """
    names = sorted(files, key=lambda name: name == CONFIG_FILE)  # the config last
    mark = uuid.uuid4().hex
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(0, f"{name} in it is a folder")  # `save_routers` adds to it
    with ExitStack() as undo:
        for name in names:
            new = folder / f".{name}.{mark}.new"
            undo.callback(new.unlink, missing_ok=True)
            _write_to_disk(new, files[name])
        for name in reversed(names):  # the config first
            if (folder / name).exists():
                old = (folder / name).replace(folder / f".{name}.{mark}.old")
                undo.callback(old.replace, folder / name)
        for name in names:
            placed = (folder / f".{name}.{mark}.new").replace(folder / name)
            undo.callback(placed.unlink)
        undo.pop_all()
    _remove_leftovers(folder, names)


def _write_to_disk(path: Path, content: bytes) -> None:
    """Write a new file, and wait until it is on disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove_leftovers(folder: Path, names: list[str]) -> None:
    """Remove the files that were replaced, and the files that a killed save left."""
    for name in names:
        for path in folder.glob(f".{name}.*"):
            if path.suffix in (".new", ".old"):
                path.unlink(missing_ok=True)


def load_routers(folder: Path | str) -> RouterStack:
    """Read routers that `save_routers` has written.

    Raises:
        CheckpointError: `read_config` refuses the config, the file is broken, a tensor has another
            shape or dtype or isn't finite, or the weights were saved with another config.
    """
    config = read_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    tensors, notes = _read_weights(path)
    problem = _find_weights_problem(tensors, config)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    num_windows = notes.get("num_windows", str(config.num_windows))
    if num_windows != str(config.num_windows):
        raise CheckpointError(
            f"{path} was saved for num_windows {num_windows}, {CONFIG_FILE} says "
            f"{config.num_windows}; put the config back that belongs to the weights"
        )
    return build_stack(config, tensors)


def build_stack(config: RouterConfig, tensors: Mapping[str, Tensor]) -> RouterStack:
    """Return routers with the weights of a state dict."""
    with torch.device("meta"):  # so that no random weights are drawn
        stack = RouterStack(config)
    stack.load_state_dict(tensors, assign=True)
    return stack


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, and the notes in its header."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {WEIGHTS_FILE}; is it a folder of routers?")
    try:
        with path.open("rb") as file:
            beginning = file.read(4)
    except OSError as error:
        raise CheckpointError(
            f"can't read {path}: {error.strerror}; make the file readable, or train the routers "
            f"again"
        ) from error
    try:
        with safe_open(path, framework="pt") as weights:
            # The tensors are copied. Otherwise they would stay views of the file.
            tensors = {name: weights.get_tensor(name).clone() for name in weights.keys()}  # noqa: SIM118
            return tensors, dict(weights.metadata() or {})
    except (SafetensorError, OSError) as error:
        if beginning.startswith(PICKLES):
            raise CheckpointError(
                f"{path} is a pickle under another name; drllm opens no pickles, since they "
                f"can run any code: save the routers with save_pretrained"
            ) from error
        raise CheckpointError(
            f"{path} is broken or cut off ({error}); train the routers again"
        ) from error


def _find_weights_problem(tensors: Mapping[str, Tensor], config: RouterConfig) -> str | None:
    """Say why weights don't fit a config; return None if they do."""
    L = config.num_layers
    D = config.hidden_size
    H = config.router_width
    shapes = {
        "hidden_weight": [L, H, D],
        "hidden_bias": [L, H],
        "decision_weight": [L, NUM_DECISIONS, H],
        "decision_bias": [L, NUM_DECISIONS],
    }
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        return unknown_name("tensor", unknown[0], shapes)
    for name, shape in shapes.items():
        if name not in tensors:
            return f"lacks the tensor {name!r}; train the routers again"
        problem = _find_problem(name, tensors[name], shape)
        if problem is not None:
            return problem
    return None


def _find_problem(name: str, tensor: Tensor, shape: list[int]) -> str | None:
    """Say what is wrong with a tensor; return None if it is finite float32 of the shape."""
    if list(tensor.shape) != shape:
        return f"{name!r} has shape {list(tensor.shape)}, {CONFIG_FILE} asks for {shape}"
    if tensor.dtype != torch.float32:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{name!r} has dtype {dtype}, expected float32; save routers.float() instead"
    if not torch.isfinite(tensor).all():
        return f"{name!r} holds NaN or infinity; train again"
    return None


def check_routers(
    model: Any,
    routers: RouterStack,
    identity: Mapping[str, Any] | None = None,
    bypass: str = "",
) -> None:
    """Refuse routers that were made for another model; the message lists every difference.

    Routers that were trained with a bypass need it, since it changes the states that they read.

    PEFT adapters and devices don't matter. If only the base model's id differs, a warning says so.

    Args:
        model: The model.
        routers: The routers.
        identity: What `describe` returns for the model, if its weights are in other processes.
        bypass: The hash of the model's bypass; empty for none.
    """
    config = routers.config
    difference = compare_bypass({BYPASS: config.bypass}, {BYPASS: bypass})
    if difference:
        raise CheckpointError(
            f"these routers were trained with {difference}; give the model the same bypass "
            f"(--bypass), or train routers with this one"
        )
    differences = _compare_base(config, identity or describe(model))
    if differences:
        expected = config.base_model or "another model"
        raise CheckpointError(
            f"these routers were trained for {expected} with "
            f"{', and with '.join(differences)}; load the model they belong to, or train routers "
            f"for this one"
        )
    name = getattr(unwrap_peft(model), "name_or_path", "")
    if config.base_model and name and config.base_model != name:
        weights = "they have no fingerprint, so the weights may differ"
        if config.base_fingerprint:
            weights = "the weights are the same"
        warnings.warn(
            f"the routers name {config.base_model!r} as their base, the model is {name!r}; "
            f"{weights}",
            stacklevel=3,  # the caller of `RoutedModel`
        )


def _compare_base(config: RouterConfig, identity: Mapping[str, Any]) -> list[str]:
    """List how a model differs from the base model that a config describes.

    `identity` is what `describe` returns for the model.
    """
    differences = []
    for field in BASE_FIELDS:
        expected = getattr(config, field)
        key = field.removeprefix("base_")
        if expected and differ(key, expected, identity[key], "routers"):
            differences.append(f"{field} {expected}, this model has {identity[key]}")
    return differences


def complete_config(config: RouterConfig, model: Any) -> RouterConfig:
    """Return a config with everything that it may record about the base model.

    What the config records already stays.
    """
    identity = describe(model)
    if not config.base_model:
        base = unwrap_peft(model)
        config = dataclasses.replace(
            config,
            base_model=getattr(base, "name_or_path", ""),
            base_revision=getattr(base.config, "_commit_hash", None),
        )
    return dataclasses.replace(
        config,
        base_class=config.base_class or identity["class"],
        base_fingerprint=config.base_fingerprint or identity["fingerprint"],
    )
