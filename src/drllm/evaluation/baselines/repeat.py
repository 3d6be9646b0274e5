"""Baseline: one block of neighbouring layers run twice, for every question.

The block is repeated as a whole (`0 1 2 3 2 3 4`), which decisions can't express beyond a single
layer; the baseline is a path, at its own executions, that can be exported as an ordinary model.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from drllm.evaluation.baselines.base import CHOICE, Baseline, Drawn, register
from drllm.paths import Path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LONGEST = 8
"""Blocks of about seven layers are what the source found best."""


@register
class BlockRepeat(Baseline):
    """Repeats the block that helps the gold answers' log-probability most.

    Source: RYS ("repeat yourself", the public notes on repeating middle blocks of Qwen2-72B); for
        depth up-scaling by copied layers, SOLAR (arXiv 2312.15166).
    """

    name = "block repeat"
    description = "one block of neighbouring layers runs twice; at its own executions"
    source = "RYS; depth up-scaling, arXiv 2312.15166"
    fitted_on = CHOICE
    order = 110
    needs = ("questions", "a task with options")
    has_own_depth = True

    @cached_property
    def block(self) -> tuple[int, int]:
        """First and last layer of the best block; of equal ones the shortest, then the first."""
        blocks = [
            (start, start + length - 1)
            for length in range(1, min(LONGEST, self.num_layers) + 1)
            for start in range(self.num_layers - length + 1)
        ]
        measure = self.fitted.measure("answers along")
        values = measure([repeated(*block, self.num_layers) for block in blocks])
        return blocks[values.index(max(values))]

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return its path, whatever the routes."""
        start, end = self.block
        block = f"layers {start} to {end}" if end > start else f"layer {start}"
        return Drawn(path=repeated(start, end, self.num_layers), note=f"runs {block} twice")


def repeated(start: int, end: int, num_layers: int) -> Path:
    """Return the path that runs a block twice, from its first layer to its last.

    Example:
        >>> repeated(1, 2, num_layers=4)
        (0, 1, 2, 1, 2, 3)
    """
    return (*range(end + 1), *range(start, num_layers))
