"""How what the host knows gets onto a device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Tensor | Sequence[Any], device: torch.device | str) -> Tensor:
    """Return a tensor of the host, or its numbers, on a device; a GPU isn't waited for.

    A GPU copies out of memory that is pinned while the host goes on, but out of other memory only
    once it has done all that it was told before.
    """
    tensor, device = torch.as_tensor(values), torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
