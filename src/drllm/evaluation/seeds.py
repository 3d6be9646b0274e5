"""Routers trained from several seeds: how far their results lie apart, and their mean's interval.

Owns two numbers that must not be mixed. The *spread* says how much the training's randomness
moves a result on the same questions; the *interval* says how far the mean over the seeds may move
with other questions. Neither contains the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from drllm.evaluation.statistics import BOOTSTRAP_DRAWS, mean_interval


@dataclass(frozen=True, slots=True)
class Spread:
    """One result under several seeds, on the same questions.

    Attributes:
        mean: Over the seeds.
        lowest: Of the seeds.
        highest: Of the seeds.
        deviation: Standard deviation between seeds; None where there is one alone.
        num_seeds: How many there are.
    """

    mean: float
    lowest: float
    highest: float
    deviation: float | None
    num_seeds: int

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.mean:.3f} (one seed)"
        return (
            f"{self.mean:.3f} (standard deviation {self.deviation:.3f} over {self.num_seeds} "
            f"seeds, {self.lowest:.3f} to {self.highest:.3f})"
        )


def spread(results: Sequence[float]) -> Spread:
    """Return how far one result lies apart between seeds.

    Args:
        results: One per seed: an accuracy, or any other mean over the same questions.

    Raises:
        ValueError: No results.

    Example:
        >>> print(spread([0.50, 0.54, 0.52]))
        0.520 (standard deviation 0.020 over 3 seeds, 0.500 to 0.540)
    """
    if not results:
        raise ValueError("a spread needs at least one seed")
    deviation = statistics.stdev(results) if len(results) > 1 else None
    return Spread(statistics.fmean(results), min(results), max(results), deviation, len(results))


def over_seeds(by_seed: Sequence[Sequence[float]]) -> list[float]:
    """Return each question's mean over the seeds.

    Args:
        by_seed: For each seed, one value per question, in one order.

    Raises:
        ValueError: No seeds, or another number of questions for some of them.

    Example:
        >>> over_seeds([[1.0, 0.0], [1.0, 1.0]])
        [1.0, 0.5]
    """
    if not by_seed:
        raise ValueError("a mean over seeds needs at least one")
    return [statistics.fmean(values) for values in zip(*by_seed, strict=True)]


def pooled_interval(
    by_seed: Sequence[Sequence[float]],
    reference: Sequence[float] | None = None,
    *,
    seed: int = 0,
    draws: int = BOOTSTRAP_DRAWS,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the interval over questions of a mean over seeds, or of its difference to a system.

    Questions are resampled, each with its answers under all seeds. The seeds stay what they are,
    so the interval is about these routers, not about others that more seeds would give.

    Args:
        by_seed: For each seed, one value per question, in one order.
        reference: Another system's values on the same questions, which are taken off (base).
        seed: Of the resampling.
        draws: How often the questions are drawn anew.
        confidence: In (0, 1).

    Raises:
        ValueError: No seeds or questions, or another number of questions for some of them.
    """
    means = over_seeds(by_seed)
    if reference is not None:
        means = [mean - value for mean, value in zip(means, reference, strict=True)]
    return mean_interval(means, seed, draws, confidence)
