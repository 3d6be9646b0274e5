"""Training several runs side by side: their routers in one batched computation.

Owns the steps of an epoch and when a run is over. All layers of as many runs as are worth it are
computed in one product (`AT_ONCE_ON_CPU`). Each run has its own order, settings and optimiser
state, and its weights don't depend on the others beyond rounding. Leaves what is settled
beforehand to `plans`, reading to `batches`, the routers' layout to `stacks`, and folders and
going on after a kill to `loop`.

Epochs are taken together: a run with fewer steps an epoch than others pauses until the next one.
So each tensor has the same shape at the same step of every training of the same runs, and where
one goes on after an epoch it makes the same bits.

Memory: R runs of P weights take 3 · R · P numbers (weights and two moments; a checkpoint about as
much again while it is written). Batches and gradients are those of the runs computed together: as
many as fit `AT_ONCE_ON_CPU`, or one. Of the features no more than a batch is read.

Axes: R runs, B rows of a step, D hidden, L layers, W windows, H router width, C = 3 decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drllm.errors import ConfigError
from drllm.metrics import TRAIN, VALIDATION, Counts, ratios
from drllm.models.routers.stack import RouterConfig, RouterStack
from drllm.training.batches import Batch, Reader
from drllm.training.examples import Examples
from drllm.training.metrics import count
from drllm.training.optimiser import AdamW
from drllm.training.plans import Plan, new_stack, objective
from drllm.training.split import epoch_batches, generator
from drllm.training.stacks import Weights, logits, stacked, unstacked

EVALUATION_ROWS = 32
AT_ONCE_ON_CPU = 2**24
"""Bytes of the batches that are computed together: on a CPU, whose products are busy with one run
of a real size, more only leaves its cache; three runs of SmolLM2's routers together took a fifth
longer than one after the other."""
AT_ONCE_ELSEWHERE = 2**30


class Fit:
    """Some runs in training.

    Args:
        examples: What they are trained on.
        base_identity: As for `new_stack`.
        plans: `[R]`: the runs, of equal number of windows and router width.
        device: Where the routers are; the features stay where they are.
        dtype: Of weights and batches.

    Attributes:
        plans: `[R]`.
        epochs_done: How many epochs every run that isn't over has made.
        active: The runs that aren't over, those with most steps an epoch first.
        optimizer: The active runs' weights and moments, in their order.
        rows: `[R]`: lines of metrics, of whole epochs.
        best: `[R]`: epoch and loss of the lowest held-out loss; None where a run doesn't watch it.
        kept: By run, the weights that it ends with: those of its best epoch so far where it
            watches the held-out loss, else those of its last, once it is over.

    Raises:
        ConfigError: Runs that don't fit together or to the features.
    """

    def __init__(
        self,
        examples: Examples,
        base_identity: Mapping[str, Any],
        plans: Sequence[Plan],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.plans = list(plans)
        for name in ("router_width", "num_windows"):
            values = sorted({getattr(plan.config, name) for plan in plans})
            if len(values) > 1:
                raise ConfigError(
                    f"runs of --{name.replace('_', '-')} {values[0]} and {values[1]} can't be "
                    f"trained together; train them one after the other"
                )
        stacks = [new_stack(examples, plan, base_identity) for plan in plans]
        self.configs: list[RouterConfig] = [stack.config for stack in stacks]
        self.active = sorted(range(len(plans)), key=lambda run: -plans[run].steps_per_epoch)
        self.optimizer = AdamW(
            stacked([stacks[run] for run in self.active], dtype, device),
            [plans[run].config.weight_decay for run in self.active],
        )
        self.reader = Reader(examples, plans, dtype, device)
        self.objective = objective(plans, dtype, device)
        self.epochs_done = 0
        self.rows: list[list[dict[str, Any]]] = [[] for _ in plans]
        self.best: list[tuple[int, float] | None] = [None for _ in plans]
        self.kept: dict[int, Weights] = {}

    @property
    def weights(self) -> Weights:
        """The active runs' weights, in their order."""
        return self.optimizer.weights

    @property
    def steps(self) -> int:
        """Steps of all runs together, were none to stop early."""
        return sum(plan.schedule.steps for plan in self.plans)

    @property
    def steps_done(self) -> int:
        """Steps made up to the last epoch's end, those that stopping early spares counted too."""
        left = [
            self.plans[run].schedule.steps - self.epochs_done * self.plans[run].steps_per_epoch
            for run in self.active
        ]
        return self.steps - sum(left)

    def epoch(
        self,
        on_step: Callable[[int], None] | None = None,
        on_counts: Callable[[int, Mapping[int, Counts]], None] | None = None,
    ) -> None:
        """Train the active runs for one epoch, measure them, and retire those that are over.

        Args:
            on_step: Is told after each step how many runs made it.
            on_counts: Is told after each step which of the epoch's it is, from 0, and what it
                counted of each run that made it.

        Raises:
            ConfigError: A loss that is NaN or infinite.
        """
        number = self.epochs_done + 1
        configs = [self.plans[run].config for run in self.active]
        batches = [
            list(
                epoch_batches(
                    self.plans[run].trained, config.gradient_accumulation, config.seed, number
                )
            )
            for run, config in zip(self.active, configs, strict=True)
        ]
        counts = [Counts() for _ in self.active]
        for step in range(len(batches[0])):
            rows = [part[step] for part in batches if step < len(part)]
            counted = list(self._step(rows, number, step))
            for place, found in enumerate(counted):
                counts[place] += found
            if on_step is not None:
                on_step(len(rows))
            if on_counts is not None:
                on_counts(step, dict(zip(self.active, counted, strict=False)))
        self.epochs_done = number
        for place, run in enumerate(self.active):
            plan = self.plans[run]
            rate = plan.schedule.rate(number * plan.steps_per_epoch - 1)
            line = {"epoch": number, "split": TRAIN, **ratios(counts[place])}
            self.rows[run].append({**line, "learning_rate": rate})
            if plan.held_out:
                weights = {name: weight[place] for name, weight in self.weights.items()}
                measured = ratios(self._measure(run, weights, plan.held_out))
                self.rows[run].append({"epoch": number, "split": VALIDATION, **measured})
        self._retire()

    def routers(self, run: int) -> RouterStack:
        """Return the routers that a run has ended with."""
        return unstacked(self.configs[run], self.kept[run], self.reader.scales[run])

    def evaluate(self, run: int) -> dict[str, Counts]:
        """Count how the routers that a run has ended with fare on its parts, by their names."""
        plan = self.plans[run]
        parts = {TRAIN: plan.trained, VALIDATION: plan.held_out}
        return {
            name: self._measure(run, self.kept[run], rows) for name, rows in parts.items() if rows
        }

    @torch.no_grad()
    def _measure(self, run: int, weights: Weights, rows: Sequence[int]) -> Counts:
        """Count how one run's weights, without R, fare on targets without learning from them."""
        weights = {name: weight[None] for name, weight in weights.items()}
        counts = Counts()
        for start in range(0, len(rows), EVALUATION_ROWS):
            batch = self.reader.read([run], [rows[start : start + EVALUATION_ROWS]])
            said = logits(weights, batch)
            losses = self.objective.of([run])(said, batch.targets, batch.shares)
            counts += _counted(said, batch, losses)[0]
        return counts

    def _step(self, rows: Sequence[Sequence[int]], epoch: int, step: int) -> Iterator[Counts]:
        """Let the first active runs make a step, as many at once as are worth it."""
        L, W, D = self.reader.L, self.reader.W, self.reader.D
        share = max(map(len, rows)) * L * W * D * self.reader.dtype.itemsize
        on_cpu = torch.device(self.reader.device).type == "cpu"
        number = max(1, (AT_ONCE_ON_CPU if on_cpu else AT_ONCE_ELSEWHERE) // share)
        for first in range(0, len(rows), number):
            yield from self._learn(first, rows[first : first + number], epoch, step)

    def _learn(
        self, first: int, rows: Sequence[Sequence[int]], epoch: int, step: int
    ) -> list[Counts]:
        """Let some active runs learn from rows, and count how they fared before.

        The gradient is that of the mean loss, so it equals accumulating the rows one at a time.
        """
        places = slice(first, first + len(rows))
        runs = self.active[places]
        plans = [self.plans[run] for run in runs]
        before = [(epoch - 1) * plan.steps_per_epoch + step for plan in plans]
        rates = [plan.schedule.rate(done) for plan, done in zip(plans, before, strict=True)]
        batch = self.reader.read(runs, rows)
        weights = {
            name: weight[places].detach().requires_grad_() for name, weight in self.weights.items()
        }
        said = logits(weights, batch, self._kept_units(plans, batch, epoch, step))
        losses = self.objective.of(runs)(said, batch.targets, batch.shares)  # [R]
        self._check(losses.tolist(), runs, rates)
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()))
        self.optimizer.step(
            dict(zip(weights, gradients, strict=True)), rates, [done + 1 for done in before], first
        )
        return _counted(said.detach(), batch, losses.detach())

    def _kept_units(
        self, plans: Sequence[Plan], batch: Batch, epoch: int, step: int
    ) -> Tensor | None:
        """Draw which hidden units each run keeps, as factors `[R, B, L, H]`; None where all are."""
        if not any(plan.config.dropout for plan in plans):
            return None
        R, B, L, _ = batch.targets.shape
        H = plans[0].config.router_width
        kept = torch.ones(R, B, L, H)
        for place, plan in enumerate(plans):
            share, size = plan.config.dropout, batch.sizes[place]
            if share:
                draws = generator("dropout", plan.config.seed, epoch, step)
                drawn = torch.rand(size, L, H, generator=draws)
                kept[place, :size] = (drawn >= share) / (1 - share)
        return kept.to(batch.means)

    def _check(self, losses: Sequence[float], runs: Sequence[int], rates: Sequence[float]) -> None:
        """Refuse a loss that is NaN or infinite."""
        for value, run, rate in zip(losses, runs, rates, strict=True):
            if not math.isfinite(value):
                which = f" of run {run + 1} of {len(self.plans)}" if len(self.plans) > 1 else ""
                raise ConfigError(
                    f"the loss{which} became {value} at a learning rate of {rate:.3g}; "
                    f"lower --learning-rate and train again"
                )

    def _retire(self) -> None:
        """Note each run's best epoch where it watches one, and end those that are over."""
        going_on = []
        for place, run in enumerate(self.active):
            config = self.plans[run].config
            over = self.epochs_done == config.num_epochs
            best = self.best[run]
            if config.early_stopping is not None:
                loss = self.rows[run][-1]["routers_loss"]
                if best is None or loss < best[1]:
                    best = self.best[run] = (self.epochs_done, loss)
                    self.kept[run] = self._copy(place)
                over = over or self.epochs_done - best[0] >= config.early_stopping
            elif over:
                self.kept[run] = self._copy(place)
            if not over:
                going_on.append(place)
        if len(going_on) < len(self.active):
            self.optimizer.keep(going_on)
            self.active = [self.active[place] for place in going_on]

    def _copy(self, place: int) -> Weights:
        return {name: weight[place].clone() for name, weight in self.weights.items()}


def _counted(said: Tensor, batch: Batch, losses: Tensor) -> list[Counts]:
    """Count each run's rows by what its routers said, `[R, B, L, C]`."""
    return [
        count(said[place, :size], batch.labels[place, :size], float(losses[place]))
        for place, size in enumerate(batch.sizes)
    ]
