"""How routing gets into an unmodified model: one forward override per layer, one pair of hooks.

Owns putting the overrides on and taking them off, what one forward pass of the decoder is, and
noticing when somebody else took an override off. What happens *at* a layer is up to a `Driver`:
`routing` runs what a policy decides, `sharing` runs many paths at once. No modelling code is
copied and no state-dict key changes (docs/decisions/0002-injection-not-forks.md). Leaves finding
the layers to `layers`, trying the loop out to `probe`, and running a layer on some rows to
`layer_call`.

Axes: B rows, T tokens, K keys, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drllm.errors import RoutingError
from drllm.models.base.layers import find_layers
from drllm.models.base.probe import probe
from drllm.models.routing.context import Current, Held
from drllm.models.routing.layer_call import LayerCall

REFUSED_OUTPUTS = ("output_attentions", "output_router_logits")


class Driver(Protocol):
    """What decides, at every layer of one forward pass, which executions are run."""

    def begin(self, forward: Forward) -> None:
        """Take note of a new forward pass before its first layer."""

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return what the model's loop carries on with after this layer."""

    def end(self, forward: Forward) -> None:
        """Take note that every layer was visited."""


@dataclass
class Forward:
    """One forward pass of the decoder, from its pre-hook to its post-hook.

    Attributes:
        attention_mask: As the caller gave it: `[B, K]`, `[B, 1, T, K]`, or None for no padding.
        opaque_mask: The caller gave a mask of a kind that doesn't say which tokens are padding.
        rejected: Names of requested outputs that routing can't give.
        driver: Who drives this pass.
        visited: Layers that the model's loop has called so far.
        slices: Layer arguments already sliced, by rows, so that a slice is made once a pass.
        cuts: Layer arguments already cut to last tokens, by how many, likewise.
        indices: Rows as tensors, by rows and device, likewise.
        notes: Room for the driver.
    """

    attention_mask: Tensor | None
    opaque_mask: bool
    rejected: tuple[str, ...]
    driver: Driver
    visited: list[int] = field(default_factory=list)
    slices: dict[tuple[int, ...], dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    cuts: dict[tuple[int, int], dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def index(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Return rows as a tensor `[R]` on a device."""
        if (rows, device) not in self.indices:
            self.indices[rows, device] = torch.tensor(rows, device=device)
        return self.indices[rows, device]


_driver: Held[Driver] = Held("driver")


class LayerHandle:
    """The override of one layer's forward; a plain object, so that models copy and pickle.

    Attributes:
        positional: Names of the layer's arguments after its input, in order.
        previous: The override that was on the layer before ours, if there was one.
    """

    def __init__(self, injection: Injection, layer: nn.Module, index: int) -> None:
        self.injection = injection
        self.layer: Any = layer
        self.index = index
        self.previous: Callable[..., Any] | None = layer.__dict__.get("forward")
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(self.original()).parameters.values()
        self.positional = tuple(p.name for p in parameters if p.kind in named)[1:]

    def original(self) -> Callable[..., Any]:
        """Return the forward that the override replaced, looked up anew at each call."""
        if self.previous is not None:
            return self.previous
        forward: Callable[..., Any] = type(self.layer).forward.__get__(self.layer)
        return forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the layer's own forward."""
        forward = self.injection.current.get()
        if forward is None:  # somebody calls the layer by itself: it is what it always was
            return self.original()(hidden_states, *args, **kwargs)
        forward.visited.append(self.index)
        call = LayerCall(self, forward, hidden_states.shape[0], args, kwargs)
        output = forward.driver.layer(call, hidden_states)
        if not self.injection.returns_tuple:
            return output
        # What else a layer returns belongs to one run of all rows; who asks for it gets it only
        # where the driver lets that through.
        return (output, *(call.extras if forward.rejected else ()))

    @property
    def is_in_place(self) -> bool:
        """Whether the layer still calls us, perhaps through wrappers that say what they wrap."""
        return self.is_on_top or self in _overriding(self.layer)

    @property
    def is_on_top(self) -> bool:
        """Whether nobody has put anything over our override."""
        return getattr(self.layer.__dict__.get("forward"), "__self__", None) is self


class RoutedRecomputation:
    """A layer's checkpointing function that recomputes it within the pass it belongs to.

    Backward passes call a checkpointed layer again, after the forward pass is over and perhaps on
    another thread. Up to transformers 5.22 the override lies inside what is recomputed, and has
    to find its pass again; later the checkpoint lies inside the override, and this does no harm.
    """

    def __init__(self, checkpoint: Callable[..., Any], current: Current[Forward]) -> None:
        self.checkpoint = checkpoint
        self.current = current

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` under the checkpoint, now and when it is recomputed."""
        forward = self.current.get()

        def within(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if forward is None or self.current.get() is forward:  # not recomputed yet
                return function(*inner_args, **inner_kwargs)
            self.current.begin(forward)
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                self.current.end()

        return self.checkpoint(within, *args, **kwargs)


class Injection:
    """Puts a driver between a model's loop and its layers.

    A one-token probe at the start learns what the layers return and what the loop makes of it;
    every later pass is checked to call the layers in order.

    Args:
        model: A decoder-only model of transformers; its weights and keys stay as they are.
        default: The driver that is asked when no other is active.

    Raises:
        ArchitectureError: No list of layers is found, the model keeps state other than K/V in
            its layers, or its loop does more than call the layers one after the other.
        RoutingError: The model is routed already.
    """

    def __init__(self, model: Any, default: Driver) -> None:
        self.model = model
        self.default = default
        self.decoder, self.layers = find_layers(model)
        self.num_layers = len(self.layers)
        self.current: Current[Forward] = Current()
        if any(isinstance(o, LayerHandle) for layer in self.layers for o in _overriding(layer)):
            raise RoutingError(
                "this model is routed already; use that RoutedModel, or detach() it first"
            )
        self.handles = [LayerHandle(self, layer, i) for i, layer in enumerate(self.layers)]
        self.returns_tuple = probe(model, self.decoder, self.layers)
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
            if not handle.is_on_top:
                raise RoutingError(
                    f"the forward of layer {handle.index} was overridden again after routing was "
                    f"attached; take that override off, then detach()"
                )
        for handle in self.handles:
            if handle.previous is None:
                del handle.layer.forward
            else:
                handle.layer.forward = handle.previous
            checkpoint = getattr(handle.layer, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, RoutedRecomputation):
                handle.layer._gradient_checkpointing_func = checkpoint.checkpoint
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def driven_by(self, driver: Driver) -> Iterator[None]:
        """Let another driver run the layers of this model inside the block."""
        with _driver.holding(self, driver):
            yield

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Run the plain base model inside the block, without taking anything off."""
        with self.driven_by(_Plain()):
            yield

    def _before(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for handle in self.handles:
            if not handle.is_in_place:
                raise RoutingError(
                    f"the routing of layer {handle.index} was taken off the model by other code; "
                    f"make a new RoutedModel to attach it again"
                )
            checkpoint = getattr(handle.layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, RoutedRecomputation):
                handle.layer._gradient_checkpointing_func = RoutedRecomputation(
                    checkpoint, self.current
                )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if isinstance(mask, dict):  # a mask per kind of attention; padding is the same in all
            mask = next((value for value in mask.values() if value is not None), None)
        _refuse_packed(kwargs, mask)
        forward = Forward(
            attention_mask=mask if isinstance(mask, Tensor) else None,
            opaque_mask=mask is not None and not isinstance(mask, Tensor),
            rejected=tuple([name for name in REFUSED_OUTPUTS if self._requested(name, kwargs)]),
            driver=_driver.get(self) or self.default,
        )
        forward.driver.begin(forward)
        self.current.begin(forward)

    def _after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        forward = self.current.get()
        if forward is None:  # the pre-hook itself raised
            return
        self.current.end()
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


class _Plain:
    """The driver that runs each layer once, as the model would by itself."""

    def begin(self, forward: Forward) -> None:
        """Do nothing."""

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layer."""
        return call.run(hidden)

    def end(self, forward: Forward) -> None:
        """Do nothing."""


def _overriding(layer: Any) -> list[Any]:
    """Return the objects whose methods make up a layer's forward, from the outermost inwards."""
    found = []
    forward = layer.forward
    while forward is not None:
        found.append(getattr(forward, "__self__", None))
        forward = getattr(forward, "__wrapped__", None)  # set by accelerate's hooks
    return found


def _refuse_packed(kwargs: dict[str, Any], mask: Any) -> None:
    """Refuse several sequences in one row: decisions are made for a row."""
    packed = any(
        value is not None and name.startswith("cu_seq_lens") for name, value in kwargs.items()
    )
    positions = kwargs.get("position_ids")
    # transformers reads a restart of the positions as a new sequence where there is no mask.
    if mask is None and isinstance(positions, Tensor) and not torch.compiler.is_compiling():
        packed = packed or bool((positions.diff(dim=-1) < 0).any())
    if packed:
        raise RoutingError(
            "packed sequences can't be routed: a row is no longer one prompt; give each prompt a "
            "row of its own, with padding"
        )
