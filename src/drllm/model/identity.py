"""Identify a base model by its class, its L and D, and a fingerprint of its weights.

A PEFT adapter that isn't merged doesn't change the identity, so routers may be used with one. What
a stage measures isn't the same with an adapter, so `describe_adapters` identifies the adapters on
their own. Weights that accelerate has offloaded are loaded for both.

Axes: D hidden, L layers.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drllm.errors import ModelError
from drllm.model.layers import find_layers, unwrap_peft
from drllm.records.identity import QUANTISED

FINGERPRINT_VALUES = 2**20  # values to read from each tensor, enough to tell fine-tunes apart
ADAPTERS = "adapters"
"""The key of the hash of the active adapters. Without an adapter the key is missing."""
PEFT_NAMES = ("base_layer", "original_module")
"""The names under which PEFT's layers hold the module that they replace."""


def describe(model: Any) -> dict[str, Any]:
    """Describe a base model: its `class`, `num_layers`, `hidden_size` and `fingerprint`."""
    base = unwrap_peft(model)
    text = base.config.get_text_config()
    return {
        "class": type(base).__name__,
        "num_layers": int(text.num_hidden_layers),
        "hidden_size": int(text.hidden_size),
        "fingerprint": fingerprint(base),
    }


def describe_adapters(model: Any) -> dict[str, str]:
    """Describe the active adapters of PEFT that run in a model's modules.

    Returns:
        `ADAPTERS` → a hash of their tensors and of what they are scaled by; empty without adapters.
    """
    base: nn.Module = unwrap_peft(model)
    digest = hashlib.sha256()
    has_adapters = False
    for place, module in base.named_modules():
        for name in _list_active_adapters(module):
            has_adapters = True
            for part in _list_adapter_parts(module, place, name):
                digest.update(part)
    if not has_adapters:
        return {}
    return {ADAPTERS: digest.hexdigest()[:16]}


def _list_adapter_parts(module: nn.Module, place: str, name: str) -> Iterator[bytes]:
    """Yield what an adapter of a module is hashed from: its scaling, and its tensors."""
    scaling: Any = getattr(module, "scaling", None)
    if isinstance(scaling, dict):
        yield f"{place} {scaling.get(name)}\n".encode()
    for path, _ in module.named_parameters():
        if name not in path.split("."):
            continue  # of the module that is adapted, or of another adapter
        with _loaded(module, path) as tensor:
            content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            yield f"{place}.{path} {list(tensor.shape)} {tensor.dtype}\n".encode()
            yield content.numpy().tobytes()


def _list_active_adapters(module: nn.Module) -> list[str]:
    """Return the names of the active adapters of a module of PEFT; none for other modules."""
    # Models of transformers also have attributes of the other two names.
    if not hasattr(module, "adapter_layer_names"):
        return []
    peft_module: Any = module
    if peft_module.disable_adapters:
        return []
    return list(peft_module.active_adapters)


def fingerprint(model: nn.Module) -> str:
    """Return a short text that identifies a model's weights; fine-tunes have other fingerprints.

    The fingerprint hashes the names, the shapes and the signs of the values of three weights: the
    input embedding, the first matrix of the middle layer, and the first matrix of the last layer.
    Signs survive every change of dtype, so routers trained on a float32 model fit the same model in
    bfloat16. Quantisation changes the signs of the layers, but mostly not those of the embedding.
    So the embedding has digits of its own, which a model and its quantised form mostly share:

        not quantised: ALL-EMBEDDING (16 and 8 digits)
        quantised: QUANTISED-EMBEDDING-QUANTISATION (`QUANTISED`, 8 and 8 digits)

    `have_same_weights` compares fingerprints.

    Raises:
        ArchitectureError: See `find_layers`.
        ModelError: A weight is on the meta device, and accelerate doesn't know its values.
    """
    base = unwrap_peft(model)
    _, layers = find_layers(base)
    embedding = _read_signs("embedding", base.get_input_embeddings())
    middle = len(layers) // 2
    last = len(layers) - 1
    inner = [_read_signs(f"layers.{index}", layers[index]) for index in (middle, last)]
    quantisation: Any = getattr(base.config, "quantization_config", None)
    embedding_digits = _digest(embedding)[:8] if embedding else ""
    # A layer without an unquantised matrix is quantised, whatever the config says.
    if quantisation is not None or None in inner:
        description = _describe_quantisation(quantisation, layers[-1])
        quantisation_digits = _digest(description.encode())[:8]
        return f"{QUANTISED}-{embedding_digits}-{quantisation_digits}"
    # The embedding may be quantised alone.
    contents = [content for content in (embedding, *inner) if content]
    return f"{_digest(b''.join(contents))[:16]}-{embedding_digits}"


