"""Cache prefix states: a row's hidden states and K/V after the first executions of a path.

A scoring pass continues from the states in the cache, and adds its own. `prefix_sharing` uses it.

Axes: T tokens, D hidden, H heads, E head size.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from drllm.model.batching import free_bytes
from drllm.paths import Path

GIGABYTE = 1e9
MAX_STATE_CACHE_GB = 16  # maximum size of the cache of states by default

Key: TypeAlias = tuple[int, int, Path]
"""A state's key: the number of a `PackedRows`, the row, and the layers run so far."""


@dataclass(frozen=True, slots=True)
class PrefixState:
    """The state of a row of tokens after some executions."""

    hidden: Tensor  # [T, D]
    keys: Tensor | None = None  # [H, T, E], K of the last execution; None if K/V isn't kept
    values: Tensor | None = None  # [H, T, E], V of the last execution; None like `keys`

    @property
    def num_bytes(self) -> int:
        """The memory that the state takes, in bytes."""
        tensors = (self.hidden, self.keys, self.values)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(eq=False)
class PrefixCache:
    """Keeps states by row and path, and evicts the least recently used states when it is full.

    States that are put together lie in one tensor, so they are evicted together, as a batch. The
    size of the cache counts all states, and the memory that callers report by `count_other`. A pass
    protects the states that it needs until it ends. So the cache may exceed its maximum size during
    a pass.
    """

    max_bytes: float  # maximum size in bytes
    num_bytes: int = 0  # size in bytes, including the memory reported by `count_other`
    peak_bytes: int = 0  # the largest value of `num_bytes` so far
    executions_run: int = 0  # number of states that passes have computed, counted by them
    tokens_run: int = 0  # number of tokens in those states
    # Each state with the number of the newest batch that holds the state.
    _states: dict[Key, tuple[PrefixState, int]] = field(default_factory=dict)
    # Number of a batch → the batch's keys and bytes; the least recently used batch is the first.
    _batches: OrderedDict[int, tuple[list[Key], int]] = field(default_factory=OrderedDict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)  # of new batches
    _protections: Counter[Key] = field(default_factory=Counter)  # how many passes protect a state

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Key) -> PrefixState | None:
        """Return a state, or None if the cache doesn't hold it."""
        entry = self._states.get(key)
        if entry is None:
            return None
        state, batch = entry
        self._batches.move_to_end(batch)
        return state

    def put(self, states: Mapping[Key, PrefixState]) -> None:
        """Keep states that lie in one tensor, and evict other states if necessary.

        The new states are protected until `release`.
        """
        batch = next(self._numbers)
        num_bytes = sum(state.num_bytes for state in states.values())
        for key, state in states.items():
            self._states[key] = (state, batch)
        self._batches[batch] = (list(states), num_bytes)
        self._protections.update(states.keys())
        self.count_other(num_bytes)

    def protect(self, key: Key) -> None:
        """Protect a state from eviction. Each call needs a call of `release`."""
        self._protections[key] += 1

    def release(self, keys: Iterable[Key]) -> None:
        """End one protection of each state, and evict states if necessary."""
        self._protections.subtract(keys)
        self._protections = +self._protections  # drops the counts of zero
        self._shrink()

    def count_other(self, num_bytes: int) -> None:
        """Count memory that a caller holds besides the states; a negative number frees it."""
        self.num_bytes += num_bytes
        self._shrink()
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def forget(self) -> None:
        """Drop all states; memory reported by `count_other` still counts."""
        self.num_bytes -= sum(num_bytes for _, num_bytes in self._batches.values())
        self._states.clear()
        self._batches.clear()

    def _shrink(self) -> None:
        """Evict batches that no pass protects, least recently used first, until the size fits."""
        if self.num_bytes <= self.max_bytes:
            return
        for batch, (keys, num_bytes) in list(self._batches.items()):
            if self.num_bytes <= self.max_bytes:
                break
            if not self._protections.keys().isdisjoint(keys):
                continue
            del self._batches[batch]
            for key in keys:
                # A state that was put twice belongs to its newest batch, which may be evicted too.
                entry = self._states.get(key)
                if entry is not None and entry[1] == batch:
                    del self._states[key]
            self.num_bytes -= num_bytes


def make_prefix_cache(gigabytes: float | None, device: torch.device) -> PrefixCache:
    """Return an empty cache of a maximum size in GB.

    None means a quarter of the free memory, at most `MAX_STATE_CACHE_GB`.
    """
    if gigabytes is None:
        gigabytes = min(free_bytes(device) / 4 / GIGABYTE, MAX_STATE_CACHE_GB)
    return PrefixCache(gigabytes * GIGABYTE)
