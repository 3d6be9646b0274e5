"""Baselines made of the routed model's own routes: permuted, or each row's decisions shuffled.

Axes: Q questions, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drllm.evaluation.baselines.base import ROUTES, Baseline, Drawn, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@register
class PermutedRoutes(Baseline):
    """Controls for everything but the match between question and route.

    The same routes run, each as often, so executions are equal in sum and every layer is used
    alike. If this does as well as the routed model, the routers found a good mixture of routes but
    read nothing in the question that matters.
    """

    name = "permuted routes"
    description = "each question runs the route of another question"
    source = "ours"
    fitted_on = ROUTES
    order = 10
    is_drawn = True

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return the routes in another order."""
        return Drawn(permuted(routes, generator))


@register
class RandomDecisions(Baseline):
    """Controls for how much is executed, question by question.

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


def permuted(routes: Tensor, generator: torch.Generator) -> Tensor:
    """Return routes `[Q, L]` in another order, all orders without a fixed place equally likely.

    A question may still receive the decisions it had, if another question had the same route;
    `share_unchanged` says how often. A single question keeps its route.
    """
    import torch

    Q = len(routes)
    places = torch.arange(Q)
    order = torch.randperm(Q, generator=generator)
    # Drawing again keeps all such orders equally likely; one draw in e succeeds, whatever Q is.
    while Q > 1 and bool((order == places).any()):
        order = torch.randperm(Q, generator=generator)
    return routes[order]


def share_unchanged(routes: Tensor, others: Tensor) -> float:
    """Return the share of questions whose decisions `[Q, L]` are the same in both."""
    return float((routes == others).all(dim=1).double().mean())


def random_like(routes: Tensor, generator: torch.Generator) -> Tensor:
    """Return routes `[Q, L]`, each row's decisions in random order."""
    import torch

    order = torch.rand(routes.shape, generator=generator, dtype=torch.float64).argsort(dim=1)
    return routes.gather(1, order)
