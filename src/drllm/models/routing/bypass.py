"""Bypass: what runs in place of a skipped layer, a linear map fitted in closed form.

Without a bypass a skipped layer leaves the state as it is. With one, the state h becomes

    h + Q P n(h) + b,    n(h) = h / rms(h)

with P `[r, D]`, Q `[D, r]` and b `[D]` of the layer. The first real token of a text becomes h + c
instead, since its state may be 100 times as large as others. `shorten.bypass` fits the maps.

Axes: L layers, D hidden, r rank.

Source: ours (D-36).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drllm.errors import RoutingError
from drllm.models.routing.policies import without_autocast


def normalise(states: Tensor) -> Tensor:
    """Return n(h): states divided by the root mean squares of their entries, `[..., D]`."""
    return states * (states.square().mean(dim=-1, keepdim=True) + 1e-12).rsqrt()


class LayerMap(NamedTuple):
    """The map of one layer: P `[r, D]`, Q `[D, r]`, b `[D]` and c `[D]`."""

    down: Tensor
    up: Tensor
    bias: Tensor
    first: Tensor


TENSORS = LayerMap._fields
"""The names of the tensors of a bypass, in the order of its arguments."""


@dataclass(frozen=True, eq=False, repr=False)
class Bypass:
    """The maps of all layers of one model, in float32.

    Attributes:
        down: P of each layer, `[L, r, D]`.
        up: Q of each layer, `[L, D, r]`.
        bias: b of each layer, `[L, D]`.
        first: c of each layer, `[L, D]`.
        model: The identity of the model that it was fitted for; empty if that isn't known.
        file: The file that it was read from; empty if it was made in memory.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    first: Tensor
    model: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    _copies: dict[tuple[int, torch.device, torch.dtype], LayerMap] = field(
        default_factory=dict, init=False
    )

    def __post_init__(self) -> None:
        L, r, D = self.down.shape
        shapes = {"up": (L, D, r), "bias": (L, D), "first": (L, D)}
        for name, expected in shapes.items():
            shape = tuple(getattr(self, name).shape)
            if shape != expected:
                raise RoutingError(
                    f"{name!r} of this bypass has the shape {list(shape)}; expected "
                    f"{list(expected)}"
                )

    def __repr__(self) -> str:
        name = f" for {self.model['id']!r}" if self.model.get("id") else ""
        return f"Bypass({self.num_layers} layers, rank {self.rank}{name})"

    @property
    def num_layers(self) -> int:
        """The number of layers, L."""
        return self.down.shape[0]

    @property
    def rank(self) -> int:
        """The rank of the maps, r."""
        return self.down.shape[1]

    @property
    def hidden_size(self) -> int:
        """The size of a state, D."""
        return self.down.shape[2]

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise a RoutingError if the bypass is for a model of another shape."""
        if (self.num_layers, self.hidden_size) != (num_layers, hidden_size):
            raise RoutingError(
                f"this bypass is for a model of {self.num_layers} layers and a hidden size of "
                f"{self.hidden_size}; the model has {num_layers} and {hidden_size}"
            )

    @cached_property
    def sha256(self) -> str:
        """The hash of the tensors, by which records and routers recognise the bypass."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in TENSORS}

    def skip(self, layer: int, states: Tensor, is_first: Tensor | None = None) -> Tensor:
        """Return what a skipped layer gives in place of its output, `[..., D]`.

        Args:
            layer: The layer.
            states: What enters the layer, `[..., D]`. The result has its dtype and device.
            is_first: Whether a token is the first real token of its text, bool `[...]`; None if no
                token is.
        """
        layer_map = self._find_map(layer, states)
        values = states.to(layer_map.down.dtype)
        with without_autocast(states.device):
            inner = nn.functional.linear(normalise(values), layer_map.down)
            changes = nn.functional.linear(inner, layer_map.up, layer_map.bias)
        if is_first is not None:
            is_first = is_first.to(states.device)
            changes = torch.where(is_first[..., None], layer_map.first, changes)
        return (values + changes).to(states.dtype)

    def cross(self, layer: int, next_layer: int, states: Tensor, is_first: Tensor | None) -> Tensor:
        """Return what enters the layer after a gap, `[..., D]`; see `skip` for the other arguments.

        Args:
            layer: The layer before the gap; -1 if the first layers are left out.
            next_layer: The layer after the gap; L if the last layers are left out.
            states: What `layer` returned.
            is_first: As for `skip`.
        """
        for skipped in range(layer + 1, next_layer):
            states = self.skip(skipped, states, is_first)
        return states

    def _find_map(self, layer: int, states: Tensor) -> LayerMap:
        """Return a layer's map on the device of some states, in float32 or their wider dtype.

        It is copied there once.
        """
        dtype = torch.promote_types(states.dtype, torch.float32)
        key = (layer, states.device, dtype)
        layer_map = self._copies.get(key)
        if layer_map is None:
            tensors = self.tensors().values()
            with torch.inference_mode(False):  # a later pass may need gradients
                layer_map = LayerMap(
                    *(tensor[layer].to(states.device, dtype) for tensor in tensors)
                )
            self._copies[key] = layer_map
        return layer_map
