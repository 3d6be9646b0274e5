"""Functions of blocks without a model, so that workers start fast."""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drllm.work.ray import WorkerPlan
from drllm.work.run import Block, BlockFunction, BlockSteps

IDENTITY = {"class": "Toy"}
RUNTIME = {"device": "cpu"}


@dataclass(frozen=True)
class LoadNumber:
    """Loads a number as the model."""

    number: int

    def __call__(self, plan: WorkerPlan) -> tuple[int, Mapping[str, Any], Mapping[str, Any]]:
        """Return the number."""
        return self.number, IDENTITY, RUNTIME


@dataclass(frozen=True)
class AddUp(BlockFunction[Sequence[int], list[int]]):
    """Adds the model to each number of a block; a number of `deadly` kills the worker."""

    driver: int = 0  # this process, which survives
    deadly: tuple[int, ...] = ()

    def prepare(self, model: Any) -> Any:
        """Return ten times the model."""
        return 10 * model

    def __call__(self, prepared: Any, data: Sequence[int], steps: BlockSteps) -> list[int]:
        """Return each number plus what was prepared."""
        if set(data) & set(self.deadly) and os.getpid() != self.driver:
            os.kill(os.getpid(), signal.SIGKILL)
        sums = []
        for place, number in enumerate(data):
            sums.append(prepared + number)
            if steps.report is not None:
                steps.report((place + 1) / len(data), place + 1, "adding up")
        return sums

    def split(self, data: Sequence[int]) -> Sequence[Sequence[int]]:
        """Divide a block into its numbers."""
        return [[number] for number in data]

    def join(self, data: Sequence[int], results: Sequence[list[int]]) -> list[int]:
        """Join the sums."""
        return [result[0] for result in results]

    def give_up(self, data: Sequence[int], num_losses: int) -> list[int]:
        """Return minus the number of losses in place of a sum."""
        return [-num_losses]


BLOCKS = [Block(f"block {number}", [number, number + 100], 2) for number in range(6)]
SUMS = [[10 + number, 110 + number] for number in range(6)]  # of the model 1
