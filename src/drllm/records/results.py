"""The results of an evaluation: `eval/TASK.json`, `samples.jsonl` and `latency.json`.

Evaluation writes these structs; reports and `drllm show` read them. `docs/formats.md` explains each
field. Values that follow from others are properties and not in the files.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from drllm.errors import RecordError
from drllm.paths import Decisions, check_decisions
from drllm.records.codec import Version, read_json
from drllm.records.manifest import read_records
from drllm.records.removed import certificate_ignored
from drllm.statistics.exclusion import DropTest
from drllm.statistics.verdicts import Differences, judge_times

BASE = "base"
ROUTED = "routed"
PERMUTED = "permuted routes"
PREFILL = "prefill"
DECODE = "decode"
EVALUATION_SCHEMA = "drllm.evaluation"
LATENCY_SCHEMA = "drllm.latency"
SAMPLES_FILE = "samples.jsonl"
LATENCY_FILE = "latency.json"
OLDEST = 2  # the oldest schema version of results that is read
ACCURACY_TOLERANCE = 5e-4
"""How far an accuracy may lie from that of its samples: files may round to three digits."""

T = TypeVar("T", bound=msgspec.Struct)


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that every file of results begins with, as `new_manifest` makes them."""

    schema: str
    schema_version: int
    drllm_version: str
    created: str
    model: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, str]
    libraries: dict[str, str]


