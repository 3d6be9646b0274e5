"""What single edits of the full path did, layer by layer. Axes: L layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from drllm.paths import Decision
from drllm.records import SearchRecord, TriedPath
from drllm.supervision.rules import is_valid


@dataclass(frozen=True, slots=True, kw_only=True)
class EditEffect:
    """What one edit of the full path did, over the questions on which it alone was tried.

    `right` and `base_right` are the shares of these questions that it and the full path answer
    right. `reward` and `margin` (in nats) are means less the full path's; `kl` is a mean in nats a
    token. None stands where it isn't defined, or none was computed.
    """

    layer: int
    questions: int
    right: float
    base_right: float
    reward: float
    margin: float | None
    kl: float | None


def edit_effects(records: Sequence[SearchRecord], decision: Decision) -> list[EditEffect]:
    """Return what skipping, or repeating, one layer and nothing else did.

    One effect per layer on which the edit was tried, in order of layer; the records are of one
    model.
    """
    tried: dict[int, list[tuple[TriedPath, TriedPath]]] = {}
    for record in records:
        for path in record.paths:
            edited = [layer for layer, value in enumerate(path.decisions) if value != 1]
            if len(edited) == 1 and path.decisions[edited[0]] == decision:
                tried.setdefault(edited[0], []).append((record.full, path))
    return [_effect(layer, pairs) for layer, pairs in sorted(tried.items())]


def _effect(layer: int, pairs: Sequence[tuple[TriedPath, TriedPath]]) -> EditEffect:
    margins = [
        p.margin - f.margin for f, p in pairs if f.margin is not None and p.margin is not None
    ]
    kls = [path.kl for _, path in pairs if path.kl is not None]
    return EditEffect(
        layer=layer,
        questions=len(pairs),
        right=fmean(is_valid(path) for _, path in pairs),
        base_right=fmean(is_valid(full) for full, _ in pairs),
        reward=fmean(path.reward - full.reward for full, path in pairs),
        margin=fmean(margins) if margins else None,
        kl=fmean(kls) if kls else None,
    )
