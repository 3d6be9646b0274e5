"""The state of a training between two epochs, and whether another training may resume it.

`checkpoint.safetensors` holds weights and the optimiser's moments; its header says which epoch
they belong to, the metrics so far, and which training made them.
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
HEADER = "drllm.training"
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    identity: dict[str, Any]
    epochs_done: int
    best: tuple[int, float] | None
    metrics: list[dict[str, Any]]


def identity_of(
    config: TrainConfig, base_identity: Mapping[str, Any], targets: str
) -> dict[str, Any]:
    """Return what must be equal for two trainings of one seed to be the same one."""
    return {
        "settings": config.decisive(),
        "base_model": base_identity["fingerprint"],
        "targets_or_base_dtype_sha256": targets,
    }


def save(output: Path, identity: Mapping[str, Any], trainer: Trainer) -> None:
    """Replace the folder's checkpoint by the state after an epoch, in whole or not at all."""
    weights = dict(trainer.stack.named_parameters())
    state: dict[str, Mapping[str, Tensor]] = {"weights": weights, "kept": trainer.kept or {}}
    for part in MOMENTS:
        state[part] = {name: trainer.optimizer.state[w][part] for name, w in weights.items()}
    tensors: dict[str, Tensor] = {}
    for part, named in state.items():
        tensors |= {f"{part}.{name}": tensor.detach().cpu() for name, tensor in named.items()}
    header = _Header(
        identity=dict(identity),
        epochs_done=trainer.epochs_done,
        best=trainer.best,
        metrics=trainer.rows,
    )
    data = to_safetensors(tensors, {HEADER: encode(header).decode()})
    try:
        write_atomically(output / CHECKPOINT_FILE, data)
    except RecordError as error:
        raise CheckpointError(str(error)) from error


def resume(output: Path, identity: Mapping[str, Any], trainer: Trainer) -> None:
    """Put the state of the folder's checkpoint, if there is one, into a new trainer."""
    path = output / CHECKPOINT_FILE
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            header = decode(file.metadata()[HEADER], _Header, str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = differences(header.identity, identity)
        if not found:
            _restore(trainer, header, tensors)
    except (SafetensorError, OSError, RecordError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is broken; delete it to train from the beginning") from error
    if found:
        raise CheckpointError(
            f"{path} belongs to another run, made with {'; '.join(found)}. Choose another output "
            f"folder, or delete the checkpoint to train from the beginning"
        )


def is_finished(output: Path) -> bool:
    """Tell whether a folder holds routers whose training is over."""
    return (output / WEIGHTS_FILE).exists() and not (output / CHECKPOINT_FILE).exists()


def is_done(output: Path, identity: Mapping[str, Any]) -> bool:
    """Tell whether a folder holds the finished routers of a training; refuse those of another."""
    if not is_finished(output):
        return False
    made = read_config(output)
    known = {
        "settings": made.training.get("settings"),
        "base_model": made.base_fingerprint,
        "targets_or_base_dtype_sha256": made.training.get("targets"),
    }
    if found := differences(known, identity):
        raise CheckpointError(
            f"{output} holds trained routers of another run, made with {'; '.join(found)}; choose "
            f"another output folder, or delete that one"
        )
    return True


def _restore(trainer: Trainer, header: _Header, tensors: Mapping[str, Tensor]) -> None:
    """Put a saved state into a new trainer; KeyError or ValueError if it doesn't fit."""
    weights = dict(trainer.stack.named_parameters())

    def saved(part: str) -> dict[str, Tensor]:
        found = {name: tensors[f"{part}.{name}"] for name in weights}
        for name, tensor in found.items():
            if tensor.shape != weights[name].shape:
                raise ValueError(f"shape {tuple(tensor.shape)} of {name!r}")
        return {name: tensor.to(trainer.device, trainer.dtype) for name, tensor in found.items()}

    moments = {part: saved(part) for part in MOMENTS}
    step = torch.tensor(float(header.epochs_done * trainer.steps_per_epoch))
    for name, weight in weights.items():
        state = {part: moments[part][name] for part in MOMENTS}
        trainer.optimizer.state[weight] = {"step": step.clone().to(trainer.device), **state}
    trainer.stack.load_state_dict(saved("weights"))
    trainer.best, trainer.kept = header.best, saved("kept") if header.best else None
    trainer.epochs_done, trainer.rows = header.epochs_done, header.metrics