def _describe_quantisation(quantisation: Any, layer: nn.Module) -> str:
    """Describe how a model is quantised: the classes in a layer, and the settings."""
    classes = [type(module).__name__ for module in layer.modules()]
    settings = quantisation
    if hasattr(quantisation, "to_dict"):
        settings = quantisation.to_dict()
    text = json.dumps(settings, default=lambda value: type(value).__name__)
    return repr([*classes, text])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_signs(place: str, module: nn.Module) -> bytes | None:
    """Return the name, shape and signs of a module's first matrix as bytes; None if it has none.

    Args:
        place: The module's place in the model: `embedding` or `layers.INDEX`.
        module: The embedding or a layer.
    """
    path = find_first_matrix(module)
    if path is None:
        return None
    name = place
    if place != "embedding":
        # Without PEFT's names, so that a model has the same fingerprint with and without adapter.
        parts = [part for part in path.split(".") if part not in PEFT_NAMES]
        name = ".".join([place, *parts])
    with _loaded(module, path, name) as weight:
        values = weight.reshape(-1)[:FINGERPRINT_VALUES].float()  # float8 has no signbit
        signs = np.packbits(torch.signbit(values).cpu().numpy()).tobytes()
    return f"{name} {list(weight.shape)}\n".encode() + signs


def find_first_matrix(module: nn.Module) -> str | None:
    """Return the name of a module's first unquantised matrix; None if there is none.

    In a PEFT layer this is a matrix of the original module, since the original module comes first.
    """
    for path, weight in module.named_parameters():
        is_packed = type(weight).__module__.partition(".")[0] == "torchao"
        if weight.dim() == 2 and weight.is_floating_point() and not is_packed:
            return path
    return None


@contextmanager
def _loaded(module: nn.Module, path: str, name: str = "") -> Iterator[Tensor]:
    """Yield a weight inside a module, and let accelerate load it inside the block.

    Args:
        module: The module.
        path: The weight's place in the module.
        name: The weight's name for an error; empty for its place.

    Raises:
        ModelError: The weight is on the meta device, and accelerate doesn't know its values.
    """
    *parents, attribute = path.split(".")
    # The module itself, then its submodules down to the owner of the weight.
    modules = [module.get_submodule(".".join(parents[:n])) for n in range(len(parents) + 1)]
    with _load_offloaded(modules, attribute):
        weight = modules[-1].get_parameter(attribute).detach()
        if weight.is_meta:
            raise ModelError(
                f"the weight {name or path!r} is on the meta device, so the model can't be "
                f"identified; load its weights first"
            )
        yield weight


@contextmanager
def _load_offloaded(modules: Sequence[nn.Module], attribute: str) -> Iterator[None]:
    """Let accelerate load an offloaded weight inside the block, as it does for a forward pass.

    The last of the modules owns the weight. accelerate's hook is on this module or on a module
    around it.
    """
    owner = modules[-1]
    with ExitStack() as stack:
        for module in reversed(modules):
            hook: Any = getattr(module, "_hf_hook", None)
            if hook is not None and owner.get_parameter(attribute).is_meta:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield
