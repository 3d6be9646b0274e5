"""A report's order: result, tests, search, training, cost, provenance; several runs compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from drllm.records.results import BASE, ROUTED, Result
from drllm.reporting import cost, depth, evaluated, learned, provenance, questions
from drllm.reporting.blocks import Block, Document, Section, Table
from drllm.reporting.numbers import NONE, percent, plain
from drllm.reporting.run import Run
from drllm.statistics.non_inferiority import Choice


def document(runs: Sequence[Run]) -> Document:
    """Lay out the report of one run, or of several with a comparison in front."""
    if len(runs) == 1:
        return Document(f"Layer routing report: {runs[0].name}", _run_sections(runs[0]))
    sections = [Section("Runs compared", _comparison(runs))]
    for number, run in enumerate(runs, start=1):
        sections.append(Section(f"Run {number}: {run.name}", []))
        sections += _lower(_run_sections(run))
    return Document(f"Layer routing report: {len(runs)} runs", sections)


def _run_sections(run: Run) -> list[Section]:
    sections = [Section("Result", evaluated.result(run))]
    several = len(run.evaluations) > 1
    for evaluation in run.evaluations:
        tested = _task_sections(run, evaluation)
        if several:
            sections.append(Section(evaluation.task, evaluated.of_task(run, evaluation)))
        sections += _lower(tested) if several else tested
    common = questions.routes_by_task(run.evaluations)
    sections += [] if common is None else [common]
    if run.evaluations:
        sections += cost.sections(run.evaluations, run.latency)
    sections += learned.sections(run)
    if not several:
        sections += _examples(run.evaluations)
    return [*sections, provenance.section(run)]


def _task_sections(run: Run, evaluation: Result) -> list[Section]:
    found = [
        evaluated.systems(evaluation),
        *depth.sections(evaluation),
        *questions.sections(run, evaluation),
    ]
    return [*found, *_examples([evaluation])] if len(run.evaluations) > 1 else found


def _examples(evaluations: Sequence[Result]) -> list[Section]:
    found = [questions.examples(evaluation) for evaluation in evaluations]
    return [section for section in found if section is not None]


def _lower(sections: Sequence[Section]) -> list[Section]:
    return [replace(section, level=section.level + 1) for section in sections]


# --- several runs ------------------------------------------------------------------------------


def _comparison(runs: Sequence[Run]) -> list[Block]:
    named = {f"{number}: {run.name}": run for number, run in enumerate(runs, start=1)}
    blocks: list[Block] = [_systems(named)]
    if any(evaluation.curve for run in runs for evaluation in run.evaluations):
        blocks.append(_curves(named))
    if any(evaluation.choice for run in runs for evaluation in run.evaluations):
        blocks.append(_choices(named))
    return blocks


def _systems(runs: dict[str, Run]) -> Table:
    rows = []
    for name, run in runs.items():
        model = evaluated.model_words(run)
        for evaluation in run.evaluations:
            rows += [
                [
                    name,
                    model,
                    evaluation.task,
                    str(evaluation.num_questions),
                    *evaluated.system_row(system, evaluation.num_layers),
                ]
                for system in evaluation.systems
                if system.name in (BASE, ROUTED)
            ]
        if not run.evaluations:
            blank = [NONE] * (len(evaluated.SYSTEM_COLUMNS) + 2)
            rows.append([name, model, *blank])
    return Table(
        caption="Base and routed model of every run. Intervals of different runs say nothing about "
        "a difference between them where the questions differ.",
        header=("run", "model", "task", "questions", *evaluated.SYSTEM_COLUMNS),
        rows=rows,
        texts=(0, 1, 2, 4),
    )


def _curves(runs: dict[str, Run]) -> Table:
    return Table(
        caption="The routed model of every run at other depths",
        header=("run", "task", *depth.CURVE_COLUMNS[1:]),
        rows=[
            [name, evaluation.task, *depth.point_row(point, evaluation.num_layers)[1:]]
            for name, run in runs.items()
            for evaluation in run.evaluations
            for point in evaluation.curve
            if point.system == ROUTED
        ],
        texts=(0, 1, 2),
    )


def _choices(runs: dict[str, Run]) -> Table:
    rows = [
        [name, evaluation.task, *_choice(evaluation.choice)]
        for name, run in runs.items()
        for evaluation in run.evaluations
    ]
    return Table(
        caption="The certified choice of every run",
        header=(
            "run",
            "task",
            "less than, points",
            "and less than, nats a token",
            "worked answers of",
            "confidence",
            "certified",
        ),
        rows=rows,
        texts=(0, 1, 4, 6),
    )


def _choice(choice: Choice | None) -> list[str]:
    if choice is None:
        return [NONE, NONE, NONE, NONE, "not asked for"]
    kept = choice.certified
    return [
        f"{choice.limits.epsilon:g}",
        f"{choice.limits.max_loss_increase:g}",
        choice.worked_answers or "not looked at",
        percent(choice.limits.confidence, 0),
        "none"
        if kept is None
        else f"{kept.name}, {plain(kept.executions, 2)} executions a forward",
    ]
