"""The work of an evaluation that comes before a system's questions: depths and baselines.

`DepthFinder` finds the depth bias of routers. `BaselineFitter` fits a baseline, and lets it decide
on the questions. Like all work, they run in this process or on Ray.

Axes: Q questions, L layers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from drllm.errors import ConfigError
from drllm.evaluation.answers import EvaluationModel, ModelSettings, report_start
from drllm.evaluation.baselines.base import Baseline, BaselineRun
from drllm.evaluation.baselines.material import Material, Measure
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.depth_control import find_depth_bias
from drllm.paths import Decisions
from drllm.work.run import BlockFunction, BlockSteps


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthSearch:
    """A depth whose bias is to be found.

    Attributes:
        system: The name of the work in the progress.
        routers: The folder of the routers.
        executions: The mean executions at this depth.
        prompts: The token ids of each calibration prompt.
    """

    system: str
    routers: str
    executions: float
    prompts: Sequence[Sequence[int]]


class DepthResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The depth bias of routers at a depth; or None, and why there is none."""

    depth_bias: float | None = None
    obstacle: str = ""


@dataclass(frozen=True)
class DepthFinder(BlockFunction[DepthSearch, DepthResult]):
    """Finds the depth bias of routers for a depth."""

    settings: ModelSettings

    def prepare(self, model: RoutedModel) -> EvaluationModel:
        """Return a worker's model."""
        return self.settings.prepare(model)

    def __call__(
        self, prepared: EvaluationModel, data: DepthSearch, steps: BlockSteps
    ) -> DepthResult:
        """Return the bias, or why no bias gives the executions."""
        report_start(steps)
        try:
            calibration = find_depth_bias(
                prepared.lm.routed,
                data.prompts,
                data.executions,
                routers=prepared.routers[data.routers],
            )
        except ConfigError as error:
            return DepthResult(obstacle=str(error))
        return DepthResult(depth_bias=calibration.depth_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineBlock:
    """A baseline that decides on the questions of one task, for some routed models.

    Attributes:
        system: The name of the work in the progress.
        baseline: The baseline.
        material: What it is fitted on.
        routes: For each routed model its decisions on the questions, `[Q][L]`.
        num_draws: How often the baseline decides for each routed model.
        seed: The seed of the random draws.
    """

    system: str
    baseline: type[Baseline]
    material: Material
    routes: Sequence[Sequence[Decisions]]
    num_draws: int
    seed: int


@dataclass(frozen=True)
class BaselineFitter(BlockFunction[BaselineBlock, list[list[BaselineRun]]]):
    """Fits a baseline, and lets it decide at the executions of routed models."""

    settings: ModelSettings

    def prepare(self, model: RoutedModel) -> EvaluationModel:
        """Return a worker's model."""
        return self.settings.prepare(model)

    def __call__(
        self, prepared: EvaluationModel, data: BaselineBlock, steps: BlockSteps
    ) -> list[list[BaselineRun]]:
        """Return, for each routed model, how the baseline decides in each draw."""
        memory = MeasureMemory(data.material, steps)
        baseline = data.baseline(prepared.lm.routed, data.material, memory.remember)
        runs = []
        for decisions in data.routes:
            routes = torch.tensor(decisions)  # [Q, L]
            generator = torch.Generator().manual_seed(data.seed)
            draws = [baseline.make_run(routes, generator) for _ in range(data.num_draws)]
            runs.append(draws)
        return runs


@dataclass
class MeasureMemory:
    """Keeps what a baseline measures, and reports how many tokens it has read for that."""

    material: Material
    steps: BlockSteps
    num_tokens: int = 0

    def remember(self, kind: str, candidates: Sequence[Decisions], measure: Measure) -> list[float]:
        """Return the candidates' values; measure them if an earlier start hasn't done so."""
        self._report(kind)
        if self.steps.store is None:
            values = measure(candidates)
        else:
            key = f"{kind} {json.dumps(candidates)}"
            values = self.steps.store.get_or_make(key, list[float], lambda: measure(candidates))
        self.num_tokens += len(candidates) * sum(map(len, self.material.prompts))
        self._report(kind)
        return values

    def _report(self, kind: str) -> None:
        if self.steps.report is not None:
            self.steps.report(0.0, self.num_tokens, f"fitting on {kind}")
