"""What one step of healing learns from: the KL of a healed path from the full path.

Student and teacher are one frozen model: the path with its adapter, and the full path without. Both
run up to their last states; norm and head then see a part of the tokens at a time.

Axes: B rows, T tokens, D hidden, N real tokens of a batch, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from drllm.models.base.devices import on_device
from drllm.models.base.load import resolve_dtype
from drllm.models.base.prompts import context_length
from drllm.models.routing.driver import PathPass
from drllm.models.routing.injection import Driver, LayerCall
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.tuning.heal_texts import Tokens

LOGITS_AT_ONCE = 2**25
"""Of a distribution over some tokens: 128 MB, and several times that while gradients are made."""


class LastStates(NamedTuple):
    """The last states of all real tokens of a batch, each `[N, D]`."""

    teacher: Tensor
    student: Tensor


class Distillation:
    """Compares a path and its adapter with the full path, on batches of tokens.

    Args:
        routed: The model, with the adapter in it.
        path: The path with its adapter.
        first_layer: The first layer that the adapter changes.
        parameters: The adapter's weights; they alone get gradients.
        low_precision: A dtype for autocast; None for the model's own.
    """

    def __init__(
        self,
        routed: RoutedModel,
        path: StaticPath,
        first_layer: int,
        parameters: Sequence[nn.Parameter],
        low_precision: torch.dtype | None,
    ) -> None:
        self.routed = routed
        self.path = path
        self.full = StaticPath(range(routed.num_layers))
        self.parameters = parameters
        self.low_precision = low_precision
        self._num_shared = num_shared_layers(self.full, path, first_layer)

    def compute_gradients(self, batch: Sequence[Tokens]) -> Tensor:
        """Set the parameters' gradients to those of the mean KL, and return the KL, a scalar."""
        teacher, student = self.last_states(batch)
        ends = student.detach().requires_grad_()
        size = self._num_tokens_at_once()
        kls: list[Tensor] = []
        for start in range(0, len(ends), size):
            kl = self._sum_kl(teacher[start : start + size], ends[start : start + size])
            kl = kl / len(ends)
            kl.backward(inputs=[ends])  # type: ignore[no-untyped-call]
            kls.append(kl.detach())
        for parameter in self.parameters:
            parameter.grad = None
        student.backward(ends.grad, inputs=list(self.parameters))  # type: ignore[no-untyped-call]
        return torch.stack(kls).sum()

    def last_states(self, batch: Sequence[Tokens]) -> LastStates:
        """Return the last states of all real tokens, along the full path and along the path.

        What both begin with is run once.
        """
        # Padded behind, where causal attention lets no real token see it: no mask is needed.
        rows = [torch.tensor(tokens) for tokens in batch]
        ids = on_device(pad_sequence(rows, batch_first=True), self.routed.device)  # [B, T]
        lengths = torch.tensor([len(row) for row in rows])
        is_real = torch.arange(int(max(lengths))) < lengths[:, None]
        places = is_real.flatten().nonzero()[:, 0]
        shared = self._num_shared
        teacher = KeptStates(self.full)
        with torch.no_grad():
            self._run(self.routed.injection.decoder, teacher, ids)
        start = teacher.states[shared - 1] if shared else None
        student = KeptStates(self.path, start, shared)
        self._run(self.routed.injection.decoder, student, ids)
        return LastStates(_select(teacher.states[-1], places), _select(student.states[-1], places))

    def precision(self) -> AbstractContextManager[Any]:
        """Return the block in which the model computes in low precision, if it does."""
        if self.low_precision is None:
            return nullcontext()
        return torch.autocast(self.routed.device.type, self.low_precision)

    def _sum_kl(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return the KL summed over some tokens, given their last states `[n, D]`."""
        with torch.no_grad():
            target = self._logits(teacher).log_softmax(dim=-1)  # [n, V]
        logprobs = self._logits(student).log_softmax(dim=-1)
        return F.kl_div(logprobs, target, reduction="sum", log_target=True)

    def _num_tokens_at_once(self) -> int:
        """Return of how many tokens there are logits at once; each has a place in the context."""
        vocabulary = self.routed.config.get_text_config().vocab_size
        size: int = max(1, LOGITS_AT_ONCE // vocabulary)
        return min(size, context_length(self.routed.model) or size)

    def _logits(self, states: Tensor) -> Tensor:
        """Return the logits `[n, V]` that the model's own norm and head make of last states."""
        ids = torch.zeros(1, len(states), dtype=torch.long, device=self.routed.device)
        ending = KeptStates(self.full, states[None], len(self.full.layers))
        logits: Tensor = self._run(self.routed.model, ending, ids).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _run(self, module: Any, driver: Driver, ids: Tensor) -> Any:
        with self.precision(), self.routed.injection.driven_by(driver):
            return module(input_ids=ids, use_cache=False)


class KeptStates(PathPass):
    """Runs a path, or what is left of it from a state on, and keeps the state by layer.

    `num_run` layers of the path were run before: `start` is the state behind them.
    """

    def __init__(self, path: StaticPath, start: Tensor | None = None, num_run: int = 0) -> None:
        super().__init__(path)
        self.start = start
        self.states: list[Tensor] = []
        self._left = list(reversed(path.layers[num_run:]))

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layers of the path that can be run now, `[B, T, D]` to `[B, T, D]`."""
        if self.start is not None and call.index == 0:
            hidden = self.start
        self.states.append(super().layer(call, hidden))
        return self.states[-1]


def num_shared_layers(full: StaticPath, path: StaticPath, first_layer: int) -> int:
    """Return how many layers a path begins with as the full path does, before its adapter."""
    shared = 0
    for ours, theirs in zip(path.layers, full.layers, strict=False):
        if ours != theirs or ours >= first_layer:
            break
        shared += 1
    return shared


def low_precision(model: Any) -> torch.dtype | None:
    """Return in what float32 weights may compute faster on their device; None where in nothing."""
    is_native = resolve_dtype("auto", model.device) == torch.bfloat16
    if model.device.type == "cpu":  # without instructions for it slower; older torch can't tell
        is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        is_native = bool(is_supported and is_supported())
    return torch.bfloat16 if is_native and model.dtype == torch.float32 else None


def _select(states: Tensor, places: Tensor) -> Tensor:
    """Return the states `[N, D]` of some tokens of `[B, T, D]`."""
    return states.flatten(0, 1).index_select(0, on_device(places, states.device))
