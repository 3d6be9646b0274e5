"""The trainer of the routers: it splits the targets, runs the epochs and computes the metrics.

`training.stage` uses it, and writes all files. The routers' inputs come from `training.features`.

Every random draw has a generator of its own, made from the seed and the purpose of the draw. So a
resumed training needs no state of a random generator.

In this module a row is the number of a target, from 0.

Axes: N targets, B targets of a step, D hidden, L layers, W windows, C = 3 decisions.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from drllm.agreement import TRAIN, VALIDATION, Confusion, Counts, compute_metrics
from drllm.config import TrainConfig
from drllm.errors import ConfigError
from drllm.model.batching import free_bytes
from drllm.model.devices import on_device
from drllm.models.routers.checkpoint import build_stack
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import NUM_DECISIONS, RouterStack
from drllm.records.identity import BYPASS
from drllm.records.splits import hash_text, question_key
from drllm.supervision.summary import class_counts
from drllm.training.features import Features, split_rows
from drllm.training.losses import compute_class_weights, compute_focal_losses

MIN_TARGETS_TO_HOLD_OUT = 10  # with fewer targets, none is held out
WARMUP_SHARE = 0.1  # share of the steps to warm up if the warm-up of the settings is too long
MAX_INPUTS_SHARE = 0.25  # maximum share of free memory for the inputs of all targets
MAX_INPUTS_BYTES = 2**32  # MPS can't hold a larger tensor
FUSED_DEVICES = ("cpu", "cuda")  # devices with a fused AdamW in all supported versions of torch


class DivergedError(ConfigError):
    """The loss became NaN or infinite; the training can't be resumed."""


