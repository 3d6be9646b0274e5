"""Runs a layer whose MLP computes the last tokens of each row alone.

Where a path ends, only tokens whose logits are needed have to pass the MLP. The others pass the
attention, since later tokens read their keys and values there.

Axes: R rows, T tokens, N last tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn


class ShortMLP(nn.Module):
    """An MLP that computes the last tokens of each row, and returns zeros for the others.

    Args:
        mlp: The MLP. It isn't changed.
        num_tokens: N.
    """

    def __init__(self, mlp: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.num_tokens = num_tokens

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the MLP, `[R, T, D]` to `[R, T, D]`."""
        # Contiguous, since some models reshape it with `view`.
        output = self.mlp(hidden[:, -self.num_tokens :].contiguous(), *args, **kwargs)
        if isinstance(output, tuple):  # the others say which experts ran
            return self._lengthen(output[0], hidden), *output[1:]
        return self._lengthen(output, hidden)

    def _lengthen(self, short: Tensor, hidden: Tensor) -> Tensor:
        """Put zeros before the last tokens, `[R, N, D]` to `[R, T, D]`."""
        whole = short.new_zeros(hidden.shape[:-1] + short.shape[-1:])
        whole[:, -self.num_tokens :] = short
        return whole


def shorten_mlps(layer: nn.Module, mlps: Collection[nn.Module], num_tokens: int) -> nn.Module:
    """Return a copy of a layer whose MLPs compute the last tokens of each row alone.

    The copy shares all modules with the layer, so that other threads can run the layer itself.

    Args:
        layer: The layer.
        mlps: Its children that are MLPs.
        num_tokens: How many tokens of each row pass them, at least one.
    """
    short = copy.copy(layer)
    children: dict[str, nn.Module | None] = dict(layer._modules)
    for name, child in children.items():
        if child in mlps:
            assert child is not None
            children[name] = ShortMLP(child, num_tokens)
    short._modules = children
    return short
