import itertools
import math
import random
import statistics

import pytest

from drllm.statistics.intervals import (
    accuracy_interval,
    mean_interval,
    upper_bound,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("correct", "n", "bounds"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_intervals_equal_published_ones(correct, n, bounds):
    assert bounds == tuple(round(bound, 4) for bound in wilson_interval(correct, n))


@pytest.mark.parametrize(("correct", "n"), [(3, 10), (50, 100), (1799, 2376)])
@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959963984540054), (0.9, 1.644853626951)])
def test_wilson_bounds_are_where_the_score_test_is_just_not_rejected(correct, n, confidence, z):
    for bound in wilson_interval(correct, n, confidence):
        score = abs(correct / n - bound) / math.sqrt(bound * (1 - bound) / n)
        assert score == pytest.approx(z, rel=1e-9)


def test_wilson_intervals_touch_the_ends_exactly():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5), (2.5, 5)])
def test_impossible_counts_are_refused(correct, n):
    with pytest.raises(ValueError, match="impossible"):
        wilson_interval(correct, n)


@pytest.mark.parametrize("values", [[0.0, 1.0, 5.0], [-1.0, 0.0, 0.5, 2.0], [1.0, 1.0, -1.0, 0.0]])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_bootstrap_equals_enumerating_every_resample(values, confidence):
    means = sorted(sum(s) / len(s) for s in itertools.product(values, repeat=len(values)))
    outside = (1 - confidence) / 2
    expected = tuple(means[math.ceil(share * len(means)) - 1] for share in (outside, 1 - outside))
    assert expected == pytest.approx(mean_interval(values, 0, 200_000, confidence))


def test_all_draws_are_made_when_they_do_not_fit_in_one_chunk(monkeypatch):
    values = [float(value % 7) for value in range(50)]
    whole = mean_interval(values, seed=0, draws=1000)
    monkeypatch.setattr("drllm.statistics.intervals._CHUNK", 50 * 300)
    chunked = mean_interval(values, seed=0, draws=1000)
    assert whole == pytest.approx(chunked, abs=1e-9)


def test_right_and_wrong_answers_have_a_wilson_interval_and_means_over_draws_a_bootstrap():
    assert accuracy_interval([1, 0, 1], seed=4) == wilson_interval(2, 3)
    values = [0.0, 0.3, 0.3, 1.0, 0.7, 0.2]
    assert accuracy_interval(values, seed=4) == mean_interval(values, seed=4)


def test_the_draws_are_those_of_torch_with_which_earlier_results_were_made():
    torch = pytest.importorskip("torch")
    values = torch.arange(12, dtype=torch.float64) ** 2
    generator = torch.Generator().manual_seed(7)
    drawn = values[torch.randint(12, (500, 12), generator=generator)].mean(dim=1)
    ends = drawn.quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64), interpolation="nearest"
    )
    assert mean_interval(values.tolist(), seed=7, draws=500) == pytest.approx(tuple(ends.tolist()))


def test_equal_values_have_an_interval_of_no_width_and_bound_themselves():
    assert mean_interval([0.25] * 9, 0) == (0.25, 0.25)
    assert upper_bound([0.25] * 9, seed=0) == 0.25


@pytest.mark.parametrize("asked", [mean_interval, upper_bound])
def test_what_is_drawn_follows_from_the_seed(asked):
    values = [float(value % 7) for value in range(30)]
    assert asked(values, 5, 200) == asked(values, 5, 200)
    assert asked(values, 5, 200) != asked(values, 6, 200)


@pytest.mark.parametrize("asked", [mean_interval, upper_bound])
def test_an_interval_of_nothing_is_refused(asked):
    with pytest.raises(ValueError, match="at least one question"):
        asked([], 0)


def test_the_bound_equals_enumerating_every_resample():
    values = [0.0, 0.5, 0.7, 2.0]
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    scores = []
    for sample in itertools.product(values, repeat=4):
        away, own = statistics.fmean(sample) - mean, statistics.pstdev(sample)
        scores.append(away / own if own else math.copysign(math.inf, away))
    scores.sort()
    expected = mean - scores[math.ceil(0.1 * len(scores)) - 1] * spread
    assert upper_bound(values, 0, 200_000, confidence=0.9) == pytest.approx(expected)


def test_the_bound_of_skewed_differences_covers_as_often_as_it_says_and_percentiles_do_not():
    # Most texts lose nothing and a few lose much: the mean of few texts is then mostly too low.
    rng = random.Random(5)
    trials, n = 1000, 20
    covered = {"studentised": 0, "percentile": 0}
    for trial in range(trials):
        values = [rng.expovariate(1) for _ in range(n)]
        covered["studentised"] += upper_bound(values, trial, draws=500) >= 1
        covered["percentile"] += mean_interval(values, trial, 500, confidence=0.9)[1] >= 1
    assert covered["studentised"] / trials > 0.92
    assert covered["percentile"] / trials < 0.91


def test_too_few_differences_bound_nothing():
    assert upper_bound([0.0, 1.0], seed=0) == math.inf
