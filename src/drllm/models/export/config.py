"""Whether a stock class can be a path: the config for it, and the layers that come of that config.

Owns rewriting a config along a path, and comparing the layers that a class builds from it with
those they stand for. What a config means is found out in this way, not looked up by the model's
name: some say the kind of every layer in a list, others derive it from the layer's place. Leaves
weights and files to `model`.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from drllm.errors import ArchitectureError
from drllm.models.export.files import add_older_words

PLAIN = (bool, int, float, str, type(None), torch.dtype)
PASSING = ("training", "gradient_checkpointing")
"""Attributes that say what is being done with a layer, not what it is."""
TOKENS = ("_token_id", "_token_ids")
"""Ends of names whose lists hold tokens: they say nothing of layers, however many they are."""


def config_along(config: Any, path: Sequence[int]) -> Any:
    """Return a model's config with its layers in path order.

    Lists of L values are taken for one value per layer and follow the path, and so do lists of
    layer indices, told by their name. Everything else stays; whether that was enough is for
    `check_layers` to say.

    Args:
        config: Of the base model; stays as it is.
        path: Layer indices in the order executed.

    Raises:
        ValueError: The config's class refuses the values.

    Source: ours.

    Example:
        >>> from transformers import Qwen2Config
        >>> kinds = ["full_attention", "sliding_attention"]
        >>> listed = config_along(Qwen2Config(num_hidden_layers=2, layer_types=kinds), [0, 1, 1])
        >>> listed.num_hidden_layers, listed.layer_types
        (3, ['full_attention', 'sliding_attention', 'sliding_attention'])
    """
    text = config.get_text_config()
    values = config.to_dict()
    fields = values
    if text is not config:
        fields = values[next(name for name, part in vars(config).items() if part is text)]
    fields.update(lists_along(fields, path, text.num_hidden_layers))
    fields[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(path)
    add_older_words(values)  # as it will be read: 5.0 forgets some of its own on the way
    return type(config).from_dict(values)


def lists_along(fields: Mapping[str, Any], path: Sequence[int], num_layers: int) -> dict[str, Any]:
    """Return the lists of a config that say something layer by layer, in path order.

    Args:
        fields: The config's values by name.
        path: Layer indices in the order executed.
        num_layers: L.

    Source: ours.

    Example:
        >>> lists_along({"dense_layers": [0, 2], "windows": [4, 8, 8], "width": 64}, [2, 1, 2], 3)
        {'dense_layers': [0, 2], 'windows': [8, 8, 8]}
    """
    lists = {}
    for name, value in fields.items():
        if not isinstance(value, (list, tuple)) or name.endswith(TOKENS):
            continue
        if "layer" in name and list(value) == [at for at in range(num_layers) if at in value]:
            lists[name] = [place for place, layer in enumerate(path) if layer in value]
        elif len(value) == num_layers:
            lists[name] = [value[layer] for layer in path]
    return lists


def check_layers(ours: nn.ModuleList, theirs: nn.ModuleList, path: Sequence[int]) -> None:
    """Refuse layers that are of another kind than those they stand for.

    Compared are classes, names and shapes of tensors, every plain attribute (a window, a switch
    for RoPE, a scale) except a layer's index, and the values of tensors that no checkpoint holds.

    Args:
        ours: Built from the config for the path; on the meta device tensors have no values, and
            none are compared.
        theirs: Of the base model.
        path: Layer indices in the order executed.

    Raises:
        ArchitectureError: Naming the layer and what differs.

    Source: ours.
    """
    for place, origin in enumerate(path):
        difference = _difference(ours[place], theirs[origin], place, origin)
        if difference is not None:
            raise ArchitectureError(
                f"layer {origin}, executed as number {place} (counted from 0), {difference}: the "
                f"config derives that from a layer's place or from their number, and can't say it "
                f"otherwise; give a path that leaves it as it is"
            )


def _difference(ours: nn.Module, theirs: nn.Module, place: int, origin: int) -> str | None:
    """Say in what a layer differs from the one that it stands for, or return None."""
    new, old = _description(ours), _description(theirs)
    for name in {**old, **new}:
        found, wanted = new.get(name), old.get(name)
        is_index = (found, wanted) == (place, origin)
        if not is_index and (name not in new or name not in old or found != wanted):
            return f"would have {found!r} as {name} instead of {wanted!r}"
    buffers = dict(theirs.named_buffers())
    for name, values in ours.named_buffers():
        if not values.is_meta and not torch.equal(values, buffers[name]):
            return f"would have other values in {name}"
    return None


def _description(layer: nn.Module) -> dict[str, Any]:
    """Return what a layer is made of, by name: classes, shapes, plain attributes."""
    modules = list(layer.named_modules())
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    described: dict[str, Any] = {
        f"the class of {name or 'the layer'}": type(module).__name__ for name, module in modules
    }
    described |= {f"the shape of {name}": tuple(tensor.shape) for name, tensor in tensors}
    for name, module in modules:
        for attribute, value in vars(module).items():
            hidden = attribute.startswith("_") or attribute in PASSING
            if isinstance(value, PLAIN) and not hidden:
                described[f"{name}.{attribute}".lstrip(".")] = value
    return described
