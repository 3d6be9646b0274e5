"""Training from features to folders of routers, resumable after every epoch.

Owns what stands in a run's folder: `router_config.json`, `routers.safetensors`, `metrics.jsonl`,
`layers.json`, `README.md`. Leaves the computation to `fit`, the state between epochs to
`checkpoint`, who else is told to `trackers` and the text for readers to `models.checkpoints.card`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drllm.config import TrainConfig
from drllm.errors import ConfigError
from drllm.metrics import Counts
from drllm.models.routers.checkpoint import save_routers
from drllm.records import clear_half_written, write_atomically
from drllm.training import checkpoint
from drllm.training import temperature as calibration
from drllm.training.examples import Examples, digest, each_once
from drllm.training.fit import Fit
from drllm.training.metrics import LAYERS_FILE, against_baselines, layers_file
from drllm.training.plans import Plan
from drllm.training.trackers import check_trackers, forget, tracked

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Run:
    """One of several trainings on the same features.

    Attributes:
        config: Its settings, of one seed.
        output: The folder that receives its routers.
    """

    config: TrainConfig
    output: Path


def unfinished(
    runs: Sequence[Run],
    examples: Examples,
    base_identity: Mapping[str, Any],
    *,
    soft: Tensor | None = None,
) -> list[Run]:
    """Return the runs that no earlier start has finished, to be trained together.

    Where a training was broken off while it wrote its folders, all its runs are returned, those
    whose routers are there already too: its checkpoint is of all of them.

    Args:
        runs: What is wanted.
        examples: As for `train_together`; and so the others.
        base_identity: See there.
        soft: See there.

    Raises:
        CheckpointError: A folder with finished routers of another run.
    """
    missing = [run for run in runs if not checkpoint.is_finished(run.output)]
    begun = checkpoint.settings_in(missing[0].output) if missing else []
    left = [run for run in runs if run in missing or run.config.decisive() in begun]
    targets, base = digest(examples, soft), base_identity["fingerprint"]
    for run in runs:
        if run not in left:
            checkpoint.check_finished(run.output, run.config.decisive(), base, targets)
    return left


def train(
    examples: Examples,
    base_identity: Mapping[str, Any],
    config: TrainConfig,
    output: Path,
    *,
    soft: Tensor | None = None,
    rewards: Sequence[str] = (),
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train all routers of one run and write them to a folder; see `train_together`.

    Returns:
        The lines of `metrics.jsonl`.
    """
    [rows] = train_together(
        examples,
        base_identity,
        [Run(config, output)],
        soft=soft,
        rewards=rewards,
        device=device,
        on_progress=on_progress,
    )
    return rows


