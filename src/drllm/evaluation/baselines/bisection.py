"""The setting of one knob at which something runs the wanted executions on average.

Owns bisecting a step function that never turns back. Leaves what the knob is, and measuring it,
to its callers, whose measuring is a look at numbers that are there already. (`models.dial` looks
for the bias of routers, where every probe is a pass over all prompts and the function may turn.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

NUM_HALVINGS = 60
"""Steps nearer to each other than the range over 2 to this power are not told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A knob's position, and what it gives.

    Attributes:
        value: The position.
        executions: Mean executions over the calibration prompts at this position, measured.
    """

    value: float
    executions: float


def nearest_setting(
    measure: Callable[[float], float], executions: float, low: float, high: float
) -> Setting:
    """Return the setting between two ends whose mean executions lie nearest to those wanted.

    Over N prompts the mean goes in steps of at least 1/N, so it is seldom met to the last digit;
    what is returned says what it gives.

    Args:
        measure: Mean executions at a setting; from one end to the other it only falls or only
            rises.
        executions: Mean executions wanted; beyond either end that end is nearest.
        low: One end.
        high: The other.

    Example:
        >>> nearest_setting(lambda x: 10 - round(x), executions=6.2, low=0.0, high=8.0).executions
        6
    """
    seen = {value: measure(value) for value in (low, high)}
    low_is_above = seen[low] > seen[high]
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        seen[middle] = measure(middle)
        if (seen[middle] > executions) == low_is_above:
            low = middle
        else:
            high = middle
    nearest = min(seen.values(), key=lambda found: abs(found - executions))
    # Not at the edge of a step, where the last bits of arithmetic would decide.
    where = [value for value, found in seen.items() if found == nearest]
    return Setting(value=(min(where) + max(where)) / 2, executions=nearest)
