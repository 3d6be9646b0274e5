"""Copy tensors from the host to a device without blocking."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Tensor | Sequence[Any], device: torch.device | str) -> Tensor:
    """Return a tensor, or numbers as a tensor, on a device, without waiting for a GPU.

    A copy from pinned memory runs while the host goes on. A copy from other memory would wait until
    the GPU has finished all its queued work.
    """
    tensor = torch.as_tensor(values)
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
