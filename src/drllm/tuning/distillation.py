"""The loss of healing and its gradients: the KL of a healed path from the full path.

Teacher and student are the same frozen model. The teacher runs the full path, and the student runs
the path with its adapter. Both run to their last states, which the last layer returns. The norm and
the head then run on a part of the tokens at a time, since the logits of all tokens would take much
memory.

Axes: B rows, T tokens, D hidden, N real tokens of a batch, n tokens of a part, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from drllm.model.devices import on_device
from drllm.model.load import resolve_dtype
from drllm.model.prompts import context_length
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.driver import PathPass
from drllm.models.routing.injection import Driver, LayerCall
from drllm.paths import StaticPath
from drllm.tuning.cast_weights import CastWeights
from drllm.tuning.heal_texts import Tokens
from drllm.tuning.layer_states import StatesBatch
from drllm.tuning.teacher_states import MAX_BYTES, SequenceStates, TeacherStates

LOGITS_AT_ONCE = 2**26
"""How many logits are computed at once. They take 256 MB in float32, and several times that with
their gradients. Fewer take longer, since each part reads the whole head."""
LOGITS_IN_CACHE = 2**18
"""How many logits' KL is computed at once on a CPU: 1 MB in float32, which fits into a core's
cache."""


class LastStates(NamedTuple):
    """The states after the last layer at all real tokens of a batch, `[N, D]`, along both paths."""

    teacher: Tensor
    student: Tensor


class Distillation:
    """Compares a path and its adapter with the full path, on batches of tokens.

    Args:
        routed: The model, with the adapter in it.
        path: The path with its adapter.
        first_layer: The lowest layer that the adapter changes, by LoRA or a refit.
        parameters: The LoRA weights. Nothing else gets gradients, the refit included.
        low_precision: A dtype for autocast; None computes in the model's dtype.
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
        self._cast_weights: CastWeights | None = None
        if low_precision is not None:
            self._cast_weights = CastWeights(routed.model, low_precision)
        self._num_shared = count_shared_layers(self.full, path, first_layer)
        self.teacher = TeacherStates(self._run_teacher, self._count_kept_tokens())

    def compute_gradients(self, batch: Sequence[Tokens]) -> Tensor:
        """Compute the gradients of the mean KL, and return the mean KL, a scalar.

        The gradients are stored in `grad` of the parameters, in place of old gradients. The mean is
        over the real tokens of the batch.
        """
        teacher, student = self.last_states(batch)
        # First the gradients of the states, part by part, then the gradients of the parameters.
        states = student.detach().requires_grad_()
        size = self._num_tokens_at_once()
        kls: list[Tensor] = []
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            with torch.no_grad():
                target = self._logits(teacher[part])  # [n, V]
            logits = self._logits(states[part])  # [n, V]
            kl, gradient = compute_kl(target, logits.detach(), weight=1 / len(states))
            logits.backward(gradient, inputs=[states])  # type: ignore[no-untyped-call]
            kls.append(kl)
        for parameter in self.parameters:
            parameter.grad = None
        student.backward(states.grad, inputs=list(self.parameters))  # type: ignore[no-untyped-call]
        return torch.stack(kls).sum()

    def last_states(self, batch: Sequence[Tokens]) -> LastStates:
        """Return the last states of all real tokens, of the teacher and of the student.

        The layers that both paths begin with run once, without gradients.
        """
        teacher = self.teacher.get(batch)
        start = None
        if self._num_shared > 0:
            starts = [states.start for states in teacher if states.start is not None]
            start = on_device(pad_sequence(starts, batch_first=True), self.routed.device)
        student = StatesPass(self.path, start, self._num_shared)
        padded = StatesBatch(batch, self.routed.device)
        self._run(self.routed.injection.decoder, student, padded.ids)
        student_states = padded.select(student.states[-1])
        teacher_states = torch.cat([states.last for states in teacher])
        return LastStates(on_device(teacher_states, student_states.device), student_states)

    @torch.no_grad()
    def _run_teacher(self, batch: Sequence[Tokens]) -> list[SequenceStates]:
        """Run the full path on a batch, and return the states of each sequence, on the CPU."""
        teacher = StatesPass(self.full)
        padded = StatesBatch(batch, self.routed.device)
        self._run(self.routed.injection.decoder, teacher, padded.ids)
        sequences = []
        for row, tokens in enumerate(batch):
            start = None
            if self._num_shared > 0:
                start = _copy_row(teacher.states[self._num_shared - 1], row, len(tokens))
            last = _copy_row(teacher.states[-1], row, len(tokens))
            sequences.append(SequenceStates(start, last))
        return sequences

    def _count_kept_tokens(self) -> int:
        """Return how many tokens the teacher's states may be kept of."""
        size: int = self.routed.config.get_text_config().hidden_size
        num_states = 2 if self._num_shared > 0 else 1
        num_bytes: int = torch.promote_types(self.routed.dtype, torch.float32).itemsize
        return MAX_BYTES // (num_states * size * num_bytes)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Let the model compute in `low_precision` inside the block, if it is set."""
        if self._cast_weights is None:
            yield
            return
        with (
            torch.autocast(self.routed.device.type, self.low_precision),
            self._cast_weights.use(),
        ):
            yield

    def _num_tokens_at_once(self) -> int:
        """Return the number of tokens whose logits are computed at once."""
        vocabulary = self.routed.config.get_text_config().vocab_size
        size: int = max(1, LOGITS_AT_ONCE // vocabulary)
        # `_logits` reads the tokens as one row, which must fit into the context.
        return min(size, context_length(self.routed.model) or size)

    def _logits(self, states: Tensor) -> Tensor:
        """Run the model's own norm and head on last states `[n, D]`, and return logits `[n, V]`.

        The whole model runs, so that nothing of its head is left out, but no layer does. The token
        ids are ignored.
        """
        ids = torch.zeros(1, len(states), dtype=torch.long, device=self.routed.device)
        ending = StatesPass(self.full, states[None], len(self.full.layers))
        logits: Tensor = self._run(self.routed.model, ending, ids).logits[0]
        return logits

    def _run(self, module: Any, driver: Driver, ids: Tensor) -> Any:
        """Run the model or its decoder on token ids, with layers as the driver decides."""
        with self.precision(), self.routed.injection.driven_by(driver):
            return module(input_ids=ids, use_cache=False)


@torch.no_grad()
def compute_kl(target: Tensor, logits: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the weighted KL of some tokens, summed, and its gradient in the logits.

    The gradient is the difference of the two distributions. Computing it directly takes fewer
    passes over the vocabulary than autograd. On a CPU, a few tokens at a time are computed, so
    that their numbers stay in the processor's cache.

    Args:
        target: The teacher's logits, `[n, V]`.
        logits: The student's logits, `[n, V]`.
        weight: The factor on the KL.

    Returns:
        The KL, a scalar, and its gradient, `[n, V]` in the dtype of the logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gradient = torch.empty_like(logits)
    kl = torch.zeros((), dtype=dtype, device=logits.device)
    size = len(logits)
    if logits.device.type == "cpu":
        size = max(1, LOGITS_IN_CACHE // logits.shape[1])
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        target_logprobs = target[part].log_softmax(dim=-1, dtype=dtype)
        logprobs = logits[part].log_softmax(dim=-1, dtype=dtype)
        target_probabilities = target_logprobs.exp()
        differences = target_logprobs.sub_(logprobs)
        kl += torch.dot(target_probabilities.flatten(), differences.flatten())
        gradient[part] = logprobs.exp_().sub_(target_probabilities).mul_(weight)
    return weight * kl, gradient


class StatesPass(PathPass):
    """A pass along a path that stores the states.

    `states` has one state for each layer of the model, `[B, T, D]`: what the next layer reads.

    Args:
        path: The path.
        start: The state after the first `num_run` layers of the path, which aren't run again; None
            starts at the embeddings.
        num_run: The number of layers that `start` has behind it.
    """

    def __init__(self, path: StaticPath, start: Tensor | None = None, num_run: int = 0) -> None:
        super().__init__(path, num_run)
        self.start = start
        self.states: list[Tensor] = []

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layers of the path that come at this call, `[B, T, D]` to `[B, T, D]`."""
        if self.start is not None and call.index == 0:
            hidden = self.start
        self.states.append(super().layer(call, hidden))
        return self.states[-1]


def count_shared_layers(full: StaticPath, path: StaticPath, first_layer: int) -> int:
    """Return how many layers both paths begin with, up to the first layer with the adapter."""
    num_shared = 0
    for layer, full_layer in zip(path.layers, full.layers, strict=False):
        if layer != full_layer or layer >= first_layer:
            break
        num_shared += 1
    return num_shared


def choose_low_precision(model: Any) -> torch.dtype | None:
    """Return a dtype in which a float32 model computes faster on its device; None if none does."""
    if model.dtype != torch.float32:
        return None
    if model.device.type == "cpu":
        # bfloat16 is slower on a CPU without instructions for it. Older versions of torch don't
        # say whether the CPU has them.
        has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        is_faster = has_instructions is not None and has_instructions()
    else:
        is_faster = resolve_dtype("auto", model.device) == torch.bfloat16
    return torch.bfloat16 if is_faster else None


def _copy_row(states: Tensor, row: int, num_tokens: int) -> Tensor:
    """Copy the states of one row's real tokens to the CPU, `[T, D]`."""
    return states[row, :num_tokens].to("cpu", copy=True)
