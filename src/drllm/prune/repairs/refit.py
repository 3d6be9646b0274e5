"""Refit: solve the last linear map before each gap anew, in closed form.

In each gap of a shortened model, the last layer before it gets a new down-projection in its MLP, so
that the state after the gap is as near as possible to that of the full model. With R = T − Y, what
the layer's output Y lacks of the state T that enters the full model's layer after the gap, z the
projection's input and c the factor on its output, the change ΔW minimises

    Σ w ‖R − c ΔW z‖² + λ N ‖ΔW S‖²

over the N tokens of the texts, where S is the diagonal matrix of the root mean squares of c z, and
w is 1 but for first tokens (`weighted`). λ is chosen on a tenth of the texts. The gaps are solved
in order, each on the model as repaired so far. Nothing is trained, and nothing is added.

Axes: B rows, T tokens, D hidden, F inner size of the MLP, n real tokens.

Source: ours, from ReplaceMe (arXiv 2505.02819), which solves a map of the MLP's output; the inner
activations of the MLP have more inputs to explain the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from transformers.pytorch_utils import Conv1D

from drllm.errors import ModelError, PathError, RoutingError, TaskError
from drllm.model.batching import free_bytes
from drllm.model.down_projections import DownProjection, find_down_projections
from drllm.model.layers import find_layers, temporary_hooks
from drllm.model.prompts import encode
from drllm.model.submodel import list_kept_layers
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.prune.least_squares import share_of_error
from drllm.prune.loss import make_text_item
from drllm.prune.repairs.base import REPAIRS, Lessons, Repair
from drllm.prune.repairs.normed import NormedMap, NormedTokens, solve_normed
from drllm.prune.repairs.weighted import WeightedSums
from drllm.prune.states import (
    TextBatch,
    Tokens,
    in_float32,
    make_batches,
    measure_text_loss,
    put_weight,
    record_calls,
    run_layers,
)
from drllm.records.codec import hash_values
from drllm.tasks.texts import cut_texts
from drllm.work.listener import Listener, OnProgress

RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 3))
"""The values of λ to choose from, 10⁻⁶ to 10. Few tokens need a large one."""
HELD_OUT = 10  # one text in ten chooses λ
MAX_TOKENS = 512  # of a text; longer ones are cut
MIN_TEXTS = 2  # one to fit, and one to choose λ
MATRICES_AT_PEAK = 5  # [F, F] and [F, D] in float64, each
SHARE_FOR_STATES = 0.25  # of the free memory that the states of all texts may take
SHARE_FOR_FLOAT32 = 0.5  # of the free memory that weights of 16 bits may grow by


class Gap(NamedTuple):
    """A gap of a shortened model.

    Attributes:
        place: The layer before it, in the shortened model.
        layer: The same layer in the full model.
        next_layer: The full model's layer after it; L if its last layers are left out.
    """

    place: int
    layer: int
    next_layer: int


@dataclass(frozen=True, slots=True)
class RefittedGap:
    """How a gap was solved.

    Attributes:
        gap: The gap.
        name: The down-projection in the shortened model, such as `11.mlp.down_proj`.
        ridge: λ.
        unexplained: The squared error on the texts that chose λ, as a share of that before.
    """

    gap: Gap
    name: str
    ridge: float
    unexplained: float


def find_gaps(model: Any, teacher: Any) -> list[Gap]:
    """Return the gaps of a shortened model; none if it has all layers of the full one.

    Raises:
        PathError: A layer isn't one of the full model's, or the first one is left out.
    """
    full = list_kept_layers(teacher)
    kept = list_kept_layers(model)
    missing = [layer for layer in kept if layer not in full]
    if missing:
        raise PathError(
            f"the shortened model has the layer {missing[0]}, which the full model lacks; give the "
            f"model that it was made from"
        )
    places = [full.index(layer) for layer in kept]
    if places[0] != 0:
        raise PathError(
            f"the model begins with layer {kept[0]}, and no layer before it can be refitted; keep "
            f"layer 0"
        )
    next_places = [*places[1:], len(full)]
    gaps = []
    for place, (layer, next_layer) in enumerate(zip(places, next_places, strict=True)):
        if next_layer > layer + 1:
            gaps.append(Gap(place, layer, next_layer))
    return gaps


def find_projections(model: Any, gaps: Sequence[Gap]) -> list[DownProjection]:
    """Return the down-projection before each gap, or refuse what can't have a new weight.

    Raises:
        ArchitectureError: A layer has no down-projection of its own, such as one of packed experts.
        RoutingError: A weight is quantised, offloaded or on the meta device.
        ModelError: There isn't enough memory.
    """
    found = find_down_projections(model, [gap.place for gap in gaps])
    projections = [found[gap.place] for gap in gaps]
    for projection in projections:
        modules = {projection.name: projection.module}
        if projection.norm is not None:
            modules[projection.norm.name] = projection.norm.module
        for name, module in modules.items():
            weight: Any = module.weight
            if weight.device.type == "meta":
                raise RoutingError(
                    f"the weight of {name} is offloaded, and a refit can't replace it; load the "
                    f"model onto one device"
                )
            if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
                raise RoutingError(
                    f"{name} is quantised, and a refit can't replace its weight; load the model "
                    f"without quantisation"
                )
        num_bytes = count_bytes(projection)
        free = free_bytes(choose_device(projection))
        if num_bytes > free:
            raise ModelError(
                f"refitting {projection.name}, which has {get_size(projection)[0]} inputs, takes "
                f"{num_bytes / 1e9:.1f} GB of memory beside the model, but only {free / 1e9:.1f} "
                f"GB are free; free some memory"
            )
    return projections


def get_size(projection: DownProjection) -> tuple[int, int]:
    """Return F and D of a down-projection."""
    rows, columns = projection.weight.shape
    return (rows, columns) if isinstance(projection.module, Conv1D) else (columns, rows)


def count_bytes(projection: DownProjection) -> int:
    """Return the memory that solving takes: 8 GB for a model of 8B weights."""
    return 8 * MATRICES_AT_PEAK * get_size(projection)[0] * sum(get_size(projection))


def choose_device(projection: DownProjection) -> torch.device:
    """Return the device for the sums: the model's, or the CPU if that lacks memory or float64."""
    device = projection.weight.device
    if device.type == "mps" or count_bytes(projection) > free_bytes(device):
        return torch.device("cpu")
    return device


