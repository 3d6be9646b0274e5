"""How routing gets into an unmodified model: one forward override per layer, one pair of hooks.

Owns finding the layers, putting the overrides on and taking them off, slicing a layer's arguments
by batch row, and noticing when somebody else took an override off. What happens *at* a layer is
up to a `Driver`: `routing` runs what a policy decides, `sharing` runs many paths at once. No
modelling code is copied and no state-dict key changes (docs/decisions/0002-injection-not-forks.md).

Axes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from drllm.errors import ArchitectureError, RoutingError

BATCH_AXES = {"attention_mask": 0, "position_embeddings": 0, "position_ids": -2}
"""Where the batch axis of a layer's tensor arguments lies. An argument that isn't named here is
refused rather than guessed by its shape: [T] may equal [B]."""

REFUSED_OUTPUTS = ("output_attentions", "output_router_logits")


class Driver(Protocol):
    """What decides, at every layer of one forward pass, which executions are run."""

    def begin(self, forward: Forward) -> None:
        """Take note of a new forward pass before its first layer."""

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return what the model's loop carries on with after this layer."""

    def end(self, forward: Forward) -> None:
        """Take note that every layer was visited."""


@dataclass(slots=True)
class Forward:
    """One forward pass of the decoder, from its pre-hook to its post-hook.

    Attributes:
        attention_mask: As the caller gave it: `[B, K]`, `[B, 1, T, K]`, or None for no padding.
        opaque_mask: The caller gave a mask of a kind that doesn't say which tokens are padding.
        rejected: Names of requested outputs that routing can't give.
        owner: The injection that this pass runs under.
        driver: Who drives this pass.
        outer: The pass that was under way when this one began.
        visited: Layers that the model's loop has called so far.
        slices: Layer arguments already sliced, by rows, so that a slice is made once a pass.
        notes: Room for the driver.
    """

    attention_mask: Tensor | None
    opaque_mask: bool
    rejected: tuple[str, ...]
    owner: Injection
    driver: Driver
    outer: Forward | None
    visited: list[int] = field(default_factory=list)
    slices: dict[tuple[int, ...], dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


_forward: ContextVar[Forward | None] = ContextVar("drllm_forward", default=None)
_driver: ContextVar[tuple[tuple[int, Driver], ...]] = ContextVar("drllm_driver", default=())


class LayerCall:
    """One visit of the model's loop at one layer: its index, its arguments, and how to run it.

    Attributes:
        index: Layer index from 0.
        is_last: Whether no layer follows.
        forward: The forward pass that this call belongs to.
        cache: The K/V cache among the arguments, found by its type; None without one.
    """

    __slots__ = ("_args", "_handle", "_kwargs", "cache", "forward", "index", "is_last")

    def __init__(
        self, handle: LayerHandle, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._handle = handle
        self._args = args
        self._kwargs = kwargs
        self.index = handle.index
        self.is_last = handle.index == handle.injection.num_layers - 1
        self.forward = forward
        self.cache: Cache | None = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None
        )

    def run(self, hidden: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """Execute the layer once.

        Args:
            hidden: `[R, T, D]`, the inputs of the rows that run.
            rows: For each of the R inputs, the row of the original batch whose mask and positions
                it uses; None where the inputs are the batch itself.

        Returns:
            `[R, T, D]` in the dtype of `hidden`.
        """
        args, kwargs = self._args, self._kwargs
        if rows is not None:
            if any(isinstance(value, Tensor) for value in args):
                raise RoutingError(
                    "the layers of this model take tensors by position; rows can't be routed apart"
                )
            kwargs = {name: self._sliced(name, value, rows) for name, value in kwargs.items()}
        output = self._handle.original()(hidden, *args, **kwargs)
        if isinstance(output, tuple):
            output = output[0]
        result: Tensor = output.to(hidden.dtype)
        return result

    def _sliced(self, name: str, value: Any, rows: tuple[int, ...]) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, Cache)):
            return value
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise RoutingError(
                f"the layers of this model take {name!r} as a {type(value).__name__}, which can't "
                f"be cut by rows; load it with --attn-implementation sdpa (or eager)"
            )
        if name not in BATCH_AXES:
            raise RoutingError(
                f"the layers of this model take a tensor argument {name!r} whose batch axis isn't "
                f"known; routing rows apart would be a guess, so give every row the same decisions"
            )
        memo = self.forward.slices.setdefault(rows, {})
        if name in memo and memo[name][0] is value:
            return memo[name][1]
        axis = BATCH_AXES[name]
        sliced = tuple(_take(tensor, axis, rows) for tensor in tensors)
        result = sliced if isinstance(value, (tuple, list)) else sliced[0]
        memo[name] = (value, result)
        return result


