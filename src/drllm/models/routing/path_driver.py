"""Paths in any order, run one after the other at the model's last layer.

Owns the `PathsDriver`, for paths that decisions can't express: a block of several layers that is
repeated, layers out of order. Leaves paths that decisions express, which `sharing` runs on many
rows with states that outlive the pass, and what the logits mean to its callers.

Axes: N paths, B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drllm.models.routing.injection import Forward
from drllm.models.routing.layer_call import LayerCall
from drllm.paths import Path


class PathsDriver:
    """Runs every row along each path, every layer under the arguments of its own place.

    So nothing depends on what a config says of layers: masks and positions are those that the base
    model makes for its own layers. What neighbouring paths begin with in common is run once, so
    sorted paths run every distinct beginning once. The pass must be one without a cache, which
    holds one entry a layer.

    The model's loop carries the input of the first layer up to the last one; there the driver
    returns path behind path, `[N · B, T, D]`, so that norm and head see these.

    Args:
        paths: Layer indices in the order executed: in any order, each any number of times.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [tuple(path) for path in paths]

    def begin(self, forward: Forward) -> None:
        """Make room for the calls."""
        forward.notes["calls"] = []

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Wait for the last layer, `[B, T, D]`."""
        calls: list[LayerCall] = call.forward.notes["calls"]
        calls.append(call)
        return self._run(calls, hidden) if call.is_last else hidden

    def end(self, forward: Forward) -> None:
        """Do nothing."""

    def _run(self, calls: Sequence[LayerCall], hidden: Tensor) -> Tensor:
        """Return the ends of all paths; only the states along the one under way are held."""
        states, ends = [hidden], []
        before: Path = ()
        for path in self.paths:
            num_shared = 0
            while before[: num_shared + 1] == path[: num_shared + 1] and num_shared < len(path):
                num_shared += 1
            del states[num_shared + 1 :]
            for layer in path[num_shared:]:
                states.append(calls[layer].run(states[-1]))
            ends.append(states[-1])
            before = path
        return ends[0] if len(ends) == 1 else torch.cat(ends)
