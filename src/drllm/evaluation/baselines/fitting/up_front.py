"""What baselines need that decide everything before the first layer runs.

Reading a prompt at the first layer, following decisions taken there (`UpFrontPolicy`), and the
depth bias for wanted executions.

Axes: N prompts, B rows, D hidden, L layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from drllm.bisection import Setting, nearest_setting
from drllm.models.routers.depth_control import routes_of
from drllm.models.routing.policies import Policy, PromptView, full_precision
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import Decision

STEEPEST = 1024.0
"""Greatest bias in either direction; logits of planners lie far within."""


class Planner(Protocol):
    """Makes all decisions for a prompt from what is read of it at the first layer."""

    @abstractmethod
    def plans(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """Return decisions `[B, L]`, each row with at least one execution.

        Args:
            inputs: `[B, D]`, from `first_input`.
            depth_bias: The price of an execution; the higher it is, the fewer a row has.
        """


def first_input(prompts: PromptView) -> Tensor:
    """Return the mean of each prompt's real tokens as a layer reads them, `[B, D]` in float32."""
    return prompts.windows(1).means[:, 0]


class UpFrontPolicy(Policy):
    """Takes all decisions at the first layer, from its pooled input.

    Args:
        planner: What decides, on the CPU.
        depth_bias: See `Planner`; `find_bias` finds it for wanted executions.
    """

    def __init__(self, planner: Planner, depth_bias: float = 0.0) -> None:
        self.planner = planner
        self.depth_bias = depth_bias
        self._plans = torch.empty(0, 0, dtype=torch.long)

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return one column of the plans."""
        if layer == 0:
            inputs = first_input(prompts).cpu()  # where the planner is
            with full_precision(inputs.device):
                self._plans = self.planner.plans(inputs, self.depth_bias)
        return self._plans[:, layer]


def find_bias(planner: Planner, inputs: Tensor, executions: float) -> Setting:
    """Find the depth bias under which prompts run the wanted executions on average.

    What such a planner reads doesn't depend on its decisions, so the mean only falls as the bias
    grows, and no forward pass is needed.

    Source: ours (D-20).
    """

    def mean(bias: float) -> float:
        return float(planner.plans(inputs, bias).sum(dim=1).double().mean())

    return nearest_setting(mean, executions, -STEEPEST, STEEPEST)


def with_one_execution(plans: Tensor) -> Tensor:
    """Return decisions `[B, L]` in which a row that would skip everything runs the last layer."""
    empty = plans.sum(dim=1) == 0
    last = torch.where(empty, int(Decision.EXECUTE), plans[:, -1])
    return torch.cat([plans[:, :-1], last[:, None]], dim=1)


class Standardise(nn.Module):
    """Scales every component to the mean 0 and deviation 1 that it has over the training prompts.

    First-layer inputs are small, and differ in scale from model to model.

    Args:
        inputs: `[N, D]` of the training prompts.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        deviation = inputs.std(dim=0, correction=0)
        self.register_buffer("mean", inputs.mean(dim=0))
        # A component that never varies carries nothing: whatever it is, it counts as its mean.
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, torch.inf))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[B, D]`, scaled."""
        return (inputs - self.mean) / self.deviation


# --- reading many prompts ---


class Recorder(Policy):
    """A policy that keeps something of every prompt that passes."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """What was kept of the last pass, `[B, …]` on the CPU."""


def recorded(
    routed: RoutedModel,
    recorder: Recorder,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> Tensor:
    """Let prompts pass a recorder in batches of like length, and return what it kept of each.

    The model's policy and its last route stay what they are.

    Returns:
        `[N, …]` on the CPU, in the order of the prompts.

    Raises:
        ConfigError: No prompts, one without tokens, or one longer than the model's context.
    """
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    kept = []
    for start in range(0, max(len(prompts), 1), batch_size):  # without prompts it says so
        part = [prompts[row] for row in by_length[start : start + batch_size]]
        routes_of(routed, recorder, part, batch_size=batch_size)
        kept.append(recorder.values)
    values = torch.cat(kept)
    return values[torch.tensor(by_length).argsort()]


class _FirstInputs(Recorder):
    """Keeps what stands before the first layer, and skips all layers that may be skipped."""

    def __init__(self) -> None:
        self._inputs = torch.empty(0, 0)

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        """Return 0 for every row; routing runs the last layer all the same."""
        if layer == 0:
            self._inputs = first_input(prompts).cpu()
        return [int(Decision.SKIP)] * prompts.num_rows

    @property
    def values(self) -> Tensor:
        return self._inputs


def first_inputs(
    routed: RoutedModel, prompts: Sequence[Sequence[int]], *, batch_size: int = 16
) -> Tensor:
    """Read prompts at the first layer, where nothing but the embedding has run.

    Returns:
        `[N, D]` in float32 on the CPU: the mean over each prompt's tokens.

    Raises:
        ConfigError: No prompts, one without tokens, or one longer than the model's context.
    """
    return recorded(routed, _FirstInputs(), prompts, batch_size=batch_size)
