"""What a tuning's workers do with one block: score paths, repair a path, or answer prompts.

Axes: N paths, Q questions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from drllm.config.heal import REFIT
from drllm.errors import ArchitectureError, RoutingError
from drllm.model.prompts import Prompt as Conversation
from drllm.models.routed_model import RoutedModel
from drllm.paths import Gap, StaticPath
from drllm.statistics.ranges import Amount, Share
from drllm.tasks.examples import Prompt
from drllm.tuning.heal_texts import Tokens
from drllm.tuning.heal_tokens import answer_prompts
from drllm.tuning.path_scorer import Item, PathScores, grade_answers, score_paths
from drllm.tuning.refit import find_projections, join_weights, refit
from drllm.tuning.refit_memory import find_memory_obstacle
from drllm.tuning.stand_in import StandIn, fit_stand_in
from drllm.work.run import BlockFunction, BlockSteps, OnStep

PLAIN = ""
STAND_IN = "stand-in"
"""How a path is repaired while it is scored: not at all, by the stand-in, or by its refit, which is
`REFIT`. A table of scores has these words as the adapter of a path (see `score_table`)."""


@dataclass(frozen=True, slots=True)
class PathsToScore:
    """A block of scores: each path is scored on each question.

    Attributes:
        paths: The paths. Their adapter is `PLAIN` or `STAND_IN`, the same for all.
        items: The questions.
        objective: What they are scored by.
    """

    paths: Sequence[StaticPath]
    items: Sequence[Item]
    objective: str


@dataclass(frozen=True, slots=True)
class PromptsToAnswer:
    """A block of generated answers: each prompt is answered along one path."""

    path: StaticPath
    prompts: Sequence[Prompt]


class AnswerGrades(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The grades of generated answers.

    Attributes:
        grades: The grade of each answer, from 0 (wrong) to 1 (right).
        seconds: How long generating and grading took.
    """

    grades: list[Share]
    seconds: Amount


@dataclass(frozen=True, slots=True)
class PartToScore:
    """A part of a task's questions that a repaired path is scored on.

    Attributes:
        key: The part's name among the parts of all tasks.
        items: The questions.
        objective: What they are scored by.
        prompts: The prompts to answer; empty if no answers are generated.
    """

    key: str
    items: Sequence[Item]
    objective: str
    prompts: Sequence[Prompt] = ()

    @property
    def num_scores(self) -> int:
        """How many questions are scored, and how many answered."""
        return len(self.items) + len(self.prompts)


@dataclass(frozen=True, slots=True)
class PathToRepair:
    """A block of repair: one path, and all parts to score it on."""

    path: StaticPath
    parts: Sequence[PartToScore]


class PartScores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of a repaired path on one part.

    Attributes:
        objective: The objective on each question, `[Q]`.
        right: 1 if the right option is the likeliest, else 0, `[Q]`; empty without options.
        grades: The grade of each answer; empty if none are generated.
        seconds: How long the scores took.
    """

    objective: list[float]
    right: list[Share] = []
    grades: list[Share] = []
    seconds: Amount = 0.0


class RepairedScores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of a repaired path.

    Attributes:
        parts: The scores by the part's key.
        refit_seconds: How long the refit took.
    """

    parts: dict[str, PartScores]
    refit_seconds: Amount

    @property
    def seconds(self) -> float:
        """How long the refit and the scores took, some of them maybe in an earlier run."""
        return self.refit_seconds + sum(part.seconds for part in self.parts.values())


@dataclass
class ScoringModel:
    """A worker's model, and the stand-in, which is fitted when it is first needed.

    Attributes:
        routed: The model.
        texts: The texts that the stand-in is fitted on, as tokens.
    """

    routed: RoutedModel
    texts: Sequence[Tokens]

    @cached_property
    def stand_in(self) -> StandIn:
        """The stand-in."""
        return fit_stand_in(self.routed, self.texts)


BlockData: TypeAlias = PathsToScore | PathToRepair | PromptsToAnswer
BlockResult: TypeAlias = PathScores | RepairedScores | AnswerGrades


