"""Scoped overrides, local to a thread: `routed.using(...)`, `routed.fixed(...)` and the like.

Both classes use context variables, which `torch.compile` can't trace. So each keeps a plain
attribute, which a compiled graph guards, that says whether there is anything to look up: without an
open block a model compiles without graph breaks; inside one it runs correctly, with graph breaks.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")

_counting = threading.Lock()


class _Counted:
    """Counts what is held, for any owner and in any thread."""

    def __init__(self) -> None:
        self._num_held = 0
        self.in_use = False  # whether anything is held: the plain attribute that a graph guards

    def _count(self, change: int) -> None:
        with _counting:
            self._num_held += change
            self.in_use = self._num_held > 0


class Override(_Counted, Generic[Value]):
    """A kind of value that blocks override; each owner has its own, the innermost block counts."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._variable: ContextVar[tuple[tuple[int, Value], ...]] = ContextVar(name, default=())

    @contextmanager
    def set(self, owner: object, value: Value) -> Iterator[None]:
        """Set the owner's value inside the block."""
        token = self._variable.set(((id(owner), value), *self._variable.get()))
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            self._variable.reset(token)

    def get(self, owner: object) -> Value | None:
        """Return the owner's value in this thread, or None outside of its blocks."""
        if self.in_use:
            for holder, value in self._variable.get():
                if holder == id(owner):
                    return value
        return None


_values: ContextVar[Mapping[int, Any]] = ContextVar("current", default=MappingProxyType({}))


class ThreadValue(_Counted, Generic[Value]):
    """One value from `begin` to `end`, separate for each thread; a plain object that pickles.

    A value begun while tracing stays in a plain attribute, since a trace belongs to one thread. One
    begun outside of a trace is looked up in the thread's context, also from code being traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self._traced: Value | None = None

    def get(self) -> Value | None:
        """Return the value, or None between `end` and `begin`."""
        if not self.in_use or (self._traced is not None and torch.compiler.is_compiling()):
            return self._traced
        value: Value | None = _values.get().get(id(self), self._traced)
        return value

    def begin(self, value: Value) -> None:
        """Set the value; a leftover one is dropped."""
        self.end()
        if torch.compiler.is_compiling():
            self._traced = value
            return
        _values.set({**_values.get(), id(self): value})
        self._count(1)

    def end(self) -> None:
        """Drop the value."""
        self._traced = None
        if torch.compiler.is_compiling() and not self.in_use:
            return
        values = _values.get()
        if id(self) in values:
            _values.set({key: value for key, value in values.items() if key != id(self)})
            self._count(-1)
