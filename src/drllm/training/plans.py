"""All that is settled about a run before its first step.

Owns how a run's settings and the targets become parts, targets, counts, schedule and objective,
and what is worth telling about them. Leaves the draws to `split`, the formulas to `losses` and
`schedule`, and training to `fit`.

Axes: N targets, L layers, C = 3 decisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drllm.config import TrainConfig
from drllm.errors import ConfigError
from drllm.metrics import NAMES
from drllm.models.routers.stack import NUM_DECISIONS, RouterConfig, RouterStack
from drllm.training.examples import Examples, each_once, shape
from drllm.training.losses import Objective, class_weights, log_priors
from drllm.training.schedule import Schedule
from drllm.training.split import generator, hold_out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """One run.

    Attributes:
        config: Its settings.
        trained: The examples trained on: targets, or targets along several routes.
        held_out: The others.
        once: Those of `trained` that are a target along its own path. Whatever counts labels
            counts these, so that it doesn't change with the number of routes.
        targets: `[N, L, C]` float64: the share of each decision; all in one for a hard label.
        label_counts: `[L][C]`: labels of the target paths trained on.
        class_weights: `[C]`.
        schedule: The rate of each step.
        steps_per_epoch: Steps in an epoch.
    """

    config: TrainConfig
    trained: list[int]
    held_out: list[int]
    once: list[int]
    targets: Tensor
    label_counts: tuple[tuple[int, int, int], ...]
    class_weights: tuple[float, ...]
    schedule: Schedule
    steps_per_epoch: int

    @classmethod
    def of(cls, examples: Examples, config: TrainConfig, soft: Tensor | None = None) -> Plan:
        """Settle a run.

        Args:
            examples: What is trained on.
            config: The settings.
            soft: `[N, L, C]` from `soft_targets`, where there are any.

        Raises:
            ConfigError: A setting without effect, or soft targets without any.
        """
        config.check_effects()
        trained, held_out = hold_out(
            examples.questions, config.validation_fraction, config.seed, examples.num_targets
        )
        once = each_once(examples, trained)
        needs = "--calibrate" if config.calibrate else None
        if config.early_stopping is not None:
            needs = f"--early-stopping {config.early_stopping}"
        if needs is not None and not held_out:
            raise ConfigError(
                f"{needs} has no effect: of {examples.num_targets} targets none is held out to "
                f"measure on; leave it out, or give more targets"
            )
        if config.soft_targets and soft is None:
            raise ConfigError(
                "--soft-targets is on, but no soft targets are given; leave it out, or make the "
                "targets with supervise --path-weights equal"
            )
        targets = one_hot(examples.labels)
        if config.soft_targets and soft is not None:
            targets = soft.double()
        totals = targets[once].sum(dim=(0, 1)).tolist()
        beta = config.beta if config.class_weights == "effective_number" else 0.0
        steps_per_epoch = math.ceil(len(trained) / config.gradient_accumulation)
        return cls(
            config=config,
            trained=trained,
            held_out=held_out,
            once=once,
            targets=targets,
            label_counts=count_labels(examples.labels[once]),
            class_weights=class_weights(totals, beta),
            schedule=Schedule.of(config, steps_per_epoch * config.num_epochs),
            steps_per_epoch=steps_per_epoch,
        )

    def notes(self) -> list[str]:
        """Return what a user should know of the run, one sentence each."""
        found = []
        if self.schedule.warmup != self.config.warmup_steps:
            found.append(
                f"--warmup-steps is {self.config.warmup_steps}, but the run has only "
                f"{self.schedule.steps} steps; warming up for {self.schedule.warmup} instead"
            )
        if len(self.once) == 1:
            found.append("there is only 1 target to train on; the routers will repeat it for all")
        skips, executes, repeats = map(sum, zip(*self.label_counts, strict=True))
        if executes and not skips and not repeats:
            found.append(
                "every target executes every layer, so the routers can only learn the full path"
            )
            return found
        layers, absent = len(self.label_counts), []
        for decision, name in enumerate(NAMES):
            without = sum(counts[decision] == 0 for counts in self.label_counts)
            if without:
                absent.append(f"{name} at {without if without < layers else 'all'} of {layers}")
        if absent:
            found.append(
                f"some decisions are no target at some layers, where they can't be learnt: "
                f"{', '.join(absent)} layers"
            )
        return found


def one_hot(labels: Tensor) -> Tensor:
    """Write labels `[N, L]` as distributions `[N, L, C]` in float64."""
    return F.one_hot(labels, NUM_DECISIONS).double()


def count_labels(labels: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Count how often each decision is the label at each layer: `[N, L]` gives `[L][C]`."""
    counts = [(labels == decision).sum(dim=0).tolist() for decision in range(NUM_DECISIONS)]
    return tuple((skip, execute, repeat) for skip, execute, repeat in zip(*counts, strict=True))


def objective(plans: Sequence[Plan], dtype: torch.dtype, device: torch.device | str) -> Objective:
    """Return what the runs minimise, in a dtype and on a device.

    Priors are those of the targets that a run is trained on.
    """
    offsets = [
        plan.config.logit_adjustment * log_priors(plan.targets[plan.once].sum(dim=0))
        for plan in plans
    ]  # [R][L, C]
    gammas = [plan.config.gamma if plan.config.loss == "focal" else 0.0 for plan in plans]
    weights = torch.tensor([plan.class_weights for plan in plans], dtype=torch.float64)
    return Objective(
        weights=weights.to(dtype).to(device),  # in this order: MPS has no float64
        gammas=torch.tensor(gammas, dtype=dtype, device=device),
        offsets=torch.stack(offsets).to(dtype).to(device),
    )


def new_stack(examples: Examples, plan: Plan, base_identity: Mapping[str, Any]) -> RouterStack:
    """Return untrained routers for the base model, their weights drawn with the run's seed.

    Args:
        examples: For the shapes.
        plan: The run.
        base_identity: The base model's id, revision, class, num_layers, hidden_size and
            fingerprint.

    Raises:
        ConfigError: The features were pooled in another number of windows.
    """
    config = plan.config
    _, L, W, D = shape(examples)
    assert (base_identity["num_layers"], base_identity["hidden_size"]) == (L, D)
    if config.num_windows != W:
        raise ConfigError(
            f"--num-windows is {config.num_windows}, but the features were pooled in {W} windows; "
            f"give {W}, or pool them again"
        )
    described = RouterConfig(
        num_layers=L,
        hidden_size=D,
        num_windows=W,
        router_width=config.router_width,
        base_model=base_identity["id"],
        base_revision=base_identity["revision"],
        base_class=base_identity["class"],
        base_fingerprint=base_identity["fingerprint"],
        label_counts=plan.label_counts,
    )
    return RouterStack(described, generator=generator("weights", config.seed))