@dataclass(frozen=True)
class ScoringBlocks(BlockFunction[BlockData, BlockResult]):
    """Scores paths, repairs a path and scores it, or grades answers, as the block's data say.

    It is one function for all of them, so that a worker fits the stand-in once.

    Attributes:
        state_cache_gb: As for `score_paths`, for each worker.
        stand_in_texts: The texts that the stand-in is fitted on, as tokens.
        texts: The texts that paths are refitted on, as tokens.
    """

    state_cache_gb: float | None
    stand_in_texts: Sequence[Tokens] = ()
    texts: Sequence[Tokens] = ()

    def prepare(self, model: RoutedModel) -> ScoringModel:
        """See `BlockFunction.prepare`."""
        return ScoringModel(model, self.stand_in_texts)

    def __call__(self, prepared: ScoringModel, data: BlockData, steps: BlockSteps) -> BlockResult:
        """Return the result of a block."""
        if isinstance(data, PathsToScore):
            return self._score(prepared, data)
        if isinstance(data, PathToRepair):
            return self._repair(prepared.routed, data, steps)
        return _grade(prepared.routed, data)

    def _score(self, prepared: ScoringModel, data: PathsToScore) -> PathScores:
        """Score the paths of a block on its questions."""
        started = time.perf_counter()
        crossings = None
        if data.paths[0].adapter == STAND_IN:
            crossings = prepared.stand_in
        paths = [path.with_adapter(PLAIN) for path in data.paths]
        scores = score_paths(
            prepared.routed, data.items, paths, data.objective, self.state_cache_gb, crossings
        )
        return replace(scores, seconds=time.perf_counter() - started)  # with the stand-in's fit

    def _repair(self, routed: RoutedModel, data: PathToRepair, steps: BlockSteps) -> RepairedScores:
        """Refit the path of a block, and score it as refitted. The refit isn't kept."""
        started = time.perf_counter()
        on_progress = None
        if steps.report is not None:
            on_progress = partial(_report_refit, steps.report)
        gaps = refit(routed, data.path, self.texts, on_progress=on_progress)
        seconds = time.perf_counter() - started
        routed.injection.add_adapter(REFIT, refit=join_weights(gaps))
        try:
            parts = {part.key: self._score_part(routed, data, part, steps) for part in data.parts}
        finally:
            routed.injection.adapters.drop(REFIT)
        return RepairedScores(parts=parts, refit_seconds=seconds)

    def _score_part(
        self, routed: RoutedModel, data: PathToRepair, part: PartToScore, steps: BlockSteps
    ) -> PartScores:
        """Score the repaired path on a part, or read the kept scores."""
        make = partial(self._make_part_scores, routed, data.path.with_adapter(REFIT), part)
        if steps.store is None:
            return make()
        return steps.store.get_or_make(part.key, PartScores, make)

    def _make_part_scores(
        self, routed: RoutedModel, path: StaticPath, part: PartToScore
    ) -> PartScores:
        """Score the repaired path on a part."""
        started = time.perf_counter()
        scores = score_paths(routed, part.items, [path], part.objective, self.state_cache_gb)
        grades: list[float] = []
        if part.prompts:
            grades = grade_answers(routed, path, part.prompts)
        return PartScores(
            objective=scores.objective[0],
            right=scores.right[0] if scores.right else [],
            grades=grades,
            seconds=time.perf_counter() - started,
        )


def _grade(routed: RoutedModel, data: PromptsToAnswer) -> AnswerGrades:
    """Generate the answers of a block, and grade them."""
    started = time.perf_counter()
    grades = grade_answers(routed, data.path, data.prompts)
    return AnswerGrades(grades=grades, seconds=time.perf_counter() - started)


def _report_refit(report: OnStep, done: float, total: float, note: str = "") -> None:
    """Report the progress of a refit as a step of its block; see `OnProgress`."""
    report(done / total, 0, f"refitting the best path, {note}")


@dataclass(frozen=True)
class PromptAnswerer(BlockFunction[Sequence[Conversation], list[Tokens]]):
    """Answers the prompts of a block along the full path.

    Attributes:
        max_tokens: Maximum tokens of an answer.
    """

    max_tokens: int

    def __call__(
        self, prepared: RoutedModel, data: Sequence[Conversation], steps: BlockSteps
    ) -> list[Tokens]:
        """Return the prompts with their answers, as tokens; all fit into the model's context."""
        return answer_prompts(prepared, data, self.max_tokens)


@dataclass(frozen=True)
class RefitCheck(BlockFunction[None, str]):
    """Finds out whether the layers of a model can be refitted.

    Attributes:
        num_tokens: How many tokens they are refitted on.
    """

    num_tokens: int

    def __call__(self, prepared: RoutedModel, data: None, steps: BlockSteps) -> str:
        """Return why a layer can't be refitted; empty if all layers can be."""
        last = prepared.num_layers - 1
        gaps = [Gap(layer, layer + 2) for layer in range(last)]
        try:
            projections = find_projections(prepared, gaps)
        except (ArchitectureError, RoutingError) as error:
            return str(error)
        return find_memory_obstacle(prepared, projections.values(), self.num_tokens)
