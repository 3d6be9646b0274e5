"""Baselines that give up layers in a fixed order, whatever the question, at any mean executions.

Owns plans (the decisions with k layers given up, for every k), the two plans that need no
measurement, and mixing two vectors of decisions over the questions so that their mean executions
are what they should be. Leaves orders that are measured to `influence` and `greedy`.

Axes: Q questions, L layers, k layers given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from drllm.errors import ConfigError
from drllm.paths import Decision, Decisions, full_decisions, num_executions

Plan: TypeAlias = Callable[[int], Decisions]
"""Gives the decisions with k layers given up; `ConfigError` where so many can't be."""


def nested(order: Sequence[int], num_layers: int) -> Plan:
    """Return the plan that gives up layers one after the other in an order.

    Args:
        order: The layer given up first, the one given up next, and so on; a layer that isn't named
            is never given up.
        num_layers: L.

    Example:
        >>> nested([2, 1], num_layers=4)(1)
        (1, 1, 0, 1)
    """

    def plan(num_skipped: int) -> Decisions:
        _check_number(num_skipped, min(len(order), num_layers - 1))
        return _without(order[:num_skipped], num_layers)

    return plan


def last_layers(num_layers: int) -> Plan:
    """Return the plan that gives up the deepest layers first, but the last one.

    The last layer is kept: it makes the state that the output head can read, and a model without
    it is broken. So is one without its first layer, which is kept too.

    Args:
        num_layers: L.

    Source: Gromov et al. 2024 (arXiv 2403.17887), their simple heuristic.

    Example:
        >>> last_layers(5)(2)
        (1, 1, 0, 0, 1)
    """
    return nested(range(num_layers - 2, 0, -1), num_layers)


def evenly_spaced(num_layers: int) -> Plan:
    """Return the plan that gives up layers at even distances, the first and the last one kept.

    Of the L − 2 layers between, the k that lie nearest to the middles of k equal parts. The layers
    given up at k are in general not among those at k + 1.

    Args:
        num_layers: L.

    Source: Unified Layer Skipping (arXiv 2404.06954).

    Example:
        >>> evenly_spaced(8)(2), evenly_spaced(8)(3)
        ((1, 1, 0, 1, 1, 0, 1, 1), (1, 1, 0, 1, 0, 1, 0, 1))
    """
    between = max(num_layers - 2, 0)

    def plan(num_skipped: int) -> Decisions:
        _check_number(num_skipped, between)
        places = [(2 * i + 1) * between // (2 * num_skipped) for i in range(num_skipped)]
        return _without([1 + place for place in places], num_layers)

    return plan


def skipping(
    plan: Plan, executions: float, num_questions: int, generator: torch.Generator
) -> Tensor:
    """Follow a plan at given mean executions.

    Where they aren't a whole number, some questions, drawn at random, give up one layer more than
    the others.

    Args:
        plan: What is given up.
        executions: Mean executions wanted, at most L.
        num_questions: Q.
        generator: Draws which questions give up one more.

    Returns:
        `[Q, L]` decisions whose mean executions lie within 1/(2Q) of those wanted.

    Raises:
        ConfigError: Executions that the plan doesn't go down to, or more than L.
    """
    L = len(plan(0))
    if executions > L:
        raise ConfigError(
            f"{executions:g} executions are wanted, but giving up layers of {L} leaves {L} at "
            f"most; give a number up to {L}"
        )
    more = L - int(executions)  # layers given up by the questions that give up more
    fewer = plan(more - 1 if more else 0)
    return mixture(plan(more), fewer, executions, num_questions, generator)


def mixture(
    first: Decisions,
    second: Decisions,
    executions: float,
    num_questions: int,
    generator: torch.Generator,
) -> Tensor:
    """Give each question one of two vectors of decisions, at given mean executions.

    Args:
        first: `[L]`.
        second: `[L]`, at least as many executions.
        executions: Mean executions wanted, from those of the first to those of the second.
        num_questions: Q.
        generator: Draws which questions get which.

    Returns:
        `[Q, L]` decisions whose mean executions are as near to those wanted as Q questions allow:
        within half the difference of the two, divided by Q.

    Raises:
        ConfigError: Executions that don't lie between.

    Example:
        >>> mixture((1, 0), (1, 1), 1.5, 4, torch.Generator()).sum(dim=1).double().mean()
        tensor(1.5000, dtype=torch.float64)
    """
    share = share_of_second(first, second, executions)
    num_second = round(share * num_questions)
    takes_second = torch.randperm(num_questions, generator=generator) < num_second  # [Q]
    return torch.where(takes_second[:, None], torch.tensor(second), torch.tensor(first))


def share_of_second(first: Decisions, second: Decisions, executions: float) -> float:
    """Return which share of the questions a mixture gives the second of two decisions.

    Args:
        first: `[L]`.
        second: `[L]`, at least as many executions.
        executions: Mean executions wanted.

    Returns:
        A share in [0, 1]; 0 where both run as many.

    Raises:
        ConfigError: Executions that don't lie between those of the two.
    """
    low, high = num_executions(first), num_executions(second)
    if not low <= executions <= high:
        raise ConfigError(
            f"{executions:g} executions are wanted of a mixture of {low} and {high}; give a number "
            f"from {low} to {high}"
        )
    return (executions - low) / (high - low) if high > low else 0.0


def _without(layers: Sequence[int], num_layers: int) -> Decisions:
    """Return the full path's decisions without some layers."""
    decisions = list(full_decisions(num_layers))
    for layer in layers:
        decisions[layer] = int(Decision.SKIP)
    return tuple(decisions)


def _check_number(num_skipped: int, most: int) -> None:
    if not 0 <= num_skipped <= most:
        raise ConfigError(
            f"{num_skipped} layers are to be given up, but this plan gives up at most {most}; "
            f"ask for more executions"
        )
