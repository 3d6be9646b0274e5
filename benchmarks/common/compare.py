"""How far apart two systems' answers to the same questions lie, as figures and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from drllm.statistics.intervals import (
    BOOTSTRAP_DRAWS,
    is_right_or_wrong,
    mean_interval,
    sum_interval,
)
from drllm.statistics.paired import count_won_lost, mcnemar_exact, paired_interval

ACCURACY = "accuracy"
SEED = 0


def compare_paired(quantity: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return the mean of a quantity, its mean change from another system's, and the 95 % interval.

    Of accuracy also McNemar's exact test, and `excluded`, the loss from which on every loss is
    excluded, which `drllm evaluate --max-drop` compares; not where a question is right in part.
    """
    changes = [one - other for one, other in zip(ours, theirs, strict=True)]
    found = {"mean": fmean(ours), "change": fmean(changes), "n": len(changes)}
    if quantity != ACCURACY or not (is_right_or_wrong(ours) and is_right_or_wrong(theirs)):
        return found | {"interval": mean_interval(changes, SEED)}
    won, lost = count_won_lost(ours, theirs)
    interval = paired_interval(won, lost, len(changes))
    return found | {
        "interval": interval,
        "won": won,
        "lost": lost,
        "p": mcnemar_exact(won, lost),
        "excluded": max(0.0, -interval[0]),
    }


def average_kinds(values: Mapping[str, Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """Return the mean over kinds of the mean of each, and its 95 % interval.

    The kinds are fixed: each counts the same, and each is resampled by itself. So how far the kinds
    lie apart doesn't count as an error of sampling.

    Args:
        values: For each kind, one value for each text.
    """
    weight = 1 / len(values)
    mean, low, high = sum_interval([(weight, of_kind) for of_kind in values.values()], SEED)
    return mean, (low, high)


def divide_means(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, list[float]]:
    """Return the mean of the parts over the mean of the wholes, and the 95 % interval of that.

    Both means are of the same items, so each draw of the bootstrap takes an item's part and its
    whole together. Otherwise the interval of a share could exceed 1.
    """
    pairs = np.array([parts, wholes])  # [2, N]
    generator = np.random.default_rng(SEED)
    places = generator.integers(pairs.shape[1], size=(BOOTSTRAP_DRAWS, pairs.shape[1]))
    part_means, whole_means = pairs[:, places].mean(axis=2)  # [draws] each
    interval = np.percentile(part_means / whole_means, (2.5, 97.5)).tolist()
    return fmean(parts) / fmean(wholes), interval


def mean_change(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Return the mean change of a quantity over seeds and questions, each `[seeds][questions]`.

    The 95 % interval is over questions.
    """
    changes = [
        [a - b for a, b in zip(one, other, strict=True)]
        for one, other in zip(ours, theirs, strict=True)
    ]
    by_question = [*map(fmean, zip(*changes, strict=True))]
    interval = mean_interval(by_question, SEED)
    return {"change": fmean(by_question), "n": len(by_question), "interval": interval}


def in_words(quantity: str, figures: Mapping[str, Any]) -> str:
    """Return a change with its interval, accuracy in points, and its test where there is one."""
    scale = 100 if quantity == ACCURACY else 1
    low, high = (scale * end for end in figures["interval"])
    words = f"{scale * figures['change']:+.3f} ({low:+.3f} to {high:+.3f})"
    if "won" in figures:
        words += f"  {figures['won']} won, {figures['lost']} lost, p = {figures['p']:.2g}"
        words += f"; a loss of {100 * figures['excluded']:.2f} is excluded"
    return words
