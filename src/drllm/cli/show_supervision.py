"""Targets as people read them: what was found, what became of it, and why the others got none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.cli.terminal import Terminal
from drllm.paths import Decision
from drllm.records import (
    RejectedQuestion,
    read_json_lines,
    read_manifest,
    read_supervision,
    rejected_path,
)
from drllm.reporting.numbers import count, percent, plain
from drllm.supervision.summary import KINDS, summarise

LAYERS_NAMED = 5


def say_written(output: Path, summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print what a supervision has written and found."""
    terminal.fact("supervision", output)
    say_supervision(summary, terminal)
    if (rejected := rejected_path(output)).is_file():
        terminal.fact("reasons", rejected)


def say_supervision(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print a summary of `summarise`, or what an older version left of one in a manifest."""
    terminal.fact("base right", _share(summary["base_correct"], summary["questions"]))
    paths = summary.get("paths", {})
    for name in KINDS:
        before, after = f"{name}_before_retest", f"{name}_after_retest"
        of_paths = f"; {paths[after]} of {paths[before]} such paths" if before in paths else ""
        found = f"{summary[before]} questions, {summary[after]} after the re-test{of_paths}"
        terminal.fact(f"{name} path", found)
    mean = summary.get("executions")
    on_average = f", {plain(mean, 2)} executions on average" if mean is not None else ""
    terminal.fact("targets", _share(summary["targets"], summary["questions"]) + on_average)
    if len(tasks := summary.get("tasks", {})) > 1:
        names = ["questions", "base_correct", "saving_after_retest", "improving_after_retest"]
        names += ["targets", "improving_targets"]
        terminal.table(
            "task|questions|base right|saving,\nsurvived|improving,\nsurvived|targets"
            "|improving\ntargets",
            [[task, *(str(counts[name]) for name in names)] for task, counts in tasks.items()],
            numbers_from=1,
        )
    rejects = [f"{n} {reason}" for reason, n in summary["rejected"].items() if n]
    terminal.fact("without", ", ".join(rejects) or "none")
    if copies := summary.get("copies"):
        terminal.fact("copies", f"{copies} records, left out: each question counts once")
    _say_decisions(summary, terminal)


def _share(part: int, total: int) -> str:
    return f"{part} of {total} questions ({percent(part / total if total else None)})"


def say_classes(counts: Sequence[int], terminal: Terminal) -> None:
    """Print how many decisions skip, execute and repeat."""
    total = sum(counts) or 1
    shown = (f"{d.name.lower()} {counts[d]} ({percent(counts[d] / total)})" for d in Decision)
    terminal.fact("decisions", ", ".join(shown))


def _say_decisions(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Say what the targets decide, and which layers they skip and repeat most."""
    say_classes(summary["class_counts"], terminal)
    counts = summary.get("class_counts_by_layer", [])
    for decision, name in ((Decision.SKIP, "most skipped"), (Decision.REPEAT, "most repeated")):
        ranked = sorted(range(len(counts)), key=lambda layer: -counts[layer][decision])
        often = [(layer, counts[layer][decision]) for layer in ranked[:LAYERS_NAMED]]
        if shown := [f"{layer} ({times})" for layer, times in often if times]:
            terminal.fact(name, f"layers {', '.join(shown)}")


def show_supervision(path: Path, terminal: Terminal) -> None:
    """Print what a file of targets holds, by the counts of its manifest where it has one."""
    records = read_supervision(path)
    manifest = read_manifest(path, "supervision") or {}
    if "summary" in manifest:
        say_supervision(manifest["summary"], terminal)
    else:
        terminal.fact("targets", f"{len(records)}, no manifest (a file of your own)")
        _say_decisions(summarise([], records, {}), terminal)
    mean = sum(record.executions for record in records) / len(records)
    layers = len(records[0].optimal_layer_config)
    terminal.fact("executions", f"{plain(mean, 2)} of {layers} on average")


def show_rejected(path: Path, terminal: Terminal) -> None:
    """Print how many questions of each task got no target, by reason."""
    questions = [one for _, one in read_json_lines(path, RejectedQuestion)]
    terminal.fact("without", f"{count(len(questions))} records have no target")
    reasons = Counter((question.task, question.reason) for question in questions)
    rows = [(task, reason, count(n)) for (task, reason), n in reasons.items()]
    terminal.table("task|reason|records", rows, numbers_from=2)
