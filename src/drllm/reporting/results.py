"""The results that an evaluation left behind: `eval/TASK.json` and `eval/samples.jsonl`.

Owns their reading and checking. Leaves the other files of a run folder to `run`, and all
arithmetic to `summary`. Axes: L layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import PathError, RecordError
from drllm.paths import Decisions, check_decisions
from drllm.records import SCHEMA_VERSION, read_lines, read_manifest, sha256
from drllm.reporting.fields import Fields, read_object

BASE = "base"
ROUTED = "routed"
ACCURACY_TOLERANCE = 5e-4
"""How far an accuracy may lie from that of its samples: files may round to three digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system's result on one task.

    Attributes:
        name: `base`, `routed`, or an opponent's name.
        description: What it is, in words.
        accuracy: Share of questions answered right.
        interval: 95 % interval of the accuracy.
        executions: Mean layer executions a forward pass, in layer equivalents.
        gold_logprob: Mean log-probability of the right option among the options, in nats.
        seconds: Measured time of one draw.
        draws: Random draws that the numbers are means over.
        mcnemar_p: Exact McNemar test against base; None for base itself or without a test.
        won: Questions right here and wrong in base; None where draws are averaged.
        lost: Questions wrong here and right in base; None where draws are averaged.
        mcnemar_p_holm: The test's p-value corrected for several tasks; None with one task.
    """

    name: str
    description: str
    accuracy: float
    interval: tuple[float, float]
    executions: float
    gold_logprob: float | None
    seconds: float
    draws: int
    mcnemar_p: float | None
    won: int | None
    lost: int | None
    mcnemar_p_holm: float | None = None


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
class Evaluation:
    """One `eval/TASK.json` with its rows of `eval/samples.jsonl` (none where that is absent)."""

    task: str
    split: str
    num_questions: int
    num_layers: int
    chance: float
    systems: tuple[System, ...]
    findings: tuple[str, ...]
    samples: tuple[Sample, ...]

    def system(self, name: str) -> System | None:
        """Return the system of that name, if it was evaluated."""
        return next((system for system in self.systems if system.name == name), None)

    def routes(self, name: str = ROUTED) -> list[Decisions]:
        """Return the decisions that a system took on the questions, in their order."""
        outcomes = [sample.outcomes.get(name) for sample in self.samples]
        return [
            outcome.decisions
            for outcome in outcomes
            if outcome is not None and outcome.decisions is not None
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file that was read, for the provenance table."""

    name: str
    sha256: str
    manifest: Mapping[str, Any]


def read_evaluations(folder: Path, sources: list[Source], absent: list[str]) -> list[Evaluation]:
    """Read every result in an `eval` folder.

    Args:
        folder: May be missing.
        sources: Receives the files that were read.
        absent: Receives one line for each file that isn't there.

    Raises:
        RecordError: A file that can't be trusted, or samples of another evaluation.
    """
    paths = sorted(
        path for path in folder.glob("*.json") if not path.name.endswith(".manifest.json")
    )
    if not paths:
        absent.append("eval/ holds no TASK.json: accuracy and routes can't be shown.")
        return []
    samples = _samples(folder / "samples.jsonl", sources, absent)
    evaluations = [_evaluation(path, samples, sources) for path in paths]
    tasks = [evaluation.task for evaluation in evaluations]
    for path, task in zip(paths, tasks, strict=True):
        if tasks.count(task) > 1:
            raise RecordError(
                f"{path} holds task {task!r}, and so does another file beside it; "
                f"keep one result a task"
            )
    return evaluations


def _samples(
    path: Path, sources: list[Source], absent: list[str]
) -> dict[str, list[tuple[str, Sample]]]:
    """Return the samples by task, each with its place for messages."""
    if not path.exists():
        absent.append("eval/samples.jsonl is absent: routes and example questions can't be shown.")
        return {}
    manifest = read_manifest(path, "samples") or {}
    if manifest and manifest.get("sha256") != sha256(path):
        raise RecordError(
            f"{path} was changed or cut off after it was written (its manifest has another hash); "
            f"evaluate again"
        )
    samples: dict[str, list[tuple[str, Sample]]] = {}
    for line, row in read_lines(path):
        fields = Fields(row, f"{path}, line {line}")
        samples.setdefault(fields.text("task"), []).append((fields.where, _sample(fields)))
    sources.append(Source(name=f"eval/{path.name}", sha256=sha256(path), manifest=manifest))
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


