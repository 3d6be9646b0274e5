"""Values that only one thread sees, inside a `with` block or a forward pass.

`routed.using(...)` and `routed.fixed(...)` set an `Override`. The running pass is a `ThreadValue`.
Both classes keep their values in context variables, which `torch.compile` can't trace. So both also
have a plain attribute, `in_use`. While it is False, no context variable is read. A compiled graph
checks the attribute, and is compiled again if it changes. So a model compiles without graph breaks
outside of these blocks, and with graph breaks inside.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")

_count_lock = threading.Lock()


class _UseCount:
    """Counts the values that are set now, over all owners and threads."""

    def __init__(self) -> None:
        self._num_set = 0
        self.in_use = False  # whether any value is set

    def _count(self, change: int) -> None:
        with _count_lock:
            self._num_set += change
            self.in_use = self._num_set > 0


class Override(_UseCount, Generic[Value]):
    """A value that an owner has inside a `with` block. The innermost open block wins."""

    def __init__(self, name: str) -> None:
        super().__init__()
        # Pairs (id of the owner, value), the innermost block first.
        self._blocks: ContextVar[tuple[tuple[int, Value], ...]] = ContextVar(name, default=())

    @contextmanager
    def set(self, owner: object, value: Value) -> Iterator[None]:
        """Set the owner's value inside the block."""
        block = (id(owner), value)
        self._blocks.set((block, *self._blocks.get()))
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            # Only this block: blocks of generators may end in another order than they began.
            others = [other for other in self._blocks.get() if other is not block]
            self._blocks.set(tuple(others))

    def get(self, owner: object) -> Value | None:
        """Return the owner's value in this thread, or None outside of its blocks."""
        if not self.in_use:
            return None
        for owner_id, value in self._blocks.get():
            if owner_id == id(owner):
                return value
        return None


# This thread's values, by the id of their `ThreadValue`. All objects share one context variable,
# since an object with a context variable of its own couldn't be pickled.
_thread_values: ContextVar[Mapping[int, Any]] = ContextVar("current", default=MappingProxyType({}))


class ThreadValue(_UseCount, Generic[Value]):
    """A value of each thread, set by `begin` and dropped by `end`. The object can be pickled.

    Code that torch traces can't read a context variable without a graph break. So a value that is
    set while torch traces is kept in a plain attribute, which is safe, since only one thread traces
    at a time. A value that was set before the trace is still found, at the cost of a graph break.
    """

    def __init__(self) -> None:
        super().__init__()
        # The value that was set by code under `torch.compile`, while it was traced or when the
        # compiled code runs. Code outside of the graph reads it too.
        self._traced: Value | None = None

    def get(self) -> Value | None:
        """Return the value, or None if it isn't set."""
        if not self.in_use:
            return self._traced
        if self._traced is not None and torch.compiler.is_compiling():
            return self._traced
        value: Value | None = _thread_values.get().get(id(self), self._traced)
        return value

    def begin(self, value: Value) -> None:
        """Set the value. An earlier value that is still set is dropped."""
        self.end()
        if torch.compiler.is_compiling():
            self._traced = value
            return
        _thread_values.set({**_thread_values.get(), id(self): value})
        self._count(1)

    def end(self) -> None:
        """Drop the value."""
        self._traced = None
        if torch.compiler.is_compiling() and not self.in_use:
            return  # no thread has a value, and to read the context variable breaks the graph
        values = dict(_thread_values.get())
        if id(self) in values:
            del values[id(self)]
            _thread_values.set(values)
            self._count(-1)
