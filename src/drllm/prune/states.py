"""The states of texts, advanced from layer to layer along a model.

A refit compares the full model with a shortened one, gap by gap. Between two gaps only the layers
in between run, from the states where the last gap left them.

Axes: B rows, T tokens, D hidden, F inner size of an MLP, n real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from drllm.model.batching import group_by_length
from drllm.model.devices import on_device
from drllm.model.layers import temporary_hooks
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import Driver, LayerCall

Tokens: TypeAlias = tuple[int, ...]

TOKENS_AT_ONCE = 4096  # maximum tokens of a batch, with padding


class TextBatch:
    """A batch of texts.

    Args:
        texts: The texts, as tokens.
        device: Where the model is.

    Attributes:
        ids: Token ids, `[B, T]`, padded on the right, where causal attention hides the padding.
        lengths: The number of tokens of each text, `[B]`.
        places: The places of real tokens among all tokens, row by row, `[n]`.
        is_first: Whether a real token is the first of its text, bool `[n]`.
    """

    def __init__(self, texts: Sequence[Tokens], device: torch.device) -> None:
        rows = [torch.tensor(tokens) for tokens in texts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence(rows, batch_first=True)
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        places = (positions < lengths[:, None]).flatten().nonzero()[:, 0]
        self.lengths = [len(row) for row in rows]
        self.ids = on_device(ids, device)
        self.places = on_device(places, device)
        self.is_first = on_device(positions.flatten()[places] == 0, device)

    def select(self, states: Tensor) -> Tensor:
        """Return what belongs to real tokens, `[n, …]`, of a tensor `[B, T, …]` or `[B·T, …]`."""
        by_token = states.reshape(self.ids.numel(), -1)
        return by_token.index_select(0, self.places.to(by_token.device))


def make_batches(texts: Sequence[Tokens], device: torch.device) -> list[TextBatch]:
    """Put texts of similar length into batches."""
    groups = group_by_length([len(text) for text in texts], len(texts), TOKENS_AT_ONCE)
    return [TextBatch([texts[place] for place in places], device) for places in groups]


class LayersPass(Driver):
    """A pass that runs some layers, from a state that an earlier pass has left.

    Args:
        layers: The layers to run.
        start: What enters the first of them, `[B, T, D]`; None for the embeddings.

    Attributes:
        states: What each call of a layer returned, run or not, `[L][B, T, D]`.
    """

    def __init__(self, layers: Sequence[int], start: Tensor | None = None) -> None:
        self.layers = frozenset(layers)
        self.start = start
        self.states: list[Tensor] = []

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layer if it is one of those to run."""
        if self.start is not None and call.index == 0:
            hidden = self.start
        if call.index in self.layers:
            hidden = call.run(hidden)
        self.states.append(hidden)
        return hidden


@torch.no_grad()
def run_layers(
    routed: RoutedModel, batch: TextBatch, layers: Sequence[int], start: Tensor | None = None
) -> Tensor:
    """Run some layers on a batch, and return the state after them, `[B, T, D]`."""
    driver = LayersPass(layers, start)
    with routed.injection.driven_by(driver):
        routed.injection.decoder(input_ids=batch.ids, use_cache=False)
    return driver.states[-1]


@contextmanager
def record_calls(module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """Record the first input and the output of each call of a module inside the block."""
    calls: list[tuple[Any, Any]] = []
    hook = module.register_forward_hook(
        lambda _module, args, output: calls.append((args[0], output))
    )
    with temporary_hooks([hook]):
        yield calls


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the block; afterwards every tensor is the one that it was.

    Tensors that were put in place inside the block stay.
    """
    with ExitStack() as stack:
        for model in models:
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.dtype in (torch.bfloat16, torch.float16):
                    stack.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.float()
        yield


def put_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a module a new weight; the old tensor, which other models may share, isn't changed."""
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)


def measure_text_loss(model: Any, texts: Sequence[Tokens]) -> float:
    """Return the mean over texts of the next-token loss, in nats a token."""
    return fmean(measure_text_losses(model, texts))


@torch.no_grad()
def measure_text_losses(model: Any, texts: Sequence[Tokens]) -> list[float]:
    """Return the next-token loss of each text, in nats a token."""
    losses: dict[Tokens, float] = {}
    for batch in make_batches(texts, model.device):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        for row, length in enumerate(batch.lengths):
            tokens = batch.ids[row, 1:length]
            logprobs = logits[row, : length - 1].float().log_softmax(dim=-1)
            loss = -logprobs.gather(1, tokens[:, None]).mean()
            losses[tuple(batch.ids[row, :length].tolist())] = float(loss)
    return [losses[tuple(text)] for text in texts]
