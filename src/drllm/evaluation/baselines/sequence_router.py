"""Baseline: one linear router decides for all layers before the first one runs.

Source: MindSkip in Router-Tuning (arXiv 2410.13184), changed as D-18 of docs/differences.md says.

Axes: N examples or prompts, B rows, D hidden, L layers, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from drllm.bisection import Setting, nearest_setting
from drllm.evaluation.baselines.base import (
    TARGETS,
    Baseline,
    BaselineRun,
    average_executions,
    register,
)
from drllm.models.routing.policies import Policy, PromptView, apply_depth_bias, without_autocast

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from drllm.models.routed_model import RoutedModel

MAX_BIAS = 1024.0  # largest bias in either direction; the router's logits are far smaller


@register
class SequenceRouterBaseline(Baseline):
    """One linear router decides for all layers, from the mean of the prompt's embeddings.

    This shows how well the prompt's tokens alone predict good decisions, without the layers'
    states. The depth bias is chosen so that the mean executions are the routed model's.
    """

    name = "sequence router"
    source = "MindSkip in Router-Tuning, arXiv 2410.13184, on our targets"
    fitted_on = TARGETS
    order = 120
    required_data = "supervision"
    requirement = "the routers' targets; give them as --supervision"
    reads_question = True

    @cached_property
    def router(self) -> nn.Linear:
        """The router, fitted on the targets."""
        import torch

        from drllm.model.prompts import encode
        from drllm.models.routers.logistic import fit_logistic

        records = self.material.supervision
        prompts = [encode(self.routed.tokenizer, record.prompt) for record in records]
        labels = torch.tensor([record.optimal_layer_config for record in records])
        return fit_logistic(read_first_inputs(self.routed, prompts), labels, num_classes=3)

    @cached_property
    def calibration_inputs(self) -> Tensor:
        """The router's inputs on the calibration prompts, `[N, D]`."""
        return read_first_inputs(self.routed, self.material.prompts)

    def make_run(self, routes: Tensor, generator: torch.Generator) -> BaselineRun:
        """Return the router's policy at the depth bias for the routed model's executions."""
        executions = average_executions(routes)
        bias = find_bias(self.router, self.calibration_inputs, executions).value
        return BaselineRun(SequenceRouterPolicy(self.router, bias), f"with a bias of {bias:.4g}")


class SequenceRouterPolicy(Policy):
    """Makes all decisions at the first layer, from its mean input, with a router on the CPU."""

    _plans: Tensor  # [B, L], made at the first layer

    def __init__(self, router: nn.Linear, depth_bias: float = 0.0) -> None:
        self.router = router
        self.depth_bias = depth_bias

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return a layer's decisions; at the first layer, decide for all layers."""
        if layer == 0:
            inputs = prompts.mean().cpu()  # the router is on the CPU
            with without_autocast(inputs.device):
                self._plans = make_plans(self.router, inputs, self.depth_bias)
        return self._plans[:, layer]


def make_plans(router: nn.Linear, inputs: Tensor, depth_bias: float) -> Tensor:
    """Decide for all layers from the mean inputs of layer 0, `[B, D]`; return plans `[B, L]`.

    The router returns L · C logits for each row. The depth bias is the price of an execution: a
    higher bias gives fewer executions. A row that would skip all layers runs the last one.
    """
    logits = router(inputs).view(len(inputs), -1, 3)  # [B, L, C]
    plans = apply_depth_bias(logits, depth_bias).argmax(dim=-1)
    plans[plans.sum(dim=1) == 0, -1] = 1
    return plans


def find_bias(router: nn.Linear, inputs: Tensor, executions: float) -> Setting:
    """Find the depth bias at which prompts run these executions on average.

    The router's inputs don't depend on its decisions, so this needs no forward pass.

    Source: ours (D-20).
    """

    def mean_executions(bias: float) -> float:
        return average_executions(make_plans(router, inputs, bias))

    return nearest_setting(mean_executions, executions, -MAX_BIAS, MAX_BIAS)


def read_first_inputs(routed: RoutedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean of each prompt's inputs to the first layer, its embeddings, `[N, D]`.

    To save time, the prompts skip all layers that may be skipped (see `record_at_layers`).
    """
    from drllm.models.routing.depth_control import record_at_layers

    return record_at_layers(routed, prompts, PromptView.mean, [0], decision=0)[:, 0]
