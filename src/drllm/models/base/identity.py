"""What a base model is recognised by: class, L, D, and a fingerprint of its weights.

A PEFT adapter changes neither, and weights that accelerate keeps elsewhere are read from there.

Axes: D hidden, L layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from drllm.errors import ModelError
from drllm.models.base.layers import base_of, find_layers

FINGERPRINT_VALUES = 2**20  # values read of each tensor: enough to tell fine-tunes apart
WRAPPED = ("base_layer", "original_module")
"""The names by which PEFT's layers keep the module that they stand in for."""

Weight = tuple[str, tuple[nn.Module, ...], str]
"""A weight: its name in the module looked at, the modules around it (owner last), its own name."""


def describe(model: Any) -> dict[str, Any]:
    """Return `class`, `num_layers`, `hidden_size` and `fingerprint` of a base model.

    Takes and refuses what `fingerprint` does.
    """
    base = base_of(model)
    text = base.config.get_text_config()
    return {
        "class": type(base).__name__,
        "num_layers": int(text.num_hidden_layers),
        "hidden_size": int(text.hidden_size),
        "fingerprint": fingerprint(base),
    }


def fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits that another model, or a fine-tune of the same one, doesn't share.

    Hashed are the names, shapes and the signs of the values of three weights: input embedding, and
    the first matrix of the middle and of the last layer. Signs survive every change of dtype, so
    routers trained on a float32 model fit its bfloat16 or float16 load. An adapter that isn't
    merged into the weights doesn't count.

    Raises:
        ArchitectureError: The model's layers can't be found, or can't be routed.
        ModelError: The weights are on the meta device, and nothing says where they really are.

    Source: ours.
    """
    base = base_of(model)
    _, layers = find_layers(base)
    digest = hashlib.sha256(_content("embedding", base.get_input_embeddings()))
    for index in (len(layers) // 2, len(layers) - 1):
        digest.update(_content(f"layers.{index}", layers[index]))
    return digest.hexdigest()[:16]


def _weights(module: nn.Module, prefix: str, around: tuple[nn.Module, ...]) -> Iterator[Weight]:
    """Yield every weight, in the order and by the name that it has without an adapter."""
    around = (*around, module)
    children = dict(module.named_children())
    wrapped = next((children[name] for name in WRAPPED if name in children), None)
    if wrapped is not None:
        yield from _weights(wrapped, prefix, around)
        return
    for own, _ in module.named_parameters(recurse=False):
        yield f"{prefix}{own}", around, own
    for name, child in children.items():
        yield from _weights(child, f"{prefix}{name}.", around)


def _content(place: str, module: nn.Module) -> bytes:
    """Return what is hashed of a module's first matrix: name, shape, signs."""
    name, around, own = next(
        weight
        for weight in _weights(module, "", ())
        if weight[1][-1].get_parameter(weight[2]).dim() == 2
    )
    name = place if place == "embedding" else f"{place}.{name}"
    owner = around[-1]
    with ExitStack() as fetched:
        for holder in reversed(around):  # accelerate's hook sits on the owner, or further out
            hook: Any = getattr(holder, "_hf_hook", None)
            if hook is not None and owner.get_parameter(own).is_meta:
                hook.pre_forward(holder)  # brings the weights, as before each forward
                fetched.callback(hook.post_forward, holder, None)
        values = owner.get_parameter(own).detach()
        if values.is_meta:
            raise ModelError(
                f"the weight {name!r} is on the meta device, so the model has nothing to be "
                f"recognised by; load its weights first"
            )
        first = values.reshape(-1)[:FINGERPRINT_VALUES].float()  # float8 has no signbit
        signs = np.packbits(torch.signbit(first).cpu().numpy()).tobytes()
    return f"{name} {list(values.shape)}\n".encode() + signs
