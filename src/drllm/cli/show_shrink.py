"""Prints what `drllm shrink` measured: a table of the models, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from drllm.cli.terminal import Terminal
from drllm.records.shrink import ShrinkRecord, ShrunkModel, TaskScores, TextScores, read_shrink
from drllm.records.static_paths import FULL
from drllm.reporting.numbers import NONE, write_number, write_percent
from drllm.statistics.differences import Verdict
from drllm.statistics.exclusion import Limits


def show_shrink(file: Path, terminal: Terminal) -> None:
    """Print a `shrink.json`."""
    show_models(read_shrink(file), terminal)


def show_models(record: ShrinkRecord, terminal: Terminal) -> None:
    """Print a table of the models for each task and source of texts, then the verdict."""
    names = [*record.full.tasks, *record.full.texts]
    for name in names:
        columns = ["layers", "size", "text loss", "speed", "result"]
        if name in record.full.tasks:
            columns.insert(2, "accuracy")
        rows = [_make_row(record, model, name) for model in record.models]
        number = record.num_held_out.get(name)
        held_out = NONE if number is None else f"{number:,}"
        terminal.table("|".join(columns), rows, title=f"{name}, {held_out} held out")
    terminal.say(record.verdict)


def _make_row(record: ShrinkRecord, model: ShrunkModel, name: str) -> list[str]:
    """Return the cells of one model, on one task or source of texts."""
    cells = [str(len(model.layers)), f"{model.num_bytes / 1e6:,.0f} MB"]
    scores = model.tasks.get(name)
    if scores is not None:
        cells.append(_write_accuracy(scores, record.limits))
        cells.append(_write_loss(scores.text_loss, _read_text_verdict(scores)))
    else:
        cells.append(_write_text_scores(model.texts.get(name)))
    cells.append(NONE if model.speed is None else f"{model.speed:.2f}×")
    cells.append(_mark(record, model))
    return cells


def _write_accuracy(scores: TaskScores, limits: Limits | None) -> str:
    """Write an accuracy, and the interval of its difference from the full model's, in points."""
    accuracy = write_percent(scores.accuracy)
    if scores.against_full is None:
        return accuracy
    verdict = scores.against_full.accuracy
    low, high = verdict.interval
    max_drop = None if limits is None else limits.max_drop / 100
    return f"{accuracy} ({verdict.write(low, max_drop)} to {verdict.write(high)})"


def _read_text_verdict(scores: TaskScores) -> Verdict | None:
    return None if scores.against_full is None else scores.against_full.text_loss


def _write_text_scores(scores: TextScores | None) -> str:
    """Write the loss of a source of texts; a dash if a model's wasn't measured."""
    return NONE if scores is None else _write_loss(scores.loss, scores.against_full)


def _write_loss(loss: float | None, against_full: Verdict | None) -> str:
    """Write a next-token loss, and its difference from the full model's, in nats a token."""
    if against_full is None:
        return write_number(loss, 3)
    return f"{write_number(loss, 3)} ({against_full.write(against_full.mean)})"


def _mark(record: ShrinkRecord, model: ShrunkModel) -> str:
    """Say what became of a model: written, passed, failed or not tested."""
    if model.name == FULL:
        return ""
    if record.written is model:
        return "← written"
    results: Mapping[str, bool] = {trial.name: trial.passed for trial in record.trials}
    if model.name not in results:
        return "not tested"
    return "passed" if results[model.name] else "not passed"
