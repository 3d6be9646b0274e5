"""Find a model's layers and their linear maps, and test what the loop over the layers allows.

`find_layers` finds the layers by a rule, not by a table of model names. `check_loop` tests whether
the loop allows routing. It runs one token through the model, since configs and return annotations
don't say this reliably. `can_pack` tests whether several continuations may share a row, and
`can_split` whether a prompt may be read in parts.

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
from transformers.pytorch_utils import Conv1D

from drllm.errors import ArchitectureError
from drllm.model.prompts import context_length

NOT_KV = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionCacheLayerMixin", "DynamicIndexedLayer", "StaticIndexedLayer")
    if hasattr(cache_utils, name)  # the oldest supported transformers lacks some of the classes
)
"""Classes of cache entries whose state isn't K/V, or not K/V alone."""

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""The names that configs give to the number of tokens that a layer with a window sees."""

MAP_ROWS = 3
MAP_TOKENS = 5
"""The shape of the batch that `run_batch` runs, `[MAP_ROWS, MAP_TOKENS]`."""


def unwrap_peft(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def find_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module whose loop runs the layers, and the layers. The model may be a PEFT model.

    The layers are the only `ModuleList` of `num_hidden_layers` entries among the direct children of
    `model.get_decoder()`. In some models `get_decoder()` returns a module above the text stack,
    whose children have no such list. Then the layers are the only `ModuleList` of this length in
    any module that takes token ids. All its entries must be of classes that the model lists in
    `_no_split_modules`; these are the classes of whole layers.

    Raises:
        ArchitectureError: The model doesn't have exactly one such list, shares K/V between layers,
            or has layers with a state other than K/V.
    """
    model = unwrap_peft(model)
    _refuse_by_config(model)
    num_layers = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    lists = _find_lists_in(decoder, num_layers) or _find_lists_below(model, num_layers)
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
    # Linear attention has a recurrent state.
    not_kv = {kind for kind in kinds if not kind.endswith("attention") or "linear" in kind}
    if not_kv:
        raise ArchitectureError(
            f"{name} has layers of type {', '.join(sorted(not_kv))}, whose state is not K/V; "
            f"it can't be routed"
        )


def _find_lists_in(module: nn.Module, num_layers: int) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return the module with each list of L layers among its direct children."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return [(module, layers) for layers in lists if len(layers) == num_layers]


def _find_lists_below(model: Any, num_layers: int) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return each list of L layers with its module, for all modules that take token ids."""
    layer_classes = set(getattr(model, "_no_split_modules", None) or ())
    lists = []
    for module in model.modules():
        for parent, layers in _find_lists_in(module, num_layers):
            classes = {type(layer).__name__ for layer in layers}
            arguments = inspect.signature(type(parent).forward).parameters
            if classes <= layer_classes and "input_ids" in arguments:
                lists.append((parent, layers))
    return lists


def is_kv(entry: Any) -> bool:
    """Tell whether a cache entry holds K/V and nothing else."""
    return isinstance(entry, CacheLayerMixin) and not isinstance(entry, NOT_KV)


def check_loop(model: Any, decoder: nn.Module, layers: nn.ModuleList) -> bool:
    """Run one token to check that a model can be routed; tell whether its layers return tuples.

    A model without weights can't run, so it isn't checked, and the result is False. It stands for a
    model in other processes, which check theirs.

    Args:
        model: A model that isn't routed yet.
        decoder: The module that runs the layers, from `find_layers`.
        layers: The layers, from `find_layers`.

    Raises:
        ArchitectureError: The loop doesn't call each layer once, the loop uses more of a layer's
            output than the hidden state, or a layer keeps a state other than K/V.
    """
    if _has_no_weights(model):
        return False
    name = type(unwrap_peft(model)).__name__
    outputs: list[Any] = []
    result = _run_with_hook(
        model, decoder, layers, lambda _layer, _inputs, output: outputs.append(output)
    )
    if len(outputs) != len(layers):
        raise ArchitectureError(
            f"{name} called {len(outputs)} of its {len(layers)} layers in a forward pass; "
            f"its loop can't be routed"
        )
    problem = _find_cache_problem(result, len(layers))
    if problem is not None:
        raise ArchitectureError(
            f"{name} keeps state other than K/V in its layers ({problem}); it can't be routed"
        )
    if not isinstance(outputs[0], tuple):
        return False

    # A skipped layer can return a hidden state, but nothing else. So the loop runs again with
    # layers that return only this.
    try:
        result_again = _run_with_hook(
            model, decoder, layers, lambda _layer, _inputs, output: output[:1]
        )
    except (IndexError, TypeError, ValueError):  # the loop unpacks more values
        result_again = None
    if result_again is None or not torch.equal(result_again[0], result[0]):
        raise ArchitectureError(
            f"the layers of {name} return more than a hidden state; what a skipped layer should "
            f"return isn't known, so it can't be routed"
        )
    return True


def _run_with_hook(
    model: Any,
    decoder: nn.Module,
    layers: nn.ModuleList,
    hook: Callable[[nn.Module, Any, Any], Any],
) -> Any:
    """Run one token with a hook on each layer, and return the decoder's output."""
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    with temporary_hooks(hooks), torch.no_grad(), evaluation_mode(decoder):
        return decoder(input_ids=one_token(model), use_cache=True)


