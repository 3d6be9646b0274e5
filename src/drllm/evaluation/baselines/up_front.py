"""Baselines that decide everything before the first layer, by a trained planner."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

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

    needs: ClassVar[tuple[str, str]]
    reads_question = True

    @abstractmethod
    def train(self, records: Any, inputs: Tensor) -> Planner:
        """Return what decides, trained on the records that it needs and their inputs `[N, D]`."""

    @cached_property
    def trained(self) -> tuple[Planner, Tensor]:
        """What decides, and what it reads of the calibration prompts, `[N, D]`."""
        from drllm.evaluation.baselines.fitting.planners import first_inputs
        from drllm.models.base.prompts import encode

        material, tokenizer = self.fitted.material, self.routed.tokenizer
        records = getattr(material, self.needs[0])
        inputs = first_inputs(self.routed, [encode(tokenizer, each.prompt) for each in records])
        return self.train(records, inputs), first_inputs(self.routed, material.prompts)

    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return the planner's policy."""
        from drllm.evaluation.baselines.fitting.planners import UpFrontPolicy, find_bias

        planner, inputs = self.trained
        bias = find_bias(planner, inputs, executions_of(routes)).value
        return Drawn(policy=UpFrontPolicy(planner, bias), note=f"with a bias of {bias:.4g}")


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

    def train(self, records: Any, inputs: Tensor) -> Planner:
        """Return the router."""
        import torch

        from drllm.evaluation.baselines.fitting.planners import train_sequence_router

        labels = torch.tensor([each.optimal_layer_config for each in records])
        return train_sequence_router(inputs, labels)


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

    def train(self, records: Any, inputs: Tensor) -> Planner:
        """Return the predictor."""
        from drllm.evaluation.baselines.fitting.planners import programs_of, train_predictor

        return train_predictor(inputs, programs_of(records, seed=self.fitted.material.seed))
