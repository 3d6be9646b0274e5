"""Values that hold for a while, for one owner, in the thread that set them.

Owns the bookkeeping behind `routed.using(...)`, `routed.fixed(...)` and the like (`Held`), and
behind the forward pass under way (`Current`). Both live in context variables, which
`torch.compile` can't trace. So each says in a plain attribute, which is guarded, whether there is
anything to look up: with no block open, nothing is, and a model compiles without graph breaks;
with one open it runs right, at the price of graph breaks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")

_counting = threading.Lock()


class Held(Generic[Value]):
    """One kind of value; several owners may hold one each, the innermost block counts.

    Args:
        name: Of the kind, for debuggers.

    Attributes:
        in_use: Whether a block is open, for any owner and in any thread.

    Example:
        >>> lengths = Held("lengths")
        >>> owner = object()
        >>> with lengths.holding(owner, 3):
        ...     lengths.get(owner), lengths.get(object())
        (3, None)
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[tuple[tuple[int, Value], ...]] = ContextVar(name, default=())
        self._num_blocks = 0
        self.in_use = False

    @contextmanager
    def holding(self, owner: object, value: Value) -> Iterator[None]:
        """Hold a value for an owner inside the block."""
        token = self._variable.set(((id(owner), value), *self._variable.get()))
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            self._variable.reset(token)

    def get(self, owner: object) -> Value | None:
        """Return what the owner holds in this thread, or None."""
        if not self.in_use:
            return None
        for holder, value in self._variable.get():
            if holder == id(owner):
                return value
        return None

    def _count(self, change: int) -> None:
        with _counting:
            self._num_blocks += change
            self.in_use = self._num_blocks > 0


_values: ContextVar[Mapping[int, Any]] = ContextVar("current", default=MappingProxyType({}))


class Current(Generic[Value]):
    """One value from `begin` to `end`, apart for each thread; a plain object that pickles.

    A value begun while tracing stays in a plain attribute, since a trace is of one thread. One
    begun untraced is looked up in the thread's context, also from code that is being traced.
    """

    def __init__(self) -> None:
        self._traced: Value | None = None
        self._num_untraced = 0
        self._is_untraced = False

    def get(self) -> Value | None:
        """Return the value, or None between `end` and `begin`."""
        if not self._is_untraced:
            return self._traced
        if self._traced is not None and torch.compiler.is_compiling():
            return self._traced
        value: Value | None = _values.get().get(id(self), self._traced)
        return value

    def begin(self, value: Value) -> None:
        """Set the value; one that was left behind is forgotten."""
        self.end()
        if torch.compiler.is_compiling():
            self._traced = value
            return
        _values.set({**_values.get(), id(self): value})
        self._count(1)

    def end(self) -> None:
        """Forget the value."""
        self._traced = None
        if torch.compiler.is_compiling() and not self._is_untraced:
            return
        values = _values.get()
        if id(self) in values:
            _values.set({key: value for key, value in values.items() if key != id(self)})
            self._count(-1)

    def _count(self, change: int) -> None:
        with _counting:
            self._num_untraced += change
            self._is_untraced = self._num_untraced > 0
