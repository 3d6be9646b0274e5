"""Score the requests of lm-evaluation-harness ("the harness"), under one route for each question.

A request of the harness is a context and one continuation. The requests of a question are put
together, so that the question has one route, and its context is read once. Routers read the common
beginning of the question's contexts. For most tasks this is the whole context. If the contexts
contain the options (WinoGrande), it is the text before the options. The rest of the context is then
read but not scored.

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
from drllm.models.base.batching import MemoryBatcher, PathSize
from drllm.models.base.layers import can_pack
from drllm.models.routing.policies import FixedPolicy, Policy, find_shared_plan
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch, Score
from drllm.models.scoring.packing import Request
from drllm.paths import Decisions, StaticPath
from drllm.work.listener import logger

OptionScore: TypeAlias = tuple[float, bool]
"""A continuation's log-probability in nats, and whether it is the likeliest continuation."""

Plan: TypeAlias = Mapping[Any, Decisions]
"""Question → its decisions. Questions are identified as in `HarnessRequest.question`."""
Paths: TypeAlias = Mapping[Any, Decisions | StaticPath]
"""Question → its decisions or static path."""
Decides: TypeAlias = Policy | Plan | StaticPath
"""What decides which layers a question runs."""

STATE_CACHE_GB = 1.0  # for states that the paths of a batch share; emptied after each batch

ENOUGH_TOKENS = 512
"""A pass with this many tokens keeps a processor busy, so a larger pass isn't faster per token."""
LEAST_FILLED = 0.8
"""In a pass of `ENOUGH_TOKENS`, the least share of the columns that each row fills. The remaining
columns are padding."""
STEPS = 16
"""The number of steps into which the model's context length is divided, to limit answers. The
harness generates answers together if their maximum lengths are equal. So the length of a prompt is
rounded up to a whole step, and prompts of similar length get the same maximum."""


@dataclass(frozen=True, slots=True)
class HarnessRequest:
    """A context and one continuation to score after it, both of at least one token."""

    question: Hashable  # identifies the question, for example by the task's name and the row
    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(slots=True)
class RequestBatch:
    """The harness' requests, grouped by question.

    Attributes:
        places: For each request, the place of its question in `questions`, and the number of its
            continuation in the question.
        questions: The questions. Equal continuations of a question are in it once.
        keys: The value that identifies each question, see `HarnessRequest.question`.
    """

    places: list[tuple[int, int]]
    questions: list[Request] = field(default_factory=list)
    keys: list[Hashable] = field(default_factory=list)

    def add(
        self,
        key: Hashable,
        prompt: Sequence[int],
        contexts: Mapping[int, Sequence[int]],
        requests: Sequence[HarnessRequest],
    ) -> None:
        """Add a question.

        Args:
            key: The value that identifies the question.
            prompt: The common beginning of its contexts. The rest of a context is read but not
                scored.
            contexts: The contexts of the question: place of the request in `requests` → context.
            requests: All requests, also those of other questions.
        """
        # Tokens after the prompt, and how many of them aren't scored → number of the continuation.
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
        """Return the answer to each request.

        `scores` has the score of each question by its place in `questions`.
        """
        return [
            (scores[place].logprobs[number], scores[place].greedy[number])
            for place, number in self.places
        ]


def batch_requests(
    requests: Sequence[HarnessRequest], max_length: int, *, by_prompt: bool
) -> RequestBatch:
    """Group requests by question.

    A request that occurs several times is scored once: the harness repeats requests if the number
    of processes doesn't divide their number. If a context and its continuation are longer than the
    model reads, the context is cut at its start, as in the harness.

    Args:
        requests: The requests.
        max_length: How many tokens the model reads.
        by_prompt: Whether decisions depend on the prompt. If so, the contexts of a question are cut
            so that the longest continuation fits after each of them. Otherwise a context is cut
            only as its own continuation requires, and contexts without a common beginning become
            separate questions.

    Raises:
        TaskError: A continuation is longer than the model reads; or, with `by_prompt`, the contexts
            of a question have no common beginning.
    """
    by_question: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        if len(request.continuation) > max_length:
            raise TaskError(
                f"a continuation of {_describe(request.question)} has {len(request.continuation)} "
                f"tokens, and the model reads {max_length}; leave the task out, or use a model "
                f"with a longer context"
            )
        by_question.setdefault(request.question, []).append(place)

    batch = RequestBatch(places=[(0, 0)] * len(requests))
    for key, places in by_question.items():
        contexts = _cut_contexts(requests, places, max_length, to_same_room=by_prompt)
        beginning = os.path.commonprefix(list(contexts.values()))  # noqa: RUF071 (of tokens)
        if beginning:
            batch.add(key, beginning, contexts, requests)
            continue
        if by_prompt:
            raise TaskError(
                f"the requests of {_describe(key)} have no prompt in common, and their route "
                f"depends on the prompt; give a fixed plan (path=FILE, or static_routing=true)"
            )
        places_by_context: dict[tuple[int, ...], list[int]] = {}
        for place, context in contexts.items():
            places_by_context.setdefault(context, []).append(place)
        for context, context_places in places_by_context.items():
            batch.add(key, context, dict.fromkeys(context_places, context), requests)
    return batch


