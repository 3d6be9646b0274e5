"""Baselines that drop the same layers on every question, in an order of their own.

Axes: Q questions, B rows, T tokens, D hidden, L layers, k layers dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from drllm.evaluation.baselines import base
from drllm.models.routing.policies import Policy, PromptView
from drllm.paths import Decisions, num_executions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.models.routing.routed_model import RoutedModel


class LayerDropping(base.Baseline):
    """Drops k or k + 1 layers on each question, so that mean executions are the routed model's."""

    num_kept: ClassVar[int] = 1  # layers that are never dropped

    def obstacle(self, executions: float) -> str | None:
        """Say why it can't run so few executions; None if it can."""
        if executions >= min(self.num_kept, self.num_layers):
            return super().obstacle(executions)
        return (
            f"it keeps {self.num_kept} layers at least, and the routed model has "
            f"{executions:.2f} executions"
        )

    @abstractmethod
    def dropped(self, number: int) -> Sequence[int]:
        """Return the layers that are dropped, `number` of them or all that can be, never all L."""

    def decisions(self, number: int) -> Decisions:
        """Return the decisions that drop so many layers, or all that can be."""
        return without(self.dropped(number), self.num_layers)

    def at(self, routes: Tensor, generator: torch.Generator) -> base.BaselineRun:
        """Return decisions that drop k or k + 1 layers; the full path if more are executed."""
        executions = base.executions_of(routes)
        if executions > self.num_layers:
            note = f"runs {self.num_layers} layers, having none to drop"
            return base.BaselineRun(routes.new_ones(routes.shape), note)
        num_dropped = self.num_layers - int(executions)  # by the questions that drop more
        shorter = self.decisions(num_dropped)
        longer = self.decisions(max(num_dropped - 1, 0))
        return base.BaselineRun(mixture(shorter, longer, executions, len(routes), generator))


@base.register
class LastLayers(LayerDropping):
    """The deepest layers but the last one, which makes what the head can read, are dropped."""

    name = "last layers"
    source = "Gromov et al., arXiv 2403.17887"
    fitted_on = base.NOTHING
    order = 40
    num_kept = 2

    def dropped(self, number: int) -> Sequence[int]:
        """Return layers from the end; the first one is kept too."""
        return range(self.num_layers - 2, 0, -1)[:number]


