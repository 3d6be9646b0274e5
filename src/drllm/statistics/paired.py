"""Paired tests: two systems on the same questions, and correction for several tests.

Of `n` questions, `won` are those that the first system has right and the second wrong, `lost` the
other way round.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import msgspec

from drllm.bisection import bisect
from drllm.statistics.intervals import is_single


class Outcomes(msgspec.Struct, kw_only=True):
    """What one system did at one setting, question by question and text by text.

    `executions` are a mean a forward pass, in layer equivalents. `correct` is 1 or 0 a question, or
    the share of several draws; `gold_logprob` is in nats. Losses are means over a text, in nats a
    token. What isn't known is empty.
    """

    name: str
    executions: float
    correct: Sequence[float]
    gold_logprob: Sequence[float] = ()
    text_loss: Sequence[float] = ()


def won_lost(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int]:
    """Count the questions won and lost; a ValueError unless both answered the same ones once."""
    if not (is_single(ours) and is_single(theirs)):
        raise ValueError("only answers that are right or wrong can be won or lost: one a question")
    won = 0
    lost = 0
    for our_score, their_score in zip(ours, theirs, strict=True):
        won += our_score > their_score
        lost += our_score < their_score
    return won, lost


def mcnemar_exact(won: int, lost: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    Only questions on which two systems disagree count; if neither is better, each of those is
    won with probability one half. Without any disagreement it is 1.

    Source: McNemar 1947, Psychometrika 12 (2), in its exact form.
    """
    n = won + lost
    tail = sum(math.comb(n, wins) for wins in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / (1 << n))


def paired_interval(
    won: float, lost: float, n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the score interval of the difference between two accuracies on the same questions.

    All differences that a score test on the questions won and lost doesn't reject. Unlike a
    bootstrap or the normal interval it doesn't vanish where few questions or none are won or
    lost, and it stays inside [-1, 1].

    Source: Tango 1998, Statistics in Medicine 17 (8).
    """
    if n < 1 or min(won, lost) < 0 or won + lost > n:
        raise ValueError(f"{won} questions won and {lost} lost out of {n} is impossible")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    def is_rejected(difference: float) -> bool:
        distance, deviation = paired_score(won, lost, n, difference)
        return bool(abs(distance) > z * deviation)

    ends = []
    for extreme in (-1.0, 1.0):
        if is_rejected(extreme):
            end, _ = bisect(is_rejected, (won - lost) / n, extreme)
        else:
            end = extreme
        ends.append(end)
    return ends[0], ends[1]


def paired_score(won: Any, lost: Any, n: int, difference: float) -> tuple[Any, Any]:
    """Return how many questions the counts lie above what is supposed, and its deviation if true.

    `won` and `lost` are numbers or arrays of them; the difference of the accuracies, in [-1, 1], is
    supposed to be true. The test rejects where the one is more than z times the other.

    Source: Tango 1998, Statistics in Medicine 17 (8).
    """
    import numpy as np

    # The share lost that is likeliest under this difference solves a quadratic equation.
    half = (won + lost - (2 * n - won + lost) * difference) / 2
    root = np.sqrt(np.maximum(0.0, half**2 + 2 * n * lost * difference * (1 - difference)))
    share_lost = (half + root) / (2 * n)
    # An exact 0 may come out as less than that.
    variance = np.maximum(0.0, n * (2 * share_lost + difference * (1 - difference)))
    return won - lost - n * difference, np.sqrt(variance)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being several, in the order given.

    A task whose adjusted p-value is at most α may be called significant; the chance that any such
    call is false stays at most α.

    Source: Holm 1979, Scandinavian Journal of Statistics 6 (2).
    """
    adjusted = [0.0] * len(pvalues)
    highest = 0.0
    order = sorted(range(len(pvalues)), key=lambda index: pvalues[index])
    for rank, index in enumerate(order):
        num_left = len(pvalues) - rank
        highest = max(highest, min(1.0, num_left * pvalues[index]))
        adjusted[index] = highest
    return adjusted
