"""Bisection: where a condition turns, and the setting of one knob that gives a wanted mean."""

from collections.abc import Callable
from typing import NamedTuple

NUM_HALVINGS = 60  # of the range; a double has no more digits


class Setting(NamedTuple):
    """A knob's position, and the mean executions over the calibration prompts measured there."""

    value: float
    executions: float


def bisect(
    holds: Callable[[float], bool], low: float, high: float, halvings: int = NUM_HALVINGS
) -> tuple[float, float]:
    """Narrow a range in which a condition turns once, from false at `low` to true at `high`.

    It isn't asked at the two ends, and `high` may be below `low`. Returned are the last value at
    which it was false, and the first at which it was true.

    Example:
        >>> bisect(lambda x: x * x >= 2, 0.0, 2.0, halvings=3)
        (1.25, 1.5)
    """
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def nearest_setting(
    measure: Callable[[float], float], executions: float, low: float, high: float
) -> Setting:
    """Return the setting between two ends whose mean executions are nearest to those wanted.

    Over N prompts the mean goes in steps of at least 1/N, so it is seldom met to the last digit;
    what is returned says what it gives. From one end to the other, what is measured only falls or
    only rises; of executions beyond either end that end is nearest.
    """
    seen = {value: measure(value) for value in (low, high)}
    low_is_above = seen[low] > seen[high]

    def is_past(value: float) -> bool:
        seen[value] = measure(value)
        return (seen[value] > executions) != low_is_above

    bisect(is_past, low, high)
    nearest = min(seen.values(), key=lambda found: abs(found - executions))
    # Not at the edge of a step, where the last bits of arithmetic would decide.
    where = [value for value, found in seen.items() if found == nearest]
    return Setting((min(where) + max(where)) / 2, nearest)
