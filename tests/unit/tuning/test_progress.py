"""How far a tuning is said to be, and how much of its minutes is said to be left."""

import pytest
import torch

from drllm.tuning.progress import TuningProgress
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener


class Reports:
    """Keeps what a tuning reports."""

    def __init__(self) -> None:
        self.done = 0.0
        self.total = 0.0

    def __call__(self, done: float, total: float, note: str = "") -> None:
        self.done = done
        self.total = total


def make_progress(max_seconds: float | None) -> tuple[TuningProgress, Reports]:
    """Return the progress of ten levels of 100 pairs, and what it reports."""
    reports = Reports()
    first_block = FirstBlock(Listener(), torch.device("meta"), max_seconds)
    progress = TuningProgress(reports, first_block, max_seconds)
    progress.expect([100.0] * 10)
    return progress, reports


def estimate_seconds_left(reports: Reports, seconds: float) -> float:
    """Return the time left at the rate so far, as a terminal shows it."""
    return (reports.total - reports.done) * seconds / reports.done


@pytest.mark.parametrize("seconds", [1.0, 70.0, 100.0, 170.0, 599.0])
@pytest.mark.parametrize("num_pairs", [50, 150])
def test_the_time_left_is_at_most_what_is_left_of_the_minutes(seconds, num_pairs):
    progress, reports = make_progress(max_seconds=600.0)
    progress.add(num_pairs, seconds, "scoring")
    assert estimate_seconds_left(reports, seconds) <= (600.0 - seconds) * (1 + 1e-9)


def test_levels_that_the_minutes_cut_are_not_counted():
    progress, reports = make_progress(max_seconds=600.0)
    progress.add(50, 90.0, "scoring")  # three levels of 180 s fit, and half of a fourth
    assert reports.total == 300


def test_a_level_that_is_as_long_as_all_minutes_counts_as_far_as_they_go():
    progress, reports = make_progress(max_seconds=600.0)
    progress.add(10, 100.0, "scoring")
    assert reports.total == 60


def test_a_level_that_outlives_the_minutes_counts_to_its_end():
    progress, reports = make_progress(max_seconds=600.0)
    progress.add(80, 700.0, "scoring")
    assert (reports.done, reports.total) == (80, 100)


def test_without_minutes_all_levels_are_counted():
    progress, reports = make_progress(max_seconds=None)
    progress.add(100, 500.0, "scoring")
    assert reports.total == 1000
    progress.expect([], "layers saved: 10")  # the last level is done
    assert reports.total == reports.done == 100
