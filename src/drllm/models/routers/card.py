"""The model card of saved routers, made from `router_config.json` alone.

The card claims nothing that isn't recorded in that file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from drllm.model.cards import describe_alias, name_base_model, render_card
from drllm.model.places import HUB_ID
from drllm.models.routers.config import RouterConfig
from drllm.paths import Decision

FOLDER = "path/to/this/folder"  # stands for a folder whose place isn't known
LIBRARY = "drllm"
MARK = f"library_name: {LIBRARY}"
"""A line of every card of routers; a README.md without it isn't ours."""
TEMPLATE = Path(__file__).with_name("card.md.j2")
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
"""The rows of the card's table of metrics: key in `training.metrics` → title."""
COMPARED_METRICS = {
    "macro_f1": "macro-F1",
    "accuracy": "labels hit",
    "f1_skip": "F1 skip",
    "f1_repeat": "F1 repeat",
    "avg_layers": "executions",
}
"""The columns of the card's table of baselines: key in `training.against_baselines` → title."""


def write_card(config: RouterConfig, place: str = FOLDER) -> str:
    """Write the card of routers: the hub's metadata, then Markdown.

    Without a recorded training, the card says that nothing is known about data and metrics.

    Args:
        config: The routers' config.
        place: Where the routers will be loaded from: a folder or a hub id.
    """
    training = config.training
    comparison = _as_mapping(training.get("against_baselines"))
    systems = _as_mapping(comparison.get("systems"))
    shown_systems = {
        name: row for name, row in systems.items() if _has_numbers(row, COMPARED_METRICS)
    }
    labels = [sum(counts) for counts in zip(*config.label_counts, strict=True)]  # by decision
    return render_card(
        TEMPLATE,
        _describe_for_hub(config),
        config=config,
        alias=describe_alias(config.base_model),
        place=place,
        num_parameters=_count_parameters(config),
        training=training,
        tasks=_as_mapping(training.get("tasks")),
        labels=labels,
        metrics=METRICS,
        rows=_select_rows(training.get("metrics")),
        comparison=comparison,
        compared_metrics=COMPARED_METRICS,
        systems=shown_systems,
        settings=_as_mapping(training.get("settings")),
    )


def _describe_for_hub(config: RouterConfig) -> ModelCardData:
    """Return metadata for the hub. It names the base model only if the name is a hub id."""
    metadata = ModelCardData(library_name=LIBRARY, tags=["layer-routing", "dynamic-depth"])
    is_on_hub = HUB_ID.fullmatch(config.base_model) is not None
    name_base_model(metadata, config.base_model, "adapter", is_on_hub=is_on_hub)
    return metadata


def _count_parameters(config: RouterConfig) -> int:
    """Return the number of weights and biases of all routers; see `RouterStack`."""
    hidden_layer = (config.hidden_size + 1) * config.router_width
    decision_layer = (config.router_width + 1) * len(Decision)
    return config.num_layers * (hidden_layer + decision_layer)


def _select_rows(metrics: Any) -> list[Mapping[str, Any]]:
    """Return the rows of recorded metrics that the card can show.

    The config isn't checked: `training` may hold anything.
    """
    if not isinstance(metrics, list):
        return []
    return [row for row in metrics if _has_numbers(row, METRICS) and _has_split(row)]


def _has_numbers(row: Any, metrics: Mapping[str, str]) -> bool:
    """Say whether each metric of a row is a number or missing."""
    if not isinstance(row, Mapping):
        return False
    return all(isinstance(row.get(key), int | float | None) for key in metrics)


def _has_split(row: Mapping[str, Any]) -> bool:
    """Say whether a row names the split that it was measured on."""
    return isinstance(row.get("split"), str)


def _as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a value of the config if it is a mapping, else an empty mapping."""
    return value if isinstance(value, Mapping) else {}
