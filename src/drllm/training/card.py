"""The model card that lies beside trained routers.

Owns its text, made from `router_config.json` alone. Leaves the numbers to `loop`.
"""

from __future__ import annotations

import re
from typing import Any

from drllm.models.routers import RouterConfig

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


def model_card(config: RouterConfig) -> str:
    """Write the card of routers that `train` has made.

    Args:
        config: With `label_counts` and `training` filled in.

    Returns:
        Markdown with the front matter that the hub reads. `base_model` stands in it only where it
        has the form of a hub id.
    """
    training = config.training
    skip, execute, repeat = (sum(counts) for counts in zip(*config.label_counts, strict=True))
    parameters = config.num_layers * (
        (config.hidden_size + 1) * config.router_width + (config.router_width + 1) * 3
    )
    link = f"base_model: {config.base_model}\n" if HUB_ID.fullmatch(config.base_model) else ""
    revision = f", revision `{config.base_revision}`" if config.base_revision else ""
    tasks = ", ".join(f"{name} ({number})" for name, number in training["tasks"].items())
    settings = "\n".join(f"- {name}: {value}" for name, value in training["settings"].items())
    return f"""---
library_name: drllm
{link}tags: [layer-routing, dynamic-depth]
---

# Routers for {config.base_model}

One small router per layer for a frozen language model.
Once per prompt, each decides to skip, execute or repeat its layer.
The base model is not in this folder.

## Base model

`{config.base_model}`{revision}: {config.base_class}, {config.num_layers} layers, \
hidden size {config.hidden_size}, fingerprint `{config.base_fingerprint}`.
On another model these routers are refused.

## Use

    import drllm

    routed = drllm.RoutedModel.from_pretrained("path/to/this/folder")

or `drllm generate --model {config.base_model} --routers path/to/this/folder "a prompt"`.

## Data

Target paths trained on: {training["num_trained"]}; held out: {training["num_held_out"]}.
By task: {tasks}.
Labels trained on, over all layers: {skip} skip, {execute} execute, {repeat} repeat.

## Routers

{parameters:,} parameters in float32: width {config.router_width}, {config.num_windows} windows.

## Metrics after the last epoch

{_table(training["metrics"])}

The routers were teacher-forced here: each read what the target path leaves before its layer.
How well the routed model answers is measured by `drllm evaluate`, not by these numbers.
`metrics.jsonl` has every epoch.

## Settings

{settings}

## Licence

The routers were fitted to the base model's hidden states and are of no use without it.
Check the base model's licence and those of the question sets above before passing them on.
"""


def _table(rows: list[dict[str, Any]]) -> str:
    names = [row["split"] for row in rows]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(rows) + 1) + "|"]
    for key, title in METRICS:
        values = ["–" if row[key] is None else f"{row[key]:.4g}" for row in rows]
        lines.append(f"| {title} | " + " | ".join(values) + " |")
    return "\n".join(lines)
