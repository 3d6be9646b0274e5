"""Scores static paths on questions, by an objective and by their right answers.

Many pairs of a path and a question are scored in shared passes. The layers that several paths begin
with run once. The objectives are explained in `objectives`. `ScorePaths` and `GradeAnswers` do this
for the blocks of a tuning (see `score_table`).

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
from drllm.models.base.batching import group_by_length
from drllm.models.base.load import BaseModel
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath
from drllm.search.evaluator import TokenizedPrompt, tokenize_prompt
from drllm.statistics.intervals import Floats
from drllm.tasks.examples import Prompt
from drllm.tasks.rewards import grade
from drllm.tuning.objectives import GOLD, KL, LOSS
from drllm.work.run import BlockFunction, BlockSteps

BATCH_SIZE = 32  # questions of similar length that are scored together
WORST = -100.0  # nats in place of a value that isn't finite, so that means are finite


class Scores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of paths on questions.

    Attributes:
        objective: The objective of each path on each question, `[N][Q]`.
        right: 1 if the right option is the likeliest, else 0, `[N][Q]`; empty without options.
        seconds: How long scoring took.
    """

    objective: list[list[float]]
    right: list[list[float]] = []
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Item:
    """A question as it is scored: its tokens, and the number of the right continuation.

    The number is None if the objective compares no options.
    """

    request: Request
    gold: int | None = None


@dataclass(frozen=True, slots=True)
class PathsToScore:
    """A block of scores: each path is scored on each question."""

    paths: Sequence[StaticPath]
    items: Sequence[Item]
    objective: str


@dataclass(frozen=True)
class ScorePaths(BlockFunction[PathsToScore, Scores]):
    """Scores the paths of a block on its questions.

    Attributes:
        state_cache_gb: As for `PathScorer`, for each worker.
    """

    state_cache_gb: float | None

    def __call__(self, prepared: RoutedModel, data: PathsToScore, steps: BlockSteps) -> Scores:
        """Return the scores of a block."""
        scorer = PathScorer(prepared, data.items, data.objective, self.state_cache_gb)
        return scorer.score(data.paths)


@dataclass(frozen=True, slots=True)
class PromptsToAnswer:
    """A block of generated answers: each prompt is answered along one path."""

    path: StaticPath
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class GradeAnswers(BlockFunction[PromptsToAnswer, list[float]]):
    """Generates the answers of a block, and grades them."""

    def __call__(
        self, prepared: RoutedModel, data: PromptsToAnswer, steps: BlockSteps
    ) -> list[float]:
        """Return the grade of each answer."""
        return grade_answers(prepared, data.path, data.prompts)


class PathScorer:
    """Scores paths on a fixed list of questions, by one objective.

    Args:
        routed: The model.
        items: The questions.
        objective: `GOLD`, `LOSS` or `KL`; the items must be made for it (see `make_items`).
        state_cache_gb: Size of the cache of states that paths share; None chooses it by memory.
    """

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
        """Score paths on the questions at `places` in the list, or on all questions.

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
        for batch in group_by_length(lengths, BATCH_SIZE):
            batch_places = [places[index] for index in batch]
            objective[:, batch], right[:, batch] = self._score_batch(paths, batch_places)
        return Scores(
            objective=objective.tolist(),
            right=right.tolist() if self.objective == GOLD else [],
            seconds=time.perf_counter() - started,
        )

    def _score_batch(
        self, paths: Sequence[StaticPath], places: Sequence[int]
    ) -> tuple[Floats, Floats]:
        """Return the objectives and right answers of paths on a batch's questions, `[N, Q]`."""
        items = [self.items[place] for place in places]
        batch = ChoiceBatch(self.routed, [item.request for item in items], self.state_cache_gb)
        # Sorted, so that paths with a common beginning are in the same pass.
        order = sorted(range(len(paths)), key=lambda number: paths[number].layers)
        pairs = list(itertools.product(order, range(len(items))))  # (path, question)
        # Paths are written as decisions if possible. `ChoiceBatch` then recognises the full path,
        # whose KL is 0.
        plans = [path.plan(self.routed.num_layers) for path in paths]
        rows_and_plans = [(row, plans[number]) for number, row in pairs]
        scores = batch.scores(rows_and_plans, kl=self.objective == KL)
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

    def _value(self, item: Item, logprobs: Sequence[float], kl: float | None) -> tuple[float, bool]:
        """Return the objective on a question, and whether the right option is the likeliest.

        Args:
            item: The question.
            logprobs: The log-probability of each continuation, summed over its tokens.
            kl: The KL from the full path over the prompt's tokens; None if it isn't finite.
        """
        if self.objective == KL:
            return (-math.inf if kl is None else -kl), False
        if self.objective == LOSS:
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
    if objective == KL:  # only the prompt is scored, but a request needs a continuation
        return Item(Request(tokenized.tokens, [tokenized.tokens[:1]]))
    return Item(Request(tokenized.tokens, [_right_continuation(tokenized)]))


def make_text_items(model: RoutedModel | BaseModel, prompts: Sequence[Prompt]) -> list[Item]:
    """Return prompts with their right answers as items to score by `LOSS`, as one text each.

    All tokens of a text but the first are scored.
    """
    items = []
    for prompt in prompts:
        tokenized = tokenize_prompt(model, prompt)
        tokens = [*tokenized.tokens, *_right_continuation(tokenized)]
        items.append(Item(Request(tokens[:1], [tokens[1:]])))
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
