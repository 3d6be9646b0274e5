"""How a stage reports its progress and its notes: the class `Listener`. Also drllm's logger.

A stage takes a listener and never prints. The command line passes its terminal. From Python, pass
an object of your own subclass of `Listener`. If none is passed, notes are logged and progress isn't
shown.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

logger = logging.getLogger("drllm")

RESUMED_WITHIN_S = 2.0
"""Work that is reported within this time was done by an earlier run. It isn't part of the rate."""


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
    """Receives the notes and the progress of a stage.

    This base class logs notes and shows nothing.
    """

    def note(self, text: str) -> None:
        """Receive a line that the user should see, although it isn't part of the result."""
        logger.info("%s", text)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Return a context for work whose progress can't be measured; `what` describes the work."""
        return nullcontext()

    def progress(self, title: str, unit: str) -> AbstractContextManager[OnProgress]:
        """Return a context that yields a callback for progress.

        Args:
            title: What is being done.
            unit: What is counted, in the plural ("questions"); each unit should take about the same
                time. If it is empty, nothing is counted, and only `done / total` has a meaning.
        """
        return nullcontext(_ignore)


def _ignore(done: float, total: float, note: str = "") -> None: ...


def format_duration(seconds: float) -> str:
    """Format a time for people.

    Example:
        >>> [format_duration(seconds) for seconds in (59.94, 59.96, 75.0, 3599.6, 7260.0)]
        ['59.9 s', '1 min 0 s', '1 min 15 s', '1 h 0 min', '2 h 1 min']
    """
    if seconds < 59.95:  # 59.95 would be written as 60.0
        return f"{seconds:.1f} s"
    whole_seconds = round(seconds)
    if whole_seconds < 3600:
        return f"{whole_seconds // 60} min {whole_seconds % 60} s"
    return f"{whole_seconds // 3600} h {whole_seconds % 3600 // 60} min"


def write_minutes(minutes: float) -> str:
    """Write a limit in minutes, in hundredths at most; a smaller one is written as a hundredth.

    Example:
        >>> [write_minutes(minutes) for minutes in (1e-9, 0.05, 10 / 3, 30.0, 1e6)]
        ['0.01', '0.05', '3.33', '30', '1,000,000']
    """
    return f"{max(minutes, 0.01):,.2f}".rstrip("0").rstrip(".")


def format_rough_duration(seconds: float) -> str:
    """Format an estimated time in whole seconds or minutes, rounded up.

    Example:
        >>> [format_rough_duration(seconds) for seconds in (0.2, 59.0, 61.0, 3599.0, 7260.0)]
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
    package_loggers = [logging.getLogger(name) for name in names]
    levels = [package_logger.level for package_logger in package_loggers]
    for package_logger in package_loggers:
        package_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for package_logger, level in zip(package_loggers, levels, strict=True):
            package_logger.setLevel(level)
