"""Choose layers to leave out: the cost of every gap, and the best sets of gaps.

A gap (i, k) leaves out the layers i to k−1: the state that enters layer i goes to layer k instead.
Its cost says what is lost if a linear map bridges it. With X_j, the state that enters layer j of
the full model, and n(h) = h / rms(h), the map W is the ridge regression of X_k − X_i on n(X_i),
both about their means. First tokens are apart: they get the mean difference.

- The *cheap* cost is the root of the mean of ‖X_k − bridged‖² / ‖X_k‖² over tokens that W wasn't
  fitted on.
- The *exact* cost is the KL from the full model, in nats a token, if the model goes on at layer k
  with the bridged state.

The cost of a set of gaps is taken to be the sum of their costs, and a kept layer stands between two
gaps; so dynamic programming finds the best sets for every number of layers. What a set really loses
is known after a refit.

Axes: n tokens, L layers, D hidden, V vocabulary.

Source: ours.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from drllm.errors import ConfigError, TaskError
from drllm.model.batching import free_bytes
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.bypass import normalise
from drllm.prune.least_squares import Ridge
from drllm.prune.states import LayersPass, Tokens, make_batches
from drllm.work.listener import OnProgress

Gap: TypeAlias = tuple[int, int]
"""The first layer that is left out, and the first one after it that isn't."""

NUM_TOKENS = 6_000  # tokens that the maps are fitted on, and the cheap costs measured
NUM_EXACT_TOKENS = 450  # tokens that the exact costs are measured on
MAX_TOKENS = 128  # of a text; longer ones are cut
HELD_OUT = 5  # one text in five isn't fitted on
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
LONGEST = (1 / 4, 1 / 3, 1 / 2)  # of a gap, as shares of the layers
SHARE_OF_MEMORY = 0.5  # of the free memory that the states may take


@dataclass
class GapCosts:
    """The costs of a model's gaps.

    Attributes:
        num_layers: L.
        cheap: Gap → its cheap cost.
        exact: Gap → its exact cost in nats a token, for the gaps that were measured.
    """

    num_layers: int
    cheap: dict[Gap, float]
    exact: dict[Gap, float] = field(default_factory=dict)

    def best(self, num_out: int) -> list[int]:
        """Return the layers to leave out: the set with the least sum of cheap costs.

        Args:
            num_out: How many layers to leave out.

        Raises:
            ConfigError: No set leaves out as many: the first and the last layer stay, and a kept
                layer stands between two gaps.
        """
        return list_layers(self.list_sets(num_out, 1)[0])

    def list_sets(self, num_out: int, number: int) -> list[tuple[Gap, ...]]:
        """Return sets of gaps that may lose least, the best by cheap costs first.

        The root makes one long gap look better than two short ones, which a refit often repairs
        better. So sets with gaps of up to a quarter of the layers come first, then those of up to a
        third and a half.

        Args:
            num_out: How many layers to leave out.
            number: How many sets of each of the three kinds to return at most.
        """
        sets: list[tuple[Gap, ...]] = []
        for share in LONGEST:
            longest = math.ceil(share * self.num_layers)
            short = {(i, k): cost for (i, k), cost in self.cheap.items() if k - i <= longest}
            sets += find_best_sets(short, self.num_layers, num_out, number)
        if not sets:
            raise ConfigError(
                f"{num_out} of {self.num_layers} layers can't be left out: the first and the last "
                f"layer stay, and a kept layer stands between two gaps; leave out fewer"
            )
        return list(dict.fromkeys(sets))


