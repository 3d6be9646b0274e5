"""Score the harness' requests: questions in batches, each question under one route.

The harness asks for one log-likelihood at a time: a context and a continuation. Those of one
question are put together, so that its context is read once and it has one route. A router may read
what all of the question's contexts begin with: for most tasks the context; where the options stand
in the context (WinoGrande), the text before them. The rest is read but not scored.

Axes: P questions, L layers.
"""

import copy
import functools
import itertools
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
from drllm.models.routing.policies import FixedPolicy, Policy, find_shared_plan
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import MemoryBatcher, PathSize
from drllm.models.scoring.choices import ChoiceBatch, Score
from drllm.models.scoring.packing import Request
from drllm.paths import Decisions, StaticPath

OptionScore: TypeAlias = tuple[float, bool]
"""A continuation's log-probability in nats, and whether it is the likeliest one."""

Plan: TypeAlias = Mapping[Any, Decisions]  # decisions by question
Paths: TypeAlias = Mapping[Any, Decisions | StaticPath]  # decisions or a path by question
Decides: TypeAlias = Policy | Plan | StaticPath

STATE_CACHE_GB = 1.0  # for states that the paths of a batch share; nothing is kept beyond a batch

ENOUGH_TOKENS = 512  # a pass of so many keeps a processor busy; a larger one costs in proportion
LEAST_FILLED = 0.8  # share of a pass's columns that each of its rows fills, from `ENOUGH_TOKENS` on
STEPS = 16
"""Steps of a context's length to which prompts are rounded up. Answers are generated side by side
where they may be equally long, so prompts of about one length should leave the same room."""


@dataclass(frozen=True, slots=True)
class HarnessRequest:
    """One continuation to score after a context, each of one token or more."""

    question: Hashable  # tells its question from others, such as the task's name and the row
    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(slots=True)
class RequestBatch:
    """A list of the harness' requests, put together by question."""

    # For each request, the place of its question, and the number of its continuation there.
    places: list[tuple[int, int]]
    questions: list[Request] = field(default_factory=list)
    keys: list[Hashable] = field(default_factory=list)  # each question's `HarnessRequest.question`

    def add(
        self,
        key: Hashable,
        prompt: Sequence[int],
        contexts: Mapping[int, Sequence[int]],
        requests: Sequence[HarnessRequest],
    ) -> None:
        """Add a question with the requests at some places, whose contexts begin with its prompt.

        What follows the prompt in a context is read but not scored.
        """
        numbers: dict[tuple[tuple[int, ...], int], int] = {}  # of each different continuation
        for place, context in contexts.items():
            unscored = context[len(prompt) :]
            tokens = (*unscored, *requests[place].continuation)
            number = numbers.setdefault((tokens, len(unscored)), len(numbers))
            self.places[place] = (len(self.questions), number)
        continuations = [tokens for tokens, _ in numbers]
        num_unscored = [num for _, num in numbers]
        self.keys.append(key)
        self.questions.append(Request(prompt, continuations, num_unscored))

    def answers(self, scores: Mapping[int, Score]) -> list[OptionScore]:
        """Return the answer to each request from the scores of all questions, by place."""
        return [
            (scores[place].logprobs[number], scores[place].greedy[number])
            for place, number in self.places
        ]


def batch_requests(
    requests: Sequence[HarnessRequest], max_length: int, *, by_prompt: bool
) -> RequestBatch:
    """Put the requests of one question together.

    Requests that occur twice, as the harness asks where processes share the work unevenly, are
    scored once. What is longer than the `max_length` tokens that the model reads loses tokens at
    its start, as the harness has it; a continuation is never cut: TaskError if it is longer.

    With `by_prompt` a question's contexts are cut alike; TaskError if they have no common beginning
    to decide on. Otherwise such contexts are questions of their own, each cut by itself.
    """
    by_question: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        if len(request.continuation) > max_length:
            raise TaskError(
                f"a continuation of {_describe(request.question)} has {len(request.continuation)} "
                f"tokens, the model reads {max_length}; leave the task out, or use a model with a "
                f"longer context"
            )
        by_question.setdefault(request.question, []).append(place)

    batch = RequestBatch(places=[(0, 0)] * len(requests))
    for key, places in by_question.items():
        contexts = _cut_contexts(requests, places, max_length, alike=by_prompt)
        common = os.path.commonprefix(list(contexts.values()))  # noqa: RUF071 (of tokens)
        if common:
            batch.add(key, common, contexts, requests)
            continue
        if by_prompt:
            raise TaskError(
                f"the requests of {_describe(key)} have no prompt in common, so nothing can decide "
                f"on their route; give a fixed plan (path=FILE, or static_routing=true)"
            )
        for prompt in dict.fromkeys(contexts.values()):
            same = {place: context for place, context in contexts.items() if context == prompt}
            batch.add(key, prompt, same, requests)
    return batch


