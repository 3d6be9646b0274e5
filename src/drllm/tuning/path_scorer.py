"""Scores static paths on questions, by an objective and by their right answers.

Many pairs of a path and a question are scored in shared passes. The layers that several paths begin
with run once. The objectives are explained in `objectives`.

Axes: N paths, Q questions.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from drllm.errors import ModelError
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.crossings import Crossings
from drllm.models.scoring.score import Outcome, Request, score
from drllm.paths import StaticPath
from drllm.search.evaluator import TokenizedPrompt, tokenize_prompt
from drllm.statistics.ranges import Amount, Share
from drllm.tasks.examples import Prompt
from drllm.tasks.rewards import grade
from drllm.tuning.objectives import GOLD, KL, LOSS

WORST = -100.0  # nats in place of a value that isn't finite, so that means are finite


class PathScores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of paths on questions.

    Attributes:
        objective: The objective of each path on each question, `[N][Q]`.
        right: 1 if the right option is the likeliest, else 0, `[N][Q]`; empty without options.
        seconds: How long scoring took.
    """

    objective: list[list[float]]
    right: list[list[Share]] = []
    seconds: Amount = 0.0


@dataclass(frozen=True, slots=True)
class Item:
    """A question as it is scored: its tokens, and the number of the right continuation.

    The number is None if the objective compares no options.
    """

    request: Request
    gold: int | None = None


def score_paths(
    routed: RoutedModel,
    items: Sequence[Item],
    paths: Sequence[StaticPath],
    objective: str,
    state_cache_gb: float | None,
    crossings: Crossings | None = None,
) -> PathScores:
    """Score paths on questions by one objective.

    A log-probability that isn't finite counts as `WORST`.

    Args:
        routed: The model.
        items: The questions; they must be made for the objective (see `make_items`).
        paths: The paths.
        objective: `GOLD`, `LOSS` or `KL`.
        state_cache_gb: Size of the cache of states that paths share; None chooses it by memory.
        crossings: What runs in the gaps of the paths; None for nothing.

    Raises:
        ModelError: A log-probability of the full path isn't finite.
    """
    started = time.perf_counter()
    requests = [item.request for item in items]
    outcomes = score(
        routed,
        requests,
        paths,
        kl=objective == KL,
        state_cache_gb=state_cache_gb,
        crossings=crossings,
    )  # [N][Q]
    values = np.zeros((len(paths), len(items)))  # [N, Q]
    right = np.zeros((len(paths), len(items)))
    for number, path in enumerate(paths):
        for place, item in enumerate(items):
            value, is_right = _judge_outcome(item, outcomes[number][place], objective)
            if not math.isfinite(value):
                _refuse_full_path(path, routed.num_layers)
                value = WORST
            values[number, place] = value
            right[number, place] = is_right
    return PathScores(
        objective=values.tolist(),
        right=right.tolist() if objective == GOLD else [],
        seconds=time.perf_counter() - started,
    )


def _refuse_full_path(path: StaticPath, num_layers: int) -> None:
    """Raise ModelError if the path is the full path, whose scores must be finite."""
    if path.layers == tuple(range(num_layers)):
        raise ModelError(
            "the base model's own log-probabilities are not finite; load it with --dtype float32"
        )


def _judge_outcome(item: Item, outcome: Outcome, objective: str) -> tuple[float, bool]:
    """Return the objective of a path on a question, and whether the right option is the likeliest.

    The objective may be infinite.
    """
    if objective == KL:
        value = -math.inf if outcome.kl is None else -outcome.kl
        return value, False
    logprobs = outcome.logprobs
    if objective == LOSS:
        return logprobs[0] / len(item.request.continuations[0]), False
    assert item.gold is not None
    if not all(map(math.isfinite, logprobs)):
        return -math.inf, False
    likeliest = logprobs.index(max(logprobs))
    return log_share(logprobs, item.gold), likeliest == item.gold


def log_share(logprobs: Sequence[float], number: int) -> float:
    """Return the log of an option's share of the probability of all options.

    Args:
        logprobs: The log-probability of each option, summed over its tokens.
        number: The number of the option, from 0.
    """
    highest = max(logprobs)
    total = sum(math.exp(logprob - highest) for logprob in logprobs)
    return logprobs[number] - highest - math.log(total)


def make_items(
    model: RoutedModel | BaseModel, prompts: Sequence[Prompt], objective: str
) -> list[Item]:
    """Return prompts as items to score by an objective. Raises what `tokenize_prompt` raises."""
    return [_make_item(tokenize_prompt(model, prompt), objective) for prompt in prompts]


def _make_item(tokenized: TokenizedPrompt, objective: str) -> Item:
    if objective == GOLD:
        return Item(tokenized.request, tokenized.prompt.gold)
    if objective == KL:
        return Item(Request(tokenized.tokens))
    return Item(Request(tokenized.tokens, [_right_continuation(tokenized)]))


def make_text_items(model: RoutedModel | BaseModel, prompts: Sequence[Prompt]) -> list[Item]:
    """Return prompts with their right answers as items to score by `LOSS`, as one text each.

    All tokens of a text but the first are scored.
    """
    items = []
    for prompt in prompts:
        tokenized = tokenize_prompt(model, prompt)
        tokens = [*tokenized.tokens, *_right_continuation(tokenized)]
        items.append(Item(Request.from_text(tokens)))
    return items


def _right_continuation(tokenized: TokenizedPrompt) -> Sequence[int]:
    return tokenized.continuations[tokenized.prompt.gold or 0]


def grade_answers(routed: RoutedModel, path: StaticPath, prompts: Sequence[Prompt]) -> list[float]:
    """Generate the answers to prompts along a path, and grade each from 0 (wrong) to 1 (right)."""
    grades = [0.0] * len(prompts)
    # Prompts with the same settings are answered together.
    places_by_settings: dict[tuple[int, bool], list[int]] = {}
    for place, prompt in enumerate(prompts):
        places_by_settings.setdefault((prompt.max_new_tokens, prompt.chat), []).append(place)
    with routed.fixed(path):
        for (max_new_tokens, chat), places in places_by_settings.items():
            answers = generate_many(
                routed,
                [prompts[place].content for place in places],
                max_new_tokens=max_new_tokens,
                chat=chat,
                route_first=False,
            )
            for place, answer in zip(places, answers, strict=True):
                grades[place] = grade(prompts[place], answer.text)
    return grades
