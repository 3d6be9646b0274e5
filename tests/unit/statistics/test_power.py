"""What n questions can show: against simulation, counting, and published numbers."""

import math

import numpy as np
import pytest

from drllm.statistics.paired import mcnemar_exact, paired_interval
from drllm.statistics.power import (
    chance_to_show,
    detectable_mean,
    questions_needed,
    questions_to_exclude,
)

DRAWS = 4000
NOISE = 4 * 0.5 / math.sqrt(DRAWS)
"""Four standard deviations of a share of the draws, at most."""


@pytest.mark.parametrize(
    ("share_won", "power", "digits"),
    [
        # O'Brien's example of the exact McNemar test: 50 pairs, 0.4 of them discordant, odds ratio
        # 0.25, one-sided 5 %, which is the two-sided 10 % with the sign right. R package pwrss;
        # G*Power's manual (chapter 5) has 0.839343.
        (0.32, 0.839356985, 9),
        # The manual's "actual α": the same with nothing to be found; cut off, not rounded.
        (0.20, 0.032578, 6),
    ],
)
def test_the_chance_to_show_a_difference_equals_a_published_one(share_won, power, digits):
    difference = share_won - (0.4 - share_won)
    found = chance_to_show(50, 0.4, difference, alpha=0.1)
    assert power == pytest.approx(found, abs=10**-digits)


@pytest.mark.parametrize(
    ("n", "discordant", "difference"),
    [(40, 0.3, 0.2), (7, 1.0, 0.9), (12, 0.5, 0.5), (9, 0.0, 0.0)],
)
def test_the_chance_to_show_a_difference_equals_summing_over_every_outcome(
    n, discordant, difference
):
    won_share, lost_share = (discordant + difference) / 2, (discordant - difference) / 2
    total = 0.0
    for won in range(n + 1):
        for lost in range(n - won + 1):
            if won > lost and mcnemar_exact(won, lost) < 0.05:
                ways = math.comb(n, won) * math.comb(n - won, lost)
                shares = won_share**won * lost_share**lost
                total += ways * shares * (1 - discordant) ** (n - won - lost)
    assert total == pytest.approx(chance_to_show(n, discordant, difference), abs=1e-9)


@pytest.mark.parametrize(("n", "discordant", "difference"), [(8, 0.5, 0.5), (120, 0.1, 0.05)])
def test_the_questions_needed_show_the_difference_and_one_fewer_may_not(n, discordant, difference):
    found = questions_needed(n, discordant, difference)
    assert found > n
    assert chance_to_show(found, discordant, difference) >= 0.8
    assert chance_to_show(found - 1, discordant, difference) < 0.8


def test_five_questions_show_nothing_and_six_a_sweep():
    assert chance_to_show(5, 1.0, 1.0) == 0.0
    assert chance_to_show(6, 1.0, 1.0) == pytest.approx(1.0)
    assert questions_needed(1, 1.0, 1.0) == 6


def test_a_stricter_level_needs_more_questions_and_thousands_are_no_burden():
    # Normal approximation of the same power (Connor 1987): good to a few per cent here.
    z = 1.959963984540054 + 0.8416212335729143
    found = questions_needed(100, 0.2, 0.025)
    assert found == pytest.approx(0.2 * (z / 0.025) ** 2, rel=0.03)
    assert questions_needed(100, 0.2, 0.05, alpha=0.01) > questions_needed(100, 0.2, 0.05)


def test_the_detectable_mean_is_shown_as_often_as_it_says():
    rng = np.random.default_rng(2)
    n = 200
    values = rng.exponential(size=n)
    difference = detectable_mean(list(values))
    spread = values.std(ddof=1)
    samples = rng.normal(difference, spread, (DRAWS, n))
    z = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / math.sqrt(n))
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=NOISE)


@pytest.mark.parametrize("differences", [[], [0.3], [0.5, 0.5, 0.5]])
def test_without_a_spread_no_detectable_mean_is_given(differences):
    assert detectable_mean(differences) is None


@pytest.mark.parametrize(("won", "lost"), [(20, 20), (30, 32), (45, 40)])
def test_about_as_many_questions_as_it_says_exclude_a_loss_four_times_in_five(won, lost):
    n, limit = 400, 0.03
    low, _ = paired_interval(won, lost, n)
    num = questions_to_exclude(n, (lost - won) / n, -low, limit)
    true_won, true_lost = (won / n, lost / n) if lost > won else ((won + lost) / 2 / n,) * 2
    rng = np.random.default_rng(0)
    shares = (true_won, true_lost, 1 - true_won - true_lost)
    outcomes = rng.multinomial(num, shares, 300)
    excluded = [paired_interval(int(w), int(k), num)[0] > -limit for w, k, _ in outcomes]
    assert np.mean(excluded) == pytest.approx(0.8, abs=0.1)


def test_no_number_of_questions_excludes_a_loss_as_large_as_the_measured_one():
    assert questions_to_exclude(400, 0.02, 0.05, 0.02) is None
    assert questions_to_exclude(400, 0.019, 0.05, 0.02) > 400
    assert questions_to_exclude(400, -0.1, -0.09, 0.02) < 400
