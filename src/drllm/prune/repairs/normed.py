"""Solve a gap where a norm follows the MLP, as in Gemma 2 and 3, GLM-4, OLMo 2 and 3, EXAONE 4.

The layer before the gap returns x + g ⊙ n(W z), where n(m) = m / rms(m) and g is the norm's gain.
So a change of W isn't a linear regression. It is solved in steps by the Gauss-Newton method. At the
present W and g, a small change of W moves the output by g ⊙ ΔW z / rms(W z), apart from the part
along n(W z), which the norm takes away and which is left out here. That is a ridge regression with
the factor 1 / rms(W z) at each token, as in `refit`. Each step chooses λ and its own length by the
error on held-out texts, computed with the norm. After it, the gain of each channel is solved by a
ridge regression towards the present one. The steps end when they gain nothing on held-out texts.

Axes: n tokens, F inner size of the MLP, D hidden.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from drllm.prune.repairs.weighted import WeightedSums

MAX_STEPS = 6
LEAST_GAIN = 1e-3  # a step that lowers the error by a smaller share is the last one
RIDGES = tuple(10.0**exponent for exponent in range(-4, 2))
LENGTHS = (1.0, 0.5, 0.25)  # of a step, as a share of the solved change
GAIN_RIDGES = (0.0, 0.01, 0.1, 1.0, 10.0)
SMALLEST_GAIN = 0.01
"""The least gain of a channel that residuals are divided by, as a share of the mean gain. A channel
with a gain near 0 can't be repaired."""


class NormedTokens(NamedTuple):
    """What the regression of a gap needs of some tokens.

    Attributes:
        inputs: z: the input of the down-projection, `[n, F]`.
        states: x: the state to which the norm's output is added, `[n, D]`.
        targets: T: the state of the full model that enters the layer after the gap, `[n, D]`.
        is_first: Whether a token is the first of its text, bool `[n]`.
    """

    inputs: Tensor
    states: Tensor
    targets: Tensor
    is_first: Tensor


@dataclass(frozen=True, slots=True)
class NormedMap:
    """A down-projection and the gain of the norm behind it, in float64.

    Attributes:
        weight: W, `[D, F]`.
        gain: g, `[D]`.
        epsilon: What the norm adds to the mean square.
    """

    weight: Tensor
    gain: Tensor
    epsilon: float

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return n(W z) `[n, D]` and rms(W z) `[n, 1]` for inputs z `[n, F]`."""
        values = inputs.double() @ self.weight.T
        sizes = (values.square().mean(dim=1, keepdim=True) + self.epsilon).sqrt()
        return values / sizes, sizes

    def residuals(self, tokens: NormedTokens) -> Tensor:
        """Return what the layer's output lacks, T − x − g ⊙ n(W z), `[n, D]`."""
        normed, _ = self.run(tokens.inputs)
        return (tokens.targets - tokens.states).double() - self.gain * normed

    def error(self, tokens: NormedTokens) -> float:
        """Return the mean squared residual of tokens, without first tokens."""
        residuals = self.residuals(tokens)[~tokens.is_first]
        return float(residuals.square().sum(dim=1).mean())


def solve_normed(
    start: NormedMap,
    read_tokens: Callable[[], Iterable[NormedTokens]],
    held_out: NormedTokens,
) -> tuple[NormedMap, float]:
    """Return the new weight and gain, and λ of the last step (0 if no step gained anything).

    Args:
        start: The present weight and gain.
        read_tokens: Yields the tokens to fit, in parts; each step reads them twice.
        held_out: The tokens that choose λ and the lengths of steps.
    """
    best = start
    least_error = start.error(held_out)
    best_ridge = 0.0
    for _ in range(MAX_STEPS):
        error_before = least_error

        # The weight.
        magnitude = best.gain.abs()
        least = SMALLEST_GAIN * magnitude.mean()
        divisor = best.gain.sign() * magnitude.clamp_min(least)
        divisor[best.gain == 0] = least
        num_outputs, num_inputs = best.weight.shape
        sums = WeightedSums(num_inputs, num_outputs, best.weight.device)
        for tokens in read_tokens():
            _, sizes = best.run(tokens.inputs)
            residuals = best.residuals(tokens) / divisor
            sums.add(tokens.inputs.double() / sizes, residuals, tokens.targets, tokens.is_first)
        present = best
        inner, cross, _ = sums.with_first_tokens()
        solver = sums.make_solver(inner)
        for ridge in RIDGES:
            change = solver.solve(cross, solver.factor(ridge)).T  # [D, F]
            for length in LENGTHS:
                changed = replace(present, weight=present.weight + length * change)
                error = changed.error(held_out)
                if error < least_error:
                    best, least_error, best_ridge = changed, error, ridge

        # The gain, channel by channel.
        present = best
        products = torch.zeros_like(present.gain)
        squares = torch.zeros_like(present.gain)
        for tokens in read_tokens():
            normed, _ = present.run(tokens.inputs)
            additions = (tokens.targets - tokens.states).double()
            weights = sums.weigh(tokens.targets, tokens.is_first)[:, None]
            products += (weights * normed * additions).sum(dim=0)
            squares += (weights * normed.square()).sum(dim=0)
        for ridge in GAIN_RIDGES:
            penalty = ridge * squares.mean()
            solved = (products + penalty * present.gain) / (squares + penalty)
            # A channel that is 0 in every token keeps its gain: nothing says what it should be.
            changed = replace(present, gain=torch.where(squares > 0, solved, present.gain))
            error = changed.error(held_out)
            if error < least_error:
                best, least_error = changed, error

        if least_error > error_before * (1 - LEAST_GAIN):
            break
    return best, best_ridge
