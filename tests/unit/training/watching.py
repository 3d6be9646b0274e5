"""A listener that passes what it hears on to functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from drllm.listener import Listener, OnProgress


class Watching(Listener):
    """Passes progress, and notes, on to functions."""

    def __init__(
        self, on_progress: Callable[..., Any], on_note: Callable[[str], Any] = lambda text: None
    ) -> None:
        self.on_progress, self.on_note = on_progress, on_note

    def note(self, text: str) -> None:
        self.on_note(text)

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[OnProgress]:
        yield self.on_progress
