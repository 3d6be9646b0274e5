"""Solve the change of a down-projection: a ridge regression from sums over tokens.

The change ΔW of a projection's weight minimises

    Σ w ‖R − c ΔW z‖² + λ N ‖ΔW S‖²

over tokens. z is the projection's input, c the factor on its output, R what the layer's output
lacks, w the token's weight, N the number of tokens, and S the diagonal matrix of the root mean
squares of c z. The sums Σ w c² z zᵀ and Σ w c z Rᵀ are all that it needs, so texts may be summed up
batch by batch.

The first token of a text counts apart. Some models make it an attention sink: in one layer of
SmolLM2 its z is 500 times as large as that of other tokens, and its state 30 times. Without it in
the sums, the new weight moves it at random. With the weight 1 it outweighs its text. So its weight
is the mean ‖T‖² of the other tokens over its own ‖T‖², where T is the target state.

Axes: n tokens, F inner size of the MLP, D hidden.

Source: ours; the target of a gap is ReplaceMe's (arXiv 2505.02819).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 3))
"""The values of λ to choose from, 10⁻⁶ to 10. Few tokens need a large one."""
MATRICES_AT_PEAK = 5
"""How many matrices `[F, F]` in float64 are in memory at most: the sums of the texts to fit and of
those that choose λ, and three while an equation is solved."""
PRODUCTS_AT_PEAK = 5
"""How many matrices `[F, D]` in float64 are in memory at most: those of both sums and of the
solver, the solution, and one while it is computed."""
SMALLEST_SCALE = 1e-6
"""The least root mean square of an input, as a share of the mean over inputs. An input that is
always 0 would divide by 0."""
SMALLEST_SHARE = 1e-3
"""The least root mean square of an input, as a share of that with first tokens. In models with ReLU
some inputs are 0 at all tokens but the first. Without a least value the numbers in their equations
would be too large for λ to count beside them, so that they couldn't be solved."""


LARGEST_WEIGHT = 1000.0
"""The largest weight of a first token. A target of norm 0, as of a padding token, would divide by
0."""


def share_of_error(error: float, plain_error: float) -> float:
    """Return an error as a share of the error without a change.

    The share is 0 if that is 0: a layer that does nothing leaves nothing to explain.
    """
    return 0.0 if plain_error == 0 else error / plain_error


def weigh_first_tokens(squares: Tensor, mean_square: float, weight: float | None) -> Tensor:
    """Return the weights of first tokens, `[n]`.

    Args:
        squares: ‖T‖² of each, `[n]`.
        mean_square: The mean ‖T‖² of the other tokens.
        weight: As in `TokenSums.with_first_tokens`.
    """
    if weight is not None:
        return torch.full_like(squares, weight)
    return mean_square / squares.clamp_min(mean_square / LARGEST_WEIGHT)