def find_best_sets(
    costs: Mapping[Gap, float], num_layers: int, num_out: int, number: int
) -> list[tuple[Gap, ...]]:
    """Return the sets of gaps with the least sums of costs, the best first.

    Args:
        costs: Gap → its cost; gaps without a cost aren't used.
        num_layers: L.
        num_out: How many layers the gaps of a set leave out together.
        number: How many sets to return at most.

    Example:
        >>> costs = {(1, 2): 1.0, (2, 3): 0.5, (1, 3): 1.2, (3, 4): 2.0}
        >>> find_best_sets(costs, 5, 2, 2)
        [((1, 3),), ((1, 2), (3, 4))]
    """
    # free[i][m] has the best sets that leave out m of the layers i … L−1, where layer i may be left
    # out; in kept[i][m] layer i stays. A set is (its cost, its gaps).
    Sets: TypeAlias = list[tuple[float, tuple[Gap, ...]]]
    nothing: Sets = [(0.0, ())]
    free: dict[int, list[Sets]] = {num_layers: [nothing] + [[] for _ in range(num_out)]}
    kept: dict[int, list[Sets]] = {}
    for i in range(num_layers - 1, 0, -1):
        kept[i] = free[i + 1]
        free[i] = []
        for m in range(num_out + 1):
            sets = list(kept[i][m])
            for k in range(i + 1, min(i + m, num_layers - 1) + 1):
                if (i, k) in costs:
                    for cost, gaps in kept[k][m - (k - i)]:
                        sets.append((cost + costs[i, k], ((i, k), *gaps)))
            free[i].append(heapq.nsmallest(number, sets))
    return [gaps for _, gaps in free[1][num_out]]


def list_layers(gaps: Iterable[Gap]) -> list[int]:
    """Return the layers that gaps leave out."""
    return [layer for first, end in gaps for layer in range(first, end)]


def list_ends(i: int, num_layers: int) -> range:
    """Return where a gap from layer i may end: up to half of the layers, and the last one stays."""
    longest = math.ceil(LONGEST[-1] * num_layers)
    return range(i + 1, min(i + longest, num_layers - 1) + 1)


