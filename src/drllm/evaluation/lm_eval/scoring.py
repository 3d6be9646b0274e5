"""Score the harness' requests in batches of questions, each question under one route.

A request of the harness is a context and one continuation. The requests of one question are put
together, so that its context is read once and it has one route. Routers read the common beginning
of the question's contexts. For most tasks this is the whole context. If the contexts contain the
options (WinoGrande), it is the text before the options, and the rest of a context is read but not
scored.

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
"""A continuation's log-probability in nats, and whether it is the likeliest continuation."""

Plan: TypeAlias = Mapping[Any, Decisions]
"""Question → its decisions."""
Paths: TypeAlias = Mapping[Any, Decisions | StaticPath]
"""Question → its decisions or static path."""
Decides: TypeAlias = Policy | Plan | StaticPath

STATE_CACHE_GB = 1.0  # for states that the paths of a batch share; emptied after each batch

ENOUGH_TOKENS = 512  # tokens that keep a processor busy; the time of larger passes grows with size
LEAST_FILLED = 0.8  # share of a pass's columns that each row fills, in passes of `ENOUGH_TOKENS`
STEPS = 16
"""The number of steps into which the model's context length is divided. Lengths of prompts are
rounded up to a whole step. The harness generates answers together if their maximum lengths are
equal, so prompts of similar length should get the same maximum."""


@dataclass(frozen=True, slots=True)
class HarnessRequest:
    """A context and one continuation to score after it, both of at least one token."""

    question: Hashable  # identifies the question, for example by the task's name and the row
    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(slots=True)
class RequestBatch:
    """The harness' requests, grouped by question."""

    # For each request, the place of its question and the number of its continuation.
    places: list[tuple[int, int]]
    questions: list[Request] = field(default_factory=list)
    keys: list[Hashable] = field(default_factory=list)  # the identity of each question

    def add(
        self,
        key: Hashable,
        prompt: Sequence[int],
        contexts: Mapping[int, Sequence[int]],
        requests: Sequence[HarnessRequest],
    ) -> None:
        """Add a question with some of the requests.

        Args:
            key: Identifies the question.
            prompt: The beginning of all its contexts. The rest of a context is read but not scored.
            contexts: Place of a request → its context.
            requests: All requests.
        """
        # A distinct continuation and its number of unscored tokens → the continuation's number.
        numbers: dict[tuple[tuple[int, ...], int], int] = {}
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
        """Return the answer to each request from the scores of all questions (place → score)."""
        return [
            (scores[place].logprobs[number], scores[place].greedy[number])
            for place, number in self.places
        ]


