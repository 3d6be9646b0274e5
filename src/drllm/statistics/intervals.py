"""How sure a comparison can be: intervals, paired tests, and correction for many tasks.

Owns the formulas; knows nothing of models, tasks or files. Everything that draws takes a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats: TypeAlias = "npt.NDArray[np.float64]"

BOOTSTRAP_DRAWS = 10_000
TOO_FEW = "an interval needs at least one question"
_CHUNK = 1 << 22  # resampled values held at once


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of an accuracy.

    Unlike the normal interval it stays inside [0, 1] and doesn't vanish at 0 or n right answers.

    Args:
        correct: Right answers.
        n: Answers in all, at least 1.
        confidence: In (0, 1).

    Returns:
        Lower and upper bound of the share of right answers.

    Raises:
        ValueError: Counts that no evaluation can give. For means of several draws a question,
            whose counts aren't whole, see `mean_interval`.

    Source: Wilson 1927, JASA 22 (158).

    Example:
        >>> [round(bound, 4) for bound in wilson_interval(81, 263)]
        [0.2553, 0.3662]
    """
    if n < 1 or not 0 <= correct <= n or correct != int(correct):
        raise ValueError(f"{correct} right answers out of {n} is impossible")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is the end itself; say so without a rounding error.
    lower = 0.0 if correct == 0 else centre - half
    upper = 1.0 if correct == n else centre + half
    return lower, upper


