"""What is read of prompts while all of them take the same decision at every layer.

Axes: N prompts.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from drllm.models.routers.depth_control import routes_of
from drllm.models.routing.policies import Policy, PromptView
from drllm.models.routing.routed_model import RoutedModel


def recorded(
    routed: RoutedModel,
    prompts: Sequence[Sequence[int]],
    read: Callable[[PromptView], Tensor],
    layers: Collection[int],
    *,
    decision: int,
) -> Tensor:
    """Return what is read of every prompt at some layers, while all take the same decision.

    It is `[N, layers, …]` on the CPU, in the order of the prompts. See `routes_of`.
    """
    kept: list[Tensor] = []  # batch by batch, layer by layer

    class Recorder(Policy):
        def decide(self, layer: int, prompts: PromptView) -> list[int]:
            if layer in layers:
                kept.append(read(prompts).cpu())
            return [decision] * prompts.num_rows

    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    routes_of(routed, Recorder(), [prompts[row] for row in by_length])
    starts = range(0, len(kept), len(layers))
    values = torch.cat([torch.stack(kept[at : at + len(layers)], dim=1) for at in starts])
    return values[torch.tensor(by_length).argsort()]
