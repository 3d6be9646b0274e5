"""Scoring the harness' requests: questions in batches, each question under one route.

Axes: P questions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from drllm.evaluation.lm_eval.requests import Asked, Request, asked
from drllm.models.base.capabilities import can_pack
from drllm.models.routing.policies import FixedPolicy, FullPolicy, Policy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import MemoryBatcher, PathSize
from drllm.models.scoring.choices import ChoiceBatch, Score
from drllm.paths import Decisions, Path

Answer: TypeAlias = tuple[float, bool]
"""A continuation's log-probability in nats, and whether it is the likeliest one."""

Plan: TypeAlias = Mapping[Any, Decisions]
"""Decisions by question."""

STATE_CACHE_GB = 1.0
"""For states that the paths of a batch share; nothing is kept beyond a batch."""

ENOUGH_TOKENS = 512
"""A pass of so many keeps a processor busy; a larger one costs in proportion."""
LEAST_FILLED = 0.8
"""Share of a pass's columns that each of its rows fills, from `ENOUGH_TOKENS` on."""


@dataclass(slots=True)
class Counts:
    """Prompts that were routed, and their executions a forward pass, added up."""

    prompts: int = 0
    executions: int = 0

    def add(self, routes: Tensor) -> None:
        """Count routes `[P, L]`."""
        self.prompts += len(routes)
        self.executions += int(routes.sum())


class RequestScorer:
    """Scores requests with a routed model, which reads at most `max_length` tokens.

    `batch_size` is in rows a pass; a question is one, or one for each continuation where the model
    can't have them packed, and is never split. `auto` goes by memory, up to `max_batch_size`.
    """

    def __init__(
        self, routed: RoutedModel, max_length: int, batch_size: int | str, max_batch_size: int
    ) -> None:
        self.routed = routed
        self.max_length = max_length
        self.batch_size = batch_size
        self.max_batch_size = max_batch_size
        self.counts = Counts()

    def score(
        self,
        requests: Sequence[Request],
        decides: Policy | Plan,
        *,
        by_prompt: bool = True,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> tuple[list[Answer], dict[Hashable, Decisions]]:
        """Return the answer to each request, and each question's one route; see `requests.asked`.

        `on_progress` is called with the number of continuations that were scored.
        """
        found = asked(requests, self.max_length, by_prompt=by_prompt)
        scores: dict[int, Score] = {}
        routes: dict[Hashable, Decisions] = {}
        for places, batch in self._batches(found):
            keys = [found.keys[place] for place in places]
            policy = decides
            if isinstance(policy, Mapping):
                policy = FixedPolicy([policy[key] for key in keys], self.routed.num_layers)
            each, route = self._under(batch, policy)
            self.counts.add(route)
            scores.update(zip(places, each, strict=True))
            routes.update(zip(keys, map(tuple, route.tolist()), strict=True))
            on_progress(sum(len(question.continuations) for question in batch.questions))
        return _answers(found, scores), routes

    def score_plans(self, requests: Sequence[Request], plans: Sequence[Plan]) -> list[list[Answer]]:
        """Return the answers under each plan; what their paths have in common runs once."""
        found = asked(requests, self.max_length, by_prompt=True)
        scores: list[dict[int, Score]] = [{} for _ in plans]
        for places, batch in self._batches(found):
            pairs = [
                (row, plan[found.keys[place]]) for plan in plans for row, place in enumerate(places)
            ]
            each = iter(batch.scores(pairs, greedy=True))
            for of_plan in scores:
                of_plan.update((place, next(each)) for place in places)
            batch.forget()
        return [_answers(found, each) for each in scores]

    def score_path(self, requests: Sequence[Request], path: Path) -> list[Answer]:
        """Score requests along any path; all continuations are called not greedy."""
        found = asked(requests, self.max_length, by_prompt=True)
        scores: dict[int, Score] = {}
        for places, batch in self._batches(found):
            [sums] = batch.path_logprobs([path])
            for place, values in zip(places, sums, strict=True):
                scores[place] = Score(values, greedy=(False,) * len(values))
        return _answers(found, scores)

    def _under(self, batch: ChoiceBatch, policy: Policy) -> tuple[list[Score], Tensor]:
        """Score a batch's questions under a policy; return their routes `[P, L]` too.

        One plan for all is run as a path: then the prompts' common beginning is read once for all.
        """
        plan: Decisions | None = None
        if isinstance(policy, FullPolicy):
            plan = (1,) * self.routed.num_layers
        elif isinstance(policy, FixedPolicy) and policy.shared:
            plan = tuple(policy.plan[0])
        if plan is None or not batch.shares_beginning:
            return batch.routed_scores(policy)
        pairs = [(place, plan) for place in range(len(batch.questions))]
        return batch.scores(pairs, greedy=True), torch.tensor([plan] * len(pairs))

    def _batches(self, found: Asked) -> Iterator[tuple[list[int], ChoiceBatch]]:
        """Yield the questions of each pass, with their places, the longest first.

        A pass ends early where padding what follows would cost more than a pass of its own.
        """
        questions, model = found.questions, self.routed.model
        order = sorted(
            range(len(questions)), key=lambda place: questions[place].length, reverse=True
        )
        passes = MemoryBatcher(model)
        all_packed = bool(order) and can_pack(model, questions[order[0]].length)
        while order:
            longest = questions[order[0]].length
            if isinstance(self.batch_size, int):
                limit = self.batch_size
            else:
                scored = max(questions[place].num_after for place in order) + 1
                limit = min(self.max_batch_size, passes.num_paths(PathSize(longest, scored)))
            taken = rows = 0
            for question in (questions[place] for place in order):
                packed = all_packed or can_pack(model, question.length)
                rows += 1 if packed else len(question.apart())
                too_short = question.length < LEAST_FILLED * longest
                if taken and (rows > limit or (taken * longest >= ENOUGH_TOKENS and too_short)):
                    break
                taken += 1
            places, order = order[:taken], order[taken:]
            batch = [questions[place] for place in places]
            yield places, ChoiceBatch(self.routed, batch, STATE_CACHE_GB)


def _answers(found: Asked, scores: Mapping[int, Score]) -> list[Answer]:
    """Return each request's answer from the scores by question."""
    return [
        (scores[place].logprobs[number], scores[place].greedy[number])
        for place, number in found.places
    ]
