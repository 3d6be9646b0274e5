"""The sections of a report on an evaluation: key figures, plot, systems, routes and questions.

Every claim is a finding of the evaluation or the label of a verdict; nothing is judged here. Only
measured values are called measured. `describe_times` is for `drllm show`. Axes: L layers.
"""

from collections.abc import Sequence
from functools import partial
from statistics import median

from drllm.cost import share_saved
from drllm.paths import Decision, Decisions, num_executions
from drllm.records import results
from drllm.reporting import figures
from drllm.reporting.costs import PHASES
from drllm.reporting.document import Figure, Section
from drllm.reporting.markdown import Markdown, Tile, write_list, write_paragraph, write_table
from drllm.reporting.numbers import NONE, count, percent, plain
from drllm.reporting.run import Run
from drllm.reporting.tables import (
    NamedSystem,
    compared_table,
    depths_table,
    results_table,
    systems_table,
)
from drllm.statistics.exclusion import DropTest
from drllm.statistics.verdicts import Verdict
from drllm.supervision.summary import class_counts

LONGEST = 120  # characters; longer questions and answers are cut off
ROWS = 5
"""Maximum number of won and of lost questions that are shown.

They are the first in the file, so that nobody chooses them.
"""


def build_tiles(evaluation: results.Evaluation, latency: results.Latency | None) -> list[Tile]:
    """Build the key figures: layers saved, differences from base, most accurate system, time."""
    compared = evaluation.compared_system
    if compared is None or compared.against_base is None:
        return [build_time_tile(latency)]
    name = evaluation.name_in_sentence(compared)
    score = evaluation.score if evaluation.is_graded else "Accuracy"
    title = f"{score}, {name} minus base"
    note = f"base {percent(evaluation.base.accuracy)}, {name} {percent(compared.accuracy)}"
    tiles = [
        _build_saved_tile(evaluation, compared),
        _build_difference_tile(title, compared.against_base.accuracy, "points", note),
    ]
    loss = compared.against_base.text_loss
    if loss is not None:
        title = f"Next-token loss, {name} minus base"
        note = "nats a token; less is better"
        tiles.append(_build_difference_tile(title, loss, "nats", note))
    best = find_most_accurate(evaluation)
    if best is not None and best is not compared:
        tiles.append(_build_most_accurate_tile(evaluation, best))
    tiles.append(build_time_tile(latency))
    return tiles


def find_most_accurate(evaluation: results.Evaluation) -> results.System | None:
    """Return the most accurate system that runs fewer layers than base; the cheapest wins a tie.

    Baselines that are means over draws are left out, since nobody can run a mean.
    """
    cheaper = [
        system
        for system in evaluation.systems
        if system.draws == 1 and system.executions < evaluation.num_layers
    ]
    return max(cheaper, key=lambda system: (system.accuracy, -system.executions), default=None)


def _build_saved_tile(evaluation: results.Evaluation, system: results.System) -> Tile:
    saved = share_saved(system.executions, evaluation.num_layers)
    title = "Layers saved" if saved >= 0 else "More layers run"
    note = f"{plain(system.executions, 2)} of {evaluation.num_layers} run a forward pass"
    return Tile(title, percent(abs(saved)), note)


def _build_most_accurate_tile(evaluation: results.Evaluation, system: results.System) -> Tile:
    title = f"Most accurate that saves layers: {evaluation.name_in_sentence(system)}"
    layers = f"{plain(system.executions, 2)} of {evaluation.num_layers} run"
    note = f"{layers}; base {percent(evaluation.base.accuracy)}"
    return Tile(title, percent(system.accuracy), note)


def _build_difference_tile(title: str, verdict: Verdict, unit: str, note: str) -> Tile:
    """Build the tile of a difference, with its verdict and interval; the note comes last."""
    low, high = (verdict.write(end) for end in verdict.interval)
    value = f"{verdict.write(verdict.mean)} {unit}"
    return Tile(title, value, f"95 % interval {low} to {high}; {note}", verdict.label)


