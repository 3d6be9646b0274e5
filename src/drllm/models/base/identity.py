"""Identify a base model: class, L, D, and a fingerprint of its weights.

A PEFT adapter changes neither, and weights that accelerate keeps elsewhere are read from there.

Axes: D hidden, L layers.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

    It hashes the names, shapes and the signs of the values of three weights: the input embedding,
    and the first matrix of the middle and of the last layer. Signs survive every change of dtype,
    so routers trained on a float32 model fit its bfloat16 load. They don't survive quantisation,
    which mostly leaves the embedding alone. So the text has 16 digits of all three, then 8 of the
    embedding; for a quantised model `QUANTISED`, 8 digits of the embedding, then 8 of how the model
    is quantised (see `same_weights`). An adapter that isn't merged doesn't count. Models are
    refused as by `find_layers`; weights on the meta device, of which nothing says where they really
    are, are a ModelError.
    """
    base = base_of(model)
    _, layers = find_layers(base)
    embedding = _content("embedding", base.get_input_embeddings())
    middle = len(layers) // 2
    last = len(layers) - 1
    inner = [_content(f"layers.{index}", layers[index]) for index in (middle, last)]
    quantisation: Any = getattr(base.config, "quantization_config", None)
    embedding_digits = _digest(embedding)[:8] if embedding else ""
    if quantisation is not None or None in inner:
        quantisation_digits = _digest(_quantisation_of(quantisation, layers[-1]).encode())[:8]
        return f"{QUANTISED}-{embedding_digits}-{quantisation_digits}"
    contents = [content for content in (embedding, *inner) if content]
    return f"{_digest(b''.join(contents))[:16]}-{embedding_digits}"


def _quantisation_of(quantisation: Any, layer: nn.Module) -> str:
    """Describe how a model is quantised: the classes in a layer, and the settings."""
    classes = [type(module).__name__ for module in layer.modules()]
    settings = quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation
    text = json.dumps(settings, default=lambda value: type(value).__name__)
    return repr([*classes, text])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(place: str, module: nn.Module) -> bytes | None:
    """Return what is hashed of a module's first matrix: name, shape, signs; None without one."""
    path = _first_matrix(module)
    if path is None:
        return None
    *parents, attribute = path.split(".")
    name = place
    if place != "embedding":
        name = ".".join([place, *(part for part in path.split(".") if part not in WRAPPED)])
    # The module, then the modules on the way to the weight, its owner last.
    modules = [module.get_submodule(".".join(parents[:n])) for n in range(len(parents) + 1)]
    with _weights_present(modules, attribute):
        weight = modules[-1].get_parameter(attribute).detach()
        if weight.is_meta:
            raise ModelError(
                f"the weight {name!r} is on the meta device, so the model has nothing to be "
                f"recognised by; load its weights first"
            )
        values = weight.reshape(-1)[:FINGERPRINT_VALUES].float()  # float8 has no signbit
        signs = np.packbits(torch.signbit(values).cpu().numpy()).tobytes()
    return f"{name} {list(weight.shape)}\n".encode() + signs


def _first_matrix(module: nn.Module) -> str | None:
    """Return the name of a module's first matrix of plain numbers; None if it has none.

    PEFT's layers have the module that they stand in for as their first part.
    """
    for path, weight in module.named_parameters():
        is_packed = type(weight).__module__.partition(".")[0] == "torchao"
        if weight.dim() == 2 and weight.is_floating_point() and not is_packed:
            return path
    return None


@contextmanager
def _weights_present(modules: Sequence[nn.Module], attribute: str) -> Iterator[None]:
    """Let accelerate bring a weight that it keeps elsewhere, as before each forward.

    Its hook sits on the last module, which owns the weight, or on one further out.
    """
    owner = modules[-1]
    with ExitStack() as stack:
        for module in reversed(modules):
            hook: Any = getattr(module, "_hf_hook", None)
            if hook is not None and owner.get_parameter(attribute).is_meta:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield
