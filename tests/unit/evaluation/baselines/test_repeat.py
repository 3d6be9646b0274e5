from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from drllm.evaluation.baselines.fitting.measures import by_answers, by_answers_along
from drllm.evaluation.baselines.repeat import best_block, repeated
from drllm.models.base.load import BaseModel
from drllm.models.export import export_path
from drllm.models.routing.routed_model import RoutedModel

L = 4
TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""


def test_the_best_block_equals_that_of_trying_one_path_at_a_time(material, slow_gold_logprob):
    by_hand = {
        (start, end): slow_gold_logprob([*range(end + 1), *range(start, L)])
        for start in range(L)
        for end in range(start, L)
    }
    assert len(by_hand) == 10
    assert best_block(by_answers_along(material), L) == max(by_hand, key=by_hand.get)


def test_no_block_is_longer_than_asked_for():
    start, end = best_block(lambda paths: list(map(float, map(len, paths))), L, longest=2)
    assert end - start == 1


def test_of_equal_blocks_the_shortest_and_first_is_taken():
    assert best_block(lambda paths: [0.0] * len(paths), L) == (0, 0)


def test_the_exported_model_scores_what_was_measured(
    model, material, material_of, tiny_tokenizer, tmp_path
):
    measure = by_answers_along(material)
    path = repeated(*best_block(measure, L), L)
    export_path(BaseModel(model, tiny_tokenizer, "tiny"), path, tmp_path / "repeat")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "repeat", dtype=torch.float32).eval()
    found = by_answers(material_of(RoutedModel(exported)))([(1,) * len(path)])
    assert found == pytest.approx(measure([path]), abs=TOLERANCE)
