"""A report's order: result, tests, search, training, cost, provenance; several runs compared."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from drllm.records.results import BASE, ROUTED
from drllm.reporting import cost, depth, evaluated, learned, provenance, questions
from drllm.reporting.blocks import Block, Document, Section, Table, row_of
from drllm.reporting.numbers import NONE, percent, plain
from drllm.reporting.run import Run
from drllm.statistics.non_inferiority import Choice


def document(runs: Sequence[Run]) -> Document:
    """Lay out the report of one run, or of several with a comparison in front."""
    if len(runs) == 1:
        return Document(f"Layer routing report: {runs[0].name}", _run_sections(runs[0]))
    sections = [Section("Runs compared", _comparison(runs))]
    for number, run in enumerate(runs, start=1):
        sections += [Section(f"Run {number}: {run.name}", []), *_lower(_run_sections(run))]
    return Document(f"Layer routing report: {len(runs)} runs", sections)


def _run_sections(run: Run) -> list[Section]:
    sections = [Section("Result", evaluated.result(run))]
    examples: list[Section] = []
    several = len(run.evaluations) > 1
    for evaluation in run.evaluations:
        examples = questions.examples(evaluation)
        tested = [
            evaluated.systems(evaluation),
            *depth.sections(evaluation),
            *questions.sections(run, evaluation),
        ]
        if several:
            sections.append(Section(evaluation.task, evaluated.of_task(run, evaluation)))
            tested, examples = _lower([*tested, *examples]), []
        sections += tested
    sections += questions.routes_by_task(run.evaluations)
    if run.evaluations:
        sections += cost.sections(run.evaluations, run.latency)
    return [*sections, *learned.sections(run), *examples, provenance.section(run)]


def _lower(sections: Sequence[Section]) -> list[Section]:
    return [replace(section, level=section.level + 1) for section in sections]


def _comparison(runs: Sequence[Run]) -> list[Block]:
    named = [(f"{number}: {run.name}", run) for number, run in enumerate(runs, start=1)]
    tested = [(name, evaluation) for name, run in named for evaluation in run.evaluations]
    columns, rows = evaluated.SYSTEM_COLUMNS, []
    for name, run in named:
        cells = [
            [each.task, str(each.num_questions), *row_of(columns, system, each.num_layers)]
            for each in run.evaluations
            for system in each.systems
            if system.name in (BASE, ROUTED)
        ]
        unknown = [[NONE] * (len(columns) + 2)]
        rows += [[name, evaluated.model_words(run), *row] for row in cells or unknown]
    systems = Table(
        caption="Base and routed model of every run. Intervals of different runs say nothing about "
        "a difference between them where the questions differ.",
        header=("run", "model", "task", "questions", *columns),
        rows=rows,
        texts=(0, 1, 2, 4),
    )
    curves = Table(
        caption="The routed model of every run at other depths",
        header=("run", "task", *[*depth.CURVE_COLUMNS][1:]),
        rows=[
            [name, each.task, *row_of(depth.CURVE_COLUMNS, point, each.num_layers)[1:]]
            for name, each in tested
            for point in each.curve
            if point.system == ROUTED
        ],
        texts=(0, 1, 2),
    )
    limits = ("less than, points", "and less than, nats a token", "worked answers of")
    choices = Table(
        caption="The certified choice of every run",
        header=("run", "task", *limits, "confidence", "certified"),
        rows=[[name, each.task, *_choice(each.choice)] for name, each in tested],
        texts=(0, 1, 4, 6),
    )
    blocks: list[Block] = [systems]
    blocks += [curves] if any(each.curve for _, each in tested) else []
    blocks += [choices] if any(each.choice for _, each in tested) else []
    return blocks


def _choice(choice: Choice | None) -> list[str]:
    if choice is None:
        return [*[NONE] * 4, "not asked for"]
    kept = choice.certified
    return [
        f"{choice.limits.epsilon:g}",
        f"{choice.limits.max_loss_increase:g}",
        choice.worked_answers or "not looked at",
        percent(choice.limits.confidence, 0),
        f"{kept.name}, {plain(kept.executions, 2)} executions a forward" if kept else "none",
    ]
