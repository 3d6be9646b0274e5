"""What a search found out: `search.jsonl` and `search.failed.jsonl`, one question a line.

Axes: L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from drllm.paths import Decisions, check_decisions
from drllm.records.codec import decode, encode
from drllm.records.manifest import read_records

_DECISIONS = frozenset((0, 1, 2))
_DAMAGE = b'"damage"'


class Retest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a path fared when its question was asked in other ways.

    Attributes:
        passed: Other askings that were answered right.
        asked: Other askings in all.
        margin: Mean margin over them, in nats; None where a margin isn't defined.
        survived: Right in most of them, and the margin close enough to the full path's.
    """

    passed: int
    asked: int
    margin: float | None
    survived: bool

    def __post_init__(self) -> None:
        if not 0 <= self.passed <= self.asked:
            raise ValueError(f"'passed' is {self.passed} of {self.asked} 'asked'")
        if self.survived and self.passed * 2 <= self.asked:
            raise ValueError(
                f"'survived' is true, but only {self.passed} of {self.asked} were passed"
            )


class TriedPath(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One path that the search tried on one question.

    Attributes:
        decisions: `[L]`.
        simulation: 0 for the full path, else the simulation that tried it, from 1.
        reward: In [0, 1]; 1 is a right answer.
        margin: Graded score in nats, positive when right; None where not defined.
        executions: Cost in layer equivalents.
        answer: What was generated; None when choices were scored.
        kl: Mean KL divergence from the full path's next-token distributions to the path's,
            over the prompt's tokens, in nats a token; None where it wasn't computed.
        retest: None unless the path was a candidate for supervision.
    """

    decisions: Decisions
    simulation: int
    reward: float
    margin: float | None
    executions: float
    answer: str | None = None
    kl: float | None = None
    retest: Retest | None = None

    def __post_init__(self) -> None:
        cost = sum(self.decisions)
        if not _DECISIONS.issuperset(self.decisions) or not cost:
            check_decisions(self.decisions)  # says which
        if self.executions != cost:
            raise ValueError(f"'executions' is {self.executions}, the decisions cost {cost}")
        if self.simulation < 0:
            raise ValueError(f"'simulation' is {self.simulation}; it must be 0 or more")
        if not 0 <= self.reward <= 1:
            raise ValueError(f"'reward' is {self.reward}; it must be in [0, 1]")
        if self.kl is not None and self.kl < 0:
            raise ValueError(f"'kl' is {self.kl}; it must be 0 or more")


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which question a record is of.

    Attributes:
        id: Unique within the task.
        task: The task's name.
        question: The question's text.
    """

    id: str
    task: str
    question: str


class SearchRecord(Question, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the search found out about one question; one line of `search.jsonl`.

    Attributes:
        prompt: The text that the model read.
        answer: The gold answer's text.
        reward: Name of the reward.
        num_layers: L.
        paths: Every distinct path tried, the full path first, then by simulation.
        seconds: Share of the block's wall time.
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
    """A question that failed every time; one line of `search.failed.jsonl`.

    Attributes:
        error: Of the last attempt.
        attempts: How often it was tried.
    """

    error: str
    attempts: int


def read_search(path: Path | str) -> list[SearchRecord]:
    """Read and check a whole `search.jsonl`.

    Raises:
        RecordError: What can't be trusted, by file, line and place; see `read_records`.
    """
    return read_records(Path(path), SearchRecord, "search", upgrade=_from_version_1)


def _from_version_1(line: bytes, where: str) -> bytes:
    """Rename `damage` to `kl`, as it is called since version 2 of the schema."""
    if _DAMAGE not in line:
        return line
    row = decode(line, dict[str, Any], where)
    paths = row.get("paths")
    for path in paths if isinstance(paths, list) else []:
        if isinstance(path, dict) and "damage" in path and "kl" not in path:
            path["kl"] = path.pop("damage")
    return encode(row)
