"""The results of an evaluation: `eval/TASK.json` and `samples.jsonl`; `latency` has the times.

Evaluation writes these structs; reports and `drllm show` read them. `docs/formats.md` explains each
field. Values that can be computed from other values are properties, and aren't in the files.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from drllm.errors import RecordError
from drllm.paths import Decisions, check_decisions
from drllm.records.codec import Version, read_json
from drllm.records.manifest import Executions, NumLayers, check_runtime, read_records
from drllm.statistics.differences import Differences
from drllm.statistics.exclusion import DropTest
from drllm.statistics.headlines import (
    ROUTING,
    Candidate,
    prefers_routing,
    write_headline,
    write_headline_after_test,
    write_headline_of_two,
)
from drllm.statistics.ranges import Amount, Count, Share
from drllm.statistics.verdicts import apply_bonferroni

BASE = "base"
ROUTED = "routed"
PERMUTED = "permuted routes"
EVALUATION_SCHEMA = "drllm.evaluation"
SAMPLES_FILE = "samples.jsonl"
LATENCY_FILE = "latency.json"
OLDEST_VERSION = 2  # the oldest schema version of results that we read
ACCURACY_TOLERANCE = 5e-4
"""How far an accuracy may be from the mean over its samples; files may round to three digits."""

T = TypeVar("T", bound=msgspec.Struct)


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields at the beginning of every file of results. `new_manifest` makes them."""

    schema: str
    schema_version: Count
    drllm_version: str
    created: str
    model: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, str]
    libraries: dict[str, str]


