"""Keeping something of every prompt that passes: what baselines that are fitted on prompts need.

Owns the passes and the order of what comes out. Leaves what is kept to the recorders (`exits`,
`first_layer`).

Axes: N prompts, B rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from drllm.models.routers.depth_control import routes_of
from drllm.models.routing.policies import Policy
from drllm.models.routing.routed_model import RoutedModel


class Recorder(Policy):
    """A policy that keeps something of every prompt that passes."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """What was kept of the last pass, `[B, …]` on the CPU."""


def recorded(
    routed: RoutedModel,
    recorder: Recorder,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> Tensor:
    """Let prompts pass a recorder in batches of like length, and return what it kept of each.

    Args:
        routed: The model; its policy and its last route stay what they are.
        recorder: What decides and keeps.
        prompts: Token ids of each prompt.
        batch_size: Prompts a forward pass.

    Returns:
        `[N, …]` on the CPU, in the order of the prompts.

    Raises:
        ConfigError: No prompts, one without tokens, or one longer than the model's context.
    """
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    kept = []
    for start in range(0, max(len(prompts), 1), batch_size):  # without prompts it says so
        part = [prompts[row] for row in by_length[start : start + batch_size]]
        routes_of(routed, recorder, part, batch_size=batch_size)
        kept.append(recorder.values)
    values = torch.cat(kept)
    return values[torch.tensor(by_length).argsort()]
