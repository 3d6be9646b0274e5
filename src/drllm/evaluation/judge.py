"""Judges the outcomes of an evaluation: makes the records of all tasks, and the samples.

A record has the table of systems, the curve over depths, the results of seeds, and the findings in
words. Tests are corrected for the number of tasks.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from drllm.config import EvaluateConfig
from drllm.evaluation.baselines.base import BASELINES, read_curve
from drllm.evaluation.findings import write_findings, write_notes
from drllm.evaluation.outcomes import SystemRun, TaskRuns
from drllm.evaluation.plan import name_depth
from drllm.evaluation.tables import DESCRIPTIONS, build_curve, build_table, compare_seeds
from drllm.records import results
from drllm.statistics.differences import Differences
from drllm.statistics.exclusion import DropTest, Limits, exclude_drop
from drllm.statistics.verdicts import apply_holm

SYSTEMS_WITH_ANSWERS = (results.BASE, results.ROUTED)
"""Systems whose answers are in the samples. The answers of all systems would be many texts."""
FIELDS_FROM_TASK = (
    "kind",
    "metric",
    "num_fewshot",
    "num_questions",
    "num_available",
    "not_asked",
    "chance",
)
"""Fields of an evaluation's record that are copied from the task."""


def judge_runs(
    runs: Sequence[TaskRuns], header: Mapping[str, Any], config: EvaluateConfig
) -> tuple[results.Evaluation, ...]:
    """Return the records of all tasks, with tests corrected for the number of tasks.

    Args:
        runs: The outcomes on each task.
        header: The fields that the records of all tasks share.
        config: The settings.
    """
    rivals: Collection[str] = ()
    if not header["routers"]:  # the findings begin with the best path
        rivals = header["paths"]
    tables = correct_tables([build_table(task_runs) for task_runs in runs], rivals)
    curves = []
    for task_runs, table in zip(runs, tables, strict=True):
        curves.append(build_curve(task_runs, table))
    names = [task_runs.rendered.task.name for task_runs in runs]
    drop_test = check_drop(
        dict(zip(names, tables, strict=True)), dict(zip(names, curves, strict=True)), config
    )
    evaluations = []
    for task_runs, table, curve in zip(runs, tables, curves, strict=True):
        evaluations.append(build_evaluation(task_runs, table, curve, header, drop_test))
    return tuple(evaluations)


class _ComparedRow(NamedTuple):
    """The index of a row in a table, and how the row's system differs from base."""

    table: list[results.System]
    row: int
    differences: Differences


def correct_tables(
    tables: Sequence[Sequence[results.System]], rivals: Collection[str] = ()
) -> list[list[results.System]]:
    """Correct the exact tests against base, since several tests are made.

    The tests of a system on all tasks are corrected together.

    Args:
        tables: The systems of each task.
        rivals: Names of the systems from which the best is picked. The tests of all these systems
            are corrected together.

    Returns:
        The tables with corrected tests.
    """
    corrected = [list(table) for table in tables]
    groups: defaultdict[str, list[_ComparedRow]] = defaultdict(list)
    for table in corrected:
        for row, system in enumerate(table):
            if system.against_base is None:
                continue
            group = system.name
            if system.name in rivals:
                group = ""  # the name of the group of all rivals
            groups[group].append(_ComparedRow(table, row, system.against_base))
    for rows in groups.values():
        verdicts = apply_holm([compared.differences.accuracy for compared in rows])
        for (table, row, differences), verdict in zip(rows, verdicts, strict=True):
            against_base = replace(differences, accuracy=verdict)
            table[row] = replace(table[row], against_base=against_base)
    return corrected


def check_drop(
    tables: Mapping[str, Sequence[results.System]],
    curves: Mapping[str, Sequence[results.Point]],
    config: EvaluateConfig,
) -> DropTest | None:
    """Test which systems lose less than `--max-drop`; return None without this setting.

    Args:
        tables: Name of a task → its systems.
        curves: Name of a task → the points of its curve.
        config: The settings.
    """
    if config.max_drop is None:
        return None
    depths = [name_depth(share) for share in read_curve(config.curve)]
    candidates = list_drop_candidates(tables, curves, depths)
    limits = Limits(max_drop=config.max_drop, max_loss_increase=config.max_loss_increase)
    return exclude_drop(candidates, limits)


