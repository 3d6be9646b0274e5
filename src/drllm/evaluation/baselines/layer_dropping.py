"""Baselines that drop layers in one fixed order on all questions.

Axes: Q questions, B rows, T tokens, D hidden, L layers, k layers dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from drllm.evaluation.baselines import base
from drllm.evaluation.baselines.material import Measure
from drllm.models.routing.policies import Policy, PromptView
from drllm.paths import Decisions, num_executions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.models.routed_model import RoutedModel


class LayerDropping(base.Baseline):
    """Drops k or k + 1 layers on each question to match the routed model's mean executions.

    A subclass chooses the layers in `choose_layers`.
    """

    num_kept: ClassVar[int] = 1  # the number of layers that are never dropped

    def find_obstacle(self, executions: float) -> str | None:
        """Return the reason why the baseline can't reach these mean executions; None if it can."""
        if executions < min(self.num_kept, self.num_layers):
            return (
                f"it keeps at least {self.num_kept} layers, and the routed model has "
                f"{executions:.2f} executions"
            )
        return super().find_obstacle(executions)

    @abstractmethod
    def choose_layers(self, number: int) -> Sequence[int]:
        """Return the layers to drop: `number` of them, or fewer if no more may be dropped.

        At least one layer must stay.
        """

    def choose_decisions(self, number: int) -> Decisions:
        """Return the decisions that skip the layers of `choose_layers` and execute all others."""
        return drop_layers(self.choose_layers(number), self.num_layers)

    def make_run(self, routes: Tensor, generator: torch.Generator) -> base.BaselineRun:
        """Return decisions that drop k or k + 1 layers on each question.

        At 28.48 executions of 30 layers, some questions drop two layers and the others one. At a
        whole number of executions all questions drop the same layers. If the routes have more
        executions than the model has layers, nothing is dropped.
        """
        executions = base.average_executions(routes)
        if executions > self.num_layers:
            note = f"runs all {self.num_layers} layers, since it can't repeat any"
            return base.BaselineRun(routes.new_ones(routes.shape), note)
        most_dropped = self.num_layers - int(executions)  # k + 1
        shorter = self.choose_decisions(most_dropped)
        longer = self.choose_decisions(max(most_dropped - 1, 0))
        return base.BaselineRun(mix_decisions(shorter, longer, executions, len(routes), generator))


@base.register
class LastLayers(LayerDropping):
    """Drops the deepest layers, but keeps the last one, whose output the head can read."""

    name = "last layers"
    source = "Gromov et al., arXiv 2403.17887"
    fitted_on = base.NOTHING
    order = 40
    num_kept = 2

    def choose_layers(self, number: int) -> Sequence[int]:
        """Return the deepest layers before the last one; the first layer is kept too."""
        deepest_first = range(self.num_layers - 2, 0, -1)
        return deepest_first[:number]


