"""Targets as people read them: what was found, what became of it, and why the others got none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from drllm.cli.terminal import Terminal, new_table
from drllm.paths import Decision
from drllm.records import (
    RejectedQuestion,
    SupervisionRecord,
    read_manifest,
    rejected_path,
)
from drllm.reporting.numbers import NBSP, count, percent, plain
from drllm.supervision.summary import summarise

LAYERS_NAMED = 5


def say_written(output: Path, summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print what a supervision has written and found."""
    terminal.say(f"supervision    {output}")
    say_supervision(summary, terminal)
    rejected = rejected_path(output)
    if rejected.is_file():
        terminal.say(f"reasons        {rejected}")


def say_supervision(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print a summary of `summarise`, or what an older version left of one in a manifest."""
    total, targets = summary["questions"], summary["targets"]
    terminal.say(f"base right     {_share(summary['base_correct'], total)}")
    paths = summary.get("paths", {})
    for name in ("valid", "saving", "improving"):
        before, after = (f"{name}_{when}_retest" for when in ("before", "after"))
        of_paths = f"; {paths[after]} of {paths[before]} such paths" if before in paths else ""
        terminal.say(
            f"{name + ' path':14} {summary[before]} questions, {summary[after]} after the re-test"
            f"{of_paths}"
        )
    mean = summary.get("executions")
    terminal.say(
        f"targets        {_share(targets, total)}"
        + (f", {plain(mean, 2)} executions on average" if mean is not None else "")
    )
    tasks = summary.get("tasks", {})
    if len(tasks) > 1:
        _show_tasks(tasks, terminal)
    rejects = [f"{n} {reason}" for reason, n in summary["rejected"].items() if n]
    terminal.say(f"without        {', '.join(rejects) or 'none'}")
    if copies := summary.get("copies"):
        terminal.say(f"copies         {copies} records, left out: each question counts once")
    say_classes(summary["class_counts"], terminal)
    _say_layers(summary.get("class_counts_by_layer", []), terminal)


def _share(part: int, total: int) -> str:
    share = percent(part / total if total else None).replace(NBSP, " ")
    return f"{part} of {total} questions ({share})"


def _show_tasks(tasks: Mapping[str, Mapping[str, int]], terminal: Terminal) -> None:
    table = new_table(
        "task",
        "questions",
        "base right",
        "saving,\nsurvived",
        "improving,\nsurvived",
        "targets",
        "improving\ntargets",
        numbers_from=1,
    )
    for name, counts in tasks.items():
        table.add_row(
            Text(name),
            *(
                str(counts[key])
                for key in (
                    "questions",
                    "base_correct",
                    "saving_after_retest",
                    "improving_after_retest",
                    "targets",
                    "improving_targets",
                )
            ),
        )
    terminal.show(table)


def say_classes(counts: Sequence[int], terminal: Terminal) -> None:
    """Print how many decisions skip, execute and repeat."""
    total = sum(counts) or 1
    shown = [
        f"{name} {n} ({percent(n / total)})".replace(NBSP, " ")
        for name, n in zip(("skip", "execute", "repeat"), counts, strict=True)
    ]
    terminal.say(f"decisions      {', '.join(shown)}")


def _say_layers(counts: Sequence[Sequence[int]], terminal: Terminal) -> None:
    """Say which layers the targets skip and repeat most, and how often."""
    for decision, name in ((Decision.SKIP, "most skipped"), (Decision.REPEAT, "most repeated")):
        ranked = sorted(range(len(counts)), key=lambda layer: (-counts[layer][decision], layer))
        shown = [
            f"{layer} ({counts[layer][decision]})"
            for layer in ranked[:LAYERS_NAMED]
            if counts[layer][decision]
        ]
        if shown:
            terminal.say(f"{name:14} layers {', '.join(shown)}")


def show_supervision(path: Path, records: Sequence[SupervisionRecord], terminal: Terminal) -> None:
    """Print what a file of targets holds, by the counts of its manifest where it has one."""
    manifest = read_manifest(path, "supervision") or {}
    if "summary" in manifest:
        say_supervision(manifest["summary"], terminal)
    else:
        counts = summarise([], records, {})
        terminal.say(f"targets        {len(records)}, no manifest (a file of your own)")
        say_classes(counts["class_counts"], terminal)
        _say_layers(counts["class_counts_by_layer"], terminal)
    mean = sum(record.executions for record in records) / len(records)
    layers = len(records[0].optimal_layer_config)
    terminal.say(f"executions     {plain(mean, 2)} of {layers} on average")


def show_rejected(questions: Sequence[RejectedQuestion], terminal: Terminal) -> None:
    """Print how many questions of each task got no target, by reason."""
    terminal.say(f"without        {count(len(questions))} records have no target")
    table = new_table("task", "reason", "records", numbers_from=2)
    for (task, reason), n in Counter((q.task, q.reason) for q in questions).items():
        table.add_row(Text(task), reason, count(n))
    terminal.show(table)
