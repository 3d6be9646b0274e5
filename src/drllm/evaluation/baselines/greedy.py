"""Baseline: layers given up one by one, each time the one whose absence hurts a measure least.

Owns the greedy choice. Leaves what hurts to the measure, and following the order at given
executions to `static`.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from drllm.errors import ConfigError
from drllm.evaluation.baselines.measures import Measure
from drllm.paths import Decision, Decisions, full_decisions


class Greedy:
    """Layers given up one by one, each time the one whose absence the measure likes best.

    A plan (`static.Plan`) whose order is found as far as it is asked for: a step tries every layer
    that is left, so k steps take about k · L candidates; all candidates of a step are measured at
    once. One layer is always left. Of equal layers the deepest goes.

    With `token_logprob` on texts this is SLEB, whose code never gives up the first or the last
    layer (`keep`); with `gold_logprob` it is TALE by log-probability instead of accuracy. Unlike
    TALE it doesn't stop where the measure falls: baselines are compared at given executions.

    Args:
        measure: How good decisions are on the questions that may be chosen on.
        num_layers: L.
        keep: Layers never given up.

    Attributes:
        layers: Those given up so far, in order.
        values: The measure with the first layer given up, with the first two, and so on.

    Source: SLEB (arXiv 2402.09025); TALE (arXiv 2510.22767).

    Example:
        >>> KL = [9.0, 1.0, 3.0]
        >>> def measure(plans):
        ...     return [-sum(d for d, runs in zip(KL, plan) if not runs) for plan in plans]
        >>> greedy = Greedy(measure, 3)
        >>> greedy(2), greedy.layers, greedy.values
        ((1, 0, 0), [1, 2], [-1.0, -4.0])
    """

    def __init__(self, measure: Measure, num_layers: int, keep: Sequence[int] = ()) -> None:
        self.measure = measure
        self.num_layers = num_layers
        self.layers: list[int] = []
        self.values: list[float] = []
        self._left = [layer for layer in range(num_layers - 1, -1, -1) if layer not in keep]
        self._most = min(len(self._left), num_layers - 1)

    def __call__(self, num_skipped: int) -> Decisions:
        """Return the decisions that give up so many layers.

        Args:
            num_skipped: From 0.

        Raises:
            ConfigError: More layers than can be given up.
        """
        if not 0 <= num_skipped <= self._most:
            raise ConfigError(
                f"{num_skipped} layers are to be given up, but of {self.num_layers} layers "
                f"{self._most} can be; ask for at most {self._most}"
            )
        while len(self.layers) < num_skipped:
            self._give_up_one()
        return _without(self.layers[:num_skipped], self.num_layers)

    def _give_up_one(self) -> None:
        found = self.measure(
            [_without([*self.layers, layer], self.num_layers) for layer in self._left]
        )
        best = max(range(len(found)), key=found.__getitem__)  # the first of equal ones
        self.layers.append(self._left.pop(best))
        self.values.append(found[best])


def _without(layers: Sequence[int], num_layers: int) -> Decisions:
    decisions = list(full_decisions(num_layers))
    for layer in layers:
        decisions[layer] = int(Decision.SKIP)
    return tuple(decisions)