class Flops(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The FLOPs of reading a prompt: for products with weights, and for attention."""

    weights: Amount
    attention: Amount


class Scores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of a system on a task's questions at one depth.

    `executions` is the mean over forward passes, in layer equivalents. Log-probabilities and losses
    are in nats, and intervals are 95 % intervals. `against_base` is the system minus base, and
    `routed_against` is the routed model minus the system.
    """

    accuracy: Share
    interval: tuple[float, float]
    executions: Executions
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


class System(Scores, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One system at the depth that the routers were trained for.

    `decode_executions` is the mean over generated tokens.
    """

    name: str
    description: str
    seconds: Amount
    draws: Count = 1
    source: str | None = None
    fitted_on: str | None = None
    reads_question: bool | None = None
    metrics: dict[str, float] = {}
    decode_executions: Executions | None = None
    prompt_flops: Flops | None = None
    kv_bytes_per_token: Amount | None = None
    unchanged_routes: Share | None = None


class Point(Scores, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One system at one depth. `setting` names the depth ("20 % saved"); it is empty for base."""

    system: str
    setting: str

    @property
    def name(self) -> str:
        """The name of the point in the samples: its system and setting."""
        return f"{self.system}, {self.setting}" if self.setting else self.system


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number under several seeds; `deviation` is None if there is only one seed."""

    mean: float
    lowest: float
    highest: float
    deviation: Amount | None
    num_seeds: Count

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise the values of one or more seeds."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(
            mean=statistics.fmean(values),
            lowest=min(values),
            highest=max(values),
            deviation=deviation,
            num_seeds=len(values),
        )


class Seeds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of several seeds' routers at one depth.

    `setting` names the depth. It is empty for the depth that the routers were trained for.
    `against_base` is the mean over the seeds minus base, and `against_permuted` is the mean minus
    permuted routes.
    """

    setting: str
    num_seeds: Count
    accuracy: Spread
    executions: Spread
    gold_logprob: Spread | None
    text_loss: Spread | None
    against_base: Differences
    against_permuted: Differences | None


class Evaluation(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `eval/TASK.json`. `systems` and `curve` begin with base; `curve` may be empty."""

    runtime: dict[str, Any]
    bypass: str | None = None  # its file; None in files of earlier versions
    task: str
    split: str
    kind: Literal["choices", "generated"]
    metric: str
    num_fewshot: Count
    num_questions: Count
    num_available: Count | None = None  # questions in the split; None in files of earlier versions
    not_asked: dict[str, str] = {}
    num_layers: NumLayers
    chance: Share
    routers: str | None = None
    routers_sha256: str | None = None
    paths: dict[str, tuple[Count, ...]] = {}
    other_seeds: dict[str, str] = {}
    systems: tuple[System, ...]
    curve: tuple[Point, ...] = ()
    seeds: tuple[Seeds, ...] = ()
    drop_test: DropTest | None = None
    # Files of earlier versions have the headline and the notes in the findings.
    headline: str = ""
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_runtime(self.runtime)
        names = [system.name for system in self.systems]
        refuse_duplicates("system", names)
        refuse_duplicates("point", [point.name for point in self.curve])
        if BASE not in names:
            listed = ", ".join(names) or "none"
            raise ValueError(f"no system {BASE!r} to compare with (there is: {listed})")

    @property
    def base(self) -> System:
        """The unchanged model; every result has it."""
        return next(system for system in self.systems if system.name == BASE)

    @property
    def routed(self) -> System | None:
        """The routed model, if it was evaluated."""
        return self.system(ROUTED)

    @property
    def compared_system(self) -> System | None:
        """The system that tables stress: the routed model if there is one, else the best path."""
        return self.routed or self.best_path

    @property
    def best_path(self) -> System | None:
        """The static path to compare first; None if there are no paths.

        This is the path that `--max-drop` chose. If it chose none, it is the path whose executions
        are nearest to the routed model's or, without a routed model, the first by `_rank_path`.
        """
        paths = [system for system in self.systems if system.name in self.paths]
        if not paths:
            return None
        for path in paths:
            if self.drop_test is not None and path.name == self.drop_test.chosen:
                return path
        routed = self.routed
        if routed is None:
            return max(paths, key=_rank_path)
        executions = routed.executions
        return min(paths, key=lambda path: abs(path.executions - executions))

    def write_headline(self) -> str:
        """Say in at most three sentences what to do; empty if nothing is compared with base."""
        candidate = self._make_candidate(self.headline_system)
        if self.drop_test is not None:
            return write_headline_after_test(self.drop_test, candidate)
        if candidate is None:
            return ""
        rivals = self._find_rivals()
        if rivals is None:
            return write_headline(candidate)
        return write_headline_of_two(*rivals)

    @property
    def headline_system(self) -> System | None:
        """The system that the headline says what to do with: the best path or the routed model.

        After a test of `--max-drop` it is the candidate that passed last, or was tested last. None
        if this is the routed model at another depth than that of training, which has no row.
        """
        if self.drop_test is not None:
            return self.system(self.drop_test.chosen or self.drop_test.trials[-1].name)
        rivals = self._find_rivals()
        if rivals is None:
            return self.compared_system
        return self.routed if prefers_routing(*rivals) else self.best_path

    def _find_rivals(self) -> tuple[Candidate, Candidate, Differences] | None:
        """Return the best path, the routed model and how they differ; None if one is missing."""
        path = self.best_path
        path_candidate = self._make_candidate(path)
        routed_candidate = self._make_candidate(self.routed)
        if path is None or path_candidate is None or routed_candidate is None:
            return None
        if path.routed_against is None:
            return None
        return path_candidate, routed_candidate, path.routed_against

    def _make_candidate(self, system: System | None) -> Candidate | None:
        """Return a system as a candidate for the headline; None if it isn't compared with base."""
        if system is None or system.against_base is None:
            return None
        name = self.name_in_sentence(system)
        if system.name == ROUTED:
            name = ROUTING
        against_base = system.against_base
        if self._is_picked(system):
            accuracy = apply_bonferroni(against_base.accuracy, len(self.paths))
            against_base = msgspec.structs.replace(against_base, accuracy=accuracy)
        return Candidate(
            name=name,
            executions=system.executions,
            num_layers=self.num_layers,
            against_base=against_base,
        )

    def _is_picked(self, system: System) -> bool:
        """Tell whether a path is compared because it is the best on these very questions."""
        return self.routed is None and self.drop_test is None and system.name in self.paths

    @property
    def verdict(self) -> str:
        """The headline, of files of earlier versions too."""
        return self.headline or self.write_headline()

    @property
    def details(self) -> tuple[str, ...]:
        """The findings without the headline, with which the findings of older files begin."""
        if self.headline:
            return self.findings
        num_headlines = 2 if self.routed and self.paths else 1
        return self.findings[num_headlines:]

    def name_in_table(self, system: System) -> str:
        """Return the name of a system for a table."""
        name = system.name
        if system.draws > 1:
            name += f" ×{system.draws}"
        return name

    def name_in_sentence(self, system: System) -> str:
        """Return the name of a system for a sentence ("path skip1")."""
        return f"path {system.name}" if system.name in self.paths else system.name

    @property
    def score(self) -> str:
        """The name of the score that is averaged over the questions."""
        return self.metric if self.is_graded else "accuracy"

    @property
    def is_graded(self) -> bool:
        """Whether answers have grades between right and wrong.

        Then the verdict on accuracies doesn't count won questions.
        """
        compared = self.compared_system
        if compared is None or compared.against_base is None or compared.draws > 1:
            return False
        return compared.against_base.accuracy.won is None

    def system(self, name: str) -> System | None:
        """Return the system with this name, or None if it wasn't evaluated."""
        return next((system for system in self.systems if system.name == name), None)


def _rank_path(path: System) -> tuple[bool, bool, float, float]:
    """Return the key by which static paths are compared; the best path has the largest.

    A path that isn't shown to answer worse than base comes first, then one whose text isn't shown
    to get worse, then the most accurate, then the cheapest.
    """
    answers_worse = False
    text_is_worse = False
    if path.against_base is not None:
        answers_worse = path.against_base.accuracy.is_better is False
        text_loss = path.against_base.text_loss
        text_is_worse = text_loss is not None and text_loss.is_better is False
    return not answers_worse, not text_is_worse, path.accuracy, -path.executions


class SampleOutcome(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One system's outcome on one question.

    `correct` is the grade of the answer, from 0 to 1. `decisions` is None for a mean over draws.
    `answer` is the number of the chosen option, from 0, or the generated text; only base and the
    routed model have an answer.
    """

    correct: Share
    gold_logprob: float | None
    decisions: Decisions | None = None
    answer: int | str | None = None

    def __post_init__(self) -> None:
        if self.decisions is not None:
            check_decisions(self.decisions)


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One test question, with the outcomes by `System.name` or `Point.name`.

    `gold` is the number of the right option, from 0; None if answers are generated.
    """

    id: str
    task: str
    question: str
    choices: tuple[str, ...]
    gold: int | None
    systems: dict[str, SampleOutcome]

    def __post_init__(self) -> None:
        if self.gold is not None and not 0 <= self.gold < len(self.choices):
            raise ValueError(
                f"`gold` is {self.gold}, but the question has {len(self.choices)} choices"
            )
        for name, outcome in self.systems.items():
            if isinstance(outcome.answer, int) and not 0 <= outcome.answer < len(self.choices):
                raise ValueError(
                    f"{name!r} answered with option {outcome.answer}, but the question has "
                    f"{len(self.choices)} choices"
                )


class Result(Evaluation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An evaluation with its samples, if there are any."""

    samples: tuple[Sample, ...] = ()

    def routes(self) -> list[Decisions]:
        """Return the routed model's decisions on the questions, in the order of the samples."""
        routes: list[Decisions] = []
        for sample in self.samples:
            outcome = sample.systems.get(ROUTED)
            if outcome is not None and outcome.decisions:
                routes.append(outcome.decisions)
        return routes


def read_schema(path: Path) -> str:
    """Read the schema that a JSON file names.

    Returns an empty text if the file names no schema or can't be read.
    """
    try:
        return read_json(path, Version).schema
    except RecordError:
        return ""


class Results(tuple[Evaluation, ...]):
    """What `evaluate` returns: one evaluation for each task, in order.

    `folder` holds the files of the evaluations; it is None if nothing was written.
    """

    folder: Path | None = None


def read_evaluation(path: Path) -> Evaluation:
    """Read one `eval/TASK.json`; raise RecordError if the file can't be trusted."""
    return read_result_file(path, Evaluation, EVALUATION_SCHEMA)


def read_result_file(path: Path, kind: type[T], schema: str) -> T:
    """Read a file of results; raise RecordError for another schema or a version that is too old."""
    version = read_json(path, Version)
    if version.schema != schema:
        raise RecordError(
            f"{path} has the schema {version.schema!r}; expected {schema!r}; give another file"
        )
    if version.schema_version < OLDEST_VERSION:
        raise RecordError(
            f"{path} was written by drllm {version.drllm_version} in an older form (schema version "
            f"{version.schema_version}); make it again, or read it with that version"
        )
    return read_json(path, kind)


def list_possible_results(folder: Path) -> list[Path]:
    """List the files in an `eval` folder that may be results, sorted by name."""
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if path.name != LATENCY_FILE and not path.name.endswith(".manifest.json")
    ]


def holds_results(folder: Path) -> bool:
    """Tell whether the folder itself holds results, as the output folder of `evaluate` does.

    Any folder may hold JSON files. They count as results beside a file of samples, where a damaged
    result is an error, or if at least one of them says that it is a result.
    """
    files = list_possible_results(folder)
    if files and (folder / SAMPLES_FILE).is_file():
        return True
    return any(read_schema(file) == EVALUATION_SCHEMA for file in files)


def read_results(folder: Path) -> list[Result]:
    """Read every `TASK.json` in an `eval` folder, with its samples."""
    samples_by_task = _read_samples(folder / SAMPLES_FILE)
    results: dict[str, Result] = {}
    for path in list_possible_results(folder):
        evaluation = read_evaluation(path)
        if evaluation.task in results:
            raise RecordError(
                f"{path} holds task {evaluation.task!r}, and so does another file of {folder}; "
                f"keep one of the two"
            )
        samples = tuple(samples_by_task.get(evaluation.task, ()))
        _check_samples(path, evaluation, samples)
        values = msgspec.structs.asdict(evaluation)
        results[evaluation.task] = Result(**values, samples=samples)
    return list(results.values())


def _read_samples(file: Path) -> dict[str, list[Sample]]:
    """Read the samples by task; without the file there are no samples."""
    samples: dict[str, list[Sample]] = {}
    if file.exists():
        for sample in read_records(file, Sample, "samples"):
            samples.setdefault(sample.task, []).append(sample)
    return samples


def _check_samples(path: Path, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
    """Refuse samples that the result wasn't computed from."""
    if samples and len(samples) != evaluation.num_questions:
        raise RecordError(
            f"{path} counts {evaluation.num_questions} questions, but {SAMPLES_FILE} has "
            f"{len(samples)} of task {evaluation.task!r}; they are of different evaluations"
        )
    for sample in samples:
        _check_num_layers(path, evaluation, sample)
    _check_accuracies(path, evaluation, samples)


def _check_num_layers(path: Path, evaluation: Evaluation, sample: Sample) -> None:
    """Refuse a sample whose decisions are for another number of layers."""
    for name, outcome in sample.systems.items():
        if outcome.decisions and len(outcome.decisions) != evaluation.num_layers:
            raise RecordError(
                f"{path.with_name(SAMPLES_FILE)}, question {sample.id!r}: {name!r} has "
                f"{len(outcome.decisions)} decisions, but {path.name} is of "
                f"{evaluation.num_layers} layers"
            )


def _check_accuracies(path: Path, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
    """Refuse accuracies that aren't the mean over the samples."""
    grades: dict[str, list[float]] = {}
    for sample in samples:
        for name, outcome in sample.systems.items():
            grades.setdefault(name, []).append(outcome.correct)
    accuracies = {system.name: system.accuracy for system in evaluation.systems}
    accuracies |= {point.name: point.accuracy for point in evaluation.curve}
    for name, accuracy in accuracies.items():
        mean = statistics.fmean(grades.get(name, [accuracy]))
        if abs(mean - accuracy) > ACCURACY_TOLERANCE:
            raise RecordError(
                f"{path} gives {name!r} accuracy {accuracy}, but {SAMPLES_FILE} gives {mean}; they "
                f"are of different evaluations"
            )


def refuse_duplicates(what: str, names: Sequence[str]) -> None:
    """Raise a ValueError if two names are equal."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{what} {name!r} is there twice")
