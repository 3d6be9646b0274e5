"""Find a model's layers and their linear maps, and test what the loop over the layers allows.

The loop may allow routing, packed rows, and prompts in parts. The layers are found by a rule, not
by a table of model names. Configurations and return annotations don't say reliably what a loop
allows, and a module may have a state besides K/V. So `probe` runs one token through the model
before anything is attached to the model.

Axes: P rows, T tokens, K keys.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from drllm.errors import ArchitectureError
from drllm.models.base.prompts import context_length

FOREIGN = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionCacheLayerMixin", "DynamicIndexedLayer", "StaticIndexedLayer")
    if hasattr(cache_utils, name)  # the oldest supported transformers lacks some of the classes
)
"""Classes of cache entries that hold more than K/V."""

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""Names of a setting in models' configs: how many tokens a layer with a window sees."""


def base_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Find the module whose loop runs the layers, and the layers. The model may be a PEFT model.

    The layers are the only `ModuleList` of `num_hidden_layers` entries among the direct children of
    `model.get_decoder()`. In some models `get_decoder()` returns a module above the text stack,
    whose children have no such list. Then the layers are the only `ModuleList` of this length in
    any module that takes token ids; its entries must be of the classes that transformers never
    splits over devices.

    Raises:
        ArchitectureError: The model doesn't have exactly one such list, shares K/V between layers,
            or has layers with a state other than K/V.
    """
    model = base_of(model)
    _refuse_by_config(model)
    num_layers = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    lists = _lists_in(decoder, num_layers) or _lists_below(model, num_layers)
    if len(lists) != 1:
        raise ArchitectureError(
            f"{type(model).__name__}: found {len(lists)} lists of {num_layers} layers in "
            f"{type(decoder).__name__}, expected one; this architecture can't be routed yet"
        )
    return lists[0]


def _refuse_by_config(model: Any) -> None:
    """Refuse a model whose class or configuration shows that it can't be routed."""
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
    kinds = [
        *(getattr(text, "layer_types", None) or ()),
        *(getattr(text, "layers_block_type", None) or ()),
    ]
    foreign = {kind for kind in kinds if not kind.endswith("attention") or "linear" in kind}
    if foreign:
        raise ArchitectureError(
            f"{name} has layers of type {', '.join(sorted(foreign))}, whose state is not K/V; "
            f"it can't be routed"
        )


def _lists_in(module: nn.Module, num_layers: int) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return the lists of L layers among a module's direct children, each with the module."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return [(module, layers) for layers in lists if len(layers) == num_layers]


def _lists_below(model: Any, num_layers: int) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return the lists of L layers in all of a model's modules that take token ids."""
    layer_classes = set(getattr(model, "_no_split_modules", None) or ())
    lists = []
    for module in model.modules():
        for parent, layers in _lists_in(module, num_layers):
            classes = {type(layer).__name__ for layer in layers}
            arguments = inspect.signature(type(parent).forward).parameters
            if classes <= layer_classes and "input_ids" in arguments:
                lists.append((parent, layers))
    return lists


def is_kv(entry: Any) -> bool:
    """Tell whether a cache entry holds K/V and nothing else."""
    return isinstance(entry, CacheLayerMixin) and not isinstance(entry, FOREIGN)


def probe(model: Any, decoder: nn.Module, layers: nn.ModuleList) -> bool:
    """Run one token to check that a model can be routed; tell whether its layers return tuples.

    Args:
        model: A model that isn't routed yet.
        decoder: The module that runs the layers, from `find_layers`.
        layers: The layers, from `find_layers`.

    Raises:
        ArchitectureError: The loop doesn't call each layer once, the loop uses more of a layer's
            output than the hidden state, or a layer keeps a state other than K/V.
    """
    name = type(base_of(model)).__name__
    token = one_token(model)
    outputs: list[Any] = []

    def run(hook: Callable[[nn.Module, Any, Any], Any]) -> Any:
        hooks = [layer.register_forward_hook(hook) for layer in layers]
        with hooked(hooks), torch.no_grad(), evaluating(decoder):
            return decoder(input_ids=token, use_cache=True)

    result = run(lambda _layer, _inputs, output: outputs.append(output))
    if len(outputs) != len(layers):
        raise ArchitectureError(
            f"{name} called {len(outputs)} of its {len(layers)} layers in a forward pass; "
            f"its loop can't be routed"
        )
    foreign = _foreign_state(result, len(layers))
    if foreign is not None:
        raise ArchitectureError(
            f"{name} keeps state other than K/V in its layers ({foreign}); it can't be routed"
        )
    if not isinstance(outputs[0], tuple):
        return False

    # Does the loop work with the hidden state alone?
    try:
        hidden_only = run(lambda _layer, _inputs, output: output[:1])
    except (IndexError, TypeError, ValueError):  # the loop unpacks more
        hidden_only = None
    if hidden_only is None or not torch.equal(hidden_only[0], result[0]):
        raise ArchitectureError(
            f"the layers of {name} return more than a hidden state; what a skipped layer should "
            f"return isn't known, so it can't be routed"
        )
    return True


