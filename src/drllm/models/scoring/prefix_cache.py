"""What a prompt has become after some executions, and the bounded store of such states.

Owns `State` and `StateCache`: what is held, how much memory that is, and what is given up first.
Which states are run, and what they are for, is up to `sharing`.

Axes: T tokens, D hidden, H heads, E head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from drllm.paths import Path

GIGABYTE = 1e9

Key: TypeAlias = tuple[int, int, Path]
"""The rows that a row belongs to, by number; the row; and the layers executed so far."""


@dataclass(frozen=True, slots=True)
class State:
    """A row of tokens after some executions.

    Attributes:
        hidden: `[T, D]`.
        keys: `[H, T, E]`, the K of the last execution; None when K/V isn't kept.
        values: Likewise V.
    """

    hidden: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the state holds."""
        return sum(t.nbytes for t in (self.hidden, self.keys, self.values) if t is not None)


class StateCache:
    """States by row and path, the least recently used given up when memory runs out.

    All that is held counts: states that nobody needs at the moment, those of a pass under way,
    and what others hold beside the states and report here (`count_beside`). A state that a pass
    needs isn't given up before the pass is over, so memory may exceed the bound by what a single
    pass needs; once it is over, the bound holds.

    Args:
        max_bytes: Most memory that all of this may take.

    Attributes:
        num_bytes: Memory that all of this takes now.
        peak_bytes: The most that it took.
        executions_run: States that were computed.
        tokens_run: The tokens of these, added up.
        executions_asked: Executions of all paths that were asked for.
    """

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.peak_bytes = 0
        self.executions_run = 0
        self.tokens_run = 0
        self.executions_asked = 0
        self._states: OrderedDict[Key, State] = OrderedDict()
        self._needed: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Key) -> State | None:
        """Return a state, or None if it was never kept or is gone."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        return state

    def put(self, key: Key, state: State) -> None:
        """Keep a state that is needed until `release`, giving up others if need be."""
        self.need(key)
        if key in self._states:
            return
        self._states[key] = state
        self._count(state.num_bytes)

    def need(self, key: Key) -> None:
        """Keep a state at any price until `release`, which has to follow once for each call."""
        self._needed[key] = self._needed.get(key, 0) + 1

    def release(self, keys: Iterable[Key]) -> None:
        """Let states go if memory is short; they stay otherwise."""
        for key in keys:
            self._needed[key] -= 1
            if not self._needed[key]:
                del self._needed[key]
        self._shrink()

    def count_beside(self, num_bytes: int) -> None:
        """Count memory that is held beside the states; negative when it is given back."""
        self._count(num_bytes)

    def forget(self) -> None:
        """Give up all states; what is held beside them still counts."""
        for state in self._states.values():
            self.num_bytes -= state.num_bytes
        self._states.clear()

    def _count(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._shrink()
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def _shrink(self) -> None:
        too_many = self.num_bytes - self.max_bytes
        given_up = []
        for key, state in self._states.items():
            if too_many <= 0:
                break
            if key not in self._needed:
                given_up.append(key)
                too_many -= state.num_bytes
        for key in given_up:
            self.num_bytes -= self._states.pop(key).num_bytes
