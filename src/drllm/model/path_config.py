"""Write the config of a model whose layers are a path, and check the layers that are built from it.

Not every config can describe every path. A check of the layers shows this, not a table of models.

Axes: L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from drllm.errors import ArchitectureError
from drllm.model.older_names import add_older_names

PLAIN_TYPES = (bool, int, float, str, type(None), torch.dtype)
"""Types of the attributes by which two layers are compared."""
STATE_ATTRIBUTES = ("training", "gradient_checkpointing")
"""Attributes that depend on how a layer is used, and aren't compared."""
TOKEN_SUFFIXES = ("_token_id", "_token_ids")
"""Ends of the names of settings that hold tokens. A list of tokens isn't a list of layers."""


def reorder_config(config: Any, path: Sequence[int]) -> Any:
    """Return a copy of a model's config with its layers in path order.

    `reorder_lists` says which lists follow the path. Everything else stays; `check_layers` finds
    out whether that was enough.

    Raises:
        ValueError: The config's class refuses the values.
    """
    text = config.get_text_config()
    values = config.to_dict()
    fields = values
    if text is not config:  # a composite config has a part for the text
        text_name = next(name for name, part in vars(config).items() if part is text)
        fields = values[text_name]
    fields.update(reorder_lists(fields, path, text.num_hidden_layers))
    fields[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(path)
    add_older_names(values)  # transformers 5.0 loses some of its own settings in `from_dict`
    return type(config).from_dict(values)


def reorder_lists(
    fields: Mapping[str, Any], path: Sequence[int], num_layers: int
) -> dict[str, Any]:
    """Return a config's lists of layers in path order.

    A list with `layer` in its name that holds ascending indices of layers is a list of indices. In
    the result it holds the places that these layers have in the path. Any other list of L values
    has a value for each layer.

    Example:
        >>> fields = {"dense_layers": [0, 2], "windows": [4, 8, 8], "width": 64}
        >>> reorder_lists(fields, [2, 1, 2], num_layers=3)
        {'dense_layers': [0, 2], 'windows': [8, 8, 8]}
    """
    lists = {}
    for name, value in fields.items():
        if not isinstance(value, (list, tuple)) or name.endswith(TOKEN_SUFFIXES):
            continue
        indices = [layer for layer in range(num_layers) if layer in value]
        if "layer" in name and list(value) == indices:
            lists[name] = [place for place, layer in enumerate(path) if layer in value]
        elif len(value) == num_layers:
            lists[name] = [value[layer] for layer in path]
    return lists


def check_layers(
    exported_layers: nn.ModuleList, base_layers: nn.ModuleList, path: Sequence[int]
) -> None:
    """Refuse exported layers that differ from the layers of the base model that they copy.

    The function compares the classes, the names and shapes of tensors, every plain attribute (a
    window, a switch for RoPE, a scale) except a layer's index, and the values of buffers. On the
    meta device values aren't compared.

    Args:
        exported_layers: The layers of the exported model, built from its config.
        base_layers: The layers of the base model.
        path: The index of the base model's layer at each place of the exported model.

    Raises:
        ArchitectureError: A layer differs. The message names the layer and the difference.
    """
    for place, origin in enumerate(path):
        difference = _find_difference(exported_layers[place], base_layers[origin], place, origin)
        if difference is not None:
            raise ArchitectureError(
                f"layer {origin} at place {place} of the path (counted from 0) would have "
                f"{difference}, since the config derives this from a layer's place or from the "
                f"number of layers; give a path that doesn't change it"
            )


def _find_difference(
    exported: nn.Module, original: nn.Module, place: int, origin: int
) -> str | None:
    """Describe how an exported layer differs from its original; return None if it doesn't.

    Args:
        exported: The exported layer.
        original: The layer of the base model.
        place: The exported layer's index in the exported model.
        origin: The original's index in the base model.
    """
    new_values = _describe_layer(exported)
    old_values = _describe_layer(original)
    for name in {**old_values, **new_values}:
        new = new_values.get(name)
        old = old_values.get(name)
        is_missing = name not in new_values or name not in old_values
        is_index = new == place and old == origin  # the attribute is the layer's index
        if not is_index and (is_missing or new != old):
            return f"{new!r} as {name} instead of {old!r}"
    buffers = dict(original.named_buffers())
    for name, values in exported.named_buffers():
        if not values.is_meta and not torch.equal(values, buffers[name]):
            return f"other values in {name}"
    return None


def _describe_layer(layer: nn.Module) -> dict[str, Any]:
    """Return the classes, shapes and plain attributes of a layer's modules, by name."""
    modules = dict(layer.named_modules())
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    description: dict[str, Any] = {}
    for name, module in modules.items():
        description[f"the class of {name or 'the layer'}"] = type(module).__name__
    for name, tensor in tensors:
        description[f"the shape of {name}"] = tuple(tensor.shape)
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or attribute in STATE_ATTRIBUTES:
                continue
            if isinstance(value, PLAIN_TYPES):
                description[f"{name}.{attribute}".lstrip(".")] = value
    return description
