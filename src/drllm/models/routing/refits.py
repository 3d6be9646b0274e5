"""Refits: new weights of some linear maps, which run only in passes along their own path.

An override of a map's forward looks at the pass that runs in its thread. If the pass has a new
weight for the map, the map runs with it. Otherwise the map's own forward runs, so results equal
those of the base model bit by bit. Nothing is switched for the whole model, so threads may run
different refits at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drllm.errors import RoutingError, nearest_name
from drllm.models.routing.context import ThreadValue
from drllm.models.routing.forward_override import ForwardOverride

Refit = Mapping[str, Tensor]
"""The new weight of each refitted linear map, by the map's name LAYER.PLACE; see
`list_linear_maps`. A weight has the shape of the map's own weight, so that of a `Conv1D` is
`[in, out]`. The map's bias stays."""


class MapHandle(ForwardOverride):
    """The override of one linear map's forward.

    Args:
        current: The pass that runs in each thread. Its `new_weights` may have one for the map.
        module: The linear map.
        name: The map's name.
    """

    def __init__(self, current: ThreadValue[Any], module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.current = current
        self.name = name
        self.place = f"the linear map {name}"

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the map with the new weight that the pass has for it, else with its own."""
        forward = self.current.get()
        weight = None if forward is None else forward.new_weights.get(self.name)
        if weight is not None:
            return run_map(self.module, weight, states)
        if self.previous is not None:
            return self.previous(states, *args, **kwargs)
        # Not through `original`, as in `DecoderHandle`.
        return type(self.module).forward(self.module, states, *args, **kwargs)


def run_map(module: Any, weight: Tensor, states: Tensor) -> Tensor:
    """Run a linear map with another weight, `[..., in]` to `[..., out]`."""
    if isinstance(module, Conv1D):
        flat = torch.addmm(module.bias, states.reshape(-1, states.shape[-1]), weight)
        return flat.view(*states.shape[:-1], weight.shape[1])
    return nn.functional.linear(states, weight, module.bias)


class Refits:
    """The refits in a model, by the name of their adapter.

    Args:
        current: The pass that runs in each thread.
    """

    def __init__(self, current: ThreadValue[Any]) -> None:
        self._current = current
        self._handles: dict[str, MapHandle] = {}  # by linear map
        self._refits: dict[str, Refit] = {}  # by adapter

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that have a refit."""
        return tuple(self._refits)

    @property
    def handles(self) -> tuple[MapHandle, ...]:
        """The overrides on linear maps."""
        return tuple(self._handles.values())

    def add(self, name: str, refit: Refit, maps: Mapping[str, nn.Module]) -> None:
        """Put a refit into the model. The tensors aren't copied.

        Args:
            name: The adapter's name in the model.
            refit: The new weights.
            maps: The linear maps that a refit may change, by name.

        Raises:
            RoutingError: The name is empty or in use, the weights are for other maps or have other
                shapes, or a map's own weight is quantised or offloaded.
        """
        if not name:
            raise RoutingError("an adapter can't be called ''; give it a name")
        if name in self._refits:
            raise RoutingError(
                f"an adapter can't be called {name!r}, which is in the model already"
            )
        for key, weight in refit.items():
            if key not in maps:
                reason = nearest_name("linear map", key, maps)
                raise RoutingError(f"the refit {name!r} is for another model: {reason}")
            check_map(key, maps[key])
            check_weight(name, key, weight, maps[key])
        self.override_maps({key: maps[key] for key in refit})
        self._refits[name] = dict(refit)

    def override_maps(self, maps: Mapping[str, nn.Module]) -> None:
        """Put overrides on linear maps, so that a pass's `new_weights` may name these maps."""
        for key, module in maps.items():
            if key not in self._handles:
                handle = MapHandle(self._current, module, key)
                handle.put_on()
                self._handles[key] = handle

    def weights(self, name: str) -> Refit:
        """Return the new weights of an adapter; without a refit there are none.

        The weights follow the model's own: after the model was moved or converted, they are moved
        or converted once.
        """
        refit = self._refits.get(name, {})
        moved: dict[str, Tensor] = {}
        for key, weight in refit.items():
            module = self._handles[key].module
            if weight.device != module.weight.device or weight.dtype != module.weight.dtype:
                check_map(key, module)
                moved[key] = move_weight(weight, module.weight)
        if not moved:
            return refit
        # A new dict, since passes of other threads may read the earlier one.
        self._refits[name] = {**refit, **moved}
        return self._refits[name]

    def drop(self, name: str) -> None:
        """Drop an adapter's refit. The overrides stay on the maps until `remove`."""
        del self._refits[name]

    def install(self) -> None:
        """Put the overrides on the maps. This also works after `remove`."""
        for key, handle in self._handles.items():
            self._handles[key] = MapHandle(self._current, handle.module, key)
            self._handles[key].put_on()

    def remove(self) -> None:
        """Take the overrides off."""
        for handle in self._handles.values():
            handle.take_off()


def move_weight(weight: Tensor, like: Tensor) -> Tensor:
    """Return a weight on the device and in the dtype of another one."""
    with torch.inference_mode(False):  # a later pass may need gradients
        return weight.detach().to(like.device, like.dtype)


def check_map(name: str, module: Any) -> None:
    """Refuse a linear map that can't run with a new weight.

    Raises:
        RoutingError: The map's weight is offloaded or quantised, or its forward computes something
            else than a product and a sum.
    """
    if module.weight.device.type == "meta":
        raise RoutingError(
            f"the weight of {name} is offloaded, and a refit can't replace an offloaded weight; "
            f"load the model onto one device"
        )
    is_quantised = type(module.weight) not in (Tensor, nn.Parameter)
    if is_quantised or not module.weight.is_floating_point() or not _has_plain_forward(module):
        raise RoutingError(
            f"{name} is quantised, or its {type(module).__name__} has arithmetic of its own, and a "
            f"refit can't replace its weight; load the model without quantisation"
        )


def _has_plain_forward(module: Any) -> bool:
    """Tell whether a map runs the forward of its class: a product, and a sum with the bias."""
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        return False
    override = module.__dict__.get("forward")
    is_ours = isinstance(getattr(override, "__self__", None), MapHandle)
    has_hook = hasattr(module, "_hf_hook")  # of accelerate, which moves tensors between devices
    return override is None or is_ours or has_hook


def check_weight(adapter: str, name: str, weight: Tensor, module: Any) -> None:
    """Refuse a new weight that doesn't have the shape of a map's own weight."""
    if weight.shape != module.weight.shape:
        raise RoutingError(
            f"the refit {adapter!r} is for another model: {name} has a weight of shape "
            f"{list(module.weight.shape)}, the refit one of {list(weight.shape)}"
        )
