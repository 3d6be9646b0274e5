"""Adapters of a routed model: low-rank updates that some rows of some runs of a layer get.

A forward hook on each linear map adds what is active, so weights and state-dict keys stay, a map
may be quantised, and rows without an adapter keep their bits. What is active is said for one run of
a layer at a time. A map that isn't called with all tokens of all rows (that of an expert, or one
that a model calls with its tokens in one long row) isn't adapted.

Axes: B rows, T tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from drllm.errors import RoutingError, nearest_name
from drllm.models.base.layers import evaluating, hooked, one_token
from drllm.models.routing.context import ThreadValue
from drllm.models.routing.injection import Driver, Injection

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drllm.models.routing.routed_model import RoutedModel

TRIED = (3, 5)
"""Rows and tokens of the batch that shows which maps are called with all of its tokens."""


@dataclass(eq=False)
class Adapter:
    """A low-rank update (LoRA) of linear maps: to x each adds `alpha / rank · B A x`."""

    rank: int  # R
    alpha: float  # what the update counts, times the rank
    # A `[R, in]` and B `[out, R]` of each map, by `LAYER.PLACE`: the index of the layer and the
    # map's place in it, such as `14.mlp.up_proj`.
    weights: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def fresh(
        cls, routed: RoutedModel, rank: int, alpha: float, layers: Collection[int], seed: int
    ) -> Adapter:
        """Return one for all linear maps of some layers that changes nothing yet, in float32.

        A is drawn as PEFT draws it, and B is zero.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, module in routed.injection.adapters.maps.items():
            if layer_of_map(name) in layers:
                num_in, num_out = _sizes(module)
                a = (2 * torch.rand(rank, num_in, generator=generator) - 1) * num_in**-0.5
                weights[name] = a, torch.zeros(num_out, rank)
        if not weights:
            raise RoutingError(f"the layers {sorted(layers)} have no nn.Linear that can be adapted")
        return cls(rank, alpha, weights)

    def parameters(self) -> Iterator[Tensor]:
        """Yield A and B of every map, as they are held: what an optimiser changes is what runs."""
        for pair in self.weights.values():
            yield from pair

    def merged(self, name: str, module: nn.Module) -> Tensor:
        """Return the weight of a map with the update added, computed in float32."""
        a, b = self.weights[name]
        update, weight = self.alpha / self.rank * (b.float() @ a.float()), module.weight
        assert isinstance(weight, Tensor)
        update = update.T if isinstance(module, Conv1D) else update
        return (weight.float() + update).to(weight.dtype)

    def num_entries(self, layer: int) -> int:
        """Return how many entries of matrices it multiplies a token with at a layer."""
        each = (pair for name, pair in self.weights.items() if layer_of_map(name) == layer)
        return sum(a.numel() + b.numel() for a, b in each)


def layer_of_map(name: str) -> int:
    """Return the layer of a linear map by its name in an adapter."""
    return int(name.partition(".")[0])


class Adapters:
    """The adapters that a routed model holds, by name, and the hooks that add what is active."""

    def __init__(self, injection: Injection) -> None:
        self._injection = injection
        self._active: ThreadValue[tuple[tuple[Adapter, Tensor | None], ...]] = ThreadValue()
        self._handles: list[RemovableHandle] = []
        self.held: dict[str, Adapter] = {}

    @cached_property
    def maps(self) -> dict[str, nn.Module]:
        """The linear maps that can be adapted, by their name in an adapter; a batch shows them."""
        found: dict[str, nn.Module] = {}

        def seen(name: str, module: nn.Module, args: Any, _output: Any) -> None:
            if args and args[0].shape[:2] == TRIED:
                found[name] = module

        injection = self._injection
        hooks = [
            module.register_forward_hook(
                partial(seen, f"{index}.{place.removesuffix('.base_layer')}")
            )
            for index, layer in enumerate(injection.layers)
            for place, module in layer.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in place  # of PEFT
        ]
        ids, decoder = one_token(injection.model).expand(TRIED), injection.decoder
        with hooked(hooks), torch.no_grad(), evaluating(decoder), injection.driven_by(Driver()):
            decoder(input_ids=ids, use_cache=False)
        return found

    def add(self, name: str, adapter: Adapter) -> None:
        """Hold an adapter under a name; see `RoutedModel.add_adapter`."""
        if not name or name in self.held:
            said = "is there already" if name else "is no name"
            raise RoutingError(f"an adapter can't be called {name!r}, which {said}; give another")
        for key, (a, b) in adapter.weights.items():
            if key not in self.maps:
                said = nearest_name("linear map", key, self.maps)
                raise RoutingError(f"the adapter {name!r} is for another model: {said}")
            num_in, num_out = _sizes(self.maps[key])
            if [*a.shape, *b.shape] != [adapter.rank, num_in, num_out, adapter.rank]:
                raise RoutingError(
                    f"the adapter {name!r} is for another model: at {key}, from {num_in} to "
                    f"{num_out}, it has A {list(a.shape)} and B {list(b.shape)}"
                )
        self.held[name] = adapter
        self.place()
        self.install()

    def drop(self, name: str) -> None:
        """Let go of an adapter, and of the hooks with the last one."""
        del self.held[self.check(name)]
        if not self.held:
            self.remove()

    def check(self, name: str) -> str:
        """Return the name of an adapter if it is held; else a RoutingError."""
        if name not in self.held:
            raise RoutingError(
                f"this model holds no adapter {name!r} (it has {', '.join(self.held) or 'none'}); "
                f"load the healed path that it belongs to, or give it to add_adapter()"
            )
        return name

    def place(self) -> None:
        """Move what is held, the same tensors, to where the maps are, unless they are offloaded."""
        for adapter in self.held.values():
            for key, pair in adapter.weights.items():
                device: Any = self.maps[key].weight.device
                for each in pair if device.type != "meta" else ():
                    each.data = each.data.to(device)

    def install(self) -> None:
        """Put the hooks on, if there is anything to add; after `remove`, on again."""
        if self.held and not self._handles:
            self._handles = [
                module.register_forward_hook(partial(self._add, name))
                for name, module in self.maps.items()
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def active(self, wanted: Sequence[tuple[str, Tensor | None]]) -> Iterator[None]:
        """Let adapters run inside the block, each on some rows of the batch, or on all (None)."""
        self._active.begin(tuple((self.held[self.check(name)], rows) for name, rows in wanted))
        try:
            yield
        finally:
            self._active.end()

    def _add(self, name: str, _module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Add to what a map gives, `[B, T, out]`, what the active adapters have for it."""
        for adapter, rows in self._active.get() or ():
            if name in adapter.weights:
                a, b = adapter.weights[name]
                rows = None if rows is None else rows.to(output.device)
                x = args[0] if rows is None else args[0].index_select(0, rows)
                inner = linear(x, a.to(x)) * (adapter.alpha / adapter.rank)  # [B, T, R]
                update = linear(inner, b.to(x)).to(output.dtype)
                output = output + update if rows is None else output.index_add(0, rows, update)
        return output


def rows_by_adapter(
    names: Sequence[str], rows: Sequence[int]
) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
    """Return each adapter's places among the rows that run, by all rows' names; None for all."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if names[row]:
            found.setdefault(names[row], []).append(place)
    return tuple(
        (name, None if len(places) == len(rows) else tuple(places))
        for name, places in found.items()
    )


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Return how many numbers a linear map takes and gives; its weight may be packed."""
    names = ("nx", "nf") if isinstance(module, Conv1D) else ("in_features", "out_features")
    return getattr(module, names[0]), getattr(module, names[1])
