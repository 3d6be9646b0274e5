"""Ridge regression from sums over tokens: the one solver of refit, gaps and bypass.

The map W minimises Σ ‖y − W x‖² + λ N ‖W S‖², where S is the diagonal matrix of the scales of the
inputs and N the number of tokens. The sums Σ x xᵀ and Σ x yᵀ are all that it needs, so texts may be
summed up batch by batch. Everything is in float64.

Axes: n tokens, F inputs, D outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-6
"""The least scale of an input, as a share of the mean over inputs. An input that is always 0 would
divide by 0."""


class Sums:
    """Sums over tokens.

    Attributes:
        inner: Σ x xᵀ, `[F, F]`.
        cross: Σ x yᵀ, `[F, D]`.
        inputs: Σ x, `[F]`.
        outputs: Σ y, `[D]`.
        squares: Σ ‖y‖².
        count: N.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device | str) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.inner = torch.zeros(num_inputs, num_inputs, **options)
        self.cross = torch.zeros(num_inputs, num_outputs, **options)
        self.inputs = torch.zeros(num_inputs, **options)
        self.outputs = torch.zeros(num_outputs, **options)
        self.squares = torch.zeros((), **options)
        self.count = 0

    def add(self, inputs: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: x `[n, F]`, y `[n, D]`, and their weights `[n]`, 1 by default."""
        inputs = inputs.to(self.inner)
        outputs = outputs.to(self.inner)
        weighted = inputs
        weighted_outputs = outputs
        if weights is not None:
            weighted = inputs * weights[:, None]
            weighted_outputs = outputs * weights[:, None]
        self.inner += weighted.T @ inputs
        self.cross += weighted.T @ outputs
        self.inputs += weighted.sum(dim=0)
        self.outputs += weighted_outputs.sum(dim=0)
        self.squares += (weighted_outputs * outputs).sum()
        self.count += len(inputs)

    def merge(self, other: Sums) -> None:
        """Add the tokens of other sums."""
        for name in ("inner", "cross", "inputs", "outputs", "squares"):
            getattr(self, name).add_(getattr(other, name))
        self.count += other.count

    def error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Return the mean of ‖y − W x − b‖², with Wᵀ `[F, D]` and b `[D]`."""
        total = self.squares - 2 * (weight * self.cross).sum()
        total += (weight * (self.inner @ weight)).sum()
        if bias is not None:
            total += 2 * bias @ (weight.T @ self.inputs - self.outputs)
            total += self.count * bias @ bias
        return float(total / self.count)

    @property
    def plain_error(self) -> float:
        """The mean of ‖y‖²: the error of no map at all."""
        return float(self.squares / self.count)

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(self.inner.isfinite().all() and self.cross.isfinite().all())


class Ridge:
    """Solves the map for several λ and several outputs.

    Args:
        inner: Σ x xᵀ, `[F, F]`. It is overwritten.
        scales: S, `[F]`.
        count: N.
    """

    def __init__(self, inner: Tensor, scales: Tensor, count: int) -> None:
        least = SMALLEST_SCALE * float(scales.mean())
        scales = scales.clamp_min(least)
        self.scales = scales.masked_fill(scales == 0, 1.0)  # every input is 0 in every token
        self.count = count
        # With the inputs divided by their scales, the ridge is λ N times the identity.
        self.scaled = inner.div_(self.scales[:, None]).div_(self.scales)

    def factor(self, ridge: float) -> Tensor:
        """Return the Cholesky factor for λ, `[F, F]`."""
        matrix = self.scaled.clone()
        matrix.diagonal().add_(ridge * self.count)
        factor: Tensor = torch.linalg.cholesky(matrix)
        return factor

    def solve(self, cross: Tensor, factor: Tensor) -> Tensor:
        """Return Wᵀ, `[F, D]`, for Σ x yᵀ and the factor of a λ."""
        solution = torch.cholesky_solve(cross / self.scales[:, None], factor)
        return solution / self.scales[:, None]


def share_of_error(error: float, plain_error: float) -> float:
    """Return an error as a share of that without a map; 0 if nothing is left to explain."""
    return 0.0 if plain_error == 0 else error / plain_error
