"""What one line of `search.jsonl` and `supervision.jsonl` holds, to and from JSON.

Owns the records and the checks on each value. Leaves whole files to `files`. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drllm.errors import PathError, RecordError
from drllm.paths import Decisions, check_decisions, num_executions


@dataclass(frozen=True, slots=True, kw_only=True)
class Retest:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedPath:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecord:
    """All that the search found out about one question; one line of `search.jsonl`.

    Attributes:
        id: Unique within the task.
        task: The task's name.
        question: The question's text.
        prompt: The text that the model read.
        answer: The gold answer's text.
        reward: Name of the reward.
        num_layers: L.
        paths: Every distinct path tried, the full path first, then by simulation.
        seconds: Share of the block's wall time.
    """

    id: str
    task: str
    question: str
    prompt: str
    answer: str
    reward: str
    num_layers: int
    paths: tuple[TriedPath, ...]
    seconds: float

    @property
    def full(self) -> TriedPath:
        """The full path's own outcome."""
        return self.paths[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedPath:
    """One of a question's valid paths, for soft targets.

    Attributes:
        decisions: `[L]`.
        weight: What it counts beside the question's others; above 0.
    """

    decisions: Decisions
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionRecord:
    """One target path to train routers on; one line of `supervision.jsonl`.

    Attributes:
        question: The question's text.
        optimal_layer_config: The target path's decisions, `[L]`.
        answer: The gold answer's text.
        prompt: The text that the routers read; the question itself where a file has none.
        id: Unique within the task.
        task: The task's name.
        executions: Cost of the target path in layer equivalents.
        improving: The full path failed and the target path doesn't.
        margin: The target path's margin in nats; None where not known.
        valid_paths: All paths that might have been the target, the target too; empty where they
            weren't asked for.
    """

    question: str
    optimal_layer_config: Decisions
    answer: str
    prompt: str
    id: str
    task: str
    executions: float
    improving: bool
    margin: float | None = None
    valid_paths: tuple[WeightedPath, ...] = ()


def to_json(record: Any) -> str:
    """Write a record as one line of JSON, without the newline.

    Valid paths that weren't asked for are left out.

    Raises:
        ValueError: A number that is not finite, which JSON can't hold; a margin that isn't
            defined is None.
    """
    values = dataclasses.asdict(record)
    if not values.get("valid_paths", True):
        del values["valid_paths"]
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def search_record(row: Mapping[str, Any]) -> SearchRecord:
    """Read one parsed line of `search.jsonl`.

    Raises:
        RecordError: What is missing or wrong, without file and line.
    """
    layers = _get(row, "num_layers", int)
    paths = tuple(_tried_path(path, layers) for path in _get(row, "paths", list))
    if not paths or paths[0].simulation != 0 or set(paths[0].decisions) != {1}:
        raise RecordError("'paths' doesn't start with the full path (simulation 0, all 1)")
    if len({path.decisions for path in paths}) != len(paths):
        raise RecordError("'paths' holds the same decisions twice")
    return SearchRecord(
        id=_get(row, "id", str),
        task=_get(row, "task", str),
        question=_text(row, "question"),
        prompt=_text(row, "prompt"),
        answer=_get(row, "answer", str),
        reward=_get(row, "reward", str),
        num_layers=layers,
        paths=paths,
        seconds=float(_get(row, "seconds", float)),
    )


def supervision_record(row: Mapping[str, Any]) -> SupervisionRecord:
    """Read one parsed line of `supervision.jsonl`, ours or anyone's.

    Only `question`, `optimal_layer_config` and `answer` must be there.

    Raises:
        RecordError: What is missing or wrong, without file and line.
    """
    question = _text(row, "question")
    try:
        decisions = check_decisions(_ints(row, "optimal_layer_config"))
    except PathError as error:
        raise RecordError(f"'optimal_layer_config': {error}") from error
    digest = hashlib.sha256(question.encode()).hexdigest()[:16]
    return SupervisionRecord(
        question=question,
        optimal_layer_config=decisions,
        answer=_get(row, "answer", str),
        prompt=_text(row, "prompt") if "prompt" in row else question,
        id=_get(row, "id", str) if "id" in row else digest,
        task=_get(row, "task", str) if "task" in row else "own",
        executions=float(num_executions(decisions)),
        improving=_get(row, "improving", bool) if "improving" in row else False,
        margin=_optional_float(row, "margin"),
        valid_paths=_valid_paths(row, decisions),
    )


def _valid_paths(row: Mapping[str, Any], target: Decisions) -> tuple[WeightedPath, ...]:
    if "valid_paths" not in row:
        return ()
    paths = tuple(_weighted_path(path, len(target)) for path in _get(row, "valid_paths", list))
    if paths and target not in {path.decisions for path in paths}:
        raise RecordError("'valid_paths' lacks the target path itself")
    if len({path.decisions for path in paths}) != len(paths):
        raise RecordError("'valid_paths' holds the same decisions twice")
    return paths


def _weighted_path(row: Any, num_layers: int) -> WeightedPath:
    row, decisions = _path_in(row, "valid_paths", num_layers)
    weight = float(_get(row, "weight", float))
    if weight <= 0:
        raise RecordError(f"'weight' is {weight} in 'valid_paths'; it must be above 0")
    return WeightedPath(decisions=decisions, weight=weight)


def _tried_path(row: Any, num_layers: int) -> TriedPath:
    row, decisions = _path_in(row, "paths", num_layers)
    reward = float(_get(row, "reward", float))
    if not 0 <= reward <= 1:
        raise RecordError(f"'reward' is {reward}; it must be in [0, 1]")
    return TriedPath(
        decisions=decisions,
        simulation=_get(row, "simulation", int),
        reward=reward,
        margin=_optional_float(row, "margin"),
        executions=float(_get(row, "executions", float)),
        answer=None if row.get("answer") is None else _get(row, "answer", str),
        kl=_optional_float(row, "kl"),
        retest=None if row.get("retest") is None else _retest(_get(row, "retest", dict)),
    )


def _path_in(row: Any, name: str, num_layers: int) -> tuple[dict[str, Any], Decisions]:
    """Return one entry of a list of paths as an object, and its decisions."""
    if not isinstance(row, dict):
        raise RecordError(f"{name!r} holds something that is not an object")
    try:
        return row, check_decisions(_ints(row, "decisions"), num_layers)
    except PathError as error:
        raise RecordError(f"{name!r}: {error}") from error


def _retest(row: Mapping[str, Any]) -> Retest:
    return Retest(
        passed=_get(row, "passed", int),
        asked=_get(row, "asked", int),
        margin=_optional_float(row, "margin"),
        survived=_get(row, "survived", bool),
    )


def _get(row: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    if key not in row:
        raise RecordError(
            f"{key!r} is missing (the line has: {', '.join(sorted(row)) or 'nothing'})"
        )
    value = row[key]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise RecordError(f"{key!r} is {reprlib.repr(value)}; expected {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise RecordError(f"{key!r} is {value}; expected a finite number")
    return value


def _text(row: Mapping[str, Any], key: str) -> str:
    value: str = _get(row, key, str)
    if not value.strip():
        raise RecordError(f"{key!r} is empty")
    return value


def _optional_float(row: Mapping[str, Any], key: str) -> float | None:
    return None if row.get(key) is None else float(_get(row, key, float))


def _ints(row: Mapping[str, Any], key: str) -> list[int]:
    values = _get(row, key, list)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise RecordError(
                f"{key!r} holds {reprlib.repr(value)}; expected whole numbers 0, 1 or 2"
            )
    return list(values)
