"""What a search found out: `search.jsonl` and `search.failed.jsonl`.

`docs/formats.md` says of each field what it means.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from drllm.errors import RecordError
from drllm.paths import Decisions, check_decisions
from drllm.records.manifest import read_manifest, read_records

_DECISIONS = frozenset((0, 1, 2))


class Retest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a path fared when its question was asked in other ways; `margin` is the mean of those.

    It has survived if it is right in most, and its margin close enough to the full path's; where
    there are no other ways, without.
    """

    passed: int
    asked: int
    margin: float | None
    survived: bool

    def __post_init__(self) -> None:
        if not 0 <= self.passed <= self.asked:
            raise ValueError(f"'passed' is {self.passed} of {self.asked} 'asked'")
        if self.survived and self.asked and self.passed * 2 <= self.asked:
            raise ValueError(f"'survived' is true, but {self.passed} of {self.asked} were passed")


class TriedPath(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One path that the search tried on one question; simulation 0 is the full path.

    `executions` are in layer equivalents, `margin` and `kl` (from the full path, a mean over the
    prompt's tokens) in nats; what isn't defined or wasn't computed is None.
    """

    decisions: Decisions
    simulation: Annotated[int, msgspec.Meta(ge=0)]
    reward: Annotated[float, msgspec.Meta(ge=0, le=1)]
    margin: float | None
    executions: float
    answer: str | None = None
    kl: Annotated[float, msgspec.Meta(ge=0)] | None = None
    retest: Retest | None = None

    def __post_init__(self) -> None:
        cost = sum(self.decisions)
        if not _DECISIONS.issuperset(self.decisions) or not cost:
            check_decisions(self.decisions)  # says which
        if self.executions != cost:
            raise ValueError(f"'executions' is {self.executions}, the decisions cost {cost}")


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which question a record is of; ids are unique within a task."""

    id: str
    task: str
    question: str


class SearchRecord(Question, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the search found out about one question; one line of `search.jsonl`.

    `paths` holds every distinct path tried, the full path first; `seconds` is the question's share
    of its batch's wall time.
    """

    prompt: str
    answer: str
    reward: str
    num_layers: int
    paths: tuple[TriedPath, ...]
    seconds: float

    def __post_init__(self) -> None:
        for name in ("question", "prompt"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name!r} is empty")
        if not self.paths or self.full.simulation != 0 or set(self.full.decisions) != {1}:
            raise ValueError("'paths' doesn't start with the full path (simulation 0, all 1)")
        for path in self.paths:
            if len(path.decisions) != self.num_layers:
                check_decisions(path.decisions, self.num_layers)  # says how many
        if len({path.decisions for path in self.paths}) != len(self.paths):
            raise ValueError("'paths' holds the same decisions twice")

    @property
    def full(self) -> TriedPath:
        """The full path's own outcome."""
        return self.paths[0]


class FailedQuestion(Question, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question that failed at every attempt; one line of `search.failed.jsonl`."""

    error: str
    attempts: int


class SearchRecords(tuple[SearchRecord, ...]):
    """What `search_paths` returns and `supervise` takes: one record per question, in order."""

    model: dict[str, Any]  # identity of the base model, as far as it is known
    # The `search.jsonl` that holds them; None where they were never written.
    file: Path | None = None
    failed: tuple[FailedQuestion, ...] = ()
    is_new: bool = True  # something was searched for them, not all read from a file

    @classmethod
    def of(
        cls,
        records: Iterable[SearchRecord],
        model: Mapping[str, Any] | None = None,
        *,
        file: Path | None = None,
        failed: Sequence[FailedQuestion] = (),
        is_new: bool = True,
    ) -> "SearchRecords":
        """Return records with what they are from."""
        found = cls(records)
        found.model = {**({"num_layers": found[0].num_layers} if found else {}), **(model or {})}
        found.file, found.failed, found.is_new = file, tuple(failed), is_new
        return found


def read_search(file: Path) -> SearchRecords:
    """Read a `search.jsonl`; all its paths must be of as many layers as its manifest names."""
    records = read_records(file, SearchRecord, "search")
    layers = records[0].num_layers
    for line, record in enumerate(records, start=1):
        if record.num_layers != layers:
            raise RecordError(
                f"{file}, line {line}: the question was searched on {record.num_layers} "
                f"layers, that of line 1 on {layers}; a file holds the paths of one model"
            )
    model = (read_manifest(file, "search") or {}).get("model")
    found = SearchRecords.of(records, model, file=file, is_new=False)
    if found.model["num_layers"] != layers:
        raise RecordError(
            f"{file} holds paths of {layers} layers, but its manifest names a model of "
            f"{found.model['num_layers']}; make it again"
        )
    return found
