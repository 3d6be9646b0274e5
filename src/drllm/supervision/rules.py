"""One question's target: which tried paths count, the rules that pick among them, the reasons.

Owns what is decided by looking at one question alone. Leaves what depends on the others (copies,
quotas) to `selection` and `quotas`. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from drllm.errors import ConfigError
from drllm.records import SearchRecord, TriedPath

NO_VALID_PATH = "no valid path"
ONLY_FULL_PATH = "only the full path"
NOT_SURVIVED = "no path survived the re-test"
NO_DAMAGE = "no KL in the record"
SAVES_TOO_LITTLE = "no path saves enough"
OVER_QUOTA = "over the quota"
REASONS = (
    NO_VALID_PATH,
    ONLY_FULL_PATH,
    NOT_SURVIVED,
    NO_DAMAGE,
    SAVES_TOO_LITTLE,
    OVER_QUOTA,
)
"""Why a searched question has no target."""
TWICE = "same question twice"
"""Why a record has no target though its question may have one: an earlier record counts."""

MIN_SAVING = 0.1
"""Share of the full path's executions that a target of the rule `kl` saves at least."""
_ROUNDING = 1e-9


# --- which paths count -------------------------------------------------------------------------


def is_valid(path: TriedPath) -> bool:
    """Say whether a path answered right."""
    return path.reward >= 1


def is_saving(path: TriedPath, record: SearchRecord) -> bool:
    """Say whether a path answered right with fewer executions than the full path."""
    return is_valid(path) and path.executions < record.full.executions


def is_improving(path: TriedPath, record: SearchRecord) -> bool:
    """Say whether a path answered right where the full path failed."""
    return is_valid(path) and not is_valid(record.full)


def survived(path: TriedPath) -> bool:
    """Say whether a path answered right, and again when asked in other ways."""
    return is_valid(path) and path.retest is not None and path.retest.survived


# --- the rules ---------------------------------------------------------------------------------


def choose(record: SearchRecord, target: str, *, min_saving: float = MIN_SAVING) -> TriedPath | str:
    """Pick one question's target path.

    The full path is a candidate like any other where it is right: a question that no shorter path
    answers teaches the routers to execute everything. Not so under `paper`, which keeps only
    paths that improve on the full path or save executions, and under `kl`, whose targets save
    by definition and needn't be right.

    Args:
        record: What the search found.
        target: `shortest` (fewest executions, then largest margin in the re-test, then earliest)
            or `largest_margin` (in the re-test; then fewest executions, then earliest), both
            among the paths that survived the re-test; `paper` (fewest executions, then earliest,
            re-tested or not) or `released` (the same, the full path being a candidate too); or
            `kl` (least KL, then fewest executions, then earliest,
            among the paths that save enough).
        min_saving: For `kl`, the least share of the full path's executions to save.

    Returns:
        The path, or the reason why there is none.

    Source: Dr.LLM section 3.1 for `paper`, its published code for `released`; the others are
        ours (docs/differences.md, D-05 and, for `kl`, D-24).
    """
    kept = candidates(record, target, min_saving=min_saving)
    if isinstance(kept, str):
        return kept
    if target == "kl":
        return min(kept, key=lambda p: (_kl(p), p.executions, p.simulation))
    if target in ("paper", "released"):
        return min(kept, key=lambda p: (p.executions, p.simulation))
    if target == "shortest":
        return min(kept, key=lambda p: (p.executions, -_retest_margin(p), p.simulation))
    return min(kept, key=lambda p: (-_retest_margin(p), p.executions, p.simulation))


def candidates(
    record: SearchRecord, target: str, *, min_saving: float = MIN_SAVING
) -> list[TriedPath] | str:
    """Return the paths that a rule picks from, by simulation, or the reason why there are none.

    Args:
        record: What the search found.
        target: As for `choose`.
        min_saving: As for `choose`.
    """
    if target == "kl":
        return _saving_enough(record, min_saving)
    valid = [path for path in record.paths if is_valid(path)]
    if not valid:
        return NO_VALID_PATH
    if target in ("paper", "released"):
        kept = [
            path
            for path in valid
            if target == "released" or is_improving(path, record) or is_saving(path, record)
        ]
        return kept or ONLY_FULL_PATH
    return [path for path in valid if survived(path)] or NOT_SURVIVED


def weigh(paths: Sequence[TriedPath], path_weights: str) -> list[float]:
    """Return what each of a question's candidates counts in its soft targets.

    Args:
        paths: The candidates; at least one.
        path_weights: `equal`; `shorter` (each execution more than the shortest has halves the
            weight) or `closer` (exp(−KL), the KL in nats a token).

    Returns:
        Weights above 0.

    Raises:
        ConfigError: `closer` for a path whose KL wasn't computed.

    Source: ours.

    Example:
        >>> full = TriedPath(decisions=(1, 1), simulation=0, reward=1, margin=None, executions=2)
        >>> half = TriedPath(decisions=(1, 0), simulation=1, reward=1, margin=None, executions=1)
        >>> weigh([full, half], "shorter")
        [0.5, 1.0]
    """
    if path_weights == "equal":
        return [1.0 for _ in paths]
    if path_weights == "shorter":
        fewest = min(path.executions for path in paths)
        return [2.0 ** (fewest - path.executions) for path in paths]
    if any(path.kl is None for path in paths):
        raise ConfigError(
            "--path-weights closer needs each path's KL, which the search has not kept; "
            "search anew with --kl, or choose --path-weights shorter"
        )
    return [math.exp(-_kl(path)) for path in paths]


def _saving_enough(record: SearchRecord, min_saving: float) -> list[TriedPath] | str:
    """Return the paths of known KL that save enough; the least damaged becomes the target.

    Whether one answer came out right is mostly chance that the prompt doesn't foretell: few
    options, many tries. How far a path's next-token distributions lie from the full path's is a
    mean over all tokens of the prompt, and regular enough to be learnt.
    """
    most = (1 - min_saving) * record.full.executions + _ROUNDING
    known = [path for path in record.paths[1:] if path.kl is not None]
    if not known:
        return NO_DAMAGE
    return [path for path in known if path.executions <= most] or SAVES_TOO_LITTLE


def _kl(path: TriedPath) -> float:
    """Return the KL; a path without one comes last."""
    return math.inf if path.kl is None else path.kl


def _retest_margin(path: TriedPath) -> float:
    """Return the margin in the re-test; a path without one comes last."""
    margin = path.retest.margin if path.retest else None
    return -math.inf if margin is None else margin
