"""The state of a training run between two epochs, and whether another run may go on from it.

Owns `checkpoint.safetensors`: weights, the optimiser's moments, and in its header which epoch they
belong to, the metrics so far, and what run made them. One file, so that a kill never leaves halves
of two epochs. Leaves the finished routers to `models.routers`.

Axes: N targets, L layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drllm.config import TrainConfig
from drllm.errors import CheckpointError
from drllm.models.checkpoints.folder import WEIGHTS_FILE
from drllm.models.routers import RouterStack, read_config
from drllm.training.features import Features

CHECKPOINT_FILE = "checkpoint.safetensors"
HEADER = "drllm.training"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
SIZES = "feature_sizes"
# Pooling the same prompts again may differ in the last bits (threads, another GPU); another prompt
# or base model differs by far more.
SIZES_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """What a run is made of; a checkpoint serves only the run that made it.

    Attributes:
        settings: Of the training.
        base: The base model's fingerprint.
        targets: Hash of the questions and their target paths.
        sizes: `[N, L]`: mean size of each router's inputs.
    """

    settings: dict[str, Any]
    base: str
    targets: str
    sizes: Tensor

    @classmethod
    def of(cls, features: Features, base_identity: Mapping[str, Any], config: TrainConfig) -> Run:
        """Describe a run by what is given to `train`."""
        return cls(
            settings=config.to_dict(),
            base=base_identity["fingerprint"],
            targets=features.digest(),
            sizes=features.sizes(),
        )


def save(
    output: Path,
    run: Run,
    stack: RouterStack,
    optimizer: torch.optim.AdamW,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Replace the folder's checkpoint by the present state, at once or not at all.

    Args:
        output: The run's folder.
        run: Whose state it is.
        stack: The routers.
        optimizer: Theirs, after at least one step.
        rows: The metrics so far, of whole epochs.

    Raises:
        CheckpointError: The folder can't be written.
    """
    tensors = {SIZES: run.sizes}
    for name, weight in stack.named_parameters():
        tensors[f"weights.{name}"] = weight.detach().cpu()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[weight][moment].cpu()
    header = {
        "settings": run.settings,
        "base": run.base,
        "targets": run.targets,
        "metrics": list(rows),
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


def resume(
    output: Path, run: Run, stack: RouterStack, optimizer: torch.optim.AdamW
) -> list[dict[str, Any]]:
    """Go on from the folder's checkpoint, if there is one, and make the folder if there isn't.

    Args:
        output: The run's folder.
        run: The run that wants to go on.
        stack: Receives the weights.
        optimizer: Theirs; receives the moments.

    Returns:
        The metrics of the epochs that are done; empty where nothing is.

    Raises:
        CheckpointError: The folder can't be made; the checkpoint is broken, or another run's: the
            message says what differs.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"can't write to {output}: {error.strerror}; choose a folder that you may write to"
        ) from error
    if not os.access(output, os.W_OK):
        raise CheckpointError(
            f"can't write to {output}: permission denied; choose a folder that you may write to"
        )
    path = output / CHECKPOINT_FILE
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rows: list[dict[str, Any]] = header["metrics"]
        _check_names(tensors, stack)
        differences = _differences(run, header, tensors[SIZES])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is broken; delete it to train from the beginning") from error
    if differences:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differences)}. Choose another output "
            f"folder, or delete the checkpoint to train from the beginning"
        )
    with torch.no_grad():
        for name, weight in stack.named_parameters():
            weight.copy_(tensors[f"weights.{name}"])
            optimizer.state[weight] = {
                "step": tensors[f"step.{name}"],
                **{key: tensors[f"{key}.{name}"].to(weight.device) for key in MOMENTS[1:]},
            }
    return rows


def is_finished(output: Path) -> bool:
    """Tell whether a folder holds routers whose training is over."""
    return (output / WEIGHTS_FILE).exists() and not (output / CHECKPOINT_FILE).exists()


def check_finished(output: Path, run: Run) -> None:
    """Refuse the finished routers of another run.

    Args:
        output: A folder with finished routers.
        run: The run that they should be of.

    Raises:
        CheckpointError: They are of another one, or can't be read.
    """
    made = read_config(output)
    same = {"settings": run.settings, "targets": run.targets}
    known = {name: made.training.get(name) for name in same}
    if known != same or made.base_fingerprint != run.base:
        raise CheckpointError(
            f"{output} holds trained routers of another run; choose another output folder, or "
            f"delete that one"
        )


def remove(output: Path) -> None:
    """Delete the folder's checkpoint: the run is complete."""
    (output / CHECKPOINT_FILE).unlink(missing_ok=True)


def _check_names(tensors: Mapping[str, Tensor], stack: RouterStack) -> None:
    """Raise KeyError for a tensor that a checkpoint of these routers would have."""
    for name, _ in stack.named_parameters():
        for part in ("weights", *MOMENTS):
            if f"{part}.{name}" not in tensors:
                raise KeyError(f"{part}.{name}")


def _differences(run: Run, header: Mapping[str, Any], sizes: Tensor) -> list[str]:
    """Name everything in which the checkpoint's run isn't this one."""
    theirs = header["settings"]
    found = [
        f"its --{name.replace('_', '-')} is {theirs.get(name)}, yours {run.settings.get(name)}"
        for name in sorted(theirs.keys() | run.settings.keys())
        if theirs.get(name) != run.settings.get(name)
    ]
    if header["base"] != run.base:
        found.append("it was made for another base model")
    if header["targets"] != run.targets:
        found.append("it was made from other targets")
    elif not torch.allclose(sizes, run.sizes, rtol=SIZES_TOLERANCE, atol=0.0):
        found.append("its features differ (other prompts, or another dtype of the base model)")
    return found
