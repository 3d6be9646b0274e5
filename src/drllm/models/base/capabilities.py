"""What a model's loop can do beyond reading ordinary texts, found out before it is relied on.

Owns three questions: may the continuations of a prompt be packed into one row behind it, may a
prompt be read in parts, and does the loop carry on with fewer tokens than it was given. Leaves
making use of it to `shared_rows` and `sharing`.

Axes: P rows, T tokens, K keys.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drllm.models.base.layers import find_layers
from drllm.models.base.prompts import context_length
from drllm.models.routing.injection import Forward
from drllm.models.routing.layer_call import LayerCall
from drllm.models.routing.routed_model import RoutedModel

if TYPE_CHECKING:
    from drllm.models.scoring.packing import Question

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""Names of the number of tokens that layers see which don't see all."""


def can_pack(model: Any, questions: Sequence[Question]) -> bool:
    """Say whether the continuations of each question may stand behind one copy of its context.

    It takes attention that is told by a mask what it may see. Such a mask takes the place of a
    window, or is cut by it column by column, and some models keep one as wide as their context,
    so no row may be longer than these.
    """
    longest = max(question.length for question in questions)
    most = min(_window(model), context_length(model) or longest)
    return _takes_any_mask(model) and longest <= most


def _takes_any_mask(model: Any) -> bool:
    """Say whether a mask and positions may be given that no ordinary text has."""
    return (
        model.config._attn_implementation in ("sdpa", "eager")
        and _reads_positions(model)
        and not _inverts_masks(model)
    )


def _reads_positions(model: Any) -> bool:
    """Say whether tokens stand where `position_ids` puts them, not where their columns are.

    ALiBi (MPT, Bloom, some Falcons) counts columns.
    """
    decoder, _ = find_layers(model)
    named = "position_ids" in inspect.signature(decoder.forward).parameters
    return named and not getattr(model.config.get_text_config(), "alibi", False)


def _inverts_masks(model: Any) -> bool:
    """Say whether a model's loop takes a mask `[P, 1, T, K]` for one of ones and zeros.

    XGLM and few others do up to transformers 5.0, by a function that later versions have no use
    for; it would take what may be seen for what may not.
    """
    decoder, _ = find_layers(model)
    return hasattr(sys.modules[type(decoder).__module__], "_prepare_4d_causal_attention_mask")


def _window(model: Any) -> float:
    """Return how many tokens the layers see that see the fewest; infinity if all see all."""
    sizes = [getattr(model.config.get_text_config(), name, None) for name in WINDOWS]
    return min((size for size in sizes if size), default=math.inf)  # 0 is none too


def can_split(model: Any) -> bool:
    """Say whether a prompt may be read in parts, the later ones behind the K/V of the earlier.

    It takes attention that is told by a mask what it may see, all of it at every layer, and
    rotations that don't depend on how much is read at once.
    """
    rotations = [
        getattr(module, "rope_type", None)
        for module in model.modules()
        if hasattr(module, "rope_type")
    ]
    return (
        _takes_any_mask(model)
        and _window(model) == math.inf
        and not any("dynamic" in str(kind) or "longrope" in str(kind) for kind in rotations)
    )


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
