"""What is run for a certified choice: every depth on the questions and texts that it is made on.

Owns which of these are for choosing and which for the one test of what was chosen. Leaves the rule
to `certified`, running a system to `systems`, and the systems on the evaluated split to
`comparison`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from drllm.config import EvaluateConfig
from drllm.evaluation.curve import Point
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import AskedTask
from drllm.evaluation.non_inferiority import Choice, Limits, choose, confirm
from drllm.evaluation.partial import Run
from drllm.evaluation.results import point_of
from drllm.evaluation.sources import chosen_on
from drllm.evaluation.systems import System, TaskRun
from drllm.models.routing.policies import FullPolicy, Policy, RouterPolicy
from drllm.tasks.base import Task

MAX_LOSS_INCREASE = 0.05
"""Nats a token that the next-token loss may rise, unless another limit is given."""
WORKED = "worked-"
"""Beginning of the names of task folders with worked answers."""


@dataclass(frozen=True)
class Choosing:
    """The choices of one evaluation.

    Attributes:
        lm: The routed model in the harness.
        config: With `epsilon`.
        worked: The task whose worked answers are read too; None where none are asked for.
        asked: Gives the questions of a task: of a split, at most so many, and the beginning of
            the name of the folder that they are asked by way of.
        once: Runs a system by a name of its own, unless that was done before.
    """

    lm: RoutedLM
    config: EvaluateConfig
    worked: Task | None
    asked: Callable[[Task, str, int | None, str], AskedTask]
    once: Callable[[str, Run], System]

    def num_systems(self, num_depths: int) -> int:
        """Return how many systems are run for a task at most, given the depths of the curve."""
        tested = 2 if self.worked is not None else 0
        return (1 + num_depths) * (1 if self.worked is None else 2) + tested

    def of_task(
        self, source: Task, systems: Sequence[System], biases: Mapping[str, float], chance: float
    ) -> Choice:
        """Choose a depth on one split, and test it once on the one that is evaluated.

        Args:
            source: The task whose questions it is chosen on.
            systems: On the evaluated questions: base first, and the routed model at every depth.
            biases: Each depth in words, and the bias that gives it.
            chance: Accuracy of guessing on the evaluated questions.
        """
        config = self.config
        assert config.epsilon is not None
        limits = Limits(
            epsilon=config.epsilon, max_loss_increase=config.max_loss_increase or MAX_LOSS_INCREASE
        )
        routers = self.lm.routed.routers
        assert routers is not None
        policies: dict[str, Policy] = {
            setting: RouterPolicy(routers, depth_bias=bias) for setting, bias in biases.items()
        }
        found, chance_there = self._on_questions(source, policies)
        base, *points = self._with_worked(
            source, found, policies, lambda worked: chosen_on(worked, config)
        )
        choice = choose(
            base,
            points,
            limits,
            chance=chance_there,
            seed=config.seed,
            worked_answers=None if self.worked is None else self.worked.name,
            chosen_on=f"{source.name} ({chosen_on(source, config)})",
        )
        if choice.chosen is None:
            return choice
        [tested] = (
            system
            for system in systems
            if system.name == "routed" and point_of(system).name == choice.chosen.name
        )
        base, point = self._with_worked(
            source,
            [systems[0], tested],
            {tested.setting: policies[tested.setting]},
            lambda worked: config.split_of(worked.name),
        )
        return confirm(choice, base, point, chance=chance, seed=config.seed)

    def _on_questions(
        self, source: Task, policies: Mapping[str, Policy]
    ) -> tuple[list[System], float]:
        """Run base and every depth where settings are chosen; return the chance of guessing too."""
        split = chosen_on(source, self.config)
        asked = self.asked(source, split, self.config.limit_of(source.name), "")
        run = TaskRun(self.lm, asked, self.config.num_texts)
        systems = [self.once(f"{source.name}: base on {split}", run.base)]
        for setting, policy in policies.items():
            name = f"{source.name}: routed at {setting} on {split}"
            systems.append(self.once(name, partial(run.by_policy, "routed", policy, setting)))
        return systems, asked.written.chance or 0.0

    def _with_worked(
        self,
        source: Task,
        systems: Sequence[System],
        policies: Mapping[str, Policy],
        split_of: Callable[[Task], str],
    ) -> list[Point]:
        """Return systems as points that know their loss on worked answers, where it is asked for.

        Args:
            source: The task on whose questions depths were found.
            systems: Base, then one for each policy.
            policies: By setting.
            split_of: Gives the split of the worked answers.
        """
        points = [point_of(system) for system in systems]
        if self.worked is None:
            return points
        split = split_of(self.worked)
        asked = self.asked(self.worked, split, self.config.num_texts, WORKED)
        run = TaskRun(self.lm, asked, self.config.num_texts)
        where = f"on worked answers of {self.worked.name}, {split}"
        read = [self.once(f"base {where}", partial(run.texts, "base", FullPolicy()))]
        for setting, policy in policies.items():
            name = f"{source.name}: routed at {setting} {where}"
            read.append(self.once(name, partial(run.texts, "routed", policy, setting)))
        return [
            replace(point, outcomes=replace(point.outcomes, worked_loss=each.text_loss))
            for point, each in zip(points, read, strict=True)
        ]
