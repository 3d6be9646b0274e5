"""Whether a model's loop carries on with fewer tokens than it was given.

Owns trying it out. Behind the last layer only some tokens' logits are wanted, and the rest need not
be carried there. Leaves dropping them to `sharing`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drllm.models.injection import Forward
from drllm.models.layer_call import LayerCall
from drllm.models.routed import RoutedModel


class _Dropping:
    """A driver that runs no layer and hands on the first of two tokens."""

    def begin(self, forward: Forward) -> None:
        """Do nothing."""

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Drop a token behind the last layer."""
        return hidden[:, :1] if call.is_last else hidden

    def end(self, forward: Forward) -> None:
        """Do nothing."""


def can_drop_tokens(routed: RoutedModel) -> bool:
    """Say whether a model's loop goes on with fewer tokens than it was given.

    Some loops put what the last layer gives back into the shape that they were given; these must
    carry all tokens. It is tried out on two tokens, and costs no layer.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=routed.model.device)
    with torch.no_grad(), routed.injection.driven_by(_Dropping()):
        try:
            output = routed.injection.decoder(input_ids=ids, use_cache=False)
        except RuntimeError as error:
            if "is invalid for input of size" not in str(error):  # not that of `Tensor.view`
                raise
            return False
    return bool(output[0].shape[1] == 1)
