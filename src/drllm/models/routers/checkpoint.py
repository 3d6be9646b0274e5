"""Saved routers: `router_config.json`, `routers.safetensors` and a model card, and whose they are.

Files are written all at once and read without trusting what they hold. Routers are checked against
the base model that they are attached to.

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

from drllm.errors import CheckpointError, ConfigError, RecordError, unknown_name
from drllm.models.base.identity import describe
from drllm.models.base.layers import base_of
from drllm.models.routers.card import FOLDER, MARK, model_card
from drllm.models.routers.stack import NUM_DECISIONS, RouterConfig, RouterStack
from drllm.records.codec import read_json
from drllm.records.identity import differ

FORMAT_VERSION = 1
CONFIG_FILE = "router_config.json"
WEIGHTS_FILE = "routers.safetensors"
CARD_FILE = "README.md"
COUNTED_FILE = "config.json"  # the file that the hub counts downloads by; nothing else reads it
COUNTED = b'{"library_name": "drllm"}\n'
PICKLES = (b"PK\x03\x04", b"\x80")  # how torch.save and pickle begin a file


def save_routers(
    routers: RouterStack,
    folder: Path | str,
    *,
    config: RouterConfig | None = None,
    place: str = FOLDER,
) -> None:
    """Write config, weights and a model card; the base model is not saved.

    All files are replaced or none is; what else lies in the folder stays there. `config` is saved
    instead of the routers' own; `place` is from where they will be loaded, for the card. Weights
    that aren't finite float32 of the right shapes, a folder that can't be written, and a README.md
    or config.json in it that isn't of routers are a CheckpointError.
    """
    folder, config = Path(folder), config or routers.config
    card, counted = folder / CARD_FILE, folder / COUNTED_FILE
    if counted.is_file() and b'"drllm"' not in counted.read_bytes():
        raise CheckpointError(
            f"{folder} holds a model or something else with a {COUNTED_FILE}, which would be "
            f"replaced; save routers to a folder of their own"
        )
    if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(
            f"{card} isn't a card of routers and would be replaced by one; save to a folder of "
            f"their own, or move it away"
        )
    tensors = {name: w.detach().cpu().contiguous() for name, w in routers.state_dict().items()}
    if misfit := _misfit(tensors, config):
        raise CheckpointError(f"these routers can't be saved: {misfit}")
    values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    try:
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"these routers can't be saved: their config's 'training' isn't JSON ({error})"
        ) from error
    # One note only: safetensors writes several in an order that varies from run to run.
    notes = {"num_windows": str(config.num_windows)}
    files = {
        WEIGHTS_FILE: to_safetensors(tensors, notes),
        CONFIG_FILE: text.encode(),
        CARD_FILE: model_card(config, place).encode(),
        COUNTED_FILE: COUNTED,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder, files)
    except OSError as error:
        raise CheckpointError(
            f"can't write routers to {folder}: {error.strerror}; "
            f"free some space or choose a folder that you may write to"
        ) from error


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, replacing those that are there: all of them, or none.

    Everything is on the disk before the first of the earlier files is touched, and these are put
    back if a later step fails. While they change places the config is away, so that a process
    killed in between leaves a folder that is refused, never one of two halves; the next save that
    succeeds removes what it left.
    """
    names, mark = sorted(files, key=lambda name: name == CONFIG_FILE), uuid.uuid4().hex
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(0, f"{name} in it is a folder")
    with ExitStack() as undo:
        for name in names:
            new = folder / f".{name}.{mark}.new"
            undo.callback(new.unlink, missing_ok=True)
            with new.open("xb") as file:
                file.write(files[name])
                file.flush()
                os.fsync(file.fileno())
        for name in reversed(names):  # the config first
            if (folder / name).exists():
                old = (folder / name).replace(folder / f".{name}.{mark}.old")
                undo.callback(old.replace, folder / name)
        for name in names:  # and the config last
            placed = (folder / f".{name}.{mark}.new").replace(folder / name)
            undo.callback(placed.unlink)
        undo.pop_all()
    for name in names:
        for left in folder.glob(f".{name}.*"):  # and what a save that was killed left behind
            if left.suffix in (".new", ".old"):
                left.unlink(missing_ok=True)


def load_routers(folder: Path | str) -> RouterStack:
    """Read routers that `save_routers` has written.

    What `read_config` refuses, a broken file, tensors of another shape or dtype, values that aren't
    finite, and weights that were saved with another config are a CheckpointError.
    """
    path, config = Path(folder) / WEIGHTS_FILE, read_config(folder)
    tensors, notes = _read_weights(path)
    if misfit := _misfit(tensors, config):
        raise CheckpointError(f"{path}: {misfit}")
    saved_for = notes.get("num_windows", str(config.num_windows))
    if saved_for != str(config.num_windows):
        raise CheckpointError(
            f"{path} was saved for num_windows {saved_for}, {CONFIG_FILE} says "
            f"{config.num_windows}; put the config back that belongs to the weights"
        )
    return stack_of(config, tensors)


