"""The work of an evaluation that runs the model: questions under a system, and texts.

`QuestionRunner` runs a system on a block of questions. `TextScorer` measures the next-token loss
of texts. Both run in this process or on Ray, so their data holds tokens and decisions, and no part
of the model. A draw is one way in which a system decides on all questions. Most systems have one
draw, and baselines with random decisions have several.

Routers read only the question. So all options of a question have the same route. Texts begin with
the question, and have the question's route too.

Axes: L layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
from lm_eval.api.instance import Instance

from drllm.errors import ModelError
from drllm.evaluation.baselines.base import PolicyMaker
from drllm.evaluation.latency import device_clock
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.scoring import (
    DecisionsByQuestion,
    HarnessRequest,
    LayerChoice,
    OptionScore,
    PathsByQuestion,
)
from drllm.evaluation.lm_eval.task import Key
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import FixedPolicy, FullPolicy, Policy, RouterPolicy
from drllm.paths import Decisions, StaticPath
from drllm.statistics.ranges import Amount
from drllm.work.run import BlockFunction, BlockSteps

Answers: TypeAlias = list[list[OptionScore | str]]
"""For each question the score of each option, or a list with the generated answer alone."""


@dataclass(frozen=True, slots=True)
class RoutersDecide:
    """The routers of a folder decide, under a depth bias."""

    routers: str
    depth_bias: float = 0.0


Draw: TypeAlias = Policy | PolicyMaker | RoutersDecide | StaticPath | Sequence[Decisions]
"""How a system decides on a block's questions; a sequence has the decisions of each question."""


@dataclass(frozen=True)
class ModelSettings:
    """What every worker needs to answer questions, beside the base model.

    Attributes:
        batch_size: Questions in a forward pass.
        routers: Routers by folder.
    """

    batch_size: int
    routers: Mapping[str, RouterStack] = field(default_factory=dict)

    def prepare(self, routed: RoutedModel) -> "EvaluationModel":
        """Move the routers to a worker's model, and give it the harness' interface."""
        for stack in self.routers.values():
            stack.to(routed.model.device)
        return EvaluationModel(RoutedLM(routed, batch_size=self.batch_size), self.routers)


@dataclass
class EvaluationModel:
    """A worker's model, which answers questions under any system."""

    lm: RoutedLM
    routers: Mapping[str, RouterStack]
    _policies: dict[PolicyMaker, Policy] = field(default_factory=dict)

    def make_routing(self, draw: Draw, keys: Sequence[Key]) -> LayerChoice:
        """Return a policy, a path, or the decisions of questions by their keys."""
        if isinstance(draw, RoutersDecide):
            return RouterPolicy(self.routers[draw.routers], depth_bias=draw.depth_bias)
        if isinstance(draw, Sequence):
            return dict(zip(keys, draw, strict=True))
        if isinstance(draw, PolicyMaker):
            if draw not in self._policies:
                self._policies[draw] = draw.make_policy(self.lm.routed)
            return self._policies[draw]
        return draw


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionBlock:
    """Questions that are run together, and how a system decides on them.

    Attributes:
        system: The key of the system, which names the work in the progress.
        ids: The id of each question.
        keys: The key of each question.
        requests: The requests of each question's options; empty if answers are generated.
        prompts: The request for each question's answer; empty if options are scored.
        draws: How the system decides in each draw.
    """

    system: str
    ids: Sequence[str]
    keys: Sequence[Key]
    requests: Sequence[Sequence[HarnessRequest]] = ()
    prompts: Sequence[Instance] = ()
    draws: Sequence[Draw]


class BatchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answers of a system to some questions under all of its draws.

    Attributes:
        answers: For each draw the answers to the questions.
        routes: For each draw the questions' decisions; empty for a static path.
        seconds: Wall time of the first draw.
    """

    answers: list[Answers]
    routes: list[list[Decisions]]
    seconds: Amount = 0.0


@dataclass(frozen=True)
class QuestionRunner(BlockFunction[QuestionBlock, BatchResult]):
    """Runs a system on a block of questions.

    Attributes:
        settings: What a worker needs beside the base model.
        warm_up: The requests of a question that each worker answers first, so that the time for
            setting up isn't counted for a system.
    """

    settings: ModelSettings
    warm_up: Sequence[HarnessRequest] = ()

    def prepare(self, model: RoutedModel) -> EvaluationModel:
        """Return a worker's model, after its first pass."""
        prepared = self.settings.prepare(model)
        if self.warm_up:
            prepared.lm.scorer.score(self.warm_up, FullPolicy())
        return prepared

    def __call__(
        self, prepared: EvaluationModel, data: QuestionBlock, steps: BlockSteps
    ) -> BatchResult:
        """Run a block's questions under all draws; only the first draw is timed."""
        report_start(steps)
        lm = prepared.lm
        draws = [prepared.make_routing(draw, data.keys) for draw in data.draws]
        clock = device_clock(lm.device)
        started = clock()
        first_answers, first_routes = _run_draw(lm, data, draws[0])
        seconds = clock() - started
        answers = [first_answers]
        routes = []
        if not isinstance(draws[0], StaticPath):
            routes.append(first_routes)
        plans = [draw for draw in draws[1:] if isinstance(draw, Mapping)]
        if plans:
            answers += _run_plans(lm, data, plans)
            routes += [_list_decisions(plan, data) for plan in plans]
        return BatchResult(answers=answers, routes=routes, seconds=seconds)