def _take(tensor: Tensor, axis: int, rows: tuple[int, ...]) -> Tensor:
    if tensor.shape[axis] == 1:  # broadcast over the batch: the same for every row
        return tensor
    return tensor.index_select(axis, torch.tensor(rows, device=tensor.device))


class LayerHandle:
    """The override of one layer's forward; a plain object, so that models copy and pickle."""

    def __init__(self, injection: Injection, layer: nn.Module, index: int) -> None:
        self.injection = injection
        self.layer = layer
        self.index = index
        self.previous: Callable[..., Any] | None = layer.__dict__.get("forward")

    def original(self) -> Callable[..., Any]:
        """Return the forward that the override replaced, looked up anew at each call."""
        if self.previous is not None:
            return self.previous
        forward: Callable[..., Any] = type(self.layer).forward.__get__(self.layer)
        return forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the layer's own forward."""
        forward = _forward.get()
        if forward is None:  # somebody calls the layer by itself: it is what it always was
            return self.original()(hidden_states, *args, **kwargs)
        forward.visited.append(self.index)
        output = forward.driver.layer(LayerCall(self, forward, args, kwargs), hidden_states)
        return (output,) if self.injection.returns_tuple else output


class Injection:
    """Puts a driver between a model's loop and its layers.

    A one-token probe at the start learns what the layers return and that the model's loop calls
    each of them; every later pass is checked to call them in order.

    Args:
        model: A decoder-only model of transformers; its weights and keys stay as they are.
        default: The driver that is asked when no other is active.

    Raises:
        ArchitectureError: No list of layers is found, the model keeps state other than K/V in
            its layers, or its loop doesn't call the layers one after the other.
    """

    def __init__(self, model: Any, default: Driver) -> None:
        self.model = model
        self.default = default
        self.decoder, self.layers = find_layers(model)
        self.num_layers = len(self.layers)
        self.returns_tuple = False
        self.handles = [LayerHandle(self, layer, i) for i, layer in enumerate(self.layers)]
        for handle in self.handles:
            if isinstance(getattr(handle.previous, "__self__", None), LayerHandle):
                raise RoutingError(
                    "this model is routed already; use that RoutedModel, or detach() it first"
                )
        self._probe()
        for handle in self.handles:
            handle.layer.forward = handle.forward
        self._hooks = [
            self.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self.decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take every override and hook off; the model is then exactly what it was.

        Raises:
            RoutingError: Somebody put another override over ours; take that one off first.
        """
        for handle in self.handles:
            if handle.layer.__dict__.get("forward") != handle.forward:
                raise RoutingError(
                    f"the forward of layer {handle.index} was overridden again after routing was "
                    f"attached; take that override off, then detach()"
                )
        for handle in self.handles:
            if handle.previous is None:
                del handle.layer.forward
            else:
                handle.layer.forward = handle.previous
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def driven_by(self, driver: Driver) -> Iterator[None]:
        """Let another driver run the layers of this model inside the block."""
        token = _driver.set(((id(self), driver), *_driver.get()))
        try:
            yield
        finally:
            _driver.reset(token)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Run the plain base model inside the block, without taking anything off."""
        with self.driven_by(_Plain()):
            yield

    def _active(self) -> Driver:
        return next((driver for owner, driver in _driver.get() if owner == id(self)), self.default)

    def _before(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for handle in self.handles:
            if handle.layer.__dict__.get("forward") != handle.forward:
                raise RoutingError(
                    f"the routing of layer {handle.index} was taken off the model by other code; "
                    f"make a new RoutedModel to attach it again"
                )
        given = [name for name, value in kwargs.items() if value is not None]
        if any(name.startswith("cu_seq_lens") for name in given):
            raise RoutingError("packed sequences can't be routed: a row is no longer one prompt")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        outer = _forward.get()
        while outer is not None and outer.owner is self:  # left behind by a KeyboardInterrupt
            outer = outer.outer
        forward = Forward(
            attention_mask=mask if isinstance(mask, Tensor) else None,
            opaque_mask=mask is not None and not isinstance(mask, Tensor),
            rejected=tuple(name for name in REFUSED_OUTPUTS if self._requested(name, kwargs)),
            owner=self,
            driver=self._active(),
            outer=outer,
        )
        forward.driver.begin(forward)
        _forward.set(forward)

    def _after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        forward = _forward.get()
        if forward is None or forward.owner is not self:  # the pre-hook itself raised
            return
        _forward.set(forward.outer)
        if output is None:  # the forward raised: let that error through
            return
        if forward.visited != list(range(self.num_layers)):
            raise RoutingError(
                f"the model's loop called layers {forward.visited} instead of each of its "
                f"{self.num_layers} layers once; its code was replaced and can't be routed"
            )
        forward.driver.end(forward)

    def _requested(self, name: str, kwargs: dict[str, Any]) -> bool:
        asked = kwargs.get(name)
        return bool(getattr(self.decoder.config, name, False) if asked is None else asked)

    def _probe(self) -> None:
        outputs: list[Any] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _a, output: outputs.append(output))
            for layer in self.layers
        ]
        device = self.model.get_input_embeddings().weight.device
        try:
            with torch.no_grad():
                self.decoder(
                    input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False
                )
        finally:
            for hook in hooks:
                hook.remove()
        if len(outputs) != self.num_layers:
            raise ArchitectureError(
                f"{type(self.model).__name__} called {len(outputs)} of its {self.num_layers} "
                f"layers in a forward pass; its loop can't be routed"
            )
        self.returns_tuple = isinstance(outputs[0], tuple)


