"""Baselines that drop layers in an order of their own, whatever the question, at any executions.

Axes: Q questions, L layers, k layers dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar

from drllm.errors import ConfigError
from drllm.evaluation.baselines.base import NOTHING, Baseline, Drawn, executions_of, register
from drllm.paths import Decisions, num_executions

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LayerDropping(Baseline):
    """Drops k or k + 1 layers on each question, so that mean executions are the routed model's."""

    num_kept: ClassVar[int] = 1
    """Layers that are never dropped."""

    def obstacle(self, executions: float) -> str | None:
        """Say so if fewer executions are wanted than layers are kept."""
        if executions >= min(self.num_kept, self.num_layers):
            return None
        return (
            f"it keeps {self.num_kept} layers at least, and the routed model has "
            f"{executions:.2f} executions"
        )

    @abstractmethod
    def dropped(self, number: int) -> Sequence[int]:
        """Return the layers that are dropped, `number` of them or all that can be, never all L."""

    def decisions(self, number: int) -> Decisions:
        """Return the decisions that drop so many layers, or all that can be."""
        return without(self.dropped(number), self.num_layers)

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return decisions that drop k or k + 1 layers; the full path if more are executed."""
        import torch

        L, wanted = self.num_layers, executions_of(routes)
        if wanted > L:
            full = torch.ones(len(routes), L, dtype=torch.long)
            return Drawn(full, note=f"runs {L} layers, having none to drop")
        more = L - int(wanted)  # layers dropped by the questions that drop more
        first, second = self.decisions(more), self.decisions(max(more - 1, 0))
        return Drawn(mixture(first, second, wanted, len(routes), generator))


@register
class LastLayers(LayerDropping):
    """Drops the deepest layers first, but the last one, which makes what the head can read."""

    name = "last layers"
    description = "the deepest layers but the last one are dropped"
    source = "Gromov et al., arXiv 2403.17887"
    fitted_on = NOTHING
    order = 40
    num_kept = 2

    def dropped(self, number: int) -> Sequence[int]:
        """Return layers from the end; the first one is kept too."""
        return range(self.num_layers - 2, 0, -1)[:number]


@register
class EvenlySpaced(LayerDropping):
    """Drops layers at even distances, not in general those of k among those of k + 1."""

    name = "evenly spaced"
    description = "layers at even distances are dropped, the first and the last kept"
    source = "Unified Layer Skipping, arXiv 2404.06954"
    fitted_on = NOTHING
    order = 50
    num_kept = 2

    def dropped(self, number: int) -> Sequence[int]:
        """Return those of the L − 2 layers between that are nearest to the middles of k parts."""
        between = max(self.num_layers - 2, 0)
        k = min(number, between)
        return [1 + (2 * i + 1) * between // (2 * k) for i in range(k)]


def without(layers: Collection[int], num_layers: int) -> Decisions:
    """Return the full path's decisions without some layers."""
    return tuple(int(layer not in layers) for layer in range(num_layers))


def mixture(
    one: Decisions,
    other: Decisions,
    executions: float,
    num_questions: int,
    generator: torch.Generator,
) -> Tensor:
    """Give each question one of two decisions `[L]`, drawn, at given mean executions, `[Q, L]`.

    The mean is as near to that wanted as Q questions allow: within half the difference of the two,
    divided by Q. ConfigError for executions that don't lie between those of the two.
    """
    import torch

    first, second = sorted((one, other), key=num_executions)
    low, high = num_executions(first), num_executions(second)
    if not low <= executions <= high:
        raise ConfigError(
            f"{executions:g} executions are wanted of a mixture of {low} and {high}; give a number "
            f"from {low} to {high}"
        )
    share = (executions - low) / (high - low) if high > low else 0.0
    takes_second = torch.randperm(num_questions, generator=generator) < round(share * num_questions)
    return torch.where(takes_second[:, None], torch.tensor(second), torch.tensor(first))