def _cut_contexts(
    requests: Sequence[HarnessRequest], places: Sequence[int], max_length: int, *, alike: bool
) -> dict[int, tuple[int, ...]]:
    """Return the contexts of one question's requests, cut at their start to fit the model.

    The last token of a continuation is only predicted. A context keeps one token at least: after it
    something is predicted.
    """
    longest = max(len(requests[place].continuation) for place in places)
    contexts = {}
    for place in places:
        num_after = longest if alike else len(requests[place].continuation)
        room = max(max_length + 1 - num_after, 1)
        contexts[place] = tuple(requests[place].context[-room:])
    return contexts


def _describe(key: Hashable) -> str:
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
        prompts, executions = self.counts
        self.counts = [prompts + len(routes), executions + int(routes.sum())]

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
        questions = batch_requests(requests, self.max_length, by_prompt=by_prompt)
        scores: dict[int, Score] = {}
        routes: dict[Hashable, Decisions] = {}
        for places, batch in self._batches(questions.questions):
            keys = [questions.keys[place] for place in places]
            policy = decides
            if isinstance(policy, Mapping):
                policy = FixedPolicy([policy[key] for key in keys], self.routed.num_layers)
            batch_scores, batch_routes = self._score_under(batch, policy)
            self.count(batch_routes)
            scores.update(zip(places, batch_scores, strict=True))
            for key, route in zip(keys, batch_routes.tolist(), strict=True):
                routes[key] = tuple(route)
            on_progress(sum(len(request.continuations) for request in batch.requests))
        return questions.answers(scores), routes

    def score_plans(
        self, requests: Sequence[HarnessRequest], plans: Sequence[Paths | StaticPath]
    ) -> list[list[OptionScore]]:
        """Return the answers under each plan; what their paths have in common runs once."""
        questions = batch_requests(requests, self.max_length, by_prompt=True)
        scores: list[dict[int, Score]] = [{} for _ in plans]
        for places, batch in self._batches(questions.questions):
            pairs: list[tuple[int, Decisions | StaticPath]] = []
            for plan in plans:
                for row, place in enumerate(places):
                    path = plan[questions.keys[place]] if isinstance(plan, Mapping) else plan
                    pairs.append((row, path))
            batch_scores = iter(batch.scores(pairs, greedy=True))
            for plan_scores in scores:
                own_scores = itertools.islice(batch_scores, len(places))
                plan_scores.update(zip(places, own_scores, strict=True))
            batch.forget()
        return [questions.answers(plan_scores) for plan_scores in scores]

    def _score_under(self, batch: ChoiceBatch, policy: Policy) -> tuple[list[Score], Tensor]:
        """Score a batch's questions under a policy; return their routes `[P, L]` too.

        One plan for all is run as a path: then the prompts' common beginning is read once for all.
        """
        plan = find_shared_plan(policy, self.routed.num_layers)
        if not isinstance(plan, tuple) or not batch.shares_beginning:
            return batch.routed_scores(policy)
        pairs = [(place, plan) for place in range(len(batch.requests))]
        return batch.scores(pairs, greedy=True), torch.tensor([plan] * len(pairs))

    def _batches(self, questions: Sequence[Request]) -> Iterator[tuple[list[int], ChoiceBatch]]:
        """Yield the questions of each pass, with their places, the longest first."""
        model = self.routed.model
        lengths = [question.length for question in questions]
        order = sorted(range(len(questions)), key=lengths.__getitem__, reverse=True)
        # Where the longest can be packed, so can all.
        all_packed = bool(order) and can_pack(model, lengths[order[0]])
        num_rows = [
            1 if all_packed or can_pack(model, question.length) else len(question.split())
            for question in questions
        ]
        batcher = MemoryBatcher(model)
        while order:
            if isinstance(self.batch_size, int):
                max_rows = self.batch_size
            else:
                num_logits = max(questions[place].num_after for place in order) + 1
                size = PathSize(lengths[order[0]], num_logits)
                max_rows = min(self.max_batch_size, batcher.num_paths(size))
            number = _num_in_pass(order, lengths, num_rows, max_rows)
            places = order[:number]
            order = order[number:]
            batch = [questions[place] for place in places]
            yield places, ChoiceBatch(self.routed, batch, STATE_CACHE_GB)


