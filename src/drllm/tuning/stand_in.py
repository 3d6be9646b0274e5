"""A cheap stand-in for the refit of a path: a linear map of the state that crosses each gap.

A tuning compares hundreds of paths, and a refit of each would take a minute. Instead, a state h
that crosses a gap (i, k) becomes

    h + A n(h) + b,    n(h) = h / rms(h)

The map is fitted in closed form on the full path's own states: h is what layer i returns, and the
target is what enters layer k. So it doesn't depend on the rest of the path, and the states of one
pass over the texts serve all gaps of all paths. A gap is solved when a path needs it. The first
token of a text is apart: it becomes h + c, where c is the mean difference there, since the state of
a first token may be 100 times as large as others.

Some models make an attention sink: one layer's MLP makes the state of a first token 150 times as
large. A refit can't make such a state in an earlier layer, so the stand-in mustn't either: c is 0
where the state would grow more than `LARGEST_GROWTH` times. Otherwise paths without that layer
would look much better than they are.

Memory: the states take L D 4 bytes a token, the regression behind each layer D² 8 bytes, and each
solved gap D² 4 bytes.

Axes: n tokens, L layers, D hidden.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drllm.errors import ConfigError
from drllm.model.batching import free_bytes
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.bypass import normalise
from drllm.models.routing.injection import Driver, LayerCall
from drllm.paths import Gap
from drllm.tuning.heal_texts import Tokens
from drllm.tuning.layer_states import make_batches
from drllm.tuning.refit import split_for_ridge
from drllm.tuning.refit_memory import high_precision
from drllm.tuning.ridge import share_of_error

RIDGES = tuple(10.0**exponent for exponent in range(-5, 2))
"""The values of λ to choose from, for inputs of variance 1."""
SMALLEST_DEVIATION = 1e-6
"""The least standard deviation of an input; an input that is always the same would divide by 0."""
LARGEST_GROWTH = 20.0
"""How many times as large a gap may make the state of a first token. In SmolLM2-135M the gaps that
keep the layer of its sink have at most 13, the others 30 to 150."""
SHARE_ON_DEVICE = 0.25  # of the free memory of the model's device that the states may take
SHARE_OF_MEMORY = 0.5  # of the free memory of the host that the states may take


@dataclass(frozen=True, eq=False, slots=True)
class GapMap:
    """The map of the states that cross one gap.

    Attributes:
        weight: A, `[D, D]` in float32.
        bias: b, `[D]`.
        first: c, which is added to the state of a first token instead, `[D]`.
        unexplained: The squared error on held-out texts, as a share of that of the state as it is.
    """

    weight: Tensor
    bias: Tensor
    first: Tensor
    unexplained: float

    def apply(self, states: Tensor, is_first: Tensor) -> Tensor:
        """Map states `[..., D]`; `is_first` `[...]` marks the first tokens of texts."""
        values = states.float()
        changes = torch.nn.functional.linear(normalise(values), self.weight, self.bias)
        changes = torch.where(is_first[..., None], self.first, changes)
        return (values + changes).to(states.dtype)

    def to(self, device: torch.device) -> GapMap:
        """Return the map on a device."""
        return GapMap(
            self.weight.to(device), self.bias.to(device), self.first.to(device), self.unexplained
        )


class StandIn:
    """The maps of all gaps, each solved when it is first needed. It is a `Crossings`.

    Args:
        fit: The states of the texts to fit the maps on.
        held_out: The states of the texts to choose λ on.
        largest_growth: How many times as large a gap may make the state of a first token.
    """

    def __init__(
        self,
        fit: FullPathStates,
        held_out: FullPathStates,
        largest_growth: float = LARGEST_GROWTH,
    ) -> None:
        self._fit = fit
        self._held_out = held_out
        self._largest_growth = largest_growth
        self._regressions: dict[int, _Regression] = {}  # by the layer before the gap
        self._maps: dict[Gap, GapMap] = {}

    def cross(self, layer: int, next_layer: int, states: Tensor, is_first: Tensor) -> Tensor:
        """See `Crossings.cross`."""
        gap = Gap(layer, next_layer)
        gap_map = self.find_map(gap)
        if gap_map.weight.device != states.device:
            # It was solved where the states of the texts are.
            gap_map = gap_map.to(states.device)
            self._maps[gap] = gap_map
        return gap_map.apply(states, is_first)

    @torch.no_grad()
    def find_map(self, gap: Gap) -> GapMap:
        """Return the map of a gap."""
        if gap not in self._maps:
            self._maps[gap] = self._solve(gap)
        return self._maps[gap]

    def _solve(self, gap: Gap) -> GapMap:
        """Solve the map of a gap."""
        if gap.layer not in self._regressions:
            inputs = self._fit.states[gap.layer]
            held_out_inputs = self._held_out.states[gap.layer]
            self._regressions[gap.layer] = _Regression(inputs, held_out_inputs)
        regression = self._regressions[gap.layer]
        weight, bias, unexplained = regression.solve(
            self._fit.differences(gap), self._held_out.differences(gap)
        )
        first = self._find_first_change(gap)
        return GapMap(weight.float(), bias.float(), first.float(), unexplained)

    def _find_first_change(self, gap: Gap) -> Tensor:
        """Return c of a gap, `[D]`."""
        parts = (self._fit, self._held_out)
        states = torch.cat([part.first[gap.layer] for part in parts])  # [texts, D]
        targets = torch.cat([part.first[gap.next_layer - 1] for part in parts])
        change = (targets - states).mean(dim=0)
        if targets.norm() > self._largest_growth * states.norm():
            return torch.zeros_like(change)
        return change


class _Regression:
    """The ridge regressions on the states after one layer, which all gaps behind it share.

    The inputs n(h) get mean 0 and variance 1, and are turned to the principal axes of their
    correlations. There the solution for each λ is a division.

    Args:
        states: The states to fit on, `[n, D]`.
        held_out_states: The states to choose λ on.
    """

    def __init__(self, states: Tensor, held_out_states: Tensor) -> None:
        self.states = states
        inputs = normalise(states.double())
        self.mean = inputs.mean(dim=0)
        self.deviation = inputs.std(dim=0, correction=0).clamp_min(SMALLEST_DEVIATION)
        inputs = self._standardise(states)
        self.eigenvalues, self.axes = torch.linalg.eigh(inputs.T @ inputs)  # [D], [D, D]
        self.held_out_inputs = self._standardise(held_out_states) @ self.axes

    def solve(
        self, differences: Tensor, held_out_differences: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Return A, b, and the unexplained share of the held-out squared error.

        If no λ explains anything of the held-out texts, A and b are 0.

        Args:
            differences: The target minus the state, `[n, D]`.
            held_out_differences: The same on held-out texts.
        """
        differences = differences.double()
        held_out_differences = held_out_differences.double()
        mean = differences.mean(dim=0)
        inputs = self._standardise(self.states)
        cross = self.axes.T @ (inputs.T @ (differences - mean))  # [D, D]
        plain_error = float(held_out_differences.square().sum())
        best_error = plain_error
        weight = torch.zeros_like(cross)
        bias = torch.zeros_like(mean)
        for ridge in RIDGES:
            solution = cross / (self.eigenvalues + ridge * len(differences))[:, None]
            errors = held_out_differences - mean - self.held_out_inputs @ solution
            error = float(errors.square().sum())
            if error < best_error:
                best_error = error
                weight = ((self.axes @ solution) / self.deviation[:, None]).T
                bias = mean - weight @ self.mean
        return weight, bias, share_of_error(best_error, plain_error)

    def _standardise(self, states: Tensor) -> Tensor:
        """Return n(h) with mean 0 and variance 1, in float64."""
        return (normalise(states.double()) - self.mean) / self.deviation


