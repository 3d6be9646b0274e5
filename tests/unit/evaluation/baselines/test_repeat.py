from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from drllm.evaluation.baselines.fitting.measures import MEASURES, by_answers
from drllm.evaluation.baselines.repeat import BlockRepeat, repeated
from drllm.models.base.load import BaseModel
from drllm.models.export import export_path
from drllm.models.routing.routed_model import RoutedModel

L = 4
TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""


@pytest.fixture
def best_block(without_a_model):
    """A function that returns the baseline's block under a measure."""

    def find(measure, num_layers=L):
        fitted = without_a_model(num_layers)
        fitted.measure = {"answers along": measure}.get
        return BlockRepeat(fitted).block

    return find


def test_the_best_block_equals_that_of_trying_one_path_at_a_time(
    material, slow_gold_logprob, best_block
):
    by_hand = {
        (start, end): slow_gold_logprob([*range(end + 1), *range(start, L)])
        for start in range(L)
        for end in range(start, L)
    }
    assert len(by_hand) == 10
    assert best_block(MEASURES["answers along"](material)) == max(by_hand, key=by_hand.get)


def test_of_equal_blocks_the_shortest_and_first_is_taken_and_none_is_longer_than_eight(best_block):
    assert best_block(lambda paths: [0.0] * len(paths)) == (0, 0)
    assert best_block(lambda paths: list(map(len, paths)), num_layers=20) == (0, 7)


def test_the_exported_model_scores_what_was_measured(
    model, material, material_of, tiny_tokenizer, tmp_path, best_block
):
    measure = MEASURES["answers along"](material)
    path = repeated(*best_block(measure), L)
    export_path(BaseModel(model, tiny_tokenizer, "tiny"), path, tmp_path / "repeat")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "repeat", dtype=torch.float32).eval()
    found = by_answers(material_of(RoutedModel(exported)))([(1,) * len(path)])
    assert found == pytest.approx(measure([path]), abs=TOLERANCE)
