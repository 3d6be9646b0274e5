"""Baseline: one linear router decides for all layers before the first one runs.

Source: MindSkip in Router-Tuning (arXiv 2410.13184), changed as D-18 of docs/differences.md says.

Axes: N examples or prompts, B rows, D hidden, L layers, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from drllm.bisection import Setting, nearest_setting
from drllm.evaluation.baselines.base import TARGETS, Baseline, BaselineRun, executions_of, register
from drllm.models.routing.policies import Policy, PromptView, apply_depth_bias, full_precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from drllm.models.routing.routed_model import RoutedModel

STEEPEST = 1024.0  # greatest bias in either direction; the router's logits lie far within


@register
class SequenceRouterBaseline(Baseline):
    """One linear router decides for all layers, from the mean of the prompt's embeddings.

    Shows what the prompt's tokens are worth without what the layers make of them. It follows the
    router at the depth bias that gives the routed model's executions.
    """

    name = "sequence router"
    source = "MindSkip in Router-Tuning, arXiv 2410.13184, on our targets"
    fitted_on = TARGETS
    order = 120
    needs = ("supervision", "the routers' targets; give them as --supervision")
    reads_question = True

    @cached_property
    def router(self) -> nn.Linear:
        """The router, fitted on the targets."""
        import torch

        from drllm.models.base.prompts import encode
        from drllm.models.routers.logistic import fit_logistic

        records = self.material.supervision
        prompts = [encode(self.routed.tokenizer, record.prompt) for record in records]
        labels = torch.tensor([record.optimal_layer_config for record in records])
        return fit_logistic(first_inputs(self.routed, prompts), labels, num_classes=3)

    @cached_property
    def calibration_inputs(self) -> Tensor:
        """What the router reads of the calibration prompts, `[N, D]`."""
        return first_inputs(self.routed, self.material.prompts)

    def at(self, routes: Tensor, generator: torch.Generator) -> BaselineRun:
        """Return the router's policy."""
        executions = executions_of(routes)
        bias = find_bias(self.router, self.calibration_inputs, executions).value
        return BaselineRun(SequenceRouterPolicy(self.router, bias), f"with a bias of {bias:.4g}")


class SequenceRouterPolicy(Policy):
    """Takes all decisions at the first layer, from its pooled input, by a router on the CPU."""

    _plans: Tensor

    def __init__(self, router: nn.Linear, depth_bias: float = 0.0) -> None:
        self.router = router
        self.depth_bias = depth_bias

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return one column of the plans."""
        if layer == 0:
            inputs = prompts.mean().cpu()  # where the router is
            with full_precision(inputs.device):
                self._plans = plans_of(self.router, inputs, self.depth_bias)
        return self._plans[:, layer]


def plans_of(router: nn.Linear, inputs: Tensor, depth_bias: float) -> Tensor:
    """Return a router's decisions `[B, L]` from means at layer 0, `[B, D]`, by L · C logits.

    The bias is the price of an execution: the higher it is, the fewer a row has. A row that would
    skip everything runs the last layer.
    """
    plans = apply_depth_bias(router(inputs).view(len(inputs), -1, 3), depth_bias).argmax(dim=-1)
    plans[plans.sum(dim=1) == 0, -1] = 1
    return plans


def find_bias(router: nn.Linear, inputs: Tensor, executions: float) -> Setting:
    """Find the depth bias under which prompts run these executions on average.

    What the router reads doesn't depend on its decisions, so no forward pass is needed.

    Source: ours (D-20).
    """

    def mean_executions(bias: float) -> float:
        return executions_of(plans_of(router, inputs, bias))

    return nearest_setting(mean_executions, executions, -STEEPEST, STEEPEST)


def first_inputs(routed: RoutedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return prompts' means at the first layer, where only the embedding has run, `[N, D]`.

    All layers are skipped, of which routing runs the last one all the same; see `record_at_layers`.
    """
    from drllm.models.routers.depth_control import record_at_layers

    return record_at_layers(routed, prompts, PromptView.mean, [0], decision=0)[:, 0]
