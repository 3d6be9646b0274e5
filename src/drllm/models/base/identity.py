"""What a base model is recognised by: class, L, D, and a fingerprint of its weights.

A PEFT adapter changes neither, and weights that accelerate keeps elsewhere are read from there.

Axes: D hidden, L layers.
"""

import hashlib
import json
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from drllm.errors import ModelError
from drllm.models.base.layers import base_of, find_layers
from drllm.records.identity import QUANTISED

FINGERPRINT_VALUES = 2**20  # values read of each tensor: enough to tell fine-tunes apart
WRAPPED = ("base_layer", "original_module")
"""The names by which PEFT's layers keep the module that they stand in for."""


def describe(model: Any) -> dict[str, Any]:
    """Return `class`, `num_layers`, `hidden_size` and `fingerprint` of a base model."""
    base = base_of(model)
    text = base.config.get_text_config()
    return {
        "class": type(base).__name__,
        "num_layers": int(text.num_hidden_layers),
        "hidden_size": int(text.hidden_size),
        "fingerprint": fingerprint(base),
    }


def fingerprint(model: nn.Module) -> str:
    """Return a text that tells a model's weights from those of others, its own fine-tunes too.

    Hashed are the names, shapes and the signs of the values of three weights: input embedding, and
    the first matrix of the middle and of the last layer. Signs survive every change of dtype, so
    routers trained on a float32 model fit its bfloat16 load. They don't survive quantisation, which
    mostly leaves the embedding alone: behind the 16 digits of all three, or `QUANTISED` in their
    place, stand 8 of the embedding, then 8 of how the model is quantised (see `same_weights`). An
    adapter that isn't merged doesn't count. Models are refused as by `find_layers`; weights on the
    meta device, of which nothing says where they really are, are a ModelError.
    """
    base = base_of(model)
    _, layers = find_layers(base)
    embedding = _content("embedding", base.get_input_embeddings())
    inner = [_content(f"layers.{at}", layers[at]) for at in (len(layers) // 2, len(layers) - 1)]
    quantisation: Any = getattr(base.config, "quantization_config", None)
    is_quantised = quantisation is not None or None in inner
    known = _digest(embedding)[:8] if embedding else ""
    if not is_quantised:
        return f"{_digest(b''.join(filter(None, [embedding, *inner])))[:16]}-{known}"
    how = [type(module).__name__ for module in layers[-1].modules()]
    settings = quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation
    how.append(json.dumps(settings, default=lambda one: type(one).__name__))
    return f"{QUANTISED}-{known}-{_digest(repr(how).encode())[:8]}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(place: str, module: nn.Module) -> bytes | None:
    """Return what is hashed of a module's first matrix: name, shape, signs; None without one."""
    # An adapter's layers have what they stand in for as their first part.
    for path, weight in module.named_parameters():
        is_packed = type(weight).__module__.partition(".")[0] == "torchao"
        if weight.dim() == 2 and weight.is_floating_point() and not is_packed:
            *parts, own = path.split(".")
            break
    else:
        return None
    inner = [part for part in (*parts, own) if part not in WRAPPED]
    name = place if place == "embedding" else ".".join([place, *inner])
    around = [module.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
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
