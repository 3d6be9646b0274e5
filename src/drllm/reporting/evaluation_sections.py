"""The sections of a report on an evaluation: plot, systems, limits on the loss, and routes.

Every claim is a finding of the evaluation or the label of a verdict; nothing is judged here.
Axes: L layers.
"""

from collections.abc import Sequence
from functools import partial

from drllm.paths import Decision, Decisions, num_executions
from drllm.records import results
from drllm.reporting.accuracy_figure import STATIC, draw_accuracy
from drllm.reporting.changed_questions import changed_questions_section
from drllm.reporting.document import Figure, Section
from drllm.reporting.figures import draw_routes
from drllm.reporting.markdown import Markdown, write_list, write_paragraph
from drllm.reporting.numbers import write_count, write_number, write_percent
from drllm.reporting.path_figure import can_draw_paths, draw_paths
from drllm.reporting.run import Run
from drllm.reporting.tables import (
    NamedSystem,
    compared_table,
    depths_table,
    results_table,
    systems_table,
)
from drllm.statistics.exclusion import DropTest
from drllm.supervision.summary import class_counts


def build_sections(run: Run, evaluation: results.Result) -> list[Section]:
    """Build the sections with the plot, the systems, limits on the loss, and routes."""
    if can_draw_paths(evaluation):
        first = Section("What each path keeps", [_build_paths_figure(evaluation)])
    else:
        first = Section("Accuracy over layers run", [_build_accuracy_figure(evaluation)])
    parts = [first, Section("Systems", _build_systems_blocks(evaluation))]
    if evaluation.drop_test is not None:
        parts.append(Section("Limits on the loss", _build_drop_test_blocks(evaluation.drop_test)))
    routes = evaluation.routes()
    if routes:
        parts.append(Section("Routes by layer", [_build_routes_figure(run, routes)]))
    needed_systems = {results.BASE, results.ROUTED}
    samples = [sample for sample in evaluation.samples if needed_systems <= sample.systems.keys()]
    if samples:
        parts.append(changed_questions_section(evaluation, samples))
    return parts


def _build_systems_blocks(evaluation: results.Evaluation) -> list[Markdown]:
    """Build the table of systems, and the notes on the task and its systems."""
    blocks = [results_table(evaluation)]
    if evaluation.notes:
        blocks.append(write_list(evaluation.notes))
    return blocks


def _build_drop_test_blocks(drop_test: DropTest) -> list[Markdown]:
    """Build a sentence on whether a loss is excluded, and a list of all trials."""
    lines = [f"{trial.name}: {trial.reason() or 'passes'}." for trial in drop_test.trials]
    if drop_test.untested:
        lines.append(f"Not tested after a failure: {', '.join(drop_test.untested)}.")
    return [write_paragraph(drop_test.sentence()), write_list(lines)]


def _build_accuracy_figure(evaluation: results.Evaluation) -> Figure:
    """Build the figure of the accuracy of every system over the layers it runs."""
    points = ", ".join(
        f"{system.name} {write_percent(system.accuracy)} at {write_number(system.executions, 2)}"
        for system in evaluation.systems
    )
    is_static = bool(evaluation.paths) and not evaluation.routed
    compared = STATIC if is_static else results.ROUTED
    caption = (
        f"Higher is better, further left is cheaper. Bars are 95 % intervals of base and "
        f"{compared}; the horizontal line is base's accuracy"
    )
    if any(point.setting for point in evaluation.curve):
        caption += "; lines join a system's depths"
    if evaluation.paths:
        caption += f"; a line from base joins static paths: {', '.join(evaluation.paths)}"
    return Figure(
        draw=partial(draw_accuracy, evaluation),
        name=f"{evaluation.task} systems",
        alt=f"{evaluation.score.capitalize()} over layers run a forward pass: {points}.",
        caption=f"{caption}.",
        is_large=True,
    )


