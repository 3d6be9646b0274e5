"""Copy from the host to a device without making it wait."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Tensor | Sequence[Any], device: torch.device | str) -> Tensor:
    """Return a tensor, or numbers, on a device, without waiting for a GPU.

    From pinned memory a GPU copies while the host goes on; a copy from other memory would wait for
    all that the GPU still has to do.
    """
    tensor = torch.as_tensor(values)
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
