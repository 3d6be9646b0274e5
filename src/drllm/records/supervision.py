"""Target paths to train routers on: `supervision.jsonl` and `supervision.rejected.jsonl`.

`docs/formats.md` says of each field what it means.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from drllm.errors import PathError, RecordError
from drllm.paths import Decisions, check_decisions, num_executions
from drllm.records.identity import differ
from drllm.records.manifest import read_manifest, read_records
from drllm.records.search import Question
from drllm.records.splits import question_key

_FROM_QUESTION = "\ud800"
"""A text that no file can hold, for fields whose default follows from the question."""
_SAME_TARGET = ("question", "prompt", "optimal_layer_config")
"""What has to be equal for two lines to be one target; a margin differs in its last bits."""


class SupervisionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One target path to train routers on; one line of `supervision.jsonl`.

    A file of one's own needs `question`, `optimal_layer_config` and `answer` only, and may have
    further columns.
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
        if self.prompt == _FROM_QUESTION:
            msgspec.structs.force_setattr(self, "prompt", self.question)
        if self.id == _FROM_QUESTION:
            digest = hashlib.sha256(self.question.encode()).hexdigest()[:16]
            msgspec.structs.force_setattr(self, "id", digest)
        for name in ("question", "prompt"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name!r} is empty")
        cost = float(num_executions(self.optimal_layer_config))
        if math.isnan(self.executions):
            msgspec.structs.force_setattr(self, "executions", cost)
        elif self.executions != cost:
            raise ValueError(f"'executions' is {self.executions}, the decisions cost {cost}")


class RejectedQuestion(Question, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question without a target, and why; one line of `supervision.rejected.jsonl`."""

    reason: str

    @classmethod
    def of(cls, record: Question | SupervisionRecord, reason: str) -> RejectedQuestion:
        """Return the line of a search record or a target that is left out."""
        return cls(id=record.id, task=record.task, question=record.question, reason=reason)


def rejected_path(supervision: Path) -> Path:
    """Return where the questions without a target lie: NAME.rejected.jsonl beside NAME.jsonl."""
    return supervision.with_name(supervision.name.removesuffix(".jsonl") + ".rejected.jsonl")


def read_supervision(path: Path | str) -> list[SupervisionRecord]:
    """Read and check a whole `supervision.jsonl`; see `join_supervision`."""
    return join_supervision([Path(path)])


def join_supervision(paths: Sequence[Path]) -> list[SupervisionRecord]:
    """Read several `supervision.jsonl` files as one; a target in two of them counts once.

    One question with two targets, or one id with two questions, is a RecordError.
    """
    joined: list[SupervisionRecord] = []
    by_id: dict[tuple[str, str], tuple[SupervisionRecord, Path]] = {}
    by_question: dict[tuple[str, str], tuple[SupervisionRecord, str]] = {}
    for number, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:number]]:
            raise RecordError(f"{path} is given twice; name each supervision file once")
        for line, record in enumerate(read_records(path, SupervisionRecord, "supervision"), 1):
            where, target = f"{path}, line {line}", record.optimal_layer_config
            if joined and len(target) != len(joined[0].optimal_layer_config):
                raise RecordError(
                    f"{where}: 'optimal_layer_config' has {len(target)} layers, that of "
                    f"{paths[0]}, line 1 has {len(joined[0].optimal_layer_config)}; give targets "
                    f"of one base model"
                )
            same, file = by_id.setdefault((record.task, record.id), (record, path))
            for name in _SAME_TARGET:
                if getattr(same, name) != getattr(record, name):
                    raise RecordError(
                        f"{path} and {file} differ in {name!r} of question {record.id!r} of task "
                        f"{record.task!r}; leave one of them out"
                    )
            if file != path:
                continue  # a copy
            asked = (record.task, question_key(record.question))
            other, earlier = by_question.setdefault(asked, (record, where))
            if other.optimal_layer_config != target:
                raise RecordError(
                    f"{where}: {earlier} has the same question with another target (ids "
                    f"{record.id!r} and {other.id!r} of task {record.task!r}); leave one of them "
                    f"out"
                )
            joined.append(record)
    return joined


def check_targets(files: Sequence[Path], identity: Mapping[str, Any]) -> list[str]:
    """Refuse targets of another base model; return the rewards that their prompts were made for.

    Another id alone doesn't matter, and a file without a manifest says nothing.
    """
    rewards: dict[str, None] = {}
    for file in files:
        manifest = read_manifest(file, "supervision") or {}
        rewards |= dict.fromkeys(manifest.get("rewards") or ())
        theirs = manifest.get("model", {})
        for name in ("num_layers", "fingerprint"):
            if name in theirs and differ(name, theirs[name], identity[name], str(file)):
                raise RecordError(
                    f"{file} holds targets of {theirs.get('id', 'another model')!r} ({name} "
                    f"{theirs[name]}), the base model {identity['id']!r} has {name} "
                    f"{identity[name]}; give the model that they were searched with, or search "
                    f"with this one"
                )
    return list(rewards)