@base.register
class EvenlySpaced(LayerDropping):
    """Drops layers at even distances, and keeps the first and the last layer.

    The distances depend on k, so a layer that is dropped with k may be kept with k + 1.
    """

    name = "evenly spaced"
    source = "Unified Layer Skipping, arXiv 2404.06954"
    fitted_on = base.NOTHING
    order = 50
    num_kept = 2

    def choose_layers(self, number: int) -> Sequence[int]:
        """Divide the L − 2 inner layers into k parts; return the middle layer of each part."""
        num_inner = max(self.num_layers - 2, 0)
        k = min(number, num_inner)
        return [1 + (2 * part + 1) * num_inner // (2 * k) for part in range(k)]


@base.register
class BlockInfluence(LayerDropping):
    """Drops the layers that change the direction of the hidden states the least."""

    name = "block influence"
    source = "ShortGPT, arXiv 2403.03853"
    fitted_on = base.CALIBRATION
    order = 60

    @cached_property
    def layers_by_influence(self) -> list[int]:
        """All layers, least influential first."""
        return order_by_influence(block_influence(self.routed, self.material.prompts))

    def choose_layers(self, number: int) -> Sequence[int]:
        """Return the least influential layers; the most influential layer is kept."""
        droppable = self.layers_by_influence[:-1]
        return droppable[:number]


class _GreedyDropping(LayerDropping):
    """Drops layers one by one; each step drops the layer whose absence gives the best value."""

    measure_name: ClassVar[str]  # what gives the value: the argument of `measure`

    # The order in which layers are dropped, as far as an earlier call has computed it.
    _order: Sequence[int] = ()

    def choose_layers(self, number: int) -> Sequence[int]:
        """Return the layers that are dropped first, and compute more of them if necessary."""
        measure = self.measure(self.measure_name)
        self._order = drop_greedily(measure, self.num_layers, number, self._order)
        return self._order[:number]


@base.register
class GreedyByLoss(_GreedyDropping):
    """Drops layers one by one, so that each step raises the next-token loss least."""

    name = "greedy by loss"
    source = "SLEB, arXiv 2402.09025"
    fitted_on = base.CALIBRATION
    order = 70
    measure_name = "loss"


@base.register
class GreedyByAnswers(_GreedyDropping):
    """Drops layers one by one, so that each step lowers the gold log-probability least."""

    name = "greedy by answers"
    source = "TALE, arXiv 2510.22767, by log-probability instead of accuracy"
    fitted_on = base.CHOICE
    order = 80
    required_data = "questions"
    requirement = "a task with options"
    measure_name = "answers"


def drop_layers(layers: Collection[int], num_layers: int) -> Decisions:
    """Return decisions that skip some layers and execute all others."""
    return tuple(int(layer not in layers) for layer in range(num_layers))


def mix_decisions(
    first: Decisions,
    second: Decisions,
    executions: float,
    num_questions: int,
    generator: torch.Generator,
) -> Tensor:
    """Give each question one of two plans at random, to reach given mean executions.

    Args:
        first: The decisions `[L]` of a plan.
        second: The decisions `[L]` of another plan. The order of the plans doesn't matter.
        executions: The mean executions to reach, between the executions of the two plans.
        num_questions: Q.
        generator: The source of the random draw.

    Returns:
        Decisions `[Q, L]`. If the plans differ by d executions, the mean over Q questions misses
        `executions` by at most d / 2Q.
    """
    import torch

    shorter, longer = sorted((first, second), key=num_executions)
    low = num_executions(shorter)
    high = num_executions(longer)
    share = 0.0  # of the questions that run the longer plan
    if high > low:
        share = (executions - low) / (high - low)
    num_longer = round(share * num_questions)
    order = torch.randperm(num_questions, generator=generator)
    is_longer = order < num_longer  # [Q]; true for `num_longer` random questions
    return torch.where(is_longer[:, None], torch.tensor(longer), torch.tensor(shorter))


def block_influence(routed: RoutedModel, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Measure how much each layer changes the direction of the hidden states, `[L]`.

    The influence of a layer is 1 minus the mean cosine between its input and its output. The mean
    is over the real tokens of all prompts. A layer that returns its input has influence 0; the
    maximum is 2. Each prompt runs the full path once. The model is unchanged afterwards.

    Raises:
        ConfigError: There are no prompts, or a prompt is empty or longer than the model's context.

    Source: ShortGPT (arXiv 2403.03853).
    """
    from drllm.model.layers import temporary_hooks
    from drllm.models.routing.depth_control import route_prompts

    recorder = _InfluenceRecorder(routed.num_layers)
    hooks = [
        layer.register_forward_hook(partial(recorder.add, index), with_kwargs=True)
        for index, layer in enumerate(routed.injection.layers)
    ]
    with temporary_hooks(hooks):
        route_prompts(routed, recorder, prompts)
    num_tokens = sum(map(len, prompts))
    influence: list[float] = (1 - recorder.sums / num_tokens).tolist()
    return influence


class _InfluenceRecorder(Policy):
    """Runs the full path, and sums the cosines between each layer's input and output.

    As the policy, `decide` is called before a layer, and notes which tokens are real. As a forward
    hook, `add` is called after the layer.
    """

    def __init__(self, num_layers: int) -> None:
        import torch

        self.sums = torch.zeros(num_layers, dtype=torch.float64)  # [L]
        self._readable = torch.empty(0, 0, dtype=torch.bool)  # [B, T], the batch's real tokens

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        """Execute the layer, and note for `add` which tokens are real."""
        self._readable = prompts.readable
        return [1] * prompts.num_rows

    def add(
        self, index: int, _layer: object, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Add a layer's cosines at the real tokens."""
        import torch

        before: Tensor = args[0] if args else kwargs["hidden_states"]
        after: Tensor = output[0] if isinstance(output, tuple) else output
        cosines = torch.cosine_similarity(before.float(), after.float(), dim=-1)  # [B, T]
        self.sums[index] += cosines[self._readable].cpu().double().sum()


def order_by_influence(influence: Sequence[float]) -> list[int]:
    """Return all layers, least influential first; equally influential layers, deepest first."""
    return sorted(range(len(influence)), key=lambda layer: (influence[layer], -layer))


def drop_greedily(
    measure: Measure,
    num_layers: int,
    number: int,
    start: Sequence[int] = (),
    keep: Sequence[int] = (),
) -> list[int]:
    """Return layers in the order in which they are dropped greedily.

    Each step tries all remaining layers, and drops the layer whose absence gives the best value. If
    several values are equal, it drops the deepest of these layers.

    Args:
        measure: Returns the value of each candidate; larger is better.
        num_layers: L.
        number: How many layers to drop. Fewer are dropped if `keep` doesn't allow so many. One
            layer stays in any case.
        start: The first layers of the result, which an earlier call returned.
        keep: Layers that are never dropped.

    Source: SLEB (arXiv 2402.09025) and TALE (arXiv 2510.22767), changed as D-18 of
        docs/differences.md says.
    """
    order = list(start)
    excluded = {*keep, *start}
    remaining = [layer for layer in reversed(range(num_layers)) if layer not in excluded]
    most_dropped = min(number, num_layers - 1)
    while len(order) < most_dropped and remaining:
        candidates = [drop_layers([*order, layer], num_layers) for layer in remaining]
        values = measure(candidates)
        best = values.index(max(values))  # the first of equal values: the deepest layer
        order.append(remaining.pop(best))
    return order
