"""Baselines that drop layers in a fixed order, whatever the question, at any mean executions.

A plan gives the decisions with k layers dropped, for every k. Two vectors of decisions are mixed
over the questions so that their mean executions are what they should be.

Axes: Q questions, L layers, k layers dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from drllm.errors import ConfigError
from drllm.evaluation.baselines.base import NOTHING, Baseline, Drawn, executions_of, register
from drllm.paths import Decision, Decisions, full_decisions, num_executions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Plan: TypeAlias = Callable[[int], Decisions]
"""Gives the decisions with k layers dropped; `ConfigError` if so many can't be."""


class LayerDropping(Baseline):
    """Follows a plan at the routed model's mean executions."""

    @cached_property
    def plan(self) -> Plan:
        """What is dropped; it is found when it is first asked for."""
        raise NotImplementedError

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return decisions that drop k or k + 1 layers; the full path if more are executed."""
        import torch

        wanted = executions_of(routes)
        if wanted > self.num_layers:
            full = torch.ones(len(routes), self.num_layers, dtype=torch.long)
            return Drawn(full, note=f"runs {self.num_layers} layers, having none to drop")
        return Drawn(skipping(self.plan, wanted, len(routes), generator))


@register
class LastLayers(LayerDropping):
    """Drops the deepest layers first, but the last one, which makes what the head can read."""

    name = "last layers"
    description = "the deepest layers but the last one are dropped"
    source = "Gromov et al., arXiv 2403.17887"
    fitted_on = NOTHING
    order = 40

    @cached_property
    def plan(self) -> Plan:
        """The order from the end."""
        return last_layers(self.num_layers)


@register
class EvenlySpaced(LayerDropping):
    """Drops layers at even distances."""

    name = "evenly spaced"
    description = "layers at even distances are dropped, the first and the last kept"
    source = "Unified Layer Skipping, arXiv 2404.06954"
    fitted_on = NOTHING
    order = 50

    @cached_property
    def plan(self) -> Plan:
        """The distances."""
        return evenly_spaced(self.num_layers)


def without(layers: Sequence[int], num_layers: int) -> Decisions:
    """Return the full path's decisions without some layers.

    Example:
        >>> without([2], num_layers=4)
        (1, 1, 0, 1)
    """
    decisions = list(full_decisions(num_layers))
    for layer in layers:
        decisions[layer] = int(Decision.SKIP)
    return tuple(decisions)


def nested(order: Sequence[int], num_layers: int) -> Plan:
    """Return the plan that drops layers in an order; those that aren't in it are never dropped.

    Example:
        >>> nested([2, 1], num_layers=4)(1)
        (1, 1, 0, 1)
    """

    def plan(num_skipped: int) -> Decisions:
        check_number(num_skipped, min(len(order), num_layers - 1), num_layers)
        return without(order[:num_skipped], num_layers)

    return plan


def last_layers(num_layers: int) -> Plan:
    """Return the plan that drops the deepest layers first, keeping the first and the last one.

    Source: Gromov et al. 2024 (arXiv 2403.17887), their simple heuristic.

    Example:
        >>> last_layers(5)(2)
        (1, 1, 0, 0, 1)
    """
    return nested(range(num_layers - 2, 0, -1), num_layers)


def evenly_spaced(num_layers: int) -> Plan:
    """Return the plan that drops layers at even distances, keeping the first and the last one.

    Of the L − 2 layers between, the k that lie nearest to the middles of k equal parts. The layers
    dropped at k are in general not among those at k + 1.

    Source: Unified Layer Skipping (arXiv 2404.06954).

    Example:
        >>> evenly_spaced(8)(2), evenly_spaced(8)(3)
        ((1, 1, 0, 1, 1, 0, 1, 1), (1, 1, 0, 1, 0, 1, 0, 1))
    """
    between = max(num_layers - 2, 0)

    def plan(num_skipped: int) -> Decisions:
        check_number(num_skipped, between, num_layers)
        places = [(2 * i + 1) * between // (2 * num_skipped) for i in range(num_skipped)]
        return without([1 + place for place in places], num_layers)

    return plan


def check_number(num_skipped: int, maximum: int, num_layers: int) -> None:
    """Refuse to drop more layers than can be.

    Raises:
        ConfigError: Naming the maximum.
    """
    if not 0 <= num_skipped <= maximum:
        raise ConfigError(
            f"{num_skipped} layers are to be dropped, but of {num_layers} layers at most "
            f"{maximum} can be; ask for more executions"
        )


def skipping(
    plan: Plan, executions: float, num_questions: int, generator: torch.Generator
) -> Tensor:
    """Follow a plan at given mean executions.

    If they aren't a whole number, some questions, drawn at random, drop one layer more than the
    others.

    Returns:
        `[Q, L]` decisions whose mean executions are within 1/(2Q) of those wanted.

    Raises:
        ConfigError: Executions that the plan doesn't go down to, or more than L.
    """
    L = len(plan(0))
    if executions > L:
        raise ConfigError(
            f"{executions:g} executions are wanted, but dropping layers of {L} leaves {L} at "
            f"most; give a number up to {L}"
        )
    more = L - int(executions)  # layers dropped by the questions that drop more
    fewer = plan(more - 1 if more else 0)
    return mixture(plan(more), fewer, executions, num_questions, generator)


def mixture(
    first: Decisions,
    second: Decisions,
    executions: float,
    num_questions: int,
    generator: torch.Generator,
) -> Tensor:
    """Give each question one of two decisions `[L]`, drawn, at given mean executions.

    The second has at least as many executions as the first, and those wanted are between.

    Returns:
        `[Q, L]` decisions whose mean executions are as near to those wanted as Q questions allow:
        within half the difference of the two, divided by Q.

    Raises:
        ConfigError: Executions that don't lie between.

    Example:
        >>> import torch
        >>> mixture((1, 0), (1, 1), 1.5, 4, torch.Generator()).sum(dim=1).double().mean()
        tensor(1.5000, dtype=torch.float64)
    """
    import torch

    share = share_of_second(first, second, executions)
    num_second = round(share * num_questions)
    takes_second = torch.randperm(num_questions, generator=generator) < num_second  # [Q]
    return torch.where(takes_second[:, None], torch.tensor(second), torch.tensor(first))


def share_of_second(first: Decisions, second: Decisions, executions: float) -> float:
    """Return which share of the questions a mixture gives the second of two decisions `[L]`.

    0 if both run as many.

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