def split_for_ridge(texts: Sequence[Tokens]) -> tuple[list[Tokens], list[Tokens]]:
    """Return the texts to fit, and those to choose λ on: a tenth, by their hash, at least one."""
    shuffled = sorted(texts, key=lambda text: hash_values(["ridge", text]))
    num_held_out = max(1, len(texts) // HELD_OUT)
    return shuffled[num_held_out:], shuffled[:num_held_out]


@dataclass
class _Stream:
    """The states of a batch along one model, as far as its layers have run."""

    state: Tensor | None = None  # [B, T, D]
    num_run: int = 0

    def advance(self, routed: RoutedModel, batch: TextBatch, end: int) -> Tensor:
        """Run the layers before layer `end`, and return the state that enters it."""
        if self.state is None or self.num_run < end:
            self.state = run_layers(routed, batch, range(self.num_run, end), self.state)
            self.num_run = end
        return self.state


def solve_gaps(
    model: Any,
    teacher: Any,
    texts: Sequence[Tokens],
    on_progress: OnProgress | None = None,
) -> list[RefittedGap]:
    """Give a shortened model new weights before its gaps.

    Args:
        model: The shortened model. Its new weights are new tensors.
        teacher: The model that it was made from, which isn't changed.
        texts: Texts as tokens, mixed as the model will be used; 50 thousand tokens or more.
        on_progress: Receives the tokens read so far.

    Raises:
        PathError: The first layer is left out.
        ArchitectureError: More happens to a down-projection's output than a norm or a factor before
            it is added to the state; or a layer has none.
        RoutingError: A weight is quantised or offloaded.
        ModelError: There isn't enough memory, or the states aren't finite.
        TaskError: There are fewer than two texts.
    """
    gaps = find_gaps(model, teacher)
    if len(texts) < MIN_TEXTS:
        raise TaskError(
            f"a refit needs at least {MIN_TEXTS} texts, one of them to choose λ on, and there are "
            f"{len(texts)}; give more texts"
        )
    num_tokens = sum(map(len, texts))
    width = model.config.get_text_config().hidden_size
    num_bytes_kept = 2 * 4 * num_tokens * width
    keeps_states = num_bytes_kept < SHARE_FOR_STATES * free_bytes(model.device)
    num_bytes_grown = sum(
        (4 - weight.itemsize) * weight.numel()
        for weight in [*model.parameters(), *teacher.parameters()]
    )
    results: list[RefittedGap] = []
    starts_alike = _shares_layers(model, teacher, gaps[0].place) if gaps else True
    with ExitStack() as stack:
        dtypes = {weight: weight.dtype for weight in model.parameters()}
        if num_bytes_grown < SHARE_FOR_FLOAT32 * free_bytes(model.device):
            stack.enter_context(in_float32(model, teacher))
        projections = find_projections(model, gaps)  # measures factors and gains, so in float32
        full = RoutedModel(teacher)
        stack.callback(full.detach)
        short = RoutedModel(model)
        stack.callback(short.detach)
        to_fit, to_choose = split_for_ridge(texts)
        fit_batches = make_batches(to_fit, model.device)
        choose_batches = make_batches(to_choose, model.device)
        streams = {batch: (_Stream(), _Stream()) for batch in [*fit_batches, *choose_batches]}
        num_read = 0

        def read(gap: Gap, projection: DownProjection, batch: TextBatch) -> NormedTokens:
            """Advance both models to a gap, and return what its regression needs.

            `states` is Y, what the layer returns; with a norm, without the norm's addition.
            """
            nonlocal num_read
            full_stream, short_stream = streams[batch]
            if starts_alike and not results and short_stream.state is None:
                # Up to the first gap both models are the same.
                short_stream.state = full_stream.advance(full, batch, gap.layer)
                short_stream.num_run = gap.place
            start = short_stream.advance(short, batch, gap.place)
            targets = full_stream.advance(full, batch, gap.next_layer)
            with record_calls(projection.module) as calls, ExitStack() as recording:
                if projection.norm is not None:
                    norm_calls = recording.enter_context(record_calls(projection.norm.module))
                outputs = run_layers(short, batch, [gap.place], start)
            inputs = batch.select(calls[0][0])
            states = batch.select(outputs)
            if projection.norm is not None:
                assert projection.factor is not None
                states = states - projection.factor * batch.select(norm_calls[0][1])
            elif projection.factor is None:
                inputs = inputs * _measure_factors(short, batch, projection, start, states)
            else:
                inputs = inputs * projection.factor
            # The layer after the gap may be on another device.
            targets = batch.select(targets.to(outputs.device))
            if not keeps_states:
                streams[batch] = (_Stream(), _Stream())
            num_read += len(inputs)
            if on_progress is not None:
                on_progress(min(num_read, len(gaps) * num_tokens), len(gaps) * num_tokens)
            return NormedTokens(inputs, states, targets, batch.is_first)

        for gap, projection in zip(gaps, projections, strict=True):
            solve = _solve_linear if projection.norm is None else _solve_normed
            try:
                solution = solve(
                    projection, partial(read, gap, projection), fit_batches, choose_batches
                )
            except LinAlgError as error:
                raise ModelError(
                    f"{projection.name} can't be refitted, since the states of the texts aren't "
                    f"finite; load the model with --dtype float32"
                ) from error
            for module, change in solution.changes.items():
                if isinstance(module, Conv1D):
                    change = change.T
                old: Any = module.weight
                new = old.detach().to(change.device).double() + change
                # The next gaps are solved with the rounded weights, as they will be used.
                rounded = new.to(old.device, dtypes[old]).contiguous()
                put_weight(module, rounded.to(old.dtype))
                stack.callback(put_weight, module, rounded)
            results.append(RefittedGap(gap, projection.name, solution.ridge, solution.unexplained))
    return results


class _Solution(NamedTuple):
    """The changes of weights by module, λ, and the share of the error that is left."""

    changes: dict[nn.Module, Tensor]
    ridge: float
    unexplained: float


ReadTokens: TypeAlias = Callable[[TextBatch], NormedTokens]


def _solve_linear(
    projection: DownProjection,
    read: ReadTokens,
    fit_batches: Sequence[TextBatch],
    choose_batches: Sequence[TextBatch],
) -> _Solution:
    """Solve a gap where the projection's output is added to the state."""
    num_inputs, num_outputs = get_size(projection)
    device = choose_device(projection)
    fit = WeightedSums(num_inputs, num_outputs, device)
    held_out = WeightedSums(num_inputs, num_outputs, device)
    for sums, batches in ((fit, fit_batches), (held_out, choose_batches)):
        for batch in batches:
            tokens = read(batch)
            residuals = tokens.targets - tokens.states
            sums.add(tokens.inputs, residuals, tokens.targets, tokens.is_first)
    inner, cross, _ = fit.with_first_tokens()
    solver = fit.make_solver(inner)
    errors = {}
    for ridge in RIDGES:
        errors[ridge] = held_out.error(solver.solve(cross, solver.factor(ridge)))
    best = min(errors, key=errors.__getitem__)
    unexplained = share_of_error(errors[best], held_out.plain_error)
    # With the best λ, the change is solved once more from all texts.
    fit.merge(held_out)
    inner, cross, _ = fit.with_first_tokens()
    solver = fit.make_solver(inner)
    change = solver.solve(cross, solver.factor(best)).T  # [D, F]
    return _Solution({projection.module: change}, best, unexplained)


def _solve_normed(
    projection: DownProjection,
    read: ReadTokens,
    fit_batches: Sequence[TextBatch],
    choose_batches: Sequence[TextBatch],
) -> _Solution:
    """Solve a gap where a norm follows the MLP."""
    norm = projection.norm
    factor = projection.factor
    assert norm is not None
    assert factor is not None  # with a norm it is the same for all tokens
    device = choose_device(projection)
    gain = norm.gain.to(device)
    weight = projection.weight.detach().to(device).double()
    start = NormedMap(weight, factor * gain, norm.epsilon)

    def read_on_device(batches: Sequence[TextBatch]) -> Iterator[NormedTokens]:
        for batch in batches:
            yield NormedTokens(*(values.to(device) for values in read(batch)))

    parts = zip(*read_on_device(choose_batches), strict=True)
    held_out = NormedTokens(*(torch.cat(values) for values in parts))
    solved, ridge = solve_normed(start, lambda: read_on_device(fit_batches), held_out)
    unexplained = share_of_error(solved.error(held_out), start.error(held_out))
    changes = {
        projection.module: solved.weight - weight,
        # The weight of a norm is its gain, or the gain less 1.
        norm.module: solved.gain / factor - gain,
    }
    return _Solution(changes, ridge, unexplained)


def _shares_layers(model: Any, teacher: Any, end: int) -> bool:
    """Tell whether the layers up to one of a model are the full model's own, not trained."""
    for layer, full_layer in zip(
        find_layers(model)[1][:end], find_layers(teacher)[1], strict=False
    ):
        pairs = zip(layer.parameters(), full_layer.parameters(), strict=True)
        if any(own.data_ptr() != full.data_ptr() for own, full in pairs):
            return False
    return True


@torch.no_grad()
def _measure_factors(
    routed: RoutedModel,
    batch: TextBatch,
    projection: DownProjection,
    start: Tensor,
    states: Tensor,
) -> Tensor:
    """Return the factor on a projection's output at each real token, `[n, 1]`.

    The layer runs again with a number added to the projection's output. The number is as large as
    the layer's output, so that the difference of the two runs is exact.
    """
    states = states.float()
    size = float(states.square().mean(dim=1).sqrt().median())
    hook = projection.module.register_forward_hook(lambda _module, _args, output: output + size)
    with temporary_hooks([hook]):
        moved = batch.select(run_layers(routed, batch, [projection.layer], start)).float()
    return ((moved - states).sum(dim=1) / (size * states.shape[1]))[:, None]


@REPAIRS.register("refit")
class Refit(Repair):
    """Solves the last linear map before each gap anew, in closed form."""

    def check(self, model: Any, teacher: Any) -> None:
        """Raise an error if a gap can't be refitted."""
        find_projections(model, find_gaps(model, teacher))

    def fit(
        self, model: Any, teacher: Any, lessons: Lessons, work: Path, listener: Listener
    ) -> dict[str, Any]:
        """Solve the gaps on the questions with their right answers and the texts.

        It is kept by the loss of whole texts: a refit brings back what the full model writes, which
        may be less like the right answers than what the shortened model writes.
        """
        texts = lessons.choose_texts(self.config.refit_tokens, self.config.seed)
        checked = lessons.sample_checked_texts(self.config.seed)
        with listener.busy("measuring the loss on the check part"):
            before = measure_text_loss(model, checked)
        with listener.progress("refit", "tokens") as on_progress:
            gaps = solve_gaps(model, teacher, texts, on_progress)
        with listener.busy("measuring the loss on the check part"):
            after = measure_text_loss(model, checked)
        return {
            "before": before,
            "after": after,
            "tokens": sum(map(len, texts)),
            "gaps": [
                {
                    "layers": [each.gap.layer + 1, each.gap.next_layer - 1],
                    "map": each.name,
                    "ridge": each.ridge,
                    "unexplained": each.unexplained,
                }
                for each in gaps
            ],
        }


def refit(
    model: Any,
    texts: Sequence[str],
    *,
    teacher: Any,
    tokens: int = 50_000,
    tokenizer: Any = None,
    seed: int = 0,
    listener: Listener | None = None,
) -> list[RefittedGap]:
    """Give a shortened model new weights before its gaps, solved in closed form.

    Args:
        model: What `shorten` returned. Its new weights are new tensors.
        texts: Texts, mixed as the model will be used.
        teacher: The full model, its name, or what `load` returns. It isn't changed.
        tokens: Maximum tokens that are read.
        tokenizer: The tokenizer; None takes that of the full model.
        seed: Seed of the choice of texts.
        listener: Receives the progress.

    Raises:
        PathError: The first layer is left out.
        ArchitectureError: A layer before a gap has no down-projection that can be solved.
        RoutingError: A weight is quantised or offloaded.
        ModelError: There isn't enough memory, or the states aren't finite.
        TaskError: There are fewer than two texts.

    Source: ours.
    """
    listener = listener or Listener()
    with unrouted(teacher, tokenizer, listener) as base:
        encoded = [tuple(encode(base.tokenizer, text)) for text in texts]
        items = [make_text_item(text) for text in cut_texts(encoded, MAX_TOKENS)]
        lessons = Lessons(fit={"texts": items}, check={})
        with listener.progress("refit", "tokens") as on_progress:
            chosen = lessons.choose_texts(tokens, seed)
            return solve_gaps(model, base.model, chosen, on_progress)
