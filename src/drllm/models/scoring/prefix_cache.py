"""A bounded cache of prefix states: what a row of tokens is after the first executions of a path.

Axes: T tokens, D hidden, H heads, E head size.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from drllm.paths import Path

GIGABYTE = 1e9

Key: TypeAlias = tuple[int, str, int, Path]
"""Number of the packed rows that a row belongs to; the adapter; the row; the layers so far."""


@dataclass(frozen=True, slots=True)
class PrefixState:
    """A row of tokens after some executions."""

    hidden: Tensor  # [T, D]
    keys: Tensor | None = None  # [H, T, E], the K of the last execution, where K/V is kept
    values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the state holds."""
        return sum(t.nbytes for t in (self.hidden, self.keys, self.values) if t is not None)


@dataclass(eq=False)
class PrefixCache:
    """States by row and path; the least recently used are evicted when memory runs out.

    States that were put together lie in one tensor, so they are evicted together. Everything held
    counts: all states, and what others hold besides them and report here (`count_other`). What a
    pass needs isn't evicted before it is over, so memory may exceed the maximum meanwhile.
    """

    max_bytes: float
    num_bytes: int = 0
    peak_bytes: int = 0  # the largest that `num_bytes` was
    executions_run: int = 0  # states that were computed
    tokens_run: int = 0  # the sum of their tokens
    # Each state with the number of its batch.
    _states: dict[Key, tuple[PrefixState, int]] = field(default_factory=dict)
    # Each batch's keys and bytes, least recently used first.
    _batches: OrderedDict[int, tuple[list[Key], int]] = field(default_factory=OrderedDict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _needed: Counter[Key] = field(default_factory=Counter)  # by how many passes

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Key) -> PrefixState | None:
        """Return a state, or None if it was never kept or was evicted."""
        entry = self._states.get(key)
        if entry is None:
            return None
        state, batch = entry
        self._batches.move_to_end(batch)
        return state

    def put(self, states: Mapping[Key, PrefixState]) -> None:
        """Keep states of one tensor, needed until `release`, evicting others if necessary."""
        batch = next(self._numbers)
        num_bytes = sum(state.num_bytes for state in states.values())
        for key, state in states.items():
            self._states[key] = (state, batch)
        self._batches[batch] = (list(states), num_bytes)
        self._needed.update(states.keys())
        self.count_other(num_bytes)

    def need(self, key: Key) -> None:
        """Protect a state from eviction until `release`, which has to follow once for each call."""
        self._needed[key] += 1

    def release(self, keys: Iterable[Key]) -> None:
        """Allow eviction again."""
        self._needed.subtract(keys)
        self._needed = +self._needed  # those above zero
        self._shrink()

    def count_other(self, num_bytes: int) -> None:
        """Count memory that is held besides the states; negative when it is freed."""
        self.num_bytes += num_bytes
        self._shrink()
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def forget(self) -> None:
        """Drop all states; what is held besides them still counts."""
        self.num_bytes -= sum(num_bytes for _, num_bytes in self._batches.values())
        self._states.clear()
        self._batches.clear()

    def _shrink(self) -> None:
        """Evict the least recently used batches that no pass needs, as far as memory demands it."""
        if self.num_bytes <= self.max_bytes:
            return
        for batch, (keys, num_bytes) in list(self._batches.items()):
            if self.num_bytes <= self.max_bytes:
                break
            if not self._needed.keys().isdisjoint(keys):
                continue
            del self._batches[batch]
            for key in keys:
                self._states.pop(key, None)  # put anew since, it may be gone
            self.num_bytes -= num_bytes
