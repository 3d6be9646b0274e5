"""Scoring the harness' requests: questions in batches, each question under one route.

The harness asks for one log-likelihood at a time: a context and a continuation. Those of one
question are put together, so that its context is read once and its route is one. What a router may
read is what all of the question's contexts begin with: for most tasks the context; where the
options stand in the context (WinoGrande), the text before them, and what differs is read but not
scored.

Axes: P questions, L layers.
"""

import copy
import functools
import math
import os.path
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from drllm.errors import TaskError
from drllm.listener import logger
from drllm.models.base.layers import can_pack
from drllm.models.routing.policies import FixedPolicy, Policy, one_plan
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import MemoryBatcher, PathSize
from drllm.models.scoring.choices import ChoiceBatch, Score
from drllm.models.scoring.packing import Request
from drllm.paths import Decisions, StaticPath

OptionScore: TypeAlias = tuple[float, bool]
"""A continuation's log-probability in nats, and whether it is the likeliest one."""

Plan: TypeAlias = Mapping[Any, Decisions]  # decisions by question
Paths: TypeAlias = Mapping[Any, Decisions | StaticPath]  # the same, of paths too
Decides: TypeAlias = Policy | Plan | StaticPath

STATE_CACHE_GB = 1.0  # for states that the paths of a batch share; nothing is kept beyond a batch

ENOUGH_TOKENS = 512  # a pass of so many keeps a processor busy; a larger one costs in proportion
LEAST_FILLED = 0.8  # share of a pass's columns that each of its rows fills, from `ENOUGH_TOKENS` on
STEPS = 16
"""Into which a context is divided: answers are generated side by side where they may be equally
long, so that prompts of about one length should leave the same room."""


@dataclass(frozen=True, slots=True)
class HarnessRequest:
    """One continuation to score after a context, each of one token or more.

    `question` tells its question from others, such as the task's name and the row.
    """

    question: Hashable
    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """The questions of a list of requests, and for each its requests' `HarnessRequest.question`.

    `places` has for each request the place of its question and of its continuation there.
    """

    questions: list[Request]
    keys: list[Hashable]
    places: list[tuple[int, int]]


