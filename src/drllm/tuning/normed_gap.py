"""Solve a gap where a norm follows the MLP, as in Gemma 2 and 3, GLM-4, OLMo 2 and 3, EXAONE 4.

The layer before the gap returns x + g ⊙ n(W z), where n(m) = m / rms(m) and g is the norm's gain.
So a change of W isn't a linear regression. It is solved in steps by the Gauss-Newton method. At the
present W and g, a small change of W moves the output by g ⊙ ΔW z / rms(W z), apart from the part
along n(W z), which the norm takes away and which is left out here. That is a ridge regression with
the factor 1 / rms(W z) at each token, as in `ridge`. Each step chooses λ and its own length by the
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

from drllm.tuning.ridge import RidgeSolver, TokenSums, share_of_error, weigh_first_tokens

MAX_STEPS = 6
READS_PER_STEP = 2  # of the tokens to fit: for the weight, and for the gain
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
        targets: T: the state of the full path that enters the layer after the gap, `[n, D]`.
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
        values = inputs @ self.weight.T
        sizes = (values.square().mean(dim=1, keepdim=True) + self.epsilon).sqrt()
        return values / sizes, sizes

    def residuals(self, tokens: NormedTokens) -> Tensor:
        """Return what the layer's output lacks, T − x − g ⊙ n(W z), `[n, D]`."""
        normed, _ = self.run(tokens.inputs.double())
        return (tokens.targets - tokens.states).double() - self.gain * normed

    def error(self, tokens: NormedTokens) -> float:
        """Return the mean squared residual of tokens, without first tokens."""
        residuals = self.residuals(tokens)[~tokens.is_first]
        return float(residuals.square().sum(dim=1).mean())


@dataclass(frozen=True, slots=True)
class NormedSolution:
    """A new weight and a new gain.

    Attributes:
        map: Both.
        ridge: λ of the last step; 0 if no step gained anything.
        unexplained: The squared error on the held-out tokens as a share of that before.
    """

    map: NormedMap
    ridge: float
    unexplained: float


def solve_normed_change(
    start: NormedMap,
    read_tokens: Callable[[], Iterable[NormedTokens]],
    held_out: NormedTokens,
    *,
    first_token_weight: float | None = None,
    on_solved: Callable[[], None] | None = None,
) -> NormedSolution:
    """Solve a new weight and a new gain.

    Args:
        start: The present weight and gain.
        read_tokens: Yields the tokens to fit, in parts; each step reads them twice.
        held_out: The tokens that choose λ and the lengths of steps.
        first_token_weight: As in `TokenSums.with_first_tokens`.
        on_solved: Called after each λ of each step.
    """
    on_solved = on_solved or _ignore
    first_error = start.error(held_out)
    best = _Trial(start, 0.0, first_error)
    ridge = 0.0
    for _ in range(MAX_STEPS):
        error = best.error
        sums = _sum_tokens(best.map, read_tokens())
        solver = RidgeSolver(sums, first_token_weight)
        step = _choose_step(best.map, solver, held_out, on_solved)
        if step.error < best.error:
            best = step
            ridge = step.ridge
        mean_square = float(sums.target / sums.num_tokens)
        weigh = _FirstTokenWeights(mean_square, first_token_weight)
        gain = _choose_gain(best.map, read_tokens(), weigh, held_out)
        if gain.error < best.error:
            best = gain
        if best.error > error * (1 - LEAST_GAIN):
            break
    return NormedSolution(best.map, ridge, share_of_error(best.error, first_error))


@dataclass(frozen=True, slots=True)
class _Trial:
    """A weight and a gain, with their error on held-out tokens."""

    map: NormedMap
    ridge: float
    error: float


def _sum_tokens(present: NormedMap, parts: Iterable[NormedTokens]) -> TokenSums:
    """Return the sums of the regression for a change of W."""
    num_outputs, num_inputs = present.weight.shape
    sums = TokenSums(num_inputs, num_outputs, present.weight.device)
    magnitude = present.gain.abs()
    least = SMALLEST_GAIN * magnitude.mean()
    divisor = present.gain.sign() * magnitude.clamp_min(least)
    divisor[present.gain == 0] = least
    for tokens in parts:
        _, sizes = present.run(tokens.inputs.double())
        residuals = present.residuals(tokens) / divisor
        sums.add(tokens.inputs.double() / sizes, residuals, tokens.targets, tokens.is_first)
    return sums


def _ignore() -> None: ...


def _choose_step(
    present: NormedMap,
    solver: RidgeSolver,
    held_out: NormedTokens,
    on_solved: Callable[[], None],
) -> _Trial:
    """Return the step with the least error on held-out tokens.

    Only the best weight so far is kept, since each is as large as W.
    """
    best: _Trial | None = None
    for ridge in RIDGES:
        change = solver.solve(ridge).T  # [D, F]
        for length in LENGTHS:
            changed = replace(present, weight=present.weight + length * change)
            trial = _Trial(changed, ridge, changed.error(held_out))
            if best is None or trial.error < best.error:
                best = trial
        on_solved()
    assert best is not None
    return best


@dataclass(frozen=True, slots=True)
class _FirstTokenWeights:
    """The weights of first tokens; see `ridge`."""

    mean_square: float
    weight: float | None

    def __call__(self, tokens: NormedTokens) -> Tensor:
        """Return the weight of each token, `[n, 1]`."""
        weights = torch.ones(len(tokens.is_first), dtype=torch.float64)
        weights = weights.to(tokens.targets.device)
        squares = tokens.targets[tokens.is_first].double().square().sum(dim=1)
        weights[tokens.is_first] = weigh_first_tokens(squares, self.mean_square, self.weight)
        return weights[:, None]


def _choose_gain(
    present: NormedMap,
    parts: Iterable[NormedTokens],
    weigh: _FirstTokenWeights,
    held_out: NormedTokens,
) -> _Trial:
    """Return the gain with the least error on held-out tokens, solved channel by channel."""
    products = torch.zeros_like(present.gain)
    squares = torch.zeros_like(present.gain)
    for tokens in parts:
        normed, _ = present.run(tokens.inputs.double())
        additions = (tokens.targets - tokens.states).double()
        weights = weigh(tokens)
        products += (weights * normed * additions).sum(dim=0)
        squares += (weights * normed.square()).sum(dim=0)
    trials = []
    for ridge in GAIN_RIDGES:
        penalty = ridge * squares.mean()
        solved_gain = (products + penalty * present.gain) / (squares + penalty)
        # A channel that is 0 in every token keeps its gain: nothing says what it should be.
        gain = torch.where(squares > 0, solved_gain, present.gain)
        changed = replace(present, gain=gain)
        trials.append(_Trial(changed, ridge, changed.error(held_out)))
    return min(trials, key=lambda trial: trial.error)