def stack_of(config: RouterConfig, tensors: Mapping[str, Tensor]) -> RouterStack:
    """Return routers with these weights."""
    with torch.device("meta"):  # no weights are drawn only to be replaced
        stack = RouterStack(config)
    stack.load_state_dict(tensors, assign=True)
    return stack


def read_config(folder: Path | str) -> RouterConfig:
    """Read the `router_config.json` of a routers folder, or refuse it by a CheckpointError."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(_no_config(path.parent))
    try:
        values = read_json(path, dict[str, Any])
    except RecordError as error:
        raise CheckpointError(f"{error}; train the routers again") from error
    version = values.pop("format_version", None)
    if type(version) is not int or version < 1:  # True is an int too
        raise CheckpointError(
            f"{path}: 'format_version' is {version!r}; expected a whole number from 1 to "
            f"{FORMAT_VERSION}; is it the config of routers?"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this drllm reads up to {FORMAT_VERSION}; "
            f"install a newer drllm"
        )
    fields = [declared.name for declared in dataclasses.fields(RouterConfig)]
    for name in (*values, *fields):
        if name not in fields:
            raise CheckpointError(f"{path}: " + unknown_name("key", name, fields))
        if name not in values:
            raise CheckpointError(f"{path} lacks the key {name!r}; train the routers again")
    try:
        return RouterConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _no_config(folder: Path) -> str:
    """Say what is given instead of a folder of routers, and what may have been meant."""
    if folder.is_file():
        return f"{folder} is a file; give the folder of routers that holds {CONFIG_FILE}"
    lacks, give = f"{folder} has no {CONFIG_FILE}", "give a folder that 'drllm train' has written"
    if (folder / "routers" / CONFIG_FILE).is_file():
        return f"{lacks}; did you mean {folder / 'routers'}?"
    if (folder / "config.json").is_file():
        return f"{lacks}; is it a base model? Then give it as --model"
    if not folder.exists():
        return f"{lacks}, since it doesn't exist; {give}"
    return f"{lacks}; {give}" if any(folder.iterdir()) else f"{lacks}, since it is empty; {give}"


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {WEIGHTS_FILE}; is it a folder of routers?")
    try:
        with safe_open(path, framework="pt") as file:
            # Copied, since the tensors would otherwise be a view of the file for ever.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        with path.open("rb") as raw:
            if raw.read(4).startswith(PICKLES):
                raise CheckpointError(
                    f"{path} is a pickle under another name; drllm opens no pickles, since they "
                    f"can run any code: save the routers with save_pretrained"
                ) from error
        raise CheckpointError(
            f"{path} is broken or cut off ({error}); train the routers again"
        ) from error


def _misfit(tensors: Mapping[str, Tensor], config: RouterConfig) -> str | None:
    """Say in what weights aren't those of routers with this config; None where they are."""
    L, D, H = config.num_layers, config.hidden_size, config.router_width
    expected = {
        "hidden_weight": [L, H, D],
        "hidden_bias": [L, H],
        "decision_weight": [L, NUM_DECISIONS, H],
        "decision_bias": [L, NUM_DECISIONS],
    }
    for name in sorted(tensors.keys() - expected.keys()):
        return unknown_name("tensor", name, expected)
    for name, shape in expected.items():
        if name not in tensors:
            return f"lacks the tensor {name!r}; train the routers again"
        found = tensors[name]
        if list(found.shape) != shape:
            return f"{name!r} has shape {list(found.shape)}, {CONFIG_FILE} asks for {shape}"
        if found.dtype != torch.float32:
            dtype = str(found.dtype).removeprefix("torch.")
            return f"{name!r} has dtype {dtype}, expected float32; save routers.float() instead"
        if not torch.isfinite(found).all():
            return f"{name!r} holds NaN or infinity; train again"
    return None


def check_routers(model: Any, routers: RouterStack) -> None:
    """Refuse routers that were made for another model, by a message that lists all that differs.

    An adapter of PEFT around the model or in it doesn't count, nor does where its weights are.
    Another id alone is a warning.
    """
    config, found = routers.config, describe(model)
    differences = [
        f"{name} {said}, this model has {found[key]}"
        for name in ("base_class", "num_layers", "hidden_size", "base_fingerprint")
        if (said := getattr(config, name))
        and differ(key := name.removeprefix("base_"), said, found[key], "routers")
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


def described(config: RouterConfig, model: Any) -> RouterConfig:
    """Fill in what a config doesn't say of its base model."""
    found, base = describe(model), base_of(model)
    if not config.base_model:
        name, commit = getattr(base, "name_or_path", ""), getattr(base.config, "_commit_hash", None)
        config = dataclasses.replace(config, base_model=name, base_revision=commit)
    return dataclasses.replace(
        config,
        base_class=config.base_class or found["class"],
        base_fingerprint=config.base_fingerprint or found["fingerprint"],
    )
