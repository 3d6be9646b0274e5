"""What so many questions can show: the smallest loss that can be excluded, the power of a test.

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

from drllm.bisection import bisect
from drllm.statistics.intervals import Floats
from drllm.statistics.paired import maximum_loss, paired_score

ALPHA = 0.05
FEWEST_DIFFERENT = 6
"""Questions that must differ before anything can be shown: on fewer, not even differences that all
point one way are significant (2 / 2**5 > 0.05)."""
POWER = 0.8
NEGLIGIBLE = 1e-12
"""Numbers of different answers with a smaller probability are left out; with ten thousand
questions that changes no probability by more than 1e-8."""
HALVINGS = 17  # of the range of a share, which is found to a thousandth of a point, from above


def smallest_certifiable(
    n: int, discordant: float, confidence: float = 0.95, power: float = POWER
) -> tuple[float, float]:
    """Return the smallest losses ε, shares of n, that a non-inferiority test could exclude.

    The first holds if as many are won as lost, the second for a system that in truth loses nothing,
    with the probability `power` over other questions (1 where no loss could be excluded); both with
    a one-sided bound of this confidence (see `paired.maximum_loss`). Where the share of different
    answers is an estimate, so are they. An ε above one can be certified, one equal to it can't.

    Source: the test is Tango's (1998, Statistics in Medicine 17); the search is ours.
    """
    weights, differing, won = _outcomes(n, discordant)
    # Half a question more on each side where their number is odd.
    half = min(math.ceil(discordant * n / 2), n // 2)
    if_equal = maximum_loss(half, half, n, confidence)
    lost = (differing - won).clip(0.0)
    probabilities = weights * _binomial(won, differing, 0.5)
    z = NormalDist().inv_cdf(confidence)

    def is_enough(epsilon: float) -> bool:
        distance, deviation = paired_score(won, lost, n, -epsilon)
        return float(probabilities[distance > z * deviation].sum()) >= power

    _, found = bisect(is_enough, 0.0, 1.0, HALVINGS)
    return if_equal, found if is_enough(1.0) else 1.0


def questions_to_certify(discordant: float, epsilon: float, confidence: float = 0.95) -> int:
    """Return about how many questions would probably exclude a loss of ε, for a system without one.

    Source: the normal approximation of the test of `smallest_certifiable`; without a different
        answer its closed form.

    Example:
        >>> questions_to_certify(0.2, 0.02)
        3092
    """
    z, more = NormalDist().inv_cdf(confidence), NormalDist().inv_cdf(POWER)
    return math.ceil(max(discordant * ((z + more) / epsilon) ** 2, z * z * (1 / epsilon - 1)))


def chance_to_show(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> float:
    """Return the probability that the exact McNemar test shows a true difference, with its sign.

    The difference of the accuracies, a share of the questions, is at most that of the different
    answers. The test is two-sided at the level α.

    Source: O'Brien 1998 and G*Power's exact McNemar test: the power given how many answers differ,
        averaged over that number.
    """
    weights, differing, won = _outcomes(n, discordant)
    tails = _binomial(won, differing, 0.5)[:, ::-1].cumsum(axis=1)[:, ::-1]
    shown = (2 * tails < alpha) & (won > (differing - won).clip(0.0))
    share_won = 0.5 if discordant == 0 else (1 + difference / discordant) / 2
    return float((weights * _binomial(won, differing, share_won))[shown].sum())


def questions_needed(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> int:
    """Return how many questions, more than n, would probably show a difference.

    `discordant` is taken as large as the difference, in (0, 1], where that asks for more.
    """
    discordant = max(discordant, difference)

    def is_enough(num: int) -> bool:
        return chance_to_show(num, discordant, difference, alpha) >= POWER

    low, high = n, n + 1
    while not is_enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


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
    spread = stdev(differences) if len(differences) > 1 else 0.0
    if not spread:
        return None
    quantile = NormalDist().inv_cdf
    return (quantile(1 - ALPHA / 2) + quantile(POWER)) * spread / math.sqrt(len(differences))


@functools.lru_cache(maxsize=4)
def _outcomes(n: int, discordant: float) -> tuple[Floats, Floats, Floats]:
    """Return how likely `[M, 1]` what numbers `[M, 1]` differ, and how many may be won `[1, W]`."""
    import numpy as np

    every = np.arange(n + 1, dtype=np.float64)
    weights = _binomial(every, np.float64(n), discordant)
    likely = weights > NEGLIGIBLE
    differing = every[likely][:, None]
    return weights[likely][:, None], differing, np.arange(differing.max() + 1)[None, :]


def _binomial(successes: Any, trials: Any, share: float) -> Floats:
    """Return probabilities of so many successes; 0 where they are more than the trials."""
    import numpy as np
    from scipy.special import gammaln, xlog1py, xlogy

    failures = np.maximum(0.0, trials - successes)
    logs = gammaln(trials + 1) - gammaln(successes + 1) - gammaln(failures + 1)
    logs = logs + xlogy(successes, share) + xlog1py(failures, -share)
    return np.where(successes > trials, 0.0, np.exp(logs))
