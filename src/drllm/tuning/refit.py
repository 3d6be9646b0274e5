"""Repair a path in closed form: solve the down-projection before each gap anew.

A path leaves out layers. In each *gap*, the last layer before it gets a new down-projection in its
MLP, so that the state after the gap is as near as possible to the state of the full path. The gaps
are solved in order, each on the path as repaired so far. Nothing is trained, and nothing is added
to the model: the repaired path has as many weights as the plain one. `ridge` has the formula.

Source: ours, from ReplaceMe (arXiv 2505.02819), which solves a map of the MLP's output; the inner
activations of the MLP have more inputs to explain the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from transformers.pytorch_utils import Conv1D

from drllm.errors import ModelError, PathError, TaskError
from drllm.model.down_projections import (
    DownProjection,
    PostNorm,
    find_down_projections,
)
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import Driver
from drllm.models.routing.refits import check_module, move_weight
from drllm.paths import Gap, StaticPath
from drllm.records.codec import hash_values
from drllm.tuning.heal_texts import MIN_TEXTS, Tokens, group_by_text, identify_text
from drllm.tuning.layer_states import (
    GapTokens,
    LayerRunner,
    StatesBatch,
    Stream,
    make_batches,
)
from drllm.tuning.normed_gap import (
    MAX_STEPS,
    READS_PER_STEP,
    NormedMap,
    NormedTokens,
    solve_normed_change,
)
from drllm.tuning.normed_gap import RIDGES as NORMED_RIDGES
from drllm.tuning.refit_memory import (
    HELD_OUT,
    choose_sums_device,
    count_bytes_beside,
    count_largest_gap,
    find_memory_obstacle,
    high_precision,
    keeps_states,
    read_size,
)
from drllm.tuning.refit_work import GapWork, RefitProgress, count_layers
from drllm.tuning.ridge import TokenSums, solve_change
from drllm.work.listener import OnProgress


@dataclass(frozen=True, slots=True)
class RefittedGap:
    """How a gap was solved.

    Attributes:
        gap: The gap.
        name: The name of the down-projection, such as `11.mlp.down_proj`.
        weights: The new weights by the name of their module, in the dtype and the orientation of
            the old ones: that of the down-projection, and of the norm behind it if there is one.
        ridge: λ.
        unexplained: The squared error on held-out texts, as a share of that of the plain gap.
    """

    gap: Gap
    name: str
    weights: Mapping[str, Tensor]
    ridge: float
    unexplained: float

    @property
    def weight(self) -> Tensor:
        """The new weight of the down-projection."""
        return self.weights[self.name]

    @property
    def norm(self) -> str:
        """The name of the norm that has a new weight; empty if there is none."""
        names = [name for name in self.weights if name != self.name]
        return names[0] if names else ""


def refit(
    routed: RoutedModel,
    path: StaticPath,
    texts: Sequence[Tokens],
    *,
    first_token_weight: float | None = None,
    earlier: Sequence[RefittedGap] = (),
    on_gap: Callable[[RefittedGap], None] | None = None,
    on_progress: OnProgress | None = None,
) -> list[RefittedGap]:
    """Solve the down-projection before each gap of a path.

    Args:
        routed: The model.
        path: The path; it runs its layers in order, once each, from the first layer on.
        texts: Texts as tokens, mixed as the path will be used; 50 thousand tokens or more. Every
            tenth text, by its hash, chooses λ.
        first_token_weight: As in `TokenSums.with_first_tokens`.
        earlier: The first gaps of the path, if an interrupted run has solved them on these texts.
            They aren't solved again.
        on_gap: Receives each gap as soon as it is solved.
        on_progress: Receives the progress after each batch of texts and each solution.

    Returns:
        The gaps with their new weights, in order. The model isn't changed.

    Raises:
        PathError: The path repeats layers, goes back, or leaves out the first layer.
        ArchitectureError: A down-projection isn't found, or more happens to its output than a norm
            or a factor before it is added to the state.
        RoutingError: A weight is quantised or offloaded.
        ModelError: There isn't enough memory, or the states aren't finite.
        TaskError: There are fewer than two texts.

    Source: ours.
    """
    gaps = check_path(path, routed.num_layers)
    if len(texts) < MIN_TEXTS:
        raise TaskError(
            f"a refit needs at least {MIN_TEXTS} texts, one of them to choose λ on, and there are "
            f"{len(texts)}; give more texts"
        )
    projections = find_projections(routed, gaps)
    remaining = gaps[len(earlier) :]
    obstacle = find_memory_obstacle(
        routed, [projections[gap.layer] for gap in remaining], sum(map(len, texts))
    )
    if obstacle:
        raise ModelError(f"{obstacle}; free some memory, or leave the refit out (--repair none)")
    run = _RefitRun(routed, path, projections, texts)
    run.use_earlier(earlier)
    run.track(remaining, on_progress)
    results = list(earlier)
    with run.precision():
        for gap in remaining:
            results.append(run.solve(gap, first_token_weight))
            if on_gap is not None:
                on_gap(results[-1])
    return results


def join_weights(gaps: Iterable[RefittedGap]) -> dict[str, Tensor]:
    """Return the new weights of all gaps, by the name of their module."""
    weights: dict[str, Tensor] = {}
    for gap in gaps:
        weights.update(gap.weights)
    return weights


def check_path(path: StaticPath, num_layers: int) -> list[Gap]:
    """Return the gaps of a path; raise PathError if the path can't be refitted."""
    gaps = path.gaps(num_layers)
    first = path.layers[0]
    if first != 0:
        raise PathError(
            f"the path begins with layer {first}, and no layer before it can be refitted"
        )
    if not gaps:
        raise PathError("the path leaves out no layer, so it has no gap to refit")
    return gaps


