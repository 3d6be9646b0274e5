"""Training the routers on pooled features: all layers together, resumable after every epoch.

Owns the split into trained and held-out targets, the schedule, the epochs, and the folder that
comes out: `router_config.json`, `routers.safetensors`, `metrics.jsonl`, `README.md`. Leaves the
objective to `losses`, the numbers reported to `metrics`, the state between epochs to `checkpoint`
and the text for readers to `models.card`.

Axes: N targets, B rows of a step, D hidden, L layers, W windows, C = 3 decisions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drllm.config import TrainConfig
from drllm.errors import ConfigError
from drllm.models.checkpoints.card import model_card
from drllm.models.routers import NUM_DECISIONS, RouterConfig, RouterStack
from drllm.records import question_key, write_atomically
from drllm.training import checkpoint
from drllm.training.features import Features
from drllm.training.losses import class_weights, focal_loss
from drllm.training.metrics import Counts, count, ratios

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
FEWEST_TO_HOLD_OUT = 10
WARMUP_SHARE = 0.1
EVALUATION_ROWS = 32


def train(
    features: Features,
    base_identity: Mapping[str, Any],
    config: TrainConfig,
    output: Path,
    *,
    rewards: Sequence[str] = (),
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train all routers and write them to a folder.

    After every epoch a checkpoint is written there. The same call on the same folder goes on
    from it and ends with the weights of an unbroken run, bit for bit on the same machine with the
    same number of threads; the checkpoint is removed at the end.

    Args:
        features: What the routers read and what they should decide.
        base_identity: The base model's id, revision, class, num_layers, hidden_size and
            fingerprint; stored with the routers.
        config: The settings.
        output: The folder that receives the routers.
        rewards: The rewards that the prompts were made for, where known; stored with the routers.
        device: Where the routers are trained; the features stay where they are.
        on_progress: Is told (steps done, steps in all) at the start and after each step.

    Returns:
        The lines of `metrics.jsonl`. Those of the training part are counted while training: each
        example before the step that learns from it.

    Raises:
        ConfigError: Features of another number of windows, or a loss that is no longer finite.
        CheckpointError: The folder can't be written, or holds a checkpoint of another run.
    """
    trained, held_out = hold_out(features.questions, config.validation_fraction, config.seed)
    stack = new_stack(features, features.labels[trained], base_identity, config).to(device)
    optimizer = new_optimizer(stack, config)
    objective = new_objective(stack.config.label_counts, config)
    steps_per_epoch = math.ceil(len(trained) / config.gradient_accumulation)
    schedule = plan_schedule(config, steps_per_epoch * config.num_epochs)
    run = checkpoint.Run.of(features, base_identity, config)
    rows = checkpoint.resume(output, run, stack, optimizer)

    epochs_done = max((row["epoch"] for row in rows), default=0)
    step = epochs_done * steps_per_epoch
    if on_progress is not None:
        on_progress(step, schedule.steps)
    for epoch in range(epochs_done + 1, config.num_epochs + 1):
        counts = Counts()
        for batch in epoch_batches(trained, config.gradient_accumulation, config.seed, epoch):
            rate = schedule.rate(step)
            counts += take_step(stack, optimizer, features, batch, objective, rate)
            step += 1
            if on_progress is not None:
                on_progress(step, schedule.steps)
        rows.append(
            {"epoch": epoch, "split": "train", **ratios(counts), "learning_rate": rate},
        )
        if held_out:
            counts = evaluate(stack, features, held_out, objective)
            rows.append({"epoch": epoch, "split": "validation", **ratios(counts)})
        checkpoint.save(output, run, stack, optimizer, rows)
        _write_metrics(output, rows)

    stack.config = dataclasses.replace(
        stack.config,
        training={
            "settings": config.to_dict(),
            "targets": run.targets,
            "steps": schedule.steps,
            "warmup_steps": schedule.warmup,
            "class_weights": objective.weights.tolist(),
            "num_trained": len(trained),
            "num_held_out": len(held_out),
            "tasks": dict(sorted(Counter(features.tasks).items())),
            "rewards": list(rewards),
            "metrics": [row for row in rows if row["epoch"] == config.num_epochs],
        },
    )
    _write_metrics(output, rows)
    stack.save(output, card=model_card(stack.config))
    checkpoint.remove(output)
    return rows


# --- what is trained on ------------------------------------------------------------------------


