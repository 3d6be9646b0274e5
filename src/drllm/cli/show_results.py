"""Prints the results of an evaluation, and the next steps after a run.

The sentences about the results are in the files of the evaluation; here they are only printed. This
module doesn't import torch.
"""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.text import Text

from drllm.cli.terminal import Terminal
from drllm.records import results
from drllm.records.latency import read_latency
from drllm.reporting.key_figures import describe_times
from drllm.reporting.next_steps import suggest_steps
from drllm.reporting.numbers import NONE, write_difference, write_label, write_number, write_signed
from drllm.reporting.run import Run
from drllm.statistics.differences import LABEL_MEANINGS


def show_results(folder: Path, terminal: Terminal, tasks: Sequence[str] = ()) -> None:
    """Print the tables of an `eval` folder, its findings, and its test of a drop in accuracy.

    Args:
        folder: The folder.
        terminal: Where the tables are printed.
        tasks: The tasks to print; empty for all tasks. The test of a drop always covers all tasks.
    """
    evaluations = results.read_results(folder)
    for evaluation in evaluations:
        if not tasks or evaluation.task in tasks:
            show_evaluation(evaluation, terminal)
            show_findings(evaluation, terminal)
    show_latency(folder, terminal)
    show_drop_test(evaluations, terminal)


def show_drop_test(evaluations: Sequence[results.Evaluation], terminal: Terminal) -> None:
    """Print the result of the test of a drop in accuracy once, since it covers all tasks."""
    for evaluation in evaluations:
        if evaluation.drop_test is not None:
            terminal.say(evaluation.drop_test.sentence())
            return


def show_summary(
    evaluations: Sequence[results.Evaluation], folder: Path, terminal: Terminal
) -> None:
    """Print headlines, tables, times and the test of a drop, and how to see all numbers.

    Args:
        evaluations: The results of each task.
        folder: The folder with the results.
        terminal: Where everything is printed.
    """
    for evaluation in evaluations:
        show_evaluation(evaluation, terminal)
    show_latency(folder, terminal)
    show_drop_test(evaluations, terminal)
    if evaluations:
        terminal.fact("all tests", shlex.join(["drllm", "show", str(folder)]))


def show_headlines(run: Run, terminal: Terminal) -> None:
    """Print what each task's results say to do."""
    for evaluation in run.evaluations:
        headline = evaluation.verdict
        if headline and len(run.evaluations) > 1:
            headline = f"{evaluation.task}: {headline}"
        if headline:
            terminal.say(headline)


def show_next_steps(run: Run, terminal: Terminal) -> None:
    """Print what is worth doing after a run, with commands to paste."""
    for step, command in suggest_steps(run):
        terminal.say()
        terminal.say(step)
        terminal.command(command)


def show_latency(folder: Path, terminal: Terminal) -> None:
    """Print the measured times in an `eval` folder, if there are any."""
    latency = read_latency(folder)
    if latency is not None:
        terminal.say(describe_times(latency))


def show_evaluation(evaluation: results.Evaluation, terminal: Terminal) -> None:
    """Print one task's headline, its tables and its notes."""
    terminal.say(f"{evaluation.task}, {evaluation.split}: {evaluation.num_questions} questions")
    if evaluation.verdict:
        terminal.say(evaluation.verdict)
        terminal.say()
    score_columns = f"layers\nrun|{evaluation.score}\n%|minus base's\n(95 % interval)|token\nloss"
    terminal.table(
        f"system|{score_columns}|verdict",
        [_make_system_row(system, evaluation) for system in evaluation.systems],
        title=_write_caption(evaluation),
        numbers_from=1,
    )
    _show_labels(evaluation, terminal)
    if evaluation.paths and evaluation.routed is None:
        _show_descriptions(evaluation, terminal)
    if any(point.setting for point in evaluation.curve):
        terminal.table(
            f"depth|system|{score_columns}",
            _make_depth_rows(evaluation.curve),
            title="at other depths; next-token loss minus base's",
            numbers_from=2,
        )
    for note in evaluation.notes:
        terminal.say(note)


def _show_labels(evaluation: results.Evaluation, terminal: Terminal) -> None:
    """Print what the labels in the table mean, where it isn't plain."""
    verdicts = [system.against_base for system in evaluation.systems if system.against_base]
    labels = dict.fromkeys(differences.accuracy.label for differences in verdicts)
    for name in labels:
        if name in LABEL_MEANINGS:
            terminal.beside(f" {name}", LABEL_MEANINGS[name], 11)
    terminal.say()


def _show_descriptions(evaluation: results.Evaluation, terminal: Terminal) -> None:
    """Print what base and each path are."""
    width = max(len(system.name) for system in evaluation.systems) + 1
    for system in evaluation.systems:
        terminal.beside(f" {system.name}", system.description, width + 1)
    terminal.say()


def show_findings(evaluation: results.Evaluation, terminal: Terminal) -> None:
    """Print what the tests show in sentences; the test of a drop is printed elsewhere."""
    drop_test = evaluation.drop_test
    for sentence in evaluation.details:
        if drop_test is None or sentence != drop_test.sentence():
            terminal.say(sentence)


def _write_caption(evaluation: results.Evaluation) -> str:
    """Explain what the intervals exclude and whether several comparisons are corrected for."""
    correction = "not corrected for the number of rows"
    if evaluation.routed is None and len(evaluation.paths) > 1:
        correction = "corrected for the number of paths"
    if evaluation.is_graded:  # an interval of grades may have no width
        return (
            f"95 % intervals; the loss that is excluded may be larger than they say; {correction}"
        )
    return f"losses beyond the interval are excluded (95 %); {correction}"


def _make_system_row(system: results.System, evaluation: results.Evaluation) -> list[Text]:
    """Return the cells of a system, in bold if the headline is about the system."""
    headline_system = evaluation.headline_system
    is_in_headline = headline_system is not None and system.name == headline_system.name
    accuracy_difference = None
    if system.against_base is not None:
        accuracy_difference = system.against_base.accuracy
    cells = [
        evaluation.name_in_table(system),
        write_number(system.executions, 2),
        write_number(100 * system.accuracy),
        write_difference(accuracy_difference),
        write_number(system.text_loss, 3),
        write_label(accuracy_difference),
    ]
    style = "bold" if is_in_headline else ""
    return [Text(cell, style=style) for cell in cells]


def _make_depth_rows(curve: Sequence[results.Point]) -> Iterator[list[str]]:
    """Yield the cells of every system at every depth, and an empty row after each depth."""
    depths = list(dict.fromkeys(point.setting for point in curve if point.setting))
    for depth in depths:
        points = [point for point in curve if point.setting == depth]
        name = depth  # only in the first row of the depth
        for point in points:
            yield [name, *_make_point_cells(point)]
            name = ""
        yield []


def _make_point_cells(point: results.Point) -> list[str]:
    """Return the cells of one system at one depth, compared with the base model."""
    accuracy = NONE
    text_loss = NONE
    if point.against_base is not None:
        accuracy = write_difference(point.against_base.accuracy)
        if point.against_base.text_loss is not None:
            text_loss = write_signed(point.against_base.text_loss.mean)
    return [
        point.system,
        write_number(point.executions, 2),
        write_number(100 * point.accuracy),
        accuracy,
        text_loss,
    ]
