"""The systems of a comparison, run on one task's questions: base, routed, and its baselines.

A system runs block by block and gives its outcomes by question, and the next-token loss on held-out
texts under the same routes. Routers read the question alone: one route holds for all of its
options, and for the text that it stands in.

Axes: Q questions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import msgspec
from torch import Tensor

from drllm.cost import decode_executions, mean_executions
from drllm.evaluation.baselines.base import Drawn
from drllm.evaluation.blocks import (
    LEAST_GENERATED,
    LEAST_SCORED,
    Answered,
    Answers,
    Block,
    Keep,
    blocks_of,
    joined,
    unkept,
)
from drllm.evaluation.latency import device_clock
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.requests import Request
from drllm.evaluation.lm_eval.scoring import Answer, PolicyOf
from drllm.evaluation.lm_eval.task import AskedTask, Graded, Key
from drllm.models.routing.policies import FixedPolicy, FullPolicy, Policy
from drllm.paths import Decisions, Path
from drllm.statistics.paired import Outcomes


class SystemRun(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One system's outcomes on a task, by question.

    Attributes:
        name: `base`, `routed`, or a baseline's.
        setting: Its depth in words; empty for the routers as they were trained.
        routes: For each draw, every question's decisions; empty where a path can't be expressed.
        correct: For each question, the score of its answer by the task's metric, averaged over
            the draws.
        metrics: For each question, all that the harness says of its answer, likewise.
        gold_logprob: For each question, the gold option's log-probability among the options, in
            nats, likewise; empty where answers are generated.
        text_loss: For each text, its mean next-token loss in nats a token, of the first draw.
        seconds: Wall time of the first draw, measured block by block and added up.
        executions: Mean a forward pass over questions and draws.
        decode_executions: Of answers that are generated, mean a token; None with options.
        unchanged: For each draw of permuted routes, the share of questions that kept their route.
        notes: What a reader should know about it beyond its description.
    """

    name: str
    setting: str = ""
    routes: list[list[Decisions]] = []
    correct: list[float] = []
    metrics: list[dict[str, float]] = []
    gold_logprob: list[float] = []
    text_loss: list[float] = []
    seconds: float = 0.0
    executions: float = 0.0
    decode_executions: float | None = None
    unchanged: list[float] = []
    notes: list[str] = []

    @property
    def title(self) -> str:
        """System and setting."""
        return f"{self.name}, {self.setting}" if self.setting else self.name

    @property
    def num_draws(self) -> int:
        """Draws that the outcomes are averaged over."""
        return max(1, len(self.routes))

    @property
    def outcomes(self) -> Outcomes:
        """What is compared of it."""
        return Outcomes(
            name=self.title,
            executions=self.executions,
            correct=self.correct,
            gold_logprob=self.gold_logprob,
            text_loss=self.text_loss,
        )


