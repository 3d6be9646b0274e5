"""Find the attention and the MLP inside each layer of a model, by two runs of one token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from drllm.errors import ArchitectureError
from drllm.model.layers import (
    evaluation_mode,
    find_layers,
    one_token,
    temporary_hooks,
    unwrap_peft,
)

MIN_MATRICES = 2
"""Minimum number of matrices in an MLP: an up projection and a down projection."""


@dataclass(frozen=True, slots=True)
class Sublayers:
    """The attention and the MLP of one layer."""

    attention: nn.Module
    mlps: tuple[nn.Module, ...]  # usually one; a shared expert is a second one


def find_sublayers(model: Any) -> list[Sublayers]:
    """Find the attention and the MLP of each layer, `[L]`.

    The attention is the child of a layer that stores K/V in the cache. An MLP is a child that
    stores nothing and has at least two matrices. A second run checks that a layer does nothing but
    add the outputs of these modules to its hidden state. In this run the outputs are replaced by
    zeros, so the layer must return its input.

    Raises:
        ArchitectureError: A layer lacks one of these modules, or does more with their outputs than
            add them.
    """
    decoder, layers = find_layers(model)
    name = type(unwrap_peft(model)).__name__
    watches = [_ChildWatch(name, index, layer) for index, layer in enumerate(layers)]
    hooks: list[RemovableHandle] = []
    for watch in watches:
        hooks += watch.register_hooks()
    _run_token(model, decoder, hooks)
    sublayers = [watch.result() for watch in watches]

    hooks = []
    for index, layer in enumerate(layers):
        hooks += _SumCheck(name, index, sublayers[index]).register_hooks(layer)
    _run_token(model, decoder, hooks)
    return sublayers


class _ChildWatch:
    """Watches the children of one layer while a token passes."""

    def __init__(self, model_name: str, index: int, layer: nn.Module) -> None:
        self.model_name = model_name
        self.index = index
        self.layer = layer
        self.attentions: list[nn.Module] = []
        self.mlps: list[nn.Module] = []
        self._cache: Cache | None = None
        self._lengths: dict[nn.Module, int] = {}  # child → K/V tokens of the layer before the child

    def register_hooks(self) -> Iterator[RemovableHandle]:
        """Register the hooks, and yield their handles."""
        yield self.layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
        for child in self.layer.children():
            yield child.register_forward_pre_hook(self._before_child)
            yield child.register_forward_hook(self._after_child, with_kwargs=True)

    def result(self) -> Sublayers:
        """Return the sublayers that the run has shown."""
        if len(self.attentions) != 1:
            reason = f"has {len(self.attentions)} attention modules"
            raise _make_error(self.model_name, self.index, reason)
        if not self.mlps:
            reason = "has no module of its own for the MLP"
            raise _make_error(self.model_name, self.index, reason)
        return Sublayers(self.attentions[0], tuple(self.mlps))

    def _before_layer(self, _layer: nn.Module, args: Any, kwargs: Any) -> None:
        values = (*args, *kwargs.values())
        self._cache = next((value for value in values if isinstance(value, Cache)), None)

    def _before_child(self, child: nn.Module, _args: Any) -> None:
        self._lengths[child] = self._kv_length()

    def _after_child(self, child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note whether a child is an attention or an MLP, and check the shape of its output."""
        matrices = [weight for weight in child.parameters() if weight.dim() > 1]
        if self._kv_length() > self._lengths[child]:
            self.attentions.append(child)
        elif len(matrices) >= MIN_MATRICES:
            self.mlps.append(child)
        else:
            return
        hidden = first_argument(args, kwargs)
        new_hidden = first_output(output)
        has_shape = isinstance(new_hidden, torch.Tensor) and isinstance(hidden, torch.Tensor)
        if not has_shape or hidden.shape != new_hidden.shape:
            reason = "has a sublayer that changes the shape of a state"
            raise _make_error(self.model_name, self.index, reason)

    def _kv_length(self) -> int:
        if self._cache is None:
            return 0
        return int(self._cache.get_seq_length(self.index))


class _SumCheck:
    """Checks that a layer returns its input unchanged if its sublayers return zeros."""

    def __init__(self, model_name: str, index: int, sublayers: Sublayers) -> None:
        self.model_name = model_name
        self.index = index
        self.modules = (sublayers.attention, *sublayers.mlps)
        self._state: torch.Tensor | None = None

    def register_hooks(self, layer: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hooks, and yield their handles."""
        yield layer.register_forward_pre_hook(self._put_noise, with_kwargs=True)
        yield layer.register_forward_hook(self._compare)
        for module in self.modules:
            yield module.register_forward_hook(_replace_by_zeros)

    def _put_noise(self, _layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Replace the input of the layer by noise, which is always the same."""
        hidden = first_argument(args, kwargs)
        generator = torch.Generator().manual_seed(self.index)
        noise = torch.randn(hidden.shape, generator=generator)
        self._state = noise.to(hidden.device, hidden.dtype)
        if args:
            return (self._state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._state}

    def _compare(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        assert self._state is not None
        result = first_output(output)
        # The input may come from the device of the layer before.
        if not torch.equal(result, self._state.to(result.device)):
            reason = "does more than add the outputs of its attention and MLP"
            raise _make_error(self.model_name, self.index, reason)


def _replace_by_zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Replace a sublayer's output by zeros."""
    if not isinstance(output, tuple):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def _run_token(model: Any, decoder: nn.Module, hooks: list[RemovableHandle]) -> None:
    """Run one token through the model with hooks, and remove the hooks."""
    with temporary_hooks(hooks), torch.no_grad(), evaluation_mode(decoder):
        decoder(input_ids=one_token(model), use_cache=True)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a call of a module: the hidden state."""
    if args:
        return args[0]
    return kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def first_output(output: Any) -> Any:
    """Return the first of a module's outputs: the hidden state."""
    if isinstance(output, tuple):
        return output[0]
    return output


def _make_error(model_name: str, index: int, reason: str) -> ArchitectureError:
    """Make the error for a layer whose sublayers aren't found."""
    return ArchitectureError(
        f"layer {index} of {model_name} {reason}, so its attention and its MLP can't be told apart"
    )
