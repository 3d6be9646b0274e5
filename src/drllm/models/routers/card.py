"""The model card of saved routers: `card.md.j2` filled in from `router_config.json` alone.

What isn't recorded there isn't claimed.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from drllm.models.routers.stack import RouterConfig

FOLDER = "path/to/this/folder"
MARK = "library_name: drllm"
"""Stands in every card of ours, so that one can be told from somebody else's README."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
METRICS = {
    "routers_loss": "loss",
    "macro_f1": "macro-F1",
    "f1_skip": "F1 skip",
    "f1_execute": "F1 execute",
    "f1_repeat": "F1 repeat",
    "acc_skip": "skip labels hit",
    "acc_repeat": "repeat labels hit",
    "avg_layers": "executions",
}
COMPARED = {"macro_f1": "macro-F1", "accuracy": "labels hit"}
COMPARED |= {key: METRICS[key] for key in ("f1_skip", "f1_repeat", "avg_layers")}


def model_card(config: RouterConfig, place: str = FOLDER) -> str:
    """Write the card of routers, Markdown with the front matter that the hub reads.

    `base_model` is in the front matter only where it has the form of a hub id. Of routers that
    weren't trained the card says that nothing is known of their data and metrics. `place` is from
    where they are loaded: a folder or a hub id.
    """
    training, rows = config.training, config.training.get("metrics")
    compared = _mapping(training.get("against_baselines"))
    systems = _mapping(compared.get("systems"))
    D, H = config.hidden_size, config.router_width
    return template(Path(__file__).with_name("card.md.j2")).render(
        config=config,
        place=place,
        # The hub would take any other safetensors with a base model for a fine-tune of it.
        is_on_hub=HUB_ID.fullmatch(config.base_model) is not None,
        num_parameters=config.num_layers * ((D + 1) * H + (H + 1) * 3),
        training=training,
        tasks=_mapping(training.get("tasks")),
        labels=[sum(counts) for counts in zip(*config.label_counts, strict=True)],
        metrics=METRICS,
        rows=[
            row
            for row in (rows if isinstance(rows, list) else ())
            if _are_numbers(row, METRICS) and isinstance(row.get("split"), str)
        ],
        compared=compared,
        compared_metrics=COMPARED,
        systems={name: row for name, row in systems.items() if _are_numbers(row, COMPARED)},
        settings=_mapping(training.get("settings")),
    )


@cache
def template(path: Path) -> jinja2.Template:
    """Return a template of Markdown, with the filters `line` and `number`."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters.update(
        # A value as text that ends neither its line nor its code span.
        line=lambda value: " ".join(str(value).split()).replace("`", "'"),
        number=lambda value: "–" if value is None else f"{value:.4g}",
    )
    return environment.from_string(path.read_text(encoding="utf-8"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _are_numbers(row: Any, metrics: Mapping[str, str]) -> bool:
    return isinstance(row, Mapping) and all(
        isinstance(row.get(key), (int, float, type(None))) for key in metrics
    )
