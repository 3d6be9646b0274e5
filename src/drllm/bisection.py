"""Bisection: finds where a condition turns, and the setting that gives a target mean."""

from collections.abc import Callable
from typing import NamedTuple

NUM_HALVINGS = 60  # of the range; a double has no more digits


class Setting(NamedTuple):
    """A setting's value, and the mean executions over the calibration prompts with it."""

    value: float
    executions: float


def bisect(
    holds: Callable[[float], bool], low: float, high: float, halvings: int = NUM_HALVINGS
) -> tuple[float, float]:
    """Narrow a range in which a condition turns once, from false at `low` to true at `high`.

    The two ends aren't tested, and `high` may be below `low`. Returns the last value at which the
    condition was false, and the first at which it was true.

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
    """Return the setting between two ends whose mean executions are nearest to a target.

    Over N prompts the mean changes in steps of at least 1/N, so the target is seldom met exactly.
    The measured mean must only fall or only rise from one end to the other; for a target beyond an
    end, that end is nearest.

    Args:
        measure: Returns the mean executions with a setting.
        executions: The target.
        low: One end of the range.
        high: The other end.
    """
    measured = {value: measure(value) for value in (low, high)}
    is_falling = measured[low] > measured[high]

    def is_past(value: float) -> bool:
        measured[value] = measure(value)
        return (measured[value] > executions) != is_falling

    bisect(is_past, low, high)
    nearest = min(measured.values(), key=lambda mean: abs(mean - executions))
    # The middle of the step, not its edge, where the last bits of arithmetic would decide.
    values = [value for value, mean in measured.items() if mean == nearest]
    return Setting((min(values) + max(values)) / 2, nearest)
