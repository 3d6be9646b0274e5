"""Baseline: each layer's decision drawn as often as it was the target in training.

Axes: Q questions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drllm.bisection import bisect
from drllm.evaluation.baselines.base import TARGETS, Baseline, Drawn, executions_of, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEEPEST = 60.0
"""Largest tilt in either direction: what is left of a decision then can't be drawn."""
TOLERANCE = 1e-6
"""How far expected executions may lie from those wanted and still be called equal."""


@register
class LabelFrequency(Baseline):
    """Controls for what the targets are like on the whole, layer by layer.

    If this does as well as the routed model, the routers learned the frequencies of the labels and
    no more. Executions equal the routed model's on average.
    """

    name = "label frequency"
    description = (
        "each layer's decision drawn as often as it was the target in training, tilted to the "
        "executions wanted"
    )
    source = "ours"
    fitted_on = TARGETS
    order = 30
    is_drawn = True

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return decisions drawn one by one."""
        routers = self.routed.routers
        assert routers is not None
        wanted = executions_of(routes)
        frequencies = tilted(routers.config.label_counts, wanted)
        expected = expected_executions(frequencies)
        note = ""
        if abs(expected - wanted) > TOLERANCE:
            note = (
                f"not at equal executions: whatever the tilt, the labels give no nearer mean than "
                f"{expected:.2f} where the routed model has {wanted:.2f}"
            )
        return Drawn(label_frequency(frequencies, len(routes), generator), note=note)


def tilted(label_counts: Sequence[Sequence[int]], executions: float) -> Tensor:
    """Return each layer's frequencies of the targets, tilted to mean executions, `[L, 3]`.

    A decision d is weighted by its count times exp(-θ d), with one θ for all layers, so that
    drawing by the weights runs the wanted executions on average. Of all distributions with that
    mean these are the nearest to the targets' own (in relative entropy), so layers that the
    targets skip more often than others are still skipped more often. A decision that was never
    the target at a layer stays impossible there; if the labels can't reach the executions, these
    are the probabilities that come nearest. Counts are those of `router_config.json`, `[L][3]`;
    CheckpointError if the routers carry none.

    Source: ours (docs/differences.md, D-18).
    """
    import torch

    from drllm.models.routing.policies import label_frequencies

    probabilities = frequencies = label_frequencies(label_counts)
    decisions = torch.arange(3, dtype=torch.float64)

    def are_few(theta: float) -> bool:  # executions fall as θ grows
        nonlocal probabilities
        probabilities = (frequencies.log() - theta * decisions).softmax(dim=1)
        return expected_executions(probabilities) <= executions

    bisect(are_few, -STEEPEST, STEEPEST)
    return probabilities


def expected_executions(probabilities: Tensor) -> float:
    """Return the mean executions of `label_frequency`, its rule for empty draws included."""
    import torch

    drawn = float((probabilities @ torch.arange(3, dtype=probabilities.dtype)).sum())
    return drawn + float(probabilities[:, 0].prod())


def label_frequency(
    probabilities: Tensor, num_questions: int, generator: torch.Generator
) -> Tensor:
    """Draw every decision with the probabilities `[L, 3]` of its layer, `[Q, L]`.

    If a draw would skip every layer, the last one is executed, as in a routed model.
    """
    import torch

    drawn = torch.multinomial(probabilities, num_questions, replacement=True, generator=generator)
    drawn = drawn.T.contiguous()
    drawn[drawn.sum(dim=1) == 0, -1] = 1
    return drawn