def batch_requests(
    requests: Sequence[HarnessRequest], max_length: int, *, by_prompt: bool
) -> RequestBatch:
    """Group requests by question.

    If processes share the work unevenly, the harness repeats requests. Repeated requests are scored
    once. If a context and its continuation are longer than the model reads, the context is cut at
    its start, as in the harness.

    Args:
        requests: The requests.
        max_length: How many tokens the model reads.
        by_prompt: Whether decisions depend on the prompt. Then the contexts of a question are cut
            to the same length. Otherwise each context is cut by itself, and contexts without a
            common beginning become separate questions.

    Raises:
        TaskError: A continuation is longer than the model reads; or, with `by_prompt`, the contexts
            of a question have no common beginning.
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
    """Cut the contexts of one question's requests at their start, so that they fit the model.

    The last token of a continuation isn't read. A context keeps at least one token, which predicts
    the first token of the continuation.
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
    """Scores requests with a routed model.

    Attributes:
        routed: The model.
        max_length: How many tokens the model reads.
        batch_size: Rows in a pass, or `auto` to choose by memory. A question is one row. If the
            model can't take packed continuations, it is one row for each continuation. A question
            is never split over two passes.
        max_batch_size: Maximum rows in a pass with `auto`.
        counts: The number of prompts that were routed, and the sum of their executions.
    """

    routed: RoutedModel
    max_length: int
    batch_size: int | str
    max_batch_size: int
    counts: list[int] = field(default_factory=lambda: [0, 0])

    def count(self, routes: Tensor) -> None:
        """Add routes `[P, L]` to the counts."""
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
        """Score requests under a policy, decisions by question, or a static path.

        Args:
            requests: The requests.
            decides: The policy, decisions or path.
            by_prompt: See `batch_requests`.
            on_progress: Called after each pass with the number of continuations it scored.

        Returns:
            The answer to each request, and question → its route (empty for a static path).
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
        """Return the answers under each plan; common prefixes of the plans' paths run once."""
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
                next_scores = itertools.islice(batch_scores, len(places))
                plan_scores.update(zip(places, next_scores, strict=True))
            batch.forget()
        return [questions.answers(plan_scores) for plan_scores in scores]

    def _score_under(self, batch: ChoiceBatch, policy: Policy) -> tuple[list[Score], Tensor]:
        """Score a batch's questions under a policy; return their routes `[P, L]` too.

        If the policy has one plan for all questions, the plan is run as a path, so that the
        prompts' common beginning is read once.
        """
        plan = find_shared_plan(policy, self.routed.num_layers)
        if not isinstance(plan, tuple) or not batch.shares_beginning:
            return batch.routed_scores(policy)
        pairs = [(place, plan) for place in range(len(batch.requests))]
        return batch.scores(pairs, greedy=True), torch.tensor([plan] * len(pairs))

    def _batches(self, questions: Sequence[Request]) -> Iterator[tuple[list[int], ChoiceBatch]]:
        """Yield each pass's questions, as places and as a batch, the longest questions first."""
        model = self.routed.model
        lengths = [question.length for question in questions]
        order = sorted(range(len(questions)), key=lengths.__getitem__, reverse=True)
        # If the longest question can be packed, all can.
        all_packed = bool(order) and can_pack(model, lengths[order[0]])
        num_rows = []
        for question in questions:
            if all_packed or can_pack(model, question.length):
                num_rows.append(1)
            else:
                num_rows.append(len(question.split()))
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
    """Return how many questions go into the next pass, at least one.

    A pass ends early if padding the next question would cost more than another pass.

    Args:
        order: The places of the remaining questions, the longest first.
        lengths: The tokens of each question.
        num_rows: The rows of each question.
        max_rows: Maximum rows of the pass.
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
    """Limit the length of generated answers to the room that the model has for them.

    The limit depends on the request's own prompt alone, so it is the same in every batch and
    process. A request stays unchanged if prompt and answer fit, or the answer takes at most half of
    the model's context.

    Args:
        requests: The harness' requests.
        encode: Encodes a prompt.
        max_length: How many tokens the model reads and writes in total.
        max_new_tokens: The answer's length if a request doesn't set it.
        warns: Whether to log a warning about limited answers.

    Source: ours (docs/differences.md, D-27).
    """
    limited: list[Instance] = []
    rooms: dict[tuple[str, int], list[int]] = {}  # (task, requested length) → limits
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
    """Return how many tokens an answer may have after a prompt, at most `length`."""
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
    """Warn that the answers to a task are limited to these numbers of tokens."""
    most = str(max(rooms))
    if min(rooms) < max(rooms):
        most = f"{min(rooms)} to {max(rooms)}"
    _warn_once(
        f"{task} asks for answers of up to {length} tokens, and the model holds {max_length} "
        f"with the question; answers have at most {most}"
    )


@functools.cache
def _warn_once(message: str) -> None:
    """Warn only once, even if several systems answer the same questions."""
    logger.warning(message)


def drop_repeats(requests: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Drop the requests that the harness repeats to give each process the same number.

    Returns:
        The remaining requests; and for each original request, the place of its answer among the
        answers to the remaining requests.
    """
    remaining: list[Any] = []
    places: list[int] = []
    places_of: dict[int, list[int]] = {}  # id of a request → its places in `remaining`
    for request in requests:
        request_places = places_of.setdefault(id(request), [])
        repeats = request.repeats or 1  # None in a request made by hand
        if len(request_places) < repeats:
            request_places.append(len(remaining))
            remaining.append(request)
        places.append(request_places[-1])
    return remaining, places
