"""From the harness' requests to questions: which of them share a prompt, and what a router reads.

The harness asks for one log-likelihood at a time: a context and a continuation. Owns putting
those of one question together, so that its context is read once and its route is one, and finding
the text that may decide on that route: what all of the question's contexts begin with. For most
tasks that is the context; where the options stand in the context (WinoGrande), it is the text
before them, and what differs is read but not scored. Leaves running them to `models.scoring`.
Loads nothing of the harness.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from drllm.errors import TaskError
from drllm.models.scoring.packing import Question

Tokens: TypeAlias = Sequence[int]


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to score.

    Attributes:
        question: What tells its question from others, such as the task's name and the row.
        context: Tokens in front of the continuation, at least one.
        continuation: Tokens to score, at least one.
    """

    question: Hashable
    context: Tokens
    continuation: Tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """The questions of a list of requests.

    Attributes:
        questions: Each with its prompt and continuations.
        keys: For each of these, its requests' `Request.question`.
        places: For each request, the place of its question and of its continuation there.
    """

    questions: list[Question]
    keys: list[Hashable]
    places: list[tuple[int, int]]


def asked(requests: Sequence[Request], max_length: int, *, by_prompt: bool) -> Asked:
    """Put the requests of one question together.

    Requests that occur twice, as the harness asks where processes share the work unevenly, are
    scored once.

    Args:
        requests: In any order.
        max_length: Most tokens that the model reads. What is longer loses tokens at its start, as
            the harness has it; its continuation is never cut.
        by_prompt: Somebody will decide on the prompt of a question, so there must be one, and the
            contexts of a question are cut alike. Otherwise contexts that have nothing in common
            are taken for questions of their own, each cut by itself.

    Raises:
        TaskError: A continuation longer than `max_length`; with `by_prompt`, a question whose
            contexts have no common beginning.
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
    found = Asked([], [], [(0, 0)] * len(requests))
    for key, places in groups.items():
        longest = max(len(requests[place].continuation) for place in places)
        contexts = {
            place: _cut(
                requests[place].context,
                max_length + 1 - (longest if by_prompt else len(requests[place].continuation)),
            )
            for place in places
        }
        prompt = _common(list(contexts.values()))
        if prompt:
            _add(found, key, prompt, requests, contexts)
        elif by_prompt:
            raise TaskError(
                f"the requests of {_named(key)} have no prompt in common, so nothing can decide on "
                f"their route; give a fixed plan (decisions=FILE, or static_routing=true)"
            )
        else:
            for context in dict.fromkeys(contexts.values()):
                alike = {place: each for place, each in contexts.items() if each == context}
                _add(found, key, context, requests, alike)
    return found


def _add(
    found: Asked,
    key: Hashable,
    prompt: tuple[int, ...],
    requests: Sequence[Request],
    contexts: dict[int, tuple[int, ...]],
) -> None:
    """Add one question, and where each of its requests stands."""
    continuations: dict[tuple[tuple[int, ...], int], int] = {}
    for place, context in contexts.items():
        unscored = len(context) - len(prompt)
        tokens = (*context[len(prompt) :], *requests[place].continuation)
        number = continuations.setdefault((tokens, unscored), len(continuations))
        found.places[place] = (len(found.questions), number)
    found.questions.append(
        Question(prompt, [tokens for tokens, _ in continuations], [num for _, num in continuations])
    )
    found.keys.append(key)


def _cut(context: Tokens, most: int) -> tuple[int, ...]:
    """Return the last tokens of a context, one at least: behind it something is predicted."""
    return tuple(context[-max(most, 1) :])


def _common(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return what all contexts begin with."""
    if len(set(contexts)) == 1:
        return contexts[0]
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*contexts, strict=False))
    return tuple(tokens[0] for tokens in alike)


def _named(key: Hashable) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
