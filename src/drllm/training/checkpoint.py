"""The state of a training between two epochs, and whether another training may resume it.

`checkpoint.safetensors` holds weights and the optimiser's moments; its header says which epoch
they belong to, the metrics so far, and what training made them.

Axes: N examples, L layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drllm.errors import CheckpointError
from drllm.models.routers.checkpoint import WEIGHTS_FILE, read_config
from drllm.training.features import digest, sizes
from drllm.training.trainer import Trainer

CHECKPOINT_FILE = "checkpoint.safetensors"
HEADER = "drllm.training"
SIZES = "feature_sizes"
MOMENTS = ("exp_avg", "exp_avg_sq")
# Pooling the same prompts again may differ in the last bits (threads, another GPU); another prompt
# or base model differs by far more.
SIZES_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Origin:
    """What a training is made of; a checkpoint serves only the training that made it.

    Attributes:
        settings: Those that the routers depend on.
        base: The base model's fingerprint.
        targets: Hash of the questions and their targets.
        sizes: `[N, L]`: mean size of each router's inputs.
    """

    settings: dict[str, Any]
    base: str
    targets: str
    sizes: Tensor

    @classmethod
    def of(cls, trainer: Trainer, base_identity: Mapping[str, Any]) -> Origin:
        """Describe a training."""
        return cls(
            settings=trainer.config.decisive(),
            base=base_identity["fingerprint"],
            targets=digest(trainer.examples),
            sizes=sizes(trainer.examples),
        )


def save(output: Path, origin: Origin, trainer: Trainer) -> None:
    """Replace the folder's checkpoint by the state after an epoch, in whole or not at all.

    Raises:
        CheckpointError: The folder can't be written.
    """
    tensors = {SIZES: origin.sizes}
    for part, by_name in _state(trainer).items():
        tensors |= {f"{part}.{name}": tensor.cpu() for name, tensor in by_name.items()}
    header = {
        "settings": origin.settings,
        "base": origin.base,
        "targets": origin.targets,
        "epochs_done": trainer.epochs_done,
        "best": trainer.best,
        "metrics": trainer.rows,
    }
    path = output / CHECKPOINT_FILE
    temporary = output / f".{CHECKPOINT_FILE}.tmp"
    try:
        save_file(tensors, temporary, metadata={HEADER: json.dumps(header)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"can't write {path}: {error}; free some space or choose a folder that you may write to"
        ) from error


def resume(output: Path, origin: Origin, trainer: Trainer) -> None:
    """Put the state of the folder's checkpoint, if there is one, into a new trainer.

    Raises:
        CheckpointError: The checkpoint is broken, or another training's: the message says what
            differs.
    """
    path = output / CHECKPOINT_FILE
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        differences = _differences(origin, header, tensors[SIZES])
        if not differences:
            _restore(trainer, header, tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is broken; delete it to train from the beginning") from error
    if differences:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differences)}. Choose another output "
            f"folder, or delete the checkpoint to train from the beginning"
        )


def is_finished(output: Path) -> bool:
    """Tell whether a folder holds routers whose training is over."""
    return (output / WEIGHTS_FILE).exists() and not (output / CHECKPOINT_FILE).exists()


def check_finished(output: Path, settings: Mapping[str, Any], base: str, targets: str) -> None:
    """Refuse a folder whose finished routers are of another training.

    Args:
        output: A folder with finished routers.
        settings: Of the training that they should be of.
        base: The base model's fingerprint.
        targets: Hash of the questions and their targets.

    Raises:
        CheckpointError: They are of another one, or can't be read.
    """
    made = read_config(output)
    same = {"settings": settings, "targets": targets}
    known = {name: made.training.get(name) for name in same}
    if known != same or made.base_fingerprint != base:
        raise CheckpointError(
            f"{output} holds trained routers of another run; choose another output folder, or "
            f"delete that one"
        )


def remove(output: Path) -> None:
    """Delete the folder's checkpoint: the training is complete, or can't be resumed."""
    (output / CHECKPOINT_FILE).unlink(missing_ok=True)


def _state(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Return all tensors of a training's state; the moments are 0 before the first step."""
    weights = dict(trainer.stack.named_parameters())
    found = {"weights": {name: weight.detach() for name, weight in weights.items()}}
    for part in MOMENTS:
        found[part] = {
            name: trainer.optimizer.state[weight][part] for name, weight in weights.items()
        }
    return found if trainer.kept is None else {**found, "kept": trainer.kept}


def _restore(trainer: Trainer, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a saved state into a new trainer; KeyError or ValueError if it doesn't fit."""
    weights = dict(trainer.stack.named_parameters())

    def saved(part: str) -> dict[str, Tensor]:
        found = {name: tensors[f"{part}.{name}"] for name in weights}
        for name, tensor in found.items():
            if tensor.shape != weights[name].shape:
                raise ValueError(f"shape {tuple(tensor.shape)} of {name!r}")
        return {name: tensor.to(trainer.device, trainer.dtype) for name, tensor in found.items()}

    moments = {part: saved(part) for part in MOMENTS}
    step = torch.tensor(float(header["epochs_done"] * trainer.steps_per_epoch))
    for name, weight in weights.items():
        state = {part: moments[part][name] for part in MOMENTS}
        trainer.optimizer.state[weight] = {"step": step.clone().to(trainer.device), **state}
    trainer.stack.load_state_dict(saved("weights"))
    best = header["best"]
    trainer.best = None if best is None else (best[0], best[1])
    trainer.kept = None if best is None else saved("kept")
    trainer.epochs_done, trainer.rows = header["epochs_done"], header["metrics"]


def _differences(origin: Origin, header: Mapping[str, Any], found: Tensor) -> list[str]:
    """Name everything in which the checkpoint's training isn't this one."""
    theirs, ours = header["settings"], origin.settings
    differences = [
        f"its --{name.replace('_', '-')} is {theirs.get(name)}, yours {ours.get(name)}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if header["base"] != origin.base:
        differences.append("it was made for another base model")
    if header["targets"] != origin.targets:
        differences.append("it was made from other targets")
    elif found.shape != origin.sizes.shape or not torch.allclose(
        found, origin.sizes, rtol=SIZES_TOLERANCE, atol=0.0
    ):
        differences.append(
            "its features differ (other prompts, or another dtype of the base model)"
        )
    return differences
