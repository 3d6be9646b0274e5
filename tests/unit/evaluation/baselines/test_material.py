"""What baselines are fitted on: the same measure whatever batches the questions fall into."""

from __future__ import annotations

import pytest
import torch

from drllm.evaluation.baselines.base import FittedBaselines
from drllm.evaluation.baselines.fitting import measures
from drllm.evaluation.baselines.material import Material
from drllm.paths import to_path

TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""

PLANS = [(1, 1, 1, 1), (1, 0, 1, 1), (2, 1, 0, 1)]


@pytest.fixture
def material(asked, routed, monkeypatch):
    """The questions in two batches, which their lengths take out of their order."""
    monkeypatch.setattr(measures, "BATCH_SIZE", 2)
    questions, golds = zip(*asked, strict=True)
    return Material(routed, [question.context for question in questions], questions, golds)


def test_questions_are_batched_by_length_and_keep_their_right_options(material, slow_gold_logprob):
    expected = [slow_gold_logprob(to_path(plan)) for plan in PLANS]
    assert measures.by_answers(material)(PLANS) == pytest.approx(expected, abs=TOLERANCE)
    along = measures.by_answers_along(material)([to_path(plan) for plan in PLANS])
    assert along == pytest.approx(expected, abs=TOLERANCE)


def test_prompts_are_measured_as_if_each_stood_alone(material, routed):
    losses, num_tokens = [0.0] * len(PLANS), 0
    for prompt in material.prompts:
        alone = measures.by_loss(Material(routed, [prompt]))(PLANS)
        num = len(prompt) - 1
        num_tokens += num
        losses = [loss + num * value for loss, value in zip(losses, alone, strict=True)]
    expected = [loss / num_tokens for loss in losses]
    assert measures.by_loss(material)(PLANS) == pytest.approx(expected, abs=TOLERANCE)


def test_what_is_known_of_candidates_is_not_measured_again(material, routed, monkeypatch):
    known = {}

    def remember(name, candidates, measure):
        key = (name, tuple(candidates))
        if key not in known:
            known[key] = measure(candidates)
        return known[key]

    def plans():
        of_task = FittedBaselines("arc", lambda: material, routed, remember)
        routes = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]])
        names = ("greedy by loss", "greedy by answers", "block repeat")
        return [of_task.at(name, routes, torch.Generator().manual_seed(0)) for name in names]

    def measured_again(*_):
        raise AssertionError

    before = plans()
    assert {name for name, _ in known} == {"arc by loss", "arc by answers", "arc by answers along"}
    for kind in measures.MEASURES:
        monkeypatch.setitem(measures.MEASURES, kind, measured_again)
    for first, again in zip(before, plans(), strict=True):
        assert again.path == first.path
        assert again.plan is first.plan is None or torch.equal(again.plan, first.plan)
