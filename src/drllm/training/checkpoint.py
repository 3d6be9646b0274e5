"""The state of a training between two epochs, and whether another training may go on from it.

Owns `checkpoint.safetensors`: weights, the optimiser's moments, and in its header which epoch they
belong to, the metrics so far, and what training made them. One file for all runs that are trained
together, so that a kill never leaves halves of two epochs. Leaves the finished routers to
`models.routers`.

Axes: N targets, L layers, R runs.
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
from drllm.models.routers.checkpoint import WEIGHTS_FILE, read_config
from drllm.training.examples import Examples, digest, sizes
from drllm.training.fit import Fit

CHECKPOINT_FILE = "checkpoint.safetensors"
HEADER = "drllm.training"
SIZES = "feature_sizes"
# Pooling the same prompts again may differ in the last bits (threads, another GPU); another prompt
# or base model differs by far more.
SIZES_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Origin:
    """What a training is made of; a checkpoint serves only the training that made it.

    Attributes:
        settings: `[R]`: of each run.
        base: The base model's fingerprint.
        targets: Hash of the questions and their targets.
        sizes: `[N, L]`: mean size of each router's inputs.
    """

    settings: list[dict[str, Any]]
    base: str
    targets: str
    sizes: Tensor

    @classmethod
    def of(
        cls,
        examples: Examples,
        base_identity: Mapping[str, Any],
        configs: Sequence[TrainConfig],
        soft: Tensor | None,
    ) -> Origin:
        """Describe a training by what is given to `train_together`."""
        return cls(
            settings=[config.decisive() for config in configs],
            base=base_identity["fingerprint"],
            targets=digest(examples, soft),
            sizes=sizes(examples),
        )


def save(output: Path, origin: Origin, fit: Fit) -> None:
    """Replace the folder's checkpoint by the present state, at once or not at all.

    Args:
        output: The first run's folder.
        origin: Whose state it is.
        fit: After an epoch.

    Raises:
        CheckpointError: The folder can't be written.
    """
    tensors = {SIZES: origin.sizes}
    for part, by_name in _parts(fit).items():
        tensors |= {f"{part}.{name}": tensor.cpu() for name, tensor in by_name.items()}
    header = {
        "settings": origin.settings,
        "base": origin.base,
        "targets": origin.targets,
        "epochs_done": fit.epochs_done,
        "active": fit.active,
        "best": fit.best,
        "metrics": fit.rows,
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


def resume(output: Path, origin: Origin, fit: Fit) -> None:
    """Go on from the folder's checkpoint, if there is one, and make the folder if there isn't.

    Args:
        output: The first run's folder.
        origin: The training that wants to go on.
        fit: New; receives the state.

    Raises:
        CheckpointError: The folder can't be made; the checkpoint is broken, or another training's:
            the message says what differs.
    """
    make_folder(output)
    path = output / CHECKPOINT_FILE
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        differences = _differences(origin, header, tensors[SIZES])
        if not differences:
            _restore(fit, header, tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is broken; delete it to train from the beginning") from error
    if differences:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differences)}. Choose another output "
            f"folder, or delete the checkpoint to train from the beginning"
        )


def make_folder(output: Path) -> None:
    """Make a folder unless it is there, and see that it can be written.

    Raises:
        CheckpointError: It can't.
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


def is_finished(output: Path) -> bool:
    """Tell whether a folder holds routers whose training is over."""
    return (output / WEIGHTS_FILE).exists() and not (output / CHECKPOINT_FILE).exists()


def check_finished(output: Path, settings: Mapping[str, Any], base: str, targets: str) -> None:
    """Refuse the finished routers of another run.

    Args:
        output: A folder with finished routers.
        settings: Of the run that they should be of.
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


def settings_in(output: Path) -> list[dict[str, Any]]:
    """Return the settings of the runs whose checkpoint a folder holds; none where it holds none.

    A broken checkpoint counts as none here; `resume` refuses it.
    """
    try:
        with safe_open(output / CHECKPOINT_FILE, framework="pt") as file:
            settings = json.loads(file.metadata()[HEADER])["settings"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return []
    return settings if isinstance(settings, list) else []


def remove(output: Path) -> None:
    """Delete the folder's checkpoint: the training is complete."""
    (output / CHECKPOINT_FILE).unlink(missing_ok=True)


def _parts(fit: Fit) -> dict[str, Mapping[str, Tensor]]:
    """Return all tensors of a fit's state: of the active runs together, kept ones by run."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "weights": fit.weights,
        "exp_avg": fit.optimizer.means,
        "exp_avg_sq": fit.optimizer.squares,
    }
    return parts | {f"kept.{run}": weights for run, weights in fit.kept.items()}


def _restore(fit: Fit, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a saved state into a new fit; KeyError or ValueError where it doesn't fit."""
    fit.rows, fit.epochs_done = header["metrics"], header["epochs_done"]
    fit.best = [None if best is None else (best[0], best[1]) for best in header["best"]]
    like = dict(fit.weights)
    fit.optimizer.keep([fit.active.index(run) for run in header["active"]])
    fit.active = header["active"]
    kept = {int(name.split(".")[1]) for name in tensors if name.startswith("kept.")}
    fit.kept = {
        run: {
            name: _of_shape(tensors[f"kept.{run}.{name}"], weight[0]).to(weight.device)
            for name, weight in like.items()
        }
        for run in kept
    }
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        for name, present in _parts(fit)[part].items():
            present.copy_(_of_shape(tensors[f"{part}.{name}"], present))


def _of_shape(found: Tensor, wanted: Tensor) -> Tensor:
    if found.shape != wanted.shape:
        raise ValueError(f"shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
    return found


def _differences(origin: Origin, header: Mapping[str, Any], found: Tensor) -> list[str]:
    """Name everything in which the checkpoint's training isn't this one."""
    if not isinstance(header["settings"], list):
        raise TypeError("one run's settings, as an older version has left them")
    theirs, ours = len(header["settings"]), len(origin.settings)
    if theirs != ours:
        return [f"it trains {theirs} run{'s' * (theirs != 1)} together, yours {ours}"]
    differences = [
        f"its --{name.replace('_', '-')} is {one.get(name)}, yours {other.get(name)}"
        for one, other in zip(header["settings"], origin.settings, strict=True)
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
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
    return list(dict.fromkeys(differences))