def _has_no_weights(model: Any) -> bool:
    """Tell whether all weights are on the device `meta`, and accelerate doesn't load them."""
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not is_offloaded and all(weight.is_meta for weight in model.parameters())


def one_token(model: Any) -> torch.Tensor:
    """Return a prompt of one token, `[1, 1]`, on the model's device."""
    device = unwrap_peft(model).device
    if device.type == "meta":  # offloaded: accelerate's hooks move the input to the right device
        device = torch.device("cpu")
    return torch.zeros(1, 1, dtype=torch.long, device=device)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
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
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove registered hooks after the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _find_cache_problem(output: Any, num_layers: int) -> str | None:
    """Describe how a cache differs from one K/V entry per layer; None if it doesn't."""
    caches = [value for value in output.values() if isinstance(value, Cache)]
    if not caches:
        return "no K/V cache comes back from a forward pass"
    entries = getattr(caches[0], "layers", [])
    not_kv = {type(entry).__name__ for entry in entries if not is_kv(entry)}
    if not_kv:
        return f"its cache holds {', '.join(sorted(not_kv))}"
    if len(entries) != num_layers:
        return f"its cache has {len(entries)} entries for {num_layers} layers"
    if any(int(entry.get_seq_length()) != 1 for entry in entries):
        return "some of its layers store nothing of a token"
    return None


def can_pack(model: Any, length: int) -> bool:
    """Tell whether a row may hold a prompt and all its continuations, with a mask between them.

    The model's attention has to follow an arbitrary mask. The longest row, of `length` tokens, has
    to fit into the model's smallest window and its context. With a longer row, the mask would
    replace the window, or the window would cut columns off the mask. Some models also keep a mask
    of their own that is only as wide as the context.
    """
    if not _takes_any_mask(model):
        return False
    longest = min(_smallest_window(model), context_length(model) or length)
    return length <= longest


def can_split(model: Any) -> bool:
    """Tell whether a prompt can be read in parts, each with the K/V of the parts before it.

    The model's attention has to follow an arbitrary mask, no layer may have a window, and the
    rotary embedding must not depend on how many tokens are read at once.
    """
    rotations = {str(part.rope_type) for part in model.modules() if hasattr(part, "rope_type")}
    if any("dynamic" in kind or "longrope" in kind for kind in rotations):
        return False
    return _takes_any_mask(model) and _smallest_window(model) == math.inf


def _takes_any_mask(model: Any) -> bool:
    """Tell whether a model's attention follows an arbitrary additive mask and any positions."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    # ALiBi (MPT, Bloom, some Falcons) takes a token's column for its position.
    if getattr(model.config.get_text_config(), "alibi", False):
        return False
    decoder, _ = find_layers(model)
    # XGLM and a few other models, up to transformers 5.0, use this function. It expects a mask
    # `[P, 1, T, K]` of ones and zeros, not an additive one.
    if hasattr(sys.modules[type(decoder).__module__], "_prepare_4d_causal_attention_mask"):
        return False
    return "position_ids" in inspect.signature(type(decoder).forward).parameters


def _smallest_window(model: Any) -> float:
    """Return the smallest window of any layer, in tokens; infinity if no layer has one."""
    text = model.config.get_text_config()
    sizes = [getattr(text, name, None) for name in WINDOWS]
    return min((size for size in sizes if size), default=math.inf)  # 0 means no window


def list_linear_maps(model: Any) -> dict[str, nn.Module]:
    """Return every `nn.Linear` and `Conv1D` in the layers, by name, such as `14.mlp.up_proj`.

    The number is the layer. If PEFT has wrapped a map in a LoRA layer, the result has the map
    without LoRA.
    """
    _, layers = find_layers(model)
    maps: dict[str, nn.Module] = {}
    for index, layer in enumerate(layers):
        for place, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in place:
                maps[f"{index}.{place.removesuffix('.base_layer')}"] = module
    return maps


def parse_layer(name: str) -> int:
    """Return the layer of a linear map or a norm from its name, LAYER.PLACE."""
    return int(name.partition(".")[0])


def list_norms(model: Any) -> dict[str, nn.Module]:
    """Return the norms in the layers whose only parameter is a gain for each channel, by name."""
    _, layers = find_layers(model)
    norms: dict[str, nn.Module] = {}
    for index, layer in enumerate(layers):
        for place, module in layer.named_children():
            parameters = dict(module.named_parameters())
            if list(parameters) == ["weight"] and parameters["weight"].dim() == 1:
                norms[f"{index}.{place}"] = module
    return norms


def run_batch(model: Any, decoder: nn.Module, hooks: list[RemovableHandle]) -> None:
    """Run a small batch through the model with hooks, and remove the hooks."""
    ids = one_token(model).expand(MAP_ROWS, MAP_TOKENS)
    with temporary_hooks(hooks), torch.no_grad(), evaluation_mode(decoder):
        decoder(input_ids=ids, use_cache=False)
