"""Copy tensors from the host to a device without waiting for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Tensor | Sequence[Any], device: torch.device | str) -> Tensor:
    """Put a tensor or a list of numbers on a device as a tensor, without waiting for a GPU.

    A copy from pinned memory runs while the host goes on. A copy from other memory would wait until
    the GPU has finished all its queued work.
    """
    tensor = torch.as_tensor(values)
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
