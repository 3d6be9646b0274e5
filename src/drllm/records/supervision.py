"""Target paths for training routers: `supervision.jsonl` and `supervision.rejected.jsonl`.

`docs/formats.md` explains each field.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from drllm.errors import PathError, RecordError
from drllm.paths import Decisions, check_decisions, num_executions
from drllm.records.codec import read_json_lines
from drllm.records.identity import compare_bypass, differ
from drllm.records.manifest import read_manifest, read_numbered_records
from drllm.records.places import resolve
from drllm.records.search import Question
from drllm.records.splits import question_key
from drllm.statistics.ranges import Count

SUPERVISION_FILE = "supervision.jsonl"
_FROM_QUESTION = "\ud800"
"""The default of fields that are made from the question. No file can hold this text."""
_TARGET_FIELDS = ("question", "prompt", "optimal_layer_config")
"""Fields that must be equal in copies of a target. Margins may differ in the last bits."""


class SupervisionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One target path to train routers on; one line of `supervision.jsonl`.

    Your own file needs only `question`, `optimal_layer_config` and `answer`, and may have further
    columns.
    """

    question: str
    optimal_layer_config: Decisions
    answer: str
    prompt: str = _FROM_QUESTION
    id: str = _FROM_QUESTION
    task: str = "own"
    executions: float = math.nan
    improving: bool = False
    margin: float | None = None

    def __post_init__(self) -> None:
        try:
            check_decisions(self.optimal_layer_config)
        except PathError as error:
            raise ValueError(f"'optimal_layer_config': {error}") from error
        self._fill_in()
        for name in ("question", "prompt"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name!r} is empty")
        cost = float(num_executions(self.optimal_layer_config))
        if self.executions != cost:
            raise ValueError(f"'executions' is {self.executions}, the decisions cost {cost}")

    def _fill_in(self) -> None:
        """Set the fields that a file may leave out."""
        if self.prompt == _FROM_QUESTION:
            msgspec.structs.force_setattr(self, "prompt", self.question)
        if self.id == _FROM_QUESTION:
            digest = hashlib.sha256(self.question.encode()).hexdigest()[:16]
            msgspec.structs.force_setattr(self, "id", digest)
        if math.isnan(self.executions):
            cost = float(num_executions(self.optimal_layer_config))
            msgspec.structs.force_setattr(self, "executions", cost)


