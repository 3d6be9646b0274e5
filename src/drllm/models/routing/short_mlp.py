"""Runs a layer whose MLP computes the last tokens of each row alone.

At the last layer of a path that ends with the model's own last layer, only tokens whose logits are
needed have to pass the MLP. The others pass the attention, since the needed ones read their keys
and values there.

Axes: R rows, T tokens, N last tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

MIN_MATRICES = 2
"""Minimum number of matrices in an MLP: an up projection and a down projection."""


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

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the MLP, `[R, T, D]` to `[R, T, D]`."""
        if hidden_states.dim() != 3:  # rows and tokens can't be told apart
            return self.mlp(hidden_states, *args, **kwargs)
        # Contiguous, since some models reshape it with `view`.
        last = hidden_states[:, -self.num_tokens :].contiguous()
        output = self.mlp(last, *args, **kwargs)
        if isinstance(output, tuple):  # the others say which experts ran
            return self._lengthen(output[0], hidden_states), *output[1:]
        return self._lengthen(output, hidden_states)

    def _lengthen(self, output: Tensor, hidden: Tensor) -> Tensor:
        """Put zeros before the last tokens, `[R, N, D]` or `[R * N, D]` to `[R, T, D]`."""
        whole = output.new_zeros(hidden.shape)
        last = whole[:, -self.num_tokens :]
        last.copy_(output.view(last.shape))
        return whole


def list_mlps(layer: nn.Module) -> list[nn.Module]:
    """Return the children of a layer that look like its MLPs.

    These are the children with matrices that have no number of a layer, by which attention finds
    its place in a cache. There are none if no child has such a number. Whether a layer may run with
    short MLPs has to be tried.
    """
    mlps = []
    has_attention = False
    for child in layer.children():
        matrices = [weight for weight in child.parameters() if weight.dim() > 1]
        if any(hasattr(module, "layer_idx") for module in child.modules()):
            has_attention = True
        elif len(matrices) >= MIN_MATRICES:
            mlps.append(child)
    return mlps if has_attention else []


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
