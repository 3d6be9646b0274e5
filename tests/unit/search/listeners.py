"""A listener that records, for the tests of the search here and on Ray."""

import re
from contextlib import contextmanager

from drllm.work.listener import Listener


class RecordingListener(Listener):
    """Records progress and notes; interrupts the search once so many questions are done.

    Attributes:
        calls: Done, total and note of every report.
        notes: All notes.
    """

    def __init__(self, stop_at=None, on_report=lambda done: None):
        self.stop_at = stop_at
        self.on_report = on_report
        self.calls = []
        self.notes = []

    def questions_done(self):
        """Return the number of finished questions in the note of each report."""
        return [int(re.search(r"(\d+) of \d+ questions", note)[1]) for _, _, note in self.calls]

    def note(self, text):
        self.notes.append(text)

    @contextmanager
    def progress(self, title, unit):
        def on_progress(done, total, note=""):
            self.calls.append((done, total, note))
            self.on_report(done)
            if self.stop_at is not None and done >= self.stop_at:
                raise KeyboardInterrupt

        yield on_progress
