"""The harness' requests: which make up a question, and how long generated answers may get.

The harness asks for one log-likelihood at a time: a context and a continuation. Those of one
question are put together, so that its context is read once and its route is one. What a router may
read is what all of the question's contexts begin with: for most tasks the context; where the
options stand in the context (WinoGrande), the text before them, and what differs is read but not
scored.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os.path
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from drllm.errors import TaskError
from drllm.evaluation.lm_eval.folders import room_for_answer
from drllm.models.scoring.packing import Question

Tokens: TypeAlias = Sequence[int]

STEPS = 16
"""Into which a context is divided: answers are generated side by side where they may be equally
long, so that prompts of about one length should leave the same room."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to score after a context, each of one token or more.

    `question` tells its question from others, such as the task's name and the row.
    """

    question: Hashable
    context: Tokens
    continuation: Tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """The questions of a list of requests, and for each its requests' `Request.question`.

    `places` has for each request the place of its question and of its continuation there.
    """

    questions: list[Question]
    keys: list[Hashable]
    places: list[tuple[int, int]]


def asked(requests: Sequence[Request], max_length: int, *, by_prompt: bool) -> Asked:
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
    found = Asked([], [], [(0, 0)] * len(requests))
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
                f"their route; give a fixed plan (decisions=FILE, or static_routing=true)"
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
                Question(
                    prompt,
                    [tokens for tokens, _ in continuations],
                    [num for _, num in continuations],
                )
            )
    return found


def _named(key: Hashable) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)


# --- generated answers --------------------------------------------------------------------------


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
            room = room_for_answer(step * math.ceil(length / step), max_length)
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

    Example:
        >>> from types import SimpleNamespace
        >>> one, twice = SimpleNamespace(repeats=1), SimpleNamespace(repeats=2)
        >>> wanted, places = without_padding([one, twice, twice, twice, twice])
        >>> len(wanted), places
        (3, [0, 1, 2, 2, 2])
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