@dataclass(frozen=True, eq=False, slots=True)
class FullPathStates:
    """What each layer of the full path returned on some texts.

    Attributes:
        states: For each layer, the states of all tokens but first ones, `[L][n, D]` in float32.
        first: For each layer, the states of first tokens, `[L][texts, D]`.
    """

    states: Sequence[Tensor]
    first: Sequence[Tensor]

    def differences(self, gap: Gap) -> Tensor:
        """Return what a gap's states lack: what enters the layer after it minus the state."""
        return self.states[gap.next_layer - 1] - self.states[gap.layer]


class _StateRecorder(Driver):
    """Runs all layers, and records what each returns."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []  # [L][B, T, D]

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layer once."""
        hidden = call.run(hidden)
        self.states.append(hidden)
        return hidden


def fit_stand_in(
    routed: RoutedModel, texts: Sequence[Tokens], largest_growth: float = LARGEST_GROWTH
) -> StandIn:
    """Run the full path on texts once, and return the stand-in that is fitted on its states.

    Args:
        routed: The model.
        texts: Two texts or more, as tokens. λ is chosen on a tenth of them, picked by their hash.
        largest_growth: How many times as large a gap may make the state of a first token.

    Raises:
        ConfigError: The states don't fit into memory.
    """
    device = _choose_device(routed, sum(map(len, texts)))
    fit, held_out = split_for_ridge(texts)
    with torch.no_grad(), high_precision(routed):
        fit_states = _record_states(routed, fit, device)
        held_out_states = _record_states(routed, held_out, device)
    return StandIn(fit_states, held_out_states, largest_growth)


def _choose_device(routed: RoutedModel, num_tokens: int) -> torch.device:
    """Return the device that keeps the states: the model's if they fit there, else the host."""
    width = routed.config.get_text_config().hidden_size
    num_bytes = routed.num_layers * num_tokens * width * torch.float32.itemsize
    device = torch.device(routed.device)
    host = torch.device("cpu")
    if device.type == "cuda" and num_bytes < SHARE_ON_DEVICE * free_bytes(device):
        return device
    if num_bytes > SHARE_OF_MEMORY * free_bytes(host):
        raise ConfigError(
            f"the states of {num_tokens} tokens, which paths are repaired with, take "
            f"{num_bytes / 1e9:.1f} GB, more than half of the free memory; give a lower "
            f"--refit-tokens, or --repair none"
        )
    return host


def _record_states(
    routed: RoutedModel, texts: Sequence[Tokens], device: torch.device
) -> FullPathStates:
    """Run the full path on texts, and return its states, batch by batch."""
    states: list[list[Tensor]] = [[] for _ in range(routed.num_layers)]
    first: list[list[Tensor]] = [[] for _ in range(routed.num_layers)]
    for batch in make_batches(texts, routed.device):
        driver = _StateRecorder()
        with routed.injection.driven_by(driver):
            routed.injection.decoder(input_ids=batch.ids, use_cache=False)
        for layer, output in enumerate(driver.states):
            tokens = batch.select(output).to(device, torch.float32)
            is_first = batch.is_first.to(device)
            states[layer].append(tokens[~is_first])
            first[layer].append(tokens[is_first])
    return FullPathStates(
        [torch.cat(parts) for parts in states], [torch.cat(parts) for parts in first]
    )
