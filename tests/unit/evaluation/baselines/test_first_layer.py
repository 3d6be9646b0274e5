from __future__ import annotations

import random

import pytest
import torch

from drllm.errors import ConfigError
from drllm.evaluation.baselines.fitting.sequence_router import SequenceRouter
from drllm.evaluation.baselines.fitting.up_front import (
    Standardise,
    UpFrontPolicy,
    find_bias,
    first_inputs,
    with_one_execution,
)
from drllm.models.routers.depth_control import routes_of
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question

L, D = 4, 32


def some_prompts(number=40, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 101) for _ in range(rng.randint(1, 20))] for _ in range(number)]


@pytest.fixture(scope="module")
def planner(routed):
    router = SequenceRouter(first_inputs(routed, some_prompts()), L)
    router.linear.weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return router


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_what_is_read_is_the_mean_embedding_of_each_prompt_alone(model, routed, batch_size):
    prompts = some_prompts()
    found = first_inputs(routed, prompts, batch_size=batch_size)
    for prompt, row in zip(prompts, found, strict=True):
        expected = model.model.embed_tokens(torch.tensor(prompt)).mean(dim=0)
        torch.testing.assert_close(row, expected)


def test_reading_leaves_the_last_route_as_it_was(routed):
    routed.model(torch.tensor([[5, 6]]))
    before = routed.last_route.tolist()
    first_inputs(routed, some_prompts(3))
    assert before == routed.last_route.tolist()


def test_prompts_that_cannot_be_read_are_refused(routed):
    with pytest.raises(ConfigError, match="there are no prompts"):
        first_inputs(routed, [])


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_the_policy_follows_the_plans_of_each_prompt(routed, planner, bias):
    prompts = some_prompts()
    expected = planner.plans(first_inputs(routed, prompts), bias)
    routes = routes_of(routed, UpFrontPolicy(planner, bias), prompts, batch_size=7)
    assert torch.equal(routes, expected)
    assert len(set(map(tuple, routes.tolist()))) > 10


def test_a_scored_continuation_is_not_read(routed, planner):
    prompts = some_prompts(6)
    questions = [Question(prompt, [[10, 11, 12], [13], [14, 15]]) for prompt in prompts]
    policy = UpFrontPolicy(planner)
    _, routes = ChoiceBatch(routed, questions, 1.0).routed_scores(policy)
    assert torch.equal(routes, routes_of(routed, policy, prompts))


@pytest.mark.parametrize("executions", [1.2, 2.0, 3.3, 4.0, 6.5])
def test_the_bias_gives_the_wanted_executions_when_the_policy_runs(routed, planner, executions):
    prompts = some_prompts()
    found = find_bias(planner, first_inputs(routed, prompts), executions)
    assert found.executions == pytest.approx(executions, abs=1 / len(prompts))
    routes = routes_of(routed, UpFrontPolicy(planner, found.value), prompts)
    assert float(routes.sum(dim=1).double().mean()) == found.executions


def test_a_row_that_would_skip_everything_runs_the_last_layer():
    plans = torch.tensor([[0, 0, 0], [0, 2, 0], [1, 1, 1]])
    assert with_one_execution(plans).tolist() == [[0, 0, 1], [0, 2, 0], [1, 1, 1]]


def test_standardised_inputs_have_mean_0_and_deviation_1_but_where_nothing_varies():
    inputs = 3 + 0.01 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    inputs[:, 2] = 7.0
    scaled = Standardise(inputs)(inputs)
    assert scaled[:, 2].tolist() == [0.0] * 200
    others = scaled[:, [0, 1, 3, 4]]
    torch.testing.assert_close(others.mean(dim=0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(others.std(dim=0, correction=0), torch.ones(4))
