"""Paired tests: against counting, simulation, and published numbers."""

import itertools
import math
import random

import pytest

from drllm.statistics.paired import (
    count_won_lost,
    holm,
    mcnemar_exact,
    paired_interval,
)


@pytest.mark.parametrize("won", range(8))
@pytest.mark.parametrize("lost", range(8))
def test_mcnemar_equals_counting_every_outcome(won, lost):
    n = won + lost
    outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
    as_far = sum(abs(2 * wins - n) >= abs(won - lost) for wins in outcomes)
    assert as_far / len(outcomes) == pytest.approx(mcnemar_exact(won, lost), rel=1e-12)


def test_mcnemar_holds_for_thousands_of_questions():
    # Normal approximation with continuity correction, good to a few per cent here.
    z = (abs(1300 - 1200) - 1) / math.sqrt(2500)
    assert math.erfc(z / math.sqrt(2)) == pytest.approx(mcnemar_exact(1300, 1200), rel=0.02)


@pytest.mark.parametrize(
    ("won", "lost", "n", "confidence", "bounds"),
    [
        # Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33, table V
        (1, 7, 21, 0.95, (-0.517, -0.026)),
        # R packages: contingencytables 3.0.0 (data of Cavo 2012), PropCIs 0.3-0
        (6, 16, 161, 0.95, (-0.1240, -0.0054)),
        (28, 25, 618, 0.9, (-0.0148, 0.0247)),
    ],
)
def test_paired_intervals_equal_published_ones(won, lost, n, confidence, bounds):
    assert bounds == pytest.approx(
        paired_interval(won, lost, n, confidence), abs=5e-4 if n == 21 else 5e-5
    )


def score(won, lost, n, difference):
    """Return the score statistic, its free share found by trying shares instead of a formula."""
    tied = n - won - lost

    def loglikelihood(share_lost):
        shares = (share_lost + difference, share_lost, 1 - 2 * share_lost - difference)
        return sum(
            count * math.log(share) if count else 0.0
            for count, share in zip((won, lost, tied), shares, strict=True)
        )

    low, high = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    for _ in range(200):  # the log-likelihood is concave: ternary search
        third = (high - low) / 3
        if loglikelihood(low + third) < loglikelihood(high - third):
            low += third
        else:
            high -= third
    variance = n * (2 * low + difference - difference**2)
    return (won - lost - n * difference) / math.sqrt(variance)


@pytest.mark.parametrize(("won", "lost", "n"), [(3, 3, 100), (0, 0, 6), (1, 0, 44), (40, 20, 160)])
def test_paired_bounds_are_where_the_score_test_is_just_not_rejected(won, lost, n):
    lower, upper = paired_interval(won, lost, n)
    assert score(won, lost, n, lower) == pytest.approx(1.96, abs=1e-3)
    assert score(won, lost, n, upper) == pytest.approx(-1.96, abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_paired_intervals_have_width_hold_the_estimate_and_mirror(n):
    for won in range(n + 1):
        for lost in range(n - won + 1):
            lower, upper = paired_interval(won, lost, n)
            assert -1 <= lower <= (won - lost) / n <= upper <= 1
            assert upper - lower > 0.1
            assert paired_interval(lost, won, n) == pytest.approx((-upper, -lower), abs=1e-9)


@pytest.mark.parametrize(("n", "least", "mean"), [(10, 0.91, 0.95), (20, 0.92, 0.95)])
def test_paired_intervals_cover_every_true_difference_about_as_often_as_they_say(n, least, mean):
    tables = [(won, lost) for won in range(n + 1) for lost in range(n - won + 1)]
    intervals = {table: paired_interval(*table, n) for table in tables}
    covered = []
    for tenth_won, tenth_lost in itertools.product(range(11), repeat=2):
        tied = 10 - tenth_won - tenth_lost
        if tied < 0:
            continue
        difference = (tenth_won - tenth_lost) / 10
        covered.append(
            sum(
                math.comb(n, won)
                * math.comb(n - won, lost)
                * (tenth_won / 10) ** won
                * (tenth_lost / 10) ** lost
                * (tied / 10) ** (n - won - lost)
                for (won, lost), (lower, upper) in intervals.items()
                if lower - 1e-9 <= difference <= upper + 1e-9
            )
        )
    assert min(covered) > least
    assert mean < sum(covered) / len(covered) < 0.98


@pytest.mark.parametrize(("won", "lost", "n"), [(0, 0, 0), (-1, 0, 5), (0, -1, 5), (3, 3, 5)])
def test_impossible_paired_counts_are_refused(won, lost, n):
    with pytest.raises(ValueError, match="impossible"):
        paired_interval(won, lost, n)


def test_the_interval_at_90_per_cent_is_a_published_one():
    # R package PropCIs 0.3-0, as above; won and lost change places with the sign.
    assert -paired_interval(28, 25, 618, 0.9)[0] == pytest.approx(0.0148, abs=5e-5)
    assert -paired_interval(25, 28, 618, 0.9)[0] == pytest.approx(0.0247, abs=5e-5)


@pytest.mark.parametrize(("epsilon", "discordant"), [(0.05, 0.05), (0.05, 0.2), (0.1, 0.5)])
def test_a_system_that_loses_epsilon_has_that_loss_excluded_in_one_case_of_forty(
    epsilon, discordant
):
    n = 100
    share_won, share_lost = (discordant - epsilon) / 2, (discordant + epsilon) / 2
    wrong = sum(
        math.comb(n, won)
        * math.comb(n - won, lost)
        * share_won**won
        * share_lost**lost
        * (1 - discordant) ** (n - won - lost)
        for won in range(30 if share_won else 1)
        for lost in range(60)
        if won + lost <= n and -paired_interval(won, lost, n)[0] < epsilon
    )
    assert 0.001 < wrong < 0.035, wrong  # outcomes are whole questions, and the test approximates


def rejected_by_steps(pvalues, level):
    """Holm's procedure in words: smallest first, stop at the first that isn't small enough."""
    order = sorted(range(len(pvalues)), key=lambda index: pvalues[index])
    rejected: set[int] = set()
    for rank, index in enumerate(order):
        if pvalues[index] > level / (len(pvalues) - rank):
            break
        rejected.add(index)
    return rejected


@pytest.mark.parametrize(
    ("pvalues", "adjusted"),
    [
        ([0.04, 0.001, 0.5, 0.02], [0.08, 0.004, 0.5, 0.06]),
        ([0.6, 0.7, 0.9], [1.0, 1.0, 1.0]),
        ([0.03], [0.03]),
        ([], []),
    ],
    ids=["in the order given", "one at most", "a single one is left alone", "none"],
)
def test_p_values_are_adjusted_for_being_several(pvalues, adjusted):
    assert holm(pvalues) == pytest.approx(adjusted)


@pytest.mark.parametrize("seed", range(20))
def test_adjusted_p_values_reject_what_the_stepwise_procedure_rejects(seed):
    rng = random.Random(seed)
    pvalues = [rng.random() ** 4 for _ in range(rng.randint(1, 9))]
    for level in (0.01, 0.05, 0.2, 0.5):
        adjusted = holm(pvalues)
        assert rejected_by_steps(pvalues, level) == {
            index for index, value in enumerate(adjusted) if value <= level
        }


def test_only_answers_that_are_right_or_wrong_are_won_and_lost():
    assert count_won_lost([1, 1, 0, 0], [0, 1, 1, 0]) == (1, 1)
    with pytest.raises(ValueError, match="right or wrong"):
        count_won_lost([1, 0.5], [1, 0])
    with pytest.raises(ValueError, match="shorter"):
        count_won_lost([1, 0], [1])
