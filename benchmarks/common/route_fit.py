"""A bypass fitted along random routes: it also corrects what maps of earlier gaps did."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.injection import Driver, LayerCall
from drllm.paths import Decisions
from drllm.prune.bypass import LayerSums, join_maps, solve_layer
from drllm.prune.repairs.refit import split_for_ridge
from drllm.prune.states import TextBatch, in_float32, make_batches
from drllm.tasks.texts import Tokens

ROUTES_PER_BATCH = 2
MOST_SKIPS = 5


def draw_route(draw: random.Random, num_layers: int, num_skips: int) -> Decisions:
    """Draw a route that skips some layers, never the first one."""
    skipped = set(draw.sample(range(1, num_layers), num_skips))
    return tuple(0 if layer in skipped else 1 for layer in range(num_layers))


class _FullPath(Driver):
    """Runs all layers, keeps what each returns, and adds it to the sums."""

    def __init__(self, batch: TextBatch, sums: Sequence[LayerSums]) -> None:
        self.batch = batch
        self.sums = sums
        self.outputs: list[Tensor] = []  # of real tokens, [L][n, D]

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layer once."""
        states = self.batch.select(hidden)
        hidden = call.run(hidden)
        self.outputs.append(self.batch.select(hidden))
        changes = self.outputs[-1] - states
        self.sums[call.index].add(states, changes, self.batch.is_first)
        return hidden


class _AlongRoute(Driver):
    """Runs a route with a bypass, and sums up at each layer what would lead back to the full path.

    Before the first skip the states are the full path's, which are in the sums already.
    """

    def __init__(
        self, full: _FullPath, route: Decisions, bypass: Bypass, sums: Sequence[LayerSums]
    ) -> None:
        self.full = full
        self.route = route
        self.bypass = bypass
        self.sums = sums
        self.first_skip = route.index(0)

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run or skip the layer."""
        batch = self.full.batch
        if call.index > self.first_skip:
            states = batch.select(hidden)
            changes = self.full.outputs[call.index] - states
            self.sums[call.index].add(states, changes, batch.is_first)
        if self.route[call.index] == 1:
            return call.run(hidden)
        is_first = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        is_first[:, 0] = True  # the padding is on the right
        return self.bypass.skip(call.index, hidden, is_first)


def fit_on_routes(
    base: BaseModel, texts: Sequence[Tokens], start: Bypass, rank: int, seed: int
) -> Bypass:
    """Fit a bypass on states of the full path and of random routes that run with another bypass.

    The target is always the full path's next state.

    Args:
        base: The model.
        texts: The texts.
        start: The bypass along the routes.
        rank: The rank of the maps.
        seed: Seed of the routes.
    """
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    draw = random.Random(seed)
    try:
        sums_by_part = []
        with torch.no_grad(), in_float32(routed.model):
            for part in split_for_ridge(texts):
                sums = [LayerSums(start.hidden_size) for _ in range(routed.num_layers)]
                _run_routes(routed, part, start, sums, draw)
                sums_by_part.append(sums)
    finally:
        routed.detach()
    maps = []
    for fit, held_out in zip(*sums_by_part, strict=True):
        layer_map, _ = solve_layer(fit, held_out, rank)
        maps.append(layer_map)
    return join_maps(maps, {})


def _run_routes(
    routed: RoutedModel,
    texts: Sequence[Tokens],
    start: Bypass,
    sums: Sequence[LayerSums],
    draw: random.Random,
) -> None:
    """Run the full path and random routes on texts, batch by batch, and add to the sums."""
    for batch in make_batches(texts, routed.device):
        full = _FullPath(batch, sums)
        drivers: list[Driver] = [full]
        for _ in range(ROUTES_PER_BATCH):
            route = draw_route(draw, routed.num_layers, draw.randint(2, MOST_SKIPS))
            drivers.append(_AlongRoute(full, route, start, sums))
        for driver in drivers:
            with routed.injection.driven_by(driver):
                routed.injection.decoder(input_ids=batch.ids, use_cache=False)
