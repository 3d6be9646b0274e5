"""How sure a comparison can be: intervals, paired tests, and correction for many tasks.

Owns the formulas; knows nothing of models, tasks or files. Everything that draws takes a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch

BOOTSTRAP_DRAWS = 10_000
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
        # The share lost that is likeliest under this difference solves a quadratic equation.
        half = (won + lost - (2 * n - won + lost) * difference) / 2
        root = math.sqrt(max(0.0, half**2 + 2 * n * lost * difference * (1 - difference)))
        share_lost = (half + root) / (2 * n)
        variance = n * (2 * share_lost + difference * (1 - difference))
        return (won - lost - n * difference) ** 2 > z * z * variance

    estimate = (won - lost) / n
    return _last(rejected, estimate, -1.0), _last(rejected, estimate, 1.0)


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
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one question")
    generator = torch.Generator().manual_seed(seed)
    means = []
    while draws > 0:
        size = min(draws, max(1, _CHUNK // n))
        picked = torch.randint(n, (size, n), generator=generator)
        means.append(values[picked].mean(dim=1))
        draws -= size
    outside = (1 - confidence) / 2
    bounds = torch.cat(means).quantile(
        torch.tensor([outside, 1 - outside], dtype=torch.float64), interpolation="nearest"
    )
    lower, upper = bounds.tolist()
    return lower, upper


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