def _cut_contexts(
    requests: Sequence[HarnessRequest],
    places: Sequence[int],
    max_length: int,
    *,
    to_same_room: bool,
) -> dict[int, tuple[int, ...]]:
    """Cut the contexts of a question's requests at their start, so that they fit the model.

    The last token of a continuation isn't read. A context keeps at least one token, which predicts
    the first token of the continuation.

    Args:
        requests: All requests.
        places: The places of the question's requests.
        max_length: How many tokens the model reads.
        to_same_room: Whether every context leaves room for the question's longest continuation, or
            only for its own.

    Returns:
        Place of a request → its context.
    """
    longest = max(len(requests[place].continuation) for place in places)
    contexts = {}
    for place in places:
        num_after = longest
        if not to_same_room:
            num_after = len(requests[place].continuation)
        room = max(max_length + 1 - num_after, 1)
        contexts[place] = tuple(requests[place].context[-room:])
    return contexts


def _describe(key: Hashable) -> str:
    """Return the key of a question as words."""
    if isinstance(key, tuple):
        return " ".join(map(str, key))
    return str(key)


@dataclass
class RequestScorer:
    """Scores requests with a routed model.

    Attributes:
        routed: The model.
        max_length: How many tokens the model reads.
        batch_size: Rows in a pass, or `auto` to choose by memory. A question is one row, if the
            model can read several continuations behind one copy of their prompt (see `can_pack`).
            Otherwise each continuation is a row. A question is never split over two passes.
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
            on_progress: Called after each pass with the number of continuations that it scored.

        Returns:
            The answer to each request, and question → its route (empty for a static path).
        """
        if isinstance(decides, StaticPath):
            return self.score_plans(requests, [decides])[0], {}
        request_batch = batch_requests(requests, self.max_length, by_prompt=by_prompt)
        scores: dict[int, Score] = {}
        routes: dict[Hashable, Decisions] = {}
        for places, batch in self._batches(request_batch.questions):
            keys = [request_batch.keys[place] for place in places]
            policy: Policy
            if isinstance(decides, Mapping):
                policy = FixedPolicy([decides[key] for key in keys], self.routed.num_layers)
            else:
                policy = decides
            batch_scores, batch_routes = self._score_batch(batch, policy)
            self.count(batch_routes)
            scores.update(zip(places, batch_scores, strict=True))
            for key, route in zip(keys, batch_routes.tolist(), strict=True):
                routes[key] = tuple(route)
            on_progress(sum(len(request.continuations) for request in batch.requests))
        return request_batch.answers(scores), routes

    def score_plans(
        self, requests: Sequence[HarnessRequest], plans: Sequence[Paths | StaticPath]
    ) -> list[list[OptionScore]]:
        """Return the answers to all requests under each of several plans.

        Layers that several plans begin with run once.
        """
        request_batch = batch_requests(requests, self.max_length, by_prompt=True)
        scores: list[dict[int, Score]] = [{} for _ in plans]  # by plan, then by place
        for places, batch in self._batches(request_batch.questions):
            keys = [request_batch.keys[place] for place in places]
            pairs: list[tuple[int, Decisions | StaticPath]] = []
            for plan in plans:
                for row, key in enumerate(keys):
                    path = plan[key] if isinstance(plan, Mapping) else plan
                    pairs.append((row, path))
            batch_scores = iter(batch.scores(pairs, greedy=True))
            for plan_scores in scores:
                next_scores = itertools.islice(batch_scores, len(places))
                plan_scores.update(zip(places, next_scores, strict=True))
            batch.forget()
        return [request_batch.answers(plan_scores) for plan_scores in scores]

    def _score_batch(self, batch: ChoiceBatch, policy: Policy) -> tuple[list[Score], Tensor]:
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
        """Yield the questions of each pass, as places and as a batch, the longest questions first.

        The places are those in `questions`.
        """
        lengths = [question.length for question in questions]
        num_rows = self._count_rows(questions)
        order = sorted(range(len(questions)), key=lambda place: lengths[place], reverse=True)
        batcher = MemoryBatcher(self.routed.model)
        while order:
            if isinstance(self.batch_size, int):
                max_rows = self.batch_size
            else:
                num_logits = max(questions[place].num_after for place in order) + 1
                size = PathSize(lengths[order[0]], num_logits)
                max_rows = min(self.max_batch_size, batcher.num_paths(size))
            num_questions = _fill_pass(order, lengths, num_rows, max_rows)
            places = order[:num_questions]
            order = order[num_questions:]
            batch = [questions[place] for place in places]
            yield places, ChoiceBatch(self.routed, batch, STATE_CACHE_GB)

    def _count_rows(self, questions: Sequence[Request]) -> list[int]:
        """Return how many rows of a pass each question takes."""
        model = self.routed.model
        longest = max((question.length for question in questions), default=0)
        if can_pack(model, longest):  # so all shorter questions can be packed too
            return [1] * len(questions)
        num_rows = []
        for question in questions:
            if can_pack(model, question.length):
                num_rows.append(1)
            else:
                num_rows.append(len(question.split()))
        return num_rows


