"""Split work over forward passes by the free memory, and halve a pass when memory runs out.

Results don't depend on how paths are split over passes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import psutil
import torch

from drllm.errors import ModelError
from drllm.work.listener import logger

Item = TypeVar("Item")
Result = TypeVar("Result")


MAX_PATHS = 256  # enough to keep any device busy; more paths in a pass only take memory
SHARE_OF_FREE_MEMORY = 0.5
"""Maximum share of the free memory for the states and logits of a pass. The rest is for activations
inside a layer, fragments and other programs."""
FLOAT_BYTES = 4  # bytes of a number in fp32

_num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # see `share_memory`


@dataclass(frozen=True, slots=True)
class PathSize:
    """The size of one path of one prompt in memory while the pass runs."""

    num_tokens: int  # number of tokens of the row, including its past
    num_logits: int  # number of tokens whose logits are computed
    keeps_kv: bool = False  # whether K/V is kept, and then copied into a cache for generation

    def num_bytes(self, model: Any) -> int:
        """Return the bytes that the path takes in a model."""
        config = model.config.get_text_config()
        value_bytes = model.dtype.itemsize
        state_size = config.hidden_size  # numbers for one token after one execution
        if self.keeps_kv:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            head_size = getattr(config, "head_dim", None)
            head_size = head_size or config.hidden_size // config.num_attention_heads
            kv_size = 2 * heads * head_size
            state_size += 2 * kv_size  # once in the state, and once in the cache
        states = self.num_tokens * config.num_hidden_layers * state_size * value_bytes
        # Logits in the model's dtype, a copy in fp32, and log-probabilities in fp32.
        logits = self.num_logits * config.vocab_size * (value_bytes + 2 * FLOAT_BYTES)
        return int(states + logits)


class ReservedMemory(Protocol):
    """Memory that is set aside, such as the memory of a cache."""

    max_bytes: float  # bytes that are set aside
    num_bytes: int  # bytes in use


@dataclass(eq=False)
class MemoryBatcher:
    """Splits work over forward passes that fit into memory."""

    model: Any
    # The memory of the cache that the passes fill, if any.
    states: ReservedMemory | None = None
    maximum: int | None = None  # maximum paths in a pass; None for as many as fit into memory
    _limit: int = sys.maxsize  # maximum paths in a pass; lower after memory ran out

    def num_paths(self, size: PathSize) -> int:
        """Return the number of paths in the next pass."""
        if self.maximum is not None:
            return min(self.maximum, self._limit)
        free = free_bytes(self.model.device)
        reserved = 0.0
        if self.states is not None:
            reserved = self.states.max_bytes - self.states.num_bytes
        available = max(free - reserved, free / 2)  # at most half is set aside
        num_fitting = int(available * SHARE_OF_FREE_MEMORY / size.num_bytes(self.model))
        return min(max(num_fitting, 1), MAX_PATHS, self._limit)

    def run(
        self,
        items: Sequence[Item],
        size: PathSize,
        run_pass: Callable[[Sequence[Item]], list[Result]],
    ) -> list[Result]:
        """Run all items, in passes that are as large as memory allows.

        Args:
            items: One item for each path.
            size: The size of the largest path.
            run_pass: A function that runs some of the items, and returns their results in order.

        Raises:
            ModelError: A single path doesn't fit.
        """
        results: list[Result] = []
        while len(results) < len(items):
            start = len(results)
            part = items[start : start + self.num_paths(size)]
            try:
                results += run_pass(part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise ModelError(self._describe_no_room(size)) from error
            else:
                continue
            # Not in the except block: there the error still holds the memory of the failed pass.
            self._halve(len(part))
        return results

    def _describe_no_room(self, size: PathSize) -> str:
        """Say that a single path doesn't fit into memory, and what to do."""
        advice = "load the model with --dtype bfloat16, or use a device with more memory"
        if self.states is not None and self.states.max_bytes:
            advice = f"lower --state-cache-gb, {advice}"
        return (
            f"a single path of {size.num_tokens} tokens doesn't fit into the memory of "
            f"{self.model.device}; {advice}"
        )

    def _halve(self, num_paths: int) -> None:
        """Let later passes take half as many paths as the pass that ran out of memory."""
        self._limit = max(num_paths // 2, 1)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory on %s with %d paths in a pass; continuing with %d",
            self.model.device,
            num_paths,
            self._limit,
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error means that an allocator had no memory left."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    # torch has an error class only for CUDA. Its other allocators raise a RuntimeError with their
    # name in the message.
    return re.search("DefaultCPUAllocator|MPS backend out of memory", str(error)) is not None


def share_memory(num_sharing: int) -> None:
    """Set how many processes share the machine's memory, including this process."""
    global _num_sharing
    _num_sharing = num_sharing


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; on a CPU, this process's share.

    On a CUDA device the memory that torch caches counts as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    return int(psutil.virtual_memory().available) // _num_sharing


def group_by_length(
    lengths: Sequence[int], size: int, max_tokens: int = sys.maxsize
) -> list[list[int]]:
    """Group prompts of similar length into batches, which need little padding.

    The longest prompts come first, so a batch that is too large for memory fails at the start.

    Args:
        lengths: The number of tokens of each prompt.
        size: Maximum number of prompts in a batch.
        max_tokens: Maximum number of tokens in a batch, including padding. A longer prompt is a
            batch by itself.

    Returns:
        For each batch, the places of its prompts in `lengths`.
    """
    places = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches: list[list[int]] = []
    while places:
        longest = max(lengths[places[0]], 1)
        num_prompts = max(1, min(size, max_tokens // longest))
        batches.append(places[:num_prompts])
        places = places[num_prompts:]
    return batches
