"""Means over kinds of texts, and shares, each with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from drllm.statistics.intervals import BOOTSTRAP_DRAWS, mean_interval

SEED = 0


def average_kinds(values: Mapping[str, Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """Return the mean over kinds of the mean of each, and its 95 % interval.

    The kinds are fixed: each counts the same, and each is resampled by itself. So how far the kinds
    lie apart doesn't count as an error of sampling.

    Args:
        values: For each kind, one value for each text.

    Source: Zou and Donner 2008, Statistics in Medicine 27 (10), from the interval of each mean.
    """
    means = [fmean(of_kind) for of_kind in values.values()]
    ends = [mean_interval(of_kind, SEED) for of_kind in values.values()]
    # The squares of the distances to the ends add up, since the kinds are independent.
    below = [mean - low for mean, (low, _) in zip(means, ends, strict=True)]
    above = [high - mean for mean, (_, high) in zip(means, ends, strict=True)]
    mean = fmean(means)
    return mean, (mean - math.hypot(*below) / len(means), mean + math.hypot(*above) / len(means))


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
