"""Power and sample-size calculations: what a number of questions can show or exclude.

A question is won if the first system answers it right and the second wrong, and lost the other way
round. The questions won and lost together are the differing questions, and `discordant` is their
share of all questions. Differences and losses are shares of the questions too, not points.

The power of the exact test is computed without sampling, as a sum over all possible numbers of
differing questions and of questions won.

Axes: M possible numbers of differing questions, W possible numbers of questions won.
"""

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist, stdev
from typing import Any

from drllm.statistics.intervals import Floats

ALPHA = 0.05
"""The level of all two-sided tests: the largest probability of showing a difference by chance."""
FEWEST_DIFFERENT = 6
"""The fewest differing questions that can show a difference. With fewer, differences aren't
significant even if all have the same sign (2 / 2**5 > 0.05)."""
POWER = 0.8
"""A test would probably show a difference if its probability to do so is at least this large."""
NEGLIGIBLE = 1e-12
"""Sums leave out numbers of differing questions that are less probable than this. With ten thousand
questions this changes no result by more than 1e-8."""


def chance_to_show(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> float:
    """Return the probability that the exact McNemar test shows a true difference, with its sign.

    Args:
        n: The number of questions.
        discordant: Share of differing questions.
        difference: The true difference of the accuracies, at most `discordant`.
        alpha: The level of the test, which is two-sided.

    Source: O'Brien 1998 and G*Power's exact McNemar test: the power for each number of differing
        answers, averaged over these numbers.
    """
    weights, differing, won = _possible_counts(n, discordant)
    # The probability of winning at least this many questions if both systems are equally good: the
    # sum from the last number of questions won back to this one.
    tails = _binomial(won, differing, 0.5)[:, ::-1].cumsum(axis=1)[:, ::-1]  # [M, W]
    lost = (differing - won).clip(0.0)
    is_shown = (2 * tails < alpha) & (won > lost)
    share_won = 0.5
    if discordant != 0:
        share_won = (1 + difference / discordant) / 2
    probabilities = weights * _binomial(won, differing, share_won)
    return float(probabilities[is_shown].sum())


def questions_needed(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> int:
    """Return a number of questions that would probably show a difference; one fewer wouldn't.

    Args:
        n: A number of questions that isn't enough. The search begins with the next number.
        discordant: Share of differing questions. If it is smaller than the difference, the
            difference is used in its place.
        difference: The true difference of the accuracies, in (0, 1].
        alpha: The level of the test, which is two-sided.
    """
    discordant = max(discordant, difference)

    def is_enough(number: int) -> bool:
        return chance_to_show(number, discordant, difference, alpha) >= POWER

    low = n
    high = n + 1
    while not is_enough(high):
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


def questions_to_exclude(n: int, mean: float, end: float, limit: float) -> int | None:
    """Estimate how many questions or texts would probably exclude a loss of `limit`.

    The estimate assumes that the true loss is the measured loss, or 0 if a gain was measured, and
    that the interval's width falls with the square root of n.

    Args:
        n: The number of questions or texts that were measured.
        mean: Their mean loss; a gain is below 0.
        end: The end of the 95 % interval of the loss, on the side of larger losses.
        limit: The loss to exclude, above 0.

    Returns:
        The number that excludes the limit with a probability of 80 %. None if the measured loss is
        as large as the limit or larger, since then no number would be enough.

    Example:
        >>> questions_to_exclude(400, 0.0, 0.04, 0.02)
        3270
    """
    room = limit - max(mean, 0.0)
    if room <= 0:
        return None
    quantile = NormalDist().inv_cdf
    z = quantile(1 - ALPHA / 2)
    width = (end - mean) * (z + quantile(POWER)) / z
    return math.ceil(n * (width / room) ** 2)


def round_up(number: int) -> int:
    """Round an estimated number of questions up to two digits.

    Example:
        >>> round_up(3036), round_up(7)
        (3100, 7)
    """
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def detectable_mean(differences: Sequence[float]) -> float | None:
    """Return the smallest true mean difference that a two-sided test would probably show.

    The observed spread of the differences is taken as the true spread. The result is None if the
    spread is 0, or if there are fewer than two differences.

    Args:
        differences: For each question or text, our system's value minus theirs.

    Source: the normal approximation of a paired test's power.
    """
    if len(differences) < 2:
        return None
    spread = stdev(differences)
    if spread == 0:
        return None
    quantile = NormalDist().inv_cdf
    return (quantile(1 - ALPHA / 2) + quantile(POWER)) * spread / math.sqrt(len(differences))


@functools.lru_cache(maxsize=4)
def _possible_counts(n: int, discordant: float) -> tuple[Floats, Floats, Floats]:
    """List how many of n questions may differ, and how many may be won.

    Returns:
        The probability of each number of differing questions, `[M, 1]`; the numbers of differing
        questions, `[M, 1]`; and the numbers of questions won, `[1, W]`.
    """
    import numpy as np

    numbers = np.arange(n + 1, dtype=np.float64)
    weights = _binomial(numbers, np.float64(n), discordant)
    is_likely = weights > NEGLIGIBLE
    differing = numbers[is_likely][:, None]  # [M, 1]
    won = np.arange(differing.max() + 1)[None, :]  # [1, W]
    return weights[is_likely][:, None], differing, won


def _binomial(successes: Any, trials: Any, share: float) -> Floats:
    """Return the binomial probabilities of successes; 0 where they exceed the trials."""
    import numpy as np
    from scipy.special import gammaln, xlog1py, xlogy

    failures = np.maximum(0.0, trials - successes)
    logs = gammaln(trials + 1) - gammaln(successes + 1) - gammaln(failures + 1)
    logs = logs + xlogy(successes, share) + xlog1py(failures, -share)
    return np.where(successes > trials, 0.0, np.exp(logs))
