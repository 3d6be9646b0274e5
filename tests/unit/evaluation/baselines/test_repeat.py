from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from drllm.errors import ConfigError
from drllm.evaluation.baselines.measures import gold_logprob, gold_logprob_along
from drllm.evaluation.baselines.repeat import best_block, repeated
from drllm.models.base.load import BaseModel
from drllm.models.export import export_path
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch

L = 4
TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""


def test_the_best_block_equals_that_of_trying_one_path_at_a_time(batches, golds, slow_gold_logprob):
    found = best_block(gold_logprob_along(batches, golds), L)
    by_hand = {
        (start, end): slow_gold_logprob(
            [*range(end + 1), *range(start, end + 1), *range(end + 1, L)]
        )
        for start in range(L)
        for end in range(start, L)
    }
    best = max(by_hand, key=by_hand.get)
    assert (found.start, found.end) == best
    assert found.value == pytest.approx(by_hand[best], abs=TOLERANCE)
    assert found.full_value == pytest.approx(slow_gold_logprob(range(L)), abs=TOLERANCE)
    assert found.num_tried == len(by_hand) == 10
    assert found.path == repeated(*best, L)


def test_only_blocks_of_the_lengths_asked_for_are_tried(batches, golds):
    found = best_block(gold_logprob_along(batches, golds), L, lengths=[3, 9])
    assert found.num_tried == 2
    assert found.end - found.start == 2


def test_of_equal_blocks_the_shortest_and_first_is_taken():
    assert best_block(lambda paths: [0.0] * len(paths), L).path == (0, 0, 1, 2, 3)


def test_lengths_that_no_block_has_are_refused():
    with pytest.raises(ConfigError, match="the model's 4 layers"):
        best_block(lambda paths: [0.0] * len(paths), L, lengths=[0, 5])


def test_the_exported_model_scores_what_was_measured(
    model, routed, batches, golds, tiny_tokenizer, tmp_path
):
    measure = gold_logprob_along(batches, golds)
    found = best_block(measure, L, lengths=[2])
    export_path(BaseModel(model, tiny_tokenizer, "tiny"), found.path, tmp_path / "repeat")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "repeat", dtype=torch.float32).eval()
    plain = RoutedModel(exported)
    same = [ChoiceBatch(plain, batch.questions, 1.0) for batch in batches]
    full = (1,) * len(found.path)
    assert gold_logprob(same, golds)([full])[0] == pytest.approx(found.value, abs=TOLERANCE)
