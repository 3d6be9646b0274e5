"""Prints the files of a search and of its targets.

This module doesn't import torch.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from drllm.cli.terminal import Terminal
from drllm.cost import distinct_executions
from drllm.paths import Decision
from drllm.records.manifest import read_manifest
from drllm.records.search import SearchRecord, TriedPath, read_failed, read_search
from drllm.records.supervision import read_rejected, read_supervision, rejected_path
from drllm.reporting.numbers import (
    write_count,
    write_count_of,
    write_count_with_share,
    write_number,
    write_percent,
)
from drllm.reporting.run import check_summary
from drllm.search import count_kept_batches
from drllm.supervision.rules import survived
from drllm.supervision.summary import KINDS, summarise
from drllm.work.listener import format_duration


def show_search(records: Sequence[SearchRecord], terminal: Terminal) -> None:
    """Print the results of a search, its executions and its time."""
    num_layers = records[0].num_layers
    summary = summarise(records, [], {})
    paths: list[TriedPath] = []
    for record in records:
        paths += record.paths
    rewards = ", ".join(sorted({record.reward for record in records}))
    questions = write_count(summary["questions"])
    if summary["copies"]:
        questions += f" and {write_count(summary['copies'])} copies"
    terminal.fact("questions", f"{questions}, {num_layers} layers, reward {rewards}")
    paths_per_question = write_number(len(paths) / len(records))
    terminal.fact("paths tried", f"{write_count(len(paths))}, {paths_per_question} a question")
    _print_counts(summary, terminal)
    _print_retest(paths, terminal)
    _print_executions(records, paths, terminal)
    _print_shortest(records, num_layers, terminal)
    _print_search_time(records, len(paths), terminal)


def _print_retest(paths: Sequence[TriedPath], terminal: Terminal) -> None:
    """Print how many paths were tested again, and how many of them survived."""
    num_retested = sum(1 for path in paths if path.retest is not None)
    num_survived = sum(1 for path in paths if survived(path))
    survivors = write_count_with_share(num_survived, num_retested)
    terminal.fact(
        "re-test", f"{write_count(num_retested)} paths tested again, {survivors} survived"
    )


def _print_executions(
    records: Sequence[SearchRecord], paths: Sequence[TriedPath], terminal: Terminal
) -> None:
    """Print the executions of all paths, and how many are distinct within a question."""
    total = round(sum(path.executions for path in paths))
    num_distinct = 0
    for record in records:
        num_distinct += distinct_executions([path.decisions for path in record.paths])
    distinct = write_count_with_share(num_distinct, total)
    text = f"{write_count(total)} in all paths, {distinct} without those that paths share"
    terminal.fact("executions", text)


def _print_shortest(records: Sequence[SearchRecord], num_layers: int, terminal: Terminal) -> None:
    """Print the executions of the shortest path that survived, as the mean over questions."""
    shortest = []
    for record in records:
        executions = [path.executions for path in record.paths if survived(path)]
        if executions:
            shortest.append(min(executions))
    if shortest:
        terminal.fact(
            "shortest",
            f"{write_number(fmean(shortest), 2)} executions of {num_layers} for the shortest "
            f"surviving path, mean of {write_count(len(shortest))} questions",
        )


def _print_search_time(records: Sequence[SearchRecord], num_paths: int, terminal: Terminal) -> None:
    """Print how long the search took, and how fast it was."""
    seconds = sum(record.seconds for record in records)
    text = f"{format_duration(seconds)}, {write_number(seconds / len(records))} s a question"
    if seconds > 0:
        text += f", {write_number(num_paths / seconds)} paths a second"
    terminal.fact("time", text)


def _print_counts(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print a table: for each task, how many questions have a path of each kind, or a target."""
    target_columns: list[str] = []
    if summary["targets"]:
        target_columns = ["targets", "improving_targets"]
    columns = ["task", "questions", "base right", *KINDS, *target_columns]
    rows = []
    for task, counts in _list_counts(summary).items():
        base_right = write_count_with_share(counts["base_correct"], counts["questions"])
        cells = [task, write_count(counts["questions"]), base_right]
        for kind in KINDS:
            before = write_count(counts[f"{kind}_before_retest"])
            after = write_count(counts[f"{kind}_after_retest"])
            cells.append(f"{before} → {after}")
        cells += [write_count(counts.get(name)) for name in target_columns]
        rows.append(cells)
    terminal.table(
        "|".join(columns).replace("_", "\n"),
        rows,
        title="Questions with a path of each kind: found by the search → confirmed by the re-test",
        numbers_from=1,
    )


