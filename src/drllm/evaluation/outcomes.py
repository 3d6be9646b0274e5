"""The outcomes of the systems on a task, question by question: `SystemRun` and `TaskRuns`.

Axes: Q questions, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from msgspec import field

from drllm.config import EvaluateConfig
from drllm.cost import decode_executions, mean_executions, mean_skips, path_executions, path_skips
from drllm.evaluation.answers import Answers, BatchResult
from drllm.evaluation.flops import ModelShape
from drllm.evaluation.lm_eval.grading import choose_answer, compute_gold_logprob, grade_answers
from drllm.evaluation.lm_eval.task import RenderedTask
from drllm.paths import Decisions, StaticPath
from drllm.statistics.intervals import accuracy_interval
from drllm.statistics.paired import Outcomes


class SystemRun(Outcomes, kw_only=True):
    """One system's outcomes on a task.

    If there are several draws, `correct`, `gold_logprob`, `metrics` and `executions` are means over
    them. `text_loss`, `answers`, `seconds` and `decode_executions` come from the first draw.

    Attributes:
        setting: The depth in words; empty for the depth of training.
        path: The static path that the system runs; None for other systems.
        routes: For each draw the questions' decisions; empty for a static path.
        answers: The chosen options, or the generated texts.
        metrics: Name of a metric of the harness → each question's score.
        seconds: Wall time, added up over the blocks.
        decode_executions: Mean executions for a generated token. None if options are scored, or if
            no answer is longer than one token.
        notes: What a reader must know about the system, as parts of sentences.
    """

    executions: float = 0.0
    correct: Sequence[float] = ()
    setting: str = ""
    path: StaticPath | None = None
    routes: list[list[Decisions]] = field(default_factory=list)
    answers: list[int | str] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    decode_executions: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The system's name with its setting."""
        if not self.setting:
            return self.name
        return f"{self.name}, {self.setting}"


def add_grades(run: SystemRun, rendered: RenderedTask, answers: Sequence[Answers]) -> None:
    """Let the harness grade a system's answers, and set the scores and the answers.

    Args:
        run: The system, whose fields are set.
        rendered: The questions.
        answers: For each draw the answers to all questions.
    """
    grades_by_draw = [grade_answers(rendered, draw) for draw in answers]
    for metric in grades_by_draw[0][0]:
        scores = [[grades[metric] for grades in draw] for draw in grades_by_draw]
        run.metrics[metric] = mean_over_draws(scores)
    run.correct = run.metrics[rendered.task.metric]
    for place, question_answers in enumerate(answers[0]):
        run.answers.append(choose_answer(rendered, place, question_answers))
    if rendered.has_options:
        logprobs_by_draw = []
        for draw in answers:
            logprobs = []
            for place, question_answers in enumerate(draw):
                logprobs.append(compute_gold_logprob(rendered, place, question_answers))
            logprobs_by_draw.append(logprobs)
        run.gold_logprob = mean_over_draws(logprobs_by_draw)


def add_executions(run: SystemRun, num_layers: int, bypass_cost: float = 0.0) -> None:
    """Set the mean executions over questions and draws, with what the bypass costs.

    Args:
        run: The system, whose executions are set.
        num_layers: The number of layers of the model.
        bypass_cost: What a skipped layer costs, in layer equivalents.
    """
    if run.path is not None:
        run.executions = path_executions(run.path)
        run.executions += bypass_cost * path_skips(run.path, num_layers)
        return
    by_draw = [
        [mean_executions(routes) + bypass_cost * mean_skips(routes)] for routes in run.routes
    ]
    [run.executions] = mean_over_draws(by_draw)


def count_decode_executions(
    run: SystemRun, result: BatchResult, num_tokens: Sequence[int]
) -> float | None:
    """Return the mean executions for a generated token, in the first draw.

    Args:
        run: The system.
        result: Its answers to all questions.
        num_tokens: The number of tokens of each answer, at least 1.
    """
    if run.path is None:
        return decode_executions(result.routes[0], num_tokens)
    if max(num_tokens) == 1:  # the pass that reads the prompt gives this token
        return None
    return run.executions


def average_runs(systems: Sequence[SystemRun], name: str) -> SystemRun:
    """Return the mean outcomes of several systems on the same questions, such as those of seeds."""
    means: dict[str, Any] = {}
    for quantity in ("correct", "gold_logprob", "text_loss", "seconds", "executions"):
        values = [getattr(system, quantity) for system in systems]
        means[quantity] = np.mean(values, axis=0).tolist()
    metrics = {}
    for metric in systems[0].metrics:
        metrics[metric] = mean_over_draws([system.metrics[metric] for system in systems])
    return SystemRun(name=name, metrics=metrics, **means)


def mean_over_draws(draws: Sequence[Sequence[float]]) -> list[float]:
    """Average values `[draw][question]` over the draws; return a mean for each question."""
    means: list[float] = np.mean(draws, axis=0).tolist()
    return means


@dataclass(frozen=True)
class SeedRuns:
    """The outcomes of routers of several seeds at one depth.

    Attributes:
        routed: The routed model of each seed.
        permuted: The permuted routes of each seed; empty if they didn't run.
    """

    routed: Sequence[SystemRun]
    permuted: Sequence[SystemRun]


@dataclass(frozen=True)
class TaskRuns:
    """The outcomes of every system on one task.

    Attributes:
        rendered: The task's questions.
        systems: Base, then the routed model and its baselines at each depth, then the paths.
            Without routers there are only base and paths.
        notes: Notes on the task and on systems that didn't run, for the findings.
        config: The settings.
        num_layers: The number of layers of the model.
        shape: The model's shape, or the reason why its cost can't be derived.
        seeds: The outcomes of several seeds by depth; empty with a single seed.
    """

    rendered: RenderedTask
    systems: Sequence[SystemRun]
    notes: Sequence[str]
    config: EvaluateConfig
    num_layers: int
    shape: ModelShape | str
    seeds: Sequence[SeedRuns] = ()

    @property
    def base(self) -> SystemRun:
        """The base model, with which all systems are compared."""
        return self.systems[0]

    @property
    def systems_as_trained(self) -> list[SystemRun]:
        """The systems at the depth that the routers were trained for, base and routed first."""
        return [system for system in self.systems if not system.setting]

    @property
    def routed(self) -> SystemRun:
        """The routed model at the depth that it was trained for, in an evaluation with routers."""
        return self.systems_as_trained[1]

    @cached_property
    def above_chance(self) -> bool:
        """Whether base is shown to be better than guessing; otherwise nothing is claimed."""
        lowest, _ = accuracy_interval(self.base.correct, self.config.seed)
        return lowest > self.rendered.task.chance
