"""Solve a bypass: for each layer a linear map that stands in for it, in closed form.

The map of layer l is a ridge regression with an intercept, fitted on the full path's own states:
from n(h_l), where h_l enters the layer, to h_{l+1} − h_l, what the layer adds. λ is chosen on
held-out texts. The map is then cut to a rank by the principal axes of the fitted values. First
tokens are apart: there the mean of what the layer adds is used.

One pass over the texts sums up what the regressions need, for as many layers as fit into memory.

Axes: n tokens, L layers, D hidden, r rank.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drllm.errors import ModelError, TaskError
from drllm.model.batching import free_bytes
from drllm.model.devices import on_device
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.bypass import TENSORS, Bypass, LayerMap, normalise
from drllm.models.routing.injection import Driver, LayerCall
from drllm.tuning.heal_texts import MIN_TEXTS, Tokens
from drllm.tuning.layer_states import StatesBatch, make_batches
from drllm.tuning.refit import split_for_ridge
from drllm.tuning.refit_memory import high_precision
from drllm.tuning.ridge import share_of_error
from drllm.tuning.stand_in import RIDGES, SMALLEST_DEVIATION
from drllm.work.listener import OnProgress

SHARE_OF_MEMORY = 0.25  # of the free memory of the host that the sums may take
MATRICES_PER_LAYER = 4  # [D, D] in float64: inner and cross, of both parts of the texts


class LayerSums:
    """The sums over tokens from which the map of one layer is solved, in float64 on the host.

    Attributes:
        inner: Σ x xᵀ, `[D, D]`, with x = n(h).
        cross: Σ x dᵀ, `[D, D]`, with d what the layer adds.
        inputs: Σ x, `[D]`.
        changes: Σ d, `[D]`.
        squares: Σ ‖d‖².
        num_tokens: How many tokens these are; first tokens aren't among them.
        first: Σ d over first tokens, `[D]`.
        num_first: How many first tokens there are.
    """

    def __init__(self, hidden_size: int) -> None:
        size = (hidden_size, hidden_size)
        self.inner = torch.zeros(size, dtype=torch.float64)
        self.cross = torch.zeros(size, dtype=torch.float64)
        self.inputs = torch.zeros(hidden_size, dtype=torch.float64)
        self.changes = torch.zeros(hidden_size, dtype=torch.float64)
        self.squares = 0.0
        self.num_tokens = 0
        self.first = torch.zeros(hidden_size, dtype=torch.float64)
        self.num_first = 0

    def add(self, states: Tensor, changes: Tensor, is_first: Tensor) -> None:
        """Add tokens: their states and what the layer adds `[n, D]`, and which are first `[n]`."""
        changes = changes.to("cpu", torch.float64)
        inputs = normalise(states.to("cpu", torch.float64))
        is_first = is_first.cpu()
        self.first += changes[is_first].sum(dim=0)
        self.num_first += int(is_first.sum())
        inputs = inputs[~is_first]
        changes = changes[~is_first]
        self.inner += inputs.T @ inputs
        self.cross += inputs.T @ changes
        self.inputs += inputs.sum(dim=0)
        self.changes += changes.sum(dim=0)
        self.squares += float(changes.square().sum())
        self.num_tokens += len(inputs)

    def merge(self, other: LayerSums) -> None:
        """Add the tokens of other sums."""
        self.inner += other.inner
        self.cross += other.cross
        self.inputs += other.inputs
        self.changes += other.changes
        self.first += other.first
        self.squares += other.squares
        self.num_tokens += other.num_tokens
        self.num_first += other.num_first

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        sums = (self.inner, self.cross, self.first)
        return all(bool(values.isfinite().all()) for values in sums)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return Σ ‖d − W x − b‖² over the tokens, with W `[D, D]` and b `[D]`."""
        cross_term = 2 * float((weight.T * self.cross).sum() + bias @ self.changes)
        square = float(((weight @ self.inner) * weight).sum())  # of the predictions
        square += float(2 * bias @ (weight @ self.inputs) + self.num_tokens * bias @ bias)
        return self.squares - cross_term + square


class LayerSolution(NamedTuple):
    """The map of one layer as it is solved.

    Attributes:
        layer_map: The map, in float64.
        unexplained: The squared error on held-out texts as a share of that of doing nothing.
    """

    layer_map: LayerMap
    unexplained: float


class _CenteredSums:
    """Sums about the means, with inputs of variance 1.

    An input that is the same in every token counts as 0. Its covariances are rounding errors.
    """

    def __init__(self, sums: LayerSums) -> None:
        n = sums.num_tokens
        self.input_mean = sums.inputs / n
        self.change_mean = sums.changes / n
        squares = sums.inner / n
        covariance = squares - torch.outer(self.input_mean, self.input_mean)
        cross = sums.cross / n - torch.outer(self.input_mean, self.change_mean)
        variance = covariance.diagonal()
        smallest = SMALLEST_DEVIATION**2 * squares.diagonal().clamp_min(1.0)
        is_constant = variance <= smallest
        self.deviation = torch.where(is_constant, 1.0, variance).sqrt()
        covariance[is_constant] = 0.0
        covariance[:, is_constant] = 0.0
        cross[is_constant] = 0.0
        self.inner = covariance / torch.outer(self.deviation, self.deviation)  # [D, D]
        self.cross = cross / self.deviation[:, None]  # [D, D]

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return W `[D, D]` and b `[D]` for one λ."""
        matrix = self.inner.clone()
        matrix.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(matrix)
        solution = torch.cholesky_solve(self.cross, factor)  # [D, D], input by output
        weight = (solution / self.deviation[:, None]).T
        return weight, self.change_mean - weight @ self.input_mean

    def solve_with_rank(self, ridge: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return P `[r, D]`, Q `[D, r]` and b `[D]` for one λ.

        Q P x are the values W x, projected on their first principal axes.
        """
        weight, _ = self.solve(ridge)
        scaled = weight * self.deviation
        covariance = scaled @ self.inner @ scaled.T  # of the values W x, [D, D]
        _, axes = torch.linalg.eigh(covariance)  # the largest last
        up = axes[:, -rank:]
        down = up.T @ weight
        return down, up, self.change_mean - up @ (down @ self.input_mean)