@base.register
class EvenlySpaced(LayerDropping):
    """Layers at even distances are dropped, the first and the last kept.

    Those of k aren't in general among those of k + 1.
    """

    name = "evenly spaced"
    source = "Unified Layer Skipping, arXiv 2404.06954"
    fitted_on = base.NOTHING
    order = 50
    num_kept = 2

    def dropped(self, number: int) -> Sequence[int]:
        """Divide the L − 2 layers between into k parts; return the layer in the middle of each."""
        between = max(self.num_layers - 2, 0)
        k = min(number, between)
        return [1 + (2 * part + 1) * between // (2 * k) for part in range(k)]


@base.register
class BlockInfluence(LayerDropping):
    """The layers that turn the hidden state least are dropped."""

    name = "block influence"
    source = "ShortGPT, arXiv 2403.03853"
    fitted_on = base.CALIBRATION
    order = 60

    @cached_property
    def by_influence(self) -> list[int]:
        """All layers, the least influential first."""
        return order_by_influence(block_influence(self.routed, self.material.prompts))

    def dropped(self, number: int) -> Sequence[int]:
        """Return the least influential layers; the most influential one stays."""
        return self.by_influence[:-1][:number]


class _ByMeasure(LayerDropping):
    """Drops layers one by one, each the one that a measure misses least."""

    measure: ClassVar[str]

    _order: Sequence[int] = ()  # the layers dropped so far, the first one first

    def dropped(self, number: int) -> Sequence[int]:
        """Return the first layers of the greedy order, which is extended if need be."""
        measure = self.material.measure(self.measure)
        self._order = drop_greedily(measure, self.num_layers, number, self._order)
        return self._order[:number]


@base.register
class GreedyByLoss(_ByMeasure):
    """One by one the layer is dropped whose absence raises the next-token loss least."""

    name = "greedy by loss"
    source = "SLEB, arXiv 2402.09025"
    fitted_on = base.CALIBRATION
    order = 70
    measure = "loss"


@base.register
class GreedyByAnswers(_ByMeasure):
    """One by one the layer is dropped that matters least to the gold answers' log-probability."""

    name = "greedy by answers"
    source = "TALE, arXiv 2510.22767, by log-probability instead of accuracy"
    fitted_on = base.CHOICE
    order = 80
    needs = ("questions", "a task with options")
    measure = "answers"


def without(layers: Collection[int], num_layers: int) -> Decisions:
    """Return the full path's decisions without some layers."""
    return tuple(int(layer not in layers) for layer in range(num_layers))


def mixture(
    one: Decisions,
    other: Decisions,
    executions: float,
    num_questions: int,
    generator: torch.Generator,
) -> Tensor:
    """Give each question one of two decisions `[L]`, drawn, at these mean executions, `[Q, L]`.

    The mean is as near as Q questions allow: within half the difference of the two, divided by Q.
    The executions lie between those of the two.
    """
    import torch

    first, second = sorted((one, other), key=num_executions)
    low = num_executions(first)
    high = num_executions(second)
    share = (executions - low) / (high - low) if high > low else 0.0
    order = torch.randperm(num_questions, generator=generator)
    takes_second = order < round(share * num_questions)
    return torch.where(takes_second[:, None], torch.tensor(second), torch.tensor(first))


def block_influence(routed: RoutedModel, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Measure how much each layer turns the hidden states that pass through it, `[L]`.

    The influence of a layer is 1 minus the mean cosine between its input and its output, over the
    real tokens of all prompts, each token counting alike. A layer that hands on what it is given
    has influence 0; the maximum is 2. The base model runs, once a prompt; nothing is left on it.
    ConfigError if there are no prompts, one without tokens, or one longer than the model's context.

    Source: ShortGPT (arXiv 2403.03853).
    """
    from drllm.models.base.layers import hooked
    from drllm.models.routers.depth_control import route_prompts

    recorder = _InfluenceRecorder(routed.num_layers)
    hooks = [
        layer.register_forward_hook(partial(recorder.add, index), with_kwargs=True)
        for index, layer in enumerate(routed.injection.layers)
    ]
    with hooked(hooks):
        route_prompts(routed, recorder, prompts)
    num_tokens = sum(map(len, prompts))
    influence: list[float] = (1 - recorder.sums / num_tokens).tolist()
    return influence


class _InfluenceRecorder(Policy):
    """Runs the full path, and sums the cosines between each layer's input and output."""

    def __init__(self, num_layers: int) -> None:
        import torch

        self.sums = torch.zeros(num_layers, dtype=torch.float64)  # [L]
        self._readable = torch.empty(0, 0, dtype=torch.bool)  # [B, T], of the pass

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        """Execute the layer."""
        self._readable = prompts.readable
        return [1] * prompts.num_rows

    def add(
        self, index: int, _layer: object, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Add the cosines of a layer's real tokens; a hook of the layer."""
        import torch

        before: Tensor = args[0] if args else kwargs["hidden_states"]
        after: Tensor = output[0] if isinstance(output, tuple) else output
        cosines = torch.cosine_similarity(before.float(), after.float(), dim=-1)  # [B, T]
        self.sums[index] += cosines[self._readable].cpu().double().sum()


def order_by_influence(influence: Sequence[float]) -> list[int]:
    """Return all layers, the least influential first; of equal ones the deepest first."""
    return sorted(range(len(influence)), key=lambda layer: (influence[layer], -layer))


def drop_greedily(
    measure: base.Measure,
    num_layers: int,
    number: int,
    start: Sequence[int] = (),
    keep: Sequence[int] = (),
) -> list[int]:
    """Return the order in which so many layers are dropped, or all that can be; it begins as given.

    A step measures the drop of every layer that is left; of equal layers the deepest goes. At least
    one layer is left, and those in `keep`.

    Source: SLEB (arXiv 2402.09025) and TALE (arXiv 2510.22767), changed as D-18 says.
    """
    order = list(start)
    left = [layer for layer in reversed(range(num_layers)) if layer not in {*keep, *order}]
    while len(order) < min(number, num_layers - 1) and left:
        candidates = [without([*order, layer], num_layers) for layer in left]
        values = measure(candidates)
        best = values.index(max(values))  # the first of equal ones
        order.append(left.pop(best))
    return order
