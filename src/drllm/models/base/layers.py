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
from dataclasses import dataclass
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


LEAST_MATRICES = 2
"""Fewer than these and a module is no MLP: it has to go up and down again."""


@dataclass(frozen=True, slots=True)
class Sublayers:
    """The attention and the MLP of one layer."""

    attention: nn.Module
    mlps: tuple[nn.Module, ...]  # mostly one; a shared expert is another


def find_sublayers(model: Any) -> list[Sublayers]:
    """Find the attention and the MLP of each layer, `[L]`, by running one token.

    The attention is the child of a layer that stores K/V in the cache. An MLP is a child with two
    matrices or more that stores nothing. A second token checks that a layer adds what they give to
    its state and does nothing else: without them a state comes out as it went in.

    Raises:
        ArchitectureError: A layer has no such modules of its own, or does more with what they give
            than add it.
    """
    decoder, layers = find_layers(model)
    name = type(base_of(model)).__name__
    watches = [_ChildWatch(name, index, layer) for index, layer in enumerate(layers)]
    _run_token(model, decoder, [hook for watch in watches for hook in watch.hooks()])
    sublayers = [watch.sublayers() for watch in watches]
    checks = [_SumCheck(name, index, each) for index, each in enumerate(sublayers)]
    pairs = zip(checks, layers, strict=True)
    _run_token(model, decoder, [hook for check, layer in pairs for hook in check.hooks(layer)])
    return sublayers


class _ChildWatch:
    """Watches the children of one layer while a token passes."""

    def __init__(self, model_name: str, index: int, layer: nn.Module) -> None:
        self.model_name = model_name
        self.index = index
        self.layer = layer
        self.attention: list[nn.Module] = []
        self.mlps: list[nn.Module] = []
        self._cache: Cache | None = None
        self._lengths: dict[nn.Module, int] = {}  # of the layer's K/V before each child

    def hooks(self) -> Iterator[RemovableHandle]:
        yield self.layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
        for child in self.layer.children():
            yield child.register_forward_pre_hook(self._before_child)
            yield child.register_forward_hook(self._after_child, with_kwargs=True)

    def sublayers(self) -> Sublayers:
        if len(self.attention) != 1:
            reason = f"has {len(self.attention)} modules for its attention"
            raise _refused_sublayers(self.model_name, self.index, reason)
        if not self.mlps:
            reason = "has no module of its own for the MLP"
            raise _refused_sublayers(self.model_name, self.index, reason)
        return Sublayers(self.attention[0], tuple(self.mlps))

    def _before_layer(self, _layer: nn.Module, args: Any, kwargs: Any) -> None:
        values = (*args, *kwargs.values())
        self._cache = next((value for value in values if isinstance(value, Cache)), None)

    def _before_child(self, child: nn.Module, _args: Any) -> None:
        self._lengths[child] = self._kv_length()

    def _after_child(self, child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        matrices = [weight for weight in child.parameters() if weight.dim() > 1]
        if self._kv_length() > self._lengths[child]:
            self.attention.append(child)
        elif len(matrices) >= LEAST_MATRICES:
            self.mlps.append(child)
        else:
            return
        given = _first_argument(args, kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, torch.Tensor) or getattr(given, "shape", None) != first.shape:
            reason = "has a sublayer that changes the shape of a state"
            raise _refused_sublayers(self.model_name, self.index, reason)

    def _kv_length(self) -> int:
        return 0 if self._cache is None else int(self._cache.get_seq_length(self.index))


class _SumCheck:
    """Checks that a layer without what its sublayers give returns the state that it was given."""

    def __init__(self, model_name: str, index: int, sublayers: Sublayers) -> None:
        self.model_name = model_name
        self.index = index
        self.modules = (sublayers.attention, *sublayers.mlps)
        self._state: torch.Tensor | None = None

    def hooks(self, layer: nn.Module) -> Iterator[RemovableHandle]:
        yield layer.register_forward_pre_hook(self._put_noise, with_kwargs=True)
        yield layer.register_forward_hook(self._compare)
        for module in self.modules:
            yield module.register_forward_hook(_give_zeros)

    def _put_noise(self, _layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden = _first_argument(args, kwargs)
        generator = torch.Generator().manual_seed(self.index)
        noise = torch.randn(hidden.shape, generator=generator)
        self._state = noise.to(hidden.device, hidden.dtype)
        if args:
            return (self._state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._state}

    def _compare(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        assert self._state is not None
        if not torch.equal(first, self._state):
            reason = "does more with its attention and MLP than add what they give"
            raise _refused_sublayers(self.model_name, self.index, reason)


def _give_zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Put zeros in place of what a sublayer gives."""
    if not isinstance(output, tuple):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def _run_token(model: Any, decoder: nn.Module, hooks: list[RemovableHandle]) -> None:
    """Run one token through the model with hooks, which are taken off again."""
    with hooked(hooks), torch.no_grad(), evaluating(decoder):
        decoder(input_ids=one_token(model), use_cache=True)


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a module reads: its first argument."""
    if args:
        return args[0]
    return kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def _refused_sublayers(model_name: str, index: int, reason: str) -> ArchitectureError:
    return ArchitectureError(
        f"layer {index} of {model_name} {reason}, so its attention and its MLP can't be told apart"
    )


MAP_ROWS = 3
MAP_TOKENS = 5
"""The batch that shows which linear maps are called with all tokens of all rows."""


def find_linear_maps(model: Any) -> dict[str, nn.Module]:
    """Find the linear maps of the layers that are called with all tokens of all rows.

    A map of an expert, or one that a model calls with its tokens in one long row, isn't among them.
    Maps are named by their layer and their place in it, such as `14.mlp.up_proj`; of a map that
    PEFT has put a LoRA layer around it is the map itself.
    """
    decoder, layers = find_layers(model)
    found: dict[str, nn.Module] = {}

    def note(name: str, module: nn.Module, args: Any, _output: Any) -> None:
        if args and args[0].shape[:2] == (MAP_ROWS, MAP_TOKENS):
            found[name] = module

    hooks = []
    for index, layer in enumerate(layers):
        for place, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in place:
                name = f"{index}.{place.removesuffix('.base_layer')}"
                hooks.append(module.register_forward_hook(partial(note, name)))
    ids = one_token(model).expand(MAP_ROWS, MAP_TOKENS)
    with hooked(hooks), torch.no_grad(), evaluating(decoder):
        decoder(input_ids=ids, use_cache=False)
    return found