def _fill_pass(
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
    for num_questions, place in enumerate(order):  # the number without this question
        rows += num_rows[place]
        is_full = rows > max_rows
        is_busy = num_questions * longest >= ENOUGH_TOKENS
        needs_padding = lengths[place] < LEAST_FILLED * longest
        if num_questions > 0 and (is_full or (is_busy and needs_padding)):
            return num_questions
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
    process. A request stays unchanged if the prompt and the longest answer fit into the model's
    context, or if the answer takes at most half of the context.

    Args:
        requests: The harness' requests.
        encode: Encodes a prompt.
        max_length: The context: how many tokens the model reads and writes in total.
        max_new_tokens: The maximum length of an answer if a request doesn't set it.
        warns: Whether to log a warning about shorter answers.

    Source: ours (docs/differences.md, D-27).
    """
    results: list[Instance] = []
    limits: dict[tuple[str, int], list[int]] = {}  # (task, requested length) → limits
    for request in requests:
        prompt, settings = request.args
        settings = dict(normalize_gen_kwargs(settings, max_new_tokens))
        length = settings["max_gen_toks"]
        limit = _limit_answer(prompt, length, encode, max_length)
        if limit == length:
            results.append(request)
            continue
        settings["max_gen_toks"] = limit
        limited_request = copy.copy(request)
        limited_request.arguments = (prompt, settings)
        results.append(limited_request)
        limits.setdefault((request.task_name or "a task", length), []).append(limit)
    if warns:
        for (task, length), task_limits in limits.items():
            _warn_of_limits(task, length, task_limits, max_length)
    return results


def _limit_answer(
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
    num_read_rounded_up = step * math.ceil(num_read / step)
    return max(half, max_length - num_read_rounded_up)


def _warn_of_limits(task: str, length: int, limits: Sequence[int], max_length: int) -> None:
    """Warn that the answers of a task have at most these numbers of tokens."""
    most = str(max(limits))
    if min(limits) < max(limits):
        most = f"{min(limits)} to {max(limits)}"
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

    A request with `repeats` above 1 needs several answers, so it remains that many times.

    Returns:
        The remaining requests; and for each original request, the place of its answer among the
        answers to the remaining requests.
    """
    remaining: list[Any] = []
    answer_places: list[int] = []
    places_by_id: dict[int, list[int]] = {}  # id of a request → its places in `remaining`
    for request in requests:
        request_places = places_by_id.setdefault(id(request), [])
        num_answers = request.repeats or 1  # None if the request was made by hand
        if len(request_places) < num_answers:
            request_places.append(len(remaining))
            remaining.append(request)
        answer_places.append(request_places[-1])
    return remaining, answer_places
