"""Make a model of some of another model's layers: an ordinary transformers model, tensors shared.

The submodel is built from its config on the meta device, and gets the base model's own tensors. So
it takes no memory of its own, and everything that takes a transformers model takes it: scoring,
generation, PEFT, `save_pretrained`, pipelines. Who changes a weight of it puts a new tensor in
place, and never writes into a shared one; so the base model stays as it is, bit for bit.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from drllm.errors import ArchitectureError, PathError
from drllm.model import hub
from drllm.model.identity import find_first_matrix
from drllm.model.layers import find_layers
from drllm.model.path_config import check_layers, reorder_config

KEPT_LAYERS = "kept_layers"
"""The entry of a submodel's config that lists the base model's layers that it has."""

BUILD_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    StrictDataclassError,
    NotImplementedError,  # from a class that looks at its weights while it is built
)
"""Errors that transformers raises if a model can't be built from a config."""


def shorten(model: Any, skip: Iterable[int]) -> Any:
    """Return a model without some of a model's layers.

    The result is an ordinary `PreTrainedModel` of the same class, and shares its tensors with
    `model`. Its config lists in `kept_layers` which of the first model's layers it has.

    Args:
        model: A model of transformers, without PEFT and without quantised weights. It may be a
            shortened one; the layers are then counted in it.
        skip: The layers to leave out, from 0. The first layer may go, but not all.

    Raises:
        PathError: A layer doesn't exist, is named twice, or none would stay.
        ArchitectureError: The model's class isn't one of transformers, its weights are quantised or
            offloaded, or its config can't express a model without these layers.

    Source: ours.

    Example:
        >>> small = shorten(model, skip=[2, 3, 4])  # doctest: +SKIP
        >>> small.config.num_hidden_layers  # doctest: +SKIP
        27
    """
    name = type(model).__name__
    if not type(model).__module__.startswith("transformers."):
        raise ArchitectureError(
            f"{name} isn't a class of transformers, and a shortened model must load without other "
            f"code; give a model that needs no code of its own and isn't wrapped by PEFT"
        )
    _, layers = find_layers(model)
    if getattr(model, "hf_quantizer", None) is not None or find_first_matrix(layers[0]) is None:
        raise ArchitectureError(
            f"the weights of this {name} are quantised, and a shortened model shares weights as "
            f"they were trained; shorten the model without quantisation, then quantise the result"
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise ArchitectureError(
            f"some weights of this {name} are offloaded; load it without a device map that offloads"
        )
    kept = _list_kept(skip, len(layers))
    try:
        config = reorder_config(model.config, kept)
        with torch.device("meta"):
            short = AutoModelForCausalLM.from_config(
                config, attn_implementation=model.config._attn_implementation
            )
    except BUILD_ERRORS as error:
        raise ArchitectureError(
            f"the config of {name} can't express a model without the layers {sorted(set(skip))}: "
            f"{hub.first_line(error)}; leave out other layers"
        ) from error
    if type(short) is not type(model):
        raise ArchitectureError(
            f"this is a {name}, but AutoModelForCausalLM would load it as a "
            f"{type(short).__name__}; give only the language model"
        )
    check_layers(find_layers(short)[1], layers, kept)
    _share_tensors(model, short, _find_name(model, layers), kept)
    origins = list_kept_layers(model)
    setattr(short.config, KEPT_LAYERS, [origins[layer] for layer in kept])
    short.generation_config = copy.deepcopy(model.generation_config)
    short.name_or_path = model.name_or_path
    return short.train(model.training)


def list_kept_layers(model: Any) -> list[int]:
    """Return which of its base model's layers a model has; all, unless it was shortened."""
    num_layers = model.config.get_text_config().num_hidden_layers
    kept = getattr(model.config, KEPT_LAYERS, None)
    return list(range(num_layers)) if kept is None else list(kept)


def _list_kept(skip: Iterable[int], num_layers: int) -> list[int]:
    """Return the layers that stay, in order; refuse layers that don't exist or come twice."""
    skipped = list(skip)
    for layer in skipped:
        if not 0 <= layer < num_layers:
            raise PathError(
                f"layer {layer} can't be left out of a model with the layers 0 to {num_layers - 1}"
            )
        if skipped.count(layer) > 1:
            raise PathError(f"layer {layer} is left out twice; name each layer once")
    kept = [layer for layer in range(num_layers) if layer not in skipped]
    if not kept:
        raise PathError(f"all {num_layers} layers are left out; keep at least one")
    return kept


def _find_name(model: nn.Module, module: nn.Module) -> str:
    return next(str(name) for name, other in model.named_modules() if other is module)


def _share_tensors(base: Any, short: Any, prefix: str, kept: Sequence[int]) -> None:
    """Give a submodel on the meta device the tensors of its base model.

    Args:
        base: The base model.
        short: The submodel.
        prefix: The name of the list of layers.
        kept: The layers of the base model that the submodel has.
    """
    tensors: dict[str, Tensor] = {}
    base_tensors = base.state_dict()
    for name in short.state_dict():
        origin = _find_origin(name, prefix, kept)
        if origin not in base_tensors:
            raise ArchitectureError(
                f"this {type(base).__name__} has no weight {origin!r}, which its class makes; "
                f"merge or remove what was added to the model, such as an adapter"
            )
        tensors[name] = base_tensors[origin]
    short.load_state_dict(tensors, assign=True)
    short.tie_weights()
    # What a state dict doesn't have: buffers such as the frequencies of RoPE, and plain attributes.
    base_modules = dict(base.named_modules())
    for name, module in short.named_modules():
        base_module = base_modules[_find_origin(name, prefix, kept)]
        for values in (module._buffers, vars(module)):
            for attribute, value in values.items():
                if isinstance(value, Tensor) and value.is_meta:
                    values[attribute] = getattr(base_module, attribute)
    for parameter in short.parameters():
        parameter.requires_grad_(False)


def _find_origin(name: str, prefix: str, kept: Sequence[int]) -> str:
    """Return what a submodel's module or tensor is called in the base model."""
    if not name.startswith(f"{prefix}."):
        return name
    place, dot, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{kept[int(place)]}{dot}{rest}"
