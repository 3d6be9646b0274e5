"""Prepare the requests of lm-evaluation-harness ("the harness") for generated answers.

An answer is limited to the room that the model has for it, and repeated requests are dropped.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from drllm.work.listener import logger

STEPS = 16
"""The number of steps into which the model's context length is divided, to limit answers. The
harness generates answers together if their maximum lengths are equal. So the length of a prompt is
rounded up to a whole step, and prompts of similar length get the same maximum."""


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
        f"{task} asks for answers of up to {length} tokens, but question and answer must fit into "
        f"the model's {max_length} tokens; answers have at most {most}"
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
