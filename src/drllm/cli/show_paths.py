"""Prints the static paths of `drllm tune`, and a healed path. This module doesn't import torch."""

from pathlib import Path

from drllm.cli.terminal import Terminal
from drllm.errors import RecordError
from drllm.records.healed import read_healed
from drllm.records.static_paths import read_paths
from drllm.reporting import path_sections


def show_paths(file: Path, terminal: Terminal) -> None:
    """Print the paths of a `paths.json`, task by task, and advice on them."""
    record = read_paths(file)
    for task in record.tasks:
        if task not in record.objective:
            raise RecordError(
                f"{file} names the task {task!r}, and its 'objective' has "
                f"{', '.join(record.objective)}; the file was changed, so tune again"
            )
        rows = path_sections.path_rows(record, task)
        title = f"{task}, objective {record.objective[task]}"
        terminal.table(path_sections.COLUMNS, rows, title=title, numbers_from=1)
        sentence = path_sections.compare_test_with_fit(record, task)
        if sentence:
            terminal.say(sentence)
    for path in record.paths[1:]:  # without the full path
        terminal.fact(path.name, path_sections.describe_path(record, path))
    for sentence in [*path_sections.advice(record), *record.notes]:
        terminal.say(sentence)
    terminal.fact("paths", file)


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
