import math

import pytest

from drllm.config import TrainConfig
from drllm.training.schedule import Schedule


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    schedule = Schedule(peak=8.0, warmup=3, steps=7)
    expected = [2.0, 4.0, 6.0, 8.0, 4 + 4 * math.cos(math.pi / 4), 4.0, 4 - 4 * math.sqrt(0.5)]
    assert expected == pytest.approx([schedule.rate(step) for step in range(7)])


def test_a_run_of_one_step_learns_at_the_peak():
    assert Schedule.of(TrainConfig(warmup_steps=0, learning_rate=0.3), 1).rate(0) == 0.3


@pytest.mark.parametrize("steps", [1, 2, 250, 500])
def test_a_warm_up_as_long_as_the_run_is_shortened_to_a_tenth(steps):
    schedule = Schedule.of(TrainConfig(warmup_steps=500), steps)
    assert (schedule.warmup, schedule.steps) == (steps // 10, steps)
    assert max(schedule.rate(step) for step in range(steps)) == schedule.peak


def test_a_warm_up_that_fits_is_kept():
    assert Schedule.of(TrainConfig(warmup_steps=249), 250).warmup == 249