def hold_out(questions: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide the targets into those trained on and those held out for metrics.

    A question's side depends on its text and the seed alone, so that more targets never move one
    from side to side and all targets of a question stay together. Below 10 targets nothing is
    held out; from there on, with a fraction above 0, at least one question is.

    Args:
        questions: `[N]` texts; surrounding white space and case don't count.
        fraction: The expected share held out.
        seed: Another seed holds out others.

    Returns:
        The indices of the trained and of the held-out targets; the first is never empty.

    Source: ours.
    """
    everything = list(range(len(questions)))
    if fraction == 0 or len(questions) < FEWEST_TO_HOLD_OUT:
        return everything, []
    shares = [_hash(f"held out {seed} {question_key(text)}") / 2**63 for text in questions]
    threshold = max(fraction, math.nextafter(min(shares), math.inf))
    held_out = [row for row in everything if shares[row] < threshold]
    if len(held_out) == len(questions):
        return everything, []
    return [row for row in everything if shares[row] >= threshold], held_out


def count_labels(labels: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Count how often each decision is the label at each layer: `[N, L]` gives `[L][C]`."""
    counts = [(labels == decision).sum(dim=0).tolist() for decision in range(NUM_DECISIONS)]
    return tuple((skip, execute, repeat) for skip, execute, repeat in zip(*counts, strict=True))


def epoch_batches(rows: Sequence[int], size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield the rows of each step of an epoch; the last step may have fewer.

    The order is a function of seed and epoch, so a resumed run needs no generator's state.
    """
    order = torch.randperm(len(rows), generator=_generator("order", seed, epoch)).tolist()
    for start in range(0, len(order), size):
        yield [rows[index] for index in order[start : start + size]]


# --- one step ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Objective:
    """The loss that is minimised.

    Attributes:
        weights: `[C]`, from the counts of the targets trained on.
        gamma: The focal exponent.
    """

    weights: Tensor
    gamma: float

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return focal_loss(logits, labels, self.weights, self.gamma)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate of each step: linear warm-up, then half a cosine to 0.

    Attributes:
        peak: The largest rate.
        warmup: Steps before the peak.
        steps: Steps in all.
    """

    peak: float
    warmup: int
    steps: int

    def rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0; none of them is 0.

        Example:
            >>> [Schedule(peak=1.0, warmup=1, steps=5).rate(step) for step in (0, 1, 3)]
            [0.5, 1.0, 0.5]
        """
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def plan_schedule(config: TrainConfig, steps: int) -> Schedule:
    """Return the schedule of a run, with a shorter warm-up where it wouldn't fit.

    A warm-up as long as the run would end it before the rate has reached its peak. It then gets a
    tenth of the steps, and the log says so.
    """
    warmup = config.warmup_steps
    if warmup >= steps:
        warmup = int(WARMUP_SHARE * steps)
        logger.warning(
            "--warmup-steps is %d, but the run has only %d steps; warming up for %d instead",
            config.warmup_steps,
            steps,
            warmup,
        )
    return Schedule(peak=config.learning_rate, warmup=warmup, steps=steps)


def new_stack(
    features: Features, labels: Tensor, base_identity: Mapping[str, Any], config: TrainConfig
) -> RouterStack:
    """Return untrained routers for the base model, their weights drawn with the seed.

    Args:
        features: For the shapes.
        labels: `[N, L]` of the targets trained on.
        base_identity: As for `train`.
        config: The settings.

    Raises:
        ConfigError: The features were pooled in another number of windows.
    """
    _, L, W, D = features.means.shape
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
        label_counts=count_labels(labels),
    )
    return RouterStack(described, generator=_generator("weights", config.seed))


def new_optimizer(stack: RouterStack, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW for the routers; biases don't decay, as in the Trainer of transformers."""
    weights = [weight for name, weight in stack.named_parameters() if not name.endswith("bias")]
    biases = [weight for name, weight in stack.named_parameters() if name.endswith("bias")]
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": biases, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def new_objective(label_counts: Sequence[Sequence[int]], config: TrainConfig) -> Objective:
    """Return the loss for targets with these label counts, `[L][C]`."""
    totals = [sum(counts) for counts in zip(*label_counts, strict=True)]
    weights = torch.tensor(class_weights(totals, config.beta), dtype=torch.float64)
    return Objective(weights=weights, gamma=config.gamma)


def take_step(
    stack: RouterStack,
    optimizer: torch.optim.AdamW,
    features: Features,
    rows: Sequence[int],
    objective: Objective,
    rate: float,
) -> Counts:
    """Learn from some targets, all in one batch, and count how they fared before.

    The gradient is that of the mean loss, so it equals accumulating the rows one at a time.

    Raises:
        ConfigError: The loss is NaN or infinite.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    logits, labels = _apply(stack, features, rows)
    loss = objective(logits, labels)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ConfigError(
            f"the loss became {value} at a learning rate of {rate:.3g}; "
            f"lower --learning-rate and train again"
        )
    torch.autograd.backward(loss)
    optimizer.step()
    return count(logits.detach(), labels, value)


@torch.no_grad()
def evaluate(
    stack: RouterStack, features: Features, rows: Sequence[int], objective: Objective
) -> Counts:
    """Count how routers fare on some targets without learning from them."""
    counts = Counts()
    for start in range(0, len(rows), EVALUATION_ROWS):
        logits, labels = _apply(stack, features, rows[start : start + EVALUATION_ROWS])
        counts += count(logits, labels, float(objective(logits, labels)))
    return counts


def _apply(stack: RouterStack, features: Features, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return logits `[B, L, C]` and labels `[B, L]` on the routers' device."""
    index = list(rows)
    device = stack.hidden_weight.device
    logits = stack(features.means[index].to(device), features.filled[index].to(device))
    return logits, features.labels[index].to(device)


# --- odds and ends -----------------------------------------------------------------------------


def _write_metrics(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(output / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))


def _generator(purpose: str, *numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_hash(" ".join([purpose, *map(str, numbers)])))


def _hash(text: str) -> int:
    """Return 63 bits that are the same on every machine, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
