"""Refits: new weights of some modules, which run only in passes along their own path.

The modules are linear maps, and norms behind an MLP. An override of a module's forward looks at the
pass that runs in its thread. If the pass has a new weight for the module, it runs with it.
Otherwise the module's own forward runs, so results equal those of the base model bit for bit.
Nothing is switched for the whole model, so threads may run different refits at the same time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drllm.errors import RoutingError, nearest_name
from drllm.models.routing.context import ThreadValue
from drllm.models.routing.forward_override import ForwardOverride
from drllm.models.routing.lora import check_new_name

Refit = Mapping[str, Tensor]
"""The new weight of each refitted module, by the module's name LAYER.PLACE; see
`list_linear_maps` and `list_norms`. A weight has the shape of the module's own weight, so that of a
`Conv1D` is `[in, out]`. A bias stays."""


class ModuleHandle(ForwardOverride):
    """The override of the forward of one linear map or norm.

    Args:
        current: The pass that runs in each thread. Its `new_weights` may have one for the module.
        module: The module.
        name: The module's name.
    """

    def __init__(self, current: ThreadValue[Any], module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.current = current
        self.name = name
        self.place = f"the module {name}"

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the new weight that the pass has for it, else with its own."""
        forward = self.current.get()
        weight = None if forward is None else forward.new_weights.get(self.name)
        if weight is not None:
            return run_module(self.module, weight, states)
        if self.previous is not None:
            return self.previous(states, *args, **kwargs)
        # Not through `original`, as in `DecoderHandle`.
        return type(self.module).forward(self.module, states, *args, **kwargs)


def run_module(module: Any, weight: Tensor, states: Tensor) -> Tensor:
    """Run a linear map or a norm with another weight, `[..., in]` to `[..., out]`."""
    if not is_linear_map(module):
        # A copy, so that other threads can run the module itself. It shares all but the weight.
        norm = copy.copy(module)
        norm._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        result: Tensor = type(module).forward(norm, states)
        return result
    if isinstance(module, Conv1D):
        flat = torch.addmm(module.bias, states.reshape(-1, states.shape[-1]), weight)
        return flat.view(*states.shape[:-1], weight.shape[1])
    return nn.functional.linear(states, weight, module.bias)


def is_linear_map(module: nn.Module) -> bool:
    """Tell whether a refittable module is a linear map; otherwise it is a norm."""
    return isinstance(module, (nn.Linear, Conv1D))


class Refits:
    """The refits in a model, by the name of their adapter.

    Args:
        current: The pass that runs in each thread.
    """

    def __init__(self, current: ThreadValue[Any]) -> None:
        self._current = current
        self._handles: dict[str, ModuleHandle] = {}  # by module
        self._refits: dict[str, Refit] = {}  # by adapter

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that have a refit."""
        return tuple(self._refits)

    @property
    def handles(self) -> tuple[ModuleHandle, ...]:
        """The overrides on modules."""
        return tuple(self._handles.values())

    def add(self, name: str, refit: Refit, modules: Mapping[str, nn.Module]) -> None:
        """Put a refit into the model. The tensors aren't copied.

        Args:
            name: The adapter's name in the model.
            refit: The new weights.
            modules: The linear maps and norms that a refit may change, by name.

        Raises:
            RoutingError: The name is empty or in use, the weights are for other modules or have
                other shapes, or a module's own weight is quantised or offloaded.
        """
        check_new_name(name, self._refits)
        for key, weight in refit.items():
            if key not in modules:
                reason = nearest_name("module", key, modules)
                raise RoutingError(f"the refit {name!r} is for another model: {reason}")
            check_module(key, modules[key])
            check_weight(name, key, weight, modules[key])
        self.override({key: modules[key] for key in refit})
        self._refits[name] = dict(refit)

    def override(self, modules: Mapping[str, nn.Module]) -> None:
        """Put overrides on modules, so that a pass's `new_weights` may name these modules."""
        for key, module in modules.items():
            if key not in self._handles:
                handle = ModuleHandle(self._current, module, key)
                handle.put_on()
                self._handles[key] = handle

    def weights(self, name: str) -> Refit:
        """Return the new weights of an adapter; without a refit there are none.

        The weights follow the model's own: after the model was moved or converted, they are moved
        or converted once.
        """
        refit = self._refits.get(name, {})
        moved_weights: dict[str, Tensor] = {}
        for key, weight in refit.items():
            module = self._handles[key].module
            if weight.device != module.weight.device or weight.dtype != module.weight.dtype:
                check_module(key, module)
                moved_weights[key] = move_weight(weight, module.weight)
        if not moved_weights:
            return refit
        # A new dict, since passes of other threads may read the earlier one.
        self._refits[name] = {**refit, **moved_weights}
        return self._refits[name]

    def drop(self, name: str) -> None:
        """Drop an adapter's refit. The overrides stay until `remove`."""
        del self._refits[name]

    def install(self) -> None:
        """Put the overrides on the modules. This also works after `remove`."""
        for key, handle in self._handles.items():
            self._handles[key] = ModuleHandle(self._current, handle.module, key)
            self._handles[key].put_on()

    def remove(self) -> None:
        """Take the overrides off."""
        for handle in self._handles.values():
            handle.take_off()


def move_weight(weight: Tensor, like: Tensor) -> Tensor:
    """Return a weight on the device and in the dtype of another one."""
    with torch.inference_mode(False):  # a later pass may need gradients
        return weight.detach().to(like.device, like.dtype)


def check_module(name: str, module: Any) -> None:
    """Refuse a linear map or a norm that can't run with a new weight.

    Raises:
        RoutingError: The weight is offloaded or quantised, or the forward of a linear map computes
            something else than a product and a sum.
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
    """Tell whether a module runs the forward of its class; of a map, a product and a sum."""
    forwards = (nn.Linear.forward, Conv1D.forward)
    if is_linear_map(module) and type(module).forward not in forwards:
        return False
    override = module.__dict__.get("forward")
    is_ours = isinstance(getattr(override, "__self__", None), ModuleHandle)
    has_hook = hasattr(module, "_hf_hook")  # of accelerate, which moves tensors between devices
    return override is None or is_ours or has_hook


def check_weight(adapter: str, name: str, weight: Tensor, module: Any) -> None:
    """Refuse a new weight that doesn't have the shape of a module's own weight."""
    if weight.shape != module.weight.shape:
        raise RoutingError(
            f"the refit {adapter!r} is for another model: {name} has a weight of shape "
            f"{list(module.weight.shape)}, the refit one of {list(weight.shape)}"
        )
