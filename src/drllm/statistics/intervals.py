"""Confidence intervals of accuracies and of means, and a one-sided bound of a mean.

Functions that resample values take a seed, so that their results can be repeated.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # every command imports this module, so numpy is imported inside functions
    import numpy as np
    import numpy.typing as npt

Floats: TypeAlias = "npt.NDArray[np.float64]"

BOOTSTRAP_DRAWS = 10_000
"""Default number of resampled means of an interval."""
_CHUNK = 1 << 22  # maximum number of resampled values in memory at once


def accuracy_interval(correct: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy.

    If each value is 1 (right) or 0 (wrong), this is Wilson's interval. If some values lie between 0
    and 1, it is a bootstrap interval.

    Args:
        correct: For each question 1 or 0, or the share of right answers over several draws.
        seed: Seed of the resampling; Wilson's interval needs none.
    """
    if is_right_or_wrong(correct):
        return wilson_interval(round(sum(correct)), len(correct))
    return mean_interval(correct, seed)


def is_right_or_wrong(correct: Sequence[float]) -> bool:
    """Tell whether each value is 1 (right) or 0 (wrong); means over draws may lie in between."""
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
    lower = centre - half
    upper = centre + half
    # At the ends the bounds are exactly 0 and 1, but the formula has a rounding error there.
    if correct == 0:
        lower = 0.0
    if correct == n:
        upper = 1.0
    return lower, upper


def mean_interval(
    values: Sequence[float], seed: int, draws: int = BOOTSTRAP_DRAWS, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over questions or texts.

    This interval is for values that aren't just right or wrong: mean accuracies over several draws,
    log-probabilities, and paired differences of both. If all values are equal, the interval has no
    width. That doesn't make the mean certain, since resampling knows only the measured values.

    Args:
        values: One value for each question or text.
        seed: Seed of the resampling.
        draws: Number of resampled means.
        confidence: Confidence of the interval, in (0, 1).

    Raises:
        ValueError: There are no values.

    Source: Efron 1979, Annals of Statistics 7 (1), percentile method.
    """
    import numpy as np

    means = [resamples.mean(axis=1) for resamples in _resamples(np.asarray(values), seed, draws)]
    outside = (1 - confidence) / 2  # the share of resampled means below the interval, and above it
    lower, upper = np.quantile(np.concatenate(means), [outside, 1 - outside], method="nearest")
    return float(lower), float(upper)


def upper_bound(
    values: Sequence[float], seed: int, draws: int = BOOTSTRAP_DRAWS, confidence: float = 0.95
) -> float:
    """Return a one-sided upper bound of a mean; infinite if there are too few values for a bound.

    Unlike the ends of `mean_interval`, the bound is corrected for skewed values: the distance of
    each resampled mean is divided by the mean's own standard error ("studentised"). Without the
    correction, the true mean lies above the bound too often if some texts lose far more than the
    others. If one text in ten does, twenty texts are too few even with the correction.

    If all values are equal, the bound is their value. That doesn't make the mean certain.

    Args:
        values: One value for each text, such as the difference between two systems.
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
    # Few resampled means lie as far below the sample's mean as `lowest` (which is negative). So the
    # sample's mean hardly lies farther than that below the true mean.
    lowest = np.quantile(np.concatenate(studentised), 1 - confidence, method="lower")
    return float(sample.mean() - lowest * sample.std())


def _resamples(values: Floats, seed: int, draws: int) -> Iterator[Floats]:
    """Yield resampled values `[D, n]`, D draws at a time, until there are as many as `draws`."""
    import numpy as np

    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one question")
    # Earlier results were computed with the draws of torch.randint. The Mersenne Twister's stream
    # modulo n gives the same draws for the same seed.
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    while draws > 0:
        size = min(draws, max(1, _CHUNK // n))
        yield values[generator.randint(0, 1 << 32, (size, n), dtype=np.uint32) % n]
        draws -= size