class RejectedQuestion(Question, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question without a target, and why; one line of `supervision.rejected.jsonl`."""

    reason: str

    @classmethod
    def of(cls, record: Question | SupervisionRecord, reason: str) -> RejectedQuestion:
        """Make the line of a search record or a target that is left out."""
        return cls(id=record.id, task=record.task, question=record.question, reason=reason)


class _RejectedCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the summary of targets that counts records without a target."""

    rejected: dict[str, Count]
    copies: Count


def rejected_path(supervision: Path) -> Path:
    """Return the file for questions without a target: NAME.rejected.jsonl for NAME.jsonl."""
    return supervision.with_name(supervision.name.removesuffix(".jsonl") + ".rejected.jsonl")


def read_rejected(file: Path) -> list[RejectedQuestion]:
    """Read the questions without a target; `rejected_path` names their file.

    Raises RecordError if the file can't be trusted, or if the manifest of the targets counts
    another number of questions without a target.
    """
    questions = [question for _, question in read_json_lines(file, RejectedQuestion)]
    targets = file.with_name(file.name.removesuffix(".rejected.jsonl") + ".jsonl")
    manifest = read_manifest(targets, "supervision") or {}
    num_rejected = _count_rejected(manifest.get("summary") or {})
    if num_rejected is not None and num_rejected != len(questions):
        raise RecordError(
            f"{file} has {len(questions)} questions, but the manifest of {targets.name} counts "
            f"{num_rejected} without a target; make the targets again"
        )
    return questions


def _count_rejected(summary: Mapping[str, Any]) -> int | None:
    """Return how many records have no target, copies too; None if the summary doesn't say it."""
    try:
        counts = msgspec.convert(summary, _RejectedCounts)
    except msgspec.ValidationError:
        return None
    return counts.copies + sum(counts.rejected.values())


def read_supervision(path: Path | str) -> list[SupervisionRecord]:
    """Read and check a whole `supervision.jsonl`; `join_supervision` says what is refused."""
    return join_supervision([Path(path)])


def join_supervision(paths: Sequence[Path]) -> list[SupervisionRecord]:
    """Read the targets of several `supervision.jsonl` files; a target in two files counts once.

    Raises:
        RecordError: A file is given twice or can't be trusted, a question has two targets, two
            questions share an id, or targets have different numbers of layers.
    """
    merger = _Merger()
    resolved: list[Path] = []
    for path in paths:
        place = resolve(path)
        if place in resolved:
            raise RecordError(f"{path} is given twice; name each supervision file once")
        resolved.append(place)
        for line, record in read_numbered_records(path, SupervisionRecord, "supervision"):
            merger.add(_Target(record, path, line))
    return [target.record for target in merger.targets]


@dataclass(frozen=True, slots=True)
class TargetSet:
    """The targets of a training.

    Attributes:
        records: The targets.
        files: The files that they come from; none if the caller made the records.
    """

    records: Sequence[SupervisionRecord]
    files: Sequence[Path] = ()


def read_targets(files: Sequence[Path]) -> TargetSet:
    """Read the targets of a training; `join_supervision` says what is refused."""
    return TargetSet(join_supervision(files), files)


@dataclass(frozen=True, slots=True)
class _Target:
    """A target with its file and line, for messages."""

    record: SupervisionRecord
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def decisions(self) -> Decisions:
        return self.record.optimal_layer_config


class _Merger:
    """Collects the targets of several files, and refuses targets that contradict each other."""

    def __init__(self) -> None:
        self.targets: list[_Target] = []
        self._by_id: dict[tuple[str, str], _Target] = {}
        self._by_question: dict[tuple[str, str], _Target] = {}

    def add(self, target: _Target) -> None:
        """Add a target, unless another file has it already."""
        self._check_layers(target)
        record = target.record
        # `setdefault` returns the earlier target with this id, or this target if it is the first.
        first_with_id = self._by_id.setdefault((record.task, record.id), target)
        _refuse_different_fields(target, first_with_id)
        if first_with_id.file != target.file:
            return  # a copy
        key = (record.task, question_key(record.question))
        first_with_question = self._by_question.setdefault(key, target)
        if first_with_question.decisions != target.decisions:
            raise RecordError(
                f"{target}: {first_with_question} has the same question with another target (ids "
                f"{record.id!r} and {first_with_question.record.id!r} of task {record.task!r}); "
                f"leave one of them out"
            )
        self.targets.append(target)

    def _check_layers(self, target: _Target) -> None:
        if not self.targets:
            return
        first = self.targets[0]
        if len(target.decisions) != len(first.decisions):
            raise RecordError(
                f"{target}: the target is for {len(target.decisions)} layers, but the target of "
                f"{first} is for {len(first.decisions)}; give targets of one base model"
            )


def _refuse_different_fields(target: _Target, first: _Target) -> None:
    """Refuse a target that isn't a copy of the first target with its id."""
    record = target.record
    for name in _TARGET_FIELDS:
        if getattr(first.record, name) != getattr(record, name):
            raise RecordError(
                f"{target.file} and {first.file} differ in {name!r} of question {record.id!r} "
                f"of task {record.task!r}; leave one of them out"
            )


def check_targets(files: Sequence[Path], identity: Mapping[str, Any]) -> list[str]:
    """Refuse targets of another base model.

    Files without a manifest aren't checked. Two names of a model with the same weights are fine.

    Args:
        files: The `supervision.jsonl` files.
        identity: The identity of the base model.

    Returns:
        The rewards that the prompts of the targets were made for, each of them once.
    """
    rewards: list[str] = []
    for file in files:
        manifest = read_manifest(file, "supervision") or {}
        rewards += manifest.get("rewards") or []
        check_targets_model(manifest.get("model", {}), identity, str(file))
    return list(dict.fromkeys(rewards))


def check_targets_model(model: Mapping[str, Any], identity: Mapping[str, Any], name: str) -> None:
    """Refuse targets of another base model, or of another bypass.

    Args:
        model: The identity of the model that the targets were searched with; empty if unknown.
        identity: The identity of the base model.
        name: The name of the targets in the message, such as their file.
    """
    if not model:
        return
    difference = compare_bypass(model, identity)
    if difference:
        raise RecordError(
            f"{name} holds targets that were searched with {difference}; give the bypass that they "
            f"were searched with, or search anew"
        )
    for key in ("num_layers", "fingerprint"):
        if key in model and differ(key, model[key], identity[key], name):
            raise RecordError(
                f"{name} holds targets of {model.get('id', 'another model')!r} ({key} "
                f"{model[key]}), but the base model {identity['id']!r} has {key} {identity[key]}; "
                f"give the model that the targets were searched with, or search with this model"
            )
