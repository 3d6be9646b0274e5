"""Sums over tokens for the refit, in which the first token of a text has a weight of its own.

Some models make the first token an attention sink: in one layer of SmolLM2 its z is 500 times as
large as that of other tokens, and its state 30 times. Without it in the sums, the new weight moves
it at random. With the weight 1 it outweighs its text. So its weight is the mean ‖T‖² of the other
tokens over its own ‖T‖², where T is the target state.

Axes: n tokens, F inner size of the MLP, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drllm.prune.least_squares import Ridge, Sums

LARGEST_WEIGHT = 1000.0
"""The largest weight of a first token. A target of norm 0, as of a padding token, would divide by
0."""
SMALLEST_SHARE = 1e-3
"""The least root mean square of an input, as a share of that with first tokens. In models with ReLU
some inputs are 0 at all tokens but the first. Without a least value the numbers in their equations
would be too large for λ to count beside them, so that they couldn't be solved."""


class WeightedSums(Sums):
    """Sums of x = c z and y = R over all tokens but the first of each text, and those apart.

    Attributes:
        targets: Σ ‖T‖² over all tokens but first ones.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device | str) -> None:
        super().__init__(num_inputs, num_outputs, device)
        self.targets = 0.0
        self.first: list[tuple[Tensor, Tensor, Tensor]] = []  # x, y and T of first tokens

    def add(  # type: ignore[override]
        self, inputs: Tensor, residuals: Tensor, targets: Tensor, is_first: Tensor
    ) -> None:
        """Add tokens: c z `[n, F]`, R and T `[n, D]`, and whether each is a first one `[n]`."""
        parts = [values.to(self.inner) for values in (inputs, residuals, targets)]
        is_first = is_first.to(self.inner.device)
        first_inputs, first_residuals, first_targets = (part[is_first] for part in parts)
        self.first.append((first_inputs, first_residuals, first_targets))
        inputs, residuals, targets = (part[~is_first] for part in parts)
        super().add(inputs, residuals)
        self.targets += float(targets.square().sum())

    def merge(self, other: Sums) -> None:
        """Add the tokens of other sums."""
        assert isinstance(other, WeightedSums)
        super().merge(other)
        self.targets += other.targets
        self.first += other.first

    def weigh(self, targets: Tensor, is_first: Tensor) -> Tensor:
        """Return the weights of tokens with the targets `[n, D]`, `[n]`."""
        mean_square = self.targets / self.count
        squares = targets.double().square().sum(dim=1)
        weights = mean_square / squares.clamp_min(mean_square / LARGEST_WEIGHT)
        return torch.where(is_first, weights, 1.0)

    def with_first_tokens(self) -> tuple[Tensor, Tensor, int]:
        """Return Σ w x xᵀ, Σ w x yᵀ and the number of tokens, first tokens included."""
        inputs, residuals, targets = (torch.cat(parts) for parts in zip(*self.first, strict=True))
        is_first = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        weighted = inputs * self.weigh(targets, is_first)[:, None]
        inner = self.inner + weighted.T @ inputs
        cross = self.cross + weighted.T @ residuals
        return inner, cross, self.count + len(targets)

    def make_solver(self, inner: Tensor) -> Ridge:
        """Return the solver; its scales are the root mean squares of inputs without first tokens.

        Args:
            inner: Σ w x xᵀ with first tokens. It is overwritten.
        """
        count = self.count + sum(len(targets) for _, _, targets in self.first)
        with_first = (inner.diagonal() / count).sqrt()
        scales = (self.inner.diagonal() / self.count).sqrt()
        return Ridge(inner, scales.maximum(SMALLEST_SHARE * with_first), count)
