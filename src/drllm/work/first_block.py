"""Estimate the time and memory of a stage from its first block of work."""

import time

import psutil
import torch

from drllm.work.listener import Listener, format_rough_duration


class FirstBlock:
    """Times the first block of a stage, then tells how long the whole stage takes at most.

    The estimated time is an upper bound. The first block is slow for its size, since caches are
    cold, and a stage may end early. A stage takes longer only if its later blocks have much longer
    texts.

    Args:
        listener: Gets one line with the time and the memory.
        device: The model's device; `meta` if the model is in other processes, whose memory isn't
            named.
        max_seconds: The time limit of the stage, about; None for no limit.
    """

    def __init__(
        self, listener: Listener, device: torch.device, max_seconds: float | None = None
    ) -> None:
        self.listener = listener
        self.device = device
        self.max_seconds = max_seconds
        self.has_reported = False
        self.start_time = time.monotonic()

    def finish(self, share: float, seconds: float | None = None) -> None:
        """Report the time and the memory of the stage, once.

        Only the first call with a share above 0 counts. If its share is 1, no work remains, so
        nothing is reported.

        Args:
            share: The block's share of the work, in [0, 1].
            seconds: How long the block took; by default the time since this object was made.
        """
        if self.has_reported or share <= 0:
            return
        self.has_reported = True
        if share >= 1:
            return
        if seconds is None:
            seconds = time.monotonic() - self.start_time
        note = self._describe_time(seconds / share)
        if self.device.type != "meta":
            note += f", {measure_memory(self.device) / 1e9:.1f} GB of memory"
        self.listener.note(note)

    def _describe_time(self, seconds: float) -> str:
        """Say how long the stage takes at most."""
        if self.max_seconds is None or seconds <= self.max_seconds:
            return f"at most {format_rough_duration(seconds)}"
        return f"about {format_rough_duration(self.max_seconds)}"


def measure_memory(device: torch.device) -> int:
    """Return the memory in use in bytes: on CUDA the peak, elsewhere this process's current use."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return int(psutil.Process().memory_info().rss)