def _num_in_pass(
    order: Sequence[int], lengths: Sequence[int], num_rows: Sequence[int], max_rows: int
) -> int:
    """Return how many questions of an order, the longest first, go into the next pass.

    It is one at least. A pass ends early where padding what follows would cost more than a pass of
    its own.
    """
    longest = lengths[order[0]]
    rows = 0
    for number, place in enumerate(order):
        rows += num_rows[place]
        is_busy = number * longest >= ENOUGH_TOKENS
        is_short = lengths[place] < LEAST_FILLED * longest
        if number > 0 and (rows > max_rows or (is_busy and is_short)):
            return number
    return len(order)


def limit_answers(
    requests: Sequence[Instance],
    encode: Callable[[str], Sequence[int]],
    max_length: int,
    max_new_tokens: int,
    *,
    warns: bool,
) -> list[Instance]:
    """Return requests for generated answers, none longer than there is room.

    What a request gets depends on its own prompt alone, so that it is the same in whatever batch
    or process. Those that ask for no more than half of the context, or fit, stay as they are.

    Args:
        requests: The harness' requests.
        encode: Makes tokens of a prompt.
        max_length: Tokens that the model reads and writes in all.
        max_new_tokens: Length of answers whose request doesn't say.
        warns: Whether a warning tells of answers that are shortened.

    Source: ours (docs/differences.md, D-27).
    """
    limited: list[Instance] = []
    rooms: dict[tuple[str, int], list[int]] = {}  # by the task, and the length that it asks for
    for request in requests:
        prompt, settings = request.args
        settings = dict(normalize_gen_kwargs(settings, max_new_tokens))
        length = settings["max_gen_toks"]
        room = _room_for_answer(prompt, length, encode, max_length)
        if room < length:
            settings["max_gen_toks"] = room
            request = copy.copy(request)
            request.arguments = (prompt, settings)
            rooms.setdefault((request.task_name or "a task", length), []).append(room)
        limited.append(request)
    if warns:
        for (task, length), task_rooms in rooms.items():
            _warn_of_room(task, length, task_rooms, max_length)
    return limited


def _room_for_answer(
    prompt: str, length: int, encode: Callable[[str], Sequence[int]], max_length: int
) -> int:
    """Return how many tokens an answer of some length gets behind a prompt."""
    half = max_length // 2
    if length <= half:
        return length
    num_read = len(encode(prompt))
    if num_read + length <= max_length:
        return length
    step = max(1, max_length // STEPS)
    rounded = step * math.ceil(num_read / step)
    return max(half, max_length - rounded)


def _warn_of_room(task: str, length: int, rooms: Sequence[int], max_length: int) -> None:
    most = str(max(rooms)) if len(set(rooms)) == 1 else f"{min(rooms)} to {max(rooms)}"
    _warn_once(
        f"{task} asks for answers of up to {length} tokens, and the model holds {max_length} "
        f"with the question; answers have at most {most}"
    )


@functools.cache
def _warn_once(message: str) -> None:
    """Warn once, however many systems answer the same questions."""
    logger.warning(message)


def drop_repeats(requests: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Drop the requests that the harness repeats to fill a process up.

    Returned are the others, and for each request the place of its answer among theirs.
    """
    kept: list[Any] = []
    places: list[int] = []
    places_of: dict[int, list[int]] = {}  # by the request's identity
    for request in requests:
        own_places = places_of.setdefault(id(request), [])
        repeats = request.repeats or 1  # None in a request made by hand
        if len(own_places) < repeats:
            own_places.append(len(kept))
            kept.append(request)
        places.append(own_places[-1])
    return kept, places