def train_together(
    examples: Examples,
    base_identity: Mapping[str, Any],
    runs: Sequence[Run],
    *,
    soft: Tensor | None = None,
    rewards: Sequence[str] = (),
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[dict[str, Any]]]:
    """Train the routers of several runs on the same features and write each run's folder.

    After every epoch a checkpoint of all runs is written to the first one's folder. The same call
    goes on from it and ends with the weights of an unbroken training, bit for bit on the same
    machine with the same number of threads; the checkpoint is removed when all folders are
    written.

    Args:
        examples: What the routers read and what they should decide.
        base_identity: The base model's id, revision, class, num_layers, hidden_size and
            fingerprint; stored with the routers.
        runs: Settings and folders, of one number of windows and one router width.
        soft: `[N, L, C]` from `soft_targets`, for the runs that learn from them.
        rewards: The rewards that the prompts were made for, where known; stored with the routers.
        device: Where the routers are trained; the features stay where they are.
        on_progress: Is told (steps done, steps in all), over all runs, at the start and after each
            step; steps that stopping early spares count as done.

    Returns:
        The lines of each run's `metrics.jsonl`. Those of the training part are counted while
        training: each example before the step that learns from it.

    Raises:
        ConfigError: Settings without effect, runs that can't be trained together, a folder that
            is given twice, features of another number of windows, a loss that is no longer
            finite, or a tracker that isn't known, installed or able to start.
        CheckpointError: A folder can't be written, or holds a checkpoint of another training.
    """
    _check(runs)
    trackers = list(dict.fromkeys(name for run in runs for name in run.config.trackers))
    check_trackers(trackers)
    plans = [Plan.of(examples, run.config, soft) for run in runs]
    fit = Fit(examples, base_identity, plans, device=device)
    for note in dict.fromkeys(note for plan in plans for note in plan.notes()):
        logger.warning("%s", note)
    origin = checkpoint.Origin.of(examples, base_identity, [run.config for run in runs], soft)
    first = runs[0].output
    checkpoint.resume(first, origin, fit)
    for run in runs[1:]:
        checkpoint.make_folder(run.output)
    progress = _Progress(fit, on_progress)
    with tracked(trackers, fit, [run.output for run in runs]) as tracking:
        while fit.active:
            fit.epoch(progress.advance, tracking.step)
            checkpoint.save(first, origin, fit)
            progress.settle()
            tracking.epoch()
            for run, rows in zip(runs, fit.rows, strict=True):
                _write_metrics(run.output, rows)
    for number, run in enumerate(runs):
        _write_metrics(run.output, fit.rows[number])
        parts = fit.evaluate(number)
        layers = json.dumps(layers_file(_kept_epoch(fit, number), parts))
        write_atomically(run.output / LAYERS_FILE, layers + "\n")
        stack = fit.routers(number)
        told = _training(fit, number, parts, origin.targets, examples, rewards)
        confidence = calibration.measure(stack, examples, plans[number])
        if confidence is not None:
            told["calibration"] = confidence.to_dict()
            if run.config.calibrate:
                calibration.fold(stack, confidence.temperature)
        stack.config = dataclasses.replace(stack.config, training=told)
        save_routers(stack, run.output)
        clear_half_written(run.output / METRICS_FILE, run.output / LAYERS_FILE)
    forget(first)
    checkpoint.remove(first)
    return fit.rows


def _check(runs: Sequence[Run]) -> None:
    folders: set[Path] = set()
    for run in runs:
        if run.config.num_seeds != 1:
            raise ConfigError(
                f"--num-seeds is {run.config.num_seeds} for the run in {run.output}; give one run "
                f"for each seed"
            )
        if run.output.resolve() in folders:
            raise ConfigError(f"two runs are to be written to {run.output}; give each its own")
        folders.add(run.output.resolve())


def _training(
    fit: Fit,
    number: int,
    parts: Mapping[str, Counts],
    targets: str,
    examples: Examples,
    rewards: Sequence[str],
) -> dict[str, Any]:
    """Return what the routers' config tells of their training."""
    plan, rows, best = fit.plans[number], fit.rows[number], fit.best[number]
    last, epoch = rows[-1]["epoch"], _kept_epoch(fit, number)
    told: dict[str, Any] = {
        "settings": plan.config.decisive(),
        "targets": targets,
        "steps": last * plan.steps_per_epoch,
        "warmup_steps": plan.schedule.warmup,
        "class_weights": list(plan.class_weights),
        "num_trained": len(plan.once),
        "num_held_out": len(each_once(examples, plan.held_out)),
        "tasks": dict(sorted(Counter(examples.tasks[: examples.num_targets]).items())),
        "rewards": list(rewards),
        "metrics": [row for row in rows if row["epoch"] == epoch],
        "against_baselines": against_baselines(parts),
    }
    return told if best is None else told | {"best_epoch": epoch, "last_epoch": last}


def _kept_epoch(fit: Fit, number: int) -> int:
    """Return the epoch whose weights a run has ended with."""
    best = fit.best[number]
    return int(fit.rows[number][-1]["epoch"]) if best is None else best[0]


class _Progress:
    """Counts steps for whoever wants to be told."""

    def __init__(self, fit: Fit, tell: Callable[[int, int], None] | None) -> None:
        self.fit, self.tell = fit, tell
        self.done = fit.steps_done
        self._say()

    def advance(self, steps: int) -> None:
        """Count steps that were made."""
        self.done += steps
        self._say()

    def settle(self) -> None:
        """Count the steps that stopping early spares, too."""
        if self.done != self.fit.steps_done:
            self.done = self.fit.steps_done
            self._say()

    def _say(self) -> None:
        if self.tell is not None:
            self.tell(self.done, self.fit.steps)


def _write_metrics(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(output / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