def build_sections(run: Run, evaluation: results.Result) -> list[Section]:
    """Build the sections with the plot, the systems, limits on the loss, routes and answers."""
    parts = [
        Section("Accuracy over layers run", [_build_accuracy_figure(evaluation)]),
        Section("Systems", _build_systems_blocks(evaluation)),
    ]
    if evaluation.drop_test is not None:
        parts.append(Section("Limits on the loss", _build_drop_test_blocks(evaluation.drop_test)))
    routes = evaluation.routes()
    if routes:
        parts.append(Section("Routes by layer", [_build_routes_figure(run, routes)]))
    needed_systems = {results.BASE, results.ROUTED}
    samples = [sample for sample in evaluation.samples if needed_systems <= sample.systems.keys()]
    if samples:
        blocks = _build_won_and_lost_blocks(evaluation, samples)
        parts.append(Section("Questions won and lost", blocks))
    return parts


def _build_systems_blocks(evaluation: results.Evaluation) -> list[Markdown]:
    """Build the table of systems, and a list of all findings that aren't elsewhere in the report.

    The main findings are at the top, and the sentence on the limits has its own section.
    """
    blocks = [results_table(evaluation)]
    drop_test = evaluation.drop_test
    drop_sentence = drop_test.sentence() if drop_test else None
    num_main = len(evaluation.verdict)
    lines = [finding for finding in evaluation.findings[num_main:] if finding != drop_sentence]
    lines += evaluation.notes
    if lines:
        blocks.append(write_list(lines))
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
        f"{system.name} {percent(system.accuracy)} at {plain(system.executions, 2)}"
        for system in evaluation.systems
    )
    is_static = bool(evaluation.paths) and not evaluation.routed
    compared = figures.STATIC if is_static else results.ROUTED
    caption = (
        f"Higher is better, further left is cheaper. Bars are 95 % intervals of base and "
        f"{compared}; the horizontal line is base's accuracy"
    )
    if any(point.setting for point in evaluation.curve):
        caption += "; lines join a system's depths"
    if evaluation.paths:
        caption += f"; a line from base joins static paths: {', '.join(evaluation.paths)}"
    return Figure(
        draw=partial(figures.draw_accuracy, evaluation),
        name=f"{evaluation.task} systems",
        alt=f"{evaluation.score.capitalize()} over layers run a forward pass: {points}.",
        caption=f"{caption}.",
        is_large=True,
    )


def build_details(evaluation: results.Evaluation) -> list[Section]:
    """Build the folded sections: what the systems are, and all depths in numbers."""
    parts = [Section("What the systems are", [systems_table(evaluation)], folded=True)]
    if evaluation.curve:
        parts.append(Section("All depths in numbers", [depths_table(evaluation)], folded=True))
    return parts


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
    skips = [layer_shares[Decision.SKIP] for layer_shares in shares]
    most_skipped = sorted(range(len(skips)), key=lambda layer: -skips[layer])[:3]
    skipped = ", ".join(f"{layer} ({percent(skips[layer], 0)})" for layer in most_skipped)
    num_distinct = len(set(routes))
    noun = "route" if num_distinct == 1 else "routes"
    mean = sum(num_executions(route) for route in routes) / len(routes)
    caption = (
        f"{count(num_distinct)} distinct {noun} on {count(len(routes))} questions, "
        f"{plain(mean, 2)} layers run on average."
    )
    if targets:
        caption += " Strokes are what the routers were trained for."
    return Figure(
        draw=partial(figures.draw_routes, shares, target_shares),
        name="routes by layer",
        alt=f"How often each layer is skipped, executed and repeated. Skipped most: {skipped}.",
        caption=caption,
        is_large=True,
    )


def _grade_change(sample: results.Sample) -> float:
    """Return how routing changes the grade of a question: above 0 it is won, below 0 it is lost."""
    return sample.systems[results.ROUTED].correct - sample.systems[results.BASE].correct


