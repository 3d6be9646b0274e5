"""Power and sample-size calculations: what a number of questions can show or exclude.

Nothing is sampled: probabilities are exact sums over the possible numbers of questions that two
systems answer differently, and of questions that are won. Differences and losses are shares of the
questions, not points. `discordant` is the share of questions that one system answers right and the
other wrong.

Axes: M possible numbers of questions answered differently, W possible numbers of questions won.
"""

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist, stdev
from typing import Any

from drllm.statistics.intervals import Floats

ALPHA = 0.05
FEWEST_DIFFERENT = 6
"""The fewest differing questions that can show a difference. With fewer, differences aren't
significant even if all have the same sign (2 / 2**5 > 0.05)."""
POWER = 0.8
NEGLIGIBLE = 1e-12
"""Sums leave out counts with a smaller probability. With ten thousand questions this changes no
result by more than 1e-8."""


def chance_to_show(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> float:
    """Return the probability that the exact McNemar test shows a true difference, with its sign.

    Args:
        n: How many questions are asked.
        discordant: Share of questions that are answered differently.
        difference: The true difference of the accuracies, at most `discordant`.
        alpha: The level of the test, which is two-sided.

    Source: O'Brien 1998 and G*Power's exact McNemar test: the power for each number of differing
        answers, averaged over these numbers.
    """
    weights, differing, won = _possible_counts(n, discordant)
    # The probability of winning at least this many questions if both systems are equally good.
    tails = _binomial(won, differing, 0.5)[:, ::-1].cumsum(axis=1)[:, ::-1]
    lost = (differing - won).clip(0.0)
    is_shown = (2 * tails < alpha) & (won > lost)
    share_won = 0.5
    if discordant != 0:
        share_won = (1 + difference / discordant) / 2
    probabilities = weights * _binomial(won, differing, share_won)
    return float(probabilities[is_shown].sum())


def questions_needed(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> int:
    """Return the number of questions, above n, that would probably show a difference.

    The difference is in (0, 1]. If `discordant` is smaller than the difference, the difference is
    used in its place.
    """
    discordant = max(discordant, difference)

    def is_enough(num: int) -> bool:
        return chance_to_show(num, discordant, difference, alpha) >= POWER

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
    """Return about how many questions or texts would probably exclude a loss of `limit`.

    Args:
        n: The number of questions or texts that were measured.
        mean: Their mean loss; a gain is below 0.
        end: The end of the 95 % interval of the loss, on the side of larger losses.
        limit: The loss to exclude, above 0.

    Returns:
        The number that excludes the limit with a probability of 80 % if the true loss is the
        measured loss (0 for a gain). The interval's width falls with the square root of n. None if
        the measured loss is as large as the limit, since then no number would be enough.

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

    There is one difference for each question, and the differences aren't counts. Their observed
    spread is taken as the true spread. None if the spread is 0, or for fewer than two differences.

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
    """Return how many of n questions may be answered differently, and how many may be won.

    Returns:
        The probabilities `[M, 1]` of the numbers of differing questions, these numbers `[M, 1]`,
        and the possible numbers of questions won `[1, W]`.
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
