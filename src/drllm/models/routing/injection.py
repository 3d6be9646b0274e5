"""Puts routing into an unmodified model: overrides of forwards, and a pair of hooks.

`Injection` overrides the forward of the decoder and of each layer, and takes the overrides off.
When the model's loop calls a layer, a `Driver` decides what runs. It gets a `LayerCall`, which has
the layer's arguments and can run the layer on some of the rows. No modelling code is copied and no
state-dict key changes; docs/decisions.md says why.

Axes: B rows of the batch, R rows that run, T tokens, K keys, D hidden, E rotary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from drllm.errors import RoutingError
from drllm.model.devices import on_device
from drllm.model.layers import check_loop, find_layers
from drllm.models.routing.call_arguments import (
    BATCH_AXES,
    ROTARY,
    UNREAD_OPTIONS,
    check_tensors,
    cut_last_tokens,
    find_cache,
    find_mask,
    refuse_foreign_cache,
    refuse_packed,
)
from drllm.models.routing.context import Override, ThreadValue
from drllm.models.routing.forward_override import ForwardOverride, find_overrides
from drllm.models.routing.recomputation import RoutedRecomputation

REFUSED_OUTPUTS = ("output_attentions", "output_router_logits")
"""Options of a forward pass that request outputs which routing can't return."""


class Driver:
    """Runs the layers of a forward pass. This class runs each layer once, as the model does.

    Subclasses run layers zero, one or several times, on all rows or on some.
    """

    def begin(self, forward: Forward) -> Driver:
        """Return the driver of a new forward pass. It is called before the first layer."""
        return self

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return the hidden state with which the model's loop continues after this layer."""
        return call.run(hidden)

    def compiles(self, cache: Cache | None) -> bool:
        """Say whether a pass can be compiled: its plan is known before it starts."""
        return True

    def end(self) -> None:
        """Finish a pass, once every layer was called."""

    def abort(self) -> None:
        """Finish a pass that raised an exception."""


