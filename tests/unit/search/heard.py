"""Who listens to a search: shared by its tests here and on Ray."""

from contextlib import contextmanager

from drllm.listener import Listener


class Heard(Listener):
    """Notes what it hears; stops the search, as an interruption would, at a number of questions."""

    def __init__(self, stop_at=None, at_each=lambda done: None):
        self.stop_at = stop_at
        self.at_each = at_each
        self.calls = []
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    @contextmanager
    def progress(self, title, unit):
        def on_progress(done, total, note=""):
            self.calls.append((done, total, note))
            self.at_each(done)
            if self.stop_at is not None and done >= self.stop_at:
                raise KeyboardInterrupt

        yield on_progress
