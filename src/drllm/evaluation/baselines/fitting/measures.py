"""How good decisions are on questions that a setting may be chosen on.

Two measures, both in nats and the larger the better: the gold option's log-probability among the
options, and the log-probability of a text's tokens. Both read the whole set under every candidate
given at once, so that candidates share the beginnings that they have in common. They raise
`ModelError` on a log-probability that isn't finite.
"""

import math
from collections.abc import Callable, Sequence

from drllm.errors import ModelError
from drllm.evaluation.baselines.base import Material, Measure
from drllm.models.scoring.batching import blocks_of
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question
from drllm.paths import Decisions, Plan
from drllm.tuning.judge import log_share

BATCH_SIZE = 16
"""Questions a pass; of like length, so that little is padding."""
STATE_CACHE_GB = 1.0


def _under_plans(batch: ChoiceBatch, plans: Sequence[Plan]) -> list[list[tuple[float, ...]]]:
    """Score a batch under each plan, and give up its states: each batch may hold as many."""
    num = len(batch.questions)
    sums = batch.logprobs([(row, plan) for plan in plans for row in range(num)])
    batch.forget()
    return [sums[start : start + num] for start in range(0, len(sums), num)]


def by_loss(material: Material) -> Measure:
    """Return the mean log-probability of a token of the calibration prompts, but their first ones.

    Source: SLEB (arXiv 2402.09025), which chooses by perplexity.
    """
    texts = [Question(ids[:1], [ids[1:]]) for ids in material.prompts if len(ids) > 1]
    num_tokens = sum(len(text.continuations[0]) for text in texts)
    return _measure(material, texts, lambda _, sums: sums[0], num_tokens)


def by_answers(material: Material) -> Measure:
    """Return the mean log-probability of the gold options, of the options and not of the text.

    Source: TALE (arXiv 2510.22767), by log-probability (D-18).
    """

    def of_gold(place: int, sums: Sequence[float]) -> float:
        return log_share(sums, material.golds[place])

    return _measure(material, material.questions, of_gold, len(material.questions))


def _measure(
    material: Material,
    questions: Sequence[Question],
    value_of: Callable[[int, Sequence[float]], float],
    count: int,
) -> Measure:
    """Return the measure that adds up a value of each question's sums, and divides by a count."""
    lengths = [question.length for question in questions]
    batches = [
        (block, ChoiceBatch(material.routed, [questions[i] for i in block], STATE_CACHE_GB))
        for block in blocks_of(lengths, least=1, batch_size=BATCH_SIZE)
    ]

    def measure(candidates: Sequence[Decisions]) -> list[float]:
        totals = [0.0] * len(candidates)
        for places, batch in batches:
            for candidate, of_questions in enumerate(_under_plans(batch, candidates)):
                pairs = zip(places, of_questions, strict=True)
                totals[candidate] += sum(_finite(value_of(place, sums)) for place, sums in pairs)
        return [total / count for total in totals]

    return measure


MEASURES: dict[str, Callable[[Material], Measure]] = {
    "loss": by_loss,
    "answers": by_answers,
}


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ModelError(
            "a candidate gives log-probabilities that are not finite, so it can't be compared; "
            "load the model with --dtype float32"
        )
    return value
