"""The data that baselines may be fitted on, and how candidates are measured on it.

Axes: N candidates, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from drllm.errors import ModelError
from drllm.paths import Decisions
from drllm.records.supervision import SupervisionRecord

if TYPE_CHECKING:
    from drllm.models.routed_model import RoutedModel
    from drllm.models.scoring.score import Outcome, Request

WORST = -100.0  # nats in place of a value that isn't finite, so that means are finite
STATE_CACHE_GB = 1.0  # for states that candidates share while they are measured

Measure: TypeAlias = Callable[[Sequence[Decisions]], list[float]]
"""Returns the value of each candidate. A candidate is the decisions of a plan that a baseline may
choose. A larger value is better."""
Remember: TypeAlias = Callable[[str, Sequence[Decisions], Measure], list[float]]
"""Returns the values of candidates, and keeps them. It takes the name of a measure, the candidates,
and the measure, which it calls for values that it doesn't have."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """The data of one task that baselines may be fitted on, never the questions that are reported.

    It can be pickled, since baselines may be fitted in another process.

    Attributes:
        name: The task's name.
        prompts: The token ids of each calibration prompt of the task, `[N]`.
        questions: The same prompts with their options; empty for a task without options.
        golds: The number of the right option of each question.
        supervision: The routers' targets; empty if the evaluation has none.
        label_counts: How often each decision is a target of the routers at each layer, `[L][3]`.
    """

    name: str = ""
    prompts: Sequence[Sequence[int]] = ()
    questions: Sequence[Request] = ()
    golds: Sequence[int] = ()
    supervision: Sequence[SupervisionRecord] = ()
    label_counts: Sequence[Sequence[int]] = ()


def measure_all(_name: str, candidates: Sequence[Decisions], measure: Measure) -> list[float]:
    """Measure all candidates and keep nothing."""
    return measure(candidates)


def make_measure(
    routed: RoutedModel, material: Material, kind: str, remember: Remember = measure_all
) -> Measure:
    """Return a function that measures candidates in nats.

    Args:
        routed: The model.
        material: The prompts and questions to measure on.
        kind: `loss` measures the mean log-probability of the calibration prompts' tokens, without
            the first token of each prompt. `answers` measures the mean log-probability of the gold
            option among a question's options.
        remember: Keeps the values.

    Raises:
        ModelError: The returned function raises this if the value of the full path isn't finite. If
            the value of another candidate isn't finite, it counts as the worst.

    Source: SLEB (arXiv 2402.09025) chooses by perplexity; TALE (arXiv 2510.22767), by
        log-probability (D-18).
    """
    mean_logprobs = _mean_token_logprobs
    if kind == "answers":
        mean_logprobs = _mean_answer_logprobs

    def measure(candidates: Sequence[Decisions]) -> list[float]:
        return mean_logprobs(routed, material, candidates)

    return lambda candidates: remember(f"{material.name} by {kind}", candidates, measure)


def _mean_token_logprobs(
    routed: RoutedModel, material: Material, candidates: Sequence[Decisions]
) -> list[float]:
    from drllm.models.scoring.score import Request

    texts = [Request.from_text(ids) for ids in material.prompts if len(ids) > 1]
    num_tokens = sum(len(text.continuations[0]) for text in texts)
    return _mean_scores(
        routed, candidates, texts, lambda outcome, _: outcome.logprobs[0], num_tokens
    )


def _mean_answer_logprobs(
    routed: RoutedModel, material: Material, candidates: Sequence[Decisions]
) -> list[float]:
    def measure(outcome: Outcome, place: int) -> float:
        if not all(map(math.isfinite, outcome.logprobs)):
            return -math.inf
        return log_share(outcome.logprobs, material.golds[place])

    questions = material.questions
    return _mean_scores(routed, candidates, questions, measure, len(questions))


def _mean_scores(
    routed: RoutedModel,
    candidates: Sequence[Decisions],
    requests: Sequence[Request],
    measure: Callable[[Outcome, int], float],
    count: int,
) -> list[float]:
    """Return the value of each candidate: the sum of its scores on the requests over a count."""
    from drllm.models.scoring.score import score

    means = []
    for decisions, outcomes in zip(
        candidates,
        score(routed, requests, candidates, state_cache_gb=STATE_CACHE_GB),
        strict=True,
    ):
        scores = [measure(outcome, place) for place, outcome in enumerate(outcomes)]
        if not all(map(math.isfinite, scores)) and set(decisions) == {1}:
            raise ModelError(
                "the base model's own log-probabilities are not finite; load it with --dtype "
                "float32"
            )
        means.append(sum(value if math.isfinite(value) else WORST for value in scores) / count)
    return means


def log_share(logprobs: Sequence[float], number: int) -> float:
    """Return the log of an option's share of the probability of all options.

    Args:
        logprobs: The log-probability of each option, summed over its tokens.
        number: The number of the option, from 0.
    """
    highest = max(logprobs)
    total = sum(math.exp(logprob - highest) for logprob in logprobs)
    return logprobs[number] - highest - math.log(total)
