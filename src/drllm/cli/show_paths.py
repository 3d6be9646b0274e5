"""Prints the static paths of `drllm tune`, and a healed path. This module doesn't import torch."""

from collections.abc import Iterator
from pathlib import Path

from drllm.cli.terminal import Terminal
from drllm.records.healed import read_healed
from drllm.records.path_losses import describe_losses
from drllm.records.static_paths import TEST, NamedPath, PathScore, StaticPaths, read_paths
from drllm.reporting import path_sections
from drllm.reporting.numbers import (
    NONE,
    write_count,
    write_difference,
    write_executions,
    write_number,
    write_percent,
    write_signed,
)

COLUMNS = "path|layers|accuracy|minus full (95 %)|text loss"
UNGRADED_COLUMNS = "path|layers|objective|minus full (95 %)|text loss"


def show_paths(file: Path, terminal: Terminal) -> None:
    """Print the results of a `paths.json` on `test`, task by task, and what each path loses."""
    record = read_paths(file)
    for task in record.tasks:
        _print_table(record, task, terminal)
        sentence = path_sections.compare_test_with_fit(record, task)
        if sentence:
            terminal.say(sentence)
    for sentence in record.notes:
        terminal.say(sentence)
    shorter_paths = record.paths[1:]  # without the full path
    for path in shorter_paths:
        terminal.fact(path.name, path_sections.describe_path(record, path))
    terminal.fact("paths", file)
    for path in shorter_paths:
        for sentence in describe_losses(record, path):
            terminal.say(sentence, indent=2)


def _print_table(record: StaticPaths, task: str, terminal: Terminal) -> None:
    """Print the results of all paths on the test questions of a task."""
    full = record.paths[0].plain_on(task, TEST)
    if full is None:
        terminal.say(f"{task}: no scores on test questions")
        return
    if full.accuracy is None:
        columns = UNGRADED_COLUMNS
        objective = record.objective[task]
        quantity = f"objective {objective} in nats (more is better), its difference from full"
    else:
        columns = COLUMNS
        quantity = "accuracy, its difference from full in points"
    terminal.table(
        columns,
        _list_rows(record, task, full),
        title=f"{task}: {write_count(full.num_questions)} test questions, on which no path was "
        f"fitted or chosen; {quantity}, and next-token loss in nats a token (its difference from "
        f"full)",
        numbers_from=1,
    )


def _list_rows(record: StaticPaths, task: str, full: PathScore) -> Iterator[list[str]]:
    """Yield the row of each path. A path that was repaired has two: with its refit, and plain."""
    for path in record.paths:
        if path.repaired:
            yield _make_row(f"{path.name}, refit", path, path.on(task, TEST), full)
            yield _make_row(f"{path.name}, plain", path, path.plain_on(task, TEST), full)
        else:
            yield _make_row(path.name, path, path.plain_on(task, TEST), full)


def _make_row(name: str, path: NamedPath, score: PathScore | None, full: PathScore) -> list[str]:
    """Return the cells of one path with these scores."""
    layers = write_executions(path.executions)
    if score is None:
        return [name, layers, NONE, NONE, NONE]
    text_loss = _write_text_loss(score, full)
    if score.accuracy is None:
        change = path_sections.write_change(score)
        return [name, layers, write_number(score.objective, 3), change, text_loss]
    verdict = score.against_full.accuracy if score.against_full else None
    return [name, layers, write_percent(score.accuracy), write_difference(verdict), text_loss]


def _write_text_loss(score: PathScore, full: PathScore) -> str:
    """Write a next-token loss, and its difference from the full path's."""
    text_loss = write_number(score.text_loss, 3)
    if score is full or score.text_loss is None or full.text_loss is None:
        return text_loss
    return f"{text_loss} ({write_signed(score.text_loss - full.text_loss, 3)})"


def show_healed(file: Path, terminal: Terminal) -> None:
    """Print a healed path: its losses by source, and how it was repaired."""
    record = read_healed(file)
    terminal.table(
        path_sections.loss_columns(record),
        path_sections.loss_rows(record),
        title=path_sections.LOSS_CAPTION,
        numbers_from=1,
    )
    terminal.say(path_sections.describe_healing(record))
    plain_path = record.path.with_adapter("")  # the adapter is described below
    terminal.fact(record.name, plain_path.edits(record.num_layers))
    if record.refit is not None:
        terminal.fact("refit", ", ".join(record.refit.modules))
    if record.rank > 0:
        terminal.fact("adapter", f"rank {record.rank}, from layer {record.first_layer} on")
    terminal.fact("healed path", file.parent)