class Run(Protocol):
    """Runs a system; a protocol, so that `keep` comes by its name."""

    def __call__(self, *, keep: Keep) -> SystemRun:
        """Run the system, its blocks by way of `keep`."""


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
        self._blocks = self._in_blocks()
        if self._requests:  # whatever the first pass sets up would count as time of the base model
            self.lm.scorer.score(self._requests[0], lambda _keys: FullPolicy())
        self._texts = [asked.text(place) for place in range(min(num_texts, len(asked.keys)))]

    def _in_blocks(self) -> list[Block]:
        """Return the questions in blocks, of whole batches and of like length."""
        scorer = self.lm.scorer
        size = scorer.batch_size if isinstance(scorer.batch_size, int) else scorer.max_batch_size
        if not self.asked.has_options:
            lengths = [len(self.lm.tok_encode(prompt)) for prompt in self.asked.prompts()]
            return blocks_of(lengths, LEAST_GENERATED, size)
        lengths = [
            len(requests[0].context) + sum(len(request.continuation) for request in requests)
            for requests in self._requests
        ]
        return blocks_of(lengths, LEAST_SCORED, size)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.lm.routed.num_layers

    def by_policy(
        self, name: str, policy: Policy, setting: str = "", note: str = "", *, keep: Keep = unkept
    ) -> SystemRun:
        """Run a system that decides prompt by prompt, or the same for all.

        Args:
            name: Its name.
            policy: What decides.
            setting: Its depth in words.
            note: What a reader should know.
            keep: See `Keep`.
        """
        found = self._run(keep, lambda _: note, lambda block: self._ask(block, lambda _: policy))
        return self._system(name, setting, found, note)

    def base(self, *, keep: Keep = unkept) -> SystemRun:
        """Run the base model: every layer once."""
        return self.by_policy("base", FullPolicy(), keep=keep)

    def baseline(
        self, name: str, drawn: Sequence[Drawn], setting: str = "", *, keep: Keep = unkept
    ) -> SystemRun:
        """Run a baseline.

        Args:
            name: Its name.
            drawn: How it decides; several draws of plans, else one.
            setting: Of the routed model that it is compared with, in words.
            keep: See `Keep`.
        """
        first = drawn[0]
        if first.policy is not None:
            return self.by_policy(name, first.policy, setting, first.note, keep=keep)
        if first.path is not None:
            return self._along(name, first.path, setting, first.note, keep)
        plans = [draw.plan for draw in drawn if draw.plan is not None]
        found = self._run(
            keep,
            lambda block: [_rows(plan, block) for plan in plans],
            lambda block: self._ask_plans(block, plans),
        )
        return self._system(name, setting, found, first.note)

    def texts(
        self, name: str, policy: Policy, setting: str = "", *, keep: Keep = unkept
    ) -> SystemRun:
        """Read the texts of all questions, whose answers are generated, without generating any.

        Args:
            name: The system's name.
            policy: Decides on the questions' prompts, as before an answer is generated.
            setting: Its depth in words.
            keep: See `Keep`.

        Returns:
            The system with its texts' losses and routes, without answers.
        """
        found = self._run(keep, lambda _: "texts", lambda block: self._read(block, policy))
        system = SystemRun(name=name, setting=setting, seconds=found.seconds, routes=found.routes)
        system.text_loss = self._losses([answer for [answer] in found.answers[0]])  # type: ignore[misc]
        system.executions = mean_executions(found.routes[0])
        return system

    # --- asking ---

    def _run(
        self, keep: Keep, decided: Callable[[Block], Any], ask: Callable[[Block], Answered]
    ) -> Answered:
        """Return the answers to all questions, block by block: kept, or asked now."""
        answered = [
            keep(block, decided(block), lambda block=block: ask(block))  # type: ignore[misc]
            for block in self._blocks
        ]
        return joined(self._blocks, answered)

    def _ask(self, block: Block, policy_of: PolicyOf) -> Answered:
        """Ask a block's questions under one draw."""
        keys = [self.asked.keys[place] for place in block.places]
        started = self._clock()
        if self.asked.has_options:
            scored = self.lm.scorer.score(self._requests_of(block), policy_of)
            answers = self._by_question(block, scored.answers)
            routes = [scored.routes[key] for key in keys]
        else:
            answers, routes = self._generated(block, keys, policy_of)
        return Answered(answers=[answers], routes=[routes], seconds=self._clock() - started)

    def _generated(
        self, block: Block, keys: Sequence[Key], policy_of: PolicyOf
    ) -> tuple[Answers, list[Decisions]]:
        instances = [self.asked.instances[place][0] for place in block.places]
        prompts = [str(instance.args[0]) for instance in instances]
        key_of = dict(zip(prompts, keys, strict=True))
        with self.lm.deciding(lambda asked: policy_of([key_of[prompt] for prompt in asked])):
            texts = self.lm.generate_until(instances, disable_tqdm=True)
        return [[text] for text in texts], [self.lm.generated_routes[prompt] for prompt in prompts]

    def _ask_plans(self, block: Block, plans: Sequence[Tensor]) -> Answered:
        """Ask a block's questions under several plans `[Q, L]`.

        The first one is timed; of the others, what options have in common runs once.
        """
        first, others = self._ask(block, self._following(plans[0])), plans[1:]
        more: list[Answers] = []
        if others and self.asked.has_options:
            by_key = [self._by_key(plan.tolist()) for plan in others]
            scored = self.lm.scorer.score_plans(self._requests_of(block), by_key)
            more = [self._by_question(block, each.answers) for each in scored]
        elif others:
            more = [self._ask(block, self._following(plan)).answers[0] for plan in others]
        routes = [_rows(plan, block) for plan in others]
        return Answered(
            answers=[*first.answers, *more],
            routes=[*first.routes, *routes],
            seconds=first.seconds,
        )

    def _ask_along(self, block: Block, path: Path) -> Answered:
        """Ask a block's questions along a path."""
        started = self._clock()
        answers = self.lm.scorer.score_path(self._requests_of(block), path)
        seconds = self._clock() - started
        return Answered(answers=[self._by_question(block, answers)], routes=[], seconds=seconds)

    def _read(self, block: Block, policy: Policy) -> Answered:
        """Read the texts of a block's questions."""
        texts = [self._texts[place] for place in block.places]
        started = self._clock()
        scored = self.lm.scorer.score(texts, lambda _keys: policy)
        seconds = self._clock() - started
        routes = [scored.routes[text.question] for text in texts]
        return Answered(
            answers=[[[answer] for answer in scored.answers]], routes=[routes], seconds=seconds
        )

    def _requests_of(self, block: Block) -> list[Request]:
        return [request for place in block.places for request in self._requests[place]]

    def _by_question(self, block: Block, answers: Sequence[Answer]) -> Answers:
        given = iter(answers)
        found: Answers = []
        for place in block.places:
            each = [next(given) for _ in self._requests[place]]
            self.asked.check(place, each)  # before they are kept
            found.append([*each])
        return found

    def _by_key(self, routes: Sequence[Sequence[int]]) -> dict[Hashable, Decisions]:
        """Return the decisions of the first questions by their keys."""
        return {key: tuple(row) for key, row in zip(self.asked.keys, routes, strict=False)}

    def _following(self, plan: Tensor) -> PolicyOf:
        def policy_of(keys: Sequence[object]) -> Policy:
            rows = [self._places[key] for key in keys]  # type: ignore[index]
            return FixedPolicy(plan[rows], self.num_layers)

        return policy_of

    # --- what is made of the answers ---

    def _system(self, name: str, setting: str, found: Answered, note: str) -> SystemRun:
        system = SystemRun(
            name=name, setting=setting, seconds=found.seconds, notes=[note] if note else []
        )
        for answers, routes in zip(found.answers, found.routes, strict=True):
            self._add_draw(system, routes, self.asked.grade(answers))
        first = found.routes[0]
        of_texts = self._by_key(first[: len(self._texts)])
        [scored] = self.lm.scorer.score_plans(self._texts, [of_texts])
        system.text_loss = self._losses(scored.answers)
        if not self.asked.has_options:
            tokens = [
                max(1, len(self.lm.tok_encode(str(answer), add_special_tokens=False)))
                for [answer] in found.answers[0]
            ]
            system.decode_executions = decode_executions(first, tokens)
        return system

    def _along(self, name: str, path: Path, setting: str, note: str, keep: Keep) -> SystemRun:
        found = self._run(keep, lambda _: path, lambda block: self._ask_along(block, path))
        system = SystemRun(
            name=name, setting=setting, seconds=found.seconds, notes=[note] if note else []
        )
        _average(system, self.asked.grade(found.answers[0]), 0)
        system.executions = float(len(path))
        system.text_loss = self._losses(self.lm.scorer.score_path(self._texts, path))
        return system

    def _losses(self, answers: Sequence[Answer]) -> list[float]:
        return [
            -logprob / len(text.continuation)
            for text, (logprob, _) in zip(self._texts, answers, strict=True)
        ]

    def _add_draw(
        self, system: SystemRun, routes: list[Decisions], graded: Sequence[Graded]
    ) -> None:
        """Add one draw's outcomes to a system, keeping the mean over its draws."""
        before = len(system.routes)
        _average(system, graded, before)
        system.routes.append(routes)
        executions = mean_executions(routes)
        system.executions = (system.executions * before + executions) / (before + 1)


def _rows(plan: Tensor, block: Block) -> list[Decisions]:
    """Return a block's rows of a plan `[Q, L]`."""
    return [tuple(row) for row in plan[list(block.places)].tolist()]


def _average(system: SystemRun, graded: Sequence[Graded], before: int) -> None:
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
