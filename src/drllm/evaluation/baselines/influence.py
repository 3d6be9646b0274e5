"""Baseline: layers dropped in the order of their block influence on calibration prompts.

Axes: B rows, T tokens, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

from drllm.evaluation.baselines.base import CALIBRATION, register
from drllm.evaluation.baselines.layer_dropping import LayerDropping

if TYPE_CHECKING:
    from torch import Tensor

    from drllm.models.routing.routed_model import RoutedModel


@register
class BlockInfluence(LayerDropping):
    """Drops the layers that turn the hidden state least."""

    name = "block influence"
    description = "the layers that turn the hidden state least are dropped"
    source = "ShortGPT, arXiv 2403.03853"
    fitted_on = CALIBRATION
    order = 60

    @cached_property
    def by_influence(self) -> list[int]:
        """All layers, the least influential first."""
        return order_by_influence(block_influence(self.routed, self.fitted.material.prompts))

    def dropped(self, number: int) -> Sequence[int]:
        """Return the least influential layers; the most influential one stays."""
        return self.by_influence[:-1][:number]


def block_influence(routed: RoutedModel, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Measure how much each layer turns the hidden states that pass through it, `[L]`.

    The influence of a layer is 1 minus the mean cosine between its input and its output, over the
    real tokens of all prompts, each token counting alike. A layer that hands on what it is given
    has influence 0; the maximum is 2. The base model runs, once a prompt; nothing is left on it.
    ConfigError if there are no prompts, one without tokens, or one longer than the model's context.

    Source: ShortGPT (arXiv 2403.03853).
    """
    import torch

    from drllm.models.routers.depth_control import routes_of
    from drllm.models.routing.policies import Policy, PromptView

    readable = torch.empty(0, 0, dtype=torch.bool)  # [B, T], of the pass
    sums = torch.zeros(routed.num_layers, dtype=torch.float64)

    class KeepsReadable(Policy):
        def decide(self, layer: int, prompts: PromptView) -> list[int]:
            nonlocal readable
            readable = prompts.readable
            return [1] * prompts.num_rows

    def hook_at(layer: int) -> Any:
        def add(_module: object, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            before: Tensor = args[0] if args else kwargs["hidden_states"]
            after: Tensor = output[0] if isinstance(output, tuple) else output
            cosines = torch.cosine_similarity(before.float(), after.float(), dim=-1)  # [B, T]
            sums[layer] += cosines[readable].cpu().double().sum()

        return add

    with ExitStack() as hooks:
        for place, layer in enumerate(routed.injection.layers):
            handle = layer.register_forward_hook(hook_at(place), with_kwargs=True)
            hooks.callback(handle.remove)
        routes_of(routed, KeepsReadable(), prompts)
    influence: list[float] = (1 - sums / sum(map(len, prompts))).tolist()
    return influence


def order_by_influence(influence: Sequence[float]) -> list[int]:
    """Return all layers, the least influential first; of equal ones the deepest first."""
    return sorted(range(len(influence)), key=lambda layer: (influence[layer], -layer))
