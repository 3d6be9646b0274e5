"""Save the state of a training after each epoch, and resume the training from it.

`checkpoint.safetensors` holds the routers' weights and the moments of AdamW. The metadata of the
file hold the number of finished epochs, the metrics so far, and the identity of the training.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from drllm.records.codec import decode, encode, write_atomically
from drllm.records.identity import BYPASS
from drllm.statistics.ranges import Count
from drllm.training import CHECKPOINT_FILE, is_finished
from drllm.training.trainer import Trainer
from drllm.work.store import differences

HEADER = "drllm.training"  # the key of the header in the file's metadata
TARGETS = "targets_or_base_dtype_sha256"  # the key of the training set's hash in an identity
# A tensor in the file is named PART.NAME: the part of the state, and the name of the weight.
WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The tensors that the optimiser keeps for each weight, under its own names for them."""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds besides tensors; it is stored as JSON."""

    identity: dict[str, Any]
    epochs_done: Count
    metrics: list[dict[str, Any]]


def make_identity(
    config: TrainConfig, base_identity: Mapping[str, Any], targets_digest: str | None = None
) -> dict[str, Any]:
    """Return the values that identify a training; files with other values aren't resumed.

    Args:
        config: The settings.
        base_identity: Identity of the base model.
        targets_digest: `Features.digest`, a hash of the training set. None if it isn't known yet;
            training sets then aren't compared.
    """
    identity = {
        "settings": config.decisive(),
        "base_model": base_identity["fingerprint"],
        BYPASS: base_identity.get(BYPASS),
    }
    if targets_digest is not None:
        identity[TARGETS] = targets_digest
    return identity


def save_checkpoint(output: Path, identity: Mapping[str, Any], trainer: Trainer) -> None:
    """Write the trainer's state after an epoch; this atomically replaces an earlier checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, weight in trainer.stack.named_parameters():
        tensors[f"{WEIGHTS}.{name}"] = weight.detach().cpu()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = trainer.optimizer.state[weight][moment].cpu()
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

    Args:
        output: The routers' folder.
        identity: The result of `make_identity` for this training.
        trainer: A trainer that hasn't made a step yet.

    Raises:
        CheckpointError: The checkpoint is broken, or belongs to another training.
    """
    path = output / CHECKPOINT_FILE
    if not path.exists():
        return
    with _name_broken_file(path):
        header = _read_header(path)
    _refuse_other_checkpoint(path, header, identity)
    with _name_broken_file(path):
        _restore(trainer, header, _read_tensors(path))


def is_done(output: Path, identity: Mapping[str, Any]) -> bool:
    """Tell whether a folder holds the finished routers of this training; nothing is changed.

    Args:
        output: The routers' folder.
        identity: The result of `make_identity` for this training.

    Raises:
        CheckpointError: The folder holds another training, whether finished or not.
    """
    path = output / CHECKPOINT_FILE
    if path.exists():
        with _name_broken_file(path):
            header = _read_header(path)
        _refuse_other_checkpoint(path, header, identity)
        return False
    if not is_finished(output):
        return False
    config = read_config(output)
    stored = {
        "settings": config.training.get("settings"),
        "base_model": config.base_fingerprint,
        BYPASS: config.bypass or None,
        TARGETS: config.training.get("targets"),
    }
    different_values = _compare(stored, identity)
    if different_values:
        raise CheckpointError(
            f"{output} holds trained routers of another run, made with "
            f"{'; '.join(different_values)}; choose another output folder, or delete this one"
        )
    return True


def _refuse_other_checkpoint(path: Path, header: _Header, identity: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another training."""
    different_values = _compare(header.identity, identity)
    if different_values:
        raise CheckpointError(
            f"{path} belongs to another run, made with {'; '.join(different_values)}; choose "
            f"another output folder, or delete the checkpoint to train from the beginning"
        )


def _compare(stored: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Say in words where two identities differ; see `make_identity`."""
    if TARGETS not in identity:
        stored = {name: value for name, value in stored.items() if name != TARGETS}
    return differences(stored, identity)


@contextmanager
def _name_broken_file(path: Path) -> Iterator[None]:
    """Turn the errors of a broken checkpoint into a CheckpointError that names the file."""
    try:
        yield
    except (SafetensorError, OSError, RecordError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is broken; delete it to train from the beginning") from error


def _read_header(path: Path) -> _Header:
    """Return the header of a checkpoint, without its tensors."""
    with safe_open(path, framework="pt") as file:
        return decode(file.metadata()[HEADER], _Header, str(path))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their names in the file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _restore(trainer: Trainer, header: _Header, tensors: Mapping[str, Tensor]) -> None:
    """Copy a saved state into a new trainer; raise KeyError or ValueError if it doesn't fit."""
    # All is checked before the trainer changes.
    _check_epochs(header, trainer.config.num_epochs)
    weights = _select_tensors(trainer, tensors, WEIGHTS)
    moments = {moment: _select_tensors(trainer, tensors, moment) for moment in MOMENTS}

    num_steps = torch.tensor(float(header.epochs_done * trainer.steps_per_epoch))
    for name, weight in trainer.stack.named_parameters():
        state = {moment: moments[moment][name] for moment in MOMENTS}
        state["step"] = num_steps.clone().to(trainer.device)  # AdamW counts steps for each weight
        trainer.optimizer.state[weight] = state
    trainer.stack.load_state_dict(weights)
    trainer.epochs_done = header.epochs_done
    trainer.metrics = header.metrics


def _check_epochs(header: _Header, num_epochs: int) -> None:
    """Raise ValueError if the metrics aren't of the finished epochs, or there are too many."""
    if header.epochs_done > num_epochs:
        raise ValueError(f"{header.epochs_done} of {num_epochs} epochs are done")
    epochs = {row["epoch"] for row in header.metrics}
    if epochs != set(range(1, header.epochs_done + 1)):
        raise ValueError(f"metrics of the epochs {epochs}, but {header.epochs_done} are done")


def _select_tensors(
    trainer: Trainer, tensors: Mapping[str, Tensor], part: str
) -> dict[str, Tensor]:
    """Return one part of a checkpoint, `WEIGHTS` or a moment, by the names of the weights.

    The tensors are on the trainer's device. They must be finite, and have the trainer's dtype.
    """
    selected = {}
    for name, weight in trainer.stack.named_parameters():
        tensor = tensors[f"{part}.{name}"]
        if tensor.shape != weight.shape:
            raise ValueError(f"shape {tuple(tensor.shape)} of {name!r}")
        if tensor.dtype != trainer.dtype or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} isn't made of finite numbers of {trainer.dtype}")
        selected[name] = tensor.to(trainer.device)
    return selected