def list_drop_candidates(
    tables: Mapping[str, Sequence[results.System]],
    curves: Mapping[str, Sequence[results.Point]],
    depths: Sequence[str] = (),
) -> dict[str, dict[str, Differences | None]]:
    """List the candidates of `--max-drop` in the order in which they are tested.

    The settings alone fix the order. The routed model comes first, at the depths of `--curve`, or
    at the depth of training without `--curve`. The paths follow in their own order.

    Args:
        tables: Name of a task → its systems.
        curves: Name of a task → the points of its curve.
        depths: The names of the depths of `--curve`, the fewest layers left out first.

    Returns:
        Name of a candidate → task → how the candidate differs from base. The difference is None if
        the candidate wasn't evaluated on the task, since the routers couldn't reach the depth.
    """
    candidates: dict[str, dict[str, Differences | None]] = {}
    for depth in depths:
        candidates[f"{results.ROUTED}, {depth}"] = dict.fromkeys(tables)
    for task, curve in curves.items():
        for point in curve:
            if point.name in candidates:
                candidates[point.name][task] = point.against_base
    for task, table in tables.items():
        for system in table:
            is_path = system.name not in DESCRIPTIONS and system.name not in BASELINES
            is_candidate = is_path or (system.name == results.ROUTED and not depths)
            if is_candidate and system.against_base is not None:
                by_task = candidates.setdefault(system.name, dict.fromkeys(tables))
                by_task[task] = system.against_base
    return candidates


def build_evaluation(
    runs: TaskRuns,
    table: Sequence[results.System],
    curve: Sequence[results.Point],
    header: Mapping[str, Any],
    drop_test: DropTest | None = None,
) -> results.Evaluation:
    """Return the record of the task.

    Args:
        runs: The outcomes on the task.
        table: The task's systems, with tests corrected by `correct_tables`.
        curve: The points of the task's curve.
        header: The fields that the records of all tasks share.
        drop_test: The test of `--max-drop`, over all tasks; None without `--max-drop`.
    """
    task = runs.rendered.task
    evaluation = results.Evaluation(
        **header,
        task=task.name,
        split=runs.config.split,
        **{name: getattr(task, name) for name in FIELDS_FROM_TASK},
        num_layers=runs.num_layers,
        systems=tuple(table),
        curve=tuple(curve),
        seeds=tuple(compare_seeds(runs, seeds) for seeds in runs.seeds),
        drop_test=drop_test,
    )
    return replace(
        evaluation,
        headline=evaluation.write_headline(),
        findings=tuple(write_findings(runs, evaluation)),
        notes=tuple(write_notes(runs, evaluation)),
    )


def build_samples(runs: TaskRuns) -> list[results.Sample]:
    """Return the sample of each question, with the outcome of every system."""
    examples = {example.id: example for example in runs.rendered.task.examples}
    samples = []
    for place, example_id in enumerate(runs.rendered.ids):
        example = examples[example_id]
        samples.append(
            results.Sample(
                id=example_id,
                task=example.task,
                question=example.question,
                choices=tuple(example.choices),
                gold=example.gold,
                systems={system.title: _read_outcome(system, place) for system in runs.systems},
            )
        )
    return samples


def _read_outcome(system: SystemRun, place: int) -> results.SampleOutcome:
    """Return a system's outcome on the question at a place."""
    gold_logprob = None
    if system.gold_logprob:
        gold_logprob = system.gold_logprob[place]
    decisions = None
    if len(system.routes) == 1:  # several draws have no common decisions
        decisions = tuple(system.routes[0][place])
    answer = None
    if system.answers and system.title in SYSTEMS_WITH_ANSWERS:
        answer = system.answers[place]
    return results.SampleOutcome(
        correct=system.correct[place],
        gold_logprob=gold_logprob,
        decisions=decisions,
        answer=answer,
    )