def find_projections(routed: RoutedModel, gaps: Sequence[Gap]) -> dict[int, DownProjection]:
    """Return the down-projection before each gap, by layer, ready to run with new weights."""
    layers = [gap.layer for gap in gaps]
    with routed.injection.driven_by(Driver()):
        projections = find_down_projections(routed.model, layers)
    modules: dict[str, nn.Module] = {}
    for projection in projections.values():
        modules |= list_modules(projection)
    for name, module in modules.items():
        check_module(name, module)
    routed.injection.refits.override(modules)
    return projections


def list_modules(projection: DownProjection) -> dict[str, nn.Module]:
    """Return the modules that get a new weight in a gap: the down-projection and its norm."""
    modules = {projection.name: projection.module}
    if projection.norm is not None:
        modules[projection.norm.name] = projection.norm.module
    return modules


@dataclass
class _CalibrationBatch:
    """A batch of texts with its states along both paths."""

    batch: StatesBatch
    full: Stream
    repaired: Stream
    is_held_out: bool

    def reset(self) -> None:
        """Drop the states; the next gap computes them again from the embeddings."""
        for stream in (self.full, self.repaired):
            stream.state = None
            stream.num_run = 0


class _RefitRun:
    """The gaps of one path, solved one after the other.

    Args:
        routed: The model.
        path: The path.
        projections: The down-projections before its gaps, by layer.
        texts: The texts, as tokens.
    """

    def __init__(
        self,
        routed: RoutedModel,
        path: StaticPath,
        projections: dict[int, DownProjection],
        texts: Sequence[Tokens],
    ) -> None:
        self.routed = routed
        self.projections = projections
        # `precision` changes the dtypes of the weights for a while.
        self.dtypes: dict[str, torch.dtype] = {}
        for projection in projections.values():
            for name, module in list_modules(projection).items():
                self.dtypes[name] = get_weight(module).dtype
        self.runner = LayerRunner(routed)
        self.path = path
        self.new_weights: dict[str, Tensor] = {}  # of the gaps that are solved
        self.num_solved = 0  # gaps
        self.num_tokens = sum(map(len, texts))
        sum_bytes = count_largest_gap(projections.values(), self.num_tokens)
        self.device = choose_sums_device(routed, sum_bytes)
        self.bytes_beside = count_bytes_beside(routed, self.device, sum_bytes)
        self.keeps_states = keeps_states(routed, self.num_tokens, self.bytes_beside)
        self.progress: RefitProgress | None = None
        self.batches: list[_CalibrationBatch] = []
        fit, held_out = split_for_ridge(texts)
        for part, is_held_out in ((fit, False), (held_out, True)):
            for batch in make_batches(part, routed.device):
                full = Stream(range(routed.num_layers))
                repaired = Stream(path.layers, self.new_weights)
                self.batches.append(_CalibrationBatch(batch, full, repaired, is_held_out))

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Compute in float32 inside the block if the memory allows it; see `high_precision`."""
        with high_precision(self.routed, self.bytes_beside):
            for name, weight in self.new_weights.items():  # of gaps that were solved earlier
                module: Any = self.routed.injection.refittable_modules[name]
                self.new_weights[name] = move_weight(weight, module.weight)
            yield

    def use_earlier(self, earlier: Sequence[RefittedGap]) -> None:
        """Use the new weights of gaps that are solved already."""
        for refitted in earlier:
            self.new_weights.update(refitted.weights)
            self.num_solved += 1

    def track(self, gaps: Sequence[Gap], on_progress: OnProgress | None) -> None:
        """Report the progress on the gaps that are left."""
        if on_progress is None:
            return
        num_layers = self.routed.num_layers
        layers = self.routed.injection.layers
        layer_size = sum(weight.numel() for weight in layers.parameters()) / num_layers
        counts = count_layers(
            self.path.gaps(num_layers),
            self.path.layers,
            self.num_solved,
            keeps_states=self.keeps_states,
        )
        works = []
        for gap, num_layers_run in zip(gaps, counts, strict=True):
            works.append(self._count_work(gap, num_layers_run, layer_size))
        self.progress = RefitProgress(works, gaps, on_progress)

    def _count_work(self, gap: Gap, num_layers_run: int, layer_size: float) -> GapWork:
        """Return the work of a gap; the numbers are as in `GapWork`."""
        projection = self.projections[gap.layer]
        size = read_size(projection.module)
        work = GapWork(num_layers_run, layer_size, size, self.num_tokens)
        if projection.norm is None:
            return work
        return replace(
            work,
            num_reads=READS_PER_STEP * MAX_STEPS,
            num_layers_again=1 if self.keeps_states else num_layers_run,
            num_solutions=MAX_STEPS * len(NORMED_RIDGES),
        )

    @property
    def on_solved(self) -> Callable[[], None] | None:
        """What is called after each solution of a gap's equations."""
        return None if self.progress is None else self.progress.add_solution

    def solve(self, gap: Gap, first_token_weight: float | None) -> RefittedGap:
        """Solve one gap, and use its new weights from here on."""
        projection = self.projections[gap.layer]
        try:
            if projection.norm is None:
                refitted = self.solve_linear(gap, first_token_weight)
            else:
                refitted = self.solve_normed(gap, projection.norm, first_token_weight)
        except LinAlgError as error:
            raise ModelError(
                f"{projection.name} can't be refitted, since the states of the texts aren't "
                f"finite; load the model with --dtype float32"
            ) from error
        if self.progress is not None:
            self.progress.end_gap()
        # The next gaps are solved on the path with the rounded weights, as they will be used.
        rounded = {}
        for name, weight in refitted.weights.items():
            rounded[name] = weight.to(self.dtypes[name])
            self.new_weights[name] = rounded[name].to(weight.dtype)
        self.num_solved += 1
        return replace(refitted, weights=rounded)

    def solve_linear(self, gap: Gap, first_token_weight: float | None) -> RefittedGap:
        """Solve a gap where the projection's output is added to the state."""
        projection = self.projections[gap.layer]
        fit, held_out = self.sum_tokens(gap)
        solution = solve_change(
            fit, held_out, first_token_weight=first_token_weight, on_solved=self.on_solved
        )
        weights = {projection.name: change_weight(projection, solution.change)}
        return RefittedGap(gap, projection.name, weights, solution.ridge, solution.unexplained)

    def solve_normed(
        self, gap: Gap, norm: PostNorm, first_token_weight: float | None
    ) -> RefittedGap:
        """Solve a gap where a norm follows the MLP."""
        projection = self.projections[gap.layer]
        device = self.device
        weight = projection.weight.detach().to(device).double()
        factor = projection.factor
        assert factor is not None  # with a norm it is the same for all tokens
        start = NormedMap(weight, factor * norm.gain.to(device), norm.epsilon)
        held_out = self.read_held_out(gap)

        def read_fit() -> Iterator[NormedTokens]:
            for batch in self.batches:
                if not batch.is_held_out:
                    yield self.read_normed(batch, gap)

        solution = solve_normed_change(
            start,
            read_fit,
            held_out,
            first_token_weight=first_token_weight,
            on_solved=self.on_solved,
        )
        gain = solution.map.gain / factor - norm.gain.to(device)
        weights = {
            projection.name: change_weight(projection, solution.map.weight - weight),
            # The weight of a norm is its gain, or the gain less 1.
            norm.name: add_change(get_weight(norm.module), gain),
        }
        return RefittedGap(gap, projection.name, weights, solution.ridge, solution.unexplained)

    def sum_tokens(self, gap: Gap) -> tuple[TokenSums, TokenSums]:
        """Return the sums over the tokens of the texts to fit and of those that choose λ."""
        size = read_size(self.projections[gap.layer].module)
        device = self.device
        fit = TokenSums(size.num_inputs, size.num_outputs, device)
        held_out = TokenSums(size.num_inputs, size.num_outputs, device)
        for batch in self.batches:
            tokens = self.read_tokens(batch, gap)
            sums = held_out if batch.is_held_out else fit
            sums.add(
                tokens.inputs.to(device),
                tokens.residuals.to(device),
                tokens.targets.to(device),
                tokens.is_first.to(device),
            )
            self.finish_batch(batch, len(tokens.inputs))
        return fit, held_out

    def finish_batch(self, batch: _CalibrationBatch, num_tokens: int) -> None:
        """Drop the states of a batch if memory has no room for them, and report its tokens."""
        if not self.keeps_states:
            batch.reset()
        if self.progress is not None:
            self.progress.add_tokens(num_tokens)

    def read_tokens(self, batch: _CalibrationBatch, gap: Gap) -> GapTokens:
        """Advance both paths of a batch to a gap, and return what the gap's regression needs."""
        start, targets = self.advance(batch, gap)
        return self.runner.read_gap(batch.batch, self.projections[gap.layer], start, targets)

    def read_normed(self, batch: _CalibrationBatch, gap: Gap) -> NormedTokens:
        """Do the same for a gap where a norm follows the MLP, and finish the batch."""
        start, targets = self.advance(batch, gap)
        projection = self.projections[gap.layer]
        tokens = self.runner.read_normed_gap(batch.batch, projection, start, targets)
        self.finish_batch(batch, len(tokens.inputs))
        return NormedTokens(*(values.to(self.device) for values in tokens))

    def read_held_out(self, gap: Gap) -> NormedTokens:
        """Return the tokens that choose λ in a gap where a norm follows the MLP."""
        parts = [self.read_normed(batch, gap) for batch in self.batches if batch.is_held_out]
        return join_tokens(parts)

    def advance(self, batch: _CalibrationBatch, gap: Gap) -> tuple[Tensor, Tensor]:
        """Advance both paths of a batch to a gap.

        Returns the state that enters the layer before the gap on the repaired path, and the state
        that enters the layer after the gap on the full path, both `[B, T, D]`.
        """
        runner = self.runner
        full = batch.full
        repaired = batch.repaired
        if self.num_solved == 0 and repaired.state is None:
            # Up to the first gap both paths are the same.
            runner.advance(batch.batch, full, gap.layer)
            repaired.state = full.state
            repaired.num_run = full.num_run
        runner.advance(batch.batch, repaired, gap.layer)
        runner.advance(batch.batch, full, gap.next_layer)
        assert repaired.state is not None
        assert full.state is not None
        return repaired.state, full.state


