"""Finds by bisection where a condition turns true, and the setting for a number of executions."""

from collections.abc import Callable
from typing import NamedTuple

NUM_HALVINGS = 60  # narrows a range of 1 to about 1e-18


class Setting(NamedTuple):
    """The value of a setting, and the mean executions that it gives on the calibration prompts."""

    value: float
    executions: float


def bisect(
    holds: Callable[[float], bool], low: float, high: float, halvings: int = NUM_HALVINGS
) -> tuple[float, float]:
    """Narrow a range in which a condition turns once, from false at `low` to true at `high`.

    Returns the two ends of the narrowed range: the condition is false at the first and true at the
    second. The condition isn't tested at the ends that are passed. `high` may be below `low`.

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
    From `low` to `high` the mean must only rise or only fall. If no value in the range reaches the
    target, the result is an end of the range.

    Args:
        measure: A function that returns the mean executions for a value of the setting.
        executions: The target for the mean.
        low: One end of the range.
        high: The other end.
    """
    means = {low: measure(low), high: measure(high)}  # by value of the setting
    is_falling = means[low] > means[high]

    def is_past_target(value: float) -> bool:
        means[value] = measure(value)
        is_above = means[value] > executions
        return is_above != is_falling

    bisect(is_past_target, low, high)  # called to fill `means`
    nearest_mean = min(means.values(), key=lambda mean: abs(mean - executions))
    # All values of a step give the same mean. The middle of the step is returned, because at the
    # edges of the step rounding errors would decide.
    values = [value for value, mean in means.items() if mean == nearest_mean]
    return Setting((min(values) + max(values)) / 2, nearest_mean)
