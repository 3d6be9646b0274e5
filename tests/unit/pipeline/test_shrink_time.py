"""How long a step of a shrink takes is said once, after its first block of work."""

import pytest

from drllm.pipeline import shrink_time
from drllm.pipeline.shrink_time import TimedListener
from notes import Notes

WHAT = "measuring 90 questions with 3 models"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets `now`."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(shrink_time, "time", clock)
    return clock


def report(clock, steps):
    """Return the notes on work whose steps are pairs of the elapsed seconds and what is done."""
    listener = Notes()
    with TimedListener(listener, WHAT).progress("evaluating", "") as on_progress:
        for seconds, done in steps:
            clock.now = 100.0 + seconds
            on_progress(done, 100)
    return listener.texts


def test_the_time_of_the_whole_is_said_after_the_first_block(clock):
    assert report(clock, [(84, 10), (99, 20)]) == [f"{WHAT}: about 14 min"]


def test_work_that_an_earlier_run_did_takes_no_time(clock):
    assert report(clock, [(0.5, 40), (60.5, 50)]) == [f"{WHAT}: about 6 min"]


def test_work_of_one_block_needs_no_estimate(clock):
    assert report(clock, [(60, 100)]) == []
