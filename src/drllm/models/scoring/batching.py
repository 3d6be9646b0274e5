"""Batch size by memory: how many paths one forward pass takes, and half as many where it runs out.

Results don't depend on how paths are split over passes.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
import torch

from drllm.errors import ModelError
from drllm.listener import logger
from drllm.models.scoring.prefix_cache import GIGABYTE, PrefixCache

Item = TypeVar("Item")
Result = TypeVar("Result")


MAX_PATHS = 256  # a pass of so many paths keeps any device busy; more only takes memory
SHARE_OF_FREE_MEMORY = 0.5
"""The rest is for what isn't counted: activations inside a layer, fragments, other programs."""
FLOAT_BYTES = 4

_num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


@dataclass(frozen=True, slots=True)
class PathSize:
    """What a path of one prompt takes while its pass runs."""

    num_tokens: int  # of its row, past ones included
    num_logits: int  # tokens whose logits are computed
    keeps_kv: bool = False  # its K/V is kept, and gathered once more to generate from

    def num_bytes(self, model: Any) -> int:
        """Return its memory in a model."""
        config = model.config.get_text_config()
        size = model.dtype.itemsize
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        each = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv = 2 * heads * each * 2 if self.keeps_kv else 0  # in the state, and in the cache
        states = self.num_tokens * config.num_hidden_layers * (config.hidden_size + kv) * size
        # As computed, in fp32, and once more in fp32 for what is computed from them.
        logits = self.num_logits * config.vocab_size * (size + 2 * FLOAT_BYTES)
        return int(states + logits)


@dataclass(eq=False)
class MemoryBatcher:
    """Splits work over forward passes."""

    model: Any
    # A cache that will still take some of the memory that is free now.
    states: PrefixCache = field(default_factory=lambda: PrefixCache(0))
    maximum: int | None = None  # paths in a pass; None picks it by the memory that is free
    _limit: int = sys.maxsize  # until memory runs out

    def num_paths(self, size: PathSize) -> int:
        """Return how many paths the next pass takes."""
        wanted = self.maximum
        if wanted is None:
            free = free_bytes(self.model.device)
            left = max(free - (self.states.max_bytes - self.states.num_bytes), free / 2)
            wanted = int(left * SHARE_OF_FREE_MEMORY / size.num_bytes(self.model))
            wanted = min(max(wanted, 1), MAX_PATHS)
        return min(wanted, self._limit)

    def run(
        self,
        items: Sequence[Item],
        size: PathSize,
        one_pass: Callable[[Sequence[Item]], list[Result]],
    ) -> list[Result]:
        """Run all items, one for each path, as many in a pass as memory allows.

        `size` is that of the largest path; `one_pass` gives the results of a part of the items, in
        order. A single path that doesn't fit is a ModelError.
        """
        results: list[Result] = []
        while len(results) < len(items):
            part = items[len(results) :][: self.num_paths(size)]
            try:
                results += one_pass(part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    lower = "lower --state-cache-gb, " if self.states.max_bytes else ""
                    raise ModelError(
                        f"a single path of {size.num_tokens} tokens doesn't fit into the memory of "
                        f"{self.model.device}; {lower}load the model with --dtype bfloat16, or use "
                        f"a device with more memory"
                    ) from error
            else:
                continue
            # Outside of the except block, so that what the failed pass held is free by now.
            self._limit = max(len(part) // 2, 1)
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning(
                "out of memory on %s with %d paths in a pass; continuing with %d",
                *(self.model.device, len(part), self._limit),
            )
        return results


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error means that an allocator had no memory left."""
    # torch has a class for CUDA alone; its other allocators raise a bare error that names them.
    named = re.search("DefaultCPUAllocator|MPS backend out of memory", str(error))
    return isinstance(error, torch.cuda.OutOfMemoryError) or named is not None


def share_memory(num_sharing: int) -> None:
    """Set how many processes, this one included, each count on a part of the machine's memory."""
    global _num_sharing
    _num_sharing = num_sharing


def free_bytes(device: torch.device) -> int:
    """Return the free memory: of a CUDA device, what torch has cached included, else our part."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    return int(psutil.virtual_memory().available) // _num_sharing


def prefix_cache(gigabytes: float | None, device: torch.device) -> PrefixCache:
    """Return an empty cache of the given GB, else a quarter of the free memory, at most 16."""
    size = min(free_bytes(device) / 4 / GIGABYTE, 16) if gigabytes is None else gigabytes
    return PrefixCache(size * GIGABYTE)


def batches(lengths: Sequence[int], size: int, max_tokens: int = sys.maxsize) -> list[list[int]]:
    """Divide prompts or questions into batches by their lengths in tokens alone, the longest first.

    So little of a batch is padding, and what is too large for memory fails at the start. Padding
    counted, a batch has `max_tokens` at most; a longer prompt has one to itself.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    found: list[list[int]] = []
    while order:
        number = max(1, min(size, max_tokens // max(lengths[order[0]], 1)))
        found.append(order[:number])
        order = order[number:]
    return found
