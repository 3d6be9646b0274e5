"""Progress and notes of a stage, and the logger.

A stage takes a `Listener` and never prints. The command line passes its terminal. From Python, pass
an object of your own subclass, or nothing: notes are then logged, and progress is dropped.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

logger = logging.getLogger("drllm")


class OnProgress(Protocol):
    """Called with the work done so far."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Report progress.

        Args:
            done: Units of work done, maybe a fraction. If `done` falls, a new part has begun.
            total: Units of work of this part.
            note: What is being done: phrases joined by ", ", the most important first.
        """


class Listener:
    """Receives the notes and the progress of a stage; this base class shows nothing."""

    def note(self, text: str) -> None:
        """Receive a line that the user should see but that isn't part of the result."""
        logger.info("%s", text)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Return a context for work whose progress can't be measured; `what` describes the work."""
        return nullcontext()

    def progress(self, title: str, unit: str) -> AbstractContextManager[OnProgress]:
        """Return a context that yields a callback for progress.

        Progress should be proportional to time. It is counted in `unit`, a plural. If `unit` is
        empty, only the share of the work that is done has a meaning.
        """
        return nullcontext(_ignore)


def _ignore(done: float, total: float, note: str = "") -> None: ...


def duration(seconds: float) -> str:
    """Format a time for people.

    Example:
        >>> [duration(seconds) for seconds in (59.94, 59.96, 75.0, 3599.6, 7260.0)]
        ['59.9 s', '1 min 0 s', '1 min 15 s', '1 h 0 min', '2 h 1 min']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rough_duration(seconds: float) -> str:
    """Format a time that is only estimated, in whole seconds or minutes, rounded up.

    Example:
        >>> [rough_duration(seconds) for seconds in (0.2, 59.0, 61.0, 3599.0, 7260.0)]
        ['1 s', '59 s', '2 min', '1 h 0 min', '2 h 1 min']
    """
    if seconds <= 59:
        return f"{max(1, math.ceil(seconds))} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence loggers of other packages inside the block."""
    other_loggers = [logging.getLogger(name) for name in names]
    levels = [other.level for other in other_loggers]
    for other in other_loggers:
        other.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for other, level in zip(other_loggers, levels, strict=True):
            other.setLevel(level)
