"""What a skipped layer leaves behind: the one place to put something better than nothing.

Owns the interface and the default, which is the paper's: the hidden state passes unchanged.
A bypass never touches the cache; which rows are bypassed is `routing`'s business.

Axes: R rows that skip the layer, T tokens, D hidden.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from drllm.models.routing.layer_call import LayerCall


class Bypass(Protocol):
    """Stands in for a layer on the rows that skip it."""

    def __call__(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return what the rows carry on with.

        Args:
            call: The visit at the layer; `call.index` and `call.module` say which it is.
            hidden: `[R, T, D]`, the layer's input on the rows that skip it.

        Returns:
            `[R, T, D]`. It may depend on each token alone, since nothing of it is cached.

        Example:
            >>> def own_mlp(call, hidden):
            ...     layer = call.module
            ...     return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        """


def identity(call: LayerCall, hidden: Tensor) -> Tensor:  # noqa: ARG001
    """Leave the hidden state as it is; Dr.LLM section 3.1."""
    return hidden
