"""The states of texts along two paths, advanced from layer to layer.

A refit compares the full path with a path that leaves out layers, gap by gap. Between two gaps only
the layers in between run, from the states where the last gap left them.

Axes: B rows, T tokens, D hidden, F inner size of an MLP, n real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from drllm.model.batching import group_by_length
from drllm.model.devices import on_device
from drllm.model.down_projections import DownProjection
from drllm.model.layers import temporary_hooks
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import Driver, Forward, LayerCall
from drllm.tuning.heal_texts import Tokens
from drllm.tuning.normed_gap import NormedTokens

TOKENS_AT_ONCE = 4096  # maximum tokens of a batch, with padding


@dataclass
class Stream:
    """The states of a batch along a path, as far as its layers have run.

    Attributes:
        layers: The layers of the path, in order.
        new_weights: As in `Forward.new_weights`, for all passes along the path.
        state: What enters the next layer, `[B, T, D]`; None at the embeddings.
        num_run: How many layers of the path have run.
    """

    layers: Sequence[int]
    new_weights: Mapping[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None
    num_run: int = 0

    def remaining(self, end: int) -> Sequence[int]:
        """Return the layers still to run before layer `end`."""
        return [layer for layer in self.layers[self.num_run :] if layer < end]


class StatesBatch:
    """A batch of texts.

    Args:
        texts: The texts, as tokens.
        device: Where the model is.

    Attributes:
        ids: Token ids, `[B, T]`, padded on the right, where causal attention hides the padding.
        places: The places of real tokens among all tokens, row by row, `[n]`.
        is_first: Whether a real token is the first of its text, bool `[n]`.
    """

    def __init__(self, texts: Sequence[Tokens], device: torch.device) -> None:
        rows = [torch.tensor(tokens) for tokens in texts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence(rows, batch_first=True)
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        places = (positions < lengths[:, None]).flatten().nonzero()[:, 0]
        self.ids = on_device(ids, device)
        self.places = on_device(places, device)
        self.is_first = on_device(positions.flatten()[places] == 0, device)

    def select(self, states: Tensor) -> Tensor:
        """Return what belongs to real tokens, `[n, …]`, of a tensor `[B, T, …]` or `[B·T, …]`."""
        by_token = states.reshape(self.ids.numel(), -1)
        return by_token.index_select(0, self.places.to(by_token.device))


def make_batches(texts: Sequence[Tokens], device: torch.device) -> list[StatesBatch]:
    """Put texts of similar length into batches."""
    groups = group_by_length([len(text) for text in texts], len(texts), TOKENS_AT_ONCE)
    return [StatesBatch([texts[place] for place in places], device) for places in groups]


class LayersPass(Driver):
    """A pass that runs some layers, from a state that an earlier pass has left.

    Args:
        layers: The layers to run.
        start: What enters the first of them, `[B, T, D]`; None for the embeddings.
        new_weights: As in `Forward.new_weights`.

    Attributes:
        state: What the last layer returned, `[B, T, D]`.
    """

    def __init__(
        self, layers: Sequence[int], start: Tensor | None, new_weights: Mapping[str, Tensor]
    ) -> None:
        self.layers = frozenset(layers)
        self.start = start
        self.new_weights = new_weights
        self.state: Tensor | None = None

    def begin(self, forward: Forward) -> LayersPass:
        """Use the new weights in this pass."""
        forward.new_weights = self.new_weights
        return self

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layer if it is one of those to run."""
        if self.start is not None and call.index == 0:
            hidden = self.start
        if call.index in self.layers:
            hidden = call.run(hidden)
        self.state = hidden
        return hidden


class GapTokens(NamedTuple):
    """What a gap's regression needs of the real tokens of a batch.

    Attributes:
        inputs: c z: the input of the down-projection before the gap, times the factor on its
            output, `[n, F]`.
        outputs: Y: the state that the layer before the gap returns, `[n, D]`.
        targets: T: the state of the full path that enters the layer after the gap, `[n, D]`.
        is_first: Whether a token is the first of its text, bool `[n]`.
    """

    inputs: Tensor
    outputs: Tensor
    targets: Tensor
    is_first: Tensor

    @property
    def residuals(self) -> Tensor:
        """R: what the state lacks, `[n, D]`."""
        return self.targets - self.outputs