def mcnemar_exact(won: int, lost: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    Only questions on which two systems disagree count; if neither is better, each of those is
    won with probability one half.

    Args:
        won: Questions that the first system has right and the second wrong.
        lost: The other way round.

    Returns:
        Twice the smaller binomial tail, at most 1; 1 without any disagreement.

    Source: McNemar 1947, Psychometrika 12 (2), in its exact form.

    Example:
        >>> mcnemar_exact(won=1, lost=5)
        0.21875
    """
    n = won + lost
    tail = sum(math.comb(n, wins) for wins in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / (1 << n))


def paired_interval(won: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of the difference between two accuracies on the same questions.

    All differences that a score test on the questions won and lost doesn't reject. Unlike a
    bootstrap or the normal interval it doesn't vanish where few questions or none are won or
    lost, and it stays inside [-1, 1].

    Args:
        won: Questions that the first system has right and the second wrong.
        lost: The other way round.
        n: Questions in all, at least 1.
        confidence: In (0, 1).

    Returns:
        Lower and upper bound of the first system's accuracy minus the second's.

    Raises:
        ValueError: Counts that no evaluation can give.

    Source: Tango 1998, Statistics in Medicine 17 (8).

    Example:
        >>> [round(bound, 3) for bound in paired_interval(won=1, lost=7, n=21)]
        [-0.517, -0.026]
    """
    if n < 1 or min(won, lost) < 0 or won + lost > n:
        raise ValueError(f"{won} questions won and {lost} lost out of {n} is impossible")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    def rejected(difference: float) -> bool:
        distance, deviation = paired_score(won, lost, n, difference)
        return bool(abs(distance) > z * deviation)

    estimate = (won - lost) / n
    return _last(rejected, estimate, -1.0), _last(rejected, estimate, 1.0)


@overload
def paired_score(won: float, lost: float, n: int, difference: float) -> tuple[float, float]: ...


@overload
def paired_score(won: Floats, lost: Floats, n: int, difference: float) -> tuple[Floats, Floats]: ...


def paired_score(won: Any, lost: Any, n: int, difference: float) -> tuple[Any, Any]:
    """Return what the paired score test weighs against each other.

    Args:
        won: Questions that the first system has right and the second wrong: a number, or an
            array of them.
        lost: The other way round.
        n: Questions in all.
        difference: Of the first system's accuracy minus the second's, supposed to be true; in
            [-1, 1].

    Returns:
        How many questions the counts lie above what is supposed, and the standard deviation of
        that if it were true. The test rejects where the one is more than z times the other.

    Source: Tango 1998, Statistics in Medicine 17 (8).
    """
    # The share lost that is likeliest under this difference solves a quadratic equation.
    half = (won + lost - (2 * n - won + lost) * difference) / 2
    root = np.sqrt(np.maximum(0.0, half**2 + 2 * n * lost * difference * (1 - difference)))
    share_lost = (half + root) / (2 * n)
    # An exact 0 may come out as less than that.
    variance = np.maximum(0.0, n * (2 * share_lost + difference * (1 - difference)))
    return won - lost - n * difference, np.sqrt(variance)


def greatest_loss(won: int, lost: int, n: int, confidence: float = 0.95) -> float:
    """Return the loss of accuracy above which every loss is excluded.

    A one-sided bound. Whoever claims that a system loses less than so much can be wrong in one
    direction only, so the whole risk of 5 % lies there; that a gain is underrated harms no one. It
    is the end of the two-sided interval at 90 %, so a loss inside the 95 % interval that stands
    beside it may be excluded. Trials of drugs often halve the risk; here it stays at 5 %.

    Args:
        won: Questions that the first system has right and the second wrong.
        lost: The other way round.
        n: Questions in all, at least 1.
        confidence: In (0.5, 1).

    Returns:
        A share of the questions; negative where even a gain is shown.

    Raises:
        ValueError: Counts that no evaluation can give.

    Source: Tango 1998, Statistics in Medicine 17 (8).

    Example:
        >>> round(greatest_loss(won=3, lost=4, n=200), 4)
        0.0308
    """
    return -paired_interval(won, lost, n, 2 * confidence - 1)[0]


def non_inferior(won: int, lost: int, n: int, epsilon: float, confidence: float = 0.95) -> bool:
    """Tell whether it is shown that the first system loses less than ε against the second.

    Args:
        won: Questions that the first system has right and the second wrong.
        lost: The other way round.
        n: Questions in all, at least 1.
        epsilon: Loss that isn't accepted any more, as a share of the questions (2 points: 0.02).
        confidence: See `greatest_loss`.

    Raises:
        ValueError: Counts that no evaluation can give.

    Source: Tango 1998, Statistics in Medicine 17 (8).

    Example:
        >>> non_inferior(won=1, lost=0, n=44, epsilon=0.1)
        True
    """
    return greatest_loss(won, lost, n, confidence) < epsilon


def _last(rejected: Callable[[float], bool], inside: float, end: float) -> float:
    """Return the last value on the way from one that isn't rejected to the end, by bisection."""
    if not rejected(end):
        return end
    for _ in range(60):
        middle = (inside + end) / 2
        if rejected(middle):
            end = middle
        else:
            inside = middle
    return inside


def paired_bootstrap(
    differences: Sequence[float],
    seed: int,
    draws: int = BOOTSTRAP_DRAWS,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile interval of a mean difference between two systems.

    For differences that are no counts. Where all of them are equal the interval has no width:
    resampling can't tell what it hasn't seen, and that is no sign of certainty. For right and
    wrong answers see `paired_interval`.

    Args:
        differences: One per question: the first system's score minus the second's, on the same
            question. At least one.
        seed: Of the resampling.
        draws: How often the questions are drawn anew.
        confidence: In (0, 1).

    Returns:
        Lower and upper bound of the mean difference.

    Raises:
        ValueError: No differences.

    Source: Efron 1979, Annals of Statistics 7 (1), percentile method.

    Example:
        >>> paired_bootstrap([0.5, 0.5, 0.5], seed=0)
        (0.5, 0.5)
    """
    values = torch.tensor(differences, dtype=torch.float64)
    means = [resamples.mean(dim=1) for resamples in _resamples(values, seed, draws)]
    outside = (1 - confidence) / 2
    bounds = torch.cat(means).quantile(
        torch.tensor([outside, 1 - outside], dtype=torch.float64), interpolation="nearest"
    )
    lower, upper = bounds.tolist()
    return lower, upper


def upper_bound(
    differences: Sequence[float],
    seed: int,
    draws: int = BOOTSTRAP_DRAWS,
    confidence: float = 0.95,
) -> float:
    """Return what the mean of paired differences doesn't exceed: a one-sided bound.

    For non-inferiority in scores that are no counts: differences of loss, or of log-probability
    with the sign turned. Resampled are means in units of their own standard error, which makes up
    for skewed differences; the percentiles of plain means, ends of `paired_bootstrap`, exclude too
    much where some questions or texts lose far more than the rest. Where one in ten does, twenty
    are too few for either.

    Args:
        differences: One per question or text: the first system's score minus the second's.
        seed: Of the resampling.
        draws: How often the differences are drawn anew.
        confidence: In (0.5, 1).

    Returns:
        The bound; infinite where there are too few differences to tell. Where all are equal it is
        their value: resampling can't tell what it hasn't seen, and that is no sign of certainty.

    Raises:
        ValueError: No differences.

    Source: Hall 1988, Annals of Statistics 16 (3), the percentile-t method.

    Example:
        >>> differences = [0.0, 0.01, -0.01, 0.03, 0.0, 0.02, 0.3, 0.01]
        >>> upper_bound(differences, seed=0) > paired_bootstrap(differences, 0, confidence=0.9)[1]
        True
    """
    if not differences:
        raise ValueError(TOO_FEW)
    values = torch.tensor(differences, dtype=torch.float64)
    if bool((values == values[0]).all()):
        return float(values[0])
    mean, spread = values.mean(), values.std(correction=0)
    studentised = []
    for resamples in _resamples(values, seed, draws):
        away = resamples.mean(dim=1) - mean
        # Infinite where one value was drawn n times.
        studentised.append(torch.where(away == 0, 0.0, away / resamples.std(dim=1, correction=0)))
    lowest = torch.cat(studentised).quantile(1 - confidence, interpolation="lower")
    return float(mean - lowest * spread)


def _resamples(values: Tensor, seed: int, draws: int) -> Iterator[Tensor]:
    """Yield values drawn anew, `[some of the draws, n]` at a time."""
    n = len(values)
    if n == 0:
        raise ValueError(TOO_FEW)
    generator = torch.Generator().manual_seed(seed)
    while draws > 0:
        size = min(draws, max(1, _CHUNK // n))
        yield values[torch.randint(n, (size, n), generator=generator)]
        draws -= size


def mean_interval(
    values: Sequence[float],
    seed: int = 0,
    draws: int = BOOTSTRAP_DRAWS,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile interval of a mean over questions.

    For scores that are no counts: accuracies averaged over several draws a question, or
    log-probabilities. The questions are resampled, so the interval says how far the mean may move
    with other questions, the number of draws staying what it is.

    Args:
        values: One per question, at least one.
        seed: Of the resampling.
        draws: How often the questions are drawn anew.
        confidence: In (0, 1).

    Returns:
        Lower and upper bound of the mean.

    Raises:
        ValueError: No values.
    """
    return paired_bootstrap(values, seed, draws, confidence)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being several, in the order given.

    A task whose adjusted p-value is at most α may be called significant; the chance that any such
    call is false stays at most α.

    Args:
        pvalues: One per task.

    Returns:
        Adjusted p-values, each at least the one given and at most 1.

    Source: Holm 1979, Scandinavian Journal of Statistics 6 (2).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(pvalues)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = largest
    return adjusted
