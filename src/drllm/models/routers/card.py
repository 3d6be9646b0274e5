"""The model card of saved routers: `card.md.j2` filled in from `router_config.json` alone.

What isn't recorded there isn't claimed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from drllm.models.routers.stack import RouterConfig

FOLDER = "path/to/this/folder"
MARK = "library_name: drllm"
"""Stands in every card of ours, so that one can be told from somebody else's README."""
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
        Markdown with the front matter that the hub reads. `base_model` is in it only where it has
        the form of a hub id.
    """
    training = config.training
    compared = _mapping(training.get("against_baselines"))
    rows = training.get("metrics")
    return template(Path(__file__).with_name("card.md.j2")).render(
        config=config,
        place=place,
        # The hub would take any other safetensors with a base model for a fine-tune of it.
        is_on_hub=HUB_ID.fullmatch(config.base_model) is not None,
        num_parameters=config.num_layers
        * ((config.hidden_size + 1) * config.router_width + (config.router_width + 1) * 3),
        training=training,
        data=_data(config),
        metrics=METRICS,
        rows=[
            row
            for row in (rows if isinstance(rows, list) else ())
            if _are_numbers(row, METRICS) and isinstance(row.get("split"), str)
        ],
        compared=compared,
        compared_metrics=COMPARED,
        systems={
            name: values
            for name, values in _mapping(compared.get("systems")).items()
            if _are_numbers(values, COMPARED)
        },
        settings=_mapping(training.get("settings")),
    )


def template(path: Path) -> jinja2.Template:
    """Return a template of Markdown, with the filters `line` and `number`."""
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(line=_line, number=_number)
    return environment.from_string(path.read_text(encoding="utf-8"))


def _data(config: RouterConfig) -> list[str]:
    """Return what is recorded of the targets trained on."""
    training, data = config.training, []
    if "num_trained" in training:
        held_out = f"; held out: {training['num_held_out']}" if "num_held_out" in training else ""
        data.append(f"Target paths trained on: {training['num_trained']}{held_out}.")
    if tasks := _mapping(training.get("tasks")):
        by_task = ", ".join(f"{_line(name)} ({number})" for name, number in tasks.items())
        data.append(f"By task: {by_task}.")
    if config.label_counts:
        skip, execute, repeat = (sum(counts) for counts in zip(*config.label_counts, strict=True))
        data.append(
            f"Labels trained on, over all layers: {skip} skip, {execute} execute, {repeat} repeat."
        )
    return data


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _are_numbers(row: Any, metrics: tuple[tuple[str, str], ...]) -> bool:
    return isinstance(row, Mapping) and all(
        isinstance(row.get(key), (int, float, type(None))) for key, _ in metrics
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _line(value: Any) -> str:
    """Return a value as text that ends neither its line nor its code span."""
    return " ".join(str(value).split()).replace("`", "'")
