"""Baselines that drop layers one by one, each time the one whose absence hurts a measure least.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from drllm.evaluation.baselines.base import CALIBRATION, CHOICE, register
from drllm.evaluation.baselines.layer_dropping import LayerDropping, Plan, check_number, without
from drllm.paths import Decisions


@register
class GreedyByLoss(LayerDropping):
    """Drops by the next-token loss of the calibration prompts."""

    name = "greedy by loss"
    description = (
        "layers are dropped one by one, each time the one whose absence raises the next-token "
        "loss least"
    )
    source = "SLEB, arXiv 2402.09025"
    fitted_on = CALIBRATION
    order = 70

    @cached_property
    def plan(self) -> Plan:
        """The greedy order."""
        return Greedy(self.fitted.measure("loss"), self.num_layers)


@register
class GreedyByAnswers(LayerDropping):
    """Drops by the gold answers' log-probability."""

    name = "greedy by answers"
    description = (
        "layers are dropped one by one, each time the one whose absence lowers the gold answers' "
        "log-probability least"
    )
    source = "TALE, arXiv 2510.22767, by log-probability instead of accuracy"
    fitted_on = CHOICE
    order = 80
    needs = ("questions", "a task with options")

    @cached_property
    def plan(self) -> Plan:
        """The greedy order."""
        return Greedy(self.fitted.measure("answers"), self.num_layers)


class Greedy:
    """A plan whose order is found as far as it is asked for.

    A step tries every layer that is left, so k steps take about k · L candidates; all candidates
    of a step are measured at once. One layer is always left. Of equal layers the deepest goes.

    By loss this is SLEB, whose code never drops the first or the last layer (`keep`); by answers
    it is TALE by log-probability instead of accuracy. Unlike TALE it doesn't stop when the measure
    falls: baselines are compared at given executions.

    Args:
        measure: How good each of several decisions is.
        num_layers: L.
        keep: Layers that are never dropped.

    Attributes:
        layers: Those dropped so far, in order.
        values: The measure with the first layer dropped, with the first two, and so on.

    Source: SLEB (arXiv 2402.09025); TALE (arXiv 2510.22767).

    Example:
        >>> KL = [9.0, 1.0, 3.0]
        >>> def measure(plans):
        ...     return [-sum(d for d, runs in zip(KL, plan) if not runs) for plan in plans]
        >>> greedy = Greedy(measure, 3)
        >>> greedy(2), greedy.layers, greedy.values
        ((1, 0, 0), [1, 2], [-1.0, -4.0])
    """

    def __init__(
        self,
        measure: Callable[[Sequence[Decisions]], list[float]],
        num_layers: int,
        keep: Sequence[int] = (),
    ) -> None:
        self.measure = measure
        self.num_layers = num_layers
        self.layers: list[int] = []
        self.values: list[float] = []
        self._left = [layer for layer in range(num_layers - 1, -1, -1) if layer not in keep]
        self._maximum = min(len(self._left), num_layers - 1)

    def __call__(self, num_skipped: int) -> Decisions:
        """Return the decisions that drop so many layers.

        Raises:
            ConfigError: More layers than can be dropped.
        """
        check_number(num_skipped, self._maximum, self.num_layers)
        while len(self.layers) < num_skipped:
            candidates = [without([*self.layers, each], self.num_layers) for each in self._left]
            found = self.measure(candidates)
            best = max(range(len(found)), key=found.__getitem__)  # the first of equal ones
            self.layers.append(self._left.pop(best))
            self.values.append(found[best])
        return without(self.layers[:num_skipped], self.num_layers)
