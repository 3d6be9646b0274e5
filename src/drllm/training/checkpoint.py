"""Saves the state of a training after each epoch, and resumes the same training from it.

`checkpoint.safetensors` holds weights and the optimiser's moments. Its header holds the number of
finished epochs, the metrics so far, and the identity of the training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from drllm.config import TrainConfig
from drllm.errors import CheckpointError, RecordError
from drllm.models.routers.config import read_config
from drllm.models.routers.files import WEIGHTS_FILE
from drllm.records.codec import decode, encode, write_atomically
from drllm.records.resume import differences
from drllm.training.trainer import Trainer

CHECKPOINT_FILE = "checkpoint.safetensors"
HEADER = "drllm.training"  # the header's name in the file's metadata
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What the optimiser keeps for each weight, besides the number of steps."""
WEIGHTS = "weights"  # the prefix of the routers' weights in the file


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a checkpoint."""

    identity: dict[str, Any]
    epochs_done: int
    metrics: list[dict[str, Any]]


def make_identity(
    config: TrainConfig, base_identity: Mapping[str, Any], targets_digest: str
) -> dict[str, Any]:
    """Return the values by which a training recognises its own files."""
    return {
        "settings": config.decisive(),
        "base_model": base_identity["fingerprint"],
        "targets_or_base_dtype_sha256": targets_digest,
    }


def save_checkpoint(output: Path, identity: Mapping[str, Any], trainer: Trainer) -> None:
    """Replace the folder's checkpoint atomically with the state after an epoch."""
    tensors: dict[str, Tensor] = {}
    for name, weight in trainer.stack.named_parameters():
        tensors[f"{WEIGHTS}.{name}"] = weight
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = trainer.optimizer.state[weight][moment]
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    header = _Header(
        identity=dict(identity),
        epochs_done=trainer.epochs_done,
        metrics=trainer.metrics,
    )
    content = to_safetensors(tensors, {HEADER: encode(header).decode()})
    try:
        write_atomically(output / CHECKPOINT_FILE, content)
    except RecordError as error:
        raise CheckpointError(str(error)) from error


def resume_training(output: Path, identity: Mapping[str, Any], trainer: Trainer) -> None:
    """Restore a new trainer from the folder's checkpoint, if there is one.

    Raises:
        CheckpointError: The checkpoint is broken, or belongs to another training.
    """
    path = output / CHECKPOINT_FILE
    if not path.exists():
        return
    try:
        header, tensors = _read_checkpoint(path)
        changes = differences(header.identity, identity)
        if not changes:
            _restore(trainer, header, tensors)
    except (SafetensorError, OSError, RecordError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is broken; delete it to train from the beginning") from error
    if changes:
        raise CheckpointError(
            f"{path} belongs to another run, made with {'; '.join(changes)}. Choose another output "
            f"folder, or delete the checkpoint to train from the beginning"
        )


def is_finished(output: Path) -> bool:
    """Tell whether a folder holds routers whose training has ended."""
    return (output / WEIGHTS_FILE).exists() and not (output / CHECKPOINT_FILE).exists()


def is_done(output: Path, identity: Mapping[str, Any]) -> bool:
    """Tell whether a folder holds this training's finished routers; refuse another training's."""
    if not is_finished(output):
        return False
    config = read_config(output)
    stored = {
        "settings": config.training.get("settings"),
        "base_model": config.base_fingerprint,
        "targets_or_base_dtype_sha256": config.training.get("targets"),
    }
    changes = differences(stored, identity)
    if changes:
        raise CheckpointError(
            f"{output} holds trained routers of another run, made with {'; '.join(changes)}; "
            f"choose another output folder, or delete that one"
        )
    return True


def _read_checkpoint(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        header = decode(file.metadata()[HEADER], _Header, str(path))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return header, tensors


def _restore(trainer: Trainer, header: _Header, tensors: Mapping[str, Tensor]) -> None:
    """Copy a saved state into a new trainer; raise KeyError or ValueError if it doesn't fit."""
    weights = _select_tensors(trainer, tensors, WEIGHTS)
    moments = {moment: _select_tensors(trainer, tensors, moment) for moment in MOMENTS}

    num_steps = torch.tensor(float(header.epochs_done * trainer.steps_per_epoch))
    for name, weight in trainer.stack.named_parameters():
        state = {moment: moments[moment][name] for moment in MOMENTS}
        state["step"] = num_steps.clone().to(trainer.device)
        trainer.optimizer.state[weight] = state
    trainer.stack.load_state_dict(weights)
    trainer.epochs_done = header.epochs_done
    trainer.metrics = header.metrics


def _select_tensors(
    trainer: Trainer, tensors: Mapping[str, Tensor], part: str
) -> dict[str, Tensor]:
    """Return one part of a checkpoint: a tensor for each weight, on the training's device."""
    selected = {}
    for name, weight in trainer.stack.named_parameters():
        tensor = tensors[f"{part}.{name}"]
        if tensor.shape != weight.shape:
            raise ValueError(f"shape {tuple(tensor.shape)} of {name!r}")
        selected[name] = tensor.to(trainer.device, trainer.dtype)
    return selected
