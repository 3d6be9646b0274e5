from __future__ import annotations

import random

import pytest
import torch

from drllm.errors import ModelError
from drllm.evaluation.baselines.fitting.measures import (
    gold_logprob,
    gold_logprob_along,
    text_question,
    token_logprob,
)
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question
from drllm.paths import to_path

TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""

PLANS = [(1, 1, 1, 1), (1, 0, 1, 1), (2, 1, 0, 1), (0, 1, 1, 2), (0, 0, 0, 1)]


def test_the_gold_logprob_equals_that_of_each_option_alone(batches, golds, slow_gold_logprob):
    found = gold_logprob(batches, golds)(PLANS)
    assert found == pytest.approx([slow_gold_logprob(to_path(p)) for p in PLANS], abs=TOLERANCE)
    assert max(found) - min(found) > 100 * TOLERANCE


def test_paths_are_measured_like_decisions(batches, golds, slow_gold_logprob):
    paths = [(0, 1, 2, 3), (0, 1, 2, 1, 2, 3), (3, 0), (0, 1, 1, 1, 2, 3)]
    found = gold_logprob_along(batches, golds)(paths)
    assert found == pytest.approx([slow_gold_logprob(path) for path in paths], abs=TOLERANCE)


def test_states_of_one_batch_are_given_up_before_the_next(batches, golds):
    gold_logprob(batches, golds)(PLANS)
    assert [len(batch.states) for batch in batches] == [0, 0]


def test_the_token_logprob_is_minus_the_loss_of_the_plain_model(routed, listed):
    rng = random.Random(0)
    texts = [[rng.randrange(3, 101) for _ in range(length)] for length in (2, 9, 30)]
    answers = [Question(text[:5], [text[5:]]) for text in texts[1:]]
    groups = [[text_question(text) for text in texts], answers]
    found = token_logprob([ChoiceBatch(routed, group, 1.0) for group in groups])(PLANS)
    for plan, value in zip(PLANS, found, strict=True):
        plain, losses = listed(to_path(plan)), []
        for question in [*groups[0], *groups[1]]:
            num = len(question.context)
            row = torch.tensor([*question.context, *question.continuations[0]])
            with torch.no_grad():
                logits = plain(row[None], use_cache=False).logits[0]
            losses.append(
                torch.nn.functional.cross_entropy(logits[num - 1 : -1], row[num:], reduction="none")
            )
        assert value == pytest.approx(-float(torch.cat(losses).mean()), abs=TOLERANCE)


def test_numbers_that_are_not_finite_are_refused(tiny_llama, golds):
    model = tiny_llama(num_layers=4)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    batch = ChoiceBatch(RoutedModel(model), [Question([5, 6], [[7], [8]])], 1.0)
    measure = gold_logprob([batch], [[0]])
    assert measure([(1, 0, 1, 1)])[0] < 0
    with pytest.raises(ModelError, match="--dtype float32"):
        measure([(1, 1, 1, 1)])
