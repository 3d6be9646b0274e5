"""Score the requests of lm-evaluation-harness ("the harness"), under one route for each question.

A request of the harness is a context and one continuation. The requests of a question are put
together, so that the question has one route, and its context is read once. Routers read the common
beginning of the question's contexts. For most tasks this is the whole context. If the contexts
contain the options (WinoGrande), it is the text before the options. The rest of the context is then
read but not scored.

Axes: P questions, L layers.
"""

import itertools
import os.path
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from drllm.errors import TaskError
from drllm.model.batching import MemoryBatcher, PathSize
from drllm.model.layers import can_pack
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import FixedPolicy, Policy
from drllm.models.scoring.score import Outcome, Request, Scorer
from drllm.paths import Decisions, StaticPath

OptionScore: TypeAlias = tuple[float, bool]
"""A continuation's log-probability in nats, and whether it is the likeliest continuation."""

DecisionsByQuestion: TypeAlias = Mapping[Any, Decisions]
"""Question → its decisions. Questions are identified as in `HarnessRequest.question`."""
PathsByQuestion: TypeAlias = Mapping[Any, Decisions | StaticPath]
"""Question → its decisions or static path."""
LayerChoice: TypeAlias = Policy | DecisionsByQuestion | StaticPath
"""What decides which layers a question runs."""

STATE_CACHE_GB = 1.0  # for states that the paths of a batch share; emptied after each batch

ENOUGH_TOKENS = 512
"""A pass with this many tokens keeps a processor busy, so a larger pass isn't faster per token."""
LEAST_FILLED = 0.8
"""In a pass of `ENOUGH_TOKENS`, the least share of the columns that each row fills. The remaining
columns are padding."""


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

    def answers(self, outcomes: Mapping[int, Outcome]) -> list[OptionScore]:
        """Return the answer to each request.

        `outcomes` has the outcome of each question by its place in `questions`.
        """
        return [
            (outcomes[place].logprobs[number], outcomes[place].greedy[number])
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
    batch = RequestBatch(places=[(0, 0)] * len(requests))
    for key, places in _group_by_question(requests, max_length).items():
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
        for context, context_places in _group_by_context(contexts).items():
            batch.add(key, context, dict.fromkeys(context_places, context), requests)
    return batch


def _group_by_question(
    requests: Sequence[HarnessRequest], max_length: int
) -> dict[Hashable, list[int]]:
    """Group the places of requests by question; refuse continuations longer than `max_length`."""
    places_by_question: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        if len(request.continuation) > max_length:
            raise TaskError(
                f"a continuation of {_describe(request.question)} has {len(request.continuation)} "
                f"tokens, and the model reads {max_length}; leave the task out, or use a model "
                f"with a longer context"
            )
        places_by_question.setdefault(request.question, []).append(place)
    return places_by_question


def _group_by_context(
    contexts: Mapping[int, tuple[int, ...]],
) -> dict[tuple[int, ...], list[int]]:
    """Group the places of a question's requests by context."""
    places_by_context: dict[tuple[int, ...], list[int]] = {}
    for place, context in contexts.items():
        places_by_context.setdefault(context, []).append(place)
    return places_by_context


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
class RouteCounts:
    """Counts routes: the number of prompts that were routed, and the sum of their executions."""

    prompts: int = 0
    executions: int = 0

    def add(self, routes: Tensor) -> None:
        """Count routes `[P, L]`."""
        self.prompts += len(routes)
        self.executions += int(routes.sum())


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
        counts: Counts the routes of all prompts.
    """

    routed: RoutedModel
    max_length: int
    batch_size: int | str
    max_batch_size: int
    counts: RouteCounts = field(default_factory=RouteCounts)

    def score(
        self,
        requests: Sequence[HarnessRequest],
        routing: LayerChoice,
        *,
        by_prompt: bool = True,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> tuple[list[OptionScore], dict[Hashable, Decisions]]:
        """Score requests under a policy, decisions by question, or a static path.

        Args:
            requests: The requests.
            routing: The policy, decisions or path.
            by_prompt: See `batch_requests`.
            on_progress: Called after each pass with the number of continuations that it scored.

        Returns:
            The answer to each request, and question → its route (empty for a static path).
        """
        if isinstance(routing, StaticPath):
            return self.score_plans(requests, [routing])[0], {}
        request_batch = batch_requests(requests, self.max_length, by_prompt=by_prompt)
        outcomes: dict[int, Outcome] = {}
        routes: dict[Hashable, Decisions] = {}
        for places, scorer in self._batches(request_batch.questions):
            keys = [request_batch.keys[place] for place in places]
            policy = self._make_policy(routing, keys)
            batch_outcomes, batch_routes = scorer.score_under_policy(policy)
            self.counts.add(batch_routes)
            outcomes.update(zip(places, batch_outcomes, strict=True))
            for key, route in zip(keys, batch_routes.tolist(), strict=True):
                routes[key] = tuple(route)
            on_progress(sum(len(request.continuations) for request in scorer.requests))
        return request_batch.answers(outcomes), routes

    def score_plans(
        self, requests: Sequence[HarnessRequest], plans: Sequence[PathsByQuestion | StaticPath]
    ) -> list[list[OptionScore]]:
        """Return the answers to all requests under each of several plans.

        Layers that several plans begin with run once.
        """
        request_batch = batch_requests(requests, self.max_length, by_prompt=True)
        outcomes: list[dict[int, Outcome]] = [{} for _ in plans]  # by plan, then by place
        for places, scorer in self._batches(request_batch.questions):
            keys = [request_batch.keys[place] for place in places]
            pairs: list[tuple[int, Decisions | StaticPath]] = []
            for plan in plans:
                for row, key in enumerate(keys):
                    path = plan[key] if isinstance(plan, Mapping) else plan
                    pairs.append((row, path))
            batch_outcomes = iter(scorer.score(pairs, greedy=True))
            for plan_outcomes in outcomes:
                next_outcomes = itertools.islice(batch_outcomes, len(places))
                plan_outcomes.update(zip(places, next_outcomes, strict=True))
            scorer.forget()
        return [request_batch.answers(plan_outcomes) for plan_outcomes in outcomes]

    def _make_policy(
        self, routing: Policy | DecisionsByQuestion, keys: Sequence[Hashable]
    ) -> Policy:
        """Return the policy for a pass with the questions of these keys."""
        if isinstance(routing, Mapping):
            return FixedPolicy([routing[key] for key in keys], self.routed.num_layers)
        return routing

    def _batches(self, questions: Sequence[Request]) -> Iterator[tuple[list[int], Scorer]]:
        """Yield the questions of each pass: their places, and their scorer.

        The places are those in `questions`. The longest questions come first.
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
            yield places, Scorer(self.routed, batch, STATE_CACHE_GB)

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
