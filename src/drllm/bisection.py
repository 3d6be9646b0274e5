"""Bisection: find where a condition turns true, or the setting for a number of executions."""

from collections.abc import Callable
from typing import NamedTuple

NUM_HALVINGS = 60  # times the range is halved; a double has no more digits


class Setting(NamedTuple):
    """The value of a setting, and the mean executions that it gives on the calibration prompts."""

    value: float
    executions: float


def bisect(
    holds: Callable[[float], bool], low: float, high: float, halvings: int = NUM_HALVINGS
) -> tuple[float, float]:
    """Narrow a range in which a condition turns once, from false at `low` to true at `high`.

    Returns the last value at which the condition was false, and the first value at which it was
    true. The two ends aren't tested, and `high` may be below `low`.

    Example:
        >>> bisect(lambda x: x * x >= 2, 0.0, 2.0, halvings=3)
        (1.25, 1.5)
    """
    for _ in range(halvings):
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return low, high


def nearest_setting(
    measure: Callable[[float], float], executions: float, low: float, high: float
) -> Setting:
    """Find the setting whose mean executions are nearest to a target.

    Over N prompts the mean changes in steps of at least 1/N, so the target is seldom met exactly.
    From `low` to `high` the mean must only rise or only fall. If the range doesn't reach the
    target, an end of the range is nearest.

    Args:
        measure: A function that returns the mean executions for a value of the setting.
        executions: The target.
        low: One end of the range.
        high: The other end.
    """
    means = {low: measure(low), high: measure(high)}  # by value of the setting
    is_falling = means[low] > means[high]

    def is_past(value: float) -> bool:
        means[value] = measure(value)
        return (means[value] > executions) != is_falling

    bisect(is_past, low, high)
    nearest = min(means.values(), key=lambda mean: abs(mean - executions))
    # Return the middle of the step, since rounding errors would decide at its edges.
    values = [value for value, mean in means.items() if mean == nearest]
    return Setting((min(values) + max(values)) / 2, nearest)
