"""Baselines that are drawn from the routed model's own routes, or from its labels.

Owns how their decisions are drawn. All of them are functions on decisions alone: none sees a
model, a question or an answer.

Axes: Q questions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drllm.models.routing.policies import label_frequencies
from drllm.paths import Decision

STEEPEST = 60.0
"""Largest tilt in either direction: what is left of a decision then can't be drawn."""


def permuted(routes: Tensor, generator: torch.Generator) -> Tensor:
    """Give every question the route that the routed model took on another question.

    Controls for everything but the match between question and route: the same routes run, each
    as often, so executions are equal in sum and every layer is used alike. If this does as well
    as the routed model, the routers found a good mixture of routes but read nothing in the
    question that matters.

    No question keeps its own place. It may still receive the very decisions it had, where
    another question had the same route; `share_unchanged` says how often. A single question has
    no other, and keeps its route.

    Args:
        routes: `[Q, L]` decisions of the routed model.
        generator: Source of randomness.

    Returns:
        `[Q, L]`: the rows in another order, all orders without a fixed place equally likely.

    Source: ours.
    """
    Q = len(routes)
    places = torch.arange(Q)
    order = torch.randperm(Q, generator=generator)
    # Drawing again until no place is fixed keeps all such orders equally likely; one draw in e
    # succeeds, whatever Q is.
    while Q > 1 and bool((order == places).any()):
        order = torch.randperm(Q, generator=generator)
    return routes[order]


def share_unchanged(routes: Tensor, others: Tensor) -> float:
    """Return the share of questions whose decisions are the same in both, `[Q, L]` each.

    Example:
        >>> share_unchanged(torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1, 1], [1, 1]]))
        0.5
    """
    return float((routes == others).all(dim=1).double().mean())


def random_like(routes: Tensor, generator: torch.Generator) -> Tensor:
    """Give every question as many skips and repeats as its route had, at layers drawn at random.

    Controls for how much is executed, question by question: executions are equal for each. If
    this does as well as the routed model, it doesn't matter which layers the routers pick.

    Args:
        routes: `[Q, L]` decisions of the routed model.
        generator: Source of randomness.

    Returns:
        `[Q, L]`: each row's decisions in random order.

    Source: ours.
    """
    order = torch.rand(routes.shape, generator=generator, dtype=torch.float64).argsort(dim=1)
    return routes.gather(1, order)


def tilted(label_counts: Sequence[Sequence[int]], executions: float) -> Tensor:
    """Return each layer's frequencies of the targets, tilted to a number of executions.

    A decision d is weighted by its count times exp(-θ d), with one θ for all layers, so that
    drawing by the weights runs the wanted executions on average. Of all distributions with that
    mean these are the nearest to the targets' own (in relative entropy), so layers that the
    targets skip more often than others are still skipped more often. A decision that was never
    the target at a layer stays impossible there.

    Args:
        label_counts: `[L][3]` from `router_config.json`.
        executions: Mean executions wanted, those of the routed model.

    Returns:
        `[L, 3]` probabilities. Where the labels can't reach the executions wanted, those that
        come nearest; `expected_executions` says how near.

    Raises:
        CheckpointError: The routers carry no label counts.

    Source: ours (docs/differences.md, D-18).

    Example:
        >>> tilted([[1, 1, 0], [0, 1, 0]], executions=1.5)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 1.0000, 0.0000]], dtype=torch.float64)
    """
    frequencies = label_frequencies(label_counts)
    decisions = torch.arange(3, dtype=torch.float64)
    low, high = -STEEPEST, STEEPEST
    for _ in range(60):  # executions fall as θ grows
        theta = (low + high) / 2
        probabilities = (frequencies.log() - theta * decisions).softmax(dim=1)
        if expected_executions(probabilities) > executions:
            low = theta
        else:
            high = theta
    return probabilities


def expected_executions(probabilities: Tensor) -> float:
    """Return the mean executions of `label_frequency`, the rule of its empty draws included.

    Args:
        probabilities: `[L, 3]`.

    Example:
        >>> expected_executions(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]))
        1.25
    """
    drawn = float((probabilities @ torch.arange(3, dtype=probabilities.dtype)).sum())
    empty = float(probabilities[:, int(Decision.SKIP)].prod())
    return drawn + empty


def label_frequency(
    probabilities: Tensor, num_questions: int, generator: torch.Generator
) -> Tensor:
    """Draw every decision at random with the probabilities of its layer.

    Controls for what the targets are like on the whole, layer by layer. If this does as well as
    the routed model, the routers learned the frequencies of the labels and no more. With
    probabilities from `tilted`, executions equal the routed model's on average.

    Args:
        probabilities: `[L, 3]`.
        num_questions: Q.
        generator: Source of randomness.

    Returns:
        `[Q, L]`; where a draw would skip every layer, the last one is executed, as in a routed
        model.

    Source: ours.
    """
    drawn = torch.multinomial(probabilities, num_questions, replacement=True, generator=generator)
    drawn = drawn.T.contiguous()
    drawn[drawn.sum(dim=1) == 0, -1] = int(Decision.EXECUTE)
    return drawn
