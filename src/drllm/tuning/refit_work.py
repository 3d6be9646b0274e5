"""How much work a refit is, and how much memory it needs, before and while it runs.

Work is counted in multiply-adds in float32. It is only as exact as a progress bar needs: attention
counts as its weights alone, and padding isn't counted.

Axes: F inner size of an MLP, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drllm.paths import Gap
from drllm.tuning.layer_states import TOKENS_AT_ONCE
from drllm.tuning.ridge import MATRICES_AT_PEAK, PRODUCTS_AT_PEAK, RIDGES
from drllm.work.listener import OnProgress

NUM_SOLUTIONS = len(RIDGES) + 1  # one with each λ, then one with the best λ and all texts
SUM_COST = 2  # the cost of a multiply-add of sums, in float64, in multiply-adds in float32
SOLVE_COST = 6  # the same of equations, which use the processor less well


@dataclass(frozen=True, slots=True)
class MapSize:
    """The size of a down-projection."""

    num_inputs: int  # F
    num_outputs: int  # D

    @property
    def sum_work(self) -> float:
        """The work to add one token to the sums."""
        return SUM_COST * self.num_inputs * (self.num_inputs + self.num_outputs)

    @property
    def solve_work(self) -> float:
        """The work to solve the equations for one λ."""
        num_inputs = self.num_inputs
        return SOLVE_COST * num_inputs**2 * (num_inputs / 6 + 2 * self.num_outputs)

    @property
    def num_bytes(self) -> int:
        """The memory for the sums, for the equations, and for the tokens of one batch."""
        size = torch.float64.itemsize
        squares = MATRICES_AT_PEAK * size * self.num_inputs**2
        products = PRODUCTS_AT_PEAK * size * self.num_inputs * self.num_outputs
        tokens = 3 * TOKENS_AT_ONCE * size * self.num_inputs
        return squares + products + tokens

    def held_out_bytes(self, num_tokens: int) -> int:
        """Return the memory for held-out tokens where a norm follows the MLP.

        The input, the state and the target of each are kept in float32, and are in float64 while
        an error is computed. That takes less than both in float64.
        """
        return 2 * torch.float64.itemsize * num_tokens * (self.num_inputs + 2 * self.num_outputs)


@dataclass(frozen=True, slots=True)
class GapWork:
    """The work of one gap.

    Attributes:
        num_layers: How many layers run before its sums, along both paths together.
        layer_size: The number of weights of a layer.
        size: The size of its down-projection.
        num_tokens: The number of calibration tokens.
        num_reads: How often they are read. Where a norm follows the MLP, each step reads them.
        num_layers_again: How many layers run when they are read again.
        num_solutions: How often the equations are solved.
    """

    num_layers: int
    layer_size: float
    size: MapSize
    num_tokens: int
    num_reads: int = 1
    num_layers_again: int = 1
    num_solutions: int = NUM_SOLUTIONS

    @property
    def per_token(self) -> float:
        """The work for each token when it is read first."""
        return self.num_layers * self.layer_size + self.size.sum_work

    @property
    def per_token_again(self) -> float:
        """The work for each token when it is read again."""
        return self.num_layers_again * self.layer_size + self.size.sum_work

    @property
    def total(self) -> float:
        """All work of the gap, or more if its steps end early."""
        reads = self.per_token + (self.num_reads - 1) * self.per_token_again
        return self.num_tokens * reads + self.num_solutions * self.size.solve_work


def count_layers(
    gaps: Sequence[Gap], layers: Sequence[int], num_solved: int, *, keeps_states: bool
) -> list[int]:
    """Return how many layers run for each gap, along both paths together.

    Args:
        gaps: The gaps of a path, in order.
        layers: The layers of the path.
        num_solved: How many of the gaps an earlier run has solved.
        keeps_states: Whether each gap goes on with the states of the gap before it.
    """
    counts = []
    full_start = 0
    repaired_start = 0
    for number, gap in enumerate(gaps[num_solved:], num_solved):
        full = gap.next_layer - full_start
        repaired = len([layer for layer in layers if repaired_start <= layer < gap.layer])
        if number == 0:
            repaired = 0  # up to the first gap, the states of the full path are used
        counts.append(full + repaired + 1)  # the layer before the gap runs once more
        if keeps_states:
            full_start = gap.next_layer
            repaired_start = gap.layer
    return counts


class RefitProgress:
    """Reports how far a refit is.

    Args:
        works: The work of each gap that is left.
        gaps: These gaps.
        on_progress: Receives the progress.
    """

    def __init__(
        self, works: Sequence[GapWork], gaps: Sequence[Gap], on_progress: OnProgress
    ) -> None:
        self.works = works
        self.gaps = gaps
        self.on_progress = on_progress
        self.total = sum(work.total for work in works)
        self.num_gaps_done = 0
        self.num_tokens_read = 0  # of the present gap
        self.done = 0.0  # the work that is done

    def add_tokens(self, num_tokens: int) -> None:
        """Count tokens of the present gap that were added to its sums."""
        work = self.works[self.num_gaps_done]
        per_token = work.per_token
        if self.num_tokens_read >= work.num_tokens:
            per_token = work.per_token_again
        self.num_tokens_read += num_tokens
        self._add(num_tokens * per_token, "summing up")

    def add_solution(self) -> None:
        """Count one solution of the present gap's equations."""
        self._add(self.works[self.num_gaps_done].size.solve_work, "solving")

    def end_gap(self) -> None:
        """Go on with the next gap. The work that a gap didn't need counts as done."""
        self.num_gaps_done += 1
        self.num_tokens_read = 0
        self.done = sum(work.total for work in self.works[: self.num_gaps_done])

    def _add(self, work: float, step: str) -> None:
        self.done += work
        gap = self.gaps[self.num_gaps_done]
        number = f"gap {self.num_gaps_done + 1} of {len(self.gaps)}"
        note = f"{number} after layer {gap.layer}, {step}"
        self.on_progress(min(self.done, self.total), self.total, note)
