"""One training in memory: what is settled before it, its steps and epochs, and its metrics.

Weights, moments and a batch are on the training's device. So are all features, where a part of its
free memory holds them; else a batch of them is read at a time. Each random draw is a function of
the seed and of what it is for: resuming needs no state of a generator.

Axes: N examples, B rows of a step, D hidden, L layers, W windows, H router width, C = 3 decisions.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from drllm.agreement import TRAIN, VALIDATION, Counts, compute_metrics
from drllm.config import TrainConfig
from drllm.errors import ConfigError
from drllm.models.base.devices import on_device
from drllm.models.routers.checkpoint import build_stack
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import NUM_DECISIONS, RouterStack
from drllm.models.scoring.batching import free_bytes
from drllm.records.splits import hash_of, question_key
from drllm.supervision.summary import class_counts
from drllm.training.features import Features, moments, parts_of, shape
from drllm.training.losses import class_weights, focal_losses

FEWEST_TO_HOLD_OUT = 10
WARMUP_SHARE = 0.1
SHARE_HELD, MOST_HELD = 0.25, 2**32  # of free memory, and bytes: MPS holds no larger tensor
FUSED = ("cpu", "cuda")  # devices for which every torch that we support has a fused AdamW


class DivergedError(ConfigError):
    """The loss became NaN or infinite; the training can't be resumed."""


