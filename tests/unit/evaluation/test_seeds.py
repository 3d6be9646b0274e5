from __future__ import annotations

import random
import statistics

import pytest

from drllm.evaluation.seeds import over_seeds, pooled_interval, spread
from drllm.evaluation.statistics import mean_interval


def test_a_spread_holds_mean_ends_and_deviation_between_seeds():
    found = spread([0.5, 0.6, 0.4])
    assert (found.mean, found.lowest, found.highest) == (pytest.approx(0.5), 0.4, 0.6)
    assert found.deviation == pytest.approx(0.1)
    assert found.num_seeds == 3


def test_one_seed_has_no_deviation_and_says_so():
    assert spread([0.5]).deviation is None
    assert str(spread([0.5])) == "0.500 (one seed)"


def test_questions_are_averaged_over_seeds():
    assert over_seeds([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]) == [0.5, 0.0, 0.75]


def test_seeds_that_agree_leave_the_interval_of_one():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert pooled_interval([values] * 3, seed=2) == mean_interval(values, seed=2)


def test_the_interval_over_questions_does_not_know_how_far_seeds_lie_apart():
    # Each seed is right everywhere or nowhere: the mean is the same on every question.
    by_seed = [[1.0] * 20, [0.0] * 20]
    assert pooled_interval(by_seed) == (0.5, 0.5)
    assert spread([statistics.fmean(values) for values in by_seed]).deviation > 0.7


def test_averaging_over_seeds_narrows_the_interval_only_as_far_as_they_disagree():
    rng = random.Random(0)
    alike = [float(rng.random() < 0.5) for _ in range(200)]
    apart = [[float(rng.random() < 0.5) for _ in range(200)] for _ in range(4)]

    def width(by_seed):
        lower, upper = pooled_interval(by_seed)
        return upper - lower

    assert width([alike] * 4) == pytest.approx(width([alike]))
    assert width(apart) == pytest.approx(width([alike]) / 2, rel=0.2)


def test_a_difference_is_taken_question_by_question():
    base = [0.0, 1.0, 0.0, 1.0]
    better = [value + 0.25 for value in base]
    assert pooled_interval([better, better], base) == (0.25, 0.25)


def test_no_seeds_and_other_questions_are_refused():
    for asked in (spread, over_seeds, pooled_interval):
        with pytest.raises(ValueError, match="at least one"):
            asked([])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        over_seeds([[1.0], [1.0, 0.0]])
