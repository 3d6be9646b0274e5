"""Opponent: layers given up one by one, each time the one whose absence hurts a measure least.

Owns the greedy choice. Leaves what hurts to the measure, and following the order at given
executions to `static`.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drllm.errors import ConfigError
from drllm.evaluation.opponents.measures import Measure
from drllm.paths import Decision, full_decisions


@dataclass(frozen=True, slots=True)
class GreedyOrder:
    """Layers in the order in which they are given up.

    Attributes:
        layers: The layer given up first, the one given up next, and so on; for `static.nested`.
        values: The measure with no layer given up, with the first, with the first two, and so on:
            one more than layers.
    """

    layers: tuple[int, ...]
    values: tuple[float, ...]


def greedy_order(
    measure: Measure, num_layers: int, *, most: int | None = None, keep: Sequence[int] = ()
) -> GreedyOrder:
    """Give up one layer after the other, each time the one whose absence the measure likes best.

    A step tries every layer that is left, so k steps take about k · L candidates; all candidates
    of a step are measured at once. One layer is always left. Of equal layers the deepest goes.

    With `token_logprob` on texts this is SLEB, whose code never gives up the first or the last
    layer (`keep`); with `gold_logprob` it is TALE by log-probability instead of accuracy. Unlike
    TALE it doesn't stop where the measure falls: opponents are compared at given executions.

    Args:
        measure: How good decisions are on the questions that may be chosen on.
        num_layers: L.
        most: Stop after so many layers; None goes on to the last.
        keep: Layers never given up.

    Returns:
        The order, with the measure at each step.

    Raises:
        ConfigError: More layers than can be given up.

    Source: SLEB (arXiv 2402.09025); TALE (arXiv 2510.22767).

    Example:
        >>> damage = [9.0, 1.0, 3.0]
        >>> def measure(plans):
        ...     return [-sum(d for d, runs in zip(damage, plan) if not runs) for plan in plans]
        >>> greedy_order(measure, 3)
        GreedyOrder(layers=(1, 2), values=(0, -1.0, -4.0))
    """
    candidates = [layer for layer in range(num_layers - 1, -1, -1) if layer not in keep]
    available = min(len(candidates), num_layers - 1)
    if most is not None and not 0 <= most <= available:
        raise ConfigError(
            f"{most} layers are to be given up, but of {num_layers} layers {available} can be; "
            f"ask for at most {available}"
        )
    decisions = list(full_decisions(num_layers))
    layers: list[int] = []
    values = measure([tuple(decisions)])
    for _ in range(available if most is None else most):
        plans = []
        for layer in candidates:
            plan = list(decisions)
            plan[layer] = int(Decision.SKIP)
            plans.append(tuple(plan))
        found = measure(plans)
        best = max(range(len(found)), key=found.__getitem__)  # the first of equal ones
        layers.append(candidates.pop(best))
        decisions = list(plans[best])
        values.append(found[best])
    return GreedyOrder(tuple(layers), tuple(values))
