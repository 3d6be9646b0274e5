"""Runs systems on all questions and texts of a task, in blocks, and grades the answers.

A block is kept among the steps of its system until the result of the system is kept.

Axes: Q questions, L layers.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lm_eval.api.instance import Instance
from torch import Tensor

from drllm.config import EvaluateConfig
from drllm.evaluation.answers import (
    BatchResult,
    Draw,
    ModelSettings,
    QuestionBlock,
    QuestionRunner,
    RoutersDecide,
    TextBlock,
    TextScorer,
)
from drllm.evaluation.flops import count_bypass_cost
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.scoring import HarnessRequest
from drllm.evaluation.lm_eval.task import RenderedTask
from drllm.evaluation.outcomes import (
    SystemRun,
    add_executions,
    add_grades,
    count_decode_executions,
)
from drllm.evaluation.plan import System, TaskPlan, TaskQuestions
from drllm.evaluation.progress import EvaluationProgress
from drllm.paths import StaticPath
from drllm.work.run import Block, BlockFunction, Executor, Keep, run
from drllm.work.store import ResultStore

D = TypeVar("D")
R = TypeVar("R")


@dataclass(frozen=True)
class Runner:
    """Runs the blocks of an evaluation.

    Attributes:
        executor: Runs blocks, in this process or on Ray.
        settings: What the workers need beside the base model.
        store: Keeps the results of systems and blocks.
        progress: Counts the work.
        lm: The model in this process. It may be without weights, since nothing is run.
        config: The settings of the evaluation.
    """

    executor: Executor
    settings: ModelSettings
    store: ResultStore
    progress: EvaluationProgress
    lm: RoutedLM
    config: EvaluateConfig

    def run(
        self, blocks: Sequence[Block[D]], function: BlockFunction[D, R], keep: Keep[R]
    ) -> list[R]:
        """Return the results of blocks, and report them."""
        return run(
            blocks,
            function,
            self.executor,
            keep=keep,
            on_result=self.progress.finish_block,
            on_step=self.progress.report_step,
        )


@dataclass(frozen=True)
class ReadySystem:
    """A system that has everything that it needs first.

    Attributes:
        system: The system.
        draws: How it decides in each draw. A tensor has decisions for each question, `[Q, L]`. A
            system with several draws has such decisions in all of them.
        note: Further information for the reader of the results, as part of a sentence.
    """

    system: System
    draws: Sequence[Tensor | Draw]
    note: str = ""

    @property
    def key(self) -> str:
        """The system's name among all systems of the evaluation."""
        return self.system.key

    @property
    def path(self) -> StaticPath | None:
        """The static path that the system runs; None if it decides question by question."""
        first = self.draws[0]
        if isinstance(first, StaticPath):
            return first
        return None


def run_systems(
    plan: TaskPlan, ready: Sequence[ReadySystem], runs: Mapping[str, SystemRun], runner: Runner
) -> dict[str, SystemRun]:
    """Run systems on all questions and texts; return the results by the system's key.

    Args:
        plan: The plan of the task.
        ready: The systems.
        runs: Results that are there already; their systems aren't run.
        runner: Runs the blocks.
    """
    missing = [system for system in ready if system.key not in runs]
    answers = answer_questions(plan.questions, missing, runner)
    losses = score_texts(plan.questions, missing, answers, runner)
    results = {}
    kept = runner.store.of(SystemRun)
    for system in missing:
        key = system.key
        system_run = grade_system(system, plan.questions, answers[key], losses[key], runner.lm)
        results[key] = kept.put(key, system_run)
    return results


def answer_questions(
    questions: TaskQuestions, systems: Sequence[ReadySystem], runner: Runner
) -> dict[str, BatchResult]:
    """Return the answers of each system to all questions, by the system's key."""
    blocks = []
    system_keys = {}  # by the key of a block
    for system in systems:
        for block in make_question_blocks(questions, system):
            blocks.append(block)
            system_keys[block.key] = system.key
    warm_up = questions.requests[0] if questions.requests else ()
    function = QuestionRunner(runner.settings, warm_up)
    results = runner.run(blocks, function, SystemSteps(runner.store, system_keys, BatchResult))
    by_system: dict[str, list[BatchResult]] = {system.key: [] for system in systems}
    for block, result in zip(blocks, results, strict=True):
        by_system[system_keys[block.key]].append(result)
    return {key: join_blocks(questions.blocks, parts) for key, parts in by_system.items()}


def make_question_blocks(
    questions: TaskQuestions, system: ReadySystem
) -> Iterator[Block[QuestionBlock]]:
    """Yield the blocks of a system. Their keys contain the decisions, as far as they are known."""
    rendered = questions.rendered
    ids = rendered.ids
    for number, places in enumerate(questions.blocks):
        requests: list[Sequence[HarnessRequest]] = []
        prompts: list[Instance] = []
        if rendered.has_options:
            requests = [questions.requests[place] for place in places]
        else:
            prompts = [make_prompt(rendered, place) for place in places]
        draws = [select_questions(draw, places) for draw in system.draws]
        block = QuestionBlock(
            system=system.key,
            ids=[ids[place] for place in places],
            keys=[rendered.keys[place] for place in places],
            requests=requests,
            prompts=prompts,
            draws=draws,
        )
        decisions = describe_draws(draws, system.note)
        key = f"{system.key}: block {number} {json.dumps(decisions)}"
        size = len(draws) * sum(questions.lengths[place] for place in places)
        yield Block(key, block, size)