class _Plain:
    """The driver that runs each layer once, as the model would by itself."""

    def begin(self, forward: Forward) -> None:
        """Do nothing."""

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layer."""
        return call.run(hidden)

    def end(self, forward: Forward) -> None:
        """Do nothing."""


def find_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Find the decoder and its list of layers.

    The list is the one `ModuleList` of `num_hidden_layers` entries that is a direct child of
    `model.get_decoder()`.

    Raises:
        ArchitectureError: The model has no such list, shares K/V between layers, or has layers
            with a state other than K/V.

    Source: ours; a rule in place of a table of model names.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ArchitectureError(f"{name} is not a decoder-only language model of transformers")
    text = config.get_text_config()
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_sharing_modes", None):
        raise ArchitectureError(
            f"{name} shares keys and values between layers; skipping a layer would break its "
            f"readers, so it can't be routed"
        )
    kinds = set(getattr(text, "layer_types", None) or ())
    foreign = sorted(kind for kind in kinds if not kind.endswith("attention") or "linear" in kind)
    if foreign:
        raise ArchitectureError(
            f"{name} has layers of type {', '.join(foreign)}, whose state is not K/V; "
            f"it can't be routed"
        )
    decoder = model.get_decoder()
    lists = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == text.num_hidden_layers
    ]
    if len(lists) != 1:
        raise ArchitectureError(
            f"{name}: found {len(lists)} lists of {text.num_hidden_layers} layers in "
            f"{type(decoder).__name__}, expected one; this architecture can't be routed yet"
        )
    return decoder, lists[0]
