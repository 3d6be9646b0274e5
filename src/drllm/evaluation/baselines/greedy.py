"""Baselines that drop layers one by one, each time the one whose absence hurts a measure least.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from drllm.evaluation.baselines.base import CALIBRATION, CHOICE, Measure, register
from drllm.evaluation.baselines.layer_dropping import LayerDropping, without


class _ByMeasure(LayerDropping):
    measure = ""

    @cached_property
    def dropped(self) -> Greedy:
        """The greedy order, as far as it was asked for."""
        return Greedy(self.fitted.measure(self.measure), self.num_layers)


@register
class GreedyByLoss(_ByMeasure):
    """Drops by the next-token loss of the calibration prompts."""

    name = "greedy by loss"
    description = (
        "layers are dropped one by one, each time the one whose absence raises the next-token "
        "loss least"
    )
    source = "SLEB, arXiv 2402.09025"
    fitted_on = CALIBRATION
    order = 70
    measure = "loss"


@register
class GreedyByAnswers(_ByMeasure):
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
    measure = "answers"


class Greedy:
    """An order of dropping layers, found as far as it is asked for.

    A step tries every layer that is left, so k steps take about k · L candidates; all candidates
    of a step are measured at once. One layer is always left. Of equal layers the deepest goes.

    Those in `keep` are never dropped.

    Attributes:
        layers: Those dropped so far, in order.
        values: The measure with the first layer dropped, with the first two, and so on.

    Source: SLEB (arXiv 2402.09025) and TALE (arXiv 2510.22767), changed as D-18 says.
    """

    def __init__(self, measure: Measure, num_layers: int, keep: Sequence[int] = ()) -> None:
        self.measure = measure
        self.num_layers = num_layers
        self.layers: list[int] = []
        self.values: list[float] = []
        self._left = [layer for layer in reversed(range(num_layers)) if layer not in keep]

    def __call__(self, number: int) -> list[int]:
        """Return the first layers that are dropped, `number` of them or all that can be."""
        while len(self.layers) < min(number, self.num_layers - 1) and self._left:
            candidates = [without([*self.layers, each], self.num_layers) for each in self._left]
            found = self.measure(candidates)
            best = found.index(max(found))  # the first of equal ones
            self.layers.append(self._left.pop(best))
            self.values.append(found[best])
        return self.layers[:number]