class GapTable:
    """Measures the costs of a model's gaps, from one pass over texts.

    The states of all layers are kept in main memory, in the model's dtype: 0.4 GB for SmolLM2, and
    1.8 GB for 36 layers of 4,096 in bfloat16. Where half of the free memory holds fewer tokens,
    fewer are read.

    Args:
        routed: The full model.
        texts: Texts as tokens, of the kind that the model is for.

    Attributes:
        num_tokens: How many tokens were read.

    Raises:
        TaskError: There are fewer than ten texts of two tokens.
    """

    def __init__(self, routed: RoutedModel, texts: Sequence[Tokens]) -> None:
        self.routed = routed
        width = int(routed.config.get_text_config().hidden_size)
        bytes_a_token = (routed.num_layers + 1) * width * routed.dtype.itemsize
        room = int(SHARE_OF_MEMORY * free_bytes(torch.device("cpu")) / bytes_a_token)
        chosen: list[Tokens] = []
        self.num_tokens = 0
        for text in texts:
            if len(text) > 1 and self.num_tokens < min(NUM_TOKENS, room):
                chosen.append(text[:MAX_TOKENS])
                self.num_tokens += len(chosen[-1]) - 1
        if len(chosen) < 2 * HELD_OUT:
            raise TaskError(
                f"the costs of gaps need at least {2 * HELD_OUT} texts, and there are "
                f"{len(chosen)}; give more texts"
            )
        self.held_out = chosen[::HELD_OUT]
        to_fit = [text for place, text in enumerate(chosen) if place % HELD_OUT]
        self.states, self.first = self._read_states(to_fit)  # [L+1][n, D], [L+1][D]
        self.held_out_states, _ = self._read_states(self.held_out)

    @torch.no_grad()
    def _read_states(self, texts: Sequence[Tokens]) -> tuple[list[Tensor], list[Tensor]]:
        """Return what enters each layer and the final norm, and the mean of it at first tokens."""
        states: list[list[Tensor]] = [[] for _ in range(self.routed.num_layers + 1)]
        first: list[list[Tensor]] = [[] for _ in range(self.routed.num_layers + 1)]
        for batch in make_batches(texts, self.routed.device):
            embeddings = LayersPass(())
            full = LayersPass(range(self.routed.num_layers))
            for driver in (embeddings, full):
                with self.routed.injection.driven_by(driver):
                    self.routed.injection.decoder(input_ids=batch.ids, use_cache=False)
            for layer, output in enumerate([embeddings.states[0], *full.states]):
                tokens = batch.select(output).cpu()
                states[layer].append(tokens[~batch.is_first.cpu()])
                first[layer].append(tokens[batch.is_first.cpu()])
        means = [torch.cat(parts).float().mean(dim=0) for parts in first]
        return [torch.cat(parts) for parts in states], means

    def measure_cheap(self, on_progress: OnProgress) -> GapCosts:
        """Measure the cheap cost of each gap of up to half of the layers."""
        num_layers = self.routed.num_layers
        costs: dict[Gap, float] = {}
        for i in range(1, num_layers - 1):
            ends = list_ends(i, num_layers)
            for k, (_, _, cost) in zip(ends, self._bridge(i, ends), strict=True):
                costs[i, k] = cost
            on_progress(i, num_layers - 2)
        return GapCosts(num_layers, costs)

    def _bridge(self, i: int, ends: Iterable[int]) -> list[tuple[Tensor, Tensor, float]]:
        """Return the maps from the state that enters layer i to those that enter other layers.

        Returns:
            For each end: W `[D, D]` and b `[D]`, so that the bridged state is h + n(h) W + b; and
            the cheap cost.
        """
        device = self.routed.device
        states = self.states[i].to(device).float()  # [n, D]
        inputs = normalise(states)
        mean = inputs.mean(dim=0)
        inputs -= mean
        inner = (inputs.T @ inputs).double()
        scale = inner.diagonal().mean().div(len(inputs)).sqrt()
        solver = Ridge(inner, scale.expand(len(inner)), len(inputs))
        factors = [solver.factor(ridge) for ridge in RIDGES]
        held_out = self.held_out_states[i].to(device).float()
        held_out_inputs = normalise(held_out) - mean
        bridges = []
        for k in ends:
            changes = self.states[k].to(device).float() - states
            bias = changes.mean(dim=0)
            cross = (inputs.T @ (changes - bias)).double()
            targets = self.held_out_states[k].to(device).float()
            sizes = targets.square().sum(dim=1)
            best = None
            for factor in factors:
                weight = solver.solve(cross, factor).float()
                errors = targets - held_out - bias - held_out_inputs @ weight
                cost = float((errors.square().sum(dim=1) / sizes).mean().sqrt())
                if best is None or cost < best[2]:
                    best = (weight, bias - mean @ weight, cost)
            assert best is not None
            bridges.append(best)
        return bridges

    @torch.no_grad()
    def measure_exact(self, gaps: Iterable[Gap], on_progress: OnProgress) -> dict[Gap, float]:
        """Measure the exact cost of some gaps, in nats a token."""
        texts: list[Tokens] = []
        for text in self.held_out:
            if sum(map(len, texts)) < NUM_EXACT_TOKENS:
                texts.append(text)
        routed = self.routed
        layers = range(routed.num_layers)
        [batch] = make_batches(texts, routed.device)
        full = LayersPass(layers)
        expected = self._run(full, batch)  # [n, V]
        probabilities = expected.exp()
        costs: dict[Gap, float] = {}
        gaps = sorted(set(gaps))
        for number, (i, k) in enumerate(gaps, start=1):
            [(weight, bias, _)] = self._bridge(i, [k])
            state = full.states[i - 1].float()  # [B, T, D]
            bridged = state + normalise(state) @ weight + bias
            bridged[:, 0] = state[:, 0] + (self.first[k] - self.first[i]).to(state.device)
            found = self._run(LayersPass(layers[k:], bridged.to(routed.dtype)), batch)
            kl = (probabilities * (expected - found)).sum(dim=1)  # [n]
            costs[i, k] = float(kl.mean())
            on_progress(number, len(gaps))
        return costs

    def _run(self, driver: LayersPass, batch: Any) -> Tensor:
        """Return the log-probabilities of the next token at each real token, `[n, V]`."""
        with self.routed.injection.driven_by(driver):
            logits = self.routed.model(input_ids=batch.ids, use_cache=False).logits
        logprobs: Tensor = batch.select(logits.flatten(0, 1)).float().log_softmax(dim=-1)
        return logprobs
