"""Which layers a model has, found by a rule instead of a table of model names.

Models whose layers hold a state that skipping or repeating would break are refused.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from drllm.errors import ArchitectureError


def base_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Find the module whose loop runs the layers, and the layers, inside a PEFT model too.

    The list is the one `ModuleList` of `num_hidden_layers` entries that is a direct child of
    `model.get_decoder()`. Where `get_decoder()` ends above the text stack, it is the one such
    list in any module that takes token ids, its entries of the classes that transformers never
    splits over devices.

    Raises:
        ArchitectureError: The model has no such list, shares K/V between layers, or has layers
            with a state other than K/V.

    Source: ours; a rule in place of a table of model names.
    """
    model = base_of(model)
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ArchitectureError(f"{name} is not a decoder-only language model of transformers")
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"{name} has an encoder; only decoder-only models can be routed")
    text = config.get_text_config()
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_sharing_modes", None):
        raise ArchitectureError(
            f"{name} shares keys and values between layers; skipping a layer would break its "
            f"readers, so it can't be routed"
        )
    kinds = {
        *(getattr(text, "layer_types", ()) or ()),
        *(getattr(text, "layers_block_type", ()) or ()),
    }
    foreign = sorted(kind for kind in kinds if not kind.endswith("attention") or "linear" in kind)
    if foreign:
        raise ArchitectureError(
            f"{name} has layers of type {', '.join(foreign)}, whose state is not K/V; "
            f"it can't be routed"
        )
    num_layers, decoder = text.num_hidden_layers, model.get_decoder()

    def lists_in(parent: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
        children = [child for child in parent.children() if isinstance(child, nn.ModuleList)]
        return [(parent, child) for child in children if len(child) == num_layers]

    found = lists_in(decoder)
    if not found:
        whole = set(getattr(model, "_no_split_modules", None) or ())
        found = [
            (parent, layers)
            for module in model.modules()
            for parent, layers in lists_in(module)
            if {type(layer).__name__ for layer in layers} <= whole
            and "input_ids" in inspect.signature(parent.forward).parameters
        ]
    if len(found) != 1:
        raise ArchitectureError(
            f"{name}: found {len(found)} lists of {num_layers} layers in "
            f"{type(decoder).__name__}, expected one; this architecture can't be routed yet"
        )
    return found[0]
