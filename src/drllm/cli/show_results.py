"""Results as people read them: systems, depths, findings, measured time; a sweep's settings.

The tables fit 80 columns; a file that can't be trusted is refused. What is claimed are the
evaluation's own findings and verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from drllm.cli.terminal import Terminal
from drllm.records.latency import read_latency
from drllm.records.results import Evaluation, Point, System, read_results
from drllm.reporting.cost import measured_lines
from drllm.reporting.evaluated import against, label
from drllm.reporting.numbers import NBSP, NONE, p_value, plain, signed
from drllm.reporting.sweeps import SweepResult, read_sweep_file
from drllm.statistics.verdicts import Differences


def show_results(folder: Path, terminal: Terminal, tasks: Sequence[str] = ()) -> None:
    """Print the tables of an `eval` folder: of some tasks, or of all."""
    for evaluation in read_results(folder):
        if not tasks or evaluation.task in tasks:
            show_evaluation(evaluation, terminal)
    show_measured(folder, terminal)


def show_measured(folder: Path, terminal: Terminal) -> None:
    """Print the measured times of an `eval` folder, where it holds any."""
    if measured := read_latency(folder):
        for line in measured_lines(measured):
            terminal.say(line.replace(NBSP, " "))


def show_evaluation(evaluation: Evaluation, terminal: Terminal) -> None:
    """Print one task's tables and what they do and don't show."""
    terminal.table(
        f"system|{evaluation.score}\n%|95 %\ninterval|layers\nrun|gold\nlog-p.|text\nloss"
        "|p vs\nbase|routed\nis",
        map(_system, evaluation.systems),
        title=f"{evaluation.task}, {evaluation.split}: {evaluation.num_questions} questions, "
        f"{evaluation.num_layers} layers",
        numbers_from=1,
    )
    if evaluation.curve:
        terminal.table(
            f"depth|system|layers\nrun|{evaluation.score}\n%|less base's\n95 % interval"
            "|gold\nlog-p.|text\nloss",
            _depths(evaluation.curve),
            title="at other depths; gold log-probability and text loss less base's",
            numbers_from=2,
        )
    for finding in evaluation.findings:
        terminal.say(finding.replace(NBSP, " "))


def _system(system: System) -> list[str]:
    low, high = (plain(100 * end) for end in system.interval)
    found = system.against_base
    return [
        system.name + (f" ({system.draws} draws)" if system.draws > 1 else ""),
        plain(100 * system.accuracy),
        f"{low}–{high}",
        plain(system.executions, 2),
        plain(system.gold_logprob, 3),
        plain(system.text_loss, 3),
        p_value(found.accuracy.p if found else None).replace(NBSP, ""),
        label(against(system)),
    ]


def _depths(curve: Sequence[Point]) -> Iterator[list[str]]:
    for setting in dict.fromkeys(point.setting for point in curve if point.setting):
        name = setting
        for point in curve:
            if point.setting == setting:
                numbers = plain(point.executions, 2), plain(100 * point.accuracy)
                ends = point.against_base.accuracy.interval if point.against_base else None
                between = " to ".join(signed(100 * end, 1) for end in ends) if ends else NONE
                yield [name, point.system, *numbers, between, *_losses(point.against_base)]
                name = ""
        yield []


def show_sweep(path: Path, terminal: Terminal) -> None:
    """Print the settings of a sweep side by side, and which one was chosen."""
    sweep = read_sweep_file(path)
    terminal.table(
        "setting|depth|seeds|layers\nrun|accuracy less\nbase's, points|gold log-p.\nless base's"
        "|text loss\nless base's",
        _settings(sweep),
        title=f"settings on {sweep.chosen_on}, means over seeds",
        numbers_from=2,
    )
    terminal.say(
        "No setting's routers can be brought to any of the depths: none is chosen."
        if sweep.chosen is None
        else f"Chosen on {sweep.chosen_on}: {sweep.chosen}, which keeps most of the gold answers' "
        f"log-probability (of accuracy where answers are generated) over all depths; other "
        f"questions test it once."
    )


def _settings(sweep: SweepResult) -> Iterator[list[str]]:
    several = len({place.task for each in sweep.settings for place in each.places}) > 1
    for each in sweep.settings:
        if not each.places:
            yield [each.name, "none reached", *[NONE] * 5]
        for number, place in enumerate(each.places):
            depth = f"{place.task}, {place.depth}" if several else place.depth
            accuracy = signed(100 * place.against_base.accuracy.mean, 1)
            numbers = str(place.num_seeds), plain(place.executions, 2), accuracy
            yield ["" if number else each.name, depth, *numbers, *_losses(place.against_base)]
        yield []


def _losses(found: Differences | None) -> list[str]:
    verdicts = (found.gold_logprob, found.text_loss) if found else (None, None)
    return [signed(verdict.mean if verdict else None) for verdict in verdicts]
