"""Baseline: stop as soon as the model is confident, and skip all layers that are left."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from drllm.evaluation.baselines.base import CALIBRATION, Baseline, Drawn, executions_of, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.models.scoring.logit_lens import LogitLens


@register
class ConfidenceExit(Baseline):
    """Exits above the confidence that gives the wanted executions on the calibration prompts."""

    name = "confidence exit"
    description = (
        "all further layers are skipped once the model is confident of the next token after the "
        "prompt"
    )
    source = "CALM, arXiv 2207.07061, once per prompt"
    fitted_on = CALIBRATION
    order = 100
    reads_question = True

    @cached_property
    def measured(self) -> tuple[LogitLens, Tensor]:
        """Logits after any layer, and the calibration prompts' confidences, `[N, L − 1]`."""
        from drllm.evaluation.baselines.fitting.exit_policy import confidences
        from drllm.models.scoring.logit_lens import LogitLens

        lens = LogitLens(self.routed)
        return lens, confidences(self.routed, lens, self.fitted.material.prompts)

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return the exit policy."""
        from drllm.evaluation.baselines.fitting.exit_policy import ExitPolicy, find_threshold

        lens, measured = self.measured
        found = find_threshold(measured, min(executions_of(routes), float(self.num_layers)))
        return Drawn(
            policy=ExitPolicy(lens, found.value),
            note=f"exits above a confidence of {found.value:.4f}",
        )
