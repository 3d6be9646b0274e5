"""A sweep over settings: what their routed models lost, which one is chosen, the drawing.

The choice sees the `select` split alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import msgspec

from drllm.errors import RecordError
from drllm.records.codec import SCHEMA_VERSION
from drllm.records.results import ROUTED, Evaluation, read_form, read_results
from drllm.reporting.drawing import Colours, panels
from drllm.statistics.verdicts import Differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "drllm.sweep"
SWEEP_FILE = "sweep.json"


class Placed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A routed model at one depth (in words) of one task: the mean over its seeds, minus base.

    `num_seeds` are those whose routers could be brought to the depth.
    """

    task: str
    depth: str
    num_seeds: int
    executions: float
    against_base: Differences

    @property
    def merit(self) -> float:
        """What is maximised: the gold log-probability kept, in nats; else the accuracy kept."""
        return (self.against_base.gold_logprob or self.against_base.accuracy).mean


class Candidate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One setting of a sweep, with its places at the depths that its routers can be brought to."""

    name: str
    places: tuple[Placed, ...]

    @property
    def merit(self) -> float | None:
        """The mean over its places; None without any."""
        return fmean(place.merit for place in self.places) if self.places else None


class SweepResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `sweep.json`: settings in the order given, chosen on a split.

    `sweep` is the recipe's name; `chosen` is None where no setting reaches any depth.
    """

    schema: str = SCHEMA
    schema_version: int = SCHEMA_VERSION
    sweep: str
    sweep_sha256: str
    chosen_on: str
    chosen: str | None
    settings: tuple[Candidate, ...]


def read_candidate(name: str, folder: Path) -> Candidate:
    """Read a setting's results from its `eval` folder; none are a RecordError."""
    evaluations = read_results(folder)
    if not evaluations:
        raise RecordError(f"{folder} holds no results; run the sweep again")
    return Candidate(name=name, places=tuple(p for each in evaluations for p in _places(each)))


def _places(evaluation: Evaluation) -> Iterator[Placed]:
    rows = [
        (row.setting, row.num_seeds, row.executions.mean, row.against_base)
        for row in evaluation.seeds
    ]
    if not rows:
        rows = [
            (point.setting, 1, point.executions, point.against_base)
            for point in evaluation.curve
            if point.system == ROUTED and point.against_base is not None
        ]
    for depth, seeds, executions, found in rows:
        if depth:
            about = {"task": evaluation.task, "depth": depth}
            yield Placed(**about, num_seeds=seeds, executions=executions, against_base=found)


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the setting whose routed models keep most; None where none saves anything.

    Settings that reach more depths, and with more of their seeds, come first: routers that can't
    be brought to a depth have nothing to offer there. Among them the mean merit over tasks and
    depths decides, and where it is equal the first one given. Source: ours.
    """

    def rank(candidate: Candidate) -> tuple[int, int, float]:
        places = candidate.places
        return len(places), sum(place.num_seeds for place in places), candidate.merit or 0.0

    return max((each for each in candidates if each.places), key=rank, default=None)


def read_sweep_file(path: Path) -> SweepResult:
    """Read `sweep.json`, a RecordError if it is absent, newer than this drllm or not trusted."""
    if not path.is_file():
        raise RecordError(f"{path} doesn't exist; give a folder that 'drllm sweep' has written")
    return read_form(path, SweepResult, SCHEMA)


def drawn(candidates: Sequence[Candidate], colours: Colours, width: float) -> Figure:
    """Draw each setting's losses in a row, depths in colours of their own, with 95 % intervals."""
    depths = list(dict.fromkeys((p.task, p.depth) for each in candidates for p in each.places))
    several = len({task for task, _ in depths}) > 1
    height = 0.9 + 0.21 * len(candidates) * max(1, len(depths) / 2)  # inches
    figure, (left, right) = panels(1, 2, width, height, sharey=True)
    for axes, key, scale, label in (
        (left, "accuracy", 100, "accuracy,\npoints"),
        (right, "gold_logprob", 1, "gold log-prob.,\nnats"),
    ):
        for number, depth in enumerate(depths):
            shift = (number - (len(depths) - 1) / 2) * 0.8 / len(depths)
            points = [
                (row + shift, *(scale * value for value in (found.mean, *found.interval)))
                for row, candidate in enumerate(candidates)
                for place in candidate.places
                if (place.task, place.depth) == depth
                and (found := getattr(place.against_base, key)) is not None
            ]
            if points:
                rows, middles, lows, highs = zip(*points, strict=True)
                colour, marker = colours[f"s{number % 5 + 1}"], "osD^v"[number % 5]
                name = ", ".join(depth) if several else depth[1]
                axes.hlines(rows, lows, highs, color=colour, linewidth=1.2)
                axes.plot(middles, rows, marker, color=colour, markersize=3.5, label=name)
        axes.axvline(0, color=colours["ink"], linewidth=0.8, zorder=0)
        axes.set_xlabel(f"{label}, minus base's")
        axes.locator_params(axis="x", nbins=3)
    left.set_yticks(range(len(candidates)), [each.name for each in candidates])
    left.invert_yaxis()
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    return figure