class StepRecord(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One step of a path; see `drllm.paths.Step`."""

    layer: int
    run: Literal["all", "attention", "mlp"] = "all"
    scale: float = 1.0
    adapter: str = ""


class Flops(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FLOPs of reading a prompt: products with weights, and what grows with its square."""

    weights: float
    attention: float


class Scored(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a system did on a task's questions at some depth.

    Executions are means a forward pass, in layer equivalents; log-probabilities and losses are in
    nats; intervals are of 95 %. `against_base` is what the system has more than base,
    `routed_against` what the routed model has more than the system.
    """

    accuracy: float
    interval: tuple[float, float]
    executions: float
    gold_logprob: float | None
    text_loss: float | None = None
    against_base: Differences | None = None
    routed_against: Differences | None = None

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= self.accuracy + 1e-9 or not self.accuracy - 1e-9 <= high <= 1:
            raise ValueError(
                f"accuracy {self.accuracy} with interval [{low}, {high}]; expected "
                f"0 <= low <= accuracy <= high <= 1"
            )


class System(Scored, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One system at the depth that the routers were trained for.

    `decode_executions` are those a generated token.
    """

    name: str
    description: str
    seconds: float
    draws: int = 1
    source: str | None = None
    fitted_on: str | None = None
    reads_question: bool | None = None
    metrics: dict[str, float] = {}
    decode_executions: float | None = None
    prompt_flops: Flops | None = None
    kv_bytes_per_token: float | None = None
    unchanged_routes: float | None = None


class Point(Scored, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One system at one depth, which is said in words ("20 % saved"; empty for base)."""

    system: str
    setting: str

    @property
    def name(self) -> str:
        """System and setting, as the samples name it."""
        return f"{self.system}, {self.setting}" if self.setting else self.system


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One result under several seeds; `deviation` is None with a single one."""

    mean: float
    lowest: float
    highest: float
    deviation: float | None
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up one value a seed, at least one."""
        return cls(
            mean=statistics.fmean(values),
            lowest=min(values),
            highest=max(values),
            deviation=statistics.stdev(values) if len(values) > 1 else None,
            num_seeds=len(values),
        )


class Seeds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What routers of several seeds did at one depth; empty for the one they were trained for.

    The differences are of the mean over the seeds: to base, and to their own routes permuted.
    """

    setting: str
    num_seeds: int
    accuracy: Spread
    executions: Spread
    gold_logprob: Spread | None
    text_loss: Spread | None
    against_base: Differences
    against_permuted: Differences | None


class Evaluation(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `eval/TASK.json`; `systems` and `curve` (empty if not asked for) begin with base."""

    runtime: dict[str, Any]
    task: str
    split: str
    kind: Literal["choices", "generated"]
    metric: str
    num_fewshot: int
    num_questions: int
    not_asked: dict[str, str] = {}
    num_layers: int
    chance: float
    routers: str | None = None
    routers_sha256: str | None = None
    paths: dict[str, tuple[StepRecord, ...]] = {}
    other_seeds: dict[str, str] = {}
    systems: tuple[System, ...]
    curve: tuple[Point, ...] = ()
    seeds: tuple[Seeds, ...] = ()
    drop_test: DropTest | None = None
    findings: tuple[str, ...] = ()
    # Menus of paths and certificates of earlier versions, which are read and ignored.
    choice: Any | msgspec.UnsetType = msgspec.UNSET
    menu: Any | msgspec.UnsetType = msgspec.UNSET
    pooled: Any | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        names = [system.name for system in self.systems]
        refuse_twice("system", names)
        refuse_twice("point", [point.name for point in self.curve])
        if BASE not in names:
            there = ", ".join(names) or "none"
            raise ValueError(f"no system {BASE!r} to compare with (there is: {there})")

    @property
    def base(self) -> System:
        """The untouched model; no result is read without it."""
        return next(system for system in self.systems if system.name == BASE)

    @property
    def routed(self) -> System | None:
        """The routed model, if it was evaluated."""
        return self.system(ROUTED)

    @property
    def compared(self) -> System | None:
        """What stands against base in the first line: the routed model, else the best path."""
        return self.routed or self.best_path

    @property
    def best_path(self) -> System | None:
        """The static path that `--max-drop` chose, else the one that stands out.

        That is the path whose executions are nearest to the routers', or without routers the most
        accurate one.
        """
        paths = [system for system in self.systems if system.name in self.paths]
        if not paths:
            return None
        for path in paths:
            if self.drop_test is not None and path.name == self.drop_test.chosen:
                return path
        routed = self.routed
        if routed is None:
            return max(paths, key=lambda path: (path.accuracy, -path.executions))
        executions = routed.executions
        return min(paths, key=lambda path: abs(path.executions - executions))

    @property
    def verdict(self) -> tuple[str, ...]:
        """The findings that stand first: on `compared`, then on the static path beside routers."""
        return self.findings[: 2 if self.routed and self.paths else 1]

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the file beside its findings, one sentence each."""
        if self.choice is msgspec.UNSET or self.choice is None:
            return []
        return [certificate_ignored(self.drllm_version)]

    def is_healed(self, name: str) -> bool:
        """Tell whether a system is a static path that runs with an adapter."""
        return any(step.adapter for step in self.paths.get(name, ()))

    def called(self, system: System) -> str:
        """Return what a system is called in a sentence."""
        if system.name not in self.paths:
            return system.name
        if self.is_healed(system.name):
            return f"healed path {system.name}"
        return f"path {system.name}"

    @property
    def score(self) -> str:
        """What is averaged over the questions, in words."""
        return self.metric if self.is_graded else "accuracy"

    @property
    def is_graded(self) -> bool:
        """Whether answers have grades in between, so that none is simply right or wrong."""
        compared = self.compared
        if compared is None or compared.against_base is None or compared.draws > 1:
            return False
        return compared.against_base.accuracy.won is None

    def system(self, name: str) -> System | None:
        """Return the system of that name, if it was evaluated."""
        return next((system for system in self.systems if system.name == name), None)


class SampleOutcome(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One system's outcome on one question; `decisions` is None where draws are averaged.

    `answer` is the option chosen, from 0, or the text generated; known of base and routed alone.
    """

    correct: float
    gold_logprob: float | None
    decisions: Decisions | None = None
    answer: int | str | None = None

    def __post_init__(self) -> None:
        if self.decisions is not None:
            check_decisions(self.decisions)


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One test question with the outcome of every system (named with its setting)."""

    id: str
    task: str
    question: str
    choices: tuple[str, ...]
    gold: int | None
    systems: dict[str, SampleOutcome]

    def __post_init__(self) -> None:
        if self.gold is not None and not 0 <= self.gold < len(self.choices):
            raise ValueError(f"`gold` is {self.gold}, the question has {len(self.choices)} choices")
        for name, outcome in self.systems.items():
            if isinstance(outcome.answer, int) and not 0 <= outcome.answer < len(self.choices):
                raise ValueError(
                    f"{name!r} answered with option {outcome.answer}, the question has "
                    f"{len(self.choices)} choices"
                )


class Result(Evaluation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An evaluation with its samples, empty where these are absent."""

    samples: tuple[Sample, ...] = ()

    def routes(self) -> list[Decisions]:
        """Return the decisions that the routed model took on the questions, in their order."""
        outcomes = [each.systems[ROUTED] for each in self.samples if ROUTED in each.systems]
        return [outcome.decisions for outcome in outcomes if outcome.decisions]


def schema_of(path: Path) -> str:
    """Return the schema that a JSON file names; empty if it names none or can't be read."""
    try:
        return read_json(path, Version).schema
    except RecordError:
        return ""


class Results(tuple[Evaluation, ...]):
    """What `evaluate` returns: a result for each task, in order.

    `folder` has their files; it is None if they were never written.
    """

    folder: Path | None = None


def read_evaluation(path: Path) -> Evaluation:
    """Read one `eval/TASK.json`; a RecordError if it can't be trusted."""
    return read_form(path, Evaluation, EVALUATION_SCHEMA)


def read_form(path: Path, kind: type[T], schema: str) -> T:
    """Read a file of results; a RecordError for another schema, or for one that is too old."""
    version = read_json(path, Version)
    if version.schema != schema:
        raise RecordError(f"{path} says {version.schema!r}; expected {schema!r}; give another file")
    if version.schema_version < OLDEST:
        raise RecordError(
            f"{path} was written by drllm {version.drllm_version} in an older form (schema version "
            f"{version.schema_version}); make it again, or read it with that version"
        )
    return read_json(path, kind)


def results_in(folder: Path) -> list[Path]:
    """Return the files of an `eval` folder that can be results, in order of name."""
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if path.name != LATENCY_FILE and not path.name.endswith(".manifest.json")
    ]


def read_results(folder: Path) -> list[Result]:
    """Read every `TASK.json` of an `eval` folder, with its samples; none if it is missing."""
    samples_by_task = _read_samples(folder / SAMPLES_FILE)
    results: dict[str, Result] = {}
    for path in results_in(folder):
        evaluation = read_evaluation(path)
        if evaluation.task in results:
            raise RecordError(
                f"{path} holds task {evaluation.task!r}, and so does another file of {folder}; "
                f"keep one result a task"
            )
        samples = tuple(samples_by_task.get(evaluation.task, ()))
        _check_samples(path, evaluation, samples)
        values = msgspec.structs.asdict(evaluation)
        results[evaluation.task] = Result(**values, samples=samples)
    return list(results.values())


def _read_samples(file: Path) -> dict[str, list[Sample]]:
    """Read the samples by task; none if the file is missing."""
    samples: dict[str, list[Sample]] = {}
    if file.exists():
        for sample in read_records(file, Sample, "samples"):
            samples.setdefault(sample.task, []).append(sample)
    return samples


def _check_samples(path: Path, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
    """Refuse samples that the result can't have been computed from."""
    if samples and len(samples) != evaluation.num_questions:
        raise RecordError(
            f"{path} counts {evaluation.num_questions} questions, {SAMPLES_FILE} has "
            f"{len(samples)} of task {evaluation.task!r}; they are of different evaluations"
        )
    grades: dict[str, list[float]] = {}
    for sample in samples:
        for name, outcome in sample.systems.items():
            grades.setdefault(name, []).append(outcome.correct)
            if outcome.decisions and len(outcome.decisions) != evaluation.num_layers:
                raise RecordError(
                    f"{path.with_name(SAMPLES_FILE)}, question {sample.id!r}: {name!r} has "
                    f"{len(outcome.decisions)} decisions, {path.name} says "
                    f"{evaluation.num_layers} layers"
                )
    accuracies = {system.name: system.accuracy for system in evaluation.systems}
    accuracies |= {point.name: point.accuracy for point in evaluation.curve}
    for name, accuracy in accuracies.items():
        mean = statistics.fmean(grades.get(name, [accuracy]))
        if abs(mean - accuracy) > ACCURACY_TOLERANCE:
            raise RecordError(
                f"{path} gives {name!r} accuracy {accuracy}, {SAMPLES_FILE} gives {mean}; they are "
                f"of different evaluations"
            )


def refuse_twice(what: str, names: Sequence[str]) -> None:
    """Refuse a name that is there twice, by a ValueError."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is there twice")


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One system reading (`prefill`) or decoding a batch, once a round.

    Tokens are those of one timing, over all rows; executions the mean of a forward pass.
    """

    system: str
    phase: Literal["prefill", "decode"]
    batch_size: int
    num_tokens: int
    executions: float
    seconds: Annotated[tuple[Annotated[float, msgspec.Meta(gt=0)], ...], msgspec.Meta(min_length=1)]

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def place(self) -> tuple[str, int]:
        """Phase and batch size."""
        return self.phase, self.batch_size


class Timings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured times of several systems, which took turns in every round.

    Every prompt has `prompt_tokens`, and `new_tokens` are decoded in one timing, each row.
    """

    prompt_tokens: int
    new_tokens: int
    timings: tuple[Timing, ...]

    def __post_init__(self) -> None:
        names = [f"{timing.system}, {timing.phase}, {timing.batch_size}" for timing in self.timings]
        refuse_twice("timing", names)
        if len({len(timing.seconds) for timing in self.timings}) > 1:
            raise ValueError("`timings` don't hold as many rounds of every system")

    @property
    def num_rounds(self) -> int:
        """The number of rounds."""
        return len(self.timings[0].seconds)

    def of(self, system: str, phase: str, batch_size: int) -> Timing:
        """Return one timing; a KeyError if it wasn't measured."""
        for timing in self.timings:
            if timing.system == system and timing.place == (phase, batch_size):
                return timing
        raise KeyError((system, phase, batch_size))

    def ratio(self, above: str, below: str, phase: str, batch_size: int) -> list[float]:
        """Return how many times as long one system took as another, round by round."""
        numerators = self.of(above, phase, batch_size).seconds
        denominators = self.of(below, phase, batch_size).seconds
        return [a / b for a, b in zip(numerators, denominators, strict=True)]

    def labels(self) -> dict[tuple[str, int], str]:
        """Return the verdict on the routed model's time for each phase and batch size."""
        sizes = sorted({timing.batch_size for timing in self.timings})
        places = [(phase, size) for phase in (PREFILL, DECODE) for size in sizes]
        labels = judge_times([self.ratio(ROUTED, BASE, *place) for place in places])
        return dict(zip(places, labels, strict=True))


class Latency(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `eval/latency.json`; base and routed are always among the measured systems."""

    runtime: dict[str, Any]
    machine: str
    routers: str
    routers_sha256: str
    num_prompts: int
    systems: dict[str, str]
    measured: Timings

    def __post_init__(self) -> None:
        timings = self.measured.timings
        places = {timing.place for timing in timings}
        for name in (BASE, ROUTED):
            measured = {timing.place for timing in timings if timing.system == name}
            if not measured or measured != places:
                raise ValueError(f"no times of {name!r} in some phase or batch size")


def read_latency(folder: Path) -> Latency | None:
    """Read the measured times of an `eval` folder, None where there are none."""
    path = folder / LATENCY_FILE
    return read_form(path, Latency, LATENCY_SCHEMA) if path.is_file() else None
