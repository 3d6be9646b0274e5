"""How long a stage takes at most and how much memory, from its first block of work."""

import math
import time

import psutil
import torch

from drllm.listener import Listener


class FirstBlock:
    """Times the first block of a stage, then says what the whole stage takes.

    The first block is the slowest for its size, since everything is new to the processor, and
    stages may end early, so the time is an upper bound; it isn't one where later blocks hold longer
    texts than their share of the work says.

    Args:
        listener: Gets one line.
        device: Where the model is.
    """

    def __init__(self, listener: Listener, device: torch.device) -> None:
        self.listener = listener
        self.device = device
        self.is_over = False
        self.started = time.monotonic()

    def finish(self, share: float, seconds: float | None = None) -> None:
        """Say what the stage takes, once: later calls do nothing, nor does a block of no work.

        Args:
            share: The block's share of the work that is left, in (0, 1].
            seconds: How long it took; since this object was made unless given.
        """
        if self.is_over or share <= 0:
            return
        self.is_over = True
        if seconds is None:
            seconds = time.monotonic() - self.started
        memory = used_memory(self.device)
        self.listener.note(f"at most {_round_up(seconds / share)}, {memory / 1e9:.1f} GB of memory")


def used_memory(device: torch.device) -> int:
    """Return the bytes in use: on a GPU the most so far, else those of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return int(psutil.Process().memory_info().rss)


def _round_up(seconds: float) -> str:
    """Write a time in whole seconds, minutes, or hours and minutes, rounded up."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
