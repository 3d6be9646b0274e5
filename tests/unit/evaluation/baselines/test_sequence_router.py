"""The router for the whole model: what it reads, how it is followed."""

import pytest
import torch

from drllm.evaluation.baselines.sequence_router import (
    SequenceRouterPolicy,
    find_bias,
    make_plans,
    read_first_inputs,
)
from drllm.models.routing.depth_control import route_prompts
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.score import Request


@pytest.fixture(scope="module")
def prompts(some_prompts):
    return some_prompts(40)


@pytest.fixture(scope="module")
def router(routed, prompts):
    inputs = read_first_inputs(routed, prompts)
    router = torch.nn.Linear(inputs.shape[1], 3 * routed.num_layers).requires_grad_(False)
    router.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0)).div_(inputs.std(0))
    router.bias.copy_(-router.weight @ inputs.mean(dim=0))
    return router


def test_what_is_read_is_the_mean_embedding_of_each_prompt_alone(model, routed, prompts):
    found = read_first_inputs(routed, prompts)
    for prompt, row in zip(prompts, found, strict=True):
        expected = model.model.embed_tokens(torch.tensor(prompt)).mean(dim=0)
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_the_policy_follows_the_plans_of_each_prompt(routed, router, prompts, bias):
    expected = make_plans(router, read_first_inputs(routed, prompts), bias)
    routes = route_prompts(routed, SequenceRouterPolicy(router, bias), prompts, batch_size=7)
    assert torch.equal(routes, expected)
    assert len(set(map(tuple, routes.tolist()))) > 10


def test_a_scored_continuation_is_not_read(routed, router, prompts):
    questions = [Request(prompt, [[10, 11, 12], [13], [14, 15]]) for prompt in prompts[:6]]
    policy = SequenceRouterPolicy(router)
    _, routes = ChoiceBatch(routed, questions, 1.0).routed_scores(policy)
    assert torch.equal(routes, route_prompts(routed, policy, prompts[:6]))


@pytest.mark.parametrize("executions", [1.2, 2.0, 3.3, 4.0, 6.5])
def test_the_bias_gives_the_wanted_executions_when_the_policy_runs(
    routed, router, prompts, executions
):
    found = find_bias(router, read_first_inputs(routed, prompts), executions)
    assert found.executions == pytest.approx(executions, abs=1 / len(prompts))
    routes = route_prompts(routed, SequenceRouterPolicy(router, found.value), prompts)
    assert float(routes.sum(dim=1).double().mean()) == found.executions


def test_a_row_that_would_skip_everything_runs_the_last_layer(router):
    assert make_plans(router, torch.zeros(2, 32), 1000.0).tolist() == [[0, 0, 0, 1]] * 2