def _build_paths_figure(evaluation: results.Evaluation) -> Figure:
    """Build the figure of the accuracy and the next-token loss of base and every path."""
    points = ", ".join(
        f"{system.name} {write_percent(system.accuracy)} and "
        f"{write_number(system.text_loss, 2)} nats"
        for system in evaluation.systems
    )
    return Figure(
        draw=partial(draw_paths, evaluation),
        name=f"{evaluation.task} paths",
        alt=f"{evaluation.score.capitalize()} and next-token loss: {points}.",
        caption=(
            "Bars are 95 % intervals: of each accuracy, and of each loss beside base's on the same "
            "texts. The dotted lines are base's numbers."
        ),
        is_large=True,
    )


def build_details(evaluation: results.Evaluation) -> list[Section]:
    """Build the folded sections: findings in sentences, the systems, and all depths in numbers."""
    parts: list[Section] = []
    findings = _list_findings(evaluation)
    if findings:
        parts.append(Section("Findings in sentences", [write_list(findings)], folded=True))
    parts.append(Section("What the systems are", [systems_table(evaluation)], folded=True))
    if any(point.setting for point in evaluation.curve):
        parts.append(Section("All depths in numbers", [depths_table(evaluation)], folded=True))
    return parts


def _list_findings(evaluation: results.Evaluation) -> list[str]:
    """Return the findings without the sentence on the limits, which has its own section."""
    drop_test = evaluation.drop_test
    drop_sentence = drop_test.sentence() if drop_test else None
    return [finding for finding in evaluation.details if finding != drop_sentence]


def compare_side_by_side(
    what: str, named: Sequence[tuple[str, results.Evaluation]], caption: str
) -> Section:
    """Build the section that compares base, the routed model and paths of runs or tasks.

    Args:
        what: "run" or "task".
        named: Evaluations by the name of their run or task.
        caption: The caption of the table.
    """
    rows: list[NamedSystem] = []
    for name, evaluation in named:
        names = {results.BASE, results.ROUTED, *evaluation.paths}
        systems = [system for system in evaluation.systems if system.name in names]
        points = [point for point in evaluation.curve if point.system == results.ROUTED]
        rows += [(name, evaluation, system) for system in systems]
        rows += [(name, evaluation, point) for point in points]
    return Section(f"{what.capitalize()}s compared", [compared_table(what, rows, caption)])


def _compute_shares(rows: Sequence[Decisions]) -> list[list[float]]:
    """Return the share of rows that skip, execute and repeat each layer: `[L][3]`."""
    shares: list[list[float]] = []
    for layer_counts in class_counts(rows):
        layer_shares = [number / len(rows) for number in layer_counts]
        shares.append(layer_shares)
    return shares


def _build_routes_figure(run: Run, routes: Sequence[Decisions]) -> Figure:
    """Build the figure of the routed model's decisions by layer, beside the targets' decisions."""
    shares = _compute_shares(routes)
    targets = [record.optimal_layer_config for record in run.supervision]
    target_shares = _compute_shares(targets) if targets else None
    num_distinct = len(set(routes))
    noun = "route" if num_distinct == 1 else "routes"
    mean = sum(num_executions(route) for route in routes) / len(routes)
    caption = (
        f"{write_count(num_distinct)} distinct {noun} on {write_count(len(routes))} questions, "
        f"{write_number(mean, 2)} layers run on average."
    )
    if targets:
        caption += " Strokes are what the routers were trained for."
    return Figure(
        draw=partial(draw_routes, shares, target_shares),
        name="routes by layer",
        alt=(
            f"How often each layer is skipped, executed and repeated. Skipped most: "
            f"{_list_most_skipped(shares)}."
        ),
        caption=caption,
        is_large=True,
    )


def _list_most_skipped(shares: Sequence[Sequence[float]]) -> str:
    """List the three layers that are skipped most often; `shares` is `[L][3]`."""
    skips = [layer_shares[Decision.SKIP] for layer_shares in shares]
    layers = sorted(range(len(skips)), key=lambda layer: -skips[layer])
    return ", ".join(f"{layer} ({write_percent(skips[layer], 0)})" for layer in layers[:3])
