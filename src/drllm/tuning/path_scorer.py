"""Scores static paths on questions: the objective, right answers and next-token losses.

Many pairs of a path and a question are scored in shared passes, in which common prefixes run once.

Axes: N paths, Q questions.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from drllm.errors import ModelError
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import batches
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Request
from drllm.paths import StaticPath
from drllm.search.evaluator import TokenizedPrompt, tokenize_prompt
from drllm.statistics.intervals import Floats
from drllm.tasks.examples import Prompt
from drllm.tasks.rewards import grade
from drllm.tuning.objectives import GOLD, KL, LOSS

BLOCK_SIZE = 32  # questions of similar length that are scored together
WORST = -100.0  # nats in place of a value that isn't finite, so that means are finite


class Scores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of paths on questions, `[N][Q]`; `right` is empty without options."""

    objective: list[list[float]]
    right: list[list[float]] = []
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Item:
    """A question as it is scored: its tokens, and the place of the right continuation."""

    request: Request
    gold: int | None = None


class PathScorer:
    """Scores paths on a fixed list of questions, by one objective."""

    def __init__(
        self,
        routed: RoutedModel,
        items: Sequence[Item],
        objective: str,
        state_cache_gb: float | None,
    ) -> None:
        self.routed = routed
        self.items = items
        self.objective = objective
        self.state_cache_gb = state_cache_gb

    def score(self, paths: Sequence[StaticPath], places: Sequence[int] | None = None) -> Scores:
        """Score paths on the questions at some places, or on all questions.

        A log-probability that isn't finite counts as `WORST`.

        Raises:
            ModelError: A log-probability of the full path isn't finite.
        """
        started = time.perf_counter()
        if places is None:
            places = range(len(self.items))
        objective = np.zeros((len(paths), len(places)))  # [N, Q]
        right = np.zeros((len(paths), len(places)))
        lengths = [self.items[place].request.length for place in places]
        for block in batches(lengths, BLOCK_SIZE):
            block_places = [places[index] for index in block]
            objective[:, block], right[:, block] = self._score_block(paths, block_places)
        return Scores(
            objective=objective.tolist(),
            right=right.tolist() if self.objective == GOLD else [],
            seconds=time.perf_counter() - started,
        )

    def _score_block(
        self, paths: Sequence[StaticPath], places: Sequence[int]
    ) -> tuple[Floats, Floats]:
        """Return the objectives and right answers of paths on a block's questions, `[N, Q]`."""
        items = [self.items[place] for place in places]
        batch = ChoiceBatch(self.routed, [item.request for item in items], self.state_cache_gb)
        # Sorted, so that paths with a common prefix are in the same pass.
        order = sorted(range(len(paths)), key=lambda number: paths[number].layers)
        pairs = list(itertools.product(order, range(len(items))))
        # Decisions instead of paths where possible, since they show which path is the full path,
        # whose KL is 0.
        plans = [path.plan(self.routed.num_layers) for path in paths]
        scores = batch.scores(
            [(row, plans[number]) for number, row in pairs], kl=self.objective == KL
        )
        objective = np.zeros((len(paths), len(items)))
        right = np.zeros((len(paths), len(items)))
        for (number, row), score in zip(pairs, scores, strict=True):
            value, is_right = self._value(items[row], score.logprobs, score.kl)
            if not math.isfinite(value):
                self._refuse_full_path(paths[number])
                value = WORST
            objective[number, row] = value
            right[number, row] = is_right
        return objective, right

    def _refuse_full_path(self, path: StaticPath) -> None:
        """Raise ModelError if the path is the full path, whose scores must be finite."""
        if path.layers == tuple(range(self.routed.num_layers)):
            raise ModelError(
                "the base model's own log-probabilities are not finite; load it with --dtype "
                "float32"
            )

    def _value(self, item: Item, sums: Sequence[float], kl: float | None) -> tuple[float, bool]:
        """Return the objective, and whether the right option is the likeliest.

        `sums` are the summed log-probabilities of the continuations, and `kl` is the prompt's KL.
        """
        if self.objective == KL:
            return (-math.inf if kl is None else -kl), False
        if self.objective == LOSS:
            return sums[0] / len(item.request.continuations[0]), False
        assert item.gold is not None
        if not all(map(math.isfinite, sums)):
            return -math.inf, False
        return log_share(sums, item.gold), sums.index(max(sums)) == item.gold


def log_share(sums: Sequence[float], place: int) -> float:
    """Return the log of an option's share of the probability of all options.

    `sums` are the summed log-probabilities of the options.
    """
    highest = max(sums)
    return sums[place] - highest - math.log(sum(math.exp(value - highest) for value in sums))


def make_items(routed: RoutedModel, prompts: Sequence[Prompt], objective: str) -> list[Item]:
    """Return prompts as items to score; raise errors as `tokenize_prompt` does."""
    return [_make_item(tokenize_prompt(routed, prompt), objective) for prompt in prompts]


def _make_item(tokenized: TokenizedPrompt, objective: str) -> Item:
    if objective == GOLD:
        return Item(tokenized.request, tokenized.prompt.gold)
    if objective == KL:  # only the prompt is scored, but a request needs a continuation
        return Item(Request(tokenized.tokens, [tokenized.tokens[:1]]))
    return Item(Request(tokenized.tokens, [_right_continuation(tokenized)]))


def make_text_items(routed: RoutedModel, prompts: Sequence[Prompt]) -> list[Item]:
    """Return prompts with their right answers as texts, which are scored from the second token."""
    items = []
    for prompt in prompts:
        tokenized = tokenize_prompt(routed, prompt)
        tokens = [*tokenized.tokens, *_right_continuation(tokenized)]
        items.append(Item(Request(tokens[:1], [tokens[1:]])))
    return items


def _right_continuation(tokenized: TokenizedPrompt) -> Sequence[int]:
    return tokenized.continuations[tokenized.prompt.gold or 0]


def grade_answers(routed: RoutedModel, path: StaticPath, prompts: Sequence[Prompt]) -> list[float]:
    """Generate the answers of prompts along a path, and grade them."""
    grades = [0.0] * len(prompts)
    places_by_way: dict[tuple[int, bool], list[int]] = {}  # places of prompts answered together
    for place, prompt in enumerate(prompts):
        places_by_way.setdefault((prompt.max_new_tokens, prompt.chat), []).append(place)
    with routed.fixed(path):
        for (max_new_tokens, chat), places in places_by_way.items():
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