def asked(requests: Sequence[HarnessRequest], max_length: int, *, by_prompt: bool) -> RequestBatch:
    """Put the requests of one question together.

    Requests that occur twice, as the harness asks where processes share the work unevenly, are
    scored once. What is longer than the `max_length` tokens that the model reads loses tokens at
    its start, as the harness has it; a continuation is never cut: TaskError if it is longer.

    With `by_prompt` a question's contexts are cut alike; TaskError if they have no common beginning
    to decide on. Otherwise such contexts are questions of their own, each cut by itself.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        if len(request.continuation) > max_length:
            raise TaskError(
                f"a continuation of {_named(request.question)} has {len(request.continuation)} "
                f"tokens, the model reads {max_length}; leave the task out, or use a model with a "
                f"longer context"
            )
        groups.setdefault(request.question, []).append(place)
    found = RequestBatch([], [], [(0, 0)] * len(requests))
    for key, places in groups.items():
        longest = max(len(requests[place].continuation) for place in places)
        contexts = {}
        for place in places:
            room = max_length + 1 - (longest if by_prompt else len(requests[place].continuation))
            # One token at least: after it something is predicted.
            contexts[place] = tuple(requests[place].context[-max(room, 1) :])
        common = os.path.commonprefix(list(contexts.values()))  # noqa: RUF071 (of tokens)
        if by_prompt and not common:
            raise TaskError(
                f"the requests of {_named(key)} have no prompt in common, so nothing can decide on "
                f"their route; give a fixed plan (path=FILE, or static_routing=true)"
            )
        for prompt in [common] if common else dict.fromkeys(contexts.values()):
            continuations: dict[tuple[tuple[int, ...], int], int] = {}
            for place, context in contexts.items():
                if common or context == prompt:
                    unscored = context[len(prompt) :]
                    behind = (*unscored, *requests[place].continuation), len(unscored)
                    number = continuations.setdefault(behind, len(continuations))
                    found.places[place] = (len(found.questions), number)
            found.keys.append(key)
            found.questions.append(
                Request(
                    prompt,
                    [tokens for tokens, _ in continuations],
                    [num for _, num in continuations],
                )
            )
    return found


def _named(key: Hashable) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)


@dataclass
class RequestScorer:
    """Scores requests with a routed model, which reads at most `max_length` tokens.

    `batch_size` is in rows a pass; a question is one, or one for each continuation where the model
    can't have them packed, and is never split. `auto` goes by memory, up to `max_batch_size`.
    Prompts that were routed, and their executions a forward pass, are added up in `counts`.
    """

    routed: RoutedModel
    max_length: int
    batch_size: int | str
    max_batch_size: int
    counts: list[int] = field(default_factory=lambda: [0, 0])

    def count(self, routes: Tensor) -> None:
        """Count routes `[P, L]`."""
        self.counts = [self.counts[0] + len(routes), self.counts[1] + int(routes.sum())]

    def score(
        self,
        requests: Sequence[HarnessRequest],
        decides: Decides,
        *,
        by_prompt: bool = True,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> tuple[list[OptionScore], dict[Hashable, Decisions]]:
        """Return the answer to each request, and each question's one route, if no path is given.

        `on_progress` is called with the number of continuations that were scored.
        """
        if isinstance(decides, StaticPath):
            return self.score_plans(requests, [decides])[0], {}
        found = asked(requests, self.max_length, by_prompt=by_prompt)
        scores: dict[int, Score] = {}
        routes: dict[Hashable, Decisions] = {}
        for places, batch in self._batches(found):
            keys = [found.keys[place] for place in places]
            policy = decides
            if isinstance(policy, Mapping):
                policy = FixedPolicy([policy[key] for key in keys], self.routed.num_layers)
            each, route = self._under(batch, policy)
            self.count(route)
            scores.update(zip(places, each, strict=True))
            routes.update(zip(keys, map(tuple, route.tolist()), strict=True))
            on_progress(sum(len(question.continuations) for question in batch.requests))
        return _answers(found, scores), routes

    def score_plans(
        self, requests: Sequence[HarnessRequest], plans: Sequence[Paths | StaticPath]
    ) -> list[list[OptionScore]]:
        """Return the answers under each plan; what their paths have in common runs once."""
        found = asked(requests, self.max_length, by_prompt=True)

        def of(plan: Paths | StaticPath, place: int) -> Decisions | StaticPath:
            return plan if isinstance(plan, StaticPath) else plan[found.keys[place]]

        scores: list[dict[int, Score]] = [{} for _ in plans]
        for places, batch in self._batches(found):
            pairs = [(row, of(plan, place)) for plan in plans for row, place in enumerate(places)]
            each = iter(batch.scores(pairs, greedy=True))
            for of_plan in scores:
                of_plan.update((place, next(each)) for place in places)
            batch.forget()
        return [_answers(found, each) for each in scores]

    def _under(self, batch: ChoiceBatch, policy: Policy) -> tuple[list[Score], Tensor]:
        """Score a batch's questions under a policy; return their routes `[P, L]` too.

        One plan for all is run as a path: then the prompts' common beginning is read once for all.
        """
        plan = one_plan(policy, self.routed.num_layers)
        if not isinstance(plan, tuple) or not batch.shares_beginning:
            return batch.routed_scores(policy)
        pairs = [(place, plan) for place in range(len(batch.requests))]
        return batch.scores(pairs, greedy=True), torch.tensor([plan] * len(pairs))

    def _batches(self, found: RequestBatch) -> Iterator[tuple[list[int], ChoiceBatch]]:
        """Yield the questions of each pass, with their places, the longest first.

        A pass ends early where padding what follows would cost more than a pass of its own.
        """
        questions, model = found.questions, self.routed.model
        order = sorted(range(len(questions)), key=lambda row: questions[row].length, reverse=True)
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
                rows += 1 if packed else len(question.split())
                too_short = question.length < LEAST_FILLED * longest
                if taken and (rows > limit or (taken * longest >= ENOUGH_TOKENS and too_short)):
                    break
                taken += 1
            places, order = order[:taken], order[taken:]
            batch = [questions[place] for place in places]
            yield places, ChoiceBatch(self.routed, batch, STATE_CACHE_GB)


def _answers(found: RequestBatch, scores: Mapping[int, Score]) -> list[OptionScore]:
    return [
        (scores[place].logprobs[number], scores[place].greedy[number])
        for place, number in found.places
    ]


def fitted(
    requests: Sequence[Instance],
    encode: Callable[[str], Sequence[int]],
    max_length: int,
    max_new_tokens: int,
    *,
    warns: bool,
) -> list[Instance]:
    """Return requests for generated answers with no more tokens asked for than there is room.

    What a request gets depends on its own prompt alone, so that it is the same in whatever batch
    or process. Those that ask for no more than half of the context, or fit, stay as they are. The
    model reads and writes `max_length` tokens in all; `max_new_tokens` are for answers whose
    request doesn't say.

    Source: ours (docs/differences.md, D-27).
    """
    step = max(1, max_length // STEPS)
    found: list[Instance] = []
    given: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        prompt, how = request.args
        settings: dict[str, Any] = dict(normalize_gen_kwargs(how, max_new_tokens))
        asked = settings["max_gen_toks"]
        length = 0 if asked <= max_length // 2 else len(encode(prompt))
        if length + asked > max_length:
            rounded = step * math.ceil(length / step)
            room = max(max_length // 2, max_length - rounded)
            settings["max_gen_toks"] = room
            request = copy.copy(request)
            request.arguments = (prompt, settings)
            given.setdefault((request.task_name or "a task", asked), []).append(room)
        found.append(request)
    for (task, asked), rooms in given.items() if warns else ():
        least = "" if len(set(rooms)) == 1 else f"{min(rooms)} to "
        _warn(
            f"{task} asks for answers of up to {asked} tokens, and the model holds {max_length} "
            f"with the question; answers have at most {least}{max(rooms)}"
        )
    return found


@functools.cache
def _warn(message: str) -> None:
    """Say it once, however many systems answer the same questions."""
    logger.warning(message)


def without_padding(requests: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Return the requests without those that the harness repeats to fill a process up.

    Also, for each request, the place of its answer among theirs.
    """
    wanted: list[Any] = []
    places: list[int] = []
    found: dict[int, list[int]] = {}
    for request in requests:
        own = found.setdefault(id(request), [])
        if len(own) < (request.repeats or 1):  # None in a request made by hand
            own.append(len(wanted))
            wanted.append(request)
        places.append(own[-1])
    return wanted, places
