"""Generated answers that a model has room for, where a task asks for more than it holds.

The harness would cut the question to make room for the answer, or give up. Owns how long answers
get instead, and saying so. Leaves prompts that fill more than half of the context to the harness,
which cuts off their beginning and warns.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from drllm.evaluation.lm_eval.folders import room_for_answer

logger = logging.getLogger(__name__)

STEPS = 16
"""Into which a context is divided: answers are generated side by side where they may be equally
long, so that prompts of about one length should leave the same room."""


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
    or process. Requests for no more than half of the context stay as they are, as do those that
    fit. One warning a task says what was asked for and what is given.

    Args:
        requests: Each with a prompt and the settings of `generate`.
        encode: Makes tokens of a prompt.
        max_length: Most tokens that the model reads and writes in all.
        max_new_tokens: Of answers whose request doesn't say.
        warns: Whether this process says what it does; of several, one.

    Returns:
        The requests in order; those that are changed are copies.

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
        _warn(task, asked, max_length, min(rooms), max(rooms))
    return found


@functools.cache
def _warn(task: str, asked: int, max_length: int, least: int, most: int) -> None:
    """Say it once, however many systems answer the same questions."""
    given = f"{most}" if least == most else f"{least} to {most}"
    logger.warning(
        "%s asks for answers of up to %d tokens, and the model holds %d with the question; answers "
        "have at most %s",
        task,
        asked,
        max_length,
        given,
    )
