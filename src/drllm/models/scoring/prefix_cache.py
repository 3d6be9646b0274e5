"""A bounded cache of prefix states: what a row of tokens is after the first executions of a path.

Axes: T tokens, D hidden, H heads, E head size.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from drllm.paths import Steps

GIGABYTE = 1e9

Key: TypeAlias = tuple[int, int, Steps]
"""Number of the packed rows that a row belongs to; the row; what was executed so far."""


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

    Everything held counts: states that nobody needs at the moment, those of a running pass, and
    what others hold besides the states and report here (`count_other`). A state that a pass needs
    isn't evicted before the pass is over, so memory may exceed the maximum by what a single pass
    needs; afterwards the maximum holds.
    """

    max_bytes: float
    num_bytes: int = 0
    peak_bytes: int = 0  # the largest that `num_bytes` was
    executions_run: int = 0  # states that were computed
    tokens_run: int = 0  # the sum of their tokens
    _states: OrderedDict[Key, PrefixState] = field(default_factory=OrderedDict)
    _needed: Counter[Key] = field(default_factory=Counter)  # by how many passes

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Key) -> PrefixState | None:
        """Return a state, or None if it was never kept or was evicted."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        return state

    def put(self, key: Key, state: PrefixState) -> None:
        """Keep a state that is needed until `release`, evicting others if necessary."""
        self.need(key)
        if key in self._states:
            return
        self._states[key] = state
        self.count_other(state.num_bytes)

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
        for state in self._states.values():
            self.num_bytes -= state.num_bytes
        self._states.clear()

    def _shrink(self) -> None:
        if self.num_bytes <= self.max_bytes:
            return
        for key in [key for key in self._states if key not in self._needed]:
            self.num_bytes -= self._states.pop(key).num_bytes
            if self.num_bytes <= self.max_bytes:
                return
