"""What is run for a certified choice: every depth on the questions and texts that it is made on.

The rule is `statistics.non_inferiority`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from drllm.config import EvaluateConfig
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import AskedTask
from drllm.evaluation.questions import chosen_on
from drllm.evaluation.systems import Run, SystemRun, TaskRun
from drllm.models.routing.policies import FullPolicy, Policy
from drllm.statistics.non_inferiority import Choice, Limits, choose, confirm
from drllm.statistics.paired import Outcomes
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
    once: Callable[[str, Run], SystemRun]

    def num_systems(self, num_depths: int) -> int:
        """Return how many systems are run for a task at most, given the depths of the curve."""
        tested = 2 if self.worked is not None else 0
        return (1 + num_depths) * (1 if self.worked is None else 2) + tested

    def of_task(
        self,
        source: Task,
        systems: Sequence[SystemRun],
        policies: Mapping[str, Policy],
        chance: float,
    ) -> Choice:
        """Choose a depth on one split, and test it once on the one that is evaluated.

        Args:
            source: The task whose questions it is chosen on.
            systems: On the evaluated questions: base first, and the routed model at every depth.
            policies: The routed model's at each depth, by the depth in words.
            chance: Accuracy of guessing on the evaluated questions.
        """
        config, worked = self.config, self.worked
        assert config.epsilon is not None
        split = chosen_on(source, config)
        asked = self.asked(source, split, config.limit_of(source.name), "")
        run = TaskRun(self.lm, asked, config.num_texts)
        found = [self.once(f"{source.name}: base on {split}", run.base)]
        for setting, policy in policies.items():
            name = f"{source.name}: routed at {setting} on {split}"
            found.append(self.once(name, partial(run.by_policy, "routed", policy, setting)))
        base, *settings = self._with_worked(
            source, found, policies, "" if worked is None else chosen_on(worked, config)
        )
        choice = choose(
            base,
            settings,
            Limits(
                epsilon=config.epsilon,
                max_loss_increase=config.max_loss_increase or MAX_LOSS_INCREASE,
            ),
            chance=asked.written.chance or 0.0,
            seed=config.seed,
            worked_answers=None if worked is None else worked.name,
            chosen_on=f"{source.name} ({split})",
        )
        if choice.chosen is None:
            return choice
        name = choice.chosen.name
        [ours] = (each for each in systems if each.name == "routed" and each.title == name)
        base, tested = self._with_worked(
            source,
            [systems[0], ours],
            {ours.setting: policies[ours.setting]},
            "" if worked is None else config.split_of(worked.name),
        )
        return confirm(choice, base, tested, chance=chance, seed=config.seed)

    def _with_worked(
        self,
        source: Task,
        systems: Sequence[SystemRun],
        policies: Mapping[str, Policy],
        split: str,
    ) -> list[Outcomes]:
        """Return outcomes that know their loss on worked answers, where it is asked for.

        Args:
            source: The task on whose questions depths were found.
            systems: Base, then one for each policy.
            policies: By setting.
            split: Of the worked answers.
        """
        outcomes = [system.outcomes for system in systems]
        if self.worked is None:
            return outcomes
        asked = self.asked(self.worked, split, self.config.num_texts, WORKED)
        run = TaskRun(self.lm, asked, self.config.num_texts)
        where = f"on worked answers of {self.worked.name}, {split}"
        read = [self.once(f"base {where}", partial(run.texts, "base", FullPolicy()))]
        for setting, policy in policies.items():
            name = f"{source.name}: routed at {setting} {where}"
            read.append(self.once(name, partial(run.texts, "routed", policy, setting)))
        return [
            dataclasses.replace(outcome, worked_loss=each.text_loss)
            for outcome, each in zip(outcomes, read, strict=True)
        ]
