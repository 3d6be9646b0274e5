"""How much faster our way is than the obvious one, and how much faster any way could be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """One comparison of two ways to do the same.

    Attributes:
        what: What both ways do, for the reader of a table.
        speedup: The obvious way's time, divided by ours.
        bound: The obvious way's time, divided by the least time that any way needs. None if no
            bound is known.
        rest: What our time goes to beyond the bound, by kind of operation, as shares of our time;
            see `common.operations`. Empty if it wasn't measured.
    """

    what: str
    speedup: float
    bound: float | None = None
    rest: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """The share of the bound that is reached."""
        return None if self.bound is None else self.speedup / self.bound

    def to_json(self) -> dict[str, Any]:
        """Return what the file of figures holds."""
        return {
            "what": self.what,
            "speedup": self.speedup,
            "bound": self.bound,
            "share": self.share,
            "rest": dict(self.rest),
        }


def compare_each(
    title: str,
    speedups: Mapping[str, float],
    bounds: Mapping[str, float] | None = None,
    rests: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Comparison]:
    """Return a comparison for each name, `TITLE, NAME`, with its bound and its rest, if given."""
    comparisons = []
    for name, speedup in speedups.items():
        bound = None if bounds is None else bounds[name]
        rest = {} if rests is None else rests[name]
        comparisons.append(Comparison(f"{title}, {name}", speedup, bound, rest))
    return comparisons
