"""What so many questions can show: the power of a test, and the questions that a claim needs.

Probabilities are exact sums over how many questions may be answered differently and how many of
these are won; nothing is drawn. Differences and losses are shares of the questions, not points.
`discordant` is the share of questions that one system has right and the other wrong.

Axes: M numbers of questions answered differently, W numbers of those that are won.
"""

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist, stdev
from typing import Any

from drllm.statistics.intervals import Floats

ALPHA = 0.05
FEWEST_DIFFERENT = 6
"""Questions that must differ before anything can be shown: on fewer, not even differences that all
point one way are significant (2 / 2**5 > 0.05)."""
POWER = 0.8
NEGLIGIBLE = 1e-12
"""Numbers of different answers with a smaller probability are left out; with ten thousand
questions that changes no probability by more than 1e-8."""


def chance_to_show(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> float:
    """Return the probability that the exact McNemar test shows a true difference, with its sign.

    The difference of the accuracies, a share of the questions, is at most that of the different
    answers. The test is two-sided at the level α.

    Source: O'Brien 1998 and G*Power's exact McNemar test: the power given how many answers differ,
        averaged over that number.
    """
    weights, differing, won = _possible_counts(n, discordant)
    # The chance of so many questions won or more, were both systems equally good.
    tails = _binomial(won, differing, 0.5)[:, ::-1].cumsum(axis=1)[:, ::-1]
    lost = (differing - won).clip(0.0)
    is_shown = (2 * tails < alpha) & (won > lost)
    share_won = 0.5
    if discordant != 0:
        share_won = (1 + difference / discordant) / 2
    probabilities = weights * _binomial(won, differing, share_won)
    return float(probabilities[is_shown].sum())


def questions_needed(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> int:
    """Return how many questions, more than n, would probably show a difference.

    `discordant` is taken as large as the difference, in (0, 1], where that asks for more.
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
        n: How many there are.
        mean: The loss that was measured on them; a gain is below 0.
        end: The end of its 95 % interval, on the side of larger losses.
        limit: The loss that is to be excluded, above 0.

    Returns:
        The number that excludes it with a probability of 80 %, were the true loss the measured one
        (0 for a gain), since the interval's width falls with the root of n; None where the measured
        loss is the limit or more, so that no number would do.

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


def rounded_up(number: int) -> int:
    """Round a number of questions up to two digits, which is all that an estimate is good for.

    Example:
        >>> rounded_up(3036), rounded_up(7)
        (3100, 7)
    """
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def detectable_mean(differences: Sequence[float]) -> float | None:
    """Return the smallest true mean difference that a two-sided test would probably show.

    For scores that are no counts, one per question, whose spread is taken as it is; None where they
    have none.

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
    """Return how many of n questions may be answered differently, and how many of them won.

    Returns:
        The probabilities `[M, 1]` of the numbers `[M, 1]` that differ, and the numbers `[1, W]`
        that may be won.
    """
    import numpy as np

    numbers = np.arange(n + 1, dtype=np.float64)
    weights = _binomial(numbers, np.float64(n), discordant)
    is_likely = weights > NEGLIGIBLE
    differing = numbers[is_likely][:, None]  # [M, 1]
    won = np.arange(differing.max() + 1)[None, :]  # [1, W]
    return weights[is_likely][:, None], differing, won


def _binomial(successes: Any, trials: Any, share: float) -> Floats:
    """Return probabilities of so many successes; 0 where they are more than the trials."""
    import numpy as np
    from scipy.special import gammaln, xlog1py, xlogy

    failures = np.maximum(0.0, trials - successes)
    logs = gammaln(trials + 1) - gammaln(successes + 1) - gammaln(failures + 1)
    logs = logs + xlogy(successes, share) + xlog1py(failures, -share)
    return np.where(successes > trials, 0.0, np.exp(logs))
