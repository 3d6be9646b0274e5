"""Routers trained from several seeds: how far their results lie apart, and their mean's interval.

Owns two numbers that must not be mixed. The *spread* says how much the training's randomness
moves a result on the same questions; the *interval* says how far the mean over the seeds may move
with other questions. Neither contains the other. Leaves running the routers to the stage.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from drllm.evaluation.curve import Outcomes, Point, differences


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


def seeds_row(
    routed: Sequence[Point], base: Point, permuted: Sequence[Point], seed: int
) -> dict[str, Any]:
    """Return what routers of several seeds did at one depth, for a file.

    Questions are resampled, each with its answers under all seeds. The seeds stay what they are,
    so the intervals are about these routers, not about others that more seeds would give.

    Args:
        routed: One point a seed, on the same questions and texts.
        base: The untouched model on them.
        permuted: The same seeds' own routes permuted over the questions; empty if that wasn't run.
        seed: Of the resampling.

    Returns:
        `setting`, `num_seeds`; for `accuracy`, `executions`, `gold_logprob` and `text_loss` the
        spread, None where it isn't known; the mean over the seeds against base and against the
        permuted routes as from `differences`, None where there are none.

    Raises:
        ValueError: No seeds, or points on another number of questions or texts.
    """
    mean = _mean_outcomes(routed)
    return {
        "setting": routed[0].setting,
        "num_seeds": len(routed),
        "accuracy": asdict(spread([point.accuracy for point in routed])),
        "executions": asdict(spread([point.executions for point in routed])),
        "gold_logprob": _known_spread([point.gold_logprob for point in routed]),
        "text_loss": _known_spread([point.text_loss for point in routed]),
        "against_base": differences(mean, base.outcomes, seed),
        "against_permuted": (
            differences(mean, _mean_outcomes(permuted), seed) if permuted else None
        ),
    }


def sentence(row: Mapping[str, Any]) -> str:
    """Say what routers of several seeds did at one depth.

    Args:
        row: From `seeds_row`.

    Example:
        >>> end = {"mean": 0.02, "interval": [-0.01, 0.05], "shown": None}
        >>> row = {"setting": "", "num_seeds": 2, "against_permuted": None}
        >>> row["accuracy"] = {"mean": 0.52, "lowest": 0.5, "highest": 0.54, "deviation": 0.028}
        >>> row["executions"] = {"mean": 28.0, "lowest": 27.5, "highest": 28.5}
        >>> row["against_base"] = {"accuracy": end, "gold_logprob": None, "text_loss": None}
        >>> sentence(row)[:52]
        'Routers of 2 seeds: accuracy 52.0 % (50.0 to 54.0, s'
    """
    at = f" at {row['setting']}" if row["setting"] else ""
    accuracy, executions = row["accuracy"], row["executions"]
    apart = f"{100 * accuracy['lowest']:.1f} to {100 * accuracy['highest']:.1f}"
    if accuracy["deviation"] is not None:
        apart += f", standard deviation {100 * accuracy['deviation']:.1f} points"
    said = (
        f"Routers of {row['num_seeds']} seeds{at}: accuracy {100 * accuracy['mean']:.1f} % "
        f"({apart}) at {executions['mean']:.2f} executions ({executions['lowest']:.2f} to "
        f"{executions['highest']:.2f})"
    )
    for words, found in (
        ("base's", row["against_base"]),
        ("that of their own routes permuted", row["against_permuted"]),
    ):
        if found is not None:
            low, high = (100 * end for end in found["accuracy"]["interval"])
            said += (
                f"; their mean less {words}: {100 * found['accuracy']['mean']:+.1f} points, 95 % "
                f"interval over questions {low:+.1f} to {high:+.1f}"
            )
    return said + "."


def _mean_outcomes(points: Sequence[Point]) -> Outcomes:
    return Outcomes(
        correct=over_seeds([point.outcomes.correct for point in points]),
        gold_logprob=over_seeds([point.outcomes.gold_logprob for point in points]),
        text_loss=over_seeds([point.outcomes.text_loss for point in points]),
    )


def _known_spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    return asdict(spread(known)) if len(known) == len(values) else None
