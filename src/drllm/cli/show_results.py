"""The results of an evaluation as people read them: systems, depths, findings, measured time.

The tables fit 80 columns. What is claimed are the evaluation's own findings and verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drllm.cli.terminal import Terminal, new_table
from drllm.records.latency import read_latency
from drllm.records.results import Evaluation, read_results
from drllm.reporting.cost import measured_lines
from drllm.reporting.evaluated import against, label
from drllm.reporting.numbers import NBSP, NONE, p_value, plain, signed
from drllm.statistics.verdicts import Verdict


def show_results(folder: Path, terminal: Terminal, tasks: Sequence[str] = ()) -> None:
    """Print the tables of an `eval` folder: of some tasks, or of all.

    Raises:
        RecordError: A result that can't be trusted.
    """
    for evaluation in read_results(folder):
        if not tasks or evaluation.task in tasks:
            show_evaluation(evaluation, terminal)
    show_measured(folder, terminal)


def show_measured(folder: Path, terminal: Terminal) -> None:
    """Print the measured times of an `eval` folder, where it holds any.

    Raises:
        RecordError: Times that can't be trusted.
    """
    measured = read_latency(folder)
    for line in [] if measured is None else measured_lines(measured):
        terminal.say(line.replace(NBSP, " "))


def show_evaluation(evaluation: Evaluation, terminal: Terminal) -> None:
    """Print one task's tables and what they do and don't show."""
    _systems(evaluation, terminal)
    if evaluation.curve:
        _depths(evaluation, terminal)
    for finding in evaluation.findings:
        terminal.say(finding.replace(NBSP, " "))


def _systems(evaluation: Evaluation, terminal: Terminal) -> None:
    columns = ["system", f"{evaluation.score}\n%", "95 %\ninterval", "layers\nrun"]
    columns += ["gold\nlog-p.", "text\nloss", "p vs\nbase", "routed\nis"]
    table = new_table(
        *columns,
        title=f"{evaluation.task}, {evaluation.split}: {evaluation.num_questions} questions, "
        f"{evaluation.num_layers} layers",
        numbers_from=1,
    )
    for system in evaluation.systems:
        low, high = (plain(100 * end) for end in system.interval)
        found = system.against_base
        table.add_row(
            system.name + (f" ({system.draws} draws)" if system.draws > 1 else ""),
            plain(100 * system.accuracy),
            f"{low}–{high}",
            plain(system.executions, 2),
            plain(system.gold_logprob, 3),
            plain(system.text_loss, 3),
            p_value(found.accuracy.p if found else None).replace(NBSP, ""),
            label(against(system)),
        )
    terminal.show(table)


def _depths(evaluation: Evaluation, terminal: Terminal) -> None:
    table = new_table(
        "depth",
        "system",
        "layers\nrun",
        f"{evaluation.score}\n%",
        "less base's\n95 % interval",
        "gold\nlog-p.",
        "text\nloss",
        title="at other depths; gold log-probability and text loss less base's",
        numbers_from=2,
    )
    settings = list(dict.fromkeys(point.setting for point in evaluation.curve if point.setting))
    for setting in settings:
        points = [point for point in evaluation.curve if point.setting == setting]
        for point in points:
            found = point.against_base
            table.add_row(
                setting if point is points[0] else "",
                point.system,
                plain(point.executions, 2),
                plain(100 * point.accuracy),
                _ends(found.accuracy if found else None),
                signed(found.gold_logprob.mean) if found and found.gold_logprob else NONE,
                signed(found.text_loss.mean) if found and found.text_loss else NONE,
                end_section=point is points[-1],
            )
    terminal.show(table)


def _ends(found: Verdict | None) -> str:
    if found is None:
        return NONE
    return " to ".join(signed(100 * end, 1) for end in found.interval)