def _list_counts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts by task; unless there is a single task, "all" counts over all tasks."""
    counts = dict(summary.get("tasks", {}))  # older manifests don't have it
    if len(counts) == 1:
        return counts
    # A manifest may lack the count of a task. Then the sum isn't known.
    improving = [task_counts.get("improving_targets") for task_counts in counts.values()]
    num_improving = None
    if improving and None not in improving:
        num_improving = sum(improving)
    counts["all"] = {**summary, "improving_targets": num_improving}
    return counts


def show_failed(path: Path, terminal: Terminal) -> None:
    """Print the questions that failed in a search, and the last error of each question."""
    rows = [
        (question.task, question.id, write_count(question.attempts), question.error)
        for question in read_failed(path)
    ]
    num_failed = write_count_of(len(rows), "question", "questions")
    terminal.fact("failed", f"{num_failed} failed at every attempt")
    terminal.table("task|id|attempts|last error", rows)


def show_unfinished(folder: Path, terminal: Terminal) -> None:
    """Print how many batches of an unfinished search are done."""
    num_done = write_count_of(count_kept_batches(folder), "batch", "batches")
    terminal.fact(
        "search",
        f"not finished: {num_done} of questions done; if the search isn't running, run the same "
        f"command to resume it",
    )


def print_targets_file(output: Path, summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print the file of targets that was written, and the summary of the targets."""
    terminal.fact("supervision", output)
    print_supervision(summary, terminal)
    rejected = rejected_path(output)
    if rejected.is_file():
        terminal.fact("reasons", rejected)


def print_supervision(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print the summary in the manifest of targets; older manifests lack some of its values."""
    _print_counts(summary, terminal)
    targets = write_count_with_share(summary["targets"], summary["questions"])
    executions = summary.get("executions")
    if executions is not None:
        targets += f", {write_number(executions, 2)} executions on average"
    num_wrong = summary.get("wrong_targets")
    if num_wrong:
        targets += f"; {num_wrong} of them answer wrong"
    terminal.fact("targets", targets)
    reasons = [f"{num} {reason}" for reason, num in summary["rejected"].items() if num]
    terminal.fact("without", ", ".join(reasons) or "none")
    num_copies = summary.get("copies")
    if num_copies:
        terminal.fact("copies", f"{num_copies} records left out, since each question counts once")
    print_classes(summary["class_counts"], terminal)


def print_classes(counts: Sequence[int], terminal: Terminal) -> None:
    """Print how many decisions skip, execute and repeat; `counts` has the numbers in this order."""
    total = sum(counts) or 1  # without decisions, all shares are 0
    parts = []
    for decision in Decision:
        share = write_percent(counts[decision] / total)
        parts.append(f"{decision.name.lower()} {counts[decision]} ({share})")
    terminal.fact("decisions", ", ".join(parts))


def show_supervision(path: Path, terminal: Terminal) -> None:
    """Print a file of targets: the summary in its manifest, or the counts without a manifest."""
    records = read_supervision(path)
    manifest = read_manifest(path, "supervision") or {}
    check_summary(manifest, path)
    if manifest.get("summary"):
        print_supervision(manifest["summary"], terminal)
    else:
        terminal.fact("targets", f"{len(records)}, no manifest (a file of your own)")
        print_classes(summarise([], records, {})["class_counts"], terminal)
    mean = sum(record.executions for record in records) / len(records)
    num_layers = len(records[0].optimal_layer_config)
    terminal.fact("executions", f"{write_number(mean, 2)} of {num_layers} on average")


def show_rejected(path: Path, terminal: Terminal) -> None:
    """Print how many records of each task have no target, by reason."""
    questions = read_rejected(path)
    num_rejected = write_count_of(len(questions), "record", "records")
    terminal.fact("without", f"{num_rejected} without a target")
    counts = Counter((question.task, question.reason) for question in questions)
    rows = [(task, reason, write_count(num)) for (task, reason), num in counts.items()]
    terminal.table("task|reason|records", rows, numbers_from=2)


def _show_search_file(path: Path, terminal: Terminal) -> None:
    show_search(read_search(path), terminal)


SEARCH_RENDERERS: dict[str, tuple[str, Callable[[Path, Terminal], None]]] = {
    "paths": ("search", _show_search_file),
    "optimal_layer_config": ("supervision", show_supervision),
    "reason": ("questions without a target", show_rejected),
    "error": ("questions that failed", show_failed),
}
"""What a file holds, and the function that prints it, by a field of the file's first line."""
