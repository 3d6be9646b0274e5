"""Paired tests of two systems on the same questions, and the correction for several tests.

The first system is called ours, the second theirs. Three numbers have the same names everywhere:

    won     questions that our system answers right and theirs wrong
    lost    questions that their system answers right and ours wrong
    n       all questions
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import msgspec

from drllm.bisection import bisect
from drllm.statistics.intervals import is_right_or_wrong


class Outcomes(msgspec.Struct, kw_only=True):
    """One system's outcomes at one depth, question by question and text by text.

    Attributes:
        name: The system.
        executions: Mean executions in a forward pass, in layer equivalents.
        correct: For each question 1 or 0, or the share of right answers over several draws.
        gold_logprob: For each question the gold option's log-probability in nats; empty if unknown.
        text_loss: For each text the mean next-token loss in nats a token; empty if unknown.
    """

    name: str
    executions: float
    correct: Sequence[float]
    gold_logprob: Sequence[float] = ()
    text_loss: Sequence[float] = ()


def count_won_lost(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int]:
    """Count the questions won and lost from the scores of both systems, question by question.

    Raises:
        ValueError: A value is neither 1 (right) nor 0 (wrong).
    """
    if not (is_right_or_wrong(ours) and is_right_or_wrong(theirs)):
        raise ValueError("questions are won or lost only if each has one answer, right or wrong")
    won = 0
    lost = 0
    for our_score, their_score in zip(ours, theirs, strict=True):
        won += our_score > their_score
        lost += our_score < their_score
    return won, lost


def mcnemar_exact(won: int, lost: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    The test looks only at the questions won and lost. If neither system is better, each of these
    questions is won with a probability of one half. The p-value is the probability that the numbers
    won and lost then differ at least this much. If no question is won or lost, it is 1.

    Source: McNemar 1947, Psychometrika 12 (2), in its exact form.
    """
    num_differing = won + lost
    num_results: int = 2**num_differing  # equally likely, if neither system is better
    # The number of results with at most min(won, lost) wins.
    tail = sum(math.comb(num_differing, wins) for wins in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / num_results)


def paired_interval(
    won: float, lost: float, n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the score interval of the difference between two accuracies on the same questions.

    The interval holds all differences that Tango's score test doesn't reject. It stays inside
    [-1, 1]. Unlike a bootstrap interval or the normal interval, it has a width even if few
    questions or none are won or lost.

    Args:
        won: The number of questions won; a fraction if questions can be won in part.
        lost: The number of questions lost.
        n: The number of all questions.
        confidence: Confidence of the interval, in (0, 1).

    Raises:
        ValueError: The numbers contradict each other, or there are no questions.

    Source: Tango 1998, Statistics in Medicine 17 (8).
    """
    if n < 1 or min(won, lost) < 0 or won + lost > n:
        raise ValueError(f"{won} questions won and {lost} lost out of {n} is impossible")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    def is_rejected(difference: float) -> bool:
        distance, deviation = paired_score(won, lost, n, difference)
        return bool(abs(distance) > z * deviation)

    observed = (won - lost) / n  # never rejected
    ends = []
    for extreme in (-1.0, 1.0):
        if is_rejected(extreme):
            end, _ = bisect(is_rejected, observed, extreme)
        else:
            end = extreme
        ends.append(end)
    return ends[0], ends[1]


def paired_score(won: Any, lost: Any, n: int, difference: float) -> tuple[Any, Any]:
    """Return Tango's score for an assumed true difference, and its standard deviation.

    The score is `won - lost` minus the value that the assumed difference predicts for it. The score
    test rejects the assumed difference if the score is more than z standard deviations from 0.

    Args:
        won: The number of questions won, or an array of numbers.
        lost: The number of questions lost, or an array of numbers.
        n: The number of all questions.
        difference: The assumed difference of the accuracies, in [-1, 1].

    Source: Tango 1998, Statistics in Medicine 17 (8).
    """
    import numpy as np

    # The likeliest share of lost questions under this difference is the larger solution of the
    # quadratic equation n x² - half x - lost difference (1 - difference) / 2 = 0.
    half = (won + lost - (2 * n - won + lost) * difference) / 2
    root = np.sqrt(np.maximum(0.0, half**2 + 2 * n * lost * difference * (1 - difference)))
    share_lost = (half + root) / (2 * n)
    # Rounding may make an exact 0 negative.
    variance = np.maximum(0.0, n * (2 * share_lost + difference * (1 - difference)))
    return won - lost - n * difference, np.sqrt(variance)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return the p-values of several tests, corrected for the number of tests, in the same order.

    A test whose corrected p-value is at most α is significant. The probability that any of the
    tests is significant by chance is at most α.

    Source: Holm 1979, Scandinavian Journal of Statistics 6 (2).
    """
    corrected = [0.0] * len(pvalues)
    highest = 0.0
    order = sorted(range(len(pvalues)), key=lambda index: pvalues[index])
    for rank, index in enumerate(order):
        num_left = len(pvalues) - rank
        # A test with a larger p-value never gets a smaller corrected one.
        highest = max(highest, min(1.0, num_left * pvalues[index]))
        corrected[index] = highest
    return corrected
