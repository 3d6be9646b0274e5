"""One visit of a model's loop at one of its layers, and how to run the layer on some of its rows.

Owns the names of a layer's arguments, which of them have a batch axis and where, and slicing
them. Leaves the override that catches the visit to `injection`, and what is run to the drivers.

Axes: B rows of the batch, R rows that run, T tokens, K positions, D hidden, E rotary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from drllm.errors import RoutingError

if TYPE_CHECKING:
    from drllm.models.routing.injection import Forward, LayerHandle

ROTARY = ("position_embeddings", "position_embeddings_global", "position_embeddings_local")
"""Cosines and sines: `[B, T, E]`, or a table `[K, E]` that the layer looks positions up in."""

BATCH_AXES: dict[str, int | None] = {
    "attention_mask": 0,
    **dict.fromkeys(ROTARY, 0),
    "position_ids": -2,
    "cache_position": None,
}
"""Where the batch axis of a layer's tensor arguments lies; None for one that has none. An argument
that isn't named here is refused rather than guessed by its shape: [T] may equal [B]."""

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""The names that layers have had for their cache; only to notice one that isn't a `Cache`."""


NOT_READ = ("tokenizer",)
"""What `generate` was given for itself and hands down all the same; no layer reads it."""


class LayerCall:
    """One visit of the model's loop at one layer: its index, its arguments, and how to run it.

    Attributes:
        index: Layer index from 0.
        num_layers: L of the model.
        is_last: Whether no layer follows.
        forward: The forward pass that this call belongs to.
        cache: The K/V cache among the arguments, found by its type; None without one.
        extras: What the layer returned beside its hidden states when it last ran.
    """

    def __init__(
        self,
        handle: LayerHandle,
        forward: Forward,
        num_rows: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._handle = handle
        self._num_rows = num_rows
        self._args = args
        self._kwargs = kwargs
        self.index = handle.index
        self.num_layers = handle.injection.num_layers
        self.is_last = self.index == self.num_layers - 1
        self.forward = forward
        self.extras: tuple[Any, ...] = ()
        self.cache: Cache | None = None
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                self.cache = value
        if self.cache is None:
            for name in CACHE_NAMES:
                if kwargs.get(name) is not None:
                    raise RoutingError(
                        f"the cache of this model is a {type(kwargs[name]).__name__}, not a Cache "
                        f"of transformers; paged and other foreign caches can't be routed"
                    )

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        layer: nn.Module = self._handle.layer
        return layer

    def run(self, hidden: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """Execute the layer once.

        Args:
            hidden: `[R, T, D]`, the inputs of the rows that run.
            rows: For each of the R inputs, the row of the original batch whose mask and positions
                it uses; None where the inputs are the batch itself.

        Returns:
            `[R, T, D]` in the dtype of `hidden`.
        """
        args, kwargs = self._args, self._kwargs
        if rows is not None:
            names = self._handle.positional
            if len(args) > len(names):
                raise RoutingError(
                    f"the layers of this model take {len(args)} unnamed arguments after their "
                    f"input; rows can't be routed apart"
                )
            args = tuple(
                self._sliced(name, value, rows)
                for name, value in zip(names, args, strict=False)  # the rest have defaults
            )
            kwargs = {name: self._sliced(name, value, rows) for name, value in kwargs.items()}
        output = self._handle.original()(hidden, *args, **kwargs)
        if isinstance(output, tuple):
            self.extras = output[1:]
            output = output[0]
        result: Tensor = output if output.dtype == hidden.dtype else output.to(hidden.dtype)
        return result

    def last_tokens(self, num_tokens: int, num_ahead: int = 0) -> LayerCall:
        """Return this visit for rows that are cut to their last tokens, the first being padding.

        Args:
            num_tokens: Tokens that are left of the T of each row.
            num_ahead: Positions in front of the T that may still be seen, the last of those that
                the mask has.
        """
        memo = self.forward.cuts.setdefault((num_tokens, num_ahead), {})

        def cut(name: str, value: Any) -> Any:
            if name not in BATCH_AXES or value is None:
                return value
            if name not in memo or memo[name][0] is not value:
                tensors = _tensors(name, value)
                parts = tuple([_last_tokens(name, t, num_tokens, num_ahead) for t in tensors])
                memo[name] = (value, parts if tensors is value else parts[0])
            return memo[name][1]

        names = self._handle.positional
        args = (*map(cut, names, self._args), *self._args[len(names) :])
        kwargs = {name: cut(name, value) for name, value in self._kwargs.items()}
        return LayerCall(self._handle, self.forward, self._num_rows, args, kwargs)

    def _sliced(self, name: str, value: Any, rows: tuple[int, ...]) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, Cache)) or name in NOT_READ:
            return value
        tensors = _tensors(name, value)
        if name not in BATCH_AXES:
            raise RoutingError(
                f"the layers of this model take a tensor argument {name!r} whose batch axis isn't "
                f"known; routing rows apart would be a guess, so give every row the same decisions"
            )
        axis = BATCH_AXES[name]
        if axis is None or (name in ROTARY and tensors[0].dim() == 2):
            return value
        memo = self.forward.slices.setdefault(rows, {})
        if name in memo and memo[name][0] is value:
            return memo[name][1]
        sliced = tuple([self._rows_of(name, tensor, axis, rows) for tensor in tensors])
        result = sliced if isinstance(value, (tuple, list)) else sliced[0]
        memo[name] = (value, result)
        return result

    def _rows_of(self, name: str, tensor: Tensor, axis: int, rows: tuple[int, ...]) -> Tensor:
        if tensor.shape[axis] == 1:  # broadcast over the batch: the same for every row
            # Some models count a mask's rows; several states of a batch of one row need as many.
            counted = name == "attention_mask" and self._num_rows == 1 and tensor.dim() == 4
            return tensor.expand(len(rows), -1, -1, -1) if counted else tensor
        if tensor.shape[axis] != self._num_rows:
            raise RoutingError(
                f"the layers of this model take {name!r} of shape {list(tensor.shape)}, whose axis "
                f"{axis} doesn't count the {self._num_rows} rows of the batch; routing rows apart "
                f"would be a guess, so give every row the same decisions"
            )
        return tensor.index_select(axis, self.forward.index(rows, tensor.device))


def _tensors(name: str, value: Any) -> Sequence[Tensor]:
    """Return an argument as its tensors, or refuse one that is made of something else."""
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise RoutingError(
            f"the layers of this model take {name!r} as a {type(value).__name__}, which can't be "
            f"cut by rows; load it with --attn-implementation sdpa (or eager)"
        )
    return tensors


def _last_tokens(name: str, tensor: Tensor, num_tokens: int, num_ahead: int) -> Tensor:
    """Return the part of a layer's argument that belongs to the last tokens of its rows."""
    if name in ROTARY:
        return tensor if tensor.dim() == 2 else tensor[:, -num_tokens:]
    if name != "attention_mask" or tensor.dim() == 2:
        return tensor[..., -num_tokens:]
    ahead = tensor.shape[-1] - tensor.shape[-2]
    seen = tensor[..., -num_tokens:, :]
    return torch.cat(
        [seen[..., ahead - num_ahead : ahead], seen[..., seen.shape[-1] - num_tokens :]], dim=-1
    )
