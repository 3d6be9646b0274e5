"""The model card that lies beside saved routers.

Owns its text, made from `router_config.json` alone: what isn't recorded there isn't claimed.
Leaves the numbers to `training` and writing the file to `folder`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from drllm.models.routers.stack import RouterConfig

FOLDER = "path/to/this/folder"
MARK = "library_name: drllm"
"""Stands in every card of ours, so that one can be told from a README of somebody else's."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
METRICS = (
    ("routers_loss", "loss"),
    ("macro_f1", "macro-F1"),
    ("f1_skip", "F1 skip"),
    ("f1_execute", "F1 execute"),
    ("f1_repeat", "F1 repeat"),
    ("acc_skip", "skip labels hit"),
    ("acc_repeat", "repeat labels hit"),
    ("avg_layers", "executions"),
)
COMPARED = (
    ("macro_f1", "macro-F1"),
    ("accuracy", "labels hit"),
    ("f1_skip", "F1 skip"),
    ("f1_repeat", "F1 repeat"),
    ("avg_layers", "executions"),
)


def model_card(config: RouterConfig, place: str = FOLDER) -> str:
    """Write the card of routers.

    Args:
        config: Of trained routers, or of others: the card then says that nothing is known of
            their data and metrics.
        place: From where they are loaded: a folder or a hub id.

    Returns:
        Markdown with the front matter that the hub reads. `base_model` stands in it only where it
        has the form of a hub id.
    """
    parts = [
        _front_matter(config),
        f"# Routers for {_line(config.base_model or config.base_class or 'a language model')}",
        "One small router per layer for a frozen language model.\n"
        "Once per prompt, each decides to skip, execute or repeat its layer.\n"
        "The base model is not in this folder.",
        "## Base model",
        _base_model(config),
        "## Use",
        _use(config, place),
        "## Routers",
        _routers(config),
        *_training(config),
        "## Licence",
        "The routers belong to the base model's hidden states and are of no use without it.\n"
        "Check the base model's licence, and those of the question sets that they were trained "
        "on, before passing them on.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: RouterConfig) -> str:
    lines = ["tags: [layer-routing, dynamic-depth]", "---"]
    if HUB_ID.fullmatch(config.base_model):
        # The hub would take any other safetensors with a base model for a fine-tune of it.
        lines = [f"base_model: {config.base_model}", "base_model_relation: adapter", *lines]
    return "\n".join(["---", MARK, *lines])


def _base_model(config: RouterConfig) -> str:
    name = f"`{_line(config.base_model)}`" if config.base_model else "Not named"
    if config.base_revision:
        name += f", revision `{_line(config.base_revision)}`"
    shape = f"{config.num_layers} layers, hidden size {config.hidden_size}"
    if config.base_class:
        shape = f"{_line(config.base_class)}, {shape}"
    if not config.base_fingerprint:
        return (
            f"{name}: {shape}; no fingerprint is recorded.\n"
            f"So it isn't checked whether a model has the weights that these routers are for."
        )
    return (
        f"{name}: {shape}, fingerprint `{_line(config.base_fingerprint)}`.\n"
        f"On another model these routers are refused."
    )


def _use(config: RouterConfig, place: str) -> str:
    if not config.base_model:
        return (
            f"    import drllm\n\n"
            f'    routed = drllm.RoutedModel.from_pretrained("{place}", base=model)\n\n'
            f"where `model` is the base model, or its hub id or folder; "
            f'or `drllm generate --model MODEL --routers {place} "a prompt"`.'
        )
    return (
        f"    import drllm\n\n"
        f'    routed = drllm.RoutedModel.from_pretrained("{place}")\n\n'
        f'or `drllm generate --routers {place} "a prompt"`.'
    )


def _routers(config: RouterConfig) -> str:
    parameters = config.num_layers * (
        (config.hidden_size + 1) * config.router_width + (config.router_width + 1) * 3
    )
    return (
        f"{parameters:,} parameters in float32: width {config.router_width}, "
        f"{config.num_windows} windows."
    )


def _training(config: RouterConfig) -> list[str]:
    """Return what is recorded of data, metrics and settings, section by section."""
    training = config.training
    parts = []
    data = []
    if "num_trained" in training:
        held_out = f"; held out: {training['num_held_out']}" if "num_held_out" in training else ""
        data.append(f"Target paths trained on: {training['num_trained']}{held_out}.")
    if training.get("tasks") and isinstance(training["tasks"], Mapping):
        tasks = ", ".join(f"{_line(name)} ({number})" for name, number in training["tasks"].items())
        data.append(f"By task: {tasks}.")
    if config.label_counts:
        skip, execute, repeat = (sum(counts) for counts in zip(*config.label_counts, strict=True))
        data.append(
            f"Labels trained on, over all layers: {skip} skip, {execute} execute, {repeat} repeat."
        )
    if data:
        parts += ["## Data", "\n".join(data)]
    rows, compared = _metrics(training), _compared(training)
    if rows:
        parts += [
            _heading(training),
            _table(rows),
            f"{_read(training)}\n"
            "How well the routed model answers is measured by `drllm evaluate`, not by these "
            "numbers.",
            *compared,
        ]
    if training.get("settings") and isinstance(training["settings"], Mapping):
        settings = [f"- {_line(name)}: {_line(v)}" for name, v in training["settings"].items()]
        parts += ["## Settings", "\n".join(settings)]
    if not parts:
        return [
            "## Data and metrics",
            "There is no record of a training: these routers were not made by `drllm train`, and "
            "nothing is known of their data or of how well they route.\n"
            "Measure them with `drllm evaluate`.",
        ]
    return parts


def _read(training: Mapping[str, Any]) -> str:
    settings = training.get("settings")
    if isinstance(settings, Mapping) and settings.get("on_policy_rounds"):
        return (
            "Each router read what the target path leaves before its layer, and in further rounds "
            "what the routes of the routers before these leave there; all of it counts."
        )
    return (
        "The routers were teacher-forced here: each read what the target path leaves before its "
        "layer."
    )


def _heading(training: Mapping[str, Any]) -> str:
    best, last = training.get("best_epoch"), training.get("last_epoch")
    if isinstance(best, int) and isinstance(last, int):
        return (
            f"## Metrics after epoch {best}, the best of {last} on the held-out targets; its "
            f"weights are these"
        )
    return "## Metrics after the last epoch"


def _metrics(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the metrics that `train` has left, one row per part; empty where there are none."""
    rows = training.get("metrics")
    if not isinstance(rows, list):
        return []
    return [
        row
        for row in rows
        if isinstance(row, Mapping)
        and isinstance(row.get("split"), str)
        and all(isinstance(row.get(key), (int, float, type(None))) for key, _ in METRICS)
    ]


def _compared(training: Mapping[str, Any]) -> list[str]:
    """Return how the routers stand beside decisions that ignore the question; empty if unknown."""
    told = training.get("against_baselines")
    if not isinstance(told, Mapping) or not isinstance(told.get("systems"), Mapping):
        return []
    systems = {
        _line(name).replace("_", " "): metrics
        for name, metrics in told["systems"].items()
        if isinstance(metrics, Mapping)
        and all(isinstance(metrics.get(key), (int, float, type(None))) for key, _ in COMPARED)
    }
    lines = [
        f"| | {' | '.join(title for _, title in COMPARED)} |",
        "|---" * (len(COMPARED) + 1) + "|",
        *(
            f"| {name} | {' | '.join(_number(metrics.get(key)) for key, _ in COMPARED)} |"
            for name, metrics in systems.items()
        ),
    ]
    where = "held-out targets" if told.get("split") == "validation" else "targets trained on"
    return [
        f"Beside decisions that ignore the question, on the {where}:",
        "\n".join(lines),
        _line(told.get("verdict", "")),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [_line(row["split"]) for row in rows]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(rows) + 1) + "|"]
    for key, title in METRICS:
        values = [_number(row.get(key)) for row in rows]
        lines.append(f"| {title} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _line(value: Any) -> str:
    """Return a value as text that ends neither its line nor its code span."""
    return " ".join(str(value).split()).replace("`", "'")