class TokenSums:
    """The sums over tokens from which the change of a weight is solved, in float64.

    Args:
        inputs: F, the number of inputs of the projection.
        outputs: D, the number of its outputs.
        device: Where to sum up.

    Attributes:
        inner: Σ c² z zᵀ over all tokens but the first of each text, `[F, F]`.
        cross: Σ c z Rᵀ over the same tokens, `[F, D]`.
        error: Σ ‖R‖² over the same tokens.
        target: Σ ‖T‖² over the same tokens.
        num_tokens: How many tokens these are.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.inner = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)
        self.target = torch.zeros((), dtype=torch.float64, device=device)
        self.num_tokens = 0
        # c z `[n, F]`, R `[n, D]` and ‖T‖² `[n]` of first tokens, whose weights need `target`.
        self._first: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, inputs: Tensor, residuals: Tensor, targets: Tensor, is_first: Tensor) -> None:
        """Add tokens.

        Args:
            inputs: c z of each token, `[n, F]`.
            residuals: R of each token, `[n, D]`.
            targets: T of each token, `[n, D]`.
            is_first: Whether a token is the first of its text, bool `[n]`.
        """
        inputs = inputs.double()
        residuals = residuals.double()
        squares = targets.double().square().sum(dim=1)  # [n]
        self._first.append((inputs[is_first], residuals[is_first], squares[is_first]))
        others = ~is_first
        inputs = inputs[others]
        residuals = residuals[others]
        self.inner += inputs.T @ inputs
        self.cross += inputs.T @ residuals
        self.error += residuals.square().sum()
        self.target += squares[others].sum()
        self.num_tokens += len(inputs)

    def merge(self, other: TokenSums) -> None:
        """Add the tokens of other sums."""
        self.inner += other.inner
        self.cross += other.cross
        self.error += other.error
        self.target += other.target
        self.num_tokens += other.num_tokens
        self._first += other._first

    def scales(self) -> Tensor:
        """Return the root mean square of each input c z, without first tokens, `[F]`."""
        scales = (self.inner.diagonal() / self.num_tokens).sqrt()
        return scales.clamp_min(SMALLEST_SCALE * float(scales.mean()))

    def with_first_tokens(self, weight: float | None) -> tuple[Tensor, Tensor, int]:
        """Return Σ w c² z zᵀ, Σ w c z Rᵀ and the number of tokens, first tokens included.

        Args:
            weight: The weight of every first token; None gives each the weight of this module's
                docstring.
        """
        inputs, residuals, squares = (torch.cat(parts) for parts in zip(*self._first, strict=True))
        mean_square = float(self.target / self.num_tokens)
        weights = weigh_first_tokens(squares, mean_square, weight)  # [n]
        weighted = inputs * weights[:, None]
        inner = self.inner + weighted.T @ inputs
        cross = self.cross + weighted.T @ residuals
        return inner, cross, self.num_tokens + len(squares)

    def error_of(self, change: Tensor) -> float:
        """Return the mean of ‖R − c ΔW z‖² over tokens, without first tokens.

        Args:
            change: ΔWᵀ, `[F, D]`.
        """
        explained = 2 * (change * self.cross).sum()
        explained -= (change * (self.inner @ change)).sum()
        return float((self.error - explained) / self.num_tokens)


@dataclass(frozen=True, slots=True)
class Solution:
    """The change of a weight, and how well it does.

    Attributes:
        change: ΔW, `[D, F]` in float64.
        ridge: λ.
        unexplained: The squared error on the held-out tokens as a share of that without a change.
    """

    change: Tensor
    ridge: float
    unexplained: float


def solve_change(
    fit: TokenSums,
    held_out: TokenSums,
    *,
    ridges: Sequence[float] = RIDGES,
    first_token_weight: float | None = None,
    on_solved: Callable[[], None] | None = None,
) -> Solution:
    """Solve the change of a weight with the λ that fits held-out texts best.

    The change is solved from `fit` for each λ, and compared on `held_out`. With the best λ, it is
    solved once more from both: `held_out` is added to `fit`, so that no third matrix is needed.

    Args:
        fit: The sums of the texts that the change is solved from.
        held_out: The sums of texts that λ is chosen on.
        ridges: The values of λ to choose from.
        first_token_weight: As in `TokenSums.with_first_tokens`.
        on_solved: Called after each λ, and after the last solution.
    """
    on_solved = on_solved or _ignore
    solver = RidgeSolver(fit, first_token_weight)
    errors: dict[float, float] = {}
    for ridge in ridges:
        errors[ridge] = held_out.error_of(solver.solve(ridge))
        on_solved()
    best = min(errors, key=errors.__getitem__)
    error_without_change = float(held_out.error / held_out.num_tokens)
    del solver  # its matrix isn't needed beside that of the last solution
    fit.merge(held_out)
    change = RidgeSolver(fit, first_token_weight).solve(best)
    on_solved()
    unexplained = share_of_error(errors[best], error_without_change)
    return Solution(change.T.contiguous(), best, unexplained)


def _ignore() -> None: ...


class RidgeSolver:
    """Solves the change of a weight for several λ.

    With the inputs divided by their scales S, the ridge is λ N times the identity.
    """

    def __init__(self, sums: TokenSums, first_token_weight: float | None) -> None:
        inner, cross, self.num_tokens = sums.with_first_tokens(first_token_weight)
        with_first = (inner.diagonal() / self.num_tokens).sqrt()
        scales = sums.scales().maximum(SMALLEST_SHARE * with_first)
        self.scales = scales.masked_fill(scales == 0, 1.0)  # all inputs are 0 in every token
        self.inner = inner.div_(self.scales[:, None]).div_(self.scales)  # [F, F]
        self.cross = cross.div_(self.scales[:, None])  # [F, D]

    def solve(self, ridge: float) -> Tensor:
        """Return ΔWᵀ, `[F, D]`."""
        inner = self.inner.clone()
        inner.diagonal().add_(ridge * self.num_tokens)
        factor = torch.linalg.cholesky(inner)
        return torch.cholesky_solve(self.cross, factor) / self.scales[:, None]
