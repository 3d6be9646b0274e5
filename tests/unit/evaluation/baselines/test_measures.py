"""What candidates are measured by: the same whatever batches the questions fall into."""

import dataclasses
import random
from statistics import fmean

import pytest
import torch

from drllm.errors import ModelError
from drllm.evaluation.baselines import material as materials
from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.baselines.material import Material, make_measure
from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.score import Request
from drllm.paths import to_path
from slow_way import ListedModel

TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""

PLANS = [(1, 1, 1, 1), (1, 0, 1, 1), (2, 1, 0, 1), (0, 1, 1, 2), (0, 0, 0, 1)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Two questions a batch: their lengths take them out of their order."""
    monkeypatch.setattr("drllm.models.scoring.score.BATCH_SIZE", 2)


def test_the_gold_logprob_equals_that_of_each_option_alone(routed, material, slow_gold_logprob):
    found = make_measure(routed, material, "answers")(PLANS)
    assert found == pytest.approx([slow_gold_logprob(to_path(p)) for p in PLANS], abs=TOLERANCE)
    assert max(found) - min(found) > 100 * TOLERANCE


def test_the_token_logprob_is_minus_the_loss_of_the_plain_model(routed, model):
    rng = random.Random(0)
    texts = [[rng.randrange(3, 101) for _ in range(length)] for length in (2, 9, 30, 1)]
    found = make_measure(routed, Material(prompts=texts), "loss")(PLANS)
    for plan, value in zip(PLANS, found, strict=True):
        plain = ListedModel(model, plan)
        logprobs = [each for text in texts[:3] for each in plain.each(text[:1], text[1:])]
        assert value == pytest.approx(fmean(logprobs), abs=TOLERANCE)


def test_numbers_of_the_full_path_that_are_not_finite_are_refused(tiny_llama):
    model = tiny_llama(num_layers=4)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    questions = [Request([5, 6], [[7], [8]])]
    routed = RoutedModel(model)
    material = Material(questions=questions, golds=[0])
    measure = make_measure(routed, material, "answers")
    assert measure([(1, 0, 1, 1)])[0] < 0
    with pytest.raises(ModelError, match="--dtype float32"):
        measure([(1, 1, 1, 1)])


def test_what_is_known_of_candidates_is_not_measured_again(material, routed, monkeypatch):
    known = {}

    def remember(name, candidates, measure):
        key = (name, tuple(candidates))
        if key not in known:
            known[key] = measure(candidates)
        return known[key]

    def plans():
        named = dataclasses.replace(material, name="arc")
        routes = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]])
        names = ("greedy by loss", "greedy by answers")
        rng = torch.Generator().manual_seed(0)
        return [
            BASELINES.get(name)(routed, named, remember).make_run(routes, rng) for name in names
        ]

    def measured_again(*_):
        raise AssertionError

    before = plans()
    assert {name for name, _ in known} == {"arc by loss", "arc by answers"}
    monkeypatch.setattr(materials, "_mean_scores", measured_again)
    for first, again in zip(before, plans(), strict=True):
        assert torch.equal(again.routing, first.routing)
