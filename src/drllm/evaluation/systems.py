"""The systems of a comparison, run on the same questions: base, routed, and its opponents.

Owns running every system on a task's questions and keeping the outcomes by question. Leaves how
an opponent's decisions are drawn to `opponents`, the forward passes to `models.scoring`, and what
is made of the outcomes to `multiple_choice`. The routers read the question alone: one route per
question holds for all of its options.

Axes: Q questions, L layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from drllm.config import EvaluateConfig
from drllm.cost import mean_executions
from drllm.errors import ModelError
from drllm.evaluation.opponents import (
    expected_executions,
    label_frequency,
    permuted,
    random_like,
    share_unchanged,
    tilted,
)
from drllm.models.policies import FixedPolicy, Policy, RouterPolicy
from drllm.models.prompts import render
from drllm.models.routed import RoutedModel
from drllm.models.scoring import ChoiceBatch, tokenised
from drllm.paths import Decisions
from drllm.tasks.base import OPTIONS_REWARD, Example, Prompt, Task
from drllm.tasks.grading import score_choices

Decide: TypeAlias = Callable[[list[int]], Policy]
"""Gives the policy that decides for the questions at some places."""

OnProgress: TypeAlias = Callable[[float, int, str], None]
"""Called with passes done, passes in all, and what is being run."""

STATE_CACHE_GB = 2.0

DESCRIPTIONS = {
    "base": "the untouched model: every layer once",
    "routed": "the routers decide, reading the question alone",
    "permuted routes": "each question runs the route of another question",
    "random decisions": "each question's skips and repeats at random layers",
    "label frequency": "each layer's decision drawn as often as it was the target in training, "
    "tilted to the routed model's executions",
}
UNREACHED = ", as near as the labels allow"
TOLERANCE = 1e-6
"""How far expected executions may lie from those wanted and still be called equal."""


@dataclass(slots=True)
class System:
    """One system's outcomes, by question.

    Attributes:
        name: As in `DESCRIPTIONS`.
        decisions: For each draw, every question's decisions.
        correct: For each question, the share of draws that answered right.
        gold_logprob: For each question, the gold option's log-probability among the options, in
            nats, averaged over the draws.
        seconds: Wall time of one draw over all questions, prompt and options, measured.
        unchanged: For each draw of permuted routes, the share of questions that kept their route.
        note: What a reader should know about it beyond the description.
    """

    name: str
    decisions: list[list[Decisions]] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)
    gold_logprob: list[float] = field(default_factory=list)
    seconds: float = 0.0
    unchanged: list[float] = field(default_factory=list)
    note: str = ""


class QuestionRun:
    """All questions of a task, in batches of like length, under one system after another."""

    def __init__(self, routed: RoutedModel, prompts: Sequence[Prompt], batch_size: int) -> None:
        self.routed = routed
        self.prompts = list(prompts)
        tokens = [
            tokenised(
                routed.tokenizer, render(routed.tokenizer, p.text, chat=p.chat), p.continuations
            )
            for p in prompts
        ]
        lengths = [len(q.context) + sum(len(c) - 1 for c in q.continuations) for q in tokens]
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        self.places = [
            order[start : start + batch_size] for start in range(0, len(order), batch_size)
        ]
        self.batches = [
            ChoiceBatch(routed, [tokens[place] for place in places], STATE_CACHE_GB)
            for places in self.places
        ]

    def warm_up(self, policy: Policy) -> None:
        """Run the longest batch once, base and routed, and forget what came out.

        Whatever is set up by the first passes (threads, memory, kernels) would else be counted
        as time of the system that happens to run first.
        """
        self.batches[-1].base_scores()
        self.batches[-1].routed_scores(policy)

    def alone(self, system: System, decide: Decide | None) -> Tensor:
        """Run one draw of a system by itself, measured, and return its routes `[Q, L]`.

        Args:
            system: Gets the draw's outcomes and seconds.
            decide: Gives the policy for the questions at some places; None runs the base model.
        """
        L = self.routed.num_layers
        scores: dict[int, tuple[float, ...]] = {}
        routes = torch.ones(len(self.prompts), L, dtype=torch.long)
        device = self.routed.model.device
        started = _now(device)
        for places, batch in zip(self.places, self.batches, strict=True):
            if decide is None:
                found = batch.base_scores()
            else:
                found, route = batch.routed_scores(decide(places))
                routes[places] = route
            sums = [score.logprobs for score in found]
            scores.update(zip(places, sums, strict=True))
        system.seconds = _now(device) - started
        self.add_draw(system, routes, [scores[place] for place in range(len(self.prompts))])
        return routes

    def shared_scores(self, plans: Sequence[Tensor]) -> list[list[tuple[float, ...]]]:
        """Score several draws at once, prefixes shared; one list of sums per draw."""
        draws: list[list[tuple[float, ...]]] = [[()] * len(self.prompts) for _ in plans]
        for places, batch in zip(self.places, self.batches, strict=True):
            wanted = [
                (draw, place, (row, tuple(plan[place].tolist())))
                for draw, plan in enumerate(plans)
                for row, place in enumerate(places)
            ]
            sums = batch.logprobs([pair for _, _, pair in wanted])
            for (draw, place, _), value in zip(wanted, sums, strict=True):
                draws[draw][place] = value
            batch.forget()
        return draws

    def add_draw(self, system: System, routes: Tensor, scores: Sequence[tuple[float, ...]]) -> None:
        """Add one draw's outcomes to a system, keeping the mean over its draws.

        Raises:
            ModelError: Log-probabilities that are not finite, which can't be compared.
        """
        for prompt, sums in zip(self.prompts, scores, strict=True):
            if not all(math.isfinite(value) for value in sums):
                raise ModelError(
                    f"{system.name} gives log-probabilities that are not finite on "
                    f"{prompt.text!r}; load the model with --dtype float32"
                )
        before = len(system.decisions)
        correct = [score_choices(s, p)[0] for s, p in zip(scores, self.prompts, strict=True)]
        gold = [_gold_logprob(s, p) for s, p in zip(scores, self.prompts, strict=True)]
        if not before:
            system.correct, system.gold_logprob = correct, gold
        else:
            for values, new in ((system.correct, correct), (system.gold_logprob, gold)):
                for place, value in enumerate(new):
                    values[place] = (values[place] * before + value) / (before + 1)
        system.decisions.append([tuple(row) for row in routes.tolist()])


def _now(device: torch.device) -> float:
    """Return the time when the device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _follow(plan: Tensor, num_layers: int) -> Decide:
    return lambda places: FixedPolicy(plan[places], num_layers)


