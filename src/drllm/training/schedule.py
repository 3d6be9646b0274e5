"""The learning rate of each step.

Owns the shape of the schedule and what becomes of a warm-up that doesn't fit. Leaves counting
steps to `plans`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from drllm.config import TrainConfig

WARMUP_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate of each step: linear warm-up, then half a cosine to 0.

    Attributes:
        peak: The largest rate.
        warmup: Steps before the peak.
        steps: Steps in all.
    """

    peak: float
    warmup: int
    steps: int

    @classmethod
    def of(cls, config: TrainConfig, steps: int) -> Schedule:
        """Return the schedule of a run, with a shorter warm-up where it wouldn't fit.

        A warm-up as long as the run would end it before the rate has reached its peak. It then
        gets a tenth of the steps (docs/differences.md, D-14).
        """
        warmup = config.warmup_steps if config.warmup_steps < steps else int(WARMUP_SHARE * steps)
        return cls(peak=config.learning_rate, warmup=warmup, steps=steps)

    def rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0; none of them is 0.

        Example:
            >>> [Schedule(peak=1.0, warmup=1, steps=5).rate(step) for step in (0, 1, 3)]
            [0.5, 1.0, 0.5]
        """
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