@dataclass(frozen=True, slots=True)
class LayerRunner:
    """Runs layers of a model on batches."""

    routed: RoutedModel

    @torch.no_grad()
    def advance(self, batch: StatesBatch, stream: Stream, end: int) -> None:
        """Run the layers of a stream that come before layer `end`."""
        layers = stream.remaining(end)
        if layers or stream.state is None:
            stream.state = self._run(batch, layers, stream.state, stream.new_weights)
            stream.num_run += len(layers)

    def _run(
        self,
        batch: StatesBatch,
        layers: Sequence[int],
        start: Tensor | None,
        new_weights: Mapping[str, Tensor],
    ) -> Tensor:
        """Run layers on a batch, and return the state after them, `[B, T, D]`."""
        driver = LayersPass(layers, start, new_weights)
        with self.routed.injection.driven_by(driver):
            self.routed.injection.decoder(input_ids=batch.ids, use_cache=False)
        assert driver.state is not None
        return driver.state

    @torch.no_grad()
    def read_gap(
        self, batch: StatesBatch, projection: DownProjection, start: Tensor, targets: Tensor
    ) -> GapTokens:
        """Run the layer before a gap, and return what the gap's regression needs.

        Args:
            batch: The batch.
            projection: The layer's down-projection.
            start: What enters the layer on the repaired path, `[B, T, D]`.
            targets: What enters the layer after the gap on the full path, `[B, T, D]`.
        """
        with _record_inputs(projection.module) as inputs:
            outputs = self._run(batch, [projection.layer], start, {})
        values = batch.select(inputs[0])
        if projection.factor is None:
            values = values * self._measure_factors(batch, projection, start, outputs)
        elif projection.factor != 1:
            values = values * projection.factor
        return GapTokens(
            inputs=values,
            outputs=batch.select(outputs),
            # The layer after the gap may be on another device.
            targets=batch.select(targets.to(outputs.device)),
            is_first=batch.is_first,
        )

    @torch.no_grad()
    def read_normed_gap(
        self, batch: StatesBatch, projection: DownProjection, start: Tensor, targets: Tensor
    ) -> NormedTokens:
        """Do what `read_gap` does for a layer with a norm behind its MLP."""
        assert projection.norm is not None
        with (
            _record_inputs(projection.module) as inputs,
            _record_outputs(projection.norm.module) as additions,
        ):
            outputs = self._run(batch, [projection.layer], start, {})
        assert projection.factor is not None  # with a norm it is the same for all tokens
        addition = projection.factor * batch.select(additions[0])
        return NormedTokens(
            inputs=batch.select(inputs[0]),
            states=batch.select(outputs) - addition,
            targets=batch.select(targets),
            is_first=batch.is_first,
        )

    def _measure_factors(
        self, batch: StatesBatch, projection: DownProjection, start: Tensor, outputs: Tensor
    ) -> Tensor:
        """Return the factor on the projection's output at each real token, `[n, 1]`.

        The layer runs again with a vector added to the projection's output. The vector is as large
        as the layer's output, so that the difference of the two runs is exact.
        """
        states = batch.select(outputs).float()
        direction = torch.ones_like(states[0])
        sizes = states.square().mean(dim=1).sqrt()
        size = float(sizes.median())
        hook = projection.module.register_forward_hook(partial(_add_constant, size))
        with temporary_hooks([hook]):
            moved = batch.select(self._run(batch, [projection.layer], start, {})).float()
        return (((moved - states) @ direction) / (size * len(direction)))[:, None]


def _add_constant(value: float, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output + value


@contextmanager
def _record_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record the inputs of a module inside the block."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with temporary_hooks([hook]):
        yield inputs


@contextmanager
def _record_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record the outputs of a module inside the block."""
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with temporary_hooks([hook]):
        yield outputs


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the block.

    Weights of 16 bits are widened, and narrowed again afterwards, which gives back the same bits.
    """
    with ExitStack() as stack:
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype in (torch.bfloat16, torch.float16):
                stack.callback(partial(_set_dtype, tensor, tensor.dtype))
                _set_dtype(tensor, torch.float32)
        yield


def _set_dtype(tensor: Tensor, dtype: torch.dtype) -> None:
    tensor.data = tensor.data.to(dtype)
