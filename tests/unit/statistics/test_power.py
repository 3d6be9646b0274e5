"""What n questions can show: against simulation, counting, and published numbers."""

import functools
import math

import numpy as np
import pytest

from drllm.statistics.paired import maximum_loss, mcnemar_exact
from drllm.statistics.power import (
    chance_to_show,
    detectable_mean,
    questions_needed,
    questions_to_certify,
    smallest_certifiable,
)

DRAWS = 4000
NOISE = 4 * 0.5 / math.sqrt(DRAWS)
"""Four standard deviations of a share of the draws, at most."""


def drawn(n, share_won, share_lost, seed):
    """Return (won, lost) of many evaluations of n questions."""
    rng = np.random.default_rng(seed)
    tied = 1 - share_won - share_lost
    return [tuple(row[:2]) for row in rng.multinomial(n, (share_won, share_lost, tied), DRAWS)]


def share_certified(n, discordant, epsilon, seed=0):
    certified = functools.cache(lambda won, lost: maximum_loss(won, lost, n) < epsilon)
    outcomes = drawn(n, discordant / 2, discordant / 2, seed)
    return sum(certified(int(won), int(lost)) for won, lost in outcomes) / DRAWS


@pytest.mark.parametrize(("n", "discordant"), [(60, 0.1), (200, 0.05), (200, 0.3)])
def test_the_smallest_loss_is_certified_as_often_as_it_says(n, discordant):
    _, with_power = smallest_certifiable(n, discordant)
    assert share_certified(n, discordant, with_power) > 0.8 - NOISE
    # Outcomes are whole questions, so half a question less must cost power.
    assert share_certified(n, discordant, with_power - 0.5 / n) < 0.8 + NOISE


@pytest.mark.parametrize(
    ("n", "different", "half"),
    [(150, 0, 0), (150, 30, 15), (101, 3, 2), (7, 7, 3)],  # rounded up, to no more than there are
)
def test_a_loss_seen_as_nothing_is_not_certified_at_the_smallest(n, different, half):
    assert smallest_certifiable(n, different / n)[0] == maximum_loss(half, half, n)


def test_without_a_different_answer_the_smallest_is_known_in_closed_form():
    z = 1.6448536269514722
    if_equal, with_power = smallest_certifiable(500, 0.0)
    assert if_equal == pytest.approx(z * z / (500 + z * z))
    assert with_power == pytest.approx(if_equal, abs=1e-5)


@pytest.mark.parametrize("discordant", [0.0, 0.05, 0.2, 0.4])
@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_as_many_questions_as_a_loss_needs_could_certify_about_that_loss(discordant, epsilon):
    num = questions_to_certify(discordant, epsilon)
    assert smallest_certifiable(num, discordant)[1] == pytest.approx(epsilon, rel=0.15)
    assert smallest_certifiable(num // 2, discordant)[1] > 1.2 * epsilon


def test_more_questions_and_fewer_different_answers_certify_less_loss():
    settings = ((100, 0.2), (1000, 0.2), (1000, 0.02))
    if_equal, with_power = zip(*(smallest_certifiable(*each) for each in settings), strict=True)
    assert if_equal[0] > if_equal[1] > if_equal[2]
    assert with_power[0] > with_power[1] > with_power[2]
    assert smallest_certifiable(1, 1.0)[1] == 1.0  # nothing can be excluded
    assert smallest_certifiable(1000, 0.2, confidence=0.99)[0] > if_equal[1]
    assert smallest_certifiable(1000, 0.2, power=0.95)[1] > with_power[1]


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
