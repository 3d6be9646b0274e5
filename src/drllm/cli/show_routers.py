"""Prints a folder of routers: shape, training and metrics. This module doesn't import torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from drllm.agreement import compare_by_layer, compute_metrics, display_name, judge_routers
from drllm.cli.show_search import print_classes
from drllm.cli.terminal import Terminal
from drllm.records.codec import read_json, read_json_lines
from drllm.records.layers import LAYERS_FILE, Layers
from drllm.reporting.numbers import write_number
from drllm.statistics.ranges import Count

METRICS_FILE = "metrics.jsonl"
NO_METRICS = ("epoch", "split", "learning_rate")  # fields of metrics.jsonl that aren't metrics


class MetricsHead(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a line of `metrics.jsonl` that says to what its metrics belong."""

    epoch: Count
    split: Literal["train", "validation"]


class RouterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The part of `router_config.json` that `show` prints, read without torch.

    Attributes:
        label_counts: For each layer: skips, executions and repeats among the targets.
        training: What the training recorded; it may hold anything.
    """

    num_layers: int
    hidden_size: int
    num_windows: int
    router_width: int
    base_model: str = ""
    label_counts: list[tuple[int, int, int]] = []
    training: dict[str, Any] = {}


def show_routers(path: Path, terminal: Terminal) -> None:
    """Print the config of routers, how they were trained, and their metrics."""
    config = read_json(path, RouterSummary)
    base_model = config.base_model or "not named"
    terminal.fact(
        "base model", f"{base_model}, {config.num_layers} layers of width {config.hidden_size}"
    )
    terminal.fact("routers", f"{config.num_windows} windows, inner width {config.router_width}")
    if config.training:
        terminal.fact("trained on", _describe_training(config.training))
    if config.label_counts:
        totals = [sum(column) for column in zip(*config.label_counts, strict=True)]
        print_classes(totals, terminal)
    metrics = path.with_name(METRICS_FILE)
    if metrics.is_file():
        show_metrics(metrics, terminal)
    layers = path.with_name(LAYERS_FILE)
    if layers.is_file():
        show_agreement(layers, terminal)


def _describe_training(training: Mapping[str, Any]) -> str:
    """Describe on how many targets routers were trained; a missing number is `None`."""
    tasks = training.get("tasks")
    names = ""
    if isinstance(tasks, Mapping):
        names = ", ".join(f"{name} {number}" for name, number in tasks.items())
    num_trained = training.get("num_trained")
    num_held_out = training.get("num_held_out")
    steps = training.get("steps")
    return f"{num_trained} targets ({names}), {num_held_out} held out, {steps} steps"


def show_metrics(path: Path, terminal: Terminal) -> None:
    """Print the metrics of the last epoch on each part of the targets (trained on, held out)."""
    heads = [head for _, head in read_json_lines(path, MetricsHead)]
    rows = [row for _, row in read_json_lines(path, dict[str, float | str | None])]
    last_epoch = max(head.epoch for head in heads)
    parts: dict[str, dict[str, float | None]] = {}
    for head, row in zip(heads, rows, strict=True):
        if head.epoch == last_epoch:
            parts[head.split] = _select_metrics(row)
    names = list(next(iter(parts.values())))  # every part has the same metrics
    _print_metrics(names, parts, f"epoch {last_epoch}", terminal)


def _select_metrics(row: Mapping[str, float | str | None]) -> dict[str, float | None]:
    """Return the metrics in a line of `metrics.jsonl`."""
    return {
        name: value
        for name, value in row.items()
        if name not in NO_METRICS and not isinstance(value, str)
    }


def show_agreement(path: Path, terminal: Terminal) -> None:
    """Print how the saved routers compare with decisions that ignore the question."""
    layers = read_json(path, Layers)
    for part, systems in layers.parts.items():
        metrics = {display_name(name): compute_metrics(counts) for name, counts in systems.items()}
        first_metrics = next(iter(metrics.values()))  # every system has the same metrics
        title = f"after epoch {layers.epoch}, on {layers.describe_part(part)}"
        _print_metrics(list(first_metrics), metrics, title, terminal)
    terminal.say(compare_by_layer(layers.parts[layers.main_part]))
    terminal.say(judge_routers(layers.parts))


def _print_metrics(
    names: Iterable[str], columns: Mapping[str, Any], title: str, terminal: Terminal
) -> None:
    """Print a table of metrics.

    Args:
        names: The names of the metrics, one for each row.
        columns: The metrics of a part or a system, by the title of its column.
        title: The title of the table.
        terminal: Where the table is printed.
    """
    rows = []
    for name in names:
        cells = [write_number(metrics.get(name), 3) for metrics in columns.values()]
        rows.append([name, *cells])
    terminal.table("|".join(["metric", *columns]), rows, title=title, numbers_from=1)
