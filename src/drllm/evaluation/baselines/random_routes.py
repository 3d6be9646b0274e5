"""Baselines with random decisions: permuted routes, shuffled decisions, drawn decisions.

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

MAX_TILT = 60.0  # largest |θ|; the decisions that it makes less frequent have a probability of 0
TOLERANCE = 1e-6  # expected executions that differ by no more count as equal


@base.register
class PermutedRoutes(base.Baseline):
    """Each question runs the route of another question.

    Each route runs as often as in the routed model, so total executions and the use of each layer
    are the same. Only the match between question and route differs. If this baseline does as well
    as the routed model, the routers found a good mixture of routes, but it doesn't matter which
    question gets which route.
    """

    name = "permuted routes"
    source = "ours"
    fitted_on = base.ROUTES
    order = 10
    is_drawn = True

    def make_run(self, routes: Tensor, generator: torch.Generator) -> base.BaselineRun:
        """Return the routes in another order."""
        return base.BaselineRun(permute_routes(routes, generator))


@base.register
class RandomDecisions(base.Baseline):
    """Each question's skips and repeats are at random layers.

    Each question runs as many layers as in the routed model. If this baseline does as well as the
    routed model, it doesn't matter which layers the routers pick.
    """

    name = "random decisions"
    source = "ours"
    fitted_on = base.ROUTES
    order = 20
    is_drawn = True

    def make_run(self, routes: Tensor, generator: torch.Generator) -> base.BaselineRun:
        """Return each route's decisions in random order."""
        random_keys = routes.double().uniform_(generator=generator)  # [Q, L]
        order = random_keys.argsort(dim=1)
        return base.BaselineRun(routes.gather(1, order))


@base.register
class LabelFrequency(base.Baseline):
    """Each layer's decision is drawn by the targets' frequencies, tilted to equal executions.

    The frequencies are those of skip, execute and repeat in the routers' targets at the layer. They
    are tilted (see `tilt_frequencies`) so that executions equal the routed model's on average. If
    this baseline does as well as the routed model, the routers learned these frequencies and no
    more.
    """

    name = "label frequency"
    source = "ours"
    fitted_on = base.TARGETS
    order = 30
    is_drawn = True

    def find_obstacle(self, executions: float) -> str | None:
        """Return an obstacle if the routers have no targets at some layer, else None."""
        if not _has_all_counts(self.material.label_counts):
            return "the routers carry no label counts for some layer; 'drllm train' writes them"
        return super().find_obstacle(executions)

    def make_run(self, routes: Tensor, generator: torch.Generator) -> base.BaselineRun:
        """Return decisions that are drawn for each question and layer independently."""
        executions = base.average_executions(routes)
        frequencies = tilt_frequencies(self.material.label_counts, executions)
        expected = expected_executions(frequencies)
        note = ""
        if abs(expected - executions) > TOLERANCE:
            note = (
                f"not at equal executions: the nearest mean that tilted frequencies give is "
                f"{expected:.2f}, and the routed model has {executions:.2f}"
            )
        return base.BaselineRun(draw_decisions(frequencies, len(routes), generator), note)


def permute_routes(routes: Tensor, generator: torch.Generator) -> Tensor:
    """Give each question the route of another question, `[Q, L]`.

    All orders that do so are equally likely. A question may still get its own decisions, if two
    questions have the same route. If there is only one question, it keeps its route.
    """
    import torch

    Q = len(routes)
    places = torch.arange(Q)
    order = torch.randperm(Q, generator=generator)
    # Drawing again until an order is valid keeps all valid orders equally likely. About one draw in
    # e is valid, whatever Q is.
    while Q > 1 and bool((order == places).any()):
        order = torch.randperm(Q, generator=generator)
    return routes[order]


def _has_all_counts(label_counts: Sequence[Sequence[int]]) -> bool:
    """Tell whether there are label counts, and every layer has a target."""
    return len(label_counts) > 0 and all(sum(counts) > 0 for counts in label_counts)


def tilt_frequencies(label_counts: Sequence[Sequence[int]], executions: float) -> Tensor:
    """Tilt the targets' frequencies at each layer to reach given mean executions, `[L, 3]`.

    The weight of a decision d is its count times exp(-θ d), with one θ for all layers. θ is chosen
    so that draws run these executions on average. If the labels don't allow this mean, θ gives the
    nearest mean. Of all distributions with the same mean, the result is the nearest to the targets'
    distribution in relative entropy.

    Args:
        label_counts: How often each decision is a target at each layer, `[L][3]`, from
            `router_config.json`.
        executions: Mean executions to reach.

    Raises:
        CheckpointError: The routers carry no counts for a layer.

    Source: ours (docs/differences.md, D-18).
    """
    import torch

    if not _has_all_counts(label_counts):
        raise CheckpointError(
            "these routers carry no label counts for some layer, so decisions can't be drawn by "
            "label frequency; use routers that 'drllm train' has written"
        )
    counts = torch.tensor(label_counts, dtype=torch.float64)
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    decisions = torch.arange(3, dtype=torch.float64)

    def tilt(theta: float) -> Tensor:
        return (frequencies.log() - theta * decisions).softmax(dim=1)

    def runs_no_more(theta: float) -> bool:  # executions fall as θ grows
        return expected_executions(tilt(theta)) <= executions

    _, theta = bisect(runs_no_more, -MAX_TILT, MAX_TILT)
    return tilt(theta)


def expected_executions(probabilities: Tensor) -> float:
    """Return the expected executions of `draw_decisions` for probabilities `[L, 3]`."""
    by_layer = probabilities @ probabilities.new_tensor([0, 1, 2])  # [L]
    skips_all = float(probabilities[:, 0].prod())  # such a draw executes the last layer instead
    return float(by_layer.sum()) + skips_all


def draw_decisions(probabilities: Tensor, num_questions: int, generator: torch.Generator) -> Tensor:
    """Draw each question's decisions `[Q, L]` by the probabilities `[L, 3]` of each layer.

    If a draw skips all layers, the last layer is executed, as in a routed model.
    """
    by_layer = probabilities.multinomial(num_questions, replacement=True, generator=generator)
    decisions = by_layer.T.contiguous()
    decisions[decisions.sum(dim=1) == 0, -1] = 1
    return decisions