def report_start(steps: BlockSteps) -> None:
    """Report that a block begins."""
    if steps.report is not None:
        steps.report(0.0, 0, "")


def _run_plans(
    lm: RoutedLM, block: QuestionBlock, plans: Sequence[DecisionsByQuestion]
) -> list[Answers]:
    """Return a block's answers under each plan."""
    if block.requests:  # layers that begin several plans run once for all
        scores = lm.scorer.score_plans(_list_requests(block), plans)
        return [_group_by_question(block, plan_scores) for plan_scores in scores]
    answers = []
    for plan in plans:
        plan_answers, _ = _run_draw(lm, block, plan)
        answers.append(plan_answers)
    return answers


def _run_draw(
    lm: RoutedLM, block: QuestionBlock, routing: LayerChoice
) -> tuple[Answers, list[Decisions]]:
    """Return a block's answers and the questions' routes under one draw.

    For a static path the routes are to be ignored.
    """
    if not block.requests:
        return _generate(lm, block, routing)
    scores, routes_by_key = lm.scorer.score(_list_requests(block), routing)
    routes: list[Decisions] = []
    if not isinstance(routing, StaticPath):
        routes = _list_decisions(routes_by_key, block)
    return _group_by_question(block, scores), routes


def _generate(
    lm: RoutedLM, block: QuestionBlock, routing: LayerChoice
) -> tuple[Answers, list[Decisions]]:
    """Generate a block's answers; return them and the questions' routes."""
    routed = lm.routed
    prompts = [str(instance.args[0]) for instance in block.prompts]
    key_by_prompt = dict(zip(prompts, block.keys, strict=True))
    if isinstance(routing, StaticPath):
        routing = routed.build_policy(routing)

    def make_policy(batch: Sequence[str]) -> Policy:
        if not isinstance(routing, Mapping):
            return routing
        decisions = [routing[key_by_prompt[prompt]] for prompt in batch]
        return FixedPolicy(decisions, routed.num_layers)

    lm.choose_policy = make_policy
    texts = lm.generate_until(list(block.prompts), disable_tqdm=True)
    answers: Answers = [[text] for text in texts]
    return answers, [lm.generated_routes[prompt] for prompt in prompts]


def _list_decisions(decisions: DecisionsByQuestion, block: QuestionBlock) -> list[Decisions]:
    """Return the decisions on the questions of a block, in their order."""
    return [decisions[key] for key in block.keys]


def _list_requests(block: QuestionBlock) -> list[HarnessRequest]:
    """Return the requests of a block's questions, one question after another."""
    return [request for requests in block.requests for request in requests]


def _group_by_question(block: QuestionBlock, scores: Sequence[OptionScore]) -> Answers:
    """Group the scores of a block's requests by question; refuse scores that aren't finite."""
    by_question: Answers = []
    start = 0
    for question_id, requests in zip(block.ids, block.requests, strict=True):
        end = start + len(requests)
        for logprob, _ in scores[start:end]:
            _refuse_infinite(logprob, f"question {question_id}")
        by_question.append([*scores[start:end]])
        start = end
    return by_question


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Texts to measure the next-token loss on, and the path that each of them runs.

    Attributes:
        system: The key of the system, which names the work in the progress.
        texts: The texts.
        paths: Key of a question → its decisions; or one static path.
    """

    system: str
    texts: Sequence[HarnessRequest]
    paths: PathsByQuestion | StaticPath


@dataclass(frozen=True)
class TextScorer(BlockFunction[TextBlock, list[float]]):
    """Measures the next-token loss of texts, in nats a token."""

    settings: ModelSettings

    def prepare(self, model: RoutedModel) -> EvaluationModel:
        """Return a worker's model."""
        return self.settings.prepare(model)

    def __call__(self, prepared: EvaluationModel, data: TextBlock, steps: BlockSteps) -> Any:
        """Return the loss of each text."""
        report_start(steps)
        [scores] = prepared.lm.scorer.score_plans(data.texts, [data.paths])
        losses = []
        for text, (logprob, _) in zip(data.texts, scores, strict=True):
            _refuse_infinite(logprob, f"the text of {data.system}")
            losses.append(-logprob / len(text.continuation))
        return losses


def _refuse_infinite(logprob: float, what: str) -> None:
    """Refuse a log-probability that isn't finite, before the result of its block is stored."""
    if not math.isfinite(logprob):
        raise ModelError(
            f"a log-probability of {what} is {logprob}; load the model with --dtype float32"
        )
