"""AdamW for several runs side by side, each with rates, decay and step count of its own.

Owns the two moments and the update. Leaves the gradients to `fit` and the rates to `schedule`.

Axes: R runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8
AT_ONCE_ON_CPU = 2**16
"""Weights updated together on a CPU: the half dozen passes over them then stay in its cache. Whole
tensors took about twice as long on the routers of SmolLM2 (2.2 million weights)."""


class AdamW:
    """The optimiser's state for R runs; biases don't decay, as in the Trainer of transformers.

    A run's update is computed from that run's numbers alone, element by element, so it has the
    same bits whatever other runs there are.

    Args:
        weights: What is trained, by name, each `[R, ...]` and contiguous; changed in place.
        decays: `[R]`: weight decay of each run.

    Attributes:
        means: `[R, ...]` by name: running mean of the gradient.
        squares: `[R, ...]` by name: running mean of its square.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2, in the form of
        `torch.optim.AdamW`, whose defaults for betas and epsilon these are.
    """

    def __init__(self, weights: Mapping[str, Tensor], decays: Sequence[float]) -> None:
        self.weights = dict(weights)
        self.decays = list(decays)
        self.means = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def step(
        self,
        gradients: Mapping[str, Tensor],
        rates: Sequence[float],
        steps: Sequence[int],
        first: int = 0,
    ) -> None:
        """Update some runs that stand together.

        Args:
            gradients: By name, each `[r, ...]` with r ≤ R.
            rates: `[r]`: learning rates.
            steps: `[r]`: which step this is for each run, from 1.
            first: Where the r runs begin.
        """
        for name, gradient in gradients.items():
            for place, (rate, step) in enumerate(zip(rates, steps, strict=True)):
                run = first + place
                decay = 0.0 if name.endswith("bias") else self.decays[run]
                state = (self.weights[name][run], self.means[name][run], self.squares[name][run])
                _update([t.reshape(-1) for t in (*state, gradient[place])], rate, decay, step)

    def keep(self, runs: Sequence[int]) -> None:
        """Forget all runs but some."""
        for tensors in (self.weights, self.means, self.squares):
            for name in tensors:
                tensors[name] = tensors[name][list(runs)].contiguous()
        self.decays = [self.decays[run] for run in runs]


def _update(tensors: Sequence[Tensor], rate: float, decay: float, step: int) -> None:
    """Update one run's share of one tensor: weight, the two moments and gradient, all flat."""
    first, second = BETAS
    correction = (1 - second**step) ** 0.5  # of the root of `square`; moved out of the division
    size = AT_ONCE_ON_CPU if tensors[0].device.type == "cpu" else tensors[0].numel()
    for weight, mean, square, gradient in zip(
        *(torch.split(tensor, size) for tensor in tensors), strict=True
    ):
        weight.mul_(1 - rate * decay)
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        denominator = square.sqrt().add_(EPSILON * correction)
        weight.addcdiv_(mean, denominator, value=-rate * correction / (1 - first**step))
