"""Baselines that draw decisions: routes permuted or shuffled, or by the labels' frequencies.

Axes: Q questions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drllm.bisection import bisect
from drllm.errors import CheckpointError
from drllm.evaluation.baselines import base

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEEPEST = 60.0  # largest tilt in either direction: what is left of a decision then can't be drawn
TOLERANCE = 1e-6  # expected executions that differ by no more count as equal


@base.register
class PermutedRoutes(base.Baseline):
    """Each question runs the route of another question.

    Controls for everything but the match between question and route. The same routes run, each as
    often, so executions are equal in sum and every layer is used alike. If this does as well as the
    routed model, the routers found a good mixture of routes but read nothing in the question that
    matters.
    """

    name = "permuted routes"
    source = "ours"
    fitted_on = base.ROUTES
    order = 10
    is_drawn = True

    def at(self, routes: Tensor, generator: torch.Generator) -> base.BaselineRun:
        """Return the routes in another order."""
        return base.BaselineRun(permuted(routes, generator))


@base.register
class RandomDecisions(base.Baseline):
    """Each question's skips and repeats are at random layers.

    Controls for how much is executed, question by question. If this does as well as the routed
    model, it doesn't matter which layers the routers pick.
    """

    name = "random decisions"
    source = "ours"
    fitted_on = base.ROUTES
    order = 20
    is_drawn = True

    def at(self, routes: Tensor, generator: torch.Generator) -> base.BaselineRun:
        """Return each row's decisions in random order."""
        order = routes.double().uniform_(generator=generator).argsort(dim=1)
        return base.BaselineRun(routes.gather(1, order))


@base.register
class LabelFrequency(base.Baseline):
    """Each layer's decision is drawn as often as it was the target, tilted to equal executions.

    Controls for what the targets are like on the whole, layer by layer. If this does as well as the
    routed model, the routers learned the frequencies of the labels and no more. Executions equal
    the routed model's on average.
    """

    name = "label frequency"
    source = "ours"
    fitted_on = base.TARGETS
    order = 30
    is_drawn = True

    def at(self, routes: Tensor, generator: torch.Generator) -> base.BaselineRun:
        """Return decisions drawn one by one."""
        routers = self.routed.routers
        assert routers is not None
        executions = base.executions_of(routes)
        frequencies = tilted(routers.config.label_counts, executions)
        expected = expected_executions(frequencies)
        note = ""
        if abs(expected - executions) > TOLERANCE:
            note = (
                f"not at equal executions: whatever the tilt, the labels give no nearer mean than "
                f"{expected:.2f} where the routed model has {executions:.2f}"
            )
        return base.BaselineRun(label_frequency(frequencies, len(routes), generator), note)


def permuted(routes: Tensor, generator: torch.Generator) -> Tensor:
    """Return routes `[Q, L]` in another order, all orders without a fixed place equally likely.

    A question may still receive the decisions it had, if another question had the same route. A
    single question keeps its route.
    """
    import torch

    Q = len(routes)
    places = torch.arange(Q)
    order = torch.randperm(Q, generator=generator)
    # Drawing again keeps all such orders equally likely; one draw in e succeeds, whatever Q is.
    while Q > 1 and bool((order == places).any()):
        order = torch.randperm(Q, generator=generator)
    return routes[order]


def tilted(label_counts: Sequence[Sequence[int]], executions: float) -> Tensor:
    """Return each layer's frequencies of the targets, tilted to mean executions, `[L, 3]`.

    A decision d is weighted by its count times exp(-θ d), with one θ for all layers, so that
    drawing by the weights runs these executions on average, or comes as near as labels allow.
    Of all distributions with that mean these are the nearest to the targets' own (in relative
    entropy). Counts are those of `router_config.json`, `[L][3]`; CheckpointError if the routers
    carry none.

    Source: ours (docs/differences.md, D-18).
    """
    import torch

    counts = torch.tensor(label_counts, dtype=torch.float64)
    if counts.numel() == 0 or bool((counts.sum(dim=1) == 0).any()):
        raise CheckpointError(
            "these routers carry no label counts for some layer, so decisions can't be drawn by "
            "label frequency; use routers that 'drllm train' has written"
        )
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    decisions = torch.arange(3, dtype=torch.float64)

    def tilt(theta: float) -> Tensor:
        return (frequencies.log() - theta * decisions).softmax(dim=1)

    def runs_no_more(theta: float) -> bool:  # executions fall as θ grows
        return expected_executions(tilt(theta)) <= executions

    _, theta = bisect(runs_no_more, -STEEPEST, STEEPEST)
    return tilt(theta)


def expected_executions(probabilities: Tensor) -> float:
    """Return the mean executions of `label_frequency`, its rule for empty draws included."""
    drawn = float((probabilities @ probabilities.new_tensor([0, 1, 2])).sum())
    return drawn + float(probabilities[:, 0].prod())


def label_frequency(
    probabilities: Tensor, num_questions: int, generator: torch.Generator
) -> Tensor:
    """Draw every decision with the probabilities `[L, 3]` of its layer, `[Q, L]`.

    If a draw would skip every layer, the last one is executed, as in a routed model.
    """
    drawn = probabilities.multinomial(num_questions, replacement=True, generator=generator)
    drawn = drawn.T.contiguous()
    drawn[drawn.sum(dim=1) == 0, -1] = 1
    return drawn
