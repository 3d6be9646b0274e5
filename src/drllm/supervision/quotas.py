"""Quotas: how many targets a task may have, and which share of them must improve. No torch."""

import math
from collections.abc import Mapping, Sequence

from drllm.errors import ConfigError
from drllm.records import SupervisionRecord

_ROUNDING = 1e-9


def read_quotas(text: str | None) -> dict[str, int]:
    """Read quotas as users write them: a comma list of TASK=COUNT; None for no quotas.

    Anything else, a count below 1, or a task named twice is a ConfigError.

    Example:
        >>> read_quotas("arc_easy=400, dart-1=200")
        {'arc_easy': 400, 'dart-1': 200}
    """
    quotas: dict[str, int] = {}
    for part in [] if text is None else text.split(","):
        task, _, count = (piece.strip() for piece in part.rpartition("="))
        if not task or not count.isdecimal() or int(count) < 1:
            raise ConfigError(
                f"--quotas: {part.strip()!r} is no quota; give TASK=COUNT with a count of at "
                f"least 1, several of them with commas between, e.g. arc_easy=400,dart-1=200"
            )
        if task in quotas:
            raise ConfigError(f"--quotas names task {task!r} twice; name it once")
        quotas[task] = int(count)
    return quotas


def over_quota(
    kept: Sequence[SupervisionRecord], quotas: Mapping[str, int], share: float | None
) -> set[int]:
    """Return the places of the targets that have to go.

    A task with a quota keeps its first targets. With a share too, and as long as too few of them
    improve, the next improving target beyond the quota takes the place of the first one that
    doesn't; a task that runs out of improving targets stays below the share, as in the published
    code. With a share and no quota the last targets that don't improve go, until the others have
    the share; each task by itself where any task has a quota, else all of them together.

    Source: `data_generation.py` of Dr.LLM's published code (commit 14e8837) for quota and share
        together; the share without a quota is ours (docs/differences.md, D-11).
    """
    groups: dict[str, list[int]] = {}
    for place, record in enumerate(kept):
        groups.setdefault(record.task if quotas else "", []).append(place)
    dropped: set[int] = set()
    for task, places in groups.items():
        if task in quotas:
            first, later = places[: quotas[task]], places[quotas[task] :]
            others = [place for place in first if not kept[place].improving]
            wanted = math.ceil((share or 0) * quotas[task] - _ROUNDING)
            missing = max(0, wanted - (len(first) - len(others)))
            arriving = [place for place in later if kept[place].improving][:missing]
            dropped |= {*later, *others[: len(arriving)]} - {*arriving}
        elif share is not None:
            others = [place for place in places if not kept[place].improving]
            # i / (i + n) >= share; a rounding error of the quotient never costs a target.
            improving = len(places) - len(others)
            dropped |= {*others[math.floor(improving * (1 - share) / share + _ROUNDING) :]}
    return dropped