def make_prompt(rendered: RenderedTask, place: int) -> Instance:
    """Return the harness' request for the answer to a question, without the question's row."""
    [instance] = rendered.instances[place]
    return Instance(instance.request_type, {}, instance.arguments, instance.idx, instance.metadata)


def select_questions(draw: Tensor | Draw, places: Sequence[int]) -> Draw:
    """Return how a system decides on some of the questions."""
    if isinstance(draw, Tensor):
        return [tuple(decisions) for decisions in draw[list(places)].tolist()]
    return draw


def describe_draws(draws: Sequence[Draw], note: str) -> Any:
    """Return a block's decisions, the path's layers or the depth bias for the block's key.

    Other policies decide only when the block runs. Their note contains their setting.
    """
    decisions = [draw for draw in draws if isinstance(draw, list)]
    if decisions:
        return decisions
    first = draws[0]
    if isinstance(first, StaticPath):
        return first.layers
    if isinstance(first, RoutersDecide):
        return first.depth_bias
    return note


def score_texts(
    questions: TaskQuestions,
    systems: Sequence[ReadySystem],
    answers: Mapping[str, BatchResult],
    runner: Runner,
) -> dict[str, list[float]]:
    """Return the next-token losses of each system's first draw, by the system's key.

    All texts of a system are one block.
    """
    blocks = [make_text_block(questions, system, answers[system.key]) for system in systems]
    system_keys = {block.key: block.data.system for block in blocks}
    keep = SystemSteps(runner.store, system_keys, list[float])
    losses = runner.run(blocks, TextScorer(runner.settings), keep)
    return {block.data.system: loss for block, loss in zip(blocks, losses, strict=True)}


def make_text_block(
    questions: TaskQuestions, system: ReadySystem, result: BatchResult
) -> Block[TextBlock]:
    """Return the block of a system's texts, which run the routes of their questions."""
    path = system.path
    if path is not None:
        block = TextBlock(system.key, questions.texts, path)
        key = f"{system.key}: texts {json.dumps(path.layers)}"
    else:
        all_routes: dict[Any, Any] = dict(
            zip(questions.rendered.keys, result.routes[0], strict=True)
        )
        routes = {text.question: all_routes[text.question] for text in questions.texts}
        block = TextBlock(system.key, questions.texts, routes)
        key = f"{system.key}: texts {json.dumps(list(routes.values()))}"
    return Block(key, block, questions.num_text_tokens)


def grade_system(
    system: ReadySystem,
    questions: TaskQuestions,
    result: BatchResult,
    text_loss: Sequence[float],
    lm: RoutedLM,
) -> SystemRun:
    """Return the outcomes of a system on all questions and texts."""
    system_run = SystemRun(
        name=system.system.name,
        setting=system.system.setting,
        path=system.path,
        routes=result.routes,
        seconds=result.seconds,
        text_loss=text_loss,
    )
    if system.note:
        system_run.notes.append(system.note)
    add_grades(system_run, questions.rendered, result.answers)
    add_executions(system_run, lm.routed.num_layers, count_bypass_cost(lm.routed))
    if not questions.rendered.has_options:
        num_tokens = []
        for [answer] in result.answers[0]:
            tokens = lm.tok_encode(str(answer), add_special_tokens=False)
            num_tokens.append(max(1, len(tokens)))
        system_run.decode_executions = count_decode_executions(system_run, result, num_tokens)
    return system_run


def join_blocks(blocks: Sequence[Sequence[int]], results: Sequence[BatchResult]) -> BatchResult:
    """Join the results of all blocks into one, in the questions' order."""
    places = [place for block in blocks for place in block]
    return BatchResult(
        answers=_in_order(places, [result.answers for result in results]),
        routes=_in_order(places, [result.routes for result in results]),
        seconds=sum(result.seconds for result in results),
    )


def _in_order(places: Sequence[int], parts: Sequence[Sequence[list[Any]]]) -> list[list[Any]]:
    """Join values `[block][draw][question]` to `[draw][question]`, in the questions' order.

    Args:
        places: The places of the blocks' questions, one block after another.
        parts: The values of each block.
    """
    draws = []
    for blocks in zip(*parts, strict=True):  # the values of one draw, block by block
        values: list[Any] = [None] * len(places)
        for place, value in zip(places, itertools.chain(*blocks), strict=True):
            values[place] = value
        draws.append(values)
    return draws


@dataclass(frozen=True)
class SystemSteps(Generic[R]):
    """Keeps the blocks of several systems, each among the steps of its system.

    Attributes:
        store: The results of the evaluation.
        systems: Key of a block → key of its system.
        kind: The type of a result.
    """

    store: ResultStore
    systems: Mapping[str, str]
    kind: type[R]

    def get(self, key: str) -> R | None:
        """Return a block's result; None if it isn't there."""
        return self.store.within(self.systems[key]).get(key, self.kind)

    def put(self, key: str, result: R) -> R:
        """Keep a block's result; return it as a later run would read it."""
        return self.store.within(self.systems[key]).of(self.kind).put(key, result)

    def steps_of(self, key: str) -> None:
        """Return None: a block has no steps of its own."""
