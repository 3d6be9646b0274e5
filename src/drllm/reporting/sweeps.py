"""A sweep over settings: what their routed models lost, and which one is chosen.

The choice sees the `select` split alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from drllm.errors import RecordError
from drllm.records.codec import SCHEMA_VERSION
from drllm.records.results import ROUTED, Evaluation, read_form, read_results
from drllm.statistics.verdicts import Differences

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
    rows = [(r.setting, r.num_seeds, r.executions.mean, r.against_base) for r in evaluation.seeds]
    rows = rows or [
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
    return read_form(path, SweepResult, SCHEMA)