def solve_layer(fit: LayerSums, held_out: LayerSums, rank: int) -> LayerSolution:
    """Solve the map of a layer.

    λ is the one whose map of full rank has the lowest error on `held_out`. The map is then solved
    once more from all texts, and cut to the rank. `held_out` is added to `fit`.

    Args:
        fit: The sums of the texts to fit on.
        held_out: The sums of the texts that λ is chosen on.
        rank: The rank, at most D.
    """
    centered = _CenteredSums(fit)
    errors: dict[float, float] = {}
    for ridge in RIDGES:
        errors[ridge] = held_out.error(*centered.solve(ridge))
    best = min(errors, key=errors.__getitem__)
    down, up, bias = centered.solve_with_rank(best, rank)
    unexplained = share_of_error(held_out.error(up @ down, bias), held_out.squares)
    fit.merge(held_out)
    down, up, bias = _CenteredSums(fit).solve_with_rank(best, rank)
    first = fit.first / max(1, fit.num_first)
    return LayerSolution(LayerMap(down, up, bias, first), unexplained)


class _ChangeSummer(Driver):
    """Runs all layers, and adds what some of them change to their sums."""

    def __init__(self, batch: StatesBatch, sums: dict[int, LayerSums]) -> None:
        self.batch = batch
        self.sums = sums

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layer once."""
        output = call.run(hidden)
        if call.index in self.sums:
            states = self.batch.select(hidden)
            changes = self.batch.select(output).to(states.device) - states
            is_first = on_device(self.batch.is_first, states.device)
            self.sums[call.index].add(states, changes, is_first)
        return output


class BypassSolver:
    """Solves the maps of a model's layers, some layers at a time.

    Args:
        routed: The model; it has no bypass yet.
        texts: Texts as tokens, 50 thousand tokens or more. λ is chosen on a tenth of the texts,
            picked by their hash.
        rank: The rank of the maps, at most the hidden size.
        on_progress: Receives the progress after each batch of texts.
        layers: The layers to solve; None solves all.

    Attributes:
        groups: The layers that are solved together, since their sums fit into memory.

    Raises:
        TaskError: There are fewer than two texts.
    """

    def __init__(
        self,
        routed: RoutedModel,
        texts: Sequence[Tokens],
        rank: int,
        on_progress: OnProgress | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        if len(texts) < MIN_TEXTS:
            raise TaskError(
                f"a bypass needs at least {MIN_TEXTS} texts, one of them to choose λ on, and there "
                f"are {len(texts)}; give more texts"
            )
        self.routed = routed
        self.hidden_size = int(routed.config.get_text_config().hidden_size)
        self.rank = min(rank, self.hidden_size)
        if layers is None:
            layers = range(routed.num_layers)
        self.groups = group_layers(layers, self.hidden_size)
        fit_texts, held_out_texts = split_for_ridge(texts)
        self._batches = [(batch, False) for batch in make_batches(fit_texts, routed.device)]
        self._batches += [(batch, True) for batch in make_batches(held_out_texts, routed.device)]
        self._on_progress = on_progress
        self._num_done = 0

    def solve(self, group: Sequence[int]) -> list[LayerSolution]:
        """Solve the maps of some layers, with one pass over the texts.

        Raises:
            ModelError: The states aren't finite.
        """
        fit = {layer: LayerSums(self.hidden_size) for layer in group}
        held_out = {layer: LayerSums(self.hidden_size) for layer in group}
        with torch.no_grad(), high_precision(self.routed):
            for batch, is_held_out in self._batches:
                driver = _ChangeSummer(batch, held_out if is_held_out else fit)
                with self.routed.injection.driven_by(driver):
                    self.routed.injection.decoder(input_ids=batch.ids, use_cache=False)
                self._num_done += 1
                self._report()
        for layer in group:
            if not (fit[layer].is_finite and held_out[layer].is_finite):
                raise ModelError(
                    f"layer {layer} can't have a bypass, since the states of the texts aren't "
                    f"finite; load the model with --dtype float32"
                )
        return [solve_layer(fit[layer], held_out[layer], self.rank) for layer in group]

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._num_done, len(self.groups) * len(self._batches))


def join_solutions(solutions: Sequence[LayerSolution], model: Mapping[str, Any]) -> Bypass:
    """Return the bypass of the maps of all layers, in order.

    Args:
        solutions: The maps, `[L]`.
        model: The identity of the model.
    """
    tensors: dict[str, Any] = {}
    for name in TENSORS:
        by_layer = [getattr(solution.layer_map, name) for solution in solutions]
        tensors[name] = torch.stack(by_layer).float()
    return Bypass(**tensors, model=model)


def group_layers(layers: Sequence[int], hidden_size: int) -> list[Sequence[int]]:
    """Divide layers into groups whose sums fit into memory together."""
    layer_bytes = MATRICES_PER_LAYER * hidden_size**2 * torch.float64.itemsize
    room = SHARE_OF_MEMORY * free_bytes(torch.device("cpu"))
    size = max(1, int(room // layer_bytes))
    return [layers[start : start + size] for start in range(0, len(layers), size)]
