"""A linear map for the whole model: all decisions, from the mean of the prompt's embeddings.

Source: MindSkip in Router-Tuning (arXiv 2410.13184), changed as D-18 of docs/differences.md says.

Axes: N examples or prompts, B rows, D hidden, L layers, C = 3 decisions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drllm.bisection import Setting, nearest_setting
from drllm.models.routers.depth_control import recorded
from drllm.models.routing.policies import Policy, PromptView, biased, full_precision
from drllm.models.routing.routed_model import RoutedModel

STEEPEST = 1024.0
"""Greatest bias in either direction; the router's logits lie far within."""


def plans_of(router: nn.Linear, inputs: Tensor, depth_bias: float) -> Tensor:
    """Return decisions `[B, L]` of what `first_input` gives, `[B, D]`, by a map to L · C logits.

    The higher the bias, the price of an execution, the fewer a row has; one that would skip
    everything runs the last layer.
    """
    plans = biased(router(inputs).view(len(inputs), -1, 3), depth_bias).argmax(dim=-1)
    plans[plans.sum(dim=1) == 0, -1] = 1
    return plans


class SequenceRouterPolicy(Policy):
    """Takes all decisions at the first layer, from its pooled input, by a router on the CPU."""

    def __init__(self, router: nn.Linear, depth_bias: float = 0.0) -> None:
        self.router = router
        self.depth_bias = depth_bias
        self._plans = torch.empty(0, 0, dtype=torch.long)

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return one column of the plans."""
        if layer == 0:
            inputs = first_input(prompts).cpu()  # where the router is
            with full_precision(inputs.device):
                self._plans = plans_of(self.router, inputs, self.depth_bias)
        return self._plans[:, layer]


def find_bias(router: nn.Linear, inputs: Tensor, executions: float) -> Setting:
    """Find the depth bias under which prompts run the wanted executions on average.

    What the router reads doesn't depend on its decisions, so no forward pass is needed.

    Source: ours (D-20).
    """

    def mean(bias: float) -> float:
        return float(plans_of(router, inputs, bias).sum(dim=1).double().mean())

    return nearest_setting(mean, executions, -STEEPEST, STEEPEST)


def first_input(prompts: PromptView) -> Tensor:
    """Return the mean of each prompt's real tokens as a layer reads them, `[B, D]` in float32."""
    return prompts.windows(1).means[:, 0]


def first_inputs(routed: RoutedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return `first_input` at the first layer, where nothing but the embedding has run, `[N, D]`.

    All layers are skipped, of which routing runs the last one all the same; see `recorded`.
    """
    return recorded(routed, prompts, first_input, [0], decision=0)[:, 0]