def _build_won_and_lost_blocks(
    evaluation: results.Result, samples: Sequence[results.Sample]
) -> list[Markdown]:
    """Say how many questions change with routing, and list the first of them in a table."""
    won = [sample for sample in samples if _grade_change(sample) > 0]
    lost = [sample for sample in samples if _grade_change(sample) < 0]
    same = [sample for sample in samples if _grade_change(sample) == 0]
    if evaluation.is_graded:
        unchanged = f"{count(len(same))} keep their grade"
    else:
        right = sum(sample.systems[results.BASE].correct >= 1 for sample in same)
        unchanged = f"{count(right)} stay right, {count(len(same) - right)} stay wrong"
    summary = write_paragraph(
        f"Of {count(len(samples))} questions {count(len(won))} are won (better with routing) and "
        f"{count(len(lost))} lost; {unchanged}."
    )
    first_samples = [*won[:ROWS], *lost[:ROWS]]
    if not first_samples:
        return [summary]
    caption = f"The first questions won and lost, at most {ROWS} of each."
    num_others = len(won) + len(lost) - len(first_samples)
    if num_others:
        caption += f" The others ({count(num_others)}) are in eval/samples.jsonl."
    words = "with routing|right answer|base|routed"
    header = f"question|{words}"
    rows = [_build_changed_row(sample) for sample in first_samples]
    return [summary, write_table(caption, header, rows, words)]


def _build_changed_row(sample: results.Sample) -> list[str]:
    """Return the cells of a question that is won or lost."""
    right_answer = NONE
    if sample.gold is not None:
        right_answer = _shorten(sample.choices[sample.gold])
    return [
        _shorten(sample.question),
        "won" if _grade_change(sample) > 0 else "lost",
        right_answer,
        _describe_answer(sample, results.BASE),
        _describe_answer(sample, results.ROUTED),
    ]


def _describe_answer(sample: results.Sample, system: str) -> str:
    """Write the answer of a system; if the answer isn't known, write its grade.

    An answer that is neither right nor wrong has its grade in brackets.
    """
    outcome = sample.systems[system]
    grade = _write_grade(outcome.correct)
    if outcome.answer is None:
        return grade
    text = outcome.answer
    if isinstance(text, int):
        text = sample.choices[text]
    answer = _shorten(text) or "nothing"
    is_between = 0 < outcome.correct < 1
    return f"{answer} ({grade})" if is_between else answer


def _write_grade(grade: float) -> str:
    if grade >= 1:
        return "right"
    if grade <= 0:
        return "wrong"
    return f"graded {plain(grade, 2)}"


def _shorten(text: str) -> str:
    """Write a text on one line; cut a long text between words."""
    line = " ".join(text.split())
    if len(line) <= LONGEST:
        return line
    return line[: LONGEST - 1].rsplit(" ", 1)[0] + " …"


def build_time_tile(latency: results.Latency | None) -> Tile:
    """Build the tile with the verdict on the measured times."""
    if latency is None:
        return Tile("Measured time", "not measured", "evaluate --latency measures it")
    timings = latency.measured
    verdicts = timings.judge()
    labels = list(verdicts.values())
    value = max(labels, key=labels.count)  # the most frequent verdict
    if labels.count(value) < len(labels):
        value = f"{value} in {labels.count(value)} of {len(labels)}"
    ratios: list[float] = []
    for phase, size in verdicts:
        round_ratios = timings.compute_ratios(results.ROUTED, results.BASE, phase, size)
        ratios.append(median(round_ratios))
    note = f"{plain(min(ratios), 2)} to {plain(max(ratios), 2)} times base's, by phase and batch"
    return Tile("Measured time", value, note)


def describe_times(latency: results.Latency) -> str:
    """Describe the verdicts on the measured times in one line."""
    timings = latency.measured
    by_verdict: dict[str, list[str]] = {}
    for (phase, size), verdict in timings.judge().items():
        ratio = median(timings.compute_ratios(results.ROUTED, results.BASE, phase, size))
        place = f"{PHASES[phase]} {count(size)} ({plain(ratio, 2)})"
        by_verdict.setdefault(verdict, []).append(place)
    verdicts = "; ".join(f"{name}: {', '.join(places)}" for name, places in by_verdict.items())
    return (
        f"Measured time, routed / base by rows of a batch, {timings.num_rounds} rounds of "
        f"{timings.prompt_tokens} tokens: {verdicts}."
    )
