"""Find a model's layers, and what its loop allows: routing, packed rows, prompts in parts.

A rule finds the layers, not a table of model names. Configurations and return annotations don't
say reliably what may be done with them, and a module may hold a state of its own. So `probe` runs
one token through the model before anything is attached to it.

Axes: P rows, T tokens, K keys.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from drllm.errors import ArchitectureError
from drllm.models.base.prompts import context_length

FOREIGN = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionCacheLayerMixin", "DynamicIndexedLayer", "StaticIndexedLayer")
    if hasattr(cache_utils, name)  # newer than the oldest supported transformers
)
"""Cache entries that hold more than K/V."""

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""What configurations call the number of tokens that a layer with a window sees."""


def base_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Find the module whose loop runs the layers, and the layers, inside a PEFT model too.

    The list is the one `ModuleList` of `num_hidden_layers` entries that is a direct child of
    `model.get_decoder()`. Where `get_decoder()` ends above the text stack, it is the one such
    list in any module that takes token ids, its entries of the classes that transformers never
    splits over devices. Models that have none, share K/V between layers, or have layers with a
    state other than K/V are an ArchitectureError.
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
    """Refuse a model whose class or configuration says that it can't be routed."""
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
    """Return the lists of L whole layers in any module of a model that takes token ids."""
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
    """Run one token with the model's own cache, and tell whether its layers return tuples.

    The model isn't routed yet; decoder and layers are those of `find_layers`. A loop that doesn't
    call each layer once or uses more of a layer's output than its hidden state, and layers that
    remember anything but K/V, are an ArchitectureError.
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
    """Return a prompt of one token, `[1, 1]`, where the model takes it."""
    device = base_of(model).device
    if device.type == "meta":  # offloaded: accelerate's hooks move the input where it belongs
        device = torch.device("cpu")
    return torch.zeros(1, 1, dtype=torch.long, device=device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off inside the block, in all parts of a module."""
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
    """Remove hooks after the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _foreign_state(output: Any, num_layers: int) -> str | None:
    """Say how layers remember a token in anything but one K/V entry each; None if they don't."""
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
    """Tell whether the continuations of a prompt may stand in one row after a single copy of it.

    It takes attention that sees what a mask allows. Such a mask replaces a window, or is cut by it
    column by column, and some models keep one as wide as their context. So no row may be longer
    than these; `length` is that of the longest.
    """
    if not _takes_any_mask(model):
        return False
    longest = min(_window(model), context_length(model) or length)
    return length <= longest


def can_split(model: Any) -> bool:
    """Tell whether a prompt may be read in parts, the later ones with the K/V of the earlier.

    It takes attention that sees what a mask allows, no windows at any layer, and rotations that
    don't depend on how much is read at once.
    """
    rotations = {str(part.rope_type) for part in model.modules() if hasattr(part, "rope_type")}
    if any("dynamic" in kind or "longrope" in kind for kind in rotations):
        return False
    return _takes_any_mask(model) and _window(model) == math.inf


def _takes_any_mask(model: Any) -> bool:
    """Tell whether the model takes masks and positions that no ordinary text has."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    # ALiBi (MPT, Bloom, some Falcons) takes columns for positions.
    if getattr(model.config.get_text_config(), "alibi", False):
        return False
    decoder, _ = find_layers(model)
    # Up to transformers 5.0 XGLM and few others take a mask `[P, 1, T, K]` for one of ones and
    # zeros, by this function, which later versions have no use for.
    if hasattr(sys.modules[type(decoder).__module__], "_prepare_4d_causal_attention_mask"):
        return False
    return "position_ids" in inspect.signature(type(decoder).forward).parameters


def _window(model: Any) -> float:
    """Return the smallest number of tokens that a layer sees; infinity if all see all."""
    text = model.config.get_text_config()
    sizes = [getattr(text, name, None) for name in WINDOWS]
    return min((size for size in sizes if size), default=math.inf)  # 0 is none too