def one_token(model: Any) -> torch.Tensor:
    """Return a prompt of one token, `[1, 1]`, on the model's device."""
    device = base_of(model).device
    if device.type == "meta":  # offloaded: accelerate's hooks move the input to the right device
        device = torch.device("cpu")
    return torch.zeros(1, 1, dtype=torch.long, device=device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and its parts into evaluation mode inside the block.

    Evaluation mode turns dropout and gradient checkpointing off.
    """
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks after the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _foreign_state(output: Any, num_layers: int) -> str | None:
    """Describe what the cache has other than one K/V entry per layer; None if there is nothing."""
    caches = [value for value in output.values() if isinstance(value, Cache)]
    if not caches:
        return "no K/V cache comes back from a forward pass"
    entries = getattr(caches[0], "layers", [])
    foreign = {type(entry).__name__ for entry in entries if not is_kv(entry)}
    if foreign:
        return f"its cache holds {', '.join(sorted(foreign))}"
    if len(entries) != num_layers:
        return f"its cache has {len(entries)} entries for {num_layers} layers"
    if any(int(entry.get_seq_length()) != 1 for entry in entries):
        return "some of its layers store nothing of a token"
    return None


def can_pack(model: Any, length: int) -> bool:
    """Tell whether all continuations of a prompt can share one row and one copy of the prompt.

    The model's attention has to follow an arbitrary mask. In a model with windows an arbitrary mask
    either replaces the window, or the window cuts the mask column by column. Some models keep a
    mask as wide as their context. So the longest row, of `length` tokens, has to fit into the
    window and the context.
    """
    if not _takes_any_mask(model):
        return False
    longest = min(_window(model), context_length(model) or length)
    return length <= longest


def can_split(model: Any) -> bool:
    """Tell whether a prompt can be read in parts, each with the K/V of the parts before it.

    The model's attention has to follow an arbitrary mask, no layer may have a window, and the
    rotary embedding must not depend on how many tokens are read at once.
    """
    rotations = {str(part.rope_type) for part in model.modules() if hasattr(part, "rope_type")}
    if any("dynamic" in kind or "longrope" in kind for kind in rotations):
        return False
    return _takes_any_mask(model) and _window(model) == math.inf


def _takes_any_mask(model: Any) -> bool:
    """Tell whether the model follows arbitrary masks and positions."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    # ALiBi (MPT, Bloom, some Falcons) uses columns as positions.
    if getattr(model.config.get_text_config(), "alibi", False):
        return False
    decoder, _ = find_layers(model)
    # Up to transformers 5.0, XGLM and a few others use this function, which reads a mask
    # `[P, 1, T, K]` as ones and zeros.
    if hasattr(sys.modules[type(decoder).__module__], "_prepare_4d_causal_attention_mask"):
        return False
    return "position_ids" in inspect.signature(type(decoder).forward).parameters


def _window(model: Any) -> float:
    """Return the smallest window of any layer, in tokens; infinity if no layer has one."""
    text = model.config.get_text_config()
    sizes = [getattr(text, name, None) for name in WINDOWS]
    return min((size for size in sizes if size), default=math.inf)  # 0 means no window


MAP_ROWS = 3
MAP_TOKENS = 5
"""`MAP_ROWS` and `MAP_TOKENS` are the shape of the batch that `find_linear_maps` runs."""


def find_linear_maps(model: Any) -> dict[str, nn.Module]:
    """Find the layers' linear maps, by name. The input of each is a batch with all rows and tokens.

    So the maps of experts are left out, and maps whose input is one long row of all tokens. A map's
    name has the layer and the map's place in the layer, such as `14.mlp.up_proj`. If PEFT has
    wrapped a map in a LoRA layer, the result has the map itself.
    """
    decoder, layers = find_layers(model)
    maps: dict[str, nn.Module] = {}

    def add_map(name: str, module: nn.Module, args: Any, _output: Any) -> None:
        if args and args[0].shape[:2] == (MAP_ROWS, MAP_TOKENS):
            maps[name] = module

    hooks = []
    for index, layer in enumerate(layers):
        for place, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in place:
                name = f"{index}.{place.removesuffix('.base_layer')}"
                hooks.append(module.register_forward_hook(partial(add_map, name)))
    ids = one_token(model).expand(MAP_ROWS, MAP_TOKENS)
    with hooked(hooks), torch.no_grad(), evaluating(decoder):
        decoder(input_ids=ids, use_cache=False)
    return maps
