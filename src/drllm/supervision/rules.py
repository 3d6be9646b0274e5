"""Rules: choose the path that becomes a question's target, or say why there is none.

A rule is a function with `@TARGETS.register("name")`, here or in your own Python code. A rule sees
one question. `select` handles what depends on other questions: copies and quotas. This module
doesn't import torch.
"""

import inspect
import math
from collections.abc import Callable
from typing import TypeAlias

from drllm.records.search import SearchRecord, TriedPath
from drllm.registry import Registry

NO_VALID_PATH = "no valid path"
ONLY_FULL_PATH = "only the full path"
NOT_SURVIVED = "no path survived the re-test"
NO_KL = "no KL in the record"
SAVES_TOO_LITTLE = "no path saves enough"
OVER_QUOTA = "over the quota"
REASONS = (NO_VALID_PATH, ONLY_FULL_PATH, NOT_SURVIVED, NO_KL, SAVES_TOO_LITTLE, OVER_QUOTA)
"""Why a searched question has no target."""
TWICE = "same question twice"
"""Why a record has no target: an earlier record of the same question counts in its place."""

MIN_SAVING = 0.05
"""Default of `--min-saving`: the minimum share of the full path's executions that a target of
`least_kl` saves."""


def is_valid(path: TriedPath) -> bool:
    """Tell whether a path answered right."""
    return path.reward >= 1


def is_saving(path: TriedPath, record: SearchRecord) -> bool:
    """Tell whether a path answered right with fewer executions than the full path."""
    return is_valid(path) and path.executions < record.full.executions


def is_improving(path: TriedPath, record: SearchRecord) -> bool:
    """Tell whether a path answered right where the full path failed."""
    return is_valid(path) and not is_valid(record.full)


def survived(path: TriedPath) -> bool:
    """Tell whether a path answered right in the search and survived the re-test."""
    return is_valid(path) and path.retest is not None and path.retest.survived


Rule: TypeAlias = Callable[..., list[TriedPath] | str]
"""A function of a search record. A rule returns the paths that may become the target, the best
first, or the reason why there are none. A rule with a parameter `min_saving` gets the value of
`--min-saving`."""

TARGETS: Registry[Rule] = Registry("target rule")


@TARGETS.register("shortest")
def shortest(record: SearchRecord) -> list[TriedPath] | str:
    """Fewest executions among the paths that survived the re-test, then largest margin in it.

    The full path may be one of these paths; it becomes the target if no shorter path survived.
    """
    return _survivors(record, lambda path: (path.executions, -_retest_margin(path)))


@TARGETS.register("largest_margin")
def largest_margin(record: SearchRecord) -> list[TriedPath] | str:
    """Largest margin in the re-test among the paths that survived it, then fewest executions."""
    return _survivors(record, lambda path: (-_retest_margin(path), path.executions))


@TARGETS.register("paper")
def paper(record: SearchRecord) -> list[TriedPath] | str:
    """Fewest executions among right paths that improve on the full path or save executions.

    Source: Dr.LLM section 3.1.
    """
    valid = released(record)
    if isinstance(valid, str):
        return valid
    better = [path for path in valid if is_improving(path, record) or is_saving(path, record)]
    if not better:
        return ONLY_FULL_PATH
    return better


@TARGETS.register("released")
def released(record: SearchRecord) -> list[TriedPath] | str:
    """Fewest executions among all right paths, re-tested or not: the published code's rule.

    Of equally long paths the best has the fewest different layers (docs/differences.md, D-35).
    """

    def order(path: TriedPath) -> tuple[float, int, int]:
        num_different_layers = sum(decision > 0 for decision in path.decisions)
        return path.executions, num_different_layers, path.simulation

    valid = [path for path in record.paths if is_valid(path)]
    if not valid:
        return NO_VALID_PATH
    return sorted(valid, key=order)


@TARGETS.register("least_kl")
def least_kl(record: SearchRecord, min_saving: float = MIN_SAVING) -> list[TriedPath] | str:
    """Least KL from the full path among the paths that save enough, right or not.

    With few options and many paths, a right answer is mostly chance. A path's KL from the full path
    is regular enough for routers to learn: it measures how far the next-token distributions are
    apart.

    Source: ours (docs/differences.md, D-24).
    """
    maximum = (1 - min_saving) * record.full.executions + 1e-9  # the product may be rounded down
    other_paths = record.paths[1:]  # the first is the full path
    measured = [path for path in other_paths if path.kl is not None]
    if not measured:
        return NO_KL
    short = [path for path in measured if path.executions <= maximum]
    if not short:
        return SAVES_TOO_LITTLE
    return sorted(short, key=_rank_by_kl)


def _rank_by_kl(path: TriedPath) -> tuple[float, float, int]:
    assert path.kl is not None
    return path.kl, path.executions, path.simulation


def _survivors(
    record: SearchRecord, order: Callable[[TriedPath], tuple[float, float]]
) -> list[TriedPath] | str:
    """Return the paths that survived the re-test, sorted by `order`, then by simulation."""
    if not any(is_valid(path) for path in record.paths):
        return NO_VALID_PATH
    survivors = [path for path in record.paths if survived(path)]
    if not survivors:
        return NOT_SURVIVED
    return sorted(survivors, key=lambda path: (*order(path), path.simulation))


def _retest_margin(path: TriedPath) -> float:
    """Return the margin in the re-test; minus infinity if there is none."""
    if path.retest is None or path.retest.margin is None:
        return -math.inf
    return path.retest.margin


def find_candidates(
    record: SearchRecord, target: str, *, min_saving: float | None = None
) -> list[TriedPath] | str:
    """Return the paths that may become a question's target, the best first.

    If there are none, return the reason.

    Args:
        record: The search of the question.
        target: The name of the rule.
        min_saving: The value of `--min-saving` for rules that read it; None for the default.
    """
    rule = TARGETS.get(target)
    if not reads_min_saving(target):
        return rule(record)
    if min_saving is None:
        min_saving = MIN_SAVING
    return rule(record, min_saving=min_saving)


def reads_min_saving(target: str) -> bool:
    """Tell whether a rule depends on `--min-saving`."""
    return "min_saving" in inspect.signature(TARGETS.get(target)).parameters
