"""The systems of a comparison, run on one task's questions: base, routed, and its opponents.

Owns running a system on all questions and keeping its outcomes by question, and the next-token
loss on held-out texts under the same routes. Leaves who is compared to `lineup`, asking and
grading to `harness`, and what is made of the outcomes to `comparison`. Routers read the question
alone: one route holds for all of its options, and for the text that it stands in.

Axes: Q questions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drllm.cost import executions_by_phase, mean_executions
from drllm.evaluation.harness.asking import AskedTask, Graded
from drllm.evaluation.harness.model import RoutedLM
from drllm.evaluation.harness.scoring import Answer, PolicyOf
from drllm.evaluation.latency import device_clock
from drllm.evaluation.lineup import Drawn
from drllm.models.policies import FixedPolicy, FullPolicy, Policy
from drllm.paths import Decisions, Path

Answers = list[list[Answer | str]]
"""For each question, the answers to its requests."""


@dataclass(slots=True)
class System:
    """One system's outcomes, by question.

    Attributes:
        name: `base`, `routed`, or an opponent's.
        setting: Its depth in words; empty for the routers as they were trained.
        routes: For each draw, every question's decisions; empty where a path can't be expressed.
        correct: For each question, the score of its answer by the task's metric, averaged over
            the draws.
        metrics: For each question, all that the harness says of its answer, likewise.
        gold_logprob: For each question, the gold option's log-probability among the options, in
            nats, likewise; empty where answers are generated.
        text_loss: For each text, its mean next-token loss in nats a token, of the first draw.
        seconds: Wall time of the first draw over all questions, measured.
        executions: Mean a forward pass over questions and draws.
        decode_executions: Of answers that are generated, mean a token; None with options.
        unchanged: For each draw of permuted routes, the share of questions that kept their route.
        notes: What a reader should know about it beyond its description.
    """

    name: str
    setting: str = ""
    routes: list[list[Decisions]] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gold_logprob: list[float] = field(default_factory=list)
    text_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    executions: float = 0.0
    decode_executions: float | None = None
    unchanged: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_draws(self) -> int:
        """Draws that the outcomes are averaged over."""
        return max(1, len(self.routes))


class TaskRun:
    """All questions of a task, under one system after another.

    Args:
        lm: The routed model in the harness.
        asked: The questions.
        num_texts: Of how many of them, from the first, the text's loss is read.
    """

    def __init__(self, lm: RoutedLM, asked: AskedTask, num_texts: int) -> None:
        self.lm = lm
        self.asked = asked
        self._places = {key: place for place, key in enumerate(asked.keys)}
        self._clock = device_clock(lm.device)
        self._requests = [] if not asked.has_options else asked.requests()
        self._flat = [request for requests in self._requests for request in requests]
        if self._requests:  # whatever the first pass sets up would count as time of the base model
            self.lm.scorer.score(self._requests[0], lambda _keys: FullPolicy())
        self._texts = [asked.text(place) for place in range(min(num_texts, len(asked.keys)))]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.lm.routed.num_layers

    def by_policy(self, name: str, policy: Policy, setting: str = "", note: str = "") -> System:
        """Run a system that decides prompt by prompt, or the same for all."""
        started = self._clock()
        answers, routes = self._ask(lambda _keys: policy)
        seconds = self._clock() - started
        return self._system(name, setting, answers, routes, seconds, note)

    def base(self) -> System:
        """Run the base model: every layer once."""
        return self.by_policy("base", FullPolicy())

    def opponent(self, name: str, drawn: Sequence[Drawn], setting: str = "") -> System:
        """Run an opponent.

        Args:
            name: Its name.
            drawn: How it decides; several draws of plans, else one.
            setting: Of the routed model that it is compared with, in words.
        """
        first = drawn[0]
        if first.policy is not None:
            return self.by_policy(name, first.policy, setting, first.note)
        if first.path is not None:
            return self._along(name, first.path, setting, first.note)
        plans = [draw.plan for draw in drawn if draw.plan is not None]
        started = self._clock()
        answers, routes = self._ask(self._following(plans[0]))
        seconds = self._clock() - started
        system = self._system(name, setting, answers, routes, seconds, first.note)
        for plan, more in zip(plans[1:], self._ask_plans(plans[1:]), strict=True):
            self._add_draw(system, plan, self.asked.grade(more))
        return system

    # --- asking ---

    def _ask(self, policy_of: PolicyOf) -> tuple[Answers, Tensor]:
        """Ask all questions; return their answers and routes `[Q, L]`."""
        if self.asked.has_options:
            scored = self.lm.scorer.score(self._flat, policy_of)
            by_key = scored.routes
            answers = self._by_question(scored.answers)
        else:
            texts = self._generated(policy_of)
            answers = [[text] for text in texts]
            by_key = {
                key: self.lm.generated_routes[prompt]
                for key, prompt in zip(self.asked.keys, self.asked.prompts(), strict=True)
            }
        return answers, torch.tensor([by_key[key] for key in self.asked.keys])

    def _generated(self, policy_of: PolicyOf) -> list[str]:
        keys = dict(zip(self.asked.prompts(), self.asked.keys, strict=True))
        instances = [instances[0] for instances in self.asked.instances]
        with self.lm.deciding(lambda prompts: policy_of([keys[prompt] for prompt in prompts])):
            return self.lm.generate_until(instances, disable_tqdm=True)

    def _ask_plans(self, plans: Sequence[Tensor]) -> list[Answers]:
        """Ask all questions under several plans `[Q, L]`, what options have in common run once."""
        if not plans:
            return []
        if not self.asked.has_options:
            return [self._ask(self._following(plan))[0] for plan in plans]
        scored = self.lm.scorer.score_plans(self._flat, [self._by_key(plan) for plan in plans])
        return [self._by_question(each.answers) for each in scored]

    def _by_question(self, answers: Sequence[Answer]) -> Answers:
        given = iter(answers)
        return [[next(given) for _ in requests] for requests in self._requests]

    def _by_key(self, plan: Tensor) -> dict[object, Decisions]:
        return dict(zip(self.asked.keys, map(tuple, plan.tolist()), strict=True))

    def _following(self, plan: Tensor) -> PolicyOf:
        def policy_of(keys: Sequence[object]) -> Policy:
            rows = [self._places[key] for key in keys]  # type: ignore[index]
            return FixedPolicy(plan[rows], self.num_layers)

        return policy_of

    # --- keeping ---

    def _system(
        self,
        name: str,
        setting: str,
        answers: Answers,
        routes: Tensor,
        seconds: float,
        note: str,
    ) -> System:
        system = System(name, setting, seconds=seconds, notes=[note] if note else [])
        self._add_draw(system, routes, self.asked.grade(answers))
        texts = list(self._by_key(routes).items())[: len(self._texts)]
        [scored] = self.lm.scorer.score_plans(self._texts, [dict(texts)])
        system.text_loss = self._losses(scored.answers)
        if not self.asked.has_options:
            tokens = [
                max(1, len(self.lm.tok_encode(str(answer), add_special_tokens=False)))
                for [answer] in answers
            ]
            system.decode_executions = executions_by_phase(routes.tolist(), tokens).decode
        return system

    def _along(self, name: str, path: Path, setting: str, note: str) -> System:
        started = self._clock()
        answers = self.lm.scorer.score_path(self._flat, path)
        seconds = self._clock() - started
        system = System(name, setting, seconds=seconds, notes=[note] if note else [])
        _keep(system, self.asked.grade(self._by_question(answers)), 0)
        system.executions = float(len(path))
        system.text_loss = self._losses(self.lm.scorer.score_path(self._texts, path))
        return system

    def _losses(self, answers: Sequence[Answer]) -> list[float]:
        return [
            -logprob / len(text.continuation)
            for text, (logprob, _) in zip(self._texts, answers, strict=True)
        ]

    def _add_draw(self, system: System, routes: Tensor, graded: Sequence[Graded]) -> None:
        """Add one draw's outcomes to a system, keeping the mean over its draws."""
        before = len(system.routes)
        _keep(system, graded, before)
        system.routes.append([tuple(row) for row in routes.tolist()])
        executions = mean_executions(system.routes[-1])
        system.executions = (system.executions * before + executions) / (before + 1)


def _keep(system: System, graded: Sequence[Graded], before: int) -> None:
    """Average a draw's grades into what a system has of the draws before."""
    correct = [each.score for each in graded]
    gold = [each.gold_logprob for each in graded if each.gold_logprob is not None]
    if not before:
        system.correct, system.gold_logprob = correct, gold
        system.metrics = [dict(each.metrics) for each in graded]
        return
    for values, new in ((system.correct, correct), (system.gold_logprob, gold)):
        for place, value in enumerate(new):
            values[place] = (values[place] * before + value) / (before + 1)
    for kept, each in zip(system.metrics, graded, strict=True):
        for metric, value in each.metrics.items():
            kept[metric] = (kept[metric] * before + value) / (before + 1)