def _evaluation(
    path: Path, samples: Mapping[str, list[tuple[str, Sample]]], sources: list[Source]
) -> Evaluation:
    fields = read_object(path)
    if fields.values.get("schema") != "drllm.evaluation":
        raise RecordError(
            f"{path} says {fields.values.get('schema')!r}; expected 'drllm.evaluation'. "
            f"Is it the right file?"
        )
    if fields.whole("schema_version") > SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema version {fields.whole('schema_version')}, this drllm reads up to "
            f"{SCHEMA_VERSION}; install a newer drllm"
        )
    systems = tuple(
        _system(Fields(row, f"{path}, system {number}"))
        for number, row in enumerate(fields.items("systems"), start=1)
    )
    task = fields.text("task")
    placed = samples.get(task, [])
    evaluation = Evaluation(
        task=task,
        split=fields.text("split"),
        num_questions=fields.whole("num_questions"),
        num_layers=fields.whole("num_layers"),
        chance=fields.number("chance"),
        systems=systems,
        findings=tuple(str(finding) for finding in fields.items("findings")),
        samples=tuple(sample for _, sample in placed),
    )
    _check_systems(path, evaluation)
    _check_samples(path, evaluation, [where for where, _ in placed])
    sources.append(Source(name=f"eval/{path.name}", sha256=sha256(path), manifest=fields.values))
    return evaluation


def _system(fields: Fields) -> System:
    ends = fields.items("interval")
    if len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends):
        raise RecordError(f"{fields.where}: 'interval' is {ends!r}; expected two numbers")
    low, high = (float(end) for end in ends)
    accuracy = fields.number("accuracy")
    if not 0 <= low <= accuracy + 1e-9 or not accuracy - 1e-9 <= high <= 1:
        raise RecordError(
            f"{fields.where}: accuracy {accuracy} with interval [{low}, {high}]; expected "
            f"0 <= low <= accuracy <= high <= 1"
        )
    return System(
        name=fields.text("name"),
        description=str(fields.values.get("description") or ""),
        accuracy=accuracy,
        interval=(low, high),
        executions=fields.number("executions"),
        gold_logprob=fields.optional_number("gold_logprob"),
        seconds=fields.number("seconds"),
        draws=fields.whole("draws"),
        mcnemar_p=fields.optional_number("mcnemar_p"),
        won=fields.optional_whole("won"),
        lost=fields.optional_whole("lost"),
        mcnemar_p_holm=fields.optional_number("mcnemar_p_holm"),
    )


def _check_systems(path: Path, evaluation: Evaluation) -> None:
    names = Counter(system.name for system in evaluation.systems)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise RecordError(f"{path} names system {twice[0]!r} twice; evaluate again")
    if BASE not in names:
        raise RecordError(
            f"{path} has no system {BASE!r} to compare with "
            f"(it has: {', '.join(names) or 'none'}); evaluate again"
        )


def _check_samples(path: Path, evaluation: Evaluation, places: Sequence[str]) -> None:
    """Refuse samples that can't be those that the result was computed from."""
    samples = evaluation.samples
    if not samples:
        return
    if len(samples) != evaluation.num_questions:
        raise RecordError(
            f"{path} counts {evaluation.num_questions} questions, samples.jsonl has "
            f"{len(samples)} of task {evaluation.task!r}; they are of different evaluations"
        )
    for where, sample in zip(places, samples, strict=True):
        for name, outcome in sample.outcomes.items():
            if outcome.decisions and len(outcome.decisions) != evaluation.num_layers:
                raise RecordError(
                    f"{where}: {name!r} has {len(outcome.decisions)} decisions, "
                    f"{path.name} says {evaluation.num_layers} layers"
                )
    for system in evaluation.systems:
        correct = [
            sample.outcomes[system.name].correct
            for sample in samples
            if system.name in sample.outcomes
        ]
        if correct and abs(sum(correct) / len(correct) - system.accuracy) > ACCURACY_TOLERANCE:
            raise RecordError(
                f"{path} gives {system.name!r} accuracy {system.accuracy}, samples.jsonl gives "
                f"{sum(correct) / len(correct)}; they are of different evaluations"
            )
