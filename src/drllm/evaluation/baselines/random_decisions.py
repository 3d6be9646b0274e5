"""Baseline: every question's skips and repeats, at layers drawn at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drllm.evaluation.baselines.base import ROUTES, Baseline, Drawn, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@register
class RandomDecisions(Baseline):
    """Controls for how much is executed, question by question: executions are equal for each.

    If this does as well as the routed model, it doesn't matter which layers the routers pick.
    """

    name = "random decisions"
    description = "each question's skips and repeats at random layers"
    source = "ours"
    fitted_on = ROUTES
    order = 20
    is_drawn = True

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return each row's decisions in random order."""
        return Drawn(random_like(routes, generator))


def random_like(routes: Tensor, generator: torch.Generator) -> Tensor:
    """Return routes `[Q, L]`, each row's decisions in random order."""
    import torch

    order = torch.rand(routes.shape, generator=generator, dtype=torch.float64).argsort(dim=1)
    return routes.gather(1, order)
