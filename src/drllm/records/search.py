"""The records of a search: `search.jsonl` and `search.failed.jsonl`.

`docs/formats.md` explains each field.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from drllm.errors import RecordError
from drllm.paths import Decisions, check_decisions
from drllm.records.codec import read_json_lines
from drllm.records.manifest import read_manifest, read_numbered_records
from drllm.statistics.ranges import Amount, Count, Share

SEARCH_FILE = "search.jsonl"

_DECISIONS = frozenset((0, 1, 2))


class Retest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a path on variants of its question's prompt.

    `passed` of the `asked` variants were answered right, and `margin` is the mean over the
    variants. A path survives if it is right on most variants and its margin is close enough to the
    full path's margin. It also survives if there are no variants.
    """

    passed: int
    asked: int
    margin: float | None
    survived: bool

    def __post_init__(self) -> None:
        if not 0 <= self.passed <= self.asked:
            raise ValueError(f"'passed' is {self.passed} of {self.asked} 'asked' variants")
        if self.survived and self.asked and self.passed * 2 <= self.asked:
            raise ValueError(f"'survived' is true, but {self.passed} of {self.asked} were passed")


class TriedPath(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One path that was tried on one question; simulation 0 is the full path.

    `executions` are in layer equivalents, `margin` and `kl` in nats. `kl` is the mean KL divergence
    from the full path over the prompt's tokens. A value that isn't defined, or that the search
    didn't compute, is None.
    """

    decisions: Decisions
    simulation: Count
    reward: Share
    margin: float | None
    executions: float
    answer: str | None = None
    kl: Amount | None = None
    retest: Retest | None = None

    def __post_init__(self) -> None:
        cost = sum(self.decisions)
        if cost == 0 or not _DECISIONS.issuperset(self.decisions):
            check_decisions(self.decisions)  # its error names the decision
        if self.executions != cost:
            raise ValueError(f"'executions' is {self.executions}, the decisions cost {cost}")


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The question of a record; ids are unique within a task."""

    id: str
    task: str
    question: str


class SearchRecord(Question, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All paths that were tried on one question; one line of `search.jsonl`.

    `paths` are distinct, and the full path comes first. `seconds` is the question's share of its
    batch's time.
    """

    prompt: str
    answer: str
    reward: str
    num_layers: int
    paths: tuple[TriedPath, ...]
    seconds: Amount

    def __post_init__(self) -> None:
        for name in ("question", "prompt"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name!r} is empty")
        if not self.paths or self.full.simulation != 0 or set(self.full.decisions) != {1}:
            raise ValueError("'paths' doesn't start with the full path (simulation 0, all 1)")
        for path in self.paths:
            if len(path.decisions) != self.num_layers:
                check_decisions(path.decisions, self.num_layers)  # its error names both numbers
        if len({path.decisions for path in self.paths}) != len(self.paths):
            raise ValueError("'paths' holds the same decisions twice")

    @property
    def full(self) -> TriedPath:
        """The full path with its outcome."""
        return self.paths[0]


class FailedQuestion(Question, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question that failed at every attempt; one line of `search.failed.jsonl`."""

    error: str
    attempts: Count


class SearchRecords(tuple[SearchRecord, ...]):
    """The records of a search, one for each question, in order.

    `search_paths` returns them, and `supervise` makes targets from them.

    Attributes:
        model: The base model's identity. Records from a file without a manifest have only its
            `num_layers`, and without records there isn't even that.
        file: The `search.jsonl` that holds the records; None if they were never written.
        failed: The questions that failed.
        is_new: Whether any question was searched just now; False if all records come from a file.
    """

    model: dict[str, Any]
    file: Path | None = None
    failed: tuple[FailedQuestion, ...] = ()
    is_new: bool = True

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
        """Make a tuple of records, and set its attributes."""
        search_records = cls(records)
        search_records.model = {}
        if search_records:
            search_records.model["num_layers"] = search_records[0].num_layers
        search_records.model.update(model or {})
        search_records.file = file
        search_records.failed = tuple(failed)
        search_records.is_new = is_new
        return search_records


def read_search(file: Path) -> SearchRecords:
    """Read a `search.jsonl`.

    Raises RecordError if the file can't be trusted, or if the numbers of layers in its records and
    in its manifest differ.
    """
    numbered_records = read_numbered_records(file, SearchRecord, "search")
    first_line, first = numbered_records[0]
    num_layers = first.num_layers
    for line, record in numbered_records:
        if record.num_layers != num_layers:
            raise RecordError(
                f"{file}, line {line}: the question was searched on {record.num_layers} layers, "
                f"but the question of line {first_line} on {num_layers}; give a file with paths of "
                f"one model"
            )
    records = [record for _, record in numbered_records]
    manifest = read_manifest(file, "search") or {}
    search_records = SearchRecords.of(records, manifest.get("model"), file=file, is_new=False)
    if search_records.model["num_layers"] != num_layers:
        raise RecordError(
            f"{file} holds paths of {num_layers} layers, but its manifest names a model of "
            f"{search_records.model['num_layers']} layers; search again"
        )
    return search_records


def read_failed(file: Path) -> tuple[FailedQuestion, ...]:
    """Read a `search.failed.jsonl`.

    Raises RecordError if the file can't be trusted, or if the manifest of its search counts another
    number of failed questions.
    """
    questions = tuple(question for _, question in read_json_lines(file, FailedQuestion))
    search_file = file.with_name(file.name.removesuffix(".failed.jsonl") + ".jsonl")
    manifest = read_manifest(search_file, "search") or {}
    num_failed = manifest.get("num_failed", len(questions))
    if num_failed != len(questions):
        raise RecordError(
            f"{file} has {len(questions)} questions, but the manifest of {search_file.name} counts "
            f"{num_failed} that failed; search again"
        )
    return questions
