"""How a stage says how far it is and what should be known; the base class keeps quiet.

A stage takes a `Listener` and never prints. The command line passes its terminal; a caller from
Python passes an own subclass, or nothing: then notes go to the log and progress nowhere.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

logger = logging.getLogger("drllm")


class OnProgress(Protocol):
    """Called with the work done so far."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Report units done, maybe a fraction; fewer than before mean that a new part began.

        The note says what is being done, the most important first, with ", " between its parts.
        """


class Listener:
    """Hears what a stage says: notes, progress, and that something takes a while."""

    def note(self, text: str) -> None:
        """Hear a line that the user should know but that isn't part of the result."""
        logger.info("%s", text)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Hear, for the length of a block, what is being done where progress can't be measured."""
        return nullcontext()

    def progress(self, title: str, unit: str) -> AbstractContextManager[OnProgress]:
        """Return a block whose value takes reports of progress, in proportion to the time it takes.

        It is counted in `unit` (a plural); where that is empty, only its share is worth knowing.
        """
        return nullcontext(_ignore)


def _ignore(done: float, total: float, note: str = "") -> None: ...


def duration(seconds: float) -> str:
    """Write a time for people.

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


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep other packages' loggers from warning of what we say ourselves, or mean."""
    loggers = [logging.getLogger(name) for name in names]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
