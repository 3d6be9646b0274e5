"""Baselines that decide everything before the first layer, by a trained planner."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from drllm.evaluation.baselines.base import (
    SEARCH_LOG,
    TARGETS,
    Baseline,
    Drawn,
    executions_of,
    register,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.evaluation.baselines.fitting.planners import Planner


class UpFront(Baseline):
    """Follows a planner, at the depth bias that gives the wanted executions."""

    reads_question = True

    @abstractmethod
    def train(self) -> Planner:
        """Return what decides."""

    @cached_property
    def trained(self) -> tuple[Planner, Tensor]:
        """What decides, and what it reads of the calibration prompts, `[N, D]`."""
        from drllm.evaluation.baselines.fitting.planners import first_inputs

        return self.train(), first_inputs(self.routed, self.fitted.material.prompts)

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return the planner's policy."""
        from drllm.evaluation.baselines.fitting.planners import UpFrontPolicy, find_bias

        planner, inputs = self.trained
        bias = find_bias(planner, inputs, executions_of(routes)).value
        return Drawn(policy=UpFrontPolicy(planner, bias), note=f"with a bias of {bias:.4g}")

    def inputs_of(self, prompts: Sequence[str]) -> Tensor:
        """Return what stands before the first layer of some prompts, `[N, D]`."""
        from drllm.evaluation.baselines.fitting.planners import first_inputs
        from drllm.models.base.prompts import encode

        return first_inputs(self.routed, [encode(self.routed.tokenizer, text) for text in prompts])


@register
class SequenceRouterBaseline(UpFront):
    """Shows what knowing the prompt's tokens, but nothing that a layer made of them, is worth."""

    name = "sequence router"
    description = (
        "one linear router decides for all layers, from the mean of the prompt's embeddings"
    )
    source = "MindSkip in Router-Tuning, arXiv 2410.13184, on our targets"
    fitted_on = TARGETS
    order = 120
    needs = ("supervision", "the routers' targets; give them as --supervision")

    def train(self) -> Planner:
        """Return the router."""
        import torch

        from drllm.evaluation.baselines.fitting.planners import train_sequence_router

        targets = self.fitted.material.supervision
        labels = torch.tensor([target.optimal_layer_config for target in targets])
        return train_sequence_router(self.inputs_of([each.prompt for each in targets]), labels)


@register
class ProgramPredictorBaseline(UpFront):
    """Predicts from the prompt alone what a search would find."""

    name = "program predictor"
    description = (
        "a program of segments is predicted up front, from the mean of the prompt's embeddings"
    )
    source = "PoLar, arXiv 2606.06574, simplified: no encoder of its own"
    fitted_on = SEARCH_LOG
    order = 130
    needs = ("search", "the search log; give it as --search")

    def train(self) -> Planner:
        """Return the predictor."""
        from drllm.evaluation.baselines.fitting.segments import programs_of, train_predictor

        records = self.fitted.material.search
        inputs = self.inputs_of([record.prompt for record in records])
        return train_predictor(inputs, programs_of(records, seed=self.fitted.material.seed))