def split_for_ridge(texts: Sequence[Tokens]) -> tuple[list[Tokens], list[Tokens]]:
    """Return the texts to fit, and those to choose λ on: a tenth, by their hash, at least one.

    The parts of a text that was cut stay together, unless there is only one text. A text with more
    parts than the tenth still has room for goes to the fit. If every text has more parts than
    that, one with the fewest is held out.

    The prefix gives another hash than in `split_texts`, which has taken the texts of the lowest
    hashes out of each source. With that hash, a small source would have no text to choose λ on.
    """
    groups = group_by_text(texts)
    if len(groups) == 1:
        groups = [[tuple(text)] for text in texts]  # each is a text of its own
    groups.sort(key=lambda group: hash_values(["ridge", identify_text(group[0])]))
    num_left = max(len(texts) // HELD_OUT, min(map(len, groups)))
    fit: list[Tokens] = []
    held_out: list[Tokens] = []
    for group in groups:
        if len(group) <= num_left:
            held_out += group
            num_left -= len(group)
        else:
            fit += group
    return fit, held_out


def change_weight(projection: DownProjection, change: Tensor) -> Tensor:
    """Return W + ΔW in the weight's present dtype and its orientation; ΔW is `[D, F]`."""
    if isinstance(projection.module, Conv1D):
        change = change.T
    return add_change(projection.weight, change)


def add_change(weight: Tensor, change: Tensor) -> Tensor:
    """Return a changed weight in the weight's dtype and on its device.

    The sum is in float64, on the change's device.
    """
    weight = weight.detach()
    changed = weight.to(change.device).double() + change
    return changed.to(weight.dtype).to(weight.device).contiguous()


def get_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear map or a norm."""
    assert isinstance(module.weight, Tensor)
    return module.weight


def join_tokens(parts: Sequence[NormedTokens]) -> NormedTokens:
    """Join the tokens of several batches."""
    return NormedTokens(*(torch.cat(values) for values in zip(*parts, strict=True)))
