"""Lets base, the routed model and static paths answer a few questions in words, to be read.

Accuracy among options says little about how a model writes. These answers show it. They are greedy,
and nothing is measured on them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from drllm.models.routed_model import RoutedModel
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.batch_generation import GeneratedAnswer, generate_many
from drllm.models.routing.generate import end_tokens
from drllm.models.routing.policies import FullPolicy, RouterPolicy
from drllm.paths import StaticPath
from drllm.records.results import BASE, ROUTED, Sample, WrittenAnswers

MAX_NEW_TOKENS = 48
CUT = " …"  # the end of an answer that has more tokens


def write_answers(
    routed: RoutedModel,
    routers: RouterStack | None,
    paths: Mapping[str, StaticPath],
    samples: Sequence[Sample],
    number: int,
) -> tuple[WrittenAnswers, ...]:
    """Answer the first questions of a task in words.

    Args:
        routed: The model.
        routers: The first seed's routers; None without routers.
        paths: The static paths by name.
        samples: The questions of the task.
        number: How many questions to answer.
    """
    questions = [sample.question for sample in samples[:number]]
    texts = {BASE: _answer(routed, routed.using(FullPolicy()), questions)}
    if routers is not None:
        texts[ROUTED] = _answer(routed, routed.using(RouterPolicy(routers)), questions)
    for name, path in paths.items():
        texts[name] = _answer(routed, routed.fixed(path), questions)
    written = []
    for place, question in enumerate(questions):
        by_system = {name: system_texts[place] for name, system_texts in texts.items()}
        written.append(WrittenAnswers(question=question, answers=by_system))
    return tuple(written)


def _answer(
    routed: RoutedModel, plan: AbstractContextManager[Any], questions: Sequence[str]
) -> list[str]:
    """Answer questions as one system; inside the context `plan` the model decides as it does."""
    with plan:
        answers = generate_many(routed, questions, max_new_tokens=MAX_NEW_TOKENS)
    texts = []
    for answer in answers:
        is_cut = len(answer.tokens) == MAX_NEW_TOKENS and not _has_ended(routed, answer)
        texts.append(answer.text.strip() + (CUT if is_cut else ""))
    return texts


def _has_ended(routed: RoutedModel, answer: GeneratedAnswer) -> bool:
    """Tell whether an answer has an end-of-sequence token."""
    ends = end_tokens(routed.model.generation_config.eos_token_id)
    return answer.tokens[-1] in ends
