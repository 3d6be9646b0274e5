"""The results that an evaluation left behind: `eval/TASK.json`.

Owns their reading and checking, also against the samples. Leaves the samples themselves to
`samples`, the curve and the choice in the file to `depths`, the other files of a run folder to
`run`, and all arithmetic to `summary`. What an older drllm didn't write is None or empty.
Axes: L layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drllm.errors import RecordError
from drllm.paths import Decisions
from drllm.records import sha256
from drllm.reporting.depths import (
    Choice,
    Differences,
    Point,
    Seeds,
    read_choice,
    read_curve,
    read_differences,
    read_seeds,
)
from drllm.reporting.fields import Fields, read_object, read_of_schema
from drllm.reporting.measured import LATENCY_FILE
from drllm.reporting.samples import BASE, ROUTED, Sample, Source, read_samples

PERMUTED = "permuted routes"
SCHEMA = "drllm.evaluation"
SAMPLES_FILE = "samples.jsonl"
ACCURACY_TOLERANCE = 5e-4
"""How far an accuracy may lie from that of its samples: files may round to three digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system's result on one task.

    Attributes:
        name: `base`, `routed`, or an baseline's name.
        description: What it is, in words.
        accuracy: Share of questions answered right; where answers are graded, the mean grade.
        interval: 95 % interval of the accuracy.
        executions: Mean layer executions a forward pass, in layer equivalents.
        gold_logprob: Mean log-probability of the right option among the options, in nats.
        seconds: Measured time of one draw.
        draws: Random draws that the numbers are means over.
        mcnemar_p: Exact McNemar test against base; None for base itself or without a test.
        won: Questions right here and wrong in base; None where draws are averaged.
        lost: Questions wrong here and right in base; None where draws are averaged.
        mcnemar_p_holm: The test's p-value corrected for several tasks; None with one task.
        source: Where an baseline comes from.
        fitted_on: What an baseline was fitted on.
        reads_question: Whether an baseline's decisions follow from the question.
        metrics: Means of all that the harness says of the answers.
        text_loss: Mean next-token loss on the questions' texts, in nats a token.
        decode_executions: Mean executions a generated token; None where options are scored.
        flops: Of reading a prompt, derived: products with weights, and attention; a mean over
            questions.
        kv_bytes: K/V kept for a token, derived; likewise.
        unchanged_routes: Share of questions that a permutation left their route.
        against_base: What the system has more than base.
        routed_against: What the routed model has more than the system.
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
    source: str | None = None
    fitted_on: str | None = None
    reads_question: bool | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    text_loss: float | None = None
    decode_executions: float | None = None
    flops: tuple[float, float] | None = None
    kv_bytes: float | None = None
    unchanged_routes: float | None = None
    against_base: Differences | None = None
    routed_against: Differences | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One `eval/TASK.json` with its rows of `eval/samples.jsonl` (none where that is absent).

    Attributes:
        kind: `choices` (options are scored) or `generated`.
        metric: The metric that counts.
        num_fewshot: Worked examples before each question.
        curve: Base, then the systems at other depths.
        choice: The certified choice, if one was asked for.
        not_compared: Methods that a reader will look for, and why they aren't compared.
        seeds: What routers of several seeds did, depth by depth; empty where there was one seed.
    """

    task: str
    split: str
    num_questions: int
    num_layers: int
    chance: float
    systems: tuple[System, ...]
    findings: tuple[str, ...]
    samples: tuple[Sample, ...]
    kind: str | None = None
    metric: str | None = None
    num_fewshot: int | None = None
    curve: tuple[Point, ...] = ()
    choice: Choice | None = None
    not_compared: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[Seeds, ...] = ()

    @property
    def base(self) -> System:
        """The untouched model; no result is read without it."""
        found = self.system(BASE)
        assert found is not None
        return found

    @property
    def routed(self) -> System | None:
        """The routed model, if it was evaluated."""
        return self.system(ROUTED)

    @property
    def baselines(self) -> tuple[System, ...]:
        """What the routed model is compared with beside base."""
        return tuple(each for each in self.systems if each.name not in (BASE, ROUTED))

    @property
    def above_chance(self) -> bool:
        """Whether base is shown to be better than guessing; if not, there is nothing to lose."""
        return self.base.interval[0] > self.chance

    @property
    def is_graded(self) -> bool:
        """Whether answers have grades in between, so that none is simply right or wrong."""
        routed = self.routed
        return routed is not None and routed.draws == 1 and routed.won is None

    @property
    def score(self) -> str:
        """What is averaged over the questions, in words."""
        return (self.metric or "score") if self.is_graded else "accuracy"

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


def results_folder(folder: Path) -> tuple[Path, str]:
    """Return where a folder's results lie, and how their place is named in it.

    `drllm run` writes `eval/`; `drllm evaluate` into a folder of its own, which is one too.
    """
    if not (folder / "eval").is_dir() and _results(folder):
        return folder, ""
    return folder / "eval", "eval/"


def _results(folder: Path) -> list[Path]:
    """Return the files of a folder that say that they are results."""
    return [
        path for path in _candidates(folder) if read_object(path).values.get("schema") == SCHEMA
    ]


def _candidates(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.json"))
    return [
        path
        for path in paths
        if path.name != LATENCY_FILE and not path.name.endswith(".manifest.json")
    ]


def read_evaluations(
    folder: Path, sources: list[Source], absent: list[str], prefix: str = "eval/"
) -> list[Evaluation]:
    """Read every result in a folder.

    Args:
        folder: May be missing.
        sources: Receives the files that were read.
        absent: Receives one line for each file or part that isn't there.
        prefix: Of the files' names in the two lists.

    Raises:
        RecordError: A file that can't be trusted, or samples of another evaluation.
    """
    paths = _candidates(folder)
    if not paths:
        absent.append(f"{prefix} holds no TASK.json: accuracy and routes can't be shown.")
        return []
    samples = read_samples(folder / SAMPLES_FILE, f"{prefix}{SAMPLES_FILE}", sources, absent)
    evaluations = [_evaluation(path, samples, sources, absent, prefix) for path in paths]
    tasks = [evaluation.task for evaluation in evaluations]
    for path, task in zip(paths, tasks, strict=True):
        if tasks.count(task) > 1:
            raise RecordError(
                f"{path} holds task {task!r}, and so does another file beside it; "
                f"keep one result a task"
            )
    return evaluations


def _evaluation(
    path: Path,
    samples: Mapping[str, list[tuple[str, Sample]]],
    sources: list[Source],
    absent: list[str],
    prefix: str,
) -> Evaluation:
    fields = read_of_schema(path, SCHEMA)
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
        kind=fields.optional_text("kind"),
        metric=fields.optional_text("metric"),
        num_fewshot=fields.optional_whole("num_fewshot"),
        curve=read_curve(fields.objects("curve")),
        choice=read_choice(fields.optional_object("choice")),
        not_compared=_words(fields.optional_object("not_compared")),
        seeds=read_seeds(fields.objects("seeds")),
    )
    if evaluation.kind is None:
        absent.append(
            f"{prefix}{path.name} is of an older drllm, which wrote no sources of baselines, no "
            f"comparison with them, no next-token loss and no depths."
        )
    _check_systems(path, evaluation)
    _check_samples(path, evaluation, [where for where, _ in placed])
    sources.append(Source(name=f"{prefix}{path.name}", sha256=sha256(path), manifest=fields.values))
    return evaluation


def _system(fields: Fields) -> System:
    low, high = fields.interval("interval")
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
        source=fields.optional_text("source"),
        fitted_on=fields.optional_text("fitted_on"),
        reads_question=_truth(fields, "reads_question"),
        metrics=fields.numbers("metrics"),
        text_loss=fields.optional_number("text_loss"),
        decode_executions=fields.optional_number("decode_executions"),
        flops=_flops(fields.optional_object("prompt_flops")),
        kv_bytes=fields.optional_number("kv_bytes_per_token"),
        unchanged_routes=fields.optional_number("unchanged_routes"),
        against_base=read_differences(fields.optional_object("against_base")),
        routed_against=read_differences(fields.optional_object("routed_against")),
    )


def _truth(fields: Fields, key: str) -> bool | None:
    value = fields.values.get(key)
    if value not in (True, False, None):
        raise RecordError(f"{fields.where}: {key!r} is {value!r}; expected true, false or null")
    return value


def _flops(fields: Fields | None) -> tuple[float, float] | None:
    return None if fields is None else (fields.number("weights"), fields.number("attention"))


def _words(fields: Fields | None) -> dict[str, str]:
    return {} if fields is None else {name: fields.text(name) for name in fields.values}


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
    means = {system.name: system.accuracy for system in evaluation.systems}
    means |= {point.name: point.accuracy for point in evaluation.curve}
    for name, accuracy in means.items():
        correct = [s.outcomes[name].correct for s in samples if name in s.outcomes]
        if correct and abs(sum(correct) / len(correct) - accuracy) > ACCURACY_TOLERANCE:
            raise RecordError(
                f"{path} gives {name!r} accuracy {accuracy}, samples.jsonl gives "
                f"{sum(correct) / len(correct)}; they are of different evaluations"
            )
