"""Baseline: skip all further layers as soon as the model is confident.

Axes: N prompts, B rows, T tokens, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from drllm.bisection import Setting, nearest_setting
from drllm.evaluation.baselines.base import (
    CALIBRATION,
    Baseline,
    BaselineRun,
    PolicyMaker,
    average_executions,
    register,
)
from drllm.models.routing.policies import Policy, PromptView

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.models.routed_model import RoutedModel
    from drllm.models.scoring.logit_lens import LogitLens


@register
class ConfidenceExit(Baseline):
    """All further layers are skipped once the model is confident of the prompt's next token."""

    name = "confidence exit"
    source = "CALM, arXiv 2207.07061, once per prompt"
    fitted_on = CALIBRATION
    order = 100
    reads_question = True

    @cached_property
    def lens(self) -> LogitLens:
        """The model's final norm and head, for use after any layer."""
        from drllm.models.scoring.logit_lens import LogitLens

        return LogitLens(self.routed)

    @cached_property
    def confidences(self) -> Tensor:
        """The calibration prompts' confidences, `[N, L − 1]`."""
        return measure_confidences(self.routed, self.lens, self.material.prompts)

    def make_run(self, routes: Tensor, generator: torch.Generator) -> BaselineRun:
        """Return a policy that exits at the threshold for the routed model's executions."""
        # The policy repeats no layer, so the full path is the most that it can run.
        executions = min(average_executions(routes), float(self.num_layers))
        threshold = find_threshold(self.confidences, executions).value
        note = f"exits above a confidence of {threshold:.4f}"
        return BaselineRun(ConfidenceThreshold(threshold), note)


@dataclass(frozen=True)
class ConfidenceThreshold(PolicyMaker):
    """Makes an `ExitPolicy` with this threshold."""

    threshold: float

    def make_policy(self, routed: RoutedModel) -> Policy:
        """Return the policy, which reads the model's norm and head."""
        from drllm.models.scoring.logit_lens import LogitLens

        return ExitPolicy(LogitLens(routed), self.threshold)


class ExitPolicy(Policy):
    """Runs layers until the probability of the likeliest next token exceeds a threshold.

    After every layer but the last, the model's final norm and output head read the state of the
    prompt's last real token, and give the probability of each next token. Once the largest of them
    exceeds the threshold, all further layers are skipped, for the prompt and for its answer.
    Nothing is trained. The first layer always runs. With a threshold of 1, all layers run; with 0,
    only the first layer runs.

    Source: CALM (arXiv 2207.07061), changed as D-18 says.
    """

    _running: Tensor  # [B], whether a row hasn't stopped yet; set at the first layer

    def __init__(self, lens: LogitLens, threshold: float) -> None:
        self.lens = lens
        self.threshold = threshold

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return 1 for rows that continue, and 0 for rows that have stopped."""
        import torch

        device = prompts.hidden.device  # the layers may be on several devices
        if layer == 0:
            self._running = torch.ones(prompts.num_rows, dtype=torch.bool, device=device)
        elif bool(self._running.any()):
            is_unsure = measure_confidence(self.lens, prompts) <= self.threshold
            self._running = self._running.to(device) & is_unsure
        return self._running.long()


def measure_confidence(lens: LogitLens, prompts: PromptView) -> Tensor:
    """Measure the probability of each prompt's likeliest next token, `[B]`."""
    import torch

    T = prompts.hidden.shape[1]
    from_end = prompts.readable.flip(1).long().argmax(dim=1)  # [B], padding after the last token
    rows = torch.arange(prompts.num_rows, device=prompts.hidden.device)
    last = prompts.hidden[rows, T - 1 - from_end]  # [B, D]
    with torch.no_grad():
        logits = lens.logits(last)
    return logits.softmax(dim=-1).amax(dim=-1).to(prompts.hidden.device)


def measure_confidences(
    routed: RoutedModel, lens: LogitLens, prompts: Sequence[Sequence[int]]
) -> Tensor:
    """Measure each prompt's confidence after every layer but the last, `[N, L − 1]`.

    The prompts run the full path. Under an exit policy a prompt also runs the full path until it
    exits, so these confidences tell where it exits at any threshold. The model needs at least two
    layers.
    """
    from drllm.models.routing.depth_control import record_at_layers

    layers = range(1, routed.num_layers)
    return record_at_layers(routed, prompts, partial(measure_confidence, lens), layers, decision=1)


def find_threshold(confidences: Tensor, executions: float) -> Setting:
    """Find the threshold at which prompts run these executions on average.

    `confidences` are the prompts' confidences `[N, L − 1]`, from `measure_confidences`.
    """

    def mean_executions(threshold: float) -> float:
        # [N, L − 1], 1 until the first confidence above the threshold, then 0
        continues = (confidences <= threshold).long().cumprod(dim=1)
        return float((1 + continues.sum(dim=1)).double().mean())

    return nearest_setting(mean_executions, executions, 0.0, 1.0)
