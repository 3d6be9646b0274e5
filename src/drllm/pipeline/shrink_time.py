"""Says how long a step of a shrink takes, as soon as its first block of work is done."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from drllm.work.listener import RESUMED_WITHIN_S, Listener, OnProgress, format_rough_duration


class TimedListener(Listener):
    """Passes on what it receives, and notes about how long the work takes.

    Args:
        listener: Receives the notes and the progress.
        what: The work in words, such as "measuring 570 questions with 3 models".
    """

    def __init__(self, listener: Listener, what: str) -> None:
        self.listener = listener
        self.what = what

    def note(self, text: str) -> None:
        """Pass a note on."""
        self.listener.note(text)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show that work goes on, as the other listener does."""
        return self.listener.busy(what)

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[OnProgress]:
        """Show the progress, as the other listener does, and note about how long the work takes."""
        with self.listener.progress(title, unit) as on_progress:
            yield _TimedProgress(self.listener, self.what, on_progress)


class _TimedProgress:
    """Estimates the time of the work from the first block that this run does."""

    def __init__(self, listener: Listener, what: str, on_progress: OnProgress) -> None:
        self.listener = listener
        self.what = what
        self.on_progress = on_progress
        self.started = time.monotonic()
        self.block_started = self.started
        self.done_before = 0.0
        self.has_reported = False

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Report progress; see `OnProgress`."""
        self.on_progress(done, total, note)
        now = time.monotonic()
        if now - self.started < RESUMED_WITHIN_S:
            self.done_before = done
            self.block_started = now
        elif not self.has_reported and self.done_before < done < total:
            self.has_reported = True
            seconds_per_unit = (now - self.block_started) / (done - self.done_before)
            seconds = seconds_per_unit * (total - self.done_before)
            self.listener.note(f"{self.what}: about {format_rough_duration(seconds)}")