def hold_out(questions: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide the targets into those trained on (never none) and an expected fraction held out.

    A question's side depends on the seed and its text (by `question_key`) alone, so that more
    targets never move one from side to side and all targets of a question stay together. Below 10
    targets nothing is held out; from there on, with a fraction above 0, at least one question is.
    """
    everything = list(range(len(questions)))
    if fraction == 0 or len(questions) < FEWEST_TO_HOLD_OUT:
        return everything, []
    shares = [hash_of(f"held out {seed} {question_key(text)}") / 2**64 for text in questions]
    threshold = max(fraction, math.nextafter(min(shares), math.inf))
    trained = [row for row in everything if shares[row] >= threshold]
    if not trained:
        return everything, []
    return trained, [row for row in everything if shares[row] < threshold]


def divide(questions: Sequence[str], config: TrainConfig) -> tuple[list[int], list[int]]:
    """Return `hold_out` for some settings, refusing those that need what it doesn't hold out."""
    trained, held_out = hold_out(questions, config.validation_fraction, config.seed)
    if config.early_stopping is not None and not held_out:
        raise ConfigError(
            f"--early-stopping {config.early_stopping} has no effect: of {len(questions)} targets "
            f"none is held out to measure on; leave it out, or give more targets"
        )
    return trained, held_out


class Trainer:
    """One training of the routers, from one seed; weights and batches on `device` in `dtype`.

    Attributes:
        trained: Targets trained on; `held_out` the others.
        label_counts: `[L][C]`: labels of the target paths trained on.
        steps: Of all epochs; in `warmup` of them the learning rate rises.
        stack: The routers; once the training is over those it ends with: of its best epoch if it
            watches the held-out loss, else of its last.
        rows: Lines of metrics so far.
        best: Epoch and loss of the lowest held-out loss so far; None if it isn't watched.
        kept: The weights of that epoch.
    """

    def __init__(
        self,
        examples: Features,
        base_identity: Mapping[str, Any],
        config: TrainConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.examples, self.config = examples, config
        self.device, self.dtype = torch.device(device), dtype
        self.trained, self.held_out = divide(examples.questions, config)
        self.label_counts = class_counts(examples.labels[self.trained].tolist())
        beta = config.beta if config.class_weights == "effective_number" else 0.0
        totals = [sum(counts) for counts in zip(*self.label_counts, strict=True)]
        self.class_weights = class_weights(totals, beta)
        self.steps_per_epoch = math.ceil(len(self.trained) / config.gradient_accumulation)
        self.steps = self.steps_per_epoch * config.num_epochs
        # A warm-up as long as the training would end it before the rate has reached its peak
        # (docs/differences.md, D-14).
        wanted = WARMUP_SHARE if config.warmup_steps >= self.steps else config.warmup_steps
        self.warmup = int(wanted if wanted >= 1 else wanted * self.steps)
        self.scale = moments(examples, self.trained) if config.normalise_features else None
        self.gamma = config.gamma if config.loss == "focal" else 0.0
        self.weights = self._here(torch.tensor(self.class_weights, dtype=torch.float64))
        N, L, W, D = shape(examples)
        assert (base_identity["num_layers"], base_identity["hidden_size"]) == (L, D)
        assert config.num_windows == W, "the features are pooled in other windows"
        described = RouterConfig(
            num_layers=L,
            hidden_size=D,
            num_windows=W,
            router_width=config.router_width,
            base_model=base_identity["id"],
            base_revision=base_identity["revision"],
            base_class=base_identity["class"],
            base_fingerprint=base_identity["fingerprint"],
            label_counts=self.label_counts,
        )
        drawn = RouterStack(described, generator=generator("weights", config.seed))
        self.stack = drawn.to(self.device, dtype)
        weights = [self.stack.hidden_weight, self.stack.decision_weight]
        biases = [self.stack.hidden_bias, self.stack.decision_bias]
        groups = [
            {"params": weights, "weight_decay": config.weight_decay},
            {"params": biases, "weight_decay": 0.0},  # as in the Trainer of transformers
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type in FUSED)
        self.inputs: Tensor | None = None  # [L, N, W, D], as the routers read them
        if N * L * W * D * dtype.itemsize < min(SHARE_HELD * free_bytes(self.device), MOST_HELD):
            inputs = torch.empty(L, N, W, D, dtype=dtype, device=self.device)
            for rows in parts_of(range(N)):
                inputs[:, rows[0] : rows[-1] + 1] = self._read(rows).transpose(0, 1)
            self.inputs = inputs
        self.epochs_done = 0
        self.rows: list[dict[str, Any]] = []
        self.best: tuple[int, float] | None = None
        self.kept: dict[str, Tensor] | None = None

    def _here(self, tensor: Tensor) -> Tensor:
        return on_device(tensor.to(self.dtype), self.device)  # in this order: MPS has no float64

    def _read(self, rows: Sequence[int]) -> Tensor:
        if self.inputs is not None:
            return self.inputs.index_select(1, on_device(rows, self.device)).transpose(0, 1)
        means = self.examples.rows(rows)  # [B, L, W, D]
        if self.scale is not None:
            mean, deviation = self.scale
            means = (means.double() - mean[:, None]) / deviation[:, None]
        return self._here(means)

    def notes(self) -> list[str]:
        """Return what a user should know of the training, one sentence each."""
        found = []
        if self.config.warmup_steps >= self.steps:
            found.append(
                f"--warmup-steps is {self.config.warmup_steps:g}, but the run has only "
                f"{self.steps} steps; warming up for {self.warmup} instead"
            )
        if len(self.trained) == 1:
            found.append("there is only 1 target to train on; the routers will repeat it for all")
        if all(skips == repeats == 0 for skips, _, repeats in self.label_counts):
            found.append(
                "every target executes every layer, so the routers can only learn the full path"
            )
        return found

    @property
    def is_over(self) -> bool:
        """Whether all epochs are made, or the held-out loss has waited too long to fall."""
        patience = self.config.early_stopping
        if patience is not None and self.best and self.epochs_done - self.best[0] >= patience:
            return True
        return self.epochs_done == self.config.num_epochs

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: a line up, then half a cosine to 0.

        No step's rate is 0 (docs/differences.md, D-14).
        """
        peak = self.config.learning_rate
        if step < self.warmup:
            return peak * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))

    def epoch(self, on_step: Callable[[int, Counts], None] | None = None) -> None:
        """Train for one epoch and measure; a loss that isn't finite raises DivergedError.

        After each step `on_step` is told how many are done, and what was counted before it learned.
        """
        number, config = self.epochs_done + 1, self.config
        order = epoch_batches(self.trained, config.gradient_accumulation, config.seed, number)
        counts, done = Counts(), self.epochs_done * self.steps_per_epoch
        for step, rows in enumerate(order):
            rate = self.rate(done + step)
            counted = self._step(rows, rate, self.kept_units(len(rows), number, step))
            counts += counted
            if on_step is not None:
                on_step(done + step + 1, counted)
        self.rows.append(
            {"epoch": number, "split": TRAIN, **compute_metrics(counts), "learning_rate": rate}
        )
        if self.held_out:
            measured = compute_metrics(self._measure(self.held_out))
            self.rows.append({"epoch": number, "split": VALIDATION, **measured})
        self.epochs_done = number
        if config.early_stopping is not None:
            loss = self.rows[-1]["routers_loss"]
            if self.best is None or loss < self.best[1]:
                self.best = number, loss
                self.kept = {name: w.clone() for name, w in self.stack.state_dict().items()}
            if self.is_over and self.kept is not None:
                self.stack.load_state_dict(self.kept)

    def loss(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the objective: the mean over some rows and all layers, of logits `[B, L, C]`."""
        labels = on_device(self.examples.labels[rows], self.device)
        return focal_losses(logits, labels, self.weights, self.gamma).mean()

    def evaluate(self) -> dict[str, Counts]:
        """Count how the routers fare on the rows trained on and on those held out, by name."""
        parts = {TRAIN: self.trained, VALIDATION: self.held_out}
        return {name: self._measure(rows) for name, rows in parts.items() if rows}

    def routers(self) -> RouterStack:
        """Return the routers in float32 on the CPU, reading features as they are.

        Scaling the features is folded into the first layer: W · (x − mean) / deviation + b is
        (W / deviation) · x + (b − W · mean / deviation).
        """
        weights = {name: w.detach().cpu().double() for name, w in self.stack.state_dict().items()}
        if self.scale is not None:
            mean, deviation = self.scale
            weights["hidden_weight"] = weights["hidden_weight"] / deviation[:, None]  # [L, H, D]
            shift = torch.einsum("lhd,ld->lh", weights["hidden_weight"], mean)
            weights["hidden_bias"] = weights["hidden_bias"] - shift
        return build_stack(self.stack.config, {name: w.float() for name, w in weights.items()})

    def _step(self, rows: list[int], rate: float, kept_units: Tensor | None) -> Counts:
        """Learn from rows, and count how they fared before.

        Source: sum and clipping are those of transformers' Trainer in the released code
            (docs/differences.md, D-32).
        """
        loss, counted = self._judge(rows, kept_units)
        self.optimizer.zero_grad()
        if self.config.loss_reduction == "sum":
            loss = loss * len(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.max_grad_norm is not None:
            clip_grad_norm_(self.stack.parameters(), self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return counted

    @torch.no_grad()
    def _measure(self, rows: Sequence[int]) -> Counts:
        return sum((self._judge(part)[1] for part in parts_of(rows)), Counts())

    def _judge(self, rows: list[int], kept_units: Tensor | None = None) -> tuple[Tensor, Counts]:
        filled = on_device(self.examples.filled[rows], self.device)
        logits = self.stack(self._read(rows), filled, kept_units)
        loss = self.loss(logits, rows)
        decided = logits.detach().argmax(dim=-1)  # [B, L]
        # In one copy, since the host waits for it; small whole numbers are exact in any dtype.
        copied = torch.cat([loss.detach()[None], decided.flatten().to(loss)]).cpu()
        value, decided = float(copied[0]), copied[1:].long().view(decided.shape)
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss became {value} at a learning rate of up to "
                f"{self.config.learning_rate:.3g}; lower --learning-rate and train again"
            )
        return loss, count(decided, self.examples.labels[rows], value)

    def kept_units(self, size: int, epoch: int, step: int) -> Tensor | None:
        """Draw which hidden units a step keeps, as factors `[B, L, H]`; None without dropout."""
        share = self.config.dropout
        if not share:
            return None
        L, H = len(self.label_counts), self.config.router_width
        draws = generator("dropout", self.config.seed, epoch, step)
        return self._here((torch.rand(size, L, H, generator=draws) >= share) / (1 - share))


def count(decided: Tensor, labels: Tensor, loss: float) -> Counts:
    """Count a batch: decisions against labels, both `[B, L]`, and their mean loss.

    Decisions that would skip every layer cost 1, for one is always executed.
    """
    L, C = labels.shape[1], NUM_DECISIONS
    cells = (torch.arange(L) * C + labels) * C + decided
    confusion = torch.bincount(cells.flatten(), minlength=L * C * C).view(L, C, C).tolist()
    return Counts(
        confusion=tuple(tuple(tuple(row) for row in layer) for layer in confusion),
        executions=int(decided.sum(dim=1).clamp(min=1).sum()),
        examples=len(labels),
        loss=loss * len(labels),
    )


def epoch_batches(rows: Sequence[int], size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield the rows of each step of an epoch; the last step may have fewer."""
    order = torch.randperm(len(rows), generator=generator("order", seed, epoch)).tolist()
    for start in range(0, len(order), size):
        yield [rows[index] for index in order[start : start + size]]


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """Return a generator on the CPU for one purpose, seeded with the numbers."""
    return torch.Generator().manual_seed(hash_of(" ".join([purpose, *map(str, numbers)])) >> 1)
