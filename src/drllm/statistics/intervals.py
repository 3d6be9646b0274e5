"""Confidence intervals of accuracies and of means, and a one-sided bound of a mean.

Functions that resample values take a seed, so that their results can be repeated.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # every command imports this module, so numpy is imported inside functions
    import numpy as np
    import numpy.typing as npt

Floats: TypeAlias = "npt.NDArray[np.float64]"

BOOTSTRAP_DRAWS = 10_000
_CHUNK = 1 << 22  # most resampled values in memory at once


def accuracy_interval(correct: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy.

    If each value is 1 (right) or 0 (wrong), this is Wilson's interval. If the values are means over
    several draws, it is a bootstrap interval.
    """
    if is_right_or_wrong(correct):
        return wilson_interval(round(sum(correct)), len(correct))
    return mean_interval(correct, seed)


def is_right_or_wrong(correct: Sequence[float]) -> bool:
    """Tell whether each value is 1 (right) or 0 (wrong), rather than a mean over several draws."""
    return all(value in (0, 1) for value in correct)


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of the share of right answers among `n` answers.

    Unlike the normal interval, it stays inside [0, 1], and it has a width even if no answer or
    every answer is right.

    Source: Wilson 1927, JASA 22 (158).
    """
    if n < 1 or not 0 <= correct <= n or correct != int(correct):
        raise ValueError(f"{correct} right answers out of {n} is impossible")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Without a rounding error: the lower bound is 0 if no answer is right, the upper bound is 1 if
    # all are.
    lower = 0.0 if correct == 0 else centre - half
    upper = 1.0 if correct == n else centre + half
    return lower, upper


def mean_interval(
    values: Sequence[float], seed: int, draws: int = BOOTSTRAP_DRAWS, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over questions.

    This interval is for values that aren't counts: accuracies averaged over several draws a
    question, log-probabilities, and paired differences of either. If all values are equal, the
    interval has no width. This doesn't make the mean certain, since resampling knows only the
    measured values.

    Source: Efron 1979, Annals of Statistics 7 (1), percentile method.
    """
    import numpy as np

    means = [resamples.mean(axis=1) for resamples in _resamples(np.asarray(values), seed, draws)]
    outside = (1 - confidence) / 2
    lower, upper = np.quantile(np.concatenate(means), [outside, 1 - outside], method="nearest")
    return float(lower), float(upper)


def sum_interval(
    weighted: Sequence[tuple[float, Sequence[float]]], seed: int
) -> tuple[float, float, float]:
    """Return a weighted sum of independent means, and the two ends of its 95 % interval.

    Args:
        weighted: For each mean, its weight and the values that are averaged.
        seed: Seed of the resampling.

    Source: Zou and Donner 2008, Statistics in Medicine 27 (10), from the interval of each mean.
    """
    total = 0.0
    below = 0.0
    above = 0.0
    for weight, values in weighted:
        mean = fmean(values)
        low, high = mean_interval(values, seed)
        total += weight * mean
        below = math.hypot(below, weight * (mean - low))
        above = math.hypot(above, weight * (high - mean))
    return total, total - below, total + above


def upper_bound(
    values: Sequence[float], seed: int, draws: int = BOOTSTRAP_DRAWS, confidence: float = 0.95
) -> float:
    """Return a one-sided upper bound of a mean; infinite if there are too few values for a bound.

    Resampled means are measured in units of their own standard error, which corrects for skewed
    values. The ends of `mean_interval` are percentiles of plain means. These exclude too much if
    some texts lose far more than the others. If one text in ten does, twenty texts are too few for
    either method. If all values are equal, the bound is this value. This doesn't make the mean
    certain.

    Args:
        values: The differences of two systems, one for each text.
        seed: Seed of the resampling.
        draws: Number of resampled means.
        confidence: Confidence of the bound, in (0.5, 1).

    Raises:
        ValueError: There are no values.

    Source: Hall 1988, Annals of Statistics 16 (3), the percentile-t method.
    """
    import numpy as np

    sample = np.asarray(values, dtype=np.float64)
    if sample.size and (sample == sample[0]).all():
        return float(sample[0])
    studentised = []
    for resamples in _resamples(sample, seed, draws):
        distance = resamples.mean(axis=1) - sample.mean()
        with np.errstate(divide="ignore"):  # infinite if one value was drawn n times
            studentised.append(np.where(distance == 0, 0.0, distance / resamples.std(axis=1)))
    lowest = np.quantile(np.concatenate(studentised), 1 - confidence, method="lower")
    return float(sample.mean() - lowest * sample.std())


def _resamples(values: Floats, seed: int, draws: int) -> Iterator[Floats]:
    """Yield resampled values, a part of the draws at a time, `[draws, n]`."""
    import numpy as np

    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one question")
    # The Mersenne Twister's stream modulo n gives the same draws as torch.randint with this seed.
    # Earlier results were computed with torch's draws.
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    while draws > 0:
        size = min(draws, max(1, _CHUNK // n))
        yield values[generator.randint(0, 1 << 32, (size, n), dtype=np.uint32) % n]
        draws -= size
