"""The baseline that decides everything before the first layer, by one linear router."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from drllm.evaluation.baselines.base import TARGETS, Baseline, Drawn, executions_of, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@register
class SequenceRouterBaseline(Baseline):
    """One linear router decides for all layers, from the mean of the prompt's embeddings.

    Shows what knowing the prompt's tokens, but nothing that a layer made of them, is worth. It
    follows the router at the depth bias that gives the wanted executions.
    """

    name = "sequence router"
    source = "MindSkip in Router-Tuning, arXiv 2410.13184, on our targets"
    fitted_on = TARGETS
    order = 120
    needs = ("supervision", "the routers' targets; give them as --supervision")
    reads_question = True

    @cached_property
    def trained(self) -> tuple[nn.Linear, Tensor]:
        """The router, and what it reads of the calibration prompts, `[N, D]`."""
        import torch

        from drllm.evaluation.baselines.fitting import sequence_router
        from drllm.models.base.prompts import encode
        from drllm.models.routers.logistic import fit_logistic

        material, tokenizer = self.fitted.material, self.routed.tokenizer
        prompts = [encode(tokenizer, each.prompt) for each in material.supervision]
        inputs = sequence_router.first_inputs(self.routed, prompts)
        labels = torch.tensor([each.optimal_layer_config for each in material.supervision])
        router = fit_logistic(inputs, labels, num_classes=3)
        return router, sequence_router.first_inputs(self.routed, material.prompts)

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return the router's policy."""
        from drllm.evaluation.baselines.fitting import sequence_router

        router, inputs = self.trained
        bias = sequence_router.find_bias(router, inputs, executions_of(routes)).value
        policy = sequence_router.SequenceRouterPolicy(router, bias)
        return Drawn(policy=policy, note=f"with a bias of {bias:.4g}")
