"""Frozen weights in the dtype of autocast, cast once.

Autocast casts the float32 weight of a linear map at each call, and keeps the result only of weights
that need gradients. In healing the model is frozen, and its head runs for a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from drllm.model.batching import free_bytes
from drllm.models.routing.forward_override import ForwardOverride

SHARE_OF_MEMORY = 0.25
"""Largest share of the free memory that the cast weights may take."""


class CastLinear(ForwardOverride):
    """Runs a linear map with a copy of its weight in another dtype.

    Args:
        module: The linear map. It isn't changed.
        dtype: The dtype of autocast, which casts the states.
    """

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.weight = module.weight.detach().to(dtype)

    def forward(self, states: Tensor) -> Tensor:
        """Run the map, `[..., in]` to `[..., out]`."""
        return nn.functional.linear(states, self.weight, self.module.bias)


class CastWeights:
    """The cast weights of a model's frozen linear maps.

    They are kept from the first `use` on. Without enough memory none is kept, and autocast casts
    them as always; the results are the same, bit for bit.

    Args:
        model: The model, with its adapter.
        dtype: The dtype of autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._overrides: list[CastLinear] | None = None

    @contextmanager
    def use(self) -> Iterator[None]:
        """Let the linear maps run with their cast weights inside the block, under autocast."""
        if self._overrides is None:
            self._overrides = self._cast()
        for override in self._overrides:
            override.put_on()
        try:
            yield
        finally:
            for override in self._overrides:
                override.take_off()

    def _cast(self) -> list[CastLinear]:
        """Cast the weights, if there is enough memory for all of them."""
        modules = list_frozen_maps(self._model, self._dtype)
        num_bytes: dict[torch.device, int] = {}
        for module in modules:
            device = module.weight.device
            size = module.weight.numel() * self._dtype.itemsize
            num_bytes[device] = num_bytes.get(device, 0) + size
        for device, num_on_device in num_bytes.items():
            if num_on_device > SHARE_OF_MEMORY * free_bytes(device):
                return []
        return [CastLinear(module, self._dtype) for module in modules]


def list_frozen_maps(model: nn.Module, dtype: torch.dtype) -> list[nn.Linear]:
    """Return the frozen linear maps of another dtype that nothing else changes.

    Other code may override their forward, or compute their weight before each call, in a hook.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module.weight.requires_grad
        and not module.weight.is_meta
        and module.weight.dtype != dtype
    ]
