"""The outcomes by question that an evaluation left behind: `eval/samples.jsonl`.

Owns their reading and checking. Leaves the results that were computed from them to `results`.
Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import PathError, RecordError
from drllm.paths import Decisions, check_decisions
from drllm.records import read_json_lines, read_manifest, sha256
from drllm.reporting.fields import Fields

BASE = "base"
ROUTED = "routed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One system's outcome on one question; `decisions` is None where draws are averaged."""

    correct: float
    gold_logprob: float | None
    decisions: Decisions | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One test question with the outcome of every system."""

    id: str
    question: str
    choices: tuple[str, ...]
    gold: int | None
    outcomes: Mapping[str, Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file that was read, for the provenance table."""

    name: str
    sha256: str
    manifest: Mapping[str, Any]


def read_samples(
    path: Path, name: str, sources: list[Source], absent: list[str]
) -> dict[str, list[tuple[str, Sample]]]:
    """Read the samples by task, each with its place for messages.

    Args:
        path: May be missing.
        name: Of the file in the run folder.
        sources: Receives the file, if it is there.
        absent: Receives a line, if it isn't.

    Raises:
        RecordError: A file that can't be trusted.
    """
    if not path.exists():
        absent.append(f"{name} is absent: routes and example questions can't be shown.")
        return {}
    manifest = read_manifest(path, "samples") or {}
    if manifest and manifest.get("sha256") != sha256(path):
        raise RecordError(
            f"{path} was changed or cut off after it was written (its manifest has another hash); "
            f"evaluate again"
        )
    samples: dict[str, list[tuple[str, Sample]]] = {}
    for line, row in read_json_lines(path, dict[str, Any]):
        fields = Fields(row, f"{path}, line {line}")
        samples.setdefault(fields.text("task"), []).append((fields.where, _sample(fields)))
    sources.append(Source(name=name, sha256=sha256(path), manifest=manifest))
    return samples


def _sample(fields: Fields) -> Sample:
    choices = tuple(str(choice) for choice in fields.items("choices"))
    gold = fields.optional_whole("gold")
    if gold is not None and gold >= len(choices):
        raise RecordError(
            f"{fields.where}: 'gold' is {gold}, the question has {len(choices)} choices (0 to "
            f"{len(choices) - 1})"
        )
    systems = Fields(fields.values.get("systems"), f"{fields.where}, 'systems'")
    outcomes = {}
    for name, values in systems.values.items():
        outcome = Fields(values, f"{systems.where}, {name!r}")
        decisions = outcome.values.get("decisions")
        outcomes[name] = Outcome(
            correct=outcome.number("correct"),
            gold_logprob=outcome.optional_number("gold_logprob"),
            decisions=None if decisions is None else _decisions(outcome),
        )
    return Sample(
        id=fields.text("id"),
        question=fields.text("question"),
        choices=choices,
        gold=gold,
        outcomes=outcomes,
    )


def _decisions(fields: Fields) -> Decisions:
    values = fields.items("decisions")
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise RecordError(f"{fields.where}: 'decisions' is {values!r}; expected 0, 1 or 2 a layer")
    try:
        return check_decisions(values)
    except PathError as error:
        raise RecordError(f"{fields.where}: 'decisions': {error}") from error