@dataclass
class Forward:
    """One forward pass of the decoder, from its pre-hook to its post-hook."""

    # The caller's mask: [B, K] or [B, 1, T, K]. None means no padding. A mask of another kind
    # doesn't say which tokens are padding.
    attention_mask: Any
    requested_outputs: tuple[str, ...]  # the `REFUSED_OUTPUTS` that the caller requests
    driver: Driver = field(init=False)
    # The cache, if decisions are pinned in it and a layer that all rows run once may run without
    # the driver; else None.
    pinned_cache: Cache | None = None
    visited: list[int] = field(default_factory=list)  # layers that the model's loop has called
    # Arguments that were cut to a part, by the argument's name and the part, so that each is cut
    # once a pass. A value is (the whole argument, its part).
    parts: dict[tuple[str, tuple[Any, ...]], tuple[Any, Any]] = field(default_factory=dict)
    # The results of `index`, by its arguments.
    indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = field(default_factory=dict)

    def index(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the numbers of rows as a tensor `[R]` on a device, which is made only once."""
        if (rows, device) not in self.indices:
            self.indices[rows, device] = on_device(rows, device)
        return self.indices[rows, device]


_driver: Override[Driver] = Override("driver")  # see `Injection.driven_by`


class Injection:
    """Puts a driver between a model's loop and its layers.

    A pass with one token shows what the layers return and how the loop uses it (`check_loop`). In
    every later pass the loop must call all layers in order.

    Args:
        model: The model.
        default: The driver that runs the layers while no other driver is active.

    Raises:
        ArchitectureError: `find_layers` or `check_loop` refuses the model.
        RoutingError: The model is routed already.
    """

    def __init__(self, model: Any, default: Driver) -> None:
        self.model = model
        self.default = default
        self.decoder, self.layers = find_layers(model)
        self.num_layers = len(self.layers)
        self.current: ThreadValue[Forward] = ThreadValue()  # the pass that runs in this thread
        if Injection.find(model) is not None:
            raise RoutingError(
                "this model is routed already; use that RoutedModel, drllm.attach(...) to replace "
                "it, or drllm.detach(model) first"
            )
        self.returns_tuple = check_loop(model, self.decoder, self.layers)
        self.install()

    @staticmethod
    def find(model: Any) -> Injection | None:
        """Return the injection that is on a model; None if the model isn't routed."""
        _, layers = find_layers(model)
        for layer in layers:
            for override in find_overrides(layer):
                if isinstance(override, LayerHandle):
                    return override.injection
        return None

    def install(self) -> None:
        """Put the overrides and hooks on the model. This also works after `remove`."""
        self.handles = [LayerHandle(self, layer, i) for i, layer in enumerate(self.layers)]
        self.decoder_handle = DecoderHandle(self)
        for handle in self.handles:
            handle.put_on()
        self.decoder_handle.put_on()
        self._hooks = [
            self.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self.decoder.register_forward_hook(self._after, always_call=True),
        ]
        self.is_installed = True

    def remove(self) -> None:
        """Take every override and hook off. Refuse if other code has put an override over ours."""
        overrides: list[LayerHandle | DecoderHandle] = [*self.handles, self.decoder_handle]
        for override in overrides:
            forward = override.module.__dict__.get("forward")
            is_gone = forward == override.previous  # taken off already
            if not (override.is_on_top or is_gone):
                raise RoutingError(
                    f"the forward of {override.place} was overridden again after routing was "
                    f"attached; take that override off, then detach()"
                )
        self.decoder_handle.take_off()
        for handle in self.handles:
            handle.take_off()
            checkpoint = getattr(handle.module, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, RoutedRecomputation):
                handle.module._gradient_checkpointing_func = checkpoint.checkpoint
        for hook in self._hooks:
            hook.remove()
        self.is_installed = False

    def driven_by(self, driver: Driver) -> AbstractContextManager[None]:
        """Let another driver run the layers inside the block. With `Driver()` nothing is routed."""
        return _driver.set(self, driver)

    @cached_property
    def can_drop_tokens(self) -> bool:
        """Whether the model accepts that the last layer returns fewer tokens than its input has.

        A pass with two tokens shows this. Some models reshape the output of the last layer to the
        shape of the input, and fail.
        """
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        with torch.no_grad(), self.driven_by(_DropToken()):
            try:
                output = self.decoder(input_ids=ids, use_cache=False)
            except RuntimeError as error:
                if "is invalid for input of size" not in str(error):  # not from `Tensor.view`
                    raise
                return False
        return bool(output[0].shape[1] == 1)

    def _before(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Begin a forward pass of the decoder."""
        for handle in self.handles:
            self._check_handle(handle)
        mask = find_mask(args, kwargs)
        refuse_packed(kwargs, mask)
        forward = Forward(mask, self._find_requested_outputs(kwargs))
        driver = _driver.get(self) or self.default
        forward.driver = driver.begin(forward)
        self.current.begin(forward)

    def _check_handle(self, handle: LayerHandle) -> None:
        """Refuse a layer that lost its override, and wrap its checkpointing function.

        See `RoutedRecomputation`. The function may have been set after the model was routed.
        """
        if not handle.is_on_top and handle not in find_overrides(handle.module):
            raise RoutingError(
                f"the routing of {handle.place} was taken off the model by other code; "
                f"make a new RoutedModel to attach it again"
            )
        checkpoint = getattr(handle.module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, RoutedRecomputation):
            recomputation = RoutedRecomputation(checkpoint, self.current)
            handle.module._gradient_checkpointing_func = recomputation

    def _find_requested_outputs(self, kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Return which of `REFUSED_OUTPUTS` a call or the config requests."""
        requested = []
        for name in REFUSED_OUTPUTS:
            value = kwargs.get(name)
            if value is None:
                value = getattr(self.decoder.config, name, False)
            if value:
                requested.append(name)
        return tuple(requested)

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """End a forward pass of the decoder, and check that it called every layer once."""
        forward = self.current.get()
        self.current.end()
        if forward is None or output is None:  # the pre-hook or the forward raised an error
            return
        if forward.visited != list(range(self.num_layers)):
            raise RoutingError(
                f"the model's loop called layers {forward.visited} instead of each of its "
                f"{self.num_layers} layers once; its code was replaced and can't be routed"
            )
        forward.driver.end()


class _DropToken(Driver):
    """Runs no layer. At the last layer it returns only the first of two tokens."""

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        return hidden[:, :1] if call.is_last else hidden


class DecoderHandle(ForwardOverride):
    """The override of the decoder's forward, which keeps some passes from being compiled.

    Two kinds of passes run uncompiled:

    - passes under a policy that reads the prompt, such as routers: every route would need a graph
      of its own, until torch gives up;
    - the pass that makes a cache's entries.
    """

    place = "the decoder"

    def __init__(self, injection: Injection) -> None:
        super().__init__(injection.decoder)
        self.injection = injection

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass of the decoder. If it raises an exception, let the driver know."""
        if torch.compiler.is_compiling():
            return self._run(*args, **kwargs)
        try:
            return self._run(*args, **kwargs)
        except BaseException:  # such as an interruption by the user, of which hooks aren't told
            current = self.injection.current.get()
            if current is not None:
                current.driver.abort()
            raise

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass of the decoder, uncompiled where necessary."""
        if torch.compiler.is_compiling():
            current = self.injection.current.get()
            if current is not None and not current.driver.compiles(find_cache(args, kwargs)):
                return _uncompiled(self.original(), *args, **kwargs)
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        # Not through `original`: after a graph break, torch would mistake the method that it
        # returns for this method.
        return type(self.module).forward(self.module, *args, **kwargs)


def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_uncompiled: Any = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]


class LayerHandle(ForwardOverride):
    """The override of one layer's forward."""

    def __init__(self, injection: Injection, layer: nn.Module, index: int) -> None:
        super().__init__(layer)
        self.injection = injection
        self.index = index
        self.place = f"layer {index}"
        # Names of the layer's arguments after its input, in order.
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(self.original()).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        self.positional = tuple(names[1:])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Let the driver of the pass run the layer."""
        forward = self.injection.current.get()
        if forward is None:  # the layer is called by itself, outside of a pass
            return self.original()(hidden_states, *args, **kwargs)
        forward.visited.append(self.index)
        # After the prompt, a layer that all rows run once needs no driver, which saves time.
        if forward.pinned_cache is not None:
            entry = forward.pinned_cache.layers[self.index]
            if entry.is_plain and len(entry.decisions) == hidden_states.shape[0]:
                entry.begin_pass(0)
                try:
                    return self.original()(hidden_states, *args, **kwargs)
                finally:
                    entry.end_pass()
        call = LayerCall(self, forward, hidden_states.shape[0], args, kwargs)
        output = forward.driver.layer(call, hidden_states)
        if not self.injection.returns_tuple:
            return output
        if not forward.requested_outputs:
            return (output,)
        # The driver allowed these outputs, so all rows ran the layer once and they are right.
        return (output, *call.extras)


class LayerCall:
    """One call of a layer by the model's loop: its index, its arguments, and how to run it."""

    def __init__(
        self,
        handle: LayerHandle,
        forward: Forward,
        num_rows: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._handle = handle
        self._num_rows = num_rows
        self._args = args
        self._kwargs = kwargs
        self.index = handle.index  # from 0
        self.module: nn.Module = handle.module
        self.num_layers = handle.injection.num_layers
        self.is_last = self.index == self.num_layers - 1
        self.forward = forward  # the pass that this call belongs to
        self.extras: tuple[Any, ...] = ()  # other outputs of the layer's last run
        self.cache = find_cache(args, kwargs)
        if self.cache is None:
            refuse_foreign_cache(kwargs)

    def run(self, hidden: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """Execute the layer once, `[R, T, D]` to `[R, T, D]` of the same dtype.

        Args:
            hidden: The layer's input for R rows of the batch.
            rows: The numbers of these rows; None means all rows.
        """
        args = self._args
        kwargs = self._kwargs
        if rows is not None:
            args, kwargs = self._cut(rows, partial(self._select_rows, rows))
        output = self._handle.original()(hidden, *args, **kwargs)
        if isinstance(output, tuple):
            self.extras = output[1:]
            output = output[0]
        result: Tensor = output if output.dtype == hidden.dtype else output.to(hidden.dtype)
        return result

    def last_tokens(self, num_tokens: int, num_past: int = 0) -> LayerCall:
        """Return this call for the last tokens of every row.

        Args:
            num_tokens: The number of tokens.
            num_past: How many of the keys before this pass the mask keeps, the last ones.
        """
        part = ("last", num_tokens, num_past)
        args, kwargs = self._cut(part, partial(cut_last_tokens, num_tokens, num_past))
        return LayerCall(self._handle, self.forward, self._num_rows, args, kwargs)

    def _cut(
        self, part: tuple[Any, ...], cut: Callable[[str, Tensor], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with every tensor cut to a part.

        Args:
            part: Identifies the part. Every argument is cut to a part only once in a pass.
            cut: Cuts a tensor. It gets the argument's name too.
        """
        names = self._handle.positional
        if len(self._args) > len(names):
            raise RoutingError(
                f"the layers of this model take {len(self._args)} unnamed arguments after their "
                f"input; rows can't be routed separately"
            )
        args = []
        for name, value in zip(names, self._args, strict=False):
            args.append(self._cut_value(name, value, part, cut))
        kwargs = {}
        for name, value in self._kwargs.items():
            kwargs[name] = self._cut_value(name, value, part, cut)
        return tuple(args), kwargs

    def _cut_value(
        self, name: str, value: Any, part: tuple[Any, ...], cut: Callable[[str, Tensor], Tensor]
    ) -> Any:
        """Return an argument with its tensors cut to a part."""
        if name in UNREAD_OPTIONS or isinstance(value, (int, float, str, Cache, type(None))):
            return value
        memo = self.forward.parts
        whole, result = memo.get((name, part), (None, None))
        if whole is not value:
            is_sequence = isinstance(value, (tuple, list))
            tensors = value if is_sequence else (value,)  # such as cosines and sines
            check_tensors(name, tensors, type(value).__name__)
            parts = tuple([cut(name, tensor) for tensor in tensors])
            result = parts if is_sequence else parts[0]
            memo[name, part] = value, result
        return result

    def _select_rows(self, rows: tuple[int, ...], name: str, tensor: Tensor) -> Tensor:
        """Return the rows of an argument's tensor; refuse a tensor whose batch axis is unclear."""
        axis = BATCH_AXES[name]
        if axis is None or (name in ROTARY and tensor.dim() == 2):
            return tensor
        if tensor.shape[axis] == 1:  # broadcast over the batch: the same for every row
            # `rows` may be several copies of one row. Some models check the mask's number of rows.
            if name == "attention_mask" and self._num_rows == 1 and tensor.dim() == 4:
                return tensor.expand(len(rows), -1, -1, -1)
            return tensor
        if tensor.shape[axis] != self._num_rows:
            raise RoutingError(
                f"the layers of this model take {name!r} of shape {list(tensor.shape)}, whose axis "
                f"{axis} doesn't count the {self._num_rows} rows of the batch; rows can't be "
                f"routed separately, so give every row the same decisions"
            )
        return tensor.index_select(axis, self.forward.index(rows, tensor.device))
