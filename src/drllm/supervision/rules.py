"""Rules: choose the path that becomes a question's target, or say why there is none.

A rule is a function with `@TARGETS.register("name")`, here or in your own Python code. It sees the
search of one question. `select` handles duplicates and quotas, which depend on other questions.

In this module a path is right if it answered right in the search. The re-test asks a question with
other prompts, and a right path survives it if it is right there too (`search.retest`). This module
doesn't import torch.
"""

import inspect
import math
from collections.abc import Callable
from typing import TypeAlias

from drllm.errors import ConfigError
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
DUPLICATE = "same question twice"
"""Why a search record has no target: an earlier record of the same question counts instead."""

MIN_SAVING = 0.05
"""Default of `--min-saving`: a target of `least_kl` saves at least this share of the full path's
executions."""

Candidates: TypeAlias = list[TriedPath] | str
"""The paths that may become a question's target, the best first; or one of `REASONS` if there are
none."""
Rule: TypeAlias = Callable[..., Candidates]
"""A function that takes a search record and returns the candidates. If a rule has a parameter
`min_saving`, it gets the value of `--min-saving`."""

TARGETS: Registry[Rule] = Registry("target rule")
"""Rules by name; `drllm ls targets` prints the first line of each docstring."""


def is_valid(path: TriedPath) -> bool:
    """Tell whether a path is right."""
    return path.reward >= 1


def is_saving(path: TriedPath, record: SearchRecord) -> bool:
    """Tell whether a path is right with fewer executions than the full path."""
    return is_valid(path) and path.executions < record.full.executions


def is_improving(path: TriedPath, record: SearchRecord) -> bool:
    """Tell whether a path is right where the full path is wrong."""
    return is_valid(path) and not is_valid(record.full)


def survived(path: TriedPath) -> bool:
    """Tell whether a path is right and survived the re-test."""
    return is_valid(path) and path.retest is not None and path.retest.survived


@TARGETS.register("shortest")
def shortest(record: SearchRecord) -> Candidates:
    """Takes the shortest path that is right in the search and in the re-test.

    Of equally short paths, the one with the largest margin in the re-test is taken. The full path
    becomes the target if it survived the re-test and no shorter path did.
    """
    return _sort_survivors(record, lambda path: (path.executions, -_get_retest_margin(path)))


@TARGETS.register("largest_margin")
def largest_margin(record: SearchRecord) -> Candidates:
    """Takes the path that is right in the search and in the re-test by the largest margin.

    The margin is the mean margin in the re-test. Of equal paths the shortest is taken.
    """
    return _sort_survivors(record, lambda path: (-_get_retest_margin(path), path.executions))


@TARGETS.register("paper")
def paper(record: SearchRecord) -> Candidates:
    """Takes the shortest right path that is shorter than the full path, or right where it is wrong.

    No re-test is needed.

    Source: Dr.LLM section 3.1.
    """
    valid_paths = released(record)
    if isinstance(valid_paths, str):
        return valid_paths
    better_paths = [
        path for path in valid_paths if is_improving(path, record) or is_saving(path, record)
    ]
    if not better_paths:
        return ONLY_FULL_PATH
    return better_paths


@TARGETS.register("released")
def released(record: SearchRecord) -> Candidates:
    """Takes the shortest right path, as the paper's published code does; it may be the full path.

    No re-test is needed. Of equally short paths, the one with the fewest different layers is taken
    (docs/differences.md, D-35).
    """

    def rank(path: TriedPath) -> tuple[float, int, int]:
        num_different_layers = sum(decision > 0 for decision in path.decisions)
        return path.executions, num_different_layers, path.simulation

    valid_paths = [path for path in record.paths if is_valid(path)]
    if not valid_paths:
        return NO_VALID_PATH
    return sorted(valid_paths, key=rank)


@TARGETS.register("least_kl")
def least_kl(record: SearchRecord, min_saving: float = MIN_SAVING) -> Candidates:
    """Takes the path whose output is closest to the full path's, among paths that save enough.

    A path may be right or wrong. The measure is the path's KL from the full path: how far their
    distributions of the next token are apart. If a question has few options and many paths were
    tried, most right answers are right by chance. The KL is less random, so routers can learn it.

    Args:
        record: The search of the question.
        min_saving: The minimum share of the full path's executions that a path saves.

    Source: ours (docs/differences.md, D-24).
    """
    max_executions = (1 - min_saving) * record.full.executions
    max_executions += 1e-9  # the product may be rounded down
    other_paths = record.paths[1:]  # all but the full path
    paths_with_kl = [path for path in other_paths if path.kl is not None]
    if not paths_with_kl:
        return NO_KL
    short_paths = [path for path in paths_with_kl if path.executions <= max_executions]
    if not short_paths:
        return SAVES_TOO_LITTLE
    return sorted(short_paths, key=_rank_by_kl)


def _rank_by_kl(path: TriedPath) -> tuple[float, float, int]:
    assert path.kl is not None
    return path.kl, path.executions, path.simulation


def _sort_survivors(
    record: SearchRecord, rank: Callable[[TriedPath], tuple[float, float]]
) -> Candidates:
    """Return the paths that survived the re-test, the lowest `rank` first.

    Of paths with the same rank, the path that was tried first comes first.
    """
    if not any(is_valid(path) for path in record.paths):
        return NO_VALID_PATH
    survivors = [path for path in record.paths if survived(path)]
    if not survivors:
        return NOT_SURVIVED
    return sorted(survivors, key=lambda path: (*rank(path), path.simulation))


def _get_retest_margin(path: TriedPath) -> float:
    """Return the mean margin in the re-test; minus infinity if there is none."""
    if path.retest is None or path.retest.margin is None:
        return -math.inf
    return path.retest.margin


def find_candidates(
    record: SearchRecord, target: str, *, min_saving: float | None = None
) -> Candidates:
    """Apply the rule `target` to the search of a question; return the candidates.

    Args:
        record: The search of the question.
        target: The name of the rule.
        min_saving: The value of `--min-saving` for rules that read it; None for the default.

    Raises:
        ConfigError: A rule of the user returned no candidates and none of `REASONS`.
    """
    rule = TARGETS.get(target)
    settings: dict[str, float] = {}
    if reads_min_saving(target):
        settings["min_saving"] = MIN_SAVING if min_saving is None else min_saving
    candidates = rule(record, **settings)
    has_unknown_reason = isinstance(candidates, str) and candidates not in REASONS
    if has_unknown_reason or not candidates:
        raise ConfigError(
            f"the target rule {target!r} returned {candidates!r} for question {record.id!r}; let "
            f"it return a path or more, or one of drllm.supervision.rules.REASONS"
        )
    return candidates


def reads_min_saving(target: str) -> bool:
    """Tell whether a rule depends on `--min-saving`."""
    return "min_saving" in inspect.signature(TARGETS.get(target)).parameters
