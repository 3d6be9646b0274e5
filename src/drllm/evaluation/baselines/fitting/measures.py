"""How good decisions, or paths, are on questions that a setting may be chosen on.

Two measures, both in nats and the larger the better: the gold option's log-probability among the
options, and the log-probability of a text's tokens. Both read the whole set under every candidate
given at once, so that candidates share the beginnings that they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from drllm.errors import ModelError
from drllm.evaluation.baselines.material import Material, PathMeasure
from drllm.evaluation.blocks import blocks_of
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question, Tokens
from drllm.paths import Decisions, Path

BATCH_SIZE = 16
"""Questions a pass; of like length, so that little is padding."""
STATE_CACHE_GB = 1.0

Measure: TypeAlias = Callable[[Sequence[Decisions]], list[float]]

Scores: TypeAlias = list[tuple[float, ...]]
"""For every question of a batch, the summed log-probability of each continuation."""


def by_loss(material: Material) -> Measure:
    """Return the log-probability of the calibration prompts' own tokens."""
    texts = [text_question(tokens) for tokens in material.prompts if len(tokens) > 1]
    return token_logprob([_batch(material, texts, places) for places in _by_length(texts)])


def by_answers(material: Material) -> Measure:
    """Return the log-probability of the right options."""
    return gold_logprob(*_batches(material))


def by_answers_along(material: Material) -> PathMeasure:
    """Return the same of paths that decisions can't express."""
    return gold_logprob_along(*_batches(material))


MEASURES: dict[str, Callable[[Material], PathMeasure]] = {
    "loss": by_loss,
    "answers": by_answers,
    "answers along": by_answers_along,
}


def _batches(material: Material) -> tuple[list[ChoiceBatch], list[list[int]]]:
    """Return the questions with options in batches, and which options are right in each."""
    grouped = _by_length(material.questions)
    return (
        [_batch(material, material.questions, places) for places in grouped],
        [[material.golds[place] for place in places] for places in grouped],
    )


def _batch(material: Material, questions: Sequence[Question], places: Sequence[int]) -> ChoiceBatch:
    return ChoiceBatch(material.routed, [questions[place] for place in places], STATE_CACHE_GB)


def _by_length(questions: Sequence[Question]) -> list[tuple[int, ...]]:
    """Return the places of the questions of each batch."""
    lengths = [question.length for question in questions]
    return [block.places for block in blocks_of(lengths, least=1, batch_size=BATCH_SIZE)]


def gold_logprob(batches: Sequence[ChoiceBatch], golds: Sequence[Sequence[int]]) -> Measure:
    """Return the measure of a multiple-choice set: mean log-probability of the gold options.

    Of the options, not of the text: exp of a question's sums, scaled to add up to 1.

    Args:
        batches: The questions.
        golds: For each batch, the place of each question's gold option.

    Returns:
        The measure. It raises `ModelError` on a log-probability that isn't finite.

    Source: TALE (arXiv 2510.22767) for choosing by the task's own answers; the log-probability in
        place of its accuracy is ours, since it tells candidates apart with fewer questions.
    """

    def measure(plans: Sequence[Decisions]) -> list[float]:
        scores = [_scores(batch, plans) for batch in batches]
        return _gold_means(scores, golds, len(plans))

    return measure


def gold_logprob_along(
    batches: Sequence[ChoiceBatch], golds: Sequence[Sequence[int]]
) -> PathMeasure:
    """Return the same measure for paths that decisions can't express; see `gold_logprob`."""

    def measure(paths: Sequence[Path]) -> list[float]:
        scores = [batch.path_logprobs(paths) for batch in batches]
        return _gold_means(scores, golds, len(paths))

    return measure


def token_logprob(batches: Sequence[ChoiceBatch]) -> Measure:
    """Return the measure of texts: mean log-probability of a token, minus the next-token loss.

    Of texts (`text_question`), or of worked answers; all tokens count alike.

    Source: SLEB (arXiv 2402.09025), which chooses by perplexity.
    """
    num_tokens = sum(len(q.continuations[0]) for batch in batches for q in batch.questions)

    def measure(plans: Sequence[Decisions]) -> list[float]:
        totals = [0.0] * len(plans)
        for batch in batches:
            for place, scores in enumerate(_scores(batch, plans)):
                totals[place] += sum(_finite(sums[0]) for sums in scores)
        return [total / num_tokens for total in totals]

    return measure


def text_question(tokens: Tokens) -> Question:
    """Return a text as a question for `token_logprob`: all tokens but the first are predicted."""
    return Question(tokens[:1], [tokens[1:]])


def log_share(sums: Sequence[float], place: int) -> float:
    """Return the log of an option's share of the probability, from all options' summed logs.

    Example:
        >>> round(math.exp(log_share([-1000.0, -1000.0], 0)), 6)
        0.5
    """
    highest = max(sums)
    return sums[place] - highest - math.log(sum(math.exp(value - highest) for value in sums))


def _scores(batch: ChoiceBatch, plans: Sequence[Decisions]) -> list[Scores]:
    """Score a batch under each plan, and give up its states: each batch may hold as many."""
    num = len(batch.questions)
    sums = batch.logprobs([(row, plan) for plan in plans for row in range(num)])
    batch.forget()
    return [sums[start : start + num] for start in range(0, len(sums), num)]


def _gold_means(
    scores: Sequence[Sequence[Scores]], golds: Sequence[Sequence[int]], num_candidates: int
) -> list[float]:
    """Average over all questions of all batches, for each candidate."""
    num_questions = sum(map(len, golds))
    totals = [0.0] * num_candidates
    for of_batch, gold in zip(scores, golds, strict=True):
        for place, of_candidate in enumerate(of_batch):
            totals[place] += sum(
                _finite(log_share(sums, option))
                for sums, option in zip(of_candidate, gold, strict=True)
            )
    return [total / num_questions for total in totals]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ModelError(
            "a candidate gives log-probabilities that are not finite, so it can't be compared; "
            "load the model with --dtype float32"
        )
    return value
