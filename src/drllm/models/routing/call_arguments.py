"""The arguments of calls of a model's decoder and layers: which are read, cut or refused.

Axes: B rows of the batch, T tokens, K keys, D hidden, E rotary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.errors import RoutingError

ROTARY = ("position_embeddings", "position_embeddings_global", "position_embeddings_local")
"""Names of the arguments that hold cosines and sines: `[B, T, E]`, or a table `[K, E]` in which the
layer looks up positions."""

BATCH_AXES: dict[str, int | None] = {
    "attention_mask": 0,
    **dict.fromkeys(ROTARY, 0),
    "position_ids": -2,
    "cache_position": None,
}
"""Batch axis of each tensor argument of a layer; None for a tensor without a batch axis. Other
tensor arguments are refused: a shape doesn't show which axis is the batch, since T may equal B."""

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names of a layer's cache argument in all versions of transformers. If the argument isn't a
`Cache`, it is refused."""

UNREAD_OPTIONS = ("tokenizer",)
"""Options of `generate` that reach the layers, though no layer reads them."""


def find_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the attention mask among the arguments of the decoder; None if there is no mask."""
    mask = kwargs.get("attention_mask")
    if "attention_mask" not in kwargs and len(args) > 1:
        mask = args[1]
    if not isinstance(mask, dict):
        return mask
    for value in mask.values():  # a mask per kind of attention, all with the same padding
        if value is not None:
            return value
    return None


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache among the arguments of a call; None if there is no cache."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            return value
    return None


def refuse_packed(kwargs: dict[str, Any], mask: Any) -> None:
    """Refuse several sequences in one row, since decisions are made for a whole row."""
    is_packed = False
    for name, value in kwargs.items():
        if name.startswith("cu_seq_lens") and value is not None:  # where the sequences start
            is_packed = True
    positions = kwargs.get("position_ids")
    # Without a mask, transformers begins a new sequence where the positions restart. A single
    # position can't restart, and to test it would make a decode step wait for the device.
    if mask is None and isinstance(positions, Tensor) and not torch.compiler.is_compiling():
        restarts = positions.diff(dim=-1) < 0
        if restarts.numel() > 0 and bool(restarts.any()):
            is_packed = True
    if is_packed:
        raise RoutingError(
            "packed sequences can't be routed: a row is no longer one prompt; give each prompt a "
            "row of its own, with padding"
        )


def refuse_foreign_cache(kwargs: dict[str, Any]) -> None:
    """Refuse a cache that isn't a `Cache` of transformers."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            raise RoutingError(
                f"the cache of this model is a {type(kwargs[name]).__name__}, not a Cache of "
                f"transformers; paged and other foreign caches can't be routed"
            )


def check_tensors(name: str, tensors: Any, kind: str) -> None:
    """Refuse an argument that can't be cut, or whose batch axis isn't known."""
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise RoutingError(
            f"the layers of this model take {name!r} as a {kind}, which can't be cut by rows; load "
            f"it with --attn-implementation sdpa (or eager)"
        )
    if name not in BATCH_AXES:
        raise RoutingError(
            f"the layers of this model take a tensor argument {name!r} whose batch axis isn't "
            f"known; routing rows apart would be a guess, so give every row the same decisions"
        )


def cut_last_tokens(num_tokens: int, num_past: int, name: str, tensor: Tensor) -> Tensor:
    """Return the part of a layer's argument that belongs to the last tokens of each row."""
    if name in ROTARY:
        return tensor if tensor.dim() == 2 else tensor[:, -num_tokens:]
    if name != "attention_mask" or tensor.dim() == 2:
        return tensor[..., -num_tokens:]
    past = tensor.shape[-1] - tensor.shape[-2]
    mask = tensor[..., -num_tokens:, :]
    earlier_keys = mask[..., past - num_past : past]
    last_keys = mask[..., mask.shape[-1] - num_tokens :]
    return torch.cat([earlier_keys, last_keys], dim=-1)