def hold_out(questions: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the targets into targets to train on and targets to hold out.

    The side of a question depends only on its text and the seed. So all targets of a question are
    on the same side, and new targets never move a question to the other side.

    At least one question is held out, with three exceptions. None is held out if the fraction is 0,
    if there are fewer than `MIN_TARGETS_TO_HOLD_OUT` targets, or if no target to train on would be
    left.

    Args:
        questions: Each target's question.
        fraction: Expected share of the targets to hold out.
        seed: Another seed holds out other questions.

    Returns:
        The rows to train on, and the rows that are held out.
    """
    rows = list(range(len(questions)))
    if fraction == 0 or len(questions) < MIN_TARGETS_TO_HOLD_OUT:
        return rows, []
    # The hash of a question is a position in [0, 1). Positions below the threshold are held out.
    # The threshold is above the lowest position, so at least one question is held out.
    positions = [hash_text(f"held out {seed} {question_key(text)}") / 2**64 for text in questions]
    threshold = max(fraction, math.nextafter(min(positions), math.inf))
    train_rows = [row for row in rows if positions[row] >= threshold]
    if not train_rows:
        return rows, []
    validation_rows = [row for row in rows if positions[row] < threshold]
    return train_rows, validation_rows


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of every step: a linear warm-up to the peak, then half a cosine down to 0.

    A warm-up that isn't shorter than the training is replaced by a tenth of the steps. Otherwise
    the rate would never reach its peak (docs/differences.md, D-14).
    """

    peak: float
    num_steps: int
    num_warmup_steps: int

    @classmethod
    def from_config(cls, config: TrainConfig, num_steps: int) -> "Schedule":
        """Make the schedule of a training.

        Args:
            config: The settings. Below 1, `warmup_steps` is a share of all steps.
            num_steps: The number of all steps.
        """
        steps_or_share = config.warmup_steps
        if steps_or_share >= num_steps:
            steps_or_share = WARMUP_SHARE
        if steps_or_share < 1:
            num_warmup_steps = int(steps_or_share * num_steps)
        else:
            num_warmup_steps = int(steps_or_share)
        return cls(config.learning_rate, num_steps, num_warmup_steps)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0; it is always above 0."""
        if step < self.num_warmup_steps:
            return self.peak * (step + 1) / (self.num_warmup_steps + 1)
        progress = (step - self.num_warmup_steps) / (self.num_steps - self.num_warmup_steps)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))


class Trainer:
    """One training of the routers, from one seed.

    Call `train_epoch` until `is_over`, then `build_routers`.

    Args:
        features: The training set.
        base_identity: Identity of the base model, as `BaseModel.identity` gives it.
        config: The settings.
        device: The device of the weights, the optimiser's state and the batches.
        dtype: The dtype of the weights and the batches.

    Attributes:
        train_rows: Rows of the targets to train on.
        validation_rows: Rows of the targets that are held out.
        label_counts: `[L][C]`, how often each decision is a layer's label in training.
        class_weights: `[C]`, the weight of each decision in the loss.
        schedule: Learning rates of all steps.
        stack: The routers.
        metrics: The lines of `metrics.jsonl` so far. A finished epoch has a line on the targets to
            train on, and a line on the targets that are held out, if there are any.
        epochs_done: Number of finished epochs.
    """

    def __init__(
        self,
        features: Features,
        base_identity: Mapping[str, Any],
        config: TrainConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.features = features
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.epochs_done = 0
        self.metrics: list[dict[str, Any]] = []

        self.setup_split()
        self.setup_loss()
        self.setup_model(base_identity)
        self.setup_optimizer()
        self.setup_inputs()

    def setup_split(self) -> None:
        """Hold out targets, and plan the steps."""
        self.train_rows, self.validation_rows = hold_out(
            self.features.questions, self.config.validation_fraction, self.config.seed
        )
        self.label_counts = class_counts(self.features.labels[self.train_rows].tolist())
        # A step trains on this many targets at a time, instead of accumulating their gradients.
        step_size = self.config.gradient_accumulation
        self.steps_per_epoch = math.ceil(len(self.train_rows) / step_size)
        num_steps = self.steps_per_epoch * self.config.num_epochs
        self.schedule = Schedule.from_config(self.config, num_steps)

    def setup_loss(self) -> None:
        """Compute the class weights, and set the parameters of the loss."""
        totals = [sum(counts) for counts in zip(*self.label_counts, strict=True)]  # [C]
        beta = 0.0  # equal weights
        if self.config.class_weights == "effective_number":
            beta = self.config.beta
        self.class_weights = compute_class_weights(totals, beta)
        self.loss_weights = self._to_device(torch.tensor(self.class_weights, dtype=torch.float64))
        self.gamma = 0.0  # cross-entropy
        if self.config.loss == "focal":
            self.gamma = self.config.gamma

    def setup_model(self, base_identity: Mapping[str, Any]) -> None:
        """Draw the routers' first weights."""
        shape = self.features.shape
        assert base_identity["num_layers"] == shape.num_layers
        assert base_identity["hidden_size"] == shape.hidden_size
        assert self.config.num_windows == shape.num_windows
        router_config = RouterConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_windows=shape.num_windows,
            router_width=self.config.router_width,
            base_model=base_identity["id"],
            base_revision=base_identity["revision"],
            base_class=base_identity["class"],
            base_fingerprint=base_identity["fingerprint"],
            bypass=base_identity.get(BYPASS, ""),
            label_counts=self.label_counts,
        )
        stack = RouterStack(router_config, make_generator("weights", self.config.seed))
        self.stack = stack.to(self.device, self.dtype)

    def setup_optimizer(self) -> None:
        """Make the optimiser; biases have no weight decay, as in the Trainer of transformers."""
        weights = [self.stack.hidden_weight, self.stack.decision_weight]
        biases = [self.stack.hidden_bias, self.stack.decision_bias]
        groups = [
            {"params": weights, "weight_decay": self.config.weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type in FUSED_DEVICES)

    def setup_inputs(self) -> None:
        """Load the inputs of all targets to the device, if they fit.

        Otherwise `inputs` is None, and the inputs of each batch are read when they are needed.
        """
        self.inputs: Tensor | None = None
        N, L, W, D = self.features.shape
        num_bytes = N * L * W * D * self.dtype.itemsize
        if num_bytes >= min(MAX_INPUTS_SHARE * free_bytes(self.device), MAX_INPUTS_BYTES):
            return
        # Layers come first, so that the inputs of a layer's router lie together.
        inputs = torch.empty(L, N, W, D, dtype=self.dtype, device=self.device)
        for rows in split_rows(range(N)):
            start = rows[0]
            end = start + len(rows)
            features = self._to_device(self.features.rows(rows))  # [B, L, W, D]
            inputs[:, start:end] = features.transpose(0, 1)
        self.inputs = inputs

    def _to_device(self, tensor: Tensor) -> Tensor:
        # The dtype changes first, since MPS has no float64.
        return on_device(tensor.to(self.dtype), self.device)

    def _read_inputs(self, rows: Sequence[int]) -> Tensor:
        """Return the routers' inputs for some targets, `[B, L, W, D]`."""
        if self.inputs is None:
            return self._to_device(self.features.rows(rows))
        inputs = self.inputs.index_select(1, on_device(rows, self.device))  # [L, B, W, D]
        return inputs.transpose(0, 1)

    def notes(self) -> list[str]:
        """Return warnings about settings and targets that make the training less useful."""
        notes = []
        num_steps = self.schedule.num_steps
        if self.config.warmup_steps >= num_steps:
            notes.append(
                f"--warmup-steps is {self.config.warmup_steps:g}, but the run has only "
                f"{num_steps} steps; warming up for {self.schedule.num_warmup_steps} instead"
            )
        if len(self.train_rows) == 1:
            notes.append(
                "there is only 1 target to train on, so the routers will learn the same path for "
                "all prompts"
            )
        if all(skips == repeats == 0 for skips, _, repeats in self.label_counts):
            notes.append(
                "every target executes every layer, so the routers can only learn the full path"
            )
        return notes

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done."""
        return self.epochs_done == self.config.num_epochs

    @property
    def steps_done(self) -> int:
        """Steps of the epochs that are done."""
        return self.epochs_done * self.steps_per_epoch

    def train_epoch(self, on_step: Callable[[int, Counts], None] | None = None) -> None:
        """Train for one epoch, then compute the metrics of the targets trained on and held out.

        The metrics of a target trained on are those just before the step that trains on it.

        Args:
            on_step: Called after each step with the number of finished steps, and the counts of the
                step's decisions before its update.

        Raises:
            DivergedError: The loss isn't finite.
        """
        epoch = self.epochs_done + 1
        batches = shuffle_batches(
            self.train_rows, self.config.gradient_accumulation, self.config.seed, epoch
        )
        counts = Counts()
        for step, rows in enumerate(batches, start=self.steps_done):
            step_counts = self._train_step(rows, self.schedule.rate(step))
            counts += step_counts
            if on_step is not None:
                on_step(step + 1, step_counts)
        metrics = compute_metrics(counts)
        last_rate = self.schedule.rate(self.steps_done + self.steps_per_epoch - 1)
        self.metrics.append({"epoch": epoch, "split": TRAIN, **metrics, "learning_rate": last_rate})
        if self.validation_rows:
            metrics = compute_metrics(self._count_rows(self.validation_rows))
            self.metrics.append({"epoch": epoch, "split": VALIDATION, **metrics})
        self.epochs_done = epoch

    def compute_loss(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the mean loss of logits `[B, L, C]` over the rows `[B]` and all layers."""
        labels = on_device(self.features.labels[rows], self.device)
        return compute_focal_losses(logits, labels, self.loss_weights, self.gamma).mean()

    def evaluate(self) -> dict[str, Counts]:
        """Count the routers' decisions on all targets.

        Returns:
            The counts by part: `TRAIN` for the targets to train on, and `VALIDATION` for those that
            are held out, if there are any.
        """
        counts = {TRAIN: self._count_rows(self.train_rows)}
        if self.validation_rows:
            counts[VALIDATION] = self._count_rows(self.validation_rows)
        return counts

    def build_routers(self) -> RouterStack:
        """Return the routers in float32 on the CPU."""
        state = self.stack.state_dict()
        weights = {name: weight.detach().cpu().float() for name, weight in state.items()}
        return build_stack(self.stack.config, weights)

    def _train_step(self, rows: list[int], rate: float) -> Counts:
        """Make one step on some rows; return the counts of the decisions before the update.

        Source: The published code uses transformers' Trainer, which sums the losses of the rows and
            clips the gradient of the sum (docs/differences.md, D-32).
        """
        loss, counts = self._evaluate_batch(rows)
        self.optimizer.zero_grad()
        if self.config.loss_reduction == "sum":
            loss = loss * len(rows)  # from the mean over the rows to their sum
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.max_grad_norm is not None:
            clip_grad_norm_(self.stack.parameters(), self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return counts

    @torch.no_grad()
    def _count_rows(self, rows: Sequence[int]) -> Counts:
        """Count the routers' decisions on some rows."""
        counts = Counts()
        for part in split_rows(rows):
            _, part_counts = self._evaluate_batch(part)
            counts += part_counts
        return counts

    def _evaluate_batch(self, rows: list[int]) -> tuple[Tensor, Counts]:
        """Return the mean loss on some rows, and the counts of the routers' decisions."""
        filled = on_device(self.features.filled[rows], self.device)
        logits = self.stack(self._read_inputs(rows), filled)  # [B, L, C]
        loss = self.compute_loss(logits, rows)
        decisions = logits.detach().argmax(dim=-1)  # [B, L]
        # The CPU waits for every copy from the device. So the loss and the decisions are copied in
        # one tensor. The decisions become floats in it, which are exact for small integers.
        copy = torch.cat([loss.detach()[None], decisions.flatten().to(loss)]).cpu()
        loss_value = float(copy[0])
        decisions = copy[1:].long().view(decisions.shape)
        if not math.isfinite(loss_value):
            raise DivergedError(
                f"the loss became {loss_value} with --learning-rate "
                f"{self.config.learning_rate:.3g}; lower --learning-rate and train again"
            )
        return loss, count_decisions(decisions, self.features.labels[rows], loss_value)


def count_decisions(decisions: Tensor, labels: Tensor, loss: float) -> Counts:
    """Count the decisions of a batch by their labels.

    Args:
        decisions: `[B, L]`, the routers' decisions.
        labels: `[B, L]`, the target paths' decisions.
        loss: The mean loss of the batch.
    """
    L = labels.shape[1]
    C = NUM_DECISIONS
    # A table [L, C, C] counts each decision by layer and label. Here it is flat, and `places` has
    # the place in it of each decision.
    places = (torch.arange(L) * C + labels) * C + decisions  # [B, L]
    tables = torch.bincount(places.flatten(), minlength=L * C * C).view(L, C, C)
    confusion: list[Confusion] = []
    for table in tables.tolist():
        matrix = tuple(tuple(row) for row in table)
        confusion.append(matrix)
    # At least one layer is always executed, even if the routers skip all layers.
    executions = decisions.sum(dim=1).clamp(min=1)  # [B]
    return Counts(
        confusion=tuple(confusion),
        executions=int(executions.sum()),
        examples=len(labels),
        loss=loss * len(labels),
    )


def shuffle_batches(rows: Sequence[int], size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield the rows of each step of an epoch in random order; the last step may have fewer."""
    order = torch.randperm(len(rows), generator=make_generator("order", seed, epoch)).tolist()
    for start in range(0, len(order), size):
        yield [rows[index] for index in order[start : start + size]]


def make_generator(purpose: str, *numbers: int) -> torch.Generator:
    """Return a generator on the CPU whose seed is made from a purpose and numbers."""
    text = " ".join([purpose, *map(str, numbers)])
    seed = hash_text(text) >> 1  # from 64 bits to 63, which fit into a signed integer
    return torch.Generator().manual_seed(seed)