def _gold_logprob(sums: Sequence[float], prompt: Prompt) -> float:
    assert prompt.gold is not None
    highest = max(sums)
    total = highest + math.log(sum(math.exp(value - highest) for value in sums))
    return sums[prompt.gold] - total


def run_systems(
    routed: RoutedModel,
    task: Task,
    examples: Sequence[Example],
    config: EvaluateConfig,
    on_progress: OnProgress | None,
) -> list[System]:
    """Run every system on a task's questions.

    Args:
        routed: The model with its routers.
        task: The questions' task.
        examples: The questions, all with options.
        config: Draws, batch size, seed.
        on_progress: See `OnProgress`.

    Returns:
        Base, routed, and the opponents, in the order of `DESCRIPTIONS`.
    """
    prompts = [task.prompt(example, OPTIONS_REWARD) for example in examples]
    run = QuestionRun(routed, prompts, config.batch_size)
    passes = len(DESCRIPTIONS) + 3 * (config.num_random_draws - 1)
    done = 0

    def report(name: str, finished: int) -> None:
        nonlocal done
        done += finished
        if on_progress is not None:
            on_progress(done, passes, f"{task.name}: {name}")

    report("base", 0)
    assert routed.routers is not None
    policy = RouterPolicy(routed.routers)
    run.warm_up(policy)
    base = System("base")
    run.alone(base, None)
    report("routed", 1)
    system = System("routed")
    routes = run.alone(system, lambda _places: policy)
    report("opponents", 1)
    systems = [base, system]
    wanted = mean_executions(system.decisions[0])
    frequencies = tilted(routed.routers.config.label_counts, wanted)
    draws: dict[str, Callable[[torch.Generator], Tensor]] = {
        "permuted routes": lambda g: permuted(routes, g),
        "random decisions": lambda g: random_like(routes, g),
        "label frequency": lambda g: label_frequency(frequencies, len(examples), g),
    }
    for name, draw in draws.items():
        opponent = System(name)
        generator = torch.Generator().manual_seed(config.seed)
        plans = [draw(generator) for _ in range(config.num_random_draws)]
        if name == "permuted routes":
            opponent.unchanged = [share_unchanged(routes, plan) for plan in plans]
        if name == "label frequency":
            opponent.note = _unreached(expected_executions(frequencies), wanted)
        run.alone(opponent, _follow(plans[0], routed.num_layers))
        report(name, 1)
        for plan, scores in zip(plans[1:], run.shared_scores(plans[1:]), strict=True):
            run.add_draw(opponent, plan, scores)
        report(name, len(plans) - 1)
        systems.append(opponent)
    return systems


def _unreached(expected: float, wanted: float) -> str:
    """Say that the labels can't be drawn at the executions wanted; empty where they can."""
    if abs(expected - wanted) <= TOLERANCE:
        return ""
    return (
        f"The label-frequency opponent is not at equal executions: whatever the tilt, the labels "
        f"give no nearer mean than {expected:.2f} where the routed model has {wanted:.2f}."
    )
