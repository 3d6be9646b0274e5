"""The model card of an exported checkpoint: `export_card.md.j2` filled in from what is recorded."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drllm.models.routers.card import template
from drllm.paths import ALL, ATTENTION, MLP, StaticPath, Step, layer_of, step_of
from drllm.records.healed import HealedPath
from drllm.records.static_paths import PathFile, StaticPaths


def model_card(
    base: Mapping[str, Any],
    path: StaticPath,
    dtype: str,
    num_repeated_bytes: int,
    file: PathFile | None = None,
) -> str:
    """Write the card of an exported checkpoint: where it comes from, and how to load it.

    The front matter, which the hub reads, names the base model only where that came from the hub,
    so that its identity `base` has a revision. Of a path of a `paths.json` the card says how it was
    found and how it did.
    """
    layers = [layer_of(item) for item in path.steps]
    plan = path.with_adapter("").plan(base["num_layers"])
    found, made = (None, None) if file is None else (file.found, file.record)
    record = made if isinstance(made, StaticPaths) else None
    return template(Path(__file__).with_name("export_card.md.j2")).render(
        base=base,
        steps=list(map(step_in_words, path.steps)),
        decisions=() if isinstance(plan, StaticPath) else plan,
        skipped=sorted(set(range(base["num_layers"])) - set(layers)),
        repeated=sorted({layer for layer in layers if layers.count(layer) > 1}),
        in_order=layers == sorted(layers),
        zeros=zeros_in_words(path),
        dtype=dtype,
        num_repeated_bytes=num_repeated_bytes,
        found=found,
        record=record,
        healed=made if isinstance(made, HealedPath) else None,
        version=importlib.metadata.version("drllm"),
    )


def step_in_words(item: int | Step) -> str:
    """Write a step: the index of its layer, and what runs of it if not all.

    Example:
        >>> step_in_words(3), step_in_words(Step(1, "mlp"))
        ('3', '1:mlp')
    """
    step = step_of(item)
    return str(step.layer) if step.run == ALL else f"{step.layer}:{step.run}"


def zeros_in_words(path: StaticPath) -> str:
    """Name the sublayers whose weights an export writes as zeros; empty without any.

    Example:
        >>> zeros_in_words(StaticPath([0, {"layer": 1, "run": "mlp"}, {"layer": 3, "run": "mlp"}]))
        'the attention of layers 1, 3'
    """
    said = []
    for run, what in ((MLP, "attention"), (ATTENTION, "MLP")):
        layers = [str(s.layer) for s in map(step_of, path.steps) if s.run == run]
        if layers:
            said.append(f"the {what} of layer{'s' * (len(layers) > 1)} {', '.join(layers)}")
    return " and ".join(said)
